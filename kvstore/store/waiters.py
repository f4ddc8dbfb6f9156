"""Waiting for something to be committed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import PoolError, StoreClosedError
from kvstore.handle import Handle
from kvstore.limits import OPEN_WAITS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.pool import BasePool


@dataclass(frozen=True)
class _Waiter:
    handle: Handle[Any]
    attempt: Callable[[], Any]
    undo: Callable[[Any], None] | None


class Waiters:
    """Handles that resolve when an attempt succeeds; tried now, and after each change of the pool.

    One thread at a time tries; another one that comes meanwhile only makes it look again. So no attempt runs
    twice at once, and an attempt that changes the pool does not nest.

    Args:
        pool: its changes are followed while something waits, and only then: in another process they cost a message.
    """

    def __init__(self, pool: BasePool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._follow_lock = threading.RLock()
        self._waiting: OrderedDict[int, _Waiter] = OrderedDict()
        self._is_trying = False
        self._look_again = False
        self._is_subscribed = False

    def add(
        self, waiting_for: str, attempt: Callable[[], Any], undo: Callable[[Any], None] | None = None
    ) -> Handle[Any]:
        """A handle for the first value of `attempt` that is not None.

        Args:
            undo: takes back a value that came just when the wait was cancelled.

        Raises:
            PoolError: too many are waiting already.
        """
        handle: Handle[Any] = Handle(waiting_for, lambda reason: self._cancel(handle, reason))
        with self._lock:
            if len(self._waiting) >= OPEN_WAITS_MAX:
                raise PoolError(f"{OPEN_WAITS_MAX} waits are open, which is the limit; cancel some")
            self._waiting[id(handle)] = _Waiter(handle, attempt, undo)
        self._follow()
        self.retry()
        return handle

    def _follow(self) -> None:
        """Subscribe to the pool or end the subscription, as the waits now ask for. Not under the lock."""
        with self._follow_lock:
            wanted = bool(self._waiting)
            if wanted == self._is_subscribed:
                return
            self._is_subscribed = wanted
            if wanted:
                self._pool.subscribe(self.retry)
            else:
                self._pool.unsubscribe(self.retry)

    def retry(self) -> None:
        """Try every open wait again, oldest first."""
        with self._lock:
            self._look_again = True
            if self._is_trying:
                return
            self._is_trying = True
        try:
            while (waiting := self._next_round()) is not None:
                for waiter in waiting:
                    self._try(waiter)
        except BaseException:
            with self._lock:
                self._is_trying = False
            raise

    def _next_round(self) -> list[_Waiter] | None:
        with self._lock:
            if not self._look_again:
                self._is_trying = False
                return None
            self._look_again = False
            return list(self._waiting.values())

    def _try(self, waiter: _Waiter) -> None:
        if waiter.handle.done():
            return
        try:
            value = waiter.attempt()
        except Exception as error:
            self._forget(waiter)
            waiter.handle.fail(error)
            return
        if value is not None:
            self._forget(waiter)
            if not waiter.handle.resolve(value) and waiter.undo is not None:
                waiter.undo(value)

    def _forget(self, waiter: _Waiter) -> None:
        with self._lock:
            self._waiting.pop(id(waiter.handle), None)
        self._follow()

    def _cancel(self, handle: Handle[Any], reason: str) -> None:
        with self._lock:
            self._waiting.pop(id(handle), None)
        self._follow()
        handle.fail(PoolError(f"the wait was given up: {reason}"))

    def close(self) -> None:
        """Fail every open wait."""
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        self._follow()
        for waiter in waiting:
            waiter.handle.fail(StoreClosedError("the store was closed while waiting"))
