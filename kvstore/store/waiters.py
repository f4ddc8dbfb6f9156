"""Waiting for something to be committed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import PoolError, StoreClosedError
from kvstore.handle import Handle
from kvstore.limits import PENDING_HANDOVERS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class _Waiter:
    handle: Handle[Any]
    attempt: Callable[[], Any]


class Waiters:
    """Handles that resolve when an attempt succeeds; tried now, and after each change of the pool."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: OrderedDict[int, _Waiter] = OrderedDict()

    def add(self, waiting_for: str, attempt: Callable[[], Any]) -> Handle[Any]:
        """A handle for the first value of `attempt` that is not None.

        Raises:
            PoolError: too many are waiting already.
        """
        handle: Handle[Any] = Handle(waiting_for, lambda reason: self._cancel(handle, reason))
        with self._lock:
            if len(self._waiting) >= PENDING_HANDOVERS_MAX:
                raise PoolError(f"{PENDING_HANDOVERS_MAX} waits are open, which is the limit; cancel some")
            self._waiting[id(handle)] = _Waiter(handle, attempt)
        self.retry()
        return handle

    def retry(self) -> None:
        """Try every open wait again, oldest first."""
        with self._lock:
            waiting = list(self._waiting.values())
        for waiter in waiting:
            try:
                value = waiter.attempt()
            except Exception as error:
                self._finish(waiter, None, error)
                continue
            if value is not None:
                self._finish(waiter, value, None)

    def _finish(self, waiter: _Waiter, value: Any, error: BaseException | None) -> None:
        with self._lock:
            self._waiting.pop(id(waiter.handle), None)
        if error is not None:
            waiter.handle.fail(error)
        else:
            waiter.handle.resolve(value)

    def _cancel(self, handle: Handle[Any], reason: str) -> None:
        with self._lock:
            self._waiting.pop(id(handle), None)
        handle.fail(PoolError(f"the wait was cancelled: {reason}"))

    def close(self) -> None:
        """Fail every open wait."""
        with self._lock:
            waiting = list(self._waiting.values())
            self._waiting.clear()
        for waiter in waiting:
            waiter.handle.fail(StoreClosedError("the store was closed while waiting"))
