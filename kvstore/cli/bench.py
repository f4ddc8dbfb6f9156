"""`kvstore bench`: what its commands take."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import Annotated

import typer

bench_app = typer.Typer(
    name="bench",
    no_args_is_help=True,
    help="Measure on this machine, against other ways to do the same.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench_app.callback()
def bench() -> None:
    """Measure on this machine, against other ways to do the same."""


@bench_app.command()
def transfer(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[tcp://HOST:PORT]", help="Where the other machine listens; else a second process."),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(metavar="tcp://HOST:PORT", help="Be the receiving machine, for runs from others.")
    ] = None,
    idle: Annotated[float, typer.Option(metavar="SECONDS", help="With --listen: end when nobody came for so long.")] = (
        600.0
    ),
    sizes: Annotated[
        str | None,
        typer.Option(help="Bytes of the records, or count and bytes: 64KiB,1MiB,256x1MiB. Default: five cases."),
    ] = None,
    count: Annotated[str, typer.Option(help="How many records, for sizes without a count of their own: 1,256.")] = "1",
    piece: Annotated[str, typer.Option(help="Bytes of one piece of a record, which has a checksum.")] = "16KiB",
    spec: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="Records of this model's prompt instead. May be repeated."),
    ] = None,
    prompt_tokens: Annotated[str, typer.Option(help="With --spec: lengths of the prompts: 8192,32768.")] = "8192",
    against: Annotated[
        str, typer.Option(help="Baselines: raw, raw-python, iperf3, mooncake, nixl; or none.")
    ] = "raw,iperf3,mooncake,nixl",
    connections: Annotated[str | None, typer.Option(help="Connections of one transfer: 1,2,4,8.")] = None,
    congestion: Annotated[str | None, typer.Option(help="Congestion controls, of every side: cubic,bbr.")] = None,
    pacing: Annotated[str | None, typer.Option(metavar="BYTES", help="The most bytes per second: 1GB.")] = None,
    busy: Annotated[str, typer.Option(help="Busy processes beside, on each machine: 0,2.")] = "0",
    rounds: Annotated[int, typer.Option(help="Rounds of each side; one more is not counted.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the contents.")] = 1,
    deadline: Annotated[float, typer.Option(metavar="SECONDS", help="The longest that one round may take.")] = 60.0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw them: a self-contained SVG.")] = None,
) -> None:
    """Move a cache between two processes or machines, and the same bytes by other programs, in turn.

    Exits with 1 if our own transfer failed in some case.
    """
    from kvstore.cli import bench_transfer as command
    from kvstore.errors import BenchmarkError, SpecError

    if listen is not None:
        if target is not None:
            raise typer.BadParameter("a listening machine has no target; leave one of the two out")
        command.run_listen(listen, idle)
        return
    try:
        settings = command.settings_of(
            sizes, count, piece, spec or [], prompt_tokens, against, connections, congestion, pacing, busy,
            rounds=rounds, seed=seed, deadline_s=deadline,
        )  # fmt: skip
    except (BenchmarkError, SpecError) as error:
        raise typer.BadParameter(str(error)) from error
    raise typer.Exit(command.run_transfer(settings, target, output, plot))
