"""The SSD tier as a shelf: found by its own index, read from its drives, written behind the writers' backs."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, ShelfRefusedError, StoreClosedError
from kvstore.handle import Handle
from kvstore.limits import SSD_CLOSE_DEADLINE_S
from kvstore.placement.ends import Ends, packed_keys
from kvstore.placement.shelf import Shelf, ShelfStatistics
from kvstore.placement.ssd.budget import WriteBudget, load_state
from kvstore.placement.ssd.clock import JournalClock
from kvstore.placement.ssd.keeping import Keeping
from kvstore.placement.ssd.loading import SsdHold, SsdLoad
from kvstore.placement.ssd.places import drives_of, segment_index, segments_of
from kvstore.placement.ssd.stock import Stock
from kvstore.placement.ssd.writer import Writer
from kvstore.pool.index import PrefixIndex, needs_of
from kvstore.pool.plan import place_table
from kvstore.pool.rows import GROUP, NODE, SLOT, SLOT_BYTES, Rows
from kvstore.pool.search import search

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore._native import Finding
    from kvstore.abc import Slot
    from kvstore.events import Changes, Tell
    from kvstore.placement.ssd.drive import Drive
    from kvstore.placement.ssd.options import SsdOptions
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.pool.search import Query
    from kvstore.pool.store_limits import StoreLimits
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

_of_parents: list[Stock] = []
"""Stocks of the process that forked this one. Kept, so that nothing of them is closed or waited for here."""


class SsdShelf(Shelf):
    """Records in one or several directories. Any thread may call any method.

    What `keep` takes is durable when its handle is done. Which records are here is said by an index in memory, filled
    from the directories' journals when the shelf is opened: a million records take about a second.

    Args:
        drives: the directories, opened; the shelf closes them.
        left_out: why others could not be opened.
        now: wall-clock seconds, for the budget of writes, and for ends that outlive the process.
        clock: the pool's, seconds.
        limits: what each salt may take here.
    """

    def __init__(
        self,
        spec: ModelSpec,
        drives: Sequence[Drive],
        options: SsdOptions,
        *,
        left_out: Sequence[str] = (),
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        limits: StoreLimits | None = None,
    ) -> None:
        self.spec = spec
        self._left_out = tuple(left_out)
        told_us = max((drive.directory.wall_us for drive in drives), default=0)
        self._stock = Stock(spec, drives, JournalClock(clock, now, told_us), limits)
        with self._stock.lock:
            self._stock.restore(is_whole=not left_out)
        states = [load_state(drive.files) for drive in drives] if options.daily_bytes is not None else []
        known = [state for state in states if state is not None]
        state = max(known, key=lambda each: each.at_s, default=None)
        self._budget = WriteBudget(options.daily_bytes, state, now=now)
        self._writer = Writer(self._stock, options, self._budget)
        self._holds: set[SsdHold] = set()
        self._closing = threading.Lock()
        self._writer.start()

    @property
    def name(self) -> str:
        return "ssd"

    @property
    def is_durable(self) -> bool:
        return True

    # Finding and reading

    def find(self, query: Query) -> Finding:
        with self._stock.lock:
            return search(self._stock.index.native, query)

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> SsdHold | None:
        stock = self._stock
        with stock.lock:
            if stock.is_closed:
                return None
            held = stock.index.native.collect(
                path.packed,
                needs_of(self.spec, shard),
                None if grid is None else grid.packed,
                None if grids is None else place_table(grids),
            )
            if held is None:
                return None
            rows = Rows(self.spec, path, *held.rows())
            stock.pin(rows.table[:, SLOT : SLOT_BYTES + 1])
            stock.index.hold(held)
            salt = stock.index.native.salt(held.last_node)
            hold = SsdHold(path, salt, held, rows, self._load, self._let_go)
            self._holds.add(hold)
            return hold

    def _load(self, hold: SsdHold, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> SsdLoad:
        stock = self._stock
        stock.check_open()
        slots = hold.rows.table[numbers, SLOT : SLOT_BYTES + 1]

        def arrived(size_bytes: int) -> None:
            with stock.lock:
                stock.loaded_bytes += size_bytes

        def failed(position: int, error: OSError) -> None:
            self._note_read_error(hold, int(numbers[position]), error)

        return SsdLoad(stock.drives, slots, addresses, arrived, failed)

    def _note_read_error(self, hold: SsdHold, row: int, error: OSError) -> None:
        """A record could not be read: it leaves the index; what is lost with it is found out by the writer's thread."""
        stock = self._stock
        slot = hold.rows.table[row : row + 1, SLOT : SLOT_BYTES + 1]
        number, segment = int(drives_of(slot)[0]), int(segments_of(slot)[0])
        is_state = int(hold.rows.table[row, GROUP]) in self.spec.state_groups
        with stock.lock:
            if stock.is_closed:
                return
            if isinstance(error, FileNotFoundError) or stock.drives[number].directory.is_short(segment):
                stock.lost_segments.add(segment_index(number, segment))
            elif stock.drives[number].note_read_error(error):
                stock.lost_drives.add(number)
            key = hold.path.key(int(hold.rows.table[row, NODE]))
            self._condemn(key, slot[0].tolist(), is_state=is_state, may_return=True)
            stock.changed.notify_all()

    def _let_go(self, hold: SsdHold) -> None:
        stock = self._stock
        with stock.lock:
            self._holds.discard(hold)
            if stock.is_closed:
                return
            stock.unpin(hold.rows.table[:, SLOT : SLOT_BYTES + 1])
            stock.freed(stock.index.release(hold.held))

    # Keeping

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        handle: Handle[int] = Handle(f"keeping {path.tokens} tokens in the SSD tier")
        stock = self._stock
        keeping = Keeping(self.spec, path, salt, placed, ends or Ends.lasting(path), handle)
        with stock.lock:
            try:
                stock.check_open()
                if path.sparse:
                    raise ShelfRefusedError("sparse", "what a sparse prefill wrote is not kept in the SSD tier")
                writes = keeping.plan(stock.index.native)
                keeping.size_bytes = keeping.lacking_bytes(writes)
                if keeping.size_bytes or stock.live_longer(path, keeping.ends.table) or not stock.are_ends_safe(path):
                    self._writer.put(keeping)
                    stock.prolong(path, keeping.ends.table)
                else:
                    stock.index.native.touch_path(path.packed)
                    handle.resolve(0)
            except (ShelfRefusedError, StoreClosedError) as error:
                if isinstance(error, ShelfRefusedError):
                    stock.refused[error.reason] += 1
                handle.fail(error)
        return handle

    # Time to live

    @property
    def next_end_us(self) -> int:
        with self._stock.lock:
            return self._stock.index.native.next_end_us

    def expire(self, now_us: int) -> int:
        with self._stock.lock:
            return 0 if self._stock.is_closed else self._stock.expire(now_us)

    def stored_tokens(self, path: NodePath) -> int:
        with self._stock.lock:
            return self._stock.index.native.stored_tokens(path.packed)

    def set_end(self, path: NodePath, ends_at_us: int, *, after_tokens: int, meant_tokens: int) -> None:
        stock = self._stock
        with stock.lock:
            if not stock.is_closed:
                stock.index.native.set_end(path.packed, ends_at_us, after_tokens, meant_tokens)
                stock.note_ends(path)

    def ends_of(self, path: NodePath) -> npt.NDArray[np.uint64]:
        with self._stock.lock:
            return self._stock.index.native.ends_of(packed_keys(path))

    def write_ends(self, deadline: Deadline) -> None:
        with self._stock.lock:
            if not self._stock.has_unsafe_ends:
                return
            self._stock.check_open()
            handle: Handle[None] = Handle("writing until when something is wanted to the SSD tier")
            self._writer.put_ends(handle)
        handle.result(deadline.remaining_s())

    # Losing

    @property
    def lost_records(self) -> int:
        with self._stock.lock:
            return self._stock.index.native.lost_records

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._stock.lock:
            self._condemn(key, slot, is_state=is_state)

    def _condemn(self, key: bytes, slot: Sequence[int] | None, *, is_state: bool, may_return: bool = False) -> None:
        stock = self._stock
        node = None if stock.is_closed else stock.index.native.find(key)
        if node is None or (slot is not None and not stock.index.native.has_slot(node, is_state, *slot)):
            return
        stock.damaged_records += 1
        stock.freed(stock.index.condemn(node, is_state=is_state), may_return=may_return)

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        stock = self._stock
        with stock.lock:
            node = None if stock.is_closed else stock.index.native.find(key)
            if node is None:
                return 0
            freed = stock.index.evict(node, states_only=states_only)
            stock.evicted_records += len(freed)
            return stock.freed(freed)

    # The shelf itself

    def statistics(self) -> ShelfStatistics:
        stock = self._stock
        with stock.lock:
            return ShelfStatistics(
                name=self.name,
                capacity_bytes=sum(drive.capacity_bytes for drive in stock.drives),
                used_bytes=sum(drive.directory.used_bytes for drive in stock.drives),
                committed_bytes=stock.index.native.committed_bytes,
                index_bytes=stock.index.memory_bytes,
                kept_bytes=stock.kept_bytes,
                written_bytes=sum(drive.directory.written_bytes for drive in stock.drives),
                loaded_bytes=stock.loaded_bytes,
                evicted_records=stock.evicted_records,
                damaged_records=stock.damaged_records,
                expired_records=stock.expired_records,
                refused=dict(stock.refused),
                trouble=self._trouble(),
            )

    def _trouble(self) -> str:
        each = [*self._left_out, *(drive.trouble for drive in self._stock.drives), self._writer.trouble]
        return "; ".join(trouble for trouble in each if trouble)

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._stock.lock:
            return () if self._stock.is_closed else self._stock.index.watch(self.name, tell)

    def check(self) -> None:
        with self._stock.lock:
            if not self._stock.is_closed:
                self._stock.check()

    def close(self) -> None:
        stock = self._stock
        with self._closing:
            with stock.lock:
                if stock.is_closed:
                    return
                stock.is_closed = True
                holds = tuple(self._holds)
            deadline = Deadline.after(SSD_CLOSE_DEADLINE_S)
            stuck: list[DeadlineError] = []
            for end in (*(hold.end_loads for hold in holds), self._writer.close):
                try:
                    end(deadline)
                except DeadlineError as error:
                    stuck.append(error)
            for drive in stock.drives:
                if stuck:
                    drive.directory.abandon()
                else:
                    drive.directory.close()
            if not stuck:
                with stock.lock:
                    stock.index.tell_closed()
                    stock.index = PrefixIndex(self.spec)
            hanging = [drive.files.directory for drive in stock.drives if drive.directory.is_abandoned]
            if hanging:
                raise DeadlineError(
                    f"the SSD tier is closed, but what was begun on a drive of {', '.join(hanging)} does not end"
                    f"{f' ({stuck[0]})' if stuck else ''}; its memory, files and lock stay until this process ends. "
                    "Look after the drive"
                )

    def close_in_child(self) -> None:
        _of_parents.append(self._stock)
        self._stock = Stock(self.spec, ())
        self._stock.is_closed = True
        self._holds = set()
        self._closing = threading.Lock()
