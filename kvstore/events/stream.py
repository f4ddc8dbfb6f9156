"""One subscriber's events: a bounded ring that is iterated, polled or awaited."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError
from kvstore.events.values import EVENT_KINDS, Event, Removed, Stored
from kvstore.handle import readable
from kvstore.limits import EVENT_BLOCKS_MAX, EVENTS_CAPACITY_MAX

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from types import TracebackType

    from kvstore.events.changes import Changes, Tell


class EventStream:
    """Events from its making on. Any thread may call any method; a context manager. Made by `Store.events`.

    Whoever does not keep up loses the oldest: `dropped` counts them, and sequence numbers leave them out. A mirror of
    what is stored that has lost something opens another stream, with contents.

    Args:
        capacity: events that it keeps at most.
        kinds: those that are wanted.

    Attributes:
        contents: what was there when the stream began, by tier, as `Stored` events of sequence 0; empty unless it was
            asked for. What changed since is in the stream.

    Raises:
        ValueError: a capacity out of range, or a kind that is none.
    """

    def __init__(self, capacity: int, kinds: Iterable[type[Event]] = EVENT_KINDS) -> None:
        self.kinds = frozenset(kinds)
        if not 1 <= capacity <= EVENTS_CAPACITY_MAX:
            raise ValueError(f"capacity={capacity} is not from 1 to {EVENTS_CAPACITY_MAX} events")
        if not self.kinds or not self.kinds <= set(EVENT_KINDS):
            names = ", ".join(kind.__name__ for kind in EVENT_KINDS)
            raise ValueError(f"kinds={kinds!r} names no kinds of events; they are: {names}")
        self.contents: tuple[Stored, ...] = ()
        self._capacity = capacity
        self._arrival = threading.Condition(threading.Lock())
        self._ring: deque[Event] = deque()
        self._sequence = 0
        self._dropped = 0
        self._is_ended = False
        self._descriptor: int | None = None

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Events that wait to be taken."""
        return len(self._ring)

    @property
    def dropped(self) -> int:
        """Events that were lost, because the ring was full."""
        return self._dropped

    @property
    def is_ended(self) -> bool:
        """Whether nothing more will come: it was closed, or its store was. What waits can still be taken."""
        return self._is_ended

    # Taking

    def take(self) -> list[Event]:
        """What waits, oldest first, perhaps nothing; without waiting."""
        with self._arrival:
            taken = list(self._ring)
            self._ring.clear()
            self._calm()
        return taken

    def next(self, deadline_s: float) -> Event | None:
        """The oldest event that waits, or the next one; None when the stream has ended.

        Raises:
            DeadlineError: none has come after so many seconds.
        """
        with self._arrival:
            timeout_s = min(deadline_s, threading.TIMEOUT_MAX)
            if not self._arrival.wait_for(lambda: self._ring or self._is_ended, timeout_s):
                raise DeadlineError(f"no event came within {deadline_s:g} s")
            return self._pop()

    def each(self, deadline_s: float) -> Iterator[Event]:
        """The events as they come, until the stream ends.

        Raises:
            DeadlineError: for so many seconds there was none. Iterating anew goes on where this ended.
        """
        while (event := self.next(deadline_s)) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            with self._arrival:
                event, is_over = self._pop(), self._is_ended and not self._ring
            if event is not None:
                yield event
            elif is_over:
                return
            else:
                await readable(self.fileno())

    def fileno(self) -> int:
        """A descriptor that is readable while events wait, and when the stream has ended; for `select`, asyncio.

        It lives as long as the stream. Do not read from it or close it.
        """
        with self._arrival:
            if self._descriptor is None:
                is_ready = bool(self._ring) or self._is_ended
                self._descriptor = os.eventfd(int(is_ready), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            return self._descriptor

    def _pop(self) -> Event | None:
        event = self._ring.popleft() if self._ring else None
        self._calm()
        return event

    def _calm(self) -> None:
        if self._descriptor is not None and not self._ring and not self._is_ended:
            with suppress(BlockingIOError):  # nothing came since it was calm
                os.eventfd_read(self._descriptor)

    # Coming

    def put(self, kind: type[Event], *fields: object) -> None:
        """For what events come from: one of `kind` happened. Never waits for a subscriber."""
        if kind not in self.kinds:
            return
        with self._arrival:
            if self._is_ended:
                return
            if len(self._ring) >= self._capacity:
                self._ring.popleft()
                self._dropped += 1
            self._sequence += 1
            self._ring.append(kind(self._sequence, time.time(), *fields))
            self._arrival.notify()
            if self._descriptor is not None and len(self._ring) == 1:
                os.eventfd_write(self._descriptor, 1)

    def begins_with(self, contents: Iterable[tuple[str, Changes]]) -> None:
        """For what events come from: this was there before."""
        now_s = time.time()
        self.contents = tuple(
            Stored(0, now_s, tier, part) for tier, changes in contents for part in changes.parts(EVENT_BLOCKS_MAX)
        )

    def teller(self) -> Tell:
        """What tells this stream of changes, without keeping it alive."""
        reference = weakref.ref(self)

        def tell(tier: str, changes: Changes) -> bool:
            stream = reference()
            if stream is None or stream.is_ended:
                return False
            for part in changes.parts(EVENT_BLOCKS_MAX):
                stream.put(Stored if part.why is None else Removed, tier, part)
            return True

        return tell

    def close(self) -> None:
        """Nothing more comes. Idempotent; whoever waits goes on."""
        with self._arrival:
            self._is_ended = True
            self._arrival.notify_all()
            if self._descriptor is not None:
                os.eventfd_write(self._descriptor, 1)

    def close_in_child(self) -> None:
        """After a fork, in the child: the parent's descriptor is not touched."""
        self._arrival = threading.Condition(threading.Lock())
        self._ring.clear()
        self._is_ended = True
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)
