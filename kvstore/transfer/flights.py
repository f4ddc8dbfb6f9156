"""Which prefixes are being fetched, so that each crosses once."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.clock import Deadline
    from kvstore.errors import KVStoreError
    from kvstore.pool import NodePath
    from kvstore.spec import ChunkGrid, Shard


@dataclass(eq=False)
class Flight:
    """One resume point on its way.

    Attributes:
        path: its nodes.
        shard, grid: whose share, and the chunk boundaries that are insisted on.
        address: where it comes from.
        error: why it failed, if another fetch from there would fail alike.
        has_ended: whether it has arrived or failed.
    """

    path: NodePath
    shard: Shard
    grid: ChunkGrid | None
    address: str
    error: KVStoreError | None = None
    has_ended: bool = False

    def serves(self, other: Flight) -> bool:
        """Whether the other one is of the same prefix or a longer one: it needs all that this one brings."""
        if (self.shard, self.grid) != (other.shard, other.grid) or len(self.path) > len(other.path):
            return False
        last = len(self.path) - 1
        return self.path.key(last) == other.path.key(last)


class Flights:
    """The fetches of one store that have chosen what to get. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._flights: list[Flight] = []

    def begin(self, flight: Flight) -> Flight | None:
        """Begin, unless one that serves it is under way: that one is returned then."""
        with self._changed:
            for other in self._flights:
                if other.serves(flight):
                    return other
            self._flights.append(flight)
            return None

    def end(self, flight: Flight, error: KVStoreError | None = None) -> None:
        """It has arrived or failed; `error` is what those that wait for it may fail with, too."""
        with self._changed:
            flight.error = error
            flight.has_ended = True
            self._flights.remove(flight)
            self._changed.notify_all()

    def wait(self, flight: Flight, deadline: Deadline, is_over: threading.Event) -> None:
        """Wait until another one's flight has ended, the deadline has passed, or `is_over` is set and `wake` called."""
        with self._changed:
            self._changed.wait_for(lambda: flight.has_ended or is_over.is_set(), deadline.remaining_s())

    def wake(self) -> None:
        """Let those that wait look whether they are over."""
        with self._changed:
            self._changed.notify_all()
