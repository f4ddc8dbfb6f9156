"""A few threads that do what a caller must not wait for, and a queue in front of them that has an end."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.handle import Handle

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

T = TypeVar("T")


class Workers:
    """Runs work in the order in which it was given, on threads begun with the first of it. Any thread.

    Args:
        name: of the threads.
        threads: how many at most.
        waiting_max: work that waits for one of them; more is declined.
    """

    def __init__(self, name: str, threads: int, waiting_max: int) -> None:
        self._name = name
        self._threads_max = threads
        self._waiting_max = waiting_max
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Handle[Any], Callable[[], Any]]] = deque()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._running = 0
        self._is_closed = False

    def submit(self, what: str, work: Callable[[], T]) -> Handle[T] | None:
        """Have some work done; None if too much waits already.

        Raises:
            StoreClosedError: closed.
        """
        handle: Handle[T] = Handle(what, lambda reason: self._cancel(handle, reason))
        with self._changed:
            if self._is_closed:
                raise StoreClosedError(f"{what} was asked for after closing")
            if len(self._waiting) >= self._waiting_max:
                return None
            self._waiting.append((handle, work))
            if not self._idle and len(self._threads) < self._threads_max:
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()
        return handle

    def _cancel(self, handle: Handle[Any], reason: str) -> None:
        """What has begun goes on."""
        with self._changed:
            waiting = [each for each in self._waiting if each[0] is not handle]
            was_waiting = len(waiting) < len(self._waiting)
            self._waiting = deque(waiting)
            self._changed.notify_all()
        if was_waiting:
            handle.fail(StoreClosedError(f"it was cancelled: {reason}"))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                self._idle -= 1
                if not self._waiting:
                    return
                handle, work = self._waiting.popleft()
                self._running += 1
            try:
                handle.resolve(work())
            except BaseException as error:  # whatever it is, who waits is told
                handle.fail(error)
            finally:
                del handle, work
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

    def drain(self, deadline_s: float) -> None:
        """Wait until nothing waits and nothing runs.

        Raises:
            DeadlineError: not by then; it goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting and not self._running, deadline_s):
                raise DeadlineError(f"{self._name} did not come to rest within {deadline_s:g} s")

    def close(self, deadline_s: float) -> None:
        """Fail what waits, wait for what runs. Idempotent.

        Raises:
            DeadlineError: something still runs.
        """
        with self._changed:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for handle, _ in waiting:
            handle.fail(StoreClosedError("the foreign store was closed before this began"))
        deadline = Deadline.after(deadline_s)
        for thread in self._threads:
            thread.join(deadline.remaining_s())
        if any(thread.is_alive() for thread in self._threads):
            raise DeadlineError(f"{self._name} did not end within {deadline_s:g} s")
