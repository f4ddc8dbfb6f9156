"""What is measured of a pool's use in this process, and who is told of it."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from kvstore.events import EVENT_KINDS, EventStream, Hit, Missed, Removed, Stored
from kvstore.metrics import StoreMeters

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.events import Event
    from kvstore.pool.match import Match
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.seam import BasePool


class Observer:
    """Counters of a pool's use, and the event streams of its subscribers. Any thread.

    Attributes:
        meters: the counters.
    """

    def __init__(self) -> None:
        self.meters = StoreMeters()
        self._lock = threading.Lock()
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._wants_use = False

    @property
    def streams(self) -> list[EventStream]:
        """Those that are open."""
        with self._lock:
            return [stream for stream in self._streams if not stream.is_ended]

    def open(
        self, pool: BasePool, capacity: int, kinds: Iterable[type[Event]] = EVENT_KINDS, *, with_contents: bool = False
    ) -> EventStream:
        """A stream of what happens to a pool and is asked of it.

        Raises:
            ValueError: as `EventStream`. Whatever `BasePool.watch` raises.
        """
        stream = EventStream(capacity, kinds)
        if stream.kinds & {Stored, Removed}:
            contents = pool.watch(stream.teller())
            if with_contents:
                stream.begins_with(contents)
        with self._lock:
            self._streams.add(stream)
            self._wants_use = self._wants_use or bool(stream.kinds & {Hit, Missed})
        return stream

    def matched(self, prompt: Prompt, match: Match, seconds: float) -> None:
        """Somebody asked for a match."""
        tokens = match.tokens
        asked, tier, reason = match.outcome()
        self.meters.matched(asked, tokens, tier, reason, seconds)
        if not self._wants_use:
            return
        streams = [stream for stream in self.streams if stream.kinds & {Hit, Missed}]
        if not streams:
            self._wants_use = False
        best = match.best
        for stream in streams:
            if best is not None and tier is not None:
                key = best.path.key(len(best.path) - 1)
                stream.put(Hit, key, prompt.salt, tokens, asked, tier, best.size_bytes)
            if reason is not None:
                stream.put(Missed, prompt.path.key(len(prompt.path) - 1), prompt.salt, asked, tokens, reason)

    def close(self) -> None:
        """No stream gets anything more."""
        for stream in self.streams:
            stream.close()

    def close_in_child(self) -> None:
        self._lock = threading.Lock()
        for stream in list(self._streams):
            stream.close_in_child()
        self._streams = weakref.WeakSet()
