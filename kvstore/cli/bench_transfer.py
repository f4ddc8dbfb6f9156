"""`kvstore bench transfer`: what was asked for becomes a run, and the run text, JSON and a picture."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

from kvstore.bench.cases import CASES_DEFAULT, parse_sized, spec_case
from kvstore.bench.plot import write_plot
from kvstore.bench.remote import listen
from kvstore.bench.rows import write_rows
from kvstore.bench.table import case_table
from kvstore.bench.transfer import Settings, TransferRun
from kvstore.errors import BenchmarkError
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvstore.bench.result import CaseResult
    from kvstore.bench.rows import Absent
    from kvstore.bench.transfer import Progress

NONE = "none"
WIDTH = 150
EXIT_FAILED = 1


def settings_of(
    sizes: str | None,
    count: str,
    piece: str,
    specs: Sequence[str],
    prompt_tokens: str,
    against: str,
    connections: str | None,
    congestion: str | None,
    pacing: str | None,
    busy: str,
    *,
    rounds: int,
    seed: int,
    deadline_s: float,
) -> Settings:
    """Raises `BenchmarkError` for a value that makes no sense, `SpecError` for a spec file that is none."""
    if specs and sizes is not None:
        raise BenchmarkError("--spec and --sizes are two ways to say what is moved; give one of them")
    if specs:
        cases = [spec_case(source, tokens) for source in specs for tokens in _numbers(prompt_tokens, "--prompt-tokens")]
    else:
        notations = list(CASES_DEFAULT) if sizes is None else _words(sizes)
        cases = parse_sized(notations, _numbers(count, "--count"), _bytes(piece, "--piece"))
    return Settings(
        tuple(cases),
        connections=tuple(_numbers(connections, "--connections")) if connections is not None else (0,),
        congestion=tuple(_words(congestion)) if congestion is not None else ("",),
        pacing_bytes_per_s=float(_bytes(pacing, "--pacing")) if pacing is not None else 0.0,
        busy=tuple(_numbers(busy, "--busy")),
        rounds=rounds,
        seed=seed,
        against=() if against.strip() == NONE else tuple(_words(against)),
        deadline_s=deadline_s,
    )


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(word) for word in _words(text)]
    except ValueError as error:
        raise BenchmarkError(f"{option}={text!r} is no list of whole numbers; write for example 1,4") from error


def _bytes(text: str, option: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise BenchmarkError(f"{option}: {error}") from error


def run_listen(address: str, idle_s: float) -> None:
    """Serve runs from other machines until nobody comes any more, or the user ends it."""
    if not idle_s > 0:
        raise BenchmarkError(f"--idle={idle_s:g} is no positive number of seconds")
    try:
        listen(address, idle_s=idle_s, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def run_transfer(settings: Settings, target: str | None, output: Path | None, plot: Path | None) -> int:
    """Measure, print, write; the exit status."""
    for path in (output, plot):
        if path is not None:
            _check_writable(path)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results: list[CaseResult] = []
    with ExitStack() as stack:
        run = stack.enter_context(TransferRun(settings, target, stack.enter_context(_Bar())))
        console.print(f"{run.place['machine']}; {run.place['commit']}", markup=False, highlight=False)
        for result in run.results():
            results.append(result)
            console.print(case_table(result))
        place, notes = run.place, run.notes
    for reason in dict.fromkeys(f"{each.baseline_name}: {each.reason}" for each in _failures(results)):
        console.print(reason, markup=False, highlight=False)
    for note in notes:
        console.print(note, markup=False, highlight=False)
    if output is not None:
        rows = [row for result in results for row in result.rows()]
        sides = [document for result in results for document in result.documents()]
        write_rows(output, rows, _failures(results), place, sides=sides, notes=notes, seed=settings.seed)
        console.print(f"written to {output}", markup=False)
    if plot is not None:
        write_plot(plot, results, f"{place['machine']}; {place['commit']}")
        console.print(f"drawn in {plot}", markup=False)
    return EXIT_FAILED if any(result.failure for result in results) else 0


def _check_writable(path: Path) -> None:
    """Figures of an hour shall have a place to go to.

    Raises:
        BenchmarkError: the file cannot be written.
    """
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}; name another file") from error


def _failures(results: Sequence[CaseResult]) -> list[Absent]:
    return list(dict.fromkeys(failure for result in results for failure in result.failures()))


class _Bar:
    """A progress bar on standard error if that is a terminal; nothing otherwise."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = (
            ProgressBar(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=console, transient=True,
            )
            if console.is_terminal
            else None
        )  # fmt: skip

    def __enter__(self) -> Callable[[Progress], None]:
        if self._bar is None:
            return lambda _: None
        self._bar.start()
        task = self._bar.add_task("starting")
        bar = self._bar

        def show(progress: Progress) -> None:
            what = f"{progress.label}: {progress.side}"
            bar.update(task, description=what, completed=progress.done, total=progress.of)

        return show

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
