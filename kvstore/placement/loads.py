"""The loads of one pool: who wants the same shares one, and there is a limit to them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import LoadFailedError, PoolError, StoreClosedError
from kvstore.limits import GIB, LOAD_PROGRESS_DEADLINE_S, LOADS_MAX
from kvstore.placement.load import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.placement.shelf import Shelf, ShelfHold
    from kvstore.pool.pool import Pool

LoadKey = tuple[object, ...]
"""What tells one load from another: resume point, shard, chunk boundaries, tier."""

RATE_BYTES = 1 * GIB
"""So many bytes that were loaded last decide what a tier's rate is taken to be."""


@dataclass(frozen=True)
class LoadStatistics:
    """What was loaded from other tiers.

    Attributes:
        running: loads under way.
        loads, failed: that have ended, with and without success.
        joined: readers that found a load of theirs under way.
        loaded_bytes: slots that were brought into the pool.
        damaged_records: that came damaged, or could not be read.
        refused_full: loads for which the pool had no room.
        seconds_per_byte: by tier, of the last gigabyte or so.
    """

    running: int = 0
    loads: int = 0
    failed: int = 0
    joined: int = 0
    loaded_bytes: int = 0
    damaged_records: int = 0
    refused_full: int = 0
    seconds_per_byte: Mapping[str, float] = field(default_factory=dict)


class Loads:
    """Begins loads, and lets who wants the same join. Any thread."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._running: dict[LoadKey, Load] = {}
        self._unheard: dict[LoadKey, Load] = {}
        """Failed after their readers' deadlines: who comes back is told why."""
        self._counts = dict.fromkeys(
            ("loads", "failed", "joined", "loaded_bytes", "damaged_records", "refused_full"), 0
        )
        self._rates: dict[str, tuple[float, float]] = {}
        self._given_up: list[Load] = []
        self._is_closed = False

    def begin(self, key: LoadKey, shelf: Shelf, hold: Callable[[], ShelfHold | None]) -> Load | None:
        """The load of a resume point, begun or joined; the caller has joined it and leaves it once.

        Args:
            hold: holds it on the shelf; None if it is not there, and then there is no load.

        One that has just stopped, because whoever wanted it left, is waited for; then another one is begun.

        Raises:
            PoolError: too many are under way. LoadFailedError: the other one does not end. Otherwise as `Load`.
        """
        while True:
            load, is_stopping = self._begin(key, shelf, hold)
            if load is None or not is_stopping:
                return load
            load.wait_for_end(LOAD_PROGRESS_DEADLINE_S)
            if not load.is_over:
                raise LoadFailedError(
                    f"a load from the {shelf.name} tier that nobody wanted any more has not ended for "
                    f"{LOAD_PROGRESS_DEADLINE_S:g} s; its device hangs"
                )

    def _begin(self, key: LoadKey, shelf: Shelf, hold: Callable[[], ShelfHold | None]) -> tuple[Load | None, bool]:
        """As `begin`; or a load that is about to end without the records, and True."""
        with self._pool.settled(), self._lock:
            if self._is_closed:
                raise StoreClosedError("the store is closed; open it again")
            load = self._running.get(key)
            if load is not None and not load.is_over:
                if not load.join():
                    return load, True
                self._counts["joined"] += 1
                return load, False
            if len(self._running) >= LOADS_MAX:
                raise PoolError(f"{LOADS_MAX} resume points are being loaded, which is the limit; try again later")
            held = hold()
            if held is None:
                failed = self._unheard.pop(key, None)
                if failed is not None:
                    failed.join()
                return failed, False
            try:
                load = Load(self._pool, shelf, held, lambda ended: self._ended(key, ended))
            except BaseException as error:
                held.release()
                self._counts["refused_full"] += isinstance(error, PoolError)
                raise
            load.join()
            self._running[key] = load
        load.start()  # not under the lock, which its end takes
        return load, False

    def _ended(self, key: LoadKey, load: Load) -> None:
        with self._lock:
            if self._running.get(key) is load:
                del self._running[key]
            self._counts["damaged_records"] += load.damaged_records
            if load.error is not None:
                self._counts["failed"] += 1
                if load.goes_on and not self._is_closed:
                    self._unheard[key] = load
                    while len(self._unheard) > LOADS_MAX:
                        self._unheard.pop(next(iter(self._unheard)))
                return
            self._counts["loads"] += 1
            self._counts["loaded_bytes"] += load.size_bytes
            size_bytes, seconds = self._rates.get(load.shelf.name, (0.0, 0.0))
            fades = RATE_BYTES / (RATE_BYTES + load.size_bytes)
            self._rates[load.shelf.name] = size_bytes * fades + load.size_bytes, seconds * fades + load.seconds

    def statistics(self) -> LoadStatistics:
        """A copy."""
        with self._lock:
            return LoadStatistics(len(self._running), **self._counts, seconds_per_byte=self._seconds_per_byte())

    @property
    def seconds_per_byte(self) -> Mapping[str, float]:
        """What loading has cost, by tier; tiers from which nothing was loaded yet are not named."""
        with self._lock:
            return self._seconds_per_byte()

    def _seconds_per_byte(self) -> dict[str, float]:
        return {name: seconds / size_bytes for name, (size_bytes, seconds) in self._rates.items() if size_bytes}

    def close(self, deadline_s: float) -> None:
        """Give up what is under way, and wait until nothing moves."""
        with self._lock:
            self._is_closed = True
            self._unheard.clear()
            running = self._given_up = list(self._running.values())
        for load in running:
            load.give_up()
        deadline = Deadline.after(deadline_s)
        for load in running:
            load.wait_for_end(deadline.remaining_s())

    def join(self) -> None:
        """After `close`, and after the shelves were closed: until no thread looks at the pool's memory any more.

        There is nothing to wait for then but the verifying of what has come: memory that is unmapped meanwhile would
        take the process with it.
        """
        given_up, self._given_up = self._given_up, []
        for load in given_up:
            load.wait_for_end(None)

    def close_in_child(self) -> None:
        """After a fork, in the child, which has none of the threads."""
        self._lock = threading.Lock()
        self._running = {}
        self._given_up = []
        self._is_closed = True
