"""How far simulations are, on standard error: bars on a terminal, else a line for each that ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

from kvstore.cli.printing import printable
from kvstore.simulate.report.wording import percent, stability

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

    from kvstore.simulate.goodput import Tried
    from kvstore.simulate.workers import Ended


class _Bars:
    """Bars where standard error is a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()


class RunProgress(_Bars):
    """Of one simulation, told the time that it has come to."""

    def __init__(self, name: str, duration_s: float | None) -> None:
        super().__init__()
        if self._bars is not None:
            self._task = self._bars.add_task(printable(name), total=duration_s, state="")

    def __call__(self, at_s: float) -> None:
        if self._bars is not None:
            self._bars.update(self._task, completed=at_s, state=f"{at_s:,.0f} s simulated")


class RatesProgress(_Bars):
    """Of a search for a rate, told of each that was tried."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = printable(name)
        self._tried = 0
        if self._bars is not None:
            self._task = self._bars.add_task(self._name, total=None, state="")

    def __call__(self, tried: Tried) -> None:
        """A simulation has ended."""
        self._tried += 1
        summary = tried.summary
        how = f"{percent(summary.good_share)} within the limits" if summary.is_stable else stability(summary.is_stable)
        told = f"{self._tried}: {tried.requests_per_s:.4g} requests/s, {how}"
        if self._bars is not None:
            self._bars.update(self._task, state=told)
        else:
            print(told, file=sys.stderr, flush=True)

    def reached(self, at_s: float) -> None:
        """The simulation at hand has come to this time."""
        if self._bars is not None:
            self._bars.update(self._task, description=f"{self._name}, {at_s:,.0f} s simulated")


class PointsProgress(_Bars):
    """Of several, told of each that ends."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = names
        self._done = 0
        if self._bars is not None:
            self._task = self._bars.add_task("simulations", total=len(names), state="")

    def __call__(self, number: int, ended: Ended[Any]) -> None:
        self._done += 1
        state = f"{self._done} of {len(self._names)}"
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, state=state)
            return
        how = "failed" if ended.value is None else "done"
        print(f"{state}: {printable(self._names[number])} {how}", file=sys.stderr, flush=True)
