"""SIGTERM and SIGINT as something that the main thread waits for."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LAST_COUNT = 2
"""After so many, the next one ends the process as if nobody listened."""


class StopSignals:
    """Counts the signals that ask this process to stop. For the main thread; a context manager.

    Attributes:
        count: how many have come.
        last: the name of the last one.
    """

    def __init__(self) -> None:
        self.count = 0
        self.last = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        # The C handler writes a byte for each signal, whichever thread it reached: no lock, no race with a wait.
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._read)
        os.close(self._write)

    def wait(self) -> None:
        """Sleep until one has come."""
        while not self.count:
            select.select([self._read], [], [])
            with suppress(BlockingIOError):
                os.read(self._read, 64)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.count += 1
        self.last = signal.Signals(number).name
        if self.count >= LAST_COUNT:
            for each in STOP_SIGNALS:
                signal.signal(each, signal.SIG_DFL)
