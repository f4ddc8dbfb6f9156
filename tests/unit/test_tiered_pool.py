"""A pool with a shelf beside it: found there, loaded from there, kept there, and what goes wrong in between."""

from __future__ import annotations

import gc
import threading
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    LeaseError,
    LeaseGoneError,
    LoadFailedError,
    PoolFullError,
    QuarantineFullError,
    ShelfRefusedError,
    StoreClosedError,
    UnavailableError,
)
from kvstore.placement.gpu.slab_shelf import GpuOptions
from kvstore.placement.tiered import TieredPool, TieredStatistics
from kvstore.pool import HandOver
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.spec import ChunkGrid, Coverage, Shard
from kvstore.store import Store, open_store
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.resources import Background
from kvstore.testing.specs import check_lease, dense, hybrid, latent, put_all, spans
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.handle import Handle
    from kvstore.placement.ends import Ends
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.path import NodePath
    from kvstore.spec import ModelSpec
    from kvstore.store import Lease, Writer

TEST_S = 30.0
B = 4
IDS = tuple(range(22))
MORE = (*IDS, 99)


@dataclass
class Tiers:
    """A store on a pool and one shelf, or two."""

    store: Store
    pool: TieredPool
    shelf: MemoryShelf
    second: MemoryShelf | None = None

    def write(self, ids: Sequence[int] = IDS, *, salt: bytes = b"", **options: object) -> None:
        """Write a prompt; returns when it is on the shelf, too."""
        self.put(ids, salt=salt, **options)
        self.settle()

    def put(self, ids: Sequence[int] = IDS, *, salt: bytes = b"", **options: object) -> None:
        """Write a prompt; the shelf takes it later."""
        with self.store.write(ids, salt=salt, **options) as writer:  # type: ignore[arg-type]
            put_all(writer)
            writer.commit()

    def settle(self) -> None:
        with suppress(ShelfRefusedError):
            self.pool._keeper.flush(Deadline.after(TEST_S))

    def forget_here(self, ids: Sequence[int] = IDS, salt: bytes = b"") -> None:
        """Nothing of a prompt is in the pool's own memory any more."""
        path = self.store.prompt(ids, salt=salt).path
        assert self.pool.evict_here(path.key(0)) > 0

    def statistics(self) -> TieredStatistics:
        return self.pool.statistics()

    def check(self, lease: Lease, ids: Sequence[int] = IDS, salt: bytes = b"") -> None:
        check_lease(lease, self.store.prompt(ids[: lease.tokens], salt=salt))


def open_tiers(
    spec: ModelSpec | None = None,
    *,
    dram: int = 4 << 20,
    shelf_bytes: int = 8 << 20,
    medium: ShelfMedium | None = None,
    shelves: int = 1,
    shelf: MemoryShelf | None = None,
    close_deadline_s: float = TEST_S,
) -> Tiers:
    spec = spec or hybrid(B)
    made = (
        [shelf]
        if shelf is not None
        else [
            MemoryShelf(spec, capacity_bytes=shelf_bytes, name=f"shelf{number}", medium=medium or ShelfMedium())
            for number in range(shelves)
        ]
    )
    arena = ArenaTier(dram, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=slot_sizes_bytes(spec))
    pool = TieredPool(spec, arena, made, close_deadline_s=close_deadline_s)
    return Tiers(Store(pool), pool, made[0], made[1] if shelves > 1 else None)


@pytest.fixture
def tiers() -> Iterator[Tiers]:
    opened = open_tiers()
    with closing(opened.store):
        yield opened
        if not opened.pool.is_closed:
            opened.pool.check()


# Found and loaded


@pytest.mark.parametrize("spec", [hybrid(B), dense(B), latent(B)], ids=lambda spec: spec.model)
def test_what_left_memory_is_found_and_loaded(spec: ModelSpec) -> None:
    tiers = open_tiers(spec)
    with closing(tiers.store):
        tiers.write()
        assert tiers.store.match(MORE).tier == "dram"
        assert tiers.store.match(MORE).best.is_durable  # type: ignore[union-attr]
        tiers.forget_here()
        found = tiers.store.match(MORE)
        assert (found.tokens, found.tier) == (22, "shelf0")
        with tiers.store.read(found) as lease:
            tiers.check(lease)
            assert lease.verify() == []
        assert tiers.store.match(MORE).tier == "dram"
        loading = tiers.statistics().loading
        assert (loading.loads, loading.failed, loading.running) == (1, 0, 0)
        assert loading.loaded_bytes == tiers.shelf.statistics().loaded_bytes > 0
        tiers.pool.check()


def test_only_what_memory_lacks_is_loaded(tiers: Tiers) -> None:
    tiers.write(IDS[:8])
    tiers.write(IDS)
    with tiers.store.read(tiers.store.match((*IDS[:8], 99))):
        path = tiers.store.prompt(IDS).path
        assert tiers.pool.evict_here(path.key(2)) > 0  # all behind the first two blocks
        with tiers.store.read(tiers.store.match(MORE)) as lease:
            tiers.check(lease)
    total = sum(layout.slot_bytes for layout in (record.layout for record in lease.records))
    assert 0 < tiers.statistics().loading.loaded_bytes < total


def test_candidates_of_both_tiers(tiers: Tiers) -> None:
    """The deepest of either; at equal lengths memory; what is on the durable shelf says so."""
    tiers.write(IDS, resume_at=[8, 16, 22])
    path = tiers.store.prompt(IDS).path
    tiers.pool.evict_here(path.key(3), states_only=True)
    tiers.shelf.evict(path.key(1), states_only=True)
    found = tiers.store.match(MORE)
    assert [(each.tokens, each.tier, each.is_durable) for each in found.candidates] == [
        (22, "dram", True),
        (16, "shelf0", True),
        (8, "dram", False),
    ]
    assert found.at(16).tier == "shelf0"
    with tiers.store.read(found.at(16)) as lease:
        assert lease.tokens == 16
        tiers.check(lease)


def test_reasons_and_suggestions_are_those_of_the_deepest_tier(tiers: Tiers) -> None:
    tiers.write(IDS, resume_at=[8])
    tiers.forget_here()
    found = tiers.store.match((*IDS, 1, 2, 3))
    assert found.tokens == 8
    assert found.missing.attention_tokens == 8
    assert "the next complete states are at 8" in found.missing.reasons
    assert found.suggested[-1] == 25


def test_grids_and_shards(tiers: Tiers) -> None:
    grid = ChunkGrid.every(4, upto=20)
    tiers.write(IDS[:20], grid=grid)
    tiers.forget_here(IDS[:20])
    ids = (*IDS[:20], 99)
    assert not tiers.store.match(ids, grid=ChunkGrid.every(8, upto=24))
    found = tiers.store.match(ids, grid=ChunkGrid.every(4, upto=24), shard=Shard(1, 2))
    assert (found.tokens, found.tier) == (20, "shelf0")
    with tiers.store.read(found) as lease:
        tiers.check(lease, IDS[:20])


def test_tenants_are_apart(tiers: Tiers) -> None:
    tiers.write(IDS, salt=b"a")
    tiers.forget_here(IDS, b"a")
    assert not tiers.store.match(MORE)
    with tiers.store.read(tiers.store.match(MORE, salt=b"a")) as lease:
        tiers.check(lease, IDS, b"a")
    assert set(tiers.statistics().bytes_by_salt) == {b"a"}


def test_load_times_are_by_tier(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    with tiers.store.read(tiers.store.match(MORE)) as lease:
        tiers.check(lease)
    here = tiers.store.match(MORE).expected_load_s
    tiers.forget_here()
    there = tiers.store.match(MORE).expected_load_s
    assert here is not None
    assert there is not None
    assert there > here > 0


# Layered


def layered(tiers: Tiers, deadline_s: float = TEST_S) -> Lease:
    return tiers.store.read(tiers.store.match(MORE), layered=True, deadline_s=deadline_s)


def test_a_layer_is_read_while_the_last_one_is_held_back() -> None:
    tiers = open_tiers(spans(), dram=64 << 20, shelf_bytes=64 << 20)
    with closing(tiers.store):
        ids = (1, 2, 3, 4)
        tiers.write(ids)
        tiers.forget_here(ids)
        layers = tiers.store.spec.layers
        tiers.shelf.loads.close(after=len(tiers.store.prompt(ids).path))  # the first layer's span of each block
        with tiers.store.read(tiers.store.match((*ids, 9)), layered=True, deadline_s=TEST_S) as lease:
            first = lease.layer(layers[0]).read("keys")
            assert tiers.statistics().loading.running == 1
            with pytest.raises(DeadlineError, match="records"):
                lease._hold.wait_for(layers[-1], Deadline.after(0.01))
            tiers.shelf.loads.open()
            assert [view.number for view in lease] == list(layers)
            check_lease(lease, tiers.store.prompt(ids))
            assert (lease.layer(layers[0]).read("keys") == first).all()
            lease.wait()
        tiers.pool.check()
        assert tiers.statistics().reserved_bytes == 0


def test_layered_without_loading_is_an_ordinary_lease(tiers: Tiers) -> None:
    tiers.write()
    with layered(tiers) as lease:
        tiers.check(lease)
    assert tiers.statistics().loading.loads == 0


def test_a_layered_lease_outlives_its_load(tiers: Tiers) -> None:
    """Its records stay after the commit, though nothing else holds them."""
    tiers.write()
    tiers.forget_here()
    lease = layered(tiers)
    lease.wait()
    assert tiers.pool.evict_here(lease.path.key(0)) == 0
    tiers.check(lease)
    lease.release()
    lease.release()
    assert tiers.pool.evict_here(lease.path.key(0)) > 0
    with pytest.raises(LeaseError):
        lease.layer(0)


def test_an_abandoned_layered_lease_releases_everything(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close(after=1)
    lease = layered(tiers)
    tiers.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    assert tiers.statistics().reserved_bytes > 0
    del lease
    gc.collect()
    tiers.store.match(MORE)  # finalizers act in the next call
    for load in tuple(tiers.pool._loads._running.values()):
        load.wait_for_end(TEST_S)
    found = tiers.statistics()
    assert found.reserved_bytes == found.quarantined_bytes == found.loading.running == 0
    assert found.loading.failed == 1
    assert found.damaged_records == tiers.shelf.statistics().damaged_records == 0, "what was cancelled is not damaged"
    tiers.shelf.loads.open()
    with layered(tiers) as again:
        tiers.check(again)


def test_a_writer_continues_from_a_layered_lease(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    with layered(tiers) as lease:
        with tiers.store.write((*IDS, 1, 2, 3, 4), resume=lease) as writer:
            put_all(writer, start=22)
            writer.commit()
        with tiers.store.read(tiers.store.match((*IDS, 1, 2, 3, 4, 9))) as longer:
            assert longer.tokens == 26
            tiers.check(longer, (*IDS, 1, 2, 3, 4))


# Loads that are shared


def test_readers_of_one_prefix_share_one_load(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close()
    found = tiers.store.match(MORE)

    def read() -> int:
        with tiers.store.read(found, deadline_s=TEST_S) as lease:
            tiers.check(lease)
            return lease.tokens

    first = Background(read)
    tiers.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    others = [Background(read) for _ in range(3)]
    lease = layered(tiers)
    until = Deadline.after(TEST_S)
    while tiers.statistics().loading.joined < 4 and not until.has_passed:
        pass
    tiers.shelf.loads.open()
    assert [each.result(TEST_S) for each in (first, *others)] == [22] * 4
    tiers.check(lease)
    lease.release()
    loading = tiers.statistics().loading
    assert (loading.loads, loading.joined) == (1, 4)
    assert loading.loaded_bytes == tiers.shelf.statistics().loaded_bytes


def test_a_load_that_was_just_left_serves_who_comes_next(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close(after=1)
    found = tiers.store.match(MORE)
    lease = layered(tiers)
    tiers.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    (load,) = tiers.pool._loads._running.values()
    with load._changed:  # it does not notice in between
        lease.release()
        assert tiers.pool._loads.begin(next(iter(tiers.pool._loads._running)), tiers.shelf, lambda: None) is load
    reading = Background(lambda: tiers.store.read(found, deadline_s=TEST_S))
    tiers.shelf.loads.open()
    with reading.result(TEST_S) as lease:
        assert lease.tokens == 22
        tiers.check(lease)
    load.leave()
    assert (tiers.statistics().loading.loads, tiers.statistics().loading.failed) == (1, 0)


def test_a_load_that_was_left_and_stopped_is_begun_anew(tiers: Tiers) -> None:
    """Whoever comes while it is ending is not told that nobody wanted it."""
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close(after=1)
    found = tiers.store.match(MORE)
    lease = layered(tiers)
    tiers.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    (load,) = tiers.pool._loads._running.values()
    may_end, is_ending = threading.Event(), threading.Event()
    release = load._held.release

    def release_late() -> None:
        is_ending.set()
        assert may_end.wait(TEST_S)
        release()

    load._held.release = release_late  # type: ignore[method-assign]
    lease.release()
    assert is_ending.wait(TEST_S)
    tiers.shelf.loads.open()
    reading = Background(lambda: tiers.store.read(found, deadline_s=TEST_S))
    with suppress(AssertionError):
        reading.result(0.05)  # it waits for the other's end
    assert reading.is_running
    may_end.set()
    with reading.result(TEST_S) as lease:
        assert lease.tokens == 22
        tiers.check(lease)
    assert (tiers.statistics().loading.loads, tiers.statistics().loading.failed) == (1, 1)


def test_a_read_that_is_late_goes_on_loading(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close(after=2)
    found = tiers.store.match(MORE)
    with pytest.raises(DeadlineError, match="loading goes on"):
        tiers.store.read(found, deadline_s=0.05)
    tiers.shelf.loads.open()
    with tiers.store.read(found, deadline_s=TEST_S) as lease:
        tiers.check(lease)
    assert tiers.statistics().loading.loads == 1


# What goes wrong


def test_a_damaged_record_is_the_next_best_candidate(tiers: Tiers) -> None:
    tiers.write(IDS, resume_at=[8, 16, 22])
    tiers.forget_here()
    path = tiers.store.prompt(IDS).path
    tiers.shelf.damage(path.key(5), is_state=True, at=4100)
    tiers.shelf.damage(path.key(3), is_state=True, at=100)
    with tiers.store.read(tiers.store.match(MORE)) as lease:
        assert lease.tokens == 8
        tiers.check(lease)
    assert tiers.statistics().loading.damaged_records >= 2
    assert tiers.shelf.statistics().damaged_records >= 2
    assert [each.tokens for each in tiers.store.match(MORE).candidates] == [8]


def test_a_damaged_block_takes_what_hangs_on_it(tiers: Tiers) -> None:
    tiers.write(IDS, resume_at=[4, 8, 22])
    tiers.forget_here()
    tiers.shelf.damage(tiers.store.prompt(IDS).path.key(2), is_state=False, at=4200)
    with tiers.store.read(tiers.store.match(MORE)) as lease:
        assert lease.tokens == 8
        tiers.check(lease)
    assert tiers.store.match(MORE).tokens == 8


def test_nothing_undamaged_is_left(tiers: Tiers) -> None:
    tiers.write(IDS[:4])
    tiers.forget_here(IDS[:4])
    tiers.shelf.damage(tiers.store.prompt(IDS[:4]).path.key(0), is_state=False)
    found = tiers.store.match(IDS[:5])
    with pytest.raises(LoadFailedError, match="damaged"):
        tiers.store.read(found)
    assert not tiers.store.match(IDS[:5])
    with pytest.raises(LeaseGoneError):
        tiers.store.read(found)
    assert tiers.statistics().reserved_bytes == 0


def test_a_layered_lease_whose_load_fails_says_so(tiers: Tiers) -> None:
    """What has come is sound; the layer that has not raises, and so does all that follows."""
    tiers.write(IDS, resume_at=[8, 22])
    tiers.forget_here()
    tiers.shelf.damage(tiers.store.prompt(IDS).path.key(5), is_state=True)
    tiers.shelf.loads.close()  # else the load may have failed before there is a lease, and the next best is read
    lease = layered(tiers)
    tiers.shelf.loads.open()
    with pytest.raises(LoadFailedError, match="Match again"):
        tiers.check(lease)
    lease.release()
    assert tiers.store.match(MORE).tokens == 8
    found = tiers.statistics()
    assert found.reserved_bytes == found.quarantined_bytes == 0


def test_a_record_that_cannot_be_read_is_a_miss(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.bad_rows.add(1)
    with pytest.raises(LoadFailedError, match="cannot be read"):
        tiers.store.read(tiers.store.match(MORE))
    assert not tiers.store.match(MORE)
    tiers.shelf.bad_rows.clear()
    tiers.write()
    tiers.forget_here()
    with tiers.store.read(tiers.store.match(MORE)) as lease:
        tiers.check(lease)


def test_another_shelf_has_it_too() -> None:
    tiers = open_tiers(shelves=2)
    with closing(tiers.store):
        tiers.write()
        tiers.forget_here()
        assert tiers.store.match(MORE).tier == "shelf0"
        tiers.shelf.damage(tiers.store.prompt(IDS).path.key(0), is_state=False)
        with tiers.store.read(tiers.store.match(MORE)) as lease:
            assert lease.tokens == 22
            tiers.check(lease)
        assert tiers.second is not None
        assert tiers.second.statistics().loaded_bytes > 0
        tiers.settle()
        tiers.pool.check()


def test_no_room_is_an_error_with_a_remedy() -> None:
    small = open_tiers(dram=160 << 10)
    with closing(small.store):
        small.write(IDS[:8])
        with small.store.read(small.store.match((*IDS[:8], 99))) as kept:
            other = tuple(range(100, 124))
            small.write(other)
            small.forget_here(other)
            with full(small), pytest.raises(PoolFullError, match="bytes are"):
                small.store.read(small.store.match((*other, 1)))
            small.check(kept, IDS[:8])
        with small.store.read(small.store.match((*other, 1))) as lease:
            small.check(lease, other)
        assert small.statistics().loading.refused_full >= 1
        small.pool.check()


def test_what_is_in_memory_is_read_while_dropped_writers_leave_no_room_to_load_more() -> None:
    tiers = open_tiers(dram=320 << 10)
    with closing(tiers.store):
        tiers.write(IDS)
        tiers.forget_here()
        tiers.write(IDS[:8])
        match = tiers.store.match(MORE)
        assert [(each.tokens, each.tier) for each in match.candidates] == [(22, "shelf0"), (8, "dram")]
        with ExitStack() as moving:
            for number in range(3):
                writer = tiers.store.write(range(100 * number + 100, 100 * number + 109))
                moving.enter_context(writer.transaction.moving())
                writer.abort("cancelled")
            with pytest.raises(QuarantineFullError):
                tiers.store.write(range(900, 905))
            with tiers.store.read(match) as lease:
                assert lease.tokens == 8
                tiers.check(lease)
            assert tiers.pool.evict_here(tiers.store.prompt(IDS).path.key(0)) > 0
            with pytest.raises(QuarantineFullError, match="dropped writers"):
                tiers.store.read(tiers.store.match(MORE))
        with tiers.store.read(match) as lease:
            assert lease.tokens == 22
            tiers.check(lease)
        tiers.pool.check()


@contextmanager
def full(tiers: Tiers) -> Iterator[None]:
    """Memory is full of reserved records, so that nothing more can be loaded."""
    writers: list[Writer] = []
    for number in count():
        try:
            writers.append(tiers.store.write(range(1000 + 50 * number, 1004 + 50 * number)))
        except PoolFullError:
            break
    yield
    for writer in writers:
        writer.abort("the test is over")


def test_closing_ends_loads(tiers: Tiers) -> None:
    tiers.write()
    tiers.forget_here()
    tiers.shelf.loads.close(after=1)
    lease = layered(tiers)
    reading = Background(lambda: tiers.store.read(tiers.store.match(MORE), deadline_s=TEST_S))
    tiers.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    tiers.store.close()
    with pytest.raises((StoreClosedError, LoadFailedError)):
        reading.result(TEST_S)
    with pytest.raises(StoreClosedError):
        lease.wait()
    lease.release()


# Keeping


def test_a_hit_brings_back_what_the_shelf_lost(tiers: Tiers) -> None:
    tiers.write()
    assert tiers.shelf.evict(tiers.store.prompt(IDS).path.key(0)) > 0
    with tiers.store.read(tiers.store.match(MORE)):
        pass
    tiers.settle()
    tiers.forget_here()
    assert tiers.store.match(MORE).tokens == 22


class LosesAtOnce(MemoryShelf):
    """What it has kept is gone before anybody hears that it was kept."""

    def keep(self, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends | None = None) -> Handle[int]:
        handle = super().keep(path, salt, placed, ends)
        handle.result(TEST_S)
        if self.loses:
            assert self.evict(path.key(0)) > 0
        return handle

    loses = True


def test_what_was_lost_before_the_keeper_heard_of_it_is_kept_again() -> None:
    spec = hybrid(B)
    shelf = LosesAtOnce(spec, capacity_bytes=8 << 20, medium=ShelfMedium())
    tiers = open_tiers(spec, shelf=shelf)
    with closing(tiers.store):
        tiers.write()
        shelf.loses = False
        tiers.write()
        tiers.store.flush(TEST_S)
        tiers.forget_here()
        assert tiers.store.match(MORE).tokens == 22


def test_what_has_ended_and_is_written_again_is_kept_again(tiers: Tiers) -> None:
    tiers.write()
    assert tiers.store.expire(IDS) == 22
    assert tiers.store.match(MORE).tokens == 0
    tiers.write()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    assert tiers.store.match(MORE).tokens == 22


def test_what_ends_while_it_is_being_kept_and_is_written_again_is_kept(tiers: Tiers) -> None:
    tiers.shelf.keeps.close()
    tiers.put()
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    assert tiers.store.expire(IDS) == 22
    tiers.put()
    tiers.shelf.keeps.open()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    assert tiers.store.match(MORE).tokens == 22


def test_what_was_refused_and_is_committed_again_is_offered_again(tiers: Tiers) -> None:
    tiers.shelf.refuses = "write budget"
    tiers.write()
    tiers.put()
    with pytest.raises(ShelfRefusedError, match="1 'write budget'"):
        tiers.store.flush(TEST_S)
    tiers.shelf.refuses = ""
    tiers.write()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    assert tiers.store.match(MORE).tokens == 22


def test_what_was_loaded_was_committed_by_nobody() -> None:
    """One tier refuses it; what is read from the other one is not offered at each load, and no flush speaks of it."""
    tiers = open_tiers(shelves=2)
    with closing(tiers.store):
        tiers.write()
        assert tiers.second is not None
        assert tiers.second.evict(tiers.store.prompt(IDS).path.key(0)) > 0
        tiers.second.refuses = "write budget"
        for _ in range(3):
            tiers.forget_here()
            with tiers.store.read(tiers.store.match(MORE)) as lease:
                tiers.check(lease)
            tiers.settle()
        assert tiers.statistics().loading.loads == 3
        assert tiers.statistics().keeping.dropped == {"write budget": 1}
        tiers.store.flush(TEST_S)


def test_checkpoints_are_kept_ascending(tiers: Tiers) -> None:
    tiers.write(IDS, resume_at=[8, 16, 22])
    tiers.forget_here()
    assert [each.tokens for each in tiers.store.match(MORE).candidates] == [22, 16, 8]
    assert tiers.statistics().keeping.kept == 3


def test_commits_do_not_wait_for_the_shelf(tiers: Tiers) -> None:
    tiers.shelf.keeps.close()
    tiers.put()
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    assert tiers.statistics().keeping.pinned_bytes > 0
    assert not tiers.store.match(MORE).best.is_durable  # type: ignore[union-attr]
    with pytest.raises(DeadlineError, match="still to be kept"):
        tiers.store.flush(0.05)
    tiers.shelf.keeps.open()
    tiers.store.flush(TEST_S)
    assert tiers.store.match(MORE).best.is_durable  # type: ignore[union-attr]
    assert tiers.statistics().keeping.pinned_bytes == 0


def test_what_is_pinned_for_keeping_is_bounded() -> None:
    tiers = open_tiers(dram=1 << 20)
    with closing(tiers.store):
        tiers.shelf.keeps.close()
        largest = 0
        for number in range(12):
            ids = range(100 * number, 100 * number + 12)
            tiers.put(ids)
            largest = max(largest, tiers.statistics().keeping.pinned_bytes)
        tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
        assert 0 < tiers.statistics().keeping.pinned_bytes <= (1 << 20) // 4
        assert largest <= (1 << 20) // 4
        assert tiers.statistics().keeping.waiting > 0
        tiers.shelf.keeps.open()
        tiers.store.flush(TEST_S)
        assert tiers.statistics().keeping.kept == 12


def test_what_is_evicted_before_its_turn_is_counted() -> None:
    tiers = open_tiers(dram=1 << 20)
    with closing(tiers.store):
        tiers.shelf.keeps.close()
        for number in range(12):
            tiers.put(range(100 * number, 100 * number + 12))
        last = tiers.store.prompt(range(1100, 1112)).path
        assert tiers.pool.evict_here(last.key(0)) > 0
        tiers.shelf.keeps.open()
        with pytest.raises(ShelfRefusedError, match="1 'evicted'"):
            tiers.store.flush(TEST_S)
        assert tiers.statistics().keeping.dropped == {"evicted": 1}
        tiers.store.flush(TEST_S)


def test_a_shelf_that_refuses_is_named(tiers: Tiers) -> None:
    tiers.shelf.refuses = "write budget"
    tiers.put()
    with pytest.raises(ShelfRefusedError, match="1 'write budget'") as refused:
        tiers.store.flush(TEST_S)
    assert refused.value.reason == "write budget"
    assert tiers.statistics().keeping.dropped == {"write budget": 1}
    assert tiers.statistics().shelves[0].refused == {"write budget": 1}
    with tiers.store.read(tiers.store.match(MORE)) as lease:  # not offered anew at each hit
        tiers.check(lease)
    tiers.settle()
    assert tiers.statistics().keeping.dropped == {"write budget": 1}


@dataclass(frozen=True)
class Asked(Deadline):
    """Says when somebody is about to wait by it; with the lock of who waits."""

    is_asked: threading.Event = field(default_factory=threading.Event)

    def remaining_s(self) -> float:
        self.is_asked.set()
        return super().remaining_s()


def flushing(tiers: Tiers) -> Background[None]:
    """A flush that waits by the time this returns."""
    deadline = Asked(Deadline.after(TEST_S).at_s)
    found = Background(lambda: tiers.pool._keeper.flush(deadline))
    assert deadline.is_asked.wait(TEST_S)
    return found


def commit(tiers: Tiers, ids: Sequence[int]) -> None:
    tiers.put(ids)


def test_what_was_lost_is_told_to_each_that_waited_for_it(tiers: Tiers) -> None:
    tiers.shelf.keeps.close()
    commit(tiers, IDS)
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    tiers.shelf.refuses = "write budget"
    commit(tiers, range(100, 110))
    flushes = [flushing(tiers) for _ in range(2)]
    tiers.shelf.keeps.open()
    for flush in flushes:
        with pytest.raises(ShelfRefusedError, match="1 'write budget'"):
            flush.result(TEST_S)
    tiers.store.flush(TEST_S)


@pytest.mark.parametrize("is_offered_before", [True, False])
def test_what_was_lost_is_told_to_who_committed_it_after_others_began_to_wait(
    tiers: Tiers, is_offered_before: bool
) -> None:
    ids = range(100, 110)
    tiers.shelf.keeps.close()
    commit(tiers, IDS)
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    tiers.shelf.refuses = "write budget"
    if is_offered_before:
        # Its turn does not come before the pool has room for what is pinned.
        tiers.pool._keeper._pinned_bytes_max = 1
        commit(tiers, ids)
    first = flushing(tiers)
    commit(tiers, ids)
    tiers.shelf.keeps.open()
    if is_offered_before:
        with pytest.raises(ShelfRefusedError, match="1 'write budget'"):
            first.result(TEST_S)
    else:
        first.result(TEST_S)
    with pytest.raises(ShelfRefusedError, match="1 'write budget'"):
        tiers.store.flush(TEST_S)
    tiers.store.flush(TEST_S)


def test_a_flush_that_has_no_time_leaves_what_was_lost_to_the_next(tiers: Tiers) -> None:
    tiers.shelf.keeps.close()
    commit(tiers, IDS)
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    tiers.shelf.refuses = "write budget"
    commit(tiers, range(100, 110))
    with pytest.raises(DeadlineError):
        tiers.store.flush(0.05)
    tiers.shelf.keeps.open()
    with pytest.raises(ShelfRefusedError, match="1 'write budget'"):
        tiers.store.flush(TEST_S)


def test_sparse_and_transient_are_not_kept(tiers: Tiers) -> None:
    mask = np.ones(len(IDS), np.bool_)
    mask[5] = False
    tiers.write(IDS, coverage=Coverage.of_masks({1: mask}))
    prompt = tiers.store.prompt(range(50, 60))
    with tiers.store.write(prompt) as writer:
        put_all(writer)
        names = [record.name for record in writer.transaction.records]
        writer.abort("only its names are wanted")
    transaction = tiers.pool.begin(prompt.path, names, salt=b"", is_transient=True, resume_nodes=[2])
    with open_store(tiers.store.spec, dram="1MiB") as source:
        with source.write(prompt) as writer:
            put_all(writer)
            writer.commit()
        with source.read(source.match((*range(50, 60), 1))) as lease, transaction.moving():
            there = {held.name: held for held in lease.records}
            for index, record in enumerate(transaction.records):
                record.memory[:] = there[record.name].memory
                transaction.seal(index)
    transaction.commit(handover=HandOver(1))
    tiers.store.flush(TEST_S)
    assert tiers.statistics().keeping.dropped == {"sparse": 1, "transient": 1}
    assert tiers.shelf.statistics().committed_bytes == 0


def test_the_share_of_one_worker_is_kept(tiers: Tiers) -> None:
    """Nobody stores the others' shares here."""
    shard = Shard(1, 2)
    with tiers.store.write(IDS, shard=shard) as writer:
        put_all(writer)
        writer.commit()
    tiers.store.flush(TEST_S)
    tiers.forget_here()
    with tiers.store.read(tiers.store.match(MORE, shard=shard)) as lease:
        tiers.check(lease)


def test_flush_without_anything_durable() -> None:
    with open_store(hybrid(B), dram="1MiB") as store, pytest.raises(UnavailableError, match="ssd="):
        store.flush()


# Ends


def test_there_again_after_reopening() -> None:
    medium = ShelfMedium()
    tiers = open_tiers(medium=medium)
    with closing(tiers.store), tiers.store.write(IDS, resume_at=[8, 22]) as writer:
        put_all(writer)
        writer.commit()
        tiers.store.flush(TEST_S)
    tiers = open_tiers(medium=medium)
    with closing(tiers.store):
        found = tiers.store.match(MORE)
        assert [(each.tokens, each.tier, each.is_durable) for each in found.candidates] == [
            (22, "shelf0", True),
            (8, "shelf0", True),
        ]
        with tiers.store.read(found) as lease:
            tiers.check(lease)
        tiers.pool.check()


def test_closing_keeps_what_was_committed() -> None:
    medium = ShelfMedium()
    tiers = open_tiers(medium=medium)
    with closing(tiers.store):
        tiers.shelf.keeps.close()
        for number in range(5):
            tiers.put(range(100 * number, 100 * number + 12))
        tiers.shelf.keeps.open()
    tiers = open_tiers(medium=medium)
    with closing(tiers.store):
        assert [tiers.store.match((*range(100 * n, 100 * n + 12), 9)).tokens for n in range(5)] == [12] * 5


def test_closing_does_not_wait_for_ever() -> None:
    tiers = open_tiers(close_deadline_s=0.2)
    tiers.shelf.keeps.close()
    tiers.put()
    tiers.shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
    Background(tiers.store.close).result(TEST_S)


def test_evicting_is_in_every_tier(tiers: Tiers) -> None:
    tiers.write()
    key = tiers.store.prompt(IDS).path.key(0)
    assert tiers.store.pool.evict(key) > 0
    assert not tiers.store.match(MORE)
    tiers.write()
    tiers.store.pool.condemn(key, is_state=False)
    assert not tiers.store.match(MORE)


# A device


def test_a_device_is_a_tier() -> None:
    pytest.importorskip("torch")
    with open_store(hybrid(B), dram="2MiB", gpu=GpuOptions("4MiB", device="cpu")) as store:
        pool = store.pool
        assert isinstance(pool, TieredPool)
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        pool._keeper.flush(Deadline.after(TEST_S))
        assert pool.evict_here(store.prompt(IDS).path.key(0)) > 0
        found = store.match(MORE)
        assert (found.tokens, found.tier) == (22, pool.shelves[0].name)
        assert not found.best.is_durable  # type: ignore[union-attr]
        with store.read(found) as lease:
            check_lease(lease, store.prompt(IDS))
        with pytest.raises(UnavailableError, match="ssd="):
            store.flush()
        pool.check()
