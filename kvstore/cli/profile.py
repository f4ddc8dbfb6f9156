"""`kvstore profile`: measures a `transformers` model on this machine and writes its profile."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore._version import __version__
from kvstore.bench.rows import machine_and_commit
from kvstore.cli.printing import print_table
from kvstore.cli.spec import read_config
from kvstore.errors import ProfileError, UnavailableError
from kvstore.limits import PROFILE_TEXT_CHARACTERS_MAX
from kvstore.profiles import load_profile, profile_names, write_profile
from kvstore.profiles.files import profile_to_text
from kvstore.profiles.measuring import MeasuringSettings, measure
from kvstore.profiles.measuring.presets import PRESETS
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.profile import KvSize
    from kvstore.profiles.measuring.timings import Timing
    from kvstore.profiles.measuring.transformers_model import TransformersModel


SPREAD_QUIET = 0.2
"""A larger spread is worth a word: medians of runs on an idle machine agree within a few percent."""


def run_list(*, as_json: bool) -> int:
    """Print the profiles of the package; the exit status."""
    profiles = [load_profile(name) for name in profile_names()]
    if as_json:
        print(json.dumps([json.loads(profile_to_text(profile)) for profile in profiles], indent=2))
        return 0
    columns = ("name", "prefill s at 8K", "S_kv at 8K", "inferred", "source")
    rows = [
        (
            profile.name,
            f"{profile.prefill(8192):.3g}",
            format_bytes(profile.kv.total_bytes(8192)),
            ", ".join(what for what, _ in profile.inferred) or "nothing",
            profile.source,
        )
        for profile in profiles
    ]
    print_table("Profiles of the package", columns, rows)
    return 0


def run_profile(
    model: str,
    output: Path,
    settings: MeasuringSettings,
    *,
    name: str | None,
    device: str,
    dtype: str | None,
    is_replacing: bool,
    as_json: bool,
) -> int:
    """Measure, print what was measured, write the file; the exit status.

    Raises:
        ProfileError: the model cannot be had, or what was measured is no profile.
    """
    if output.exists() and not is_replacing:
        raise ProfileError(f"{output} is there already; give another name, or --force to replace it")
    if not output.parent.is_dir():
        raise ProfileError(f"there is no directory {output.parent} to write {output.name} to; make it first")
    if name is not None and not 1 <= len(name) <= PROFILE_TEXT_CHARACTERS_MAX:
        raise ProfileError(f"--name has {len(name)} characters; a name has 1 to {PROFILE_TEXT_CHARACTERS_MAX}")
    subject = open_model(model, device=device, dtype=dtype)
    place = machine_and_commit()
    source = f"kvstore profile {__version__} on {place['machine']}, {datetime.now(UTC):%Y-%m-%d}"
    with _progress(settings.forwards) as tick:
        measurement = measure(
            subject, settings, source=source, name=name, tick=tick, show=None if as_json else print_timings
        )
    details = {**place, "model": model, **measurement.details}
    write_profile(measurement.profile, output, details=details)
    if as_json:
        print(profile_to_text(measurement.profile, details=details), end="")
        return 0
    print(f"S_kv(l) = {_formula(measurement.profile.kv)} bytes, as real caches hold")
    for what, note in measurement.profile.inferred:
        print(f"{what}: {note}")
    print(f"wrote {output}")
    return 0


def open_model(model: str, *, device: str, dtype: str | None) -> TransformersModel:
    """A preset by name, a configuration with random weights, or a folder with weights.

    Raises:
        UnavailableError: torch or transformers is not installed, or the device is not there.
        ProfileError, SpecError, UnsupportedModelError: there is no such model, or it cannot be built.
    """
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"measuring a model needs torch and transformers ({error}); pip install 'kvstore[transformers]', or write "
            "the profile by hand (docs/profiles.md)"
        ) from error
    from kvstore.profiles.measuring.transformers_model import preset_model, random_model, trained_model

    if model in PRESETS:
        return preset_model(model, device=device, dtype=dtype)
    path = Path(model)
    if not path.exists():
        raise ProfileError(
            f"--model {model!r} is neither one of {', '.join(PRESETS)} nor a model's folder or configuration file; "
            "nothing is downloaded"
        )
    config = read_config(path)
    if path.is_dir() and any(path.glob("*.safetensors")):
        return trained_model(path, config, device=device, dtype=dtype)
    folder = path if path.is_dir() else path.parent
    return random_model(config, name=folder.resolve().name or "model", device=device, dtype=dtype)


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers separated by commas, as an option gives them.

    Raises:
        ProfileError: a part is none.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ProfileError(f"{option}={text!r} is no list of whole numbers; write for example 128,512,2048")
    return tuple(map(int, parts))


def print_timings(prefill: Sequence[Timing], decode: Sequence[Timing]) -> None:
    """What was measured, before it is known whether it makes a profile."""
    for title, unit, timings in (("Prefill", "tokens", prefill), ("One decode step", "requests", decode)):
        rows = [
            (
                str(timing.amount),
                f"{timing.median_s:.6g}",
                f"{timing.spread:.0%}",
                f"{timing.amount / timing.median_s:,.0f}",
                str(len(timing.seconds)),
            )
            for timing in timings
        ]
        print_table(title, (unit, "median s", "spread", "tokens/s", "times"), rows)
    largest = max(timing.spread for timing in (*prefill, *decode))
    if largest > SPREAD_QUIET:
        print(
            f"The middle half of the times of one amount spreads over {largest:.0%} of their median: something else "
            "runs on this machine, and the medians are no better than that."
        )


def _formula(kv: KvSize) -> str:
    parts = (
        (kv.state_bytes, ""),
        (kv.token_bytes, " l"),
        (kv.window_token_bytes, f" min(l, {kv.window_tokens})"),
    )
    return " + ".join(f"{size_bytes:.0f}{of}" for size_bytes, of in parts if size_bytes)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; elsewhere a line for what comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: print(what, file=sys.stderr)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def tick(what: str) -> None:
            progress.update(task, description=what, advance=1)

        yield tick
