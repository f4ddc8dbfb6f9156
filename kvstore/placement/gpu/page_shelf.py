"""An engine's own pages as a tier: what lies there is found and copied from there, and no second copy is made."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.abc import SlotRows
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, ShelfRefusedError, SpecError, StoreClosedError
from kvstore.events import RemovedWhy
from kvstore.handle import Handle
from kvstore.limits import PAGE_COPIES_MAX, PAGE_FORGET_DEADLINE_S
from kvstore.placement.ends import Ends, packed_keys
from kvstore.placement.gpu.page_load import PageLoad
from kvstore.placement.gpu.page_names import name_pages, units_in_pages
from kvstore.placement.gpu.page_table import PageTable
from kvstore.placement.indexed import IndexedShelf
from kvstore.placement.shelf import ShelfHold, ShelfStatistics
from kvstore.pool.index import PrefixIndex, needs_of
from kvstore.pool.plan import place_table
from kvstore.pool.rows import GROUP, NODE, STOP, RecordNames, Rows
from kvstore.pool.search import search
from kvstore.record import record_layout
from kvstore.spec import ReuseRule
from kvstore.tiers.gpu.packing import packings_of_records

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvstore._native import Finding, HeldRows, WriteSet
    from kvstore.abc import Slot
    from kvstore.events import Changes, Tell
    from kvstore.placement.gpu.page_names import PagedPath
    from kvstore.placement.gpu.page_table import Location
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.search import Query
    from kvstore.spec import ChunkGrid, Shard
    from kvstore.tiers.gpu.pages import Pages


@dataclass
class _Counters:
    loaded_bytes: int = 0
    evicted_records: int = 0
    damaged_records: int = 0
    expired_records: int = 0
    trouble: str = ""


class PageHold(ShelfHold):
    """Records in pages that the engine does not get back before `release`. Any thread."""

    def __init__(
        self, shelf: PageShelf, path: NodePath, salt: bytes, held: HeldRows, rows: Rows, locations: list[Location]
    ) -> None:
        self.path = path
        self.salt = salt
        self.rows = rows
        self.held = held
        self.locations = locations
        """Of each row."""
        self._shelf = shelf
        self._lock = threading.Lock()
        self._loads: list[PageLoad] = []
        self._is_released = False

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> PageLoad:
        with self._lock:
            if self._is_released:
                raise StoreClosedError("the hold was released, or its shelf closed; hold the resume point again")
            load = self._shelf.begin_load(self, numbers, addresses)
            self._loads.append(load)
            return load

    def release(self) -> None:
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        for load in self._loads:
            load.cancel()
        self._shelf.let_go(self)


class PageShelf(IndexedShelf):
    """The index of what lies in an engine's pages. Any thread.

    The engine says what lies where (`note`), and takes pages back before it reuses them (`forget`). What it writes into
    pages that it has not taken back would be read as what was noted there.

    Args:
        pages: the engine's tensors, those of every layer.
        name: of the tier.

    Attributes:
        pages: the same.

    Raises:
        SpecError: layers are lacking; or a group's rows are such that this worker alone stores no whole records.
    """

    def __init__(self, pages: Pages, *, name: str = "gpu") -> None:
        spec = pages.spec
        if not pages.layout.is_whole:
            raise SpecError(
                "a tier needs the pages of every layer, since a resume point consists of all; register the rest"
            )
        self.pages = pages
        self._units = [units_in_pages(group, pages.shard) for group in spec.groups]
        for group, units in enumerate(self._units):
            for span in spec.spans[group]:
                packings_of_records(record_layout(spec, group, span.index, units), pages.shard, 1)
        self._name = name
        self._lock = self._changed = threading.Condition(threading.RLock())
        self._index = PrefixIndex(spec)
        self._table = PageTable()
        self._holds: set[PageHold] = set()
        self._counters = _Counters()
        self._refused: dict[str, int] = {}
        self._threads = ThreadPoolExecutor(PAGE_COPIES_MAX, thread_name_prefix=f"kvstore-{name}-pages")
        self._is_closed = False
        self._is_still = False
        """Closed, and nothing moves any longer."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def is_durable(self) -> bool:
        return False

    # What lies where

    def note(
        self,
        prompt: Prompt,
        page_ids: Mapping[str, Any] | Any,
        *,
        upto_tokens: int | None = None,
        states: Mapping[int, Mapping[str, int]] | None = None,
        resume_at: Iterable[int] = (),
        grid: ChunkGrid | None = None,
        stream: Any = None,
    ) -> int:
        """A prompt's cache lies in these pages, up to a length: from here on it is found there.

        What is found already stays where it is; the new pages are remembered beside. Several prompts may name one page.

        Args:
            page_ids: the engine's ids of the pages of the prompt, from its first token on. By name for each group with
                tokens, or one list for all. A window has -1 for pages that the engine has given up.
            upto_tokens: how many tokens lie there; all by default. An incomplete block counts only at a resume point.
            states: by length, and by group: the page that holds the state after exactly so many tokens.
            resume_at: further lengths at which windows are whole, of models whose only states are windows.
            grid: the chunk boundaries that it was computed with.
            stream: whose work fills the pages: they are read behind it. None is the one that is current.

        Returns:
            Bytes of the records that can be found now and could not before.

        Raises:
            WriteError: lengths that cannot be resume points, or too few pages. SpecError: page ids that do not exist.
            ShelfRefusedError: a sparse prompt. StoreClosedError: the shelf was closed.
        """
        self._check_open()
        if prompt.masks:
            raise self._refuse("sparse", "what a sparse prefill computed is not noted: pages do not say what they lack")
        ready = self.pages.device.stream_of(stream).mark()
        upto = len(prompt) if upto_tokens is None else upto_tokens
        named = name_pages(self.pages, self._units, prompt, page_ids, upto, states or {}, resume_at, grid, ready)
        return self.note_records(named, prompt.salt)

    def note_records(self, named: PagedPath, salt: bytes) -> int:
        """As `note`, of records that are named one by one."""
        with self._changed:
            self._check_open()
            native, path = self._index.native, named.path
            writes = native.plan(path.packed, named.table, named.digests)
            if writes.is_wrong_path or writes.gap_node is not None:
                raise self._refuse(
                    "gap", f"{path.tokens} tokens cannot be noted: what lies before them is not in these pages"
                )
            rows, held = (Rows(self.pages.spec, path, *found) for found in (writes.missing(), writes.held()))
            places = zip(held.table[:, [NODE, GROUP]].tolist(), held.slots(), strict=True)
            for slot, place in {slot.index: (slot, place) for place, slot in places}.values():
                self._table.add_location(slot, named.locations[place[0], place[1]])
            return self._enter(named, salt, rows, writes) if len(rows) else 0

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError(f"the tier {self._name!r} is closed; open the store again")

    def _enter(self, named: PagedPath, salt: bytes, rows: Rows, writes: WriteSet) -> int:
        """Make records findable; the lock is held."""
        path, spec = named.path, self.pages.spec
        native = self._index.native
        slots = np.empty((len(rows), 3), np.uint64)
        slots[:, 1], slots[:, 2] = 1, rows.slot_sizes
        by_place: dict[tuple[int, int], list[int]] = {}
        for row, (node, group) in enumerate(rows.table[:, [NODE, GROUP]].tolist()):
            by_place.setdefault((node, group), []).append(row)
        native.enter(writes, path.packed, salt, [], [])
        for (node, group), members in by_place.items():
            slots[members, 0] = self._table.add(
                self.pages.layout.group(group).pool,
                path.key(node),
                is_state=spec.groups[group].rule is ReuseRule.STATE,
                records=len(members),
                location=named.locations[node, group],
            )
        writes.set_slots(slots)
        positions = RecordNames(named.table[:, : STOP + 1]).positions_of(rows.record_names)
        ready = np.arange(len(rows), dtype=np.uint64)
        given_back = self._index.commit(writes, ready, named.costs_us[positions])
        self._index.native.prolong(packed_keys(path), Ends.lasting(path).table)
        self._table.freed(SlotRows(slots[given_back]))
        native.leave(writes)
        self._table.freed(self._index.let_go(writes))
        return int(slots[:, 2].sum()) - int(slots[given_back, 2].sum())

    def forget(self, page_ids: Any, *, pool: str | None = None, deadline_s: float = PAGE_FORGET_DEADLINE_S) -> None:
        """The engine is about to reuse pages: nothing is found there any more, nor what only they made reachable.

        When this returns, nothing reads the pages, and nothing will. Pages of which nothing is known are fine.

        Args:
            pool: name of the numbering that the ids are of, where there are several.
            deadline_s: how long to wait for holds that name the pages, and for copies from them; 0 does not wait.

        Raises:
            DeadlineError: something still reads the pages, so that they must not be reused; nothing new will. Ask
                again. SpecError: page ids that do not exist.
        """
        pool, ids = self._checked(pool, page_ids)
        deadline = Deadline.after(deadline_s)
        with self._changed:
            gone = self._table.locations_in(pool, ids)
            for location, index in gone.items():
                self._drop(index, location)
            waited = self._changed.wait_for(
                lambda: self._is_still or not any(location.pins for location in gone), deadline.remaining_s()
            )
            if not waited:
                busy = sorted({page for each in gone if each.pins for page in each.pages.tolist()} & set(ids))
                raise DeadlineError(
                    f"{len(busy)} pages ({', '.join(map(str, busy[:8]))}) were still being read after "
                    f"{deadline_s:g} s; do not reuse them, and ask again"
                )

    def _checked(self, pool: str | None, page_ids: Any) -> tuple[str, list[int]]:
        pools = self.pages.layout.pool_pages
        if pool is None:
            if len(pools) > 1:
                raise SpecError(f"page ids are of several numberings ({', '.join(sorted(pools))}); say which: pool=")
            pool = next(iter(pools))
        if pool not in pools:
            raise SpecError(f"there is no numbering {pool!r} of pages; there are: {', '.join(sorted(pools))}")
        group = max(
            (each for each in self.pages.layout.groups.values() if each.pool == pool), key=lambda each: each.pages
        )
        return pool, self.pages.ids(group.group, page_ids).tolist()

    def _drop(self, index: int, location: Location) -> None:
        """A location is not there any more; the lock is held."""
        last = self._table.drop_location(index, location)
        if last is None:
            return
        key, is_state = last
        node = self._index.native.find(key)
        assert node is not None, "records are in the table and not in the index"
        freed = self._index.condemn(node, is_state=is_state, why=RemovedWhy.EVICTED)
        self._counters.evicted_records += len(freed)
        self._table.freed(freed)

    # Finding and reading

    def find(self, query: Query) -> Finding:
        with self._changed:
            return search(self._index.native, query)

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> PageHold | None:
        with self._changed:
            if self._is_closed:
                return None
            packed_grid = None if grid is None else grid.packed
            places = None if grids is None else place_table(grids)
            native = self._index.native
            held = native.collect(path.packed, needs_of(self.pages.spec, shard), packed_grid, places)
            if held is None:
                return None
            rows = Rows(self.pages.spec, path, *held.rows())
            self._index.hold(held)
            locations = [self._table.pin(slot) for slot in rows.slots()]
            hold = PageHold(self, path, native.salt(held.last_node), held, rows, locations)
            self._holds.add(hold)
            return hold

    def begin_load(self, hold: PageHold, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> PageLoad:
        """For `PageHold`."""
        load = PageLoad(
            self.pages,
            self.pages.copier,
            hold.rows,
            np.asarray(numbers, np.int64),
            [hold.locations[number] for number in numbers.tolist()],
            np.asarray(addresses, np.uint64),
            self._loaded,
            self._failed,
        )
        load.begin(self._threads.submit)
        return load

    def _loaded(self, size_bytes: int) -> None:
        with self._changed:
            self._counters.loaded_bytes += size_bytes

    def _failed(self, why: str) -> None:
        with self._changed:
            self._counters.trouble = f"a load from the engine's pages failed: {why}"

    def let_go(self, hold: PageHold) -> None:
        """For `PageHold`."""
        with self._changed:
            if hold not in self._holds:
                return
            self._holds.discard(hold)
            for location, group in zip(hold.locations, hold.rows.table[:, GROUP].tolist(), strict=True):
                self._table.unpin(self.pages.layout.group(group).pool, location)
            if not self._is_closed:
                self._table.freed(self._index.release(hold.held))
            self._changed.notify_all()

    # Keeping and losing

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        handle: Handle[int] = Handle(f"keeping {path.tokens} tokens in an engine's pages")
        with self._changed:
            if self._is_closed:
                handle.fail(StoreClosedError(f"the tier {self._name!r} is closed; open the store again"))
            else:
                handle.fail(self._refuse("engine", "pages are the engine's own: it says what lies there"))
        return handle

    def _refuse(self, reason: str, message: str) -> ShelfRefusedError:
        with self._changed:
            self._refused[reason] = self._refused.get(reason, 0) + 1
        return ShelfRefusedError(reason, message)

    # Time to live

    def expire(self, now_us: int) -> int:
        with self._changed:
            freed = self._index.expire(now_us, even_written=True)
            self._index.native.take_expired()
            self._counters.expired_records += len(freed)
            self._counters.evicted_records += len(freed)
            self._table.freed(freed)
            return len(freed)

    def drop_ended(self, key: bytes, *, is_state: bool) -> None:
        with self._changed:
            node = self._index.native.find(key)
            if node is not None:
                freed = self._index.condemn(node, is_state=is_state)
                self._counters.expired_records += len(freed)
                self._counters.evicted_records += len(freed)
                self._table.freed(freed)

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._changed:
            native = self._index.native
            node = native.find(key)
            if node is None or (slot is not None and not native.has_slot(node, is_state, *slot)):
                return
            self._counters.damaged_records += 1
            self._table.freed(self._index.condemn(node, is_state=is_state))

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        with self._changed:
            node = self._index.native.find(key)
            if node is None:
                return 0
            freed = self._index.evict(node, states_only=states_only)
            self._counters.evicted_records += len(freed)
            self._table.freed(freed)
            return freed.size_bytes

    # The shelf itself

    def statistics(self) -> ShelfStatistics:
        """As `Shelf.statistics`. What is noted takes no memory: `used_bytes` are those of records that can be found."""
        with self._changed:
            committed_bytes = self._index.native.committed_bytes
            return ShelfStatistics(
                name=self._name,
                capacity_bytes=self.pages.size_bytes,
                used_bytes=committed_bytes,
                committed_bytes=committed_bytes,
                index_bytes=self._index.memory_bytes + self._table.memory_bytes,
                kept_bytes=0,
                written_bytes=0,
                loaded_bytes=self._counters.loaded_bytes,
                evicted_records=self._counters.evicted_records,
                damaged_records=self._counters.damaged_records,
                expired_records=self._counters.expired_records,
                refused=dict(self._refused),
                trouble=self._counters.trouble,
            )

    def check(self) -> None:
        with self._changed:
            self._index.check()
            self._table.check()
            assert self._table.record_count == self._index.native.record_count

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._changed:
            return () if self._is_closed else self._index.watch(self._name, tell)

    def close(self) -> None:
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            holds = tuple(self._holds)
        for hold in holds:
            hold.release()
        self._threads.shutdown()
        with self._changed:
            self._is_still = True
            self._index.tell_closed()
            self._index = PrefixIndex(self.pages.spec)
            self._table = PageTable()
            self._changed.notify_all()

    def close_in_child(self) -> None:
        self._is_closed = self._is_still = True
        self._lock = self._changed = threading.Condition(threading.RLock())
        self._index = PrefixIndex(self.pages.spec)
        self._table = PageTable()
        self._holds = set()
