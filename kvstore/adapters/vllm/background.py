"""A thread that does what the engine's thread leaves to it, in order."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.clock import Deadline

logger = logging.getLogger(__name__)


class Background:
    """One thread, started with the first task. Any thread asks; nothing here blocks it but `wait` and `close`.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_running = False
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def do(self, task: Callable[[], None]) -> None:
        """Do a task behind those that were asked for before. What it raises is logged."""
        with self._changed:
            if self._is_closed:
                return
            self._waiting.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drop(self) -> None:
        """Forget the tasks that have not begun."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()

    def wait(self, deadline: Deadline) -> bool:
        """Block until nothing waits or runs; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._is_running, deadline.remaining_s())

    def close(self, deadline_s: float) -> bool:
        """Forget what waits, and wait for what runs; False if that takes longer."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is None:
            return True
        thread.join(deadline_s)
        return not thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                task = self._waiting.popleft()
                self._is_running = True
            try:
                task()
            except Exception:
                logger.exception("a task of %s failed", self._name)
            with self._changed:
                self._is_running = False
                self._changed.notify_all()
