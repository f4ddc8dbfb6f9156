"""Tiers beside a pool when threads, memory and limits come between: nothing is given back too early, nothing hangs."""

from __future__ import annotations

import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import pytest

from kvstore.attached.waits import Waits
from kvstore.clock import Deadline
from kvstore.errors import LeaseGoneError, LoadFailedError, PoolError, ShelfRefusedError
from kvstore.handle import Handle
from kvstore.limits import ATTACHED_WAITS_MAX
from kvstore.placement import load as load_module
from kvstore.placement.tiered import TieredPool
from kvstore.pool import StoreLimits
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.spec import ChunkGrid
from kvstore.store import Store
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.resources import Background
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEST_S = 30.0
B = 4
IDS = tuple(range(22))
MORE = (*IDS, 99)


class Tiers:
    """A store on a pool and a durable shelf, by a clock that a test moves."""

    def __init__(self, limits: StoreLimits | None = None) -> None:
        spec = hybrid(B)
        self.now_s = 0.0
        self.shelf = MemoryShelf(spec, capacity_bytes=8 << 20, name="shelf", medium=ShelfMedium())
        sizes = slot_sizes_bytes(spec)
        self.arena = ArenaTier(4 << 20, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=sizes)
        self.pool = TieredPool(
            spec, self.arena, [self.shelf], limits=limits, clock=lambda: self.now_s, close_deadline_s=0.2
        )
        self.store = Store(self.pool)

    def write(self, ids: Sequence[int] = IDS, grid: ChunkGrid | None = None) -> None:
        with self.store.write(ids, grid=grid) as writer:
            put_all(writer)
            writer.commit()

    def forget_here(self, ids: Sequence[int] = IDS) -> None:
        assert self.pool.evict_here(self.store.prompt(ids).path.key(0)) > 0

    def read(self, ids: Sequence[int] = IDS) -> None:
        with self.store.read(self.store.match((*ids, 99))) as lease:
            check_lease(lease, self.store.prompt(ids[: lease.tokens]))


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    opened = Tiers()
    with closing(opened.store):
        yield opened
        if not opened.pool.is_closed:
            opened.pool.check()


# Keeping


def test_the_longest_lease_is_not_that_of_what_a_shelf_still_reads() -> None:
    tiers = Tiers(StoreLimits(lease_max_s=10))
    with closing(tiers.store):
        tiers.shelf.keeps.close()
        tiers.write()
        tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
        tiers.now_s = 100.0
        assert tiers.pool.statistics().expired_leases == 0
        assert tiers.pool.evict_here(tiers.store.prompt(IDS).path.key(0)) == 0
        tiers.shelf.keeps.open()
        tiers.store.flush(TEST_S)
        tiers.forget_here()
        tiers.read()


@pytest.mark.parametrize("where", ["keep", "result", "hold", "statistics", "pool"])
def test_a_fault_of_a_shelf_does_not_end_the_keeping(tiers: Tiers, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whatever it raises: what was to be kept is told as failed, and what comes next is kept."""

    def fault(*_: object, **__: object) -> None:
        raise MemoryError(f"in {where}")

    def failed(*_: object) -> Handle[int]:
        handle: Handle[int] = Handle("keeping")
        handle.fail(MemoryError("as the result"))
        return handle

    with monkeypatch.context() as patched:
        if where == "result":
            patched.setattr(tiers.shelf, "keep", failed)
        elif where == "pool":
            patched.setattr(tiers.pool._keeper, "_hold", fault)
        else:
            patched.setattr(tiers.shelf, where, fault)
        tiers.write()
        with suppress(ShelfRefusedError) if where == "statistics" else pytest.raises(ShelfRefusedError, match="failed"):
            tiers.store.flush(TEST_S)
    tiers.write(range(100, 120))
    tiers.store.flush(TEST_S)
    tiers.forget_here(range(100, 120))
    tiers.read(range(100, 120))
    assert tiers.pool.statistics().keeping.pinned_bytes == 0


def test_each_chunking_of_a_prompt_is_kept(tiers: Tiers) -> None:
    """Strict readers of either find theirs once memory has forgotten both, as `flush` had promised."""
    ids, more = IDS[:20], (*IDS[:20], 99)
    grids = [ChunkGrid.every(tokens, upto=20) for tokens in (4, 20)]
    for grid in grids:
        tiers.write(ids, grid=grid)
        tiers.store.flush(TEST_S)
    tiers.forget_here(ids)
    for tokens in (4, 20):
        found = tiers.store.match(more, grid=ChunkGrid.every(tokens, upto=24))
        assert (found.tokens, found.tier) == (20, "shelf")
        with tiers.store.read(found) as lease:
            check_lease(lease, tiers.store.prompt(ids))


# Loading


def test_a_load_whose_thread_does_not_start_is_none(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    tiers.write()
    tiers.store.flush(TEST_S)
    tiers.forget_here()

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(LoadFailedError, match="thread"):
            tiers.store.read(tiers.store.match(MORE), deadline_s=TEST_S)
    found = tiers.pool.statistics()
    assert (found.loading.running, found.reserved_bytes, found.quarantined_bytes) == (0, 0, 0)
    tiers.read()


def test_memory_stays_while_a_load_looks_at_it(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is closed while checksums of what came are computed waits for that, however long it is to wait."""
    tiers.write()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    looks, may_go_on, is_unmapped = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []
    original, close = load_module.which_intact_rows, tiers.arena.close

    def looking(*arguments: object) -> object:
        looks.set()
        assert may_go_on.wait(TEST_S)
        seen.append(is_unmapped.is_set())
        return original(*arguments)  # type: ignore[arg-type]

    def unmap() -> None:
        is_unmapped.set()
        close()

    monkeypatch.setattr(load_module, "which_intact_rows", looking)
    monkeypatch.setattr(tiers.arena, "close", unmap)
    reading = Background(lambda: tiers.store.read(tiers.store.match(MORE)))
    assert looks.wait(TEST_S)
    closed = Background(tiers.store.close)
    is_unmapped.wait(1.0)
    may_go_on.set()
    closed.result(TEST_S)
    assert seen
    assert not any(seen)
    with pytest.raises(Exception, match=r"given up|closed"):
        reading.result(TEST_S)


def test_a_listener_looks_into_the_pool_while_a_load_begins(tiers: Tiers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that was dropped ends in whichever call comes next; who is told matches again, as those who wait do."""
    tiers.write()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    found = tiers.store.match(MORE)
    told: list[int] = []
    hold = tiers.shelf.hold

    def look() -> None:
        told.append(tiers.store.match(MORE).tokens)

    tiers.pool.subscribe(look)

    def dropping(*arguments: object, **named: object) -> object:
        tiers.pool.settle_later(tiers.pool._notify)
        return hold(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(tiers.shelf, "hold", dropping)
        reading = Background(lambda: tiers.store.read(found, deadline_s=TEST_S))
        with reading.result(2 * TEST_S) as lease:
            check_lease(lease, tiers.store.prompt(IDS))
    tiers.pool.unsubscribe(look)
    assert set(told) == {22}


def test_what_is_damaged_in_memory_alone_is_read_from_the_shelf(tiers: Tiers) -> None:
    """Only the damaged copy goes, and the reader loses nothing."""
    tiers.write()
    tiers.store.flush(TEST_S)
    found = tiers.store.match(MORE)
    assert found.best is not None
    hold = tiers.pool.hold_here(found.best.path)
    record = hold.records[0]
    tiers.arena.view(record.slot)[record.layout.pieces[0].offset] ^= 1
    hold.release()
    with tiers.store.read(found, verify=True) as lease:
        assert lease.tokens == 22
        check_lease(lease, tiers.store.prompt(IDS))
    assert tiers.pool.statistics().damaged_records == 1
    assert tiers.shelf.statistics().damaged_records == 0


@pytest.mark.parametrize("has_come", [False, True])
def test_a_layered_lease_does_not_outlast_the_longest_one(has_come: bool) -> None:
    tiers = Tiers(StoreLimits(lease_max_s=10))
    with closing(tiers.store):
        tiers.write()
        tiers.store.flush(TEST_S)
        tiers.forget_here()
        lease = tiers.store.read(tiers.store.match(MORE), layered=True)
        if has_come:
            lease.wait()
        tiers.now_s = 100.0
        assert tiers.pool.statistics().expired_leases == 1
        with pytest.raises(LeaseGoneError, match="lease_max_s"):
            lease.layer(tiers.store.spec.layers[0])
        lease.release()
        tiers.now_s = 1000.0
        assert tiers.pool.statistics().expired_leases == 1


# Waits of attached processes


def test_a_wait_without_a_thread_is_refused_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = Waits(lambda call: call())

    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def answer(reply: bytes | None, error: BaseException | None) -> None:
        raise AssertionError("nothing was to be answered")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for _ in range(ATTACHED_WAITS_MAX + 1):
        with pytest.raises(PoolError, match="no thread to wait in"):
            waits.begin(lambda: None, lambda _: b"", answer, undo=lambda _: None)
