"""A thread that does jobs one after another, and is there only while there are some."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.clock import Deadline


class Worker:
    """Any thread may submit. A job must not raise.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Do `job` after those that were submitted before."""
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()

    def wait(self, deadline: Deadline, what: str) -> None:
        """Block until there are no jobs.

        Raises:
            DeadlineError: there are, by then.
        """
        with self._changed:
            while self._thread is not None:
                if deadline.has_passed:
                    raise DeadlineError(f"{what} has not ended by the deadline; the device is busy or hangs")
                self._changed.wait(min(deadline.remaining_s(), 1.0))

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._jobs:
                    self._thread = None
                    self._changed.notify_all()
                    return
                job = self._jobs.popleft()
            job()
            del job
