"""What a pool consists of, and what begins and ends with it: the lock, the clock, listeners, counters."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvstore.errors import (
    RecordTooLargeError,
    StoreClosedError,
)
from kvstore.events import RemovedWhy
from kvstore.limits import SPARSE_NODES_BYTES_MAX
from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.explain import TierLookup, explain
from kvstore.pool.index import GHOST_FRACTION_MAX, NODE_BYTES, RECORD_BYTES, PrefixIndex, ghosts_max_of
from kvstore.pool.joint import JointCommits
from kvstore.pool.lifetimes import US_PER_S, Lifetimes
from kvstore.pool.pins import PinBudget
from kvstore.pool.room import Room
from kvstore.pool.seam import BasePool
from kvstore.pool.search import Query, search
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.store_limits import StoreLimits
from kvstore.record import record_layout
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore._native import Finding
    from kvstore.abc import CheckpointPolicy, EvictionPolicy, Slot, Tier
    from kvstore.events import Changes, Tell
    from kvstore.pool.explanation import Explanation
    from kvstore.pool.path import HandOver, NodePath
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.transaction import Transaction
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


class PoolCore(BasePool):
    """The parts of a pool; see `Pool`. Any thread may call any method."""

    is_closed = False

    def __init__(
        self,
        spec: ModelSpec,
        tier: Tier,
        *,
        eviction: EvictionPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        largest = max(
            record_layout(spec, group, span, spec.groups[group].all_units).slot_bytes
            for group in range(len(spec.groups))
            for span in range(len(spec.spans[group]))
        )
        if largest + 2 * NODE_BYTES + RECORD_BYTES > tier.capacity_bytes:
            raise RecordTooLargeError(
                f"the {tier.name} tier of {tier.capacity_bytes} bytes is too small for one record of this spec "
                f"({largest} bytes); open the store with more memory, or use smaller blocks"
            )
        if not tier.supports_views:
            raise NotImplementedError(f"tier {tier.name!r} has no views; a pool needs them to gather into records")
        self.spec = spec
        self._tier = tier
        self._lock = threading.RLock()
        ghosts_max = ghosts_max_of(tier.capacity_bytes)
        sparse_bytes_max = min(SPARSE_NODES_BYTES_MAX, int(tier.capacity_bytes * GHOST_FRACTION_MAX))
        self.limits = limits or StoreLimits()
        has_quotas = self.limits.has_quotas
        self._index = PrefixIndex(spec, eviction, ghosts_max, sparse_bytes_max, has_quotas=has_quotas)
        self._checkpoints = checkpoints or LadderCheckpoints()
        self._listeners: list[Callable[[], None]] = []
        self._settling = threading.local()
        self._dropped: deque[Callable[[], None]] = deque()
        self._statistics = PoolStatistics()
        self._room = Room(tier, self._index, self._statistics, self.limits)
        self._damages = 0
        self._losses = 0
        """How often something may have gone that was held: damage, and what had ended."""
        self._joints = JointCommits(self.commit_together)
        self._lifetimes = Lifetimes(self.limits, self._index, clock)
        self._pins = PinBudget(self.limits, tier.capacity_bytes)
        self._expiry_listeners: list[Callable[[Sequence[tuple[bytes, bool]]], None]] = []

    @abstractmethod
    def commit_together(self, commits: Sequence[tuple[Transaction, int | None, HandOver | None]]) -> None:
        """Several transactions become visible in one step, or none; see `kvstore.pool.commit_together`.

        Raises:
            WriteError, StoreClosedError, LeaseGoneError: as `Transaction.commit`.
        """

    def now_s(self) -> float:
        """The clock by which things end."""
        return self._lifetimes.clock()

    def settle_later(self, end: Callable[[], None]) -> None:
        """Run `end` in the next call that begins here. For finalizers: they may run anywhere, also inside a lock."""
        self._dropped.append(end)

    def _settle(self) -> None:
        """End what was dropped without being ended, and what has ended by itself. Not under the lock."""
        if getattr(self._settling, "is_running", False):
            return  # ending something notifies listeners, and these call the pool again
        self._settling.is_running = True
        try:
            while self._dropped:
                try:
                    end = self._dropped.popleft()
                except IndexError:  # another thread was faster
                    break
                end()
            if self._lifetimes.is_due:
                self._end_due()
        finally:
            self._settling.is_running = False

    @contextmanager
    def settled(self) -> Iterator[None]:
        """End what was dropped or has ended, and nothing of it in the body, by this thread.

        For who holds a lock of its own in the body: what ends is told to listeners, and these may want that lock.
        """
        self._settle()
        before = getattr(self._settling, "is_running", False)
        self._settling.is_running = True
        try:
            yield
        finally:
            self._settling.is_running = before

    def _end_due(self) -> None:
        with self._lock:
            if self.is_closed:
                return
            freed = self._index.expire(int(self.now_s() * US_PER_S))
            expired = self._index.native.take_expired()
            for key, is_state in expired:
                self._index.remember_gone(key, RemovedWhy.EXPIRED, is_state=is_state)
            self._room.freed(freed)
            self._statistics.expired_records += len(freed)
            self._losses += len(freed)
            due = self._lifetimes.take_due()
            self._lifetimes.look()
        for hold in due.holds:
            hold.expire()
        for transaction in due.transactions:
            transaction.expire()
        for pin in due.pins:
            pin.close()
        if expired:
            for listener in tuple(self._expiry_listeners):
                listener(expired)
            self._notify()

    def _end_of(self, path: NodePath) -> int | None:
        return self._index.native.find(path.key(len(path) - 1))

    def _views(self, slots: Sequence[Slot]) -> Sequence[memoryview]:
        return self._tier.views(slots)

    def expired(self, *, leases: int = 0, writers: int = 0) -> None:
        """Count what was held for too long; for who ended it."""
        with self._lock:
            self._statistics.expired_leases += leases
            self._statistics.expired_writers += writers

    def subscribe_expired(self, listener: Callable[[Sequence[tuple[bytes, bool]]], None]) -> None:
        """Call `listener` with what has ended by itself, outside the lock. It must not block.

        For other tiers, which drop the same. It gets keys of prefix nodes, and of each whether its states ended, or its
        attention with all that hangs on it.
        """
        with self._lock:
            self._expiry_listeners.append(listener)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change that may let others go on, outside the lock. It must not block."""
        with self._lock:
            self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def lookups(self) -> Sequence[TierLookup]:
        """How to look into each tier, the fastest first."""
        return [TierLookup(self._tier.name, self._find, seconds_per_byte=0.0, gone=self._index.gone)]

    def _find(self, query: Query) -> Finding:
        with self._lock:
            self._check_open()
            return search(self._index.native, query)

    def explain(self, prompt: Prompt, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Explanation:
        self._settle()
        with self._lock:
            self._check_open()
        return explain(self.spec, prompt, shard, grid, self.lookups())

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._lock:
            self._check_open()
            return self._index.watch(self._tier.name, tell)

    def statistics(self) -> PoolStatistics:
        self._settle()
        with self._lock:
            return self._statistics.snapshot(
                capacity_bytes=self._tier.capacity_bytes,
                committed_bytes=self._index.native.committed_bytes,
                reserved_bytes=self._room.reserved_bytes,
                quarantined_bytes=self._tier.quarantined_bytes,
                index_bytes=self._index.memory_bytes,
                bytes_by_salt=self._index.native.bytes_by_salt,
                nodes=len(self._index.native),
                ghosts=self._index.native.ghost_count,
                pins=self._pins.count,
                pinned_bytes=self._pins.size_bytes,
            )

    def check(self) -> None:
        self._settle()
        with self._lock:
            self._index.check()
            accounted = self._index.native.committed_bytes + self._room.reserved_bytes + self._tier.quarantined_bytes
            assert accounted == self._tier.used_bytes, (accounted, self._tier.used_bytes)
            self._room.quotas.check_reserved(self._room.reserved_bytes)
            # A hand-over's payload, and the hint of a sparse node, are made room for by the next write.
            assert self.is_closed or self._room.free_bytes + self._index.hint_bytes >= 0, "the budget is exceeded"

    def close(self) -> None:
        """Release the tier. Leases and writers that are still open end with `StoreClosedError`."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._index.tell_closed()
            self._tier.close()
            self._index = PrefixIndex(self.spec)
            self._room = Room(self._tier, self._index, self._statistics, self.limits)
        self._joints.close(StoreClosedError("the store was closed while a joint commit waited for its parties"))
        self._notify()

    def close_in_child(self) -> None:
        self.is_closed = True
        self._lock = threading.RLock()
        self._joints = JointCommits(self.commit_together)

    def _check_open(self) -> None:
        if self.is_closed:
            raise StoreClosedError("the store is closed; open it again")
