"""What the demo prints while it works: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from .child import Progress as ChildProgress

LINE_FRACTION = 0.25
"""Without a terminal a line is printed each time so much more is done."""
WIDTH_MIN = 110
"""Tables are this wide at least where the output is no terminal."""


class Display:
    """One line per process. A context manager; `console` may be printed to at any time."""

    def __init__(self) -> None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=max(console.width, WIDTH_MIN))
        self.console = console
        self._bars: Progress | None = None
        if console.is_terminal:
            self._bars = Progress(
                TextColumn("  {task.fields[process]:<8}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
        self._tasks: dict[str, TaskID] = {}
        self._shown: dict[str, ChildProgress] = {}

    def __enter__(self) -> Display:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def heading(self, text: str) -> None:
        """A new step."""
        self._shown.clear()
        self.console.print(f"\n{text}", style="bold", markup=False)

    def line(self, text: str) -> None:
        """A result."""
        self.console.print(f"  {text}", markup=False)

    def quote(self, speaker: str, text: str) -> None:
        """What a person asked or a model said."""
        for paragraph in text.strip().splitlines():
            for line in wrap(paragraph, self.console.width - 16):
                self.console.print(f"    {speaker:<8}| {line}", style="italic", markup=False)
                speaker = ""

    def progress(self, process: str, progress: ChildProgress) -> None:
        """How far a process has come."""
        if self._bars is None:
            self._print(process, progress)
            return
        if process not in self._tasks:
            self._tasks[process] = self._bars.add_task("", total=None, process=process)
        task = self._tasks[process]
        if process not in self._shown or self._shown[process].what.partition(":")[0] != progress.what.partition(":")[0]:
            self._bars.reset(task)
        self._shown[process] = progress
        total = None if progress.fraction is None else 1.0
        self._bars.update(task, description=progress.what, total=total, completed=progress.fraction or 0.0)

    def _print(self, process: str, progress: ChildProgress) -> None:
        before = self._shown.get(process)
        fraction = progress.fraction
        if before is not None and before.what.rstrip("0123456789. KMGTiB") == progress.what.rstrip(
            "0123456789. KMGTiB"
        ):
            is_near = fraction is not None and fraction < (before.fraction or 0.0) + LINE_FRACTION
            if fraction is None or (is_near and fraction < 1.0):
                return
        self._shown[process] = progress
        share = "" if fraction is None else f" {fraction:.0%}"
        self.console.print(f"    {process}: {progress.what}{share}", style="dim", markup=False)
