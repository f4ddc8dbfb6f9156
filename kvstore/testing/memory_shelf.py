"""A shelf in host memory, for tests: it fails, waits and loses bytes when it is told to.

    medium = ShelfMedium()
    shelf = MemoryShelf(spec, capacity_bytes=1 << 20, medium=medium)
    shelf.loads.close(after=3)        # the fourth record that is loaded waits ...
    shelf.loads.open()                # ... until here
    shelf.close()
    shelf = MemoryShelf(spec, capacity_bytes=1 << 20, medium=medium)   # what was kept is there again

Nothing here needs pytest.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc import SlotRows
from kvstore.errors import DeadlineError, PoolError, ShelfRefusedError, StoreClosedError
from kvstore.handle import Handle
from kvstore.placement.ends import NEW_US, PROMPTS, Ends, packed_keys
from kvstore.placement.indexed import IndexedShelf
from kvstore.placement.shelf import ShelfHold, ShelfLoad, ShelfStatistics
from kvstore.pool import PoolStatistics
from kvstore.pool.index import PrefixIndex, needs_of
from kvstore.pool.plan import place_table
from kvstore.pool.room import Room
from kvstore.pool.rows import COST_US, DIGEST, NODE, STOP, Rows
from kvstore.pool.search import search
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvstore._native import Finding, HeldRows, WriteSet
    from kvstore.abc import Slot
    from kvstore.clock import Deadline
    from kvstore.events import Changes, Tell
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.pool.search import Query
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

STUCK_S = 60.0
"""A gate that nobody opens for so long is a fault of the test."""


class Gate:
    """Lets records pass; closed, so many more of them. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._left: int | None = None
        self._waiting = 0

    def close(self, after: int = 0) -> None:
        """Let `after` more pass, and nothing then."""
        with self._changed:
            self._left = after
            self._changed.notify_all()

    def open(self) -> None:
        """Let everything pass."""
        with self._changed:
            self._left = None
            self._changed.notify_all()

    def wake(self) -> None:
        """Have whoever waits ask again whether it should stop."""
        with self._changed:
            self._changed.notify_all()

    def wait_for_somebody(self, deadline: Deadline) -> None:
        """Until somebody waits here.

        Raises:
            DeadlineError: nobody came.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting > 0, deadline.remaining_s()):
                raise DeadlineError("nobody came to the gate")

    def enter(self, should_stop: Callable[[], bool]) -> bool:
        """Wait to pass; False if the caller should stop instead."""
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                came = self._changed.wait_for(lambda: should_stop() or self._left is None or self._left > 0, STUCK_S)
            finally:
                self._waiting -= 1
            if not came or should_stop():
                return False
            if self._left is not None:
                self._left -= 1
            return True


@dataclass(frozen=True)
class _Kept:
    """A record as the medium remembers it: on the path up to its node."""

    path: NodePath
    salt: bytes
    row: npt.NDArray[np.uint64]
    digest: bytes
    data: bytes


@dataclass
class ShelfMedium:
    """What outlives a shelf: records by slot, each with the path that leads to it; ends by node, as `Ends` has them."""

    kept: dict[Slot, _Kept] = field(default_factory=dict)
    ends: dict[bytes, list[int]] = field(default_factory=dict)


class MemoryLoad(ShelfLoad):
    """One thread copies one record after the other."""

    def __init__(
        self,
        shelf: MemoryShelf,
        sources: Sequence[memoryview],
        slots: SlotRows,
        rows: npt.NDArray[np.int64],
        addresses: npt.NDArray[np.uint64],
    ) -> None:
        self._shelf = shelf
        self._sources = sources
        self._slots = slots
        self._rows = rows
        self._addresses = addresses
        self._changed = threading.Condition()
        self._ended = 0
        self._failed: list[int] = []
        self._is_cancelled = False
        self._thread = threading.Thread(target=self._run, name=f"{shelf.name}-load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for position in range(len(self._sources)):
            may_move = self._shelf.loads.enter(lambda: self._is_cancelled)
            is_bad = not may_move or self._shelf.fails_to_load(self._slots[position], int(self._rows[position]))
            if not is_bad:
                source = np.frombuffer(self._sources[position], np.uint8)
                copy_to(int(self._addresses[position]), source)
                self._shelf.loaded_bytes += source.size
            with self._changed:
                self._ended += 1
                if is_bad:
                    self._failed.append(position)
                self._changed.notify_all()

    def wait(self, count: int, deadline: Deadline) -> Sequence[int]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended >= count, deadline.remaining_s()):
                raise DeadlineError(
                    f"{self._ended} of {count} records have arrived from the shelf {self._shelf.name!r}"
                )
            return [position for position in self._failed if position < count]

    def cancel(self) -> None:
        self._is_cancelled = True
        self._shelf.loads.wake()
        self._thread.join()


def copy_to(address: int, source: npt.NDArray[np.uint8]) -> None:
    """Copy bytes to an address of this process."""
    place = type("Place", (), {"__array_interface__": {
        "version": 3, "data": (address, False), "shape": (source.size,), "typestr": "|u1"}})()  # fmt: skip
    np.asarray(place)[:] = source


class MemoryHold(ShelfHold):
    def __init__(self, shelf: MemoryShelf, path: NodePath, salt: bytes, held: HeldRows, rows: Rows) -> None:
        self.path = path
        self.salt = salt
        self.rows = rows
        self.held = held
        self._shelf = shelf
        self._views = shelf.tier.views(rows.slots())
        self._loads: list[MemoryLoad] = []
        self._is_released = False

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> MemoryLoad:
        sources = [self._views[number] for number in numbers.tolist()]
        slots = self.rows.slots().taken(numbers.tolist())
        load = MemoryLoad(self._shelf, sources, slots, numbers, addresses)
        self._loads.append(load)
        return load

    def release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        self.end_loads()
        self._shelf.let_go(self)

    def end_loads(self) -> None:
        for load in self._loads:
            load.cancel()


@dataclass(frozen=True)
class _Keeping:
    """What is being taken."""

    path: NodePath
    salt: bytes
    writes: WriteSet
    missing: Rows
    slots: SlotRows
    sources: Sequence[memoryview]
    costs_us: npt.NDArray[np.uint64]
    ends: Ends


class _NotedArena(ArenaTier):
    """Forgets with each slot what the medium has there."""

    kept: dict[Slot, _Kept]

    def free_all(self, slots: Iterable[Slot]) -> None:
        slots = SlotRows.of(slots)
        for slot in slots:
            self.kept.pop(slot, None)
        super().free_all(slots)


class MemoryShelf(IndexedShelf):
    """Records in an arena of its own. Any thread.

    Args:
        medium: what outlives it; with one the shelf is durable, and begins with what is there.

    Attributes:
        loads, keeps: gates that each record passes which is loaded, and each resume point that is kept.
        bad_slots: records that cannot be loaded.
        bad_rows: numbers of rows, in a hold, that cannot be loaded.
        refuses: reason for which whatever is to be kept is refused; empty takes it.
        trouble: what the statistics say.
    """

    def __init__(
        self, spec: ModelSpec, *, capacity_bytes: int, name: str = "memory", medium: ShelfMedium | None = None
    ) -> None:
        self.spec = spec
        self.tier = _NotedArena(
            capacity_bytes, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=slot_sizes_bytes(spec)
        )
        self.is_medium_own = medium is None
        self._medium = medium or ShelfMedium()
        self.loads = Gate()
        self.keeps = Gate()
        self.bad_slots: set[Slot] = set()
        self.bad_rows: set[int] = set()
        self.refuses = ""
        self.trouble = ""
        self.loaded_bytes = 0
        self._name = name
        self._lock = threading.RLock()
        self._index = PrefixIndex(spec)
        self._counters = PoolStatistics()
        self._room = Room(self.tier, self._index, self._counters)
        self._holds: set[MemoryHold] = set()
        self._keepers: set[threading.Thread] = set()
        self._refused: dict[str, int] = {}
        self._kept_bytes = 0
        self._is_closed = False
        self._recover()

    @property
    def name(self) -> str:
        return self._name

    @property
    def is_durable(self) -> bool:
        return not self.is_medium_own

    def fails_to_load(self, slot: Slot, row: int) -> bool:
        """Whether a test wants this record not to arrive."""
        return slot in self.bad_slots or row in self.bad_rows

    # Finding

    def find(self, query: Query) -> Finding:
        with self._lock:
            return search(self._index.native, query)

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> MemoryHold | None:
        with self._lock:
            if self._is_closed:
                return None
            needs = needs_of(self.spec, shard)
            packed_grid = None if grid is None else grid.packed
            places = None if grids is None else place_table(grids)
            held = self._index.native.collect(path.packed, needs, packed_grid, places)
            if held is None:
                return None
            rows = Rows(self.spec, path, *held.rows())
            self._room.pin_all(rows.slots())
            self._index.hold(held)
            hold = MemoryHold(self, path, self._index.native.salt(held.last_node), held, rows)
            self._holds.add(hold)
            return hold

    def let_go(self, hold: MemoryHold) -> None:
        """For `MemoryHold`."""
        with self._lock:
            if self._is_closed:
                return
            self._holds.discard(hold)
            self._room.unpin_all(hold.rows.slots())
            self._room.freed(self._index.release(hold.held))

    # Keeping

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        handle: Handle[int] = Handle(f"keeping {path.tokens} tokens on the shelf {self._name!r}")
        try:
            with self._lock:
                keeping = self._begin(path, salt, placed, ends or Ends.lasting(path))
                thread = threading.Thread(target=self._keep, args=(keeping, handle), name=f"{self._name}-keep")
                self._keepers.add(thread)
                thread.start()
        except (ShelfRefusedError, StoreClosedError) as error:
            if isinstance(error, ShelfRefusedError):
                self._refused[error.reason] = self._refused.get(error.reason, 0) + 1
            handle.fail(error)
        return handle

    def _begin(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends) -> _Keeping:
        """Reserve what is lacking, or refuse."""
        if self._is_closed:
            raise StoreClosedError(f"the shelf {self._name!r} is closed")
        if self.refuses:
            raise ShelfRefusedError(self.refuses, f"the shelf {self._name!r} was told to refuse")
        if path.sparse:
            raise ShelfRefusedError("sparse", "what a sparse prefill wrote is not kept on shelves")
        rows = placed.rows
        table = np.concatenate((rows.table[:, : STOP + 1], rows.table[:, DIGEST : DIGEST + 1]), axis=1)
        native = self._index.native
        writes = native.plan(path.packed, np.ascontiguousarray(table), b"".join(rows.digests))
        if writes.is_wrong_path or writes.gap_node is not None:
            raise ShelfRefusedError("gap", f"{path.tokens} tokens cannot be kept: something before them is lacking")
        missing = Rows(self.spec, path, *writes.missing())
        native.enter(writes, path.packed, salt, [], [])
        try:
            self._room.check(missing.slot_sizes, 0)
            slots = self._room.reserve(missing.slot_sizes)
        except PoolError as error:
            native.undo(writes)
            raise ShelfRefusedError("full", f"the shelf {self._name!r} is full: {error}") from error
        writes.set_slots(slots.table)
        positions = rows.record_names.positions_of(missing.record_names)
        sources = [placed.memories[position] for position in positions.tolist()]
        costs_us = rows.table[positions, COST_US]
        native.prolong(packed_keys(path), ends.table)
        self._note_ends(path)
        return _Keeping(path, salt, writes, missing, slots, sources, costs_us, ends)

    def _keep(self, keeping: _Keeping, handle: Handle[int]) -> None:
        may_go_on = self.keeps.enter(lambda: self._is_closed)
        if may_go_on:
            for view, source in zip(self.tier.views(keeping.slots), keeping.sources, strict=True):
                view[:] = source[: len(view)]
        with self._lock:
            self._keepers.discard(threading.current_thread())
            if self._is_closed or not may_go_on:
                handle.fail(StoreClosedError(f"the shelf {self._name!r} was closed"))
                return
            self._commit(keeping)
        handle.resolve(keeping.slots.size_bytes)

    def _commit(self, keeping: _Keeping) -> None:
        slots = keeping.slots
        contents = [bytes(view) for view in self.tier.views(slots)]
        self._room.unpin_all(slots)
        ready = np.arange(len(slots), dtype=np.uint64)
        given_back = self._index.commit(keeping.writes, ready, keeping.costs_us, ends_at_us=NEW_US)
        self._index.native.prolong(packed_keys(keeping.path), keeping.ends.table)
        self._note_ends(keeping.path)
        kept = sorted(set(range(len(slots))).difference(given_back))
        self._room.keep_all(slots.taken(kept))
        self._room.give_back_all(slots.taken(given_back))
        self._index.native.leave(keeping.writes)
        self._room.freed(self._index.let_go(keeping.writes))
        self._kept_bytes += slots.taken(kept).size_bytes
        table, digests = keeping.missing.table, keeping.missing.digests
        for number in kept:
            row = table[number].copy()
            row[COST_US] = keeping.costs_us[number]
            path = keeping.path.prefix(int(row[NODE]) + 1)
            record = _Kept(path, keeping.salt, row, digests[int(row[DIGEST])], contents[number])
            self._medium.kept[slots[number]] = record

    def _recover(self) -> None:
        """Take what is there, ancestors first; what cannot be reached from the root is lost."""
        before, self._medium.kept = self._medium.kept, {}
        ends = {key: row for key, row in self._medium.ends.items() if any(row)}
        self.tier.kept = self._medium.kept
        native = self._index.native
        for record in sorted(before.values(), key=lambda record: (len(record.path), record.row[1].item())):
            names = np.append(record.row[: STOP + 1], np.uint64(0)).reshape(1, -1)
            writes = native.plan(record.path.packed, names, record.digest)
            missing = Rows(self.spec, record.path, *writes.missing())
            if writes.gap_node is not None or not len(missing):
                continue
            native.enter(writes, record.path.packed, record.salt, [], [])
            slots = self._room.reserve(missing.slot_sizes)
            writes.set_slots(slots.table)
            costs_us = np.array([record.row[COST_US]], np.uint64)
            self.tier.views(slots)[0][:] = record.data
            lasts = Ends.lasting(record.path)
            lasts.table[:, PROMPTS] = 0
            self._commit(_Keeping(record.path, record.salt, writes, missing, slots, (), costs_us, lasts))
        self._kept_bytes = 0
        native.restore_ends(b"".join(ends), np.array([*ends.values()], np.uint64).reshape(-1, 3))
        self._medium.ends = ends

    # Losing

    def damage(self, key: bytes, *, is_state: bool, at: int = 0) -> int:
        """Flip a bit of every record of a node of one kind; how many there were. They stay, and are found.

        Args:
            at: the byte, from the beginning of the header.
        """
        with self._lock:
            native = self._index.native
            node = native.find(key)
            slots = (
                [] if node is None else [slot for slot in self._medium.kept if native.has_slot(node, is_state, *slot)]
            )
            for slot in slots:
                self.tier.pin(slot)
                view = self.tier.view(slot)
                view[at] ^= 1
                self._medium.kept[slot] = replace(self._medium.kept[slot], data=bytes(view))
                self.tier.unpin(slot)
            return len(slots)

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._lock:
            native = self._index.native
            node = None if self._is_closed else native.find(key)
            if node is None or (slot is not None and not native.has_slot(node, is_state, *slot)):
                return
            self._counters.damaged_records += 1
            self._room.freed(self._index.condemn(node, is_state=is_state))

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        with self._lock:
            node = None if self._is_closed else self._index.native.find(key)
            return 0 if node is None else self._room.freed(self._index.evict(node, states_only=states_only))

    # Time to live

    def _note_ends(self, path: NodePath) -> None:
        ends = self._index.native.ends_of(packed_keys(path))
        self._medium.ends.update(zip(path.node_keys, ends.tolist(), strict=True))

    def expire(self, now_us: int) -> int:
        with self._lock:
            freed = self._index.expire(now_us, even_written=True)
            self._index.native.take_expired()
            self._counters.expired_records += len(freed)
            self._room.freed(freed)
            return len(freed)

    def set_end(self, path: NodePath, ends_at_us: int, *, after_tokens: int, meant_tokens: int) -> None:
        with self._lock:
            super().set_end(path, ends_at_us, after_tokens=after_tokens, meant_tokens=meant_tokens)
            self._note_ends(path)

    # The shelf itself

    def statistics(self) -> ShelfStatistics:
        with self._lock:
            native = self._index.native
            return ShelfStatistics(
                self._name,
                self.tier.capacity_bytes,
                self.tier.used_bytes,
                native.committed_bytes,
                self._index.memory_bytes,
                self._kept_bytes,
                self._kept_bytes,
                self.loaded_bytes,
                self._counters.evicted_records,
                self._counters.damaged_records,
                self._counters.expired_records,
                dict(self._refused),
                self.trouble,
            )

    def check(self) -> None:
        with self._lock:
            self._index.check()
            accounted = self._index.native.committed_bytes + self._room.reserved_bytes + self.tier.quarantined_bytes
            assert self._is_closed or accounted == self.tier.used_bytes, (accounted, self.tier.used_bytes)
            kept_bytes = sum(slot.size_bytes for slot in self._medium.kept)
            assert self._is_closed or kept_bytes == self._index.native.committed_bytes, "the medium holds other records"

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._lock:
            return () if self._is_closed else self._index.watch(self.name, tell)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            holds, keepers = tuple(self._holds), tuple(self._keepers)
        self.keeps.wake()
        for hold in holds:
            hold.end_loads()
        for thread in keepers:
            thread.join()
        with self._lock:
            self._index.tell_closed()
            self._index = PrefixIndex(self.spec)
            self.tier.close()

    def close_in_child(self) -> None:
        self._is_closed = True
        self._lock = threading.RLock()
