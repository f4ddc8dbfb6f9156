"""Many short paths at once, in pools of a spec with one kind of record (docs/foreign.md).

What is the same for all of them is done once: the lock, the space, pins, framing, what listeners are told.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc import SlotRows
from kvstore.errors import StoreClosedError, WriteError
from kvstore.pool.held import addresses_of_memories
from kvstore.pool.index import needs_of
from kvstore.pool.plan import name_table
from kvstore.pool.rows import NODE, SLOT, SLOT_BYTES, RecordNames
from kvstore.pool.writes import PoolWrites
from kvstore.record import record_layout, seal_rows
from kvstore.spec import UNKNOWN_GRID, ReuseRule
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore._native import HeldRows, WriteSet
    from kvstore.abc import Slot
    from kvstore.pool.path import NodePath
    from kvstore.record import RecordLayout
    from kvstore.spec import ModelSpec

Places = list[tuple[int, int]]
"""Node of the path, and address of its record."""


def flat_layout(spec: ModelSpec) -> RecordLayout | None:
    """The layout of all records of a spec that has one attention group, span and share, and blocks of one token."""
    is_flat = (
        spec.block_tokens == 1
        and len(spec.groups) == 1
        and spec.groups[0].rule is ReuseRule.ATTENTION
        and spec.groups[0].unit_count == 1
        and len(spec.spans[0]) == 1
    )
    return record_layout(spec, 0, 0, spec.groups[0].all_units) if is_flat else None


class FlatHold:
    """The records of some paths, which are neither evicted nor reused before `release`. Any thread.

    It is for copying them out at once: the longest lease does not count for it.

    Attributes:
        places: of each path where its records lie; None where it is not there.
    """

    def __init__(
        self,
        pool: FlatPool,
        held: Sequence[HeldRows],
        slots: SlotRows,
        memories: Sequence[memoryview],
        places: list[Places | None],
    ) -> None:
        self.places = places
        self.held = held
        self.slots = slots
        self._memories = memories  # keep the mapping
        self._pool = pool
        self._lock = threading.Lock()
        self._is_released = False

    def slots_of(self, number: int) -> list[tuple[int, Slot]]:
        """Nodes of one of the paths, and the slots of their records."""
        first = sum(len(each or ()) for each in self.places[:number])
        return [(node, self.slots[first + at]) for at, (node, _) in enumerate(self.places[number] or ())]

    def check(self) -> None:
        """Raise `StoreClosedError` if the pool was closed since: what was copied may be anything."""
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed, and its leases with it; open it again")

    def release(self) -> None:
        """Let the records go. Idempotent."""
        with self._lock:
            was_released, self._is_released = self._is_released, True
        if not was_released:
            self._pool.release_flat(self)


class FlatWrite:
    """Reserved records of some paths, invisible until committed. For one thread, which ends it.

    It is for copying them in at once: the longest writer does not count for it.

    Attributes:
        paths: as given.
        places: of each path which of its records are missing, and where they go.
    """

    def __init__(
        self,
        pool: FlatPool,
        paths: Sequence[NodePath],
        writes: Sequence[WriteSet],
        slots: SlotRows,
        memories: Sequence[memoryview],
        addresses: npt.NDArray[np.uint64],
        places: list[Places],
        salt: bytes,
        ttl_s: float | None,
    ) -> None:
        self.paths = paths
        self.places = places
        self.writes = writes
        self.slots = slots
        self.salt = salt
        self.ttl_s = ttl_s
        self._memories = memories  # keep the mapping
        self._addresses = addresses
        self._pool = pool
        self._has_ended = False

    def commit(self) -> None:
        """All bytes and checksums are in place: frame the records, and make them visible at once.

        Raises:
            StoreClosedError: the store was closed.
        """
        layout = self._pool.flat
        assert layout is not None
        rows = [(path, node) for path, places in zip(self.paths, self.places, strict=True) for node, _ in places]
        if rows:
            parts = [part for path, node in rows for part in (path.key(node), path.parent(node), UNKNOWN_GRID)]
            numbers = np.zeros((len(rows), 3), np.uint64)
            numbers[:, 0] = [node + 1 for _, node in rows]
            numbers[:, 1] = 1
            seal_rows(layout, self._addresses, b"".join(parts), numbers)
        self._pool.commit_flat(self)
        self._has_ended = True

    def abort(self) -> None:
        """Give everything back, unless it was committed. Idempotent."""
        if not self._has_ended:
            self._has_ended = True
            self._pool.abandon_flat(self)


class FlatPool(PoolWrites):
    """The part of a pool that takes many short paths at once; see `BasePool`."""

    @cached_property
    def flat(self) -> RecordLayout | None:
        """The one layout of all records; None if there are others."""
        return flat_layout(self.spec)

    def stored(self, paths: Sequence[NodePath]) -> list[bool]:
        self._settle()
        needs = needs_of(self.spec, WHOLE)
        with self._lock:
            self._check_open()
            collect = self._index.native.collect
            found = [collect(path.packed, needs, None, None) is not None for path in paths]
            self._statistics.matches += len(found)
            self._statistics.hits += sum(found)
        return found

    def hold_flat(self, paths: Sequence[NodePath]) -> FlatHold | None:
        if self.flat is None:
            return None
        self._settle()
        needs = needs_of(self.spec, WHOLE)
        with self._lock:
            self._check_open()
            collect = self._index.native.collect
            collected = [collect(path.packed, needs, None, None) for path in paths]
            held = [each for each in collected if each is not None]
            tables = [each.rows()[0] for each in held]
            table = np.concatenate(tables) if tables else np.zeros((0, SLOT_BYTES + 1), np.uint64)
            slots = SlotRows(table[:, SLOT : SLOT_BYTES + 1])
            with ExitStack() as undoing:
                self._room.pin_all(slots)
                undoing.callback(self._room.unpin_all, slots)
                memories = self._views(slots)
                for each in held:
                    self._index.hold(each)
                    undoing.callback(self._index.native.release, each)
                undoing.pop_all()
        placed = iter(zip(table[:, NODE].tolist(), addresses_of_memories(memories).tolist(), strict=True))
        sizes = iter([len(each) for each in tables])
        places = [None if each is None else [next(placed) for _ in range(next(sizes))] for each in collected]
        return FlatHold(self, held, slots, memories, places)

    def release_flat(self, hold: FlatHold) -> None:
        """End a hold; for `FlatHold` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._room.unpin_all(hold.slots)
            freed = [self._index.release(each) for each in hold.held]
            if any(map(len, freed)):
                self._room.freed(SlotRows.join(freed))
        self._notify()

    def begin_flat(self, paths: Sequence[NodePath], *, salt: bytes, ttl_s: float | None = None) -> FlatWrite | None:
        if self.flat is None:
            return None
        self._settle()
        tables: dict[int, tuple[npt.NDArray[np.uint64], bytes]] = {}
        for path in paths:
            if len(path) not in tables:
                if not len(path):
                    raise WriteError("a prompt without tokens has nothing to store")
                names = RecordNames.of_spans(range(len(path)), 0, 1, self.flat.units)
                tables[len(path)] = name_table(self.spec, path, names, None, None)
        with self._lock, ExitStack() as undoing:
            self._check_open()
            native = self._index.native
            writes: list[WriteSet] = []
            missing: list[npt.NDArray[np.uint64]] = []
            new_nodes = 0
            undoing.callback(self._undo_flat, writes)
            for path in paths:
                planned = native.plan(path.packed, *tables[len(path)])
                self._check_plan(path, planned)
                new_nodes += planned.new_nodes
                native.enter(planned, path.packed, salt, [], [])
                writes.append(planned)
                missing.append(planned.missing()[0])
            table = np.concatenate(missing) if missing else np.zeros((0, SLOT_BYTES + 1), np.uint64)
            sizes = [self.flat.slot_bytes] * len(table)
            if writes:
                salt = native.salt(writes[-1].last_node)
            self._room.check(sizes, new_nodes, salt)
            slots = self._room.reserve(sizes, salt)
            undoing.callback(self._room.give_back_all, slots, salt)
            undoing.callback(self._room.unpin_all, slots)
            at = 0
            for planned, rows in zip(writes, missing, strict=True):
                planned.set_slots(slots.table[at : at + len(rows)])
                at += len(rows)
            memories = self._views(slots)
            undoing.pop_all()
        addresses = addresses_of_memories(memories)
        placed = iter(zip(table[:, NODE].tolist(), addresses.tolist(), strict=True))
        places = [[next(placed) for _ in range(len(rows))] for rows in missing]
        ttl_s = self.limits.ttl_s if ttl_s is None else ttl_s
        return FlatWrite(self, paths, writes, slots, memories, addresses, places, salt, ttl_s)

    def _undo_flat(self, writes: Sequence[WriteSet]) -> None:
        for each in reversed(writes):
            self._index.native.undo(each)

    def commit_flat(self, write: FlatWrite) -> None:
        """Make all of it visible; for `FlatWrite` itself."""
        with self._lock:
            self._check_open()
            self._room.unpin_all(write.slots)
            ends_at_us = self._lifetimes.moment_us(write.ttl_s)
            readies = {count: np.arange(count, dtype=np.uint64) for count in {len(each) for each in write.places}}
            costs = {count: np.zeros(count, np.uint64) for count in readies}
            unused: list[int] = []
            freed: list[SlotRows] = []
            at = 0
            for path, writes, places in zip(write.paths, write.writes, write.places, strict=True):
                count = len(places)
                given_back = self._index.commit(
                    writes, readies[count], costs[count], ends_at_us=ends_at_us, committed_nodes=len(path)
                )
                unused.extend(at + number for number in given_back)
                at += count
                self._index.forget_gone(path.keys)
            for writes in write.writes:
                self._index.native.leave(writes)
                let_go = self._index.let_go(writes)
                if len(let_go):
                    freed.append(let_go)
            kept = write.slots.taken(sorted(set(range(at)).difference(unused))) if unused else write.slots
            self._statistics.stored_records += len(kept)
            self._statistics.stored_bytes += kept.size_bytes
            self._room.keep_all(kept, write.salt)
            if unused:
                self._room.give_back_all(write.slots.taken(unused), write.salt)
            if freed:
                self._room.freed(SlotRows.join(freed))
            self._statistics.commits += len(write.writes)
            self._lifetimes.look()
            self._index.look_ahead()
        self._notify()

    def abandon_flat(self, write: FlatWrite) -> None:
        """Give all of it back; for `FlatWrite` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._room.unpin_all(write.slots)
            self._room.give_back_all(write.slots, write.salt)
            for writes in write.writes:
                self._index.native.leave(writes)
                self._room.freed(self._index.let_go(writes))
            self._statistics.aborts += len(write.writes)
            self._lifetimes.look()
        self._notify()
