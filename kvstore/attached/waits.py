"""Requests of an attached process that take long: done in threads of their own, answered in the session's."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from kvstore.errors import PoolError
from kvstore.limits import ATTACHED_WAITS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.attached.requests import Answer


class Waits:
    """What one process waits for. The session goes on meanwhile, and answers its signs of life.

    Args:
        later: runs something in the session's thread.
    """

    def __init__(self, later: Callable[[Callable[[], None]], None]) -> None:
        self._later = later
        self._lock = threading.Lock()
        self._running = 0
        self._outcomes: dict[int, tuple[Any, Callable[[Any], None]]] = {}
        self._last_number = 0
        self._is_closed = False

    def begin(
        self, work: Callable[[], Any], pack: Callable[[Any], bytes], answer: Answer, *, undo: Callable[[Any], None]
    ) -> None:
        """Do `work` in a thread, then answer with `pack` of its value in the session's.

        Args:
            undo: takes back a value that came when the process had gone.

        Raises:
            PoolError: too many are waited for, or there can be no thread for it.
        """
        with self._lock:
            if self._running >= ATTACHED_WAITS_MAX:
                raise PoolError(
                    f"this process waits for {ATTACHED_WAITS_MAX} loads or flushes, which is the limit; wait for some"
                )
            self._running += 1
        thread = threading.Thread(
            target=self._run, args=(work, pack, answer, undo), name="kvstore-owner-wait", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            with self._lock:
                self._running -= 1
            raise PoolError(f"the owner has no thread to wait in: {error}; raise its limit on threads") from error

    def _run(
        self, work: Callable[[], Any], pack: Callable[[Any], bytes], answer: Answer, undo: Callable[[Any], None]
    ) -> None:
        try:
            value = work()
        except BaseException as error:
            with self._lock:
                self._running -= 1
            failure = error
            self._later(lambda: answer(None, failure))
            return
        with self._lock:
            self._running -= 1
            is_wanted = not self._is_closed
            self._last_number += 1
            number = self._last_number
            if is_wanted:
                self._outcomes[number] = value, undo
        if is_wanted:
            self._later(lambda: self._answer(number, pack, answer))
        else:
            undo(value)

    def _answer(self, number: int, pack: Callable[[Any], bytes], answer: Answer) -> None:
        """In the session's thread."""
        with self._lock:
            found = self._outcomes.pop(number, None)
        if found is None:
            return
        value, undo = found
        try:
            reply = pack(value)
        except Exception as error:  # told to who asked; a session does not end by it
            undo(value)
            answer(None, error)
            return
        answer(reply, None)

    def close(self) -> None:
        """The process has gone: nothing is answered any more, and what comes is taken back."""
        with self._lock:
            self._is_closed = True
            outcomes = list(self._outcomes.values())
            self._outcomes.clear()
        for value, undo in outcomes:
            undo(value)
