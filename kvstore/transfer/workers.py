"""Threads that are used again: a transfer needs two for a few milliseconds, and starting one takes a tenth of that."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

LOG = logging.getLogger("kvstore.transfer")
IDLE_S = 1.0
"""A thread that nobody has needed for so long ends."""
IDLE_MAX = 64
CLOSE_DEADLINE_S = 5.0


class Task:
    """Something that a worker does. Any thread may ask."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._work: Callable[[], None] | None = work
        self._name = name
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def wait(self, deadline_s: float) -> bool:
        """Wait for its end; at once, and False, if it is what runs this very thread."""
        return self._thread is not threading.current_thread() and self._ended.wait(deadline_s)

    def run(self) -> None:
        """Do it, in the calling thread, which has its name meanwhile."""
        self._thread = threading.current_thread()
        self._thread.name = self._name
        work, self._work = self._work, None  # It mostly holds the task in turn, and much else.
        assert work is not None, "a task runs once"
        try:
            work()
        except Exception:
            LOG.exception("%s ended by an error that nobody expected", self._name)
        finally:
            self._ended.set()


class Workers:
    """Runs tasks, each at once in a thread of its own. Any thread; the threads are daemons."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._is_closed = False

    def run(self, work: Callable[[], None], name: str) -> Task:
        """Begin a task.

        Raises:
            RuntimeError: the system has no thread for it; nothing has begun.
        """
        task = Task(work, name)
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        if worker is not None:
            worker.take(task)
            return task
        _Worker(self, task, name).start()
        return task

    def rest(self, worker: _Worker) -> bool:
        """A worker has nothing to do; False if it is to end."""
        with self._lock:
            may_rest = not self._is_closed and len(self._idle) < IDLE_MAX
            if may_rest:
                self._idle.append(worker)
            return may_rest

    def leave(self, worker: _Worker) -> bool:
        """A worker would like to end; False if somebody is giving it a task."""
        with self._lock:
            if worker not in self._idle:
                return False
            self._idle.remove(worker)
            return True

    def close(self) -> None:
        """End the threads that do nothing; the others end with their tasks. Idempotent."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.take(None)
        for worker in idle:
            worker.join(CLOSE_DEADLINE_S)


class _Worker(threading.Thread):
    def __init__(self, workers: Workers, task: Task, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._workers = workers
        self._task: Task | None = task
        self._given = threading.Semaphore(0)

    def take(self, task: Task | None) -> None:
        """Called by whoever has taken it off the list of idle ones; None ends it."""
        self._task = task
        self._given.release()

    def run(self) -> None:
        while self._task is not None:
            self._task.run()
            self._task = None
            self.name = "kvstore-idle"
            if not self._workers.rest(self):
                return
            if not self._given.acquire(timeout=IDLE_S):
                if self._workers.leave(self):
                    return
                self._given.acquire()
