"""Device slabs of our own as a tier, for those who have no paged cache on the device."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    DeviceError,
    PoolError,
    QuotaError,
    ShelfRefusedError,
    StoreClosedError,
)
from kvstore.handle import Handle
from kvstore.limits import DEVICE_COPY_DEADLINE_S, DEVICE_KEEPS_MAX
from kvstore.placement.ends import NEW_US, Ends, packed_keys
from kvstore.placement.gpu.slab_hold import SlabHold, SlabLoad
from kvstore.placement.gpu.worker import Worker
from kvstore.placement.indexed import IndexedShelf
from kvstore.placement.shelf import ShelfStatistics
from kvstore.pool.index import RECORD_BYTES, PrefixIndex, ghosts_max_of, needs_of
from kvstore.pool.plan import place_table
from kvstore.pool.room import Room
from kvstore.pool.rows import COST_US, GROUP, NODE, Rows
from kvstore.pool.search import search
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.store_limits import StoreLimits
from kvstore.record import largest_slot_bytes
from kvstore.tiers.gpu.device import never_free
from kvstore.tiers.gpu.slabs import DeviceTier
from kvstore.tiers.gpu.staging import RecordCopies, RecordMover, StagingRing
from kvstore.tiers.gpu.torch_device import open_device
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvstore._native import Finding, WriteSet
    from kvstore.abc import Slot, SlotRows
    from kvstore.events import Changes, Tell
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.pool.search import Query
    from kvstore.spec import ChunkGrid, ModelSpec, Shard
    from kvstore.tiers.gpu.device import Device, Pinning


@dataclass(frozen=True)
class GpuOptions:
    """Device memory for records.

    Attributes:
        capacity: bytes, such as `"2GiB"`; taken in full when the store is opened.
        device: `cuda`, `cuda:1`; or `cpu`, the same without a GPU.
    """

    capacity: int | str
    device: str = "cuda"


def open_slabs(
    spec: ModelSpec,
    options: GpuOptions,
    *,
    arena_memory: memoryview | None = None,
    limits: StoreLimits | None = None,
) -> SlabShelf:
    """The device tier of a store.

    Args:
        arena_memory: host memory that records are copied from and to. It is page-locked here and must stay until the
            shelf is closed.
        limits: what each salt may take here.

    Raises:
        UnavailableError: there is no torch or no such device. DeviceError: the device has too little memory.
        RecordTooLargeError: not even one record fits. ValueError: `capacity` is no size.
    """
    capacity_bytes = parse_bytes(options.capacity)
    return SlabShelf(spec, open_device(options.device), capacity_bytes, arena_memory=arena_memory, limits=limits)


@dataclass(frozen=True)
class _Keep:
    """A resume point on its way to the device."""

    path: NodePath
    salt: bytes
    ends: Ends
    writes: WriteSet
    slots: SlotRows
    costs_us: Any
    copies: RecordCopies
    handle: Handle[int]


class SlabShelf(IndexedShelf):
    """Records in slabs of one device. Any thread may call any method.

    Its index counts against the capacity, as that of a pool does. What is used longest ago is evicted for what is kept.
    One thread copies to the device, one from it, each in the order of the calls; both are there only while they copy.

    Attributes:
        device: where.
        pinning: whether the host memory is page-locked, and why not.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: Device,
        capacity_bytes: int,
        *,
        arena_memory: memoryview | None = None,
        limits: StoreLimits | None = None,
    ) -> None:
        self.spec = spec
        self.device = device
        self._tier = DeviceTier(device, capacity_bytes, largest_slot_bytes=largest_slot_bytes(spec))
        self._lock = threading.RLock()
        ghosts_max = ghosts_max_of(capacity_bytes)
        limits = limits or StoreLimits()
        self._index = PrefixIndex(spec, None, ghosts_max, has_quotas=limits.has_quotas)
        self._nothing = PrefixIndex(spec).native
        self._counts = PoolStatistics()
        self._room = Room(self._tier, self._index, self._counts, limits)
        self._is_closed = False
        self._keeps = 0
        self._kept_bytes = 0
        self._loaded_bytes = 0
        self._refused: Counter[str] = Counter()
        self._failure = ""
        self.pinning: Pinning | None = None if arena_memory is None else device.pin(arena_memory)
        self._pinned = arena_memory if self.pinning is not None and self.pinning.is_pinned else None
        ring = StagingRing(device)
        self._in = RecordMover(device, self._tier.memory, ring, self._pinned)
        self._out = RecordMover(device, self._tier.memory, ring, self._pinned)
        self._in_worker = Worker("kvstore-gpu-in")
        self._out_worker = Worker("kvstore-gpu-out")

    @property
    def name(self) -> str:
        return "gpu"

    @property
    def is_durable(self) -> bool:
        return False

    @property
    def memory(self) -> Any:
        """The device's memory that holds the records, a uint8 tensor.

        Raises:
            StoreClosedError: the shelf is closed.
        """
        return self._tier.memory

    # Reading

    def find(self, query: Query) -> Finding:
        with self._lock:
            # What a device that has failed holds cannot be had.
            return search(self._nothing if self._failure else self._index.native, query)

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> SlabHold | None:
        if grid is not None and grids is None and self.spec.state_groups:
            grid.digest_at(path.tokens)  # states exist at boundaries only
        packed_grid = None if grid is None else grid.packed
        places = None if grids is None else place_table(grids)
        with self._lock:
            if self._is_closed or self._failure:
                return None
            held = self._index.native.collect(path.packed, needs_of(self.spec, shard), packed_grid, places)
            if held is None:
                return None
            rows = Rows(self.spec, path, *held.rows())
            slots = rows.slots()
            with ExitStack() as undoing:
                self._tier.pin_all(slots)
                undoing.callback(self._tier.unpin_all, slots)
                self._index.hold(held)
                undoing.callback(lambda: self._room.freed(self._index.release(held)))
                salt = self._index.native.salt(held.last_node)
                hold = SlabHold(self, path, salt, rows, slots, self._tier.locations(slots), held)
                undoing.pop_all()
            return hold

    def let_go(self, hold: SlabHold) -> None:
        """For a hold that has ended."""
        with self._lock:
            if not self._is_closed:
                self._tier.unpin_all(hold.slots)
                self._room.freed(self._index.release(hold.held))

    def begin_load(self, copies: RecordCopies, load: SlabLoad) -> None:
        """For a hold: move records into host memory."""

        def moved() -> bool:
            return self._out.copy_out(copies, lambda: load.is_cancelled or self._is_closed, landed)

        def landed(count: int) -> None:
            with self._lock:
                self._loaded_bytes += int(copies.sizes[arrived[0] : count].sum())
            arrived[0] = count
            load.landed(count)

        def job() -> None:
            error = load.run(moved)
            if error is not None:
                self._fail(error)

        arrived = [0]
        self._out_worker.submit(job)

    # Keeping

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        handle: Handle[int] = Handle(f"copying {path.tokens} tokens to the device")
        try:
            with self._lock:
                kept = self._reserve(path, salt, placed, ends or Ends.lasting(path), handle)
                if kept is not None:
                    self._keeps += 1
                    self._in_worker.submit(partial(self._copy_in, kept))
        except ShelfRefusedError as error:
            with self._lock:
                self._refused[error.reason] += 1
            handle.fail(error)
            return handle
        if kept is None:
            handle.resolve(0)
        return handle

    def _reserve(
        self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends, handle: Handle[int]
    ) -> _Keep | None:
        """Space for what is lacking, entered in the index; None if nothing is."""
        if self._is_closed:
            raise ShelfRefusedError("closed", "the gpu tier is closed")
        if self._failure:
            raise ShelfRefusedError("device", f"the gpu tier takes nothing more: {self._failure}")
        if path.sparse:
            raise ShelfRefusedError("sparse", "the gpu tier keeps no prompts of which layers hold a part only")
        if self._keeps >= DEVICE_KEEPS_MAX:
            raise ShelfRefusedError("busy", f"{self._keeps} resume points wait to be copied to the device")
        names = placed.rows.record_names
        table = np.concatenate([names.table, placed.rows.table[:, -1:]], axis=1)
        native = self._index.native
        writes = native.plan(path.packed, np.ascontiguousarray(table), b"".join(placed.rows.digests))
        if writes.is_wrong_path or writes.gap_node is not None:
            raise ShelfRefusedError("gap", f"the records given of {path.tokens} tokens are not whole from the root")
        native.prolong(packed_keys(path), ends.table)
        rows = Rows(self.spec, path, *writes.missing())
        if not len(rows):
            return None
        sizes = rows.slot_sizes
        is_state = np.isin(rows.table[:, GROUP], self.spec.state_groups)
        resume_nodes = np.unique(rows.table[is_state, NODE]).tolist() or [len(path) - 1]
        try:
            self._room.check(sizes, writes.new_nodes, salt)
            with ExitStack() as undoing:
                native.enter(writes, path.packed, salt, [], resume_nodes)
                undoing.callback(native.undo, writes)
                slots = self._room.reserve(sizes, salt)
                undoing.pop_all()
        except QuotaError as error:
            raise ShelfRefusedError("quota", f"the gpu tier takes no more of this salt: {error}") from error
        except PoolError as error:
            raise ShelfRefusedError("full", f"the gpu tier has no room: {error}") from error
        except (DeviceError, DeadlineError) as error:  # while it moved records together
            self._failure = str(error)
            raise ShelfRefusedError("device", f"the gpu tier takes nothing more: {error}") from error
        writes.set_slots(slots.table)
        chosen = names.positions_of(rows.record_names)
        addresses = placed.addresses[chosen].astype(np.int64)
        copies = RecordCopies(self._tier.locations(slots), addresses, np.array(sizes, np.int64))
        return _Keep(path, salt, ends, writes, slots, placed.rows.table[chosen, COST_US].copy(), copies, handle)

    def _copy_in(self, kept: _Keep) -> None:
        """On the thread that copies to the device."""
        error: Exception = StoreClosedError("the store was closed while records were copied to the device")
        is_there = False
        try:
            is_there = self._in.copy_in(kept.copies, lambda: self._is_closed)
        except DeviceError as failed:
            self._fail(failed)
            error = failed
        with self._lock:
            self._keeps -= 1
            if not self._is_closed:
                taken_bytes = self._enter(kept) if is_there else self._give_back(kept)
        if is_there and not self._is_closed:
            kept.handle.resolve(taken_bytes)
        else:
            kept.handle.fail(ShelfRefusedError("device" if self._failure else "closed", str(error)))

    def _enter(self, kept: _Keep) -> int:
        """The records are there: a match may find them. The bytes that were taken."""
        self._room.unpin_all(kept.slots)
        count = len(kept.slots)
        ready = np.arange(count, dtype=np.uint64)
        given_back = self._index.commit(kept.writes, ready, kept.costs_us, ends_at_us=NEW_US)
        self._index.native.prolong(packed_keys(kept.path), kept.ends.table)
        stays = kept.slots.taken(sorted(set(range(count)).difference(given_back)))
        self._room.keep_all(stays, kept.salt)
        self._room.give_back_all(kept.slots.taken(given_back), kept.salt)
        native = self._index.native
        native.set_transient(kept.writes.last_node, False)
        native.leave(kept.writes)
        self._room.freed(self._index.let_go(kept.writes))
        self._kept_bytes += stays.size_bytes
        return stays.size_bytes

    def _give_back(self, kept: _Keep) -> int:
        self._room.unpin_all(kept.slots)
        self._room.give_back_all(kept.slots, kept.salt)
        self._index.native.leave(kept.writes)
        self._room.freed(self._index.let_go(kept.writes))
        return 0

    def _fail(self, error: DeviceError) -> None:
        """The device has failed: what it holds is not to be read, and it gets nothing more."""
        with self._lock:
            self._failure = self._failure or str(error)

    # Time to live

    def expire(self, now_us: int) -> int:
        with self._lock:
            freed = self._index.expire(now_us, even_written=True)
            self._index.native.take_expired()
            self._counts.expired_records += len(freed)
            self._room.freed(freed)
            return len(freed)

    # Removing

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._lock:
            native = self._index.native
            node = native.find(key)
            if node is None or (slot is not None and not native.has_slot(node, is_state, *slot)):
                return
            self._counts.damaged_records += 1
            self._room.freed(self._index.condemn(node, is_state=is_state))

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        with self._lock:
            node = self._index.native.find(key)
            if node is None:
                return 0
            freed = self._index.evict(node, states_only=states_only)
            return self._room.freed(freed) + len(freed) * RECORD_BYTES

    # The shelf itself

    def statistics(self) -> ShelfStatistics:
        with self._lock:
            return ShelfStatistics(
                name=self.name,
                capacity_bytes=self._tier.capacity_bytes,
                used_bytes=self._tier.used_bytes,
                committed_bytes=self._index.native.committed_bytes,
                index_bytes=self._index.memory_bytes,
                kept_bytes=self._kept_bytes,
                written_bytes=self._kept_bytes + self._tier.relocated_bytes,
                loaded_bytes=self._loaded_bytes,
                evicted_records=self._counts.evicted_records,
                damaged_records=self._counts.damaged_records,
                expired_records=self._counts.expired_records,
                refused=dict(self._refused),
                trouble=self._trouble(),
            )

    def _trouble(self) -> str:
        if self._failure:
            return f"the device failed: {self._failure}"
        if self.device.needs_pinning and self.pinning is not None and not self.pinning.is_pinned:
            return f"host memory is not page-locked, so records go through staging buffers: {self.pinning.why_not}"
        return ""

    def check(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._index.check()
            self._tier.check()
            accounted = self._index.native.committed_bytes + self._room.reserved_bytes + self._tier.quarantined_bytes
            assert accounted == self._tier.used_bytes, (accounted, self._tier.used_bytes)

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._lock:
            return () if self._is_closed else self._index.watch(self.name, tell)

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._index.tell_closed()
            self._index = PrefixIndex(self.spec)
        deadline = Deadline.after(DEVICE_COPY_DEADLINE_S)
        try:
            self._in_worker.wait(deadline, "copying to the device")
            self._out_worker.wait(deadline, "copying from the device")
        except DeadlineError:
            # The device hangs. What it may still use stays as it is, for as long as the process.
            _HUNG.append(self)
            return
        if self._pinned is not None:
            with suppress(DeviceError):  # of a device that failed before
                self.device.unpin(self._pinned)
            self._pinned = None
        with self._lock:
            self._tier.close()
            self._room = Room(self._tier, self._index, self._counts)

    def close_in_child(self) -> None:
        # The device's memory is the parent's: nothing of it is touched, not even let go.
        if not self._is_closed:
            never_free(self._tier.memory)
        self._is_closed = True
        self._lock = threading.RLock()
        self._in_worker = Worker("kvstore-gpu-in")
        self._out_worker = Worker("kvstore-gpu-out")


_HUNG: list[SlabShelf] = []
"""Shelves whose memory a device may still use after they were closed."""
