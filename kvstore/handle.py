"""Waits as values: ask, poll a descriptor, await, or block with a deadline."""

from __future__ import annotations

import asyncio
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvstore.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far some work has come.

    Attributes:
        done_bytes, total_bytes: of the bytes that it moves; both 0 where it moves none, or none are known of yet.
        state: what it does now, in words; `done` or `failed` at its end.
    """

    done_bytes: int
    total_bytes: int
    state: str


class Handle(Generic[T]):
    """The result of work that is still going on.

    Any thread may call any method. The first of `resolve` and `fail` wins; later ones are ignored, so
    that a cancel and a success can race without harm.

    Args:
        waiting_for: the work, for messages.
        cancel: asks it to stop, for a reason.
        progress: says how far it has come; asked as long as it has not ended, and once more then.
    """

    def __init__(
        self,
        waiting_for: str,
        cancel: Callable[[str], None] | None = None,
        progress: Callable[[], Progress] | None = None,
    ) -> None:
        self._waiting_for = waiting_for
        self._cancel = cancel
        self._progress = progress
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._value: Any = None
        self._error: BaseException | None = None
        self._descriptor: int | None = None
        self._final: Progress | None = None

    def done(self) -> bool:
        """Whether a result or an error is there."""
        return self._event.is_set()

    def progress(self) -> Progress:
        """How far the work has come; the bytes stay what they were when it ended."""
        with self._lock:
            final, ask = self._final, self._progress
        if final is not None:
            return final
        return Progress(0, 0, "waiting") if ask is None else ask()

    def result(self, deadline_s: float) -> T:
        """Block until the work has ended; its value, or its error raised.

        Raises:
            DeadlineError: it has not ended after `deadline_s` seconds; the work goes on.
        """
        if not self._event.wait(min(deadline_s, threading.TIMEOUT_MAX)):
            raise DeadlineError(f"{self._waiting_for} did not end within {deadline_s:g} s")
        try:
            if self._error is not None:
                raise self._error
            value: T = self._value
            return value
        finally:
            # The error's traceback holds this frame. If the frame held the handle too, the handle would keep
            # its descriptor until the garbage collector ran.
            del self

    def cancel(self, reason: str = "cancelled by the caller") -> None:
        """Ask the work to stop. It then ends with an error soon, unless it has ended before."""
        cancel = self._cancel
        if cancel is not None and not self.done():
            cancel(reason)

    def fileno(self) -> int:
        """A descriptor that becomes readable when the work has ended; for `select`, epoll, asyncio.

        It lives as long as the handle. Do not read from it or close it.
        """
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.eventfd(1 if self._event.is_set() else 0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return self._descriptor

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> T:
        try:
            if not self.done():
                await readable(self.fileno())
            return self.result(0.0)
        finally:
            del self

    def resolve(self, value: T) -> bool:
        """For the side that does the work: it has succeeded. False if the handle had ended before."""
        return self._finish(value, None)

    def fail(self, error: BaseException) -> None:
        """For the side that does the work: it has failed."""
        self._finish(None, error)

    def _finish(self, value: Any, error: BaseException | None) -> bool:
        last = self.progress()
        with self._lock:
            if self._event.is_set():
                return False
            self._value, self._error = value, error
            self._final = replace(last, state="done" if error is None else "failed")
            # What these ask may hold what the work has given back.
            self._progress = self._cancel = None
            self._event.set()
            if self._descriptor is not None:
                os.eventfd_write(self._descriptor, 1)
            return True

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


async def readable(descriptor: int) -> None:
    """Wait until a descriptor is readable; several tasks and loops may wait for one."""
    loop = asyncio.get_running_loop()
    woken = loop.create_future()

    def wake() -> None:
        if not woken.done():
            woken.set_result(None)

    # A loop keeps one reader for each descriptor, so each waiter brings its own.
    own = os.dup(descriptor)
    try:
        loop.add_reader(own, wake)
        try:
            await woken
        finally:
            loop.remove_reader(own)
    finally:
        os.close(own)
