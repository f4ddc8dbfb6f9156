"""Connections to a peer that asked for a transfer: it opens them, and this side takes them as they come."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import PeerGoneError
from kvstore.transfer.connector import Connector, GreetedLink, JoinedLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.link import FrameLink


@dataclass(eq=False)
class Loan:
    """A connection that a transfer works on, while the session that accepted it waits.

    Attributes:
        ended: set once the transfer will not touch the connection again.
    """

    ended: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class _Call(Loan):
    """A requester's connection for control frames."""

    greeted: GreetedLink | None = None


@dataclass(eq=False)
class JoinCall(Loan):
    """A requester's further connection.

    Attributes:
        generation: of the attachment that it joins.
        number: of the connection within it, from 1.
    """

    generation: int = 0
    number: int = 0
    joined: JoinedLink | None = None


@dataclass(eq=False)
class _Seek:
    """A branch that waits for a connection of its attachment."""

    generation: int
    call: JoinCall | None = None

    @property
    def is_answered(self) -> bool:
        return self.call is not None and (self.call.joined is not None or self.call.ended.is_set())


class CallbackConnector(Connector):
    """Waits for the requester to call, rather than calling it. Any thread.

    Args:
        address: the requester, for people.
        window_s: how long a requester may take to call back after a break.
    """

    def __init__(self, address: str, window_s: float) -> None:
        self._address = address
        self._window_s = window_s
        self._changed = threading.Condition()
        self._waiting: _Call | None = None
        self._current: _Call | None = None
        self._seeks: list[_Seek] = []
        self._joins: list[JoinCall] = []
        self._numbers: dict[int, count[int]] = {}
        self._left = 0
        """The newest generation that has ended."""
        self._is_ending = False
        self._is_closed = False

    @property
    def address(self) -> str:
        return self._address

    # The sessions' side

    def lend(self, greeted: GreetedLink) -> Loan | None:
        """Let the transfer work on a connection; an older one ends. The caller waits for the loan's end.

        None if the transfer is ending, and takes no other connection.
        """
        call = _Call(greeted=greeted)
        with self._changed:
            if self._is_ending:
                return None
            replaced, self._waiting = self._waiting, call
            hanging = self._current
            self._changed.notify_all()
        if replaced is not None:
            _close(replaced)
            replaced.ended.set()
        if hanging is not None:
            _close(hanging)  # The transfer finds it broken, and comes for the new one.
        return call

    def admit(self, generation: int, deadline: Deadline) -> JoinCall | None:
        """A place for a further connection, once a branch of the attachment asks for one; None if none does.

        The caller fills it with `fill` as soon as it has told the requester, and then waits for its end.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._seek(generation) is not None or self._has_ended(generation), deadline.remaining_s()
            )
            seek = self._seek(generation)
            if seek is None or self._has_ended(generation):
                return None
            numbers = self._numbers.setdefault(generation, count(1))
            seek.call = call = JoinCall(generation=generation, number=next(numbers))
            self._joins.append(call)
            return call

    def fill(self, call: JoinCall, greeted: GreetedLink) -> None:
        """The requester has been told its connection's number: the branch may use it."""
        with self._changed:
            call.joined = JoinedLink(greeted, call.number)
            self._changed.notify_all()

    def withdraw(self, call: JoinCall) -> None:
        """A further connection ended before it was of use."""
        with self._changed:
            call.ended.set()
            self._changed.notify_all()

    # The transfer's side

    def connect(self, deadline: Deadline, *, may_reuse: bool = True) -> GreetedLink:
        with self._changed:
            if self._current is not None:
                self._current.ended.set()
                self._current = None
            wait = deadline.earlier(Deadline.after(self._window_s))
            self._changed.wait_for(lambda: self._waiting is not None or self._is_ending, wait.remaining_s())
            if self._is_ending:
                raise PeerGoneError(f"the connections of {self._address} are being closed")
            call, self._waiting = self._waiting, None
            if call is None or call.greeted is None:
                raise PeerGoneError(f"{self._address} did not call back within {self._window_s:g} s")
            self._current = call
            return call.greeted

    def join(
        self,
        transfer: TransferId,
        generation: int,
        progress_deadline_s: float,
        deadline: Deadline,
        opened: Callable[[FrameLink], None],
    ) -> JoinedLink | None:
        seek = _Seek(generation)
        with self._changed:
            self._seeks.append(seek)
            self._changed.notify_all()
            self._changed.wait_for(lambda: seek.is_answered or self._has_ended(generation), deadline.remaining_s())
            self._seeks.remove(seek)
            call = seek.call
            if call is None:
                return None
            joined = call.joined
            if joined is None or call.ended.is_set():
                call.ended.set()
                return None
        joined.greeted.link.progress_deadline_s = progress_deadline_s
        opened(joined.greeted.link)
        return joined

    def leave(self, generation: int) -> None:
        with self._changed:
            self._left = max(self._left, generation)
            self._end_joins(lambda call: call.generation <= self._left)
            self._numbers = {each: numbers for each, numbers in self._numbers.items() if each > self._left}
            self._changed.notify_all()

    def stop_waiting(self) -> None:
        """Nobody is waited for any more; the connection that is being used may be used on. Any thread."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()

    def close(self) -> None:
        """End every wait and every loan. Idempotent, any thread."""
        with self._changed:
            self._is_ending = self._is_closed = True
            calls = [call for call in (self._waiting, self._current) if call is not None]
            self._waiting = self._current = None
            for call in calls:
                call.ended.set()
            self._end_joins(lambda _: True)
            self._changed.notify_all()

    def _end_joins(self, is_over: Callable[[JoinCall], bool]) -> None:
        for call in self._joins:
            if is_over(call):
                call.ended.set()
        self._joins = [call for call in self._joins if not call.ended.is_set()]

    def _seek(self, generation: int) -> _Seek | None:
        """A branch of the attachment that has no connection yet."""
        return next((seek for seek in self._seeks if seek.generation == generation and seek.call is None), None)

    def _has_ended(self, generation: int) -> bool:
        return self._is_closed or generation <= self._left


def _close(call: _Call) -> None:
    if call.greeted is not None:
        call.greeted.link.close()
