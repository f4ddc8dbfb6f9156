"""How far simulations are, on standard error: bars on a terminal, else a line for each that ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Self

from kvstore.cli.printing import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

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
