"""What is done once a device has come to certain points: letting memory go that it used, taking what has arrived."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, DeviceError
from kvstore.limits import DEVICE_COPY_DEADLINE_S, DEVICE_POLL_MAX_S, DEVICE_POLL_MIN_S
from kvstore.tiers.gpu.device import never_free

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.tiers.gpu.device import Mark


@dataclass
class _Later:
    marks: Sequence[Mark]
    action: Callable[[DeviceError | None], None]
    due: Deadline
    is_overdue: bool = False


class Afterwards:
    """Runs actions once marks of a device are done, one after another, in a thread that lives while any waits.

    Any thread. An action is run in any case, also long after its deadline: what it lets go of is used until then.

    Args:
        name: of the thread.
        deadline_s: from when on a device that has not come so far is counted as overdue.
    """

    def __init__(self, name: str, deadline_s: float = DEVICE_COPY_DEADLINE_S) -> None:
        self._name = name
        self._deadline_s = deadline_s
        self._waiting: deque[_Later] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = 0
        self.run_count = 0
        """Actions that have been run."""

    @property
    def waiting_count(self) -> int:
        """Actions that have not been run to their end."""
        with self._changed:
            return len(self._waiting) + self._running

    @property
    def overdue_count(self) -> int:
        """Those whose device did not come so far within the deadline, and still has not."""
        with self._changed:
            for later in self._waiting:
                later.is_overdue = later.is_overdue or later.due.has_passed
            return sum(later.is_overdue for later in self._waiting)

    def add(self, marks: Sequence[Mark], action: Callable[[DeviceError | None], None]) -> None:
        """Run `action` once all of `marks` are done, with the error of the device if it failed. It must not raise."""
        with self._changed:
            self._waiting.append(_Later(marks, action, Deadline.after(self._deadline_s)))
            if self._thread is None:
                self._start()
            self._changed.notify_all()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._thread.start()

    def wait(self, deadline: Deadline, what: str) -> None:
        """Block until nothing waits.

        Raises:
            DeadlineError: something does by then.
        """
        with self._changed:
            while self._waiting or self._running:
                if deadline.has_passed:
                    raise DeadlineError(f"{what} is not done by the deadline; the device is busy or hangs")
                self._changed.wait(min(deadline.remaining_s(), 1.0))

    def forget(self) -> None:
        """After a fork, in the child: the thread is the parent's."""
        never_free(self._waiting)
        self._changed = threading.Condition()
        self._waiting = deque()
        self._thread = None
        self._running = 0

    def _work(self) -> None:
        pause_s = DEVICE_POLL_MIN_S
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                later, error = self._next_done()
                if later is None:
                    self._changed.wait(pause_s)
                    pause_s = min(2 * pause_s, DEVICE_POLL_MAX_S)
                    continue
                self._running += 1
            pause_s = DEVICE_POLL_MIN_S
            try:
                later.action(error)
            except BaseException:
                with self._changed:
                    self._start()  # the others must be run all the same
                raise
            finally:
                with self._changed:
                    self._running -= 1
                    self.run_count += 1
                    self._changed.notify_all()
                del later

    def _next_done(self) -> tuple[_Later | None, DeviceError | None]:
        for number, later in enumerate(self._waiting):
            try:
                if not all(mark.is_done() for mark in later.marks):
                    continue
                error = None
            except DeviceError as failed:
                error = failed
            del self._waiting[number]
            return later, error
        return None, None
