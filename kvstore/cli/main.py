"""The command line: what each command takes. What it does lies in a module of its own, loaded when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvstore.cli.bench import bench_app

app = typer.Typer(
    name="kvstore",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from kvstore._version import __version__
        from kvstore.record.schema import FORMAT_VERSION

        typer.echo(f"kvstore {__version__} (record format {FORMAT_VERSION})")
        raise typer.Exit


@app.callback()
def kvstore(
    _: Annotated[
        bool, typer.Option("--version", help="Print the versions and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Keep, find and move the cache of a prompt's prefix."""


@app.command()
def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option("--require", metavar="NAME", help="Fail if this is unavailable. May be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what this machine offers, what kvstore uses of it, and why not something better.

    Exits with 1 if something that --require or the environment asks for is unavailable.
    """
    from kvstore.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(require or [], as_json=as_json))


@app.command()
def inspect(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Records saved as Arrow streams; directories of an SSD tier."),
    ],
    as_json: AsJson = False,
    pieces: Annotated[bool, typer.Option("--pieces", help="List every piece, not only the first.")] = False,
) -> None:
    """Verify records and show what they hold; show what lies in directories of an SSD tier, without changing them.

    Exits with 1 if a file cannot be read, or is not an undamaged record, or a directory is none of an SSD tier.
    """
    from kvstore.cli.inspect import run_inspect

    raise typer.Exit(run_inspect(files, as_json=as_json, all_pieces=pieces))


@app.command()
def verify(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of an SSD tier.")],
    as_json: AsJson = False,
    is_repairing: Annotated[
        bool, typer.Option("--repair", help="Forget what is damaged. No process may have the directory open.")
    ] = False,
) -> None:
    """Read every record in directories of an SSD tier and check it. Changes nothing without --repair.

    Exits with 1 if something is damaged and was not repaired, with 2 if a directory cannot be used.
    """
    from kvstore.cli.verify import run_verify

    raise typer.Exit(run_verify(directories, as_json=as_json, is_repairing=is_repairing))


@app.command()
def spec(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A model's folder, or its config.json.")],
    weights: Annotated[str, typer.Option(help="Identity of the weights: a digest, a revision, an explicit name.")],
    block_tokens: Annotated[int, typer.Option(help="Tokens per attention block.")] = 64,
    dtype: Annotated[str | None, typer.Option(help="Type of the activations, if the configuration has none.")] = None,
) -> None:
    """Print the spec file of a transformers configuration, which a node serves."""
    from kvstore.cli.spec import run_spec

    raise typer.Exit(run_spec(config, weights=weights, block_tokens=block_tokens, dtype=dtype))


@app.command()
def profile(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="tiny, tiny-dense, small, small-dense; or a model's folder or config.json (random weights where there "
            "are no safetensors).",
        ),
    ] = "tiny",
    output: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the profile is written.")] = Path(
        "profile.json"
    ),
    lengths: Annotated[str, typer.Option(metavar="TOKENS,...", help="Prompts to prefill.")] = "128,512,2048",
    batches: Annotated[str, typer.Option(metavar="REQUESTS,...", help="Batches to decode.")] = "1,4,16",
    rounds: Annotated[int, typer.Option(help="Times that each is measured.")] = 5,
    context_tokens: Annotated[int, typer.Option("--context", help="Tokens that decoded requests have seen.")] = 512,
    decode_steps: Annotated[int, typer.Option("--steps", help="Decode steps of each batch in each round.")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Number type; by default float32 on a CPU, bfloat16 on a GPU.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the profile.")] = None,
    may_repair: Annotated[
        bool,
        typer.Option("--isotonic", help="Average medians that fall, and say so in the file; else they are refused."),
    ] = False,
    deadline_s: Annotated[float, typer.Option("--deadline", metavar="SECONDS", help="For all of it.")] = 3600.0,
    is_replacing: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    is_listing: Annotated[bool, typer.Option("--list", help="Show the profiles of the package instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a transformers model on this machine: prefill by length, decode by batch, bytes of its cache.

    Writes a profile, which kvstore plan and kvstore simulate read (docs/profiles.md). Nothing is downloaded.
    """
    from kvstore.cli.profile import numbers_of, run_list, run_profile
    from kvstore.profiles.measuring import MeasuringSettings

    if is_listing:
        raise typer.Exit(run_list(as_json=as_json))
    settings = MeasuringSettings(
        lengths=numbers_of(lengths, "--lengths"),
        batches=numbers_of(batches, "--batches"),
        rounds=rounds,
        context_tokens=context_tokens,
        decode_steps=decode_steps,
        may_repair=may_repair,
        deadline_s=deadline_s,
    )
    raise typer.Exit(
        run_profile(
            model,
            output,
            settings,
            name=name,
            device=device,
            dtype=dtype,
            is_replacing=is_replacing,
            as_json=as_json,
        )
    )


@app.command()
def plan(
    scenario: Annotated[
        str,
        typer.Argument(
            metavar="[SCENARIO]", help="A scenario's file or name; or paper: the published figures beside ours."
        ),
    ] = "paper-prfaas",
    convention: Annotated[
        str, typer.Option(metavar="at-mean|mean", help="Service time of a range: T(E[L]) as in the paper, or E[T(L)].")
    ] = "at-mean",
    divide: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLUSTER", help="Its instances may change between prefill and decode. Default: convertible ones."
        ),
    ] = None,
    is_fixed: Annotated[bool, typer.Option("--fixed", help="No instance changes; only lengths are divided.")] = False,
    is_exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Try every plan; slow.")] = False,
    rate: Annotated[
        float | None, typer.Option(metavar="REQUESTS/S", help="Show latency at this rate; default: the scenario's.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Plan a deployment: who prefills what, with how many instances, what throughput, TTFT and bandwidth.

    `kvstore plan paper` prints what Prefill-as-a-Service (arXiv 2604.15039) printed beside what the same model gives
    here.
    """
    if scenario == "paper":
        from kvstore.cli.plan_paper import run_plan_paper

        raise typer.Exit(run_plan_paper(as_json=as_json))
    from kvstore.cli.plan import run_plan

    raise typer.Exit(
        run_plan(
            scenario, convention=convention, divide=divide or [], is_fixed=is_fixed, is_exhaustive=is_exhaustive,
            requests_per_s=rate, as_json=as_json,
        )
    )  # fmt: skip


@app.command()
def serve(
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Settings in TOML.")] = None,
    spec: Annotated[str | None, typer.Option(metavar="FILE", help="The model's spec file.")] = None,
    dram: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory of the pool: 8GiB.")] = None,
    ssd: Annotated[
        list[str] | None,
        typer.Option(metavar="DIR:SIZE", help="A tier on disk: /var/cache/kv:200GiB. Once for each drive."),
    ] = None,
    listen: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="Where other nodes connect. May be repeated.")
    ] = None,
    socket: Annotated[
        str | None, typer.Option(metavar="PATH", help="Unix socket at which this host's engines attach.")
    ] = None,
    http: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Health and metrics; empty for none.")] = None,
    serves: Annotated[
        bool | None,
        typer.Option(
            "--serves/--no-serves", help="Whether peers may ask what the pool holds, and fetch it; they may by default."
        ),
    ] = None,
    trust_network: Annotated[
        bool, typer.Option("--trust-network", help="Listen beyond loopback: whoever connects may read and write.")
    ] = False,
    drain_s: Annotated[float | None, typer.Option(metavar="SECONDS", help="How long transfers may end.")] = None,
    log_format: Annotated[str | None, typer.Option(metavar="text|json", help="Form of the log lines.")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help="debug, info, warning or error.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting. May be repeated.")
    ] = None,
) -> None:
    """Serve a pool to other machines, and to processes of this host.

    Flags win over the file, --set over both. On SIGTERM it drains: exits with 0 if every transfer ended, with 1 if some
    were cut off; with 2 if it is configured wrongly, with 3 if it cannot start. All settings: docs/operations.md.
    """
    from kvstore.cli.serve import run_serve

    flags = {
        "spec": spec,
        "dram": dram,
        "ssd": ssd or None,
        "listen": listen or None,
        "attach.socket": socket,
        "http.listen": http,
        "serves": serves,
        "trust_network": trust_network or None,
        "drain_s": drain_s,
        "log.format": log_format,
        "log.level": log_level,
    }
    raise typer.Exit(run_serve(config, flags, assignments or []))


@app.command()
def simulate(
    scenarios: Annotated[
        list[str],
        typer.Argument(metavar="SCENARIO...", help="Files in TOML, or names of those that ship with the package."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where figures and tables are written.")] = None,
    html: Annotated[bool, typer.Option("--html", help="Draw a page of each, and one of all. Needs --out.")] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B,C", help="Simulate at each value of an entry. May be repeated: all combinations."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Simulations at a time; as many as cores by default.")
    ] = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="Look for the largest rate at which enough requests meet the SLO.")
    ] = False,
    rate_max: Annotated[
        float | None,
        typer.Option(
            metavar="REQUESTS/S",
            help="With --goodput: try none above; it begins at the rate of kvstore plan --convention mean.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(metavar="SHARE", help="With --goodput: how near the rate is found; 0.02 by default.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Simulate scenarios, request by request: time to first token, goodput, egress, queues, hits.

    Exits with 1 if a simulation came to nothing, and on Ctrl-C with 130, after comparing those that had ended. What the
    figures mean: docs/reports.md.
    """
    if goodput:
        from kvstore.cli.simulate_goodput import run_goodput

        if html:
            raise typer.BadParameter("draws runs at given rates; leave it out with --goodput", param_hint="--html")
        raise typer.Exit(
            run_goodput(
                scenarios, rate_max_per_s=rate_max, tolerance=tolerance, out=out, sweeps=sweep or [], workers=workers,
                as_json=as_json,
            )
        )  # fmt: skip
    if rate_max is not None or tolerance is not None:
        raise typer.BadParameter("says how to look for goodput; add --goodput", param_hint="--rate-max, --tolerance")
    from kvstore.cli.simulate import run_simulate

    raise typer.Exit(
        run_simulate(scenarios, out=out, has_page=html, sweeps=sweep or [], workers=workers, as_json=as_json)
    )


def main() -> None:
    """Run the command line; also `python -m kvstore`."""
    from kvstore.errors import KVStoreError

    try:
        app()
    except KVStoreError as error:
        typer.echo(f"kvstore: {error}", err=True)
        sys.exit(1)
