"""What has ended is found in no tier, also after a restart. The clock is the test's."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.clock import Deadline
from kvstore.errors import LeaseGoneError, ShelfRefusedError
from kvstore.placement.gpu.slab_shelf import GpuOptions
from kvstore.placement.ssd import open_ssd
from kvstore.placement.tiered import TieredPool
from kvstore.pool import StoreLimits
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store, open_store
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.specs import check_lease, dense, hybrid, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kvstore.placement.shelf import Shelf
    from kvstore.spec import ModelSpec

TEST_S = 30.0
B = 4
IDS = tuple(range(3 * B))
YEAR_2026_S = 1_770_000_000.0


@dataclass
class Tiers:
    """A store on memory and one durable shelf, opened as often as wanted, and its clocks."""

    spec: ModelSpec
    directory: Path | None
    now_s: float = 1000.0
    wall_s: float = YEAR_2026_S
    medium: ShelfMedium = field(default_factory=ShelfMedium)

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall_s += seconds

    def make_shelf(self) -> Shelf:
        if self.directory is None:
            return MemoryShelf(self.spec, capacity_bytes=4 << 20, name="shelf", medium=self.medium)
        ssd = f"{self.directory}:32MiB"
        return open_ssd(self.spec, ssd, clock=lambda: self.now_s, now=lambda: self.wall_s)

    @contextmanager
    def opened(self) -> Iterator[Store]:
        tier = ArenaTier(
            4 << 20, largest_slot_bytes=largest_slot_bytes(self.spec), slot_sizes_bytes=slot_sizes_bytes(self.spec)
        )
        with Store(TieredPool(self.spec, tier, [self.make_shelf()], clock=lambda: self.now_s)) as store:
            yield store
            check(store)


def pool_of(store: Store) -> TieredPool:
    assert isinstance(store.pool, TieredPool)
    return store.pool


def check(store: Store) -> None:
    store.pool.check()


@pytest.fixture(params=["memory", "ssd"])
def tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Tiers:
    return Tiers(hybrid(B), tmp_path if request.param == "ssd" else None)


@pytest.fixture(params=["memory", "ssd"])
def dense_tiers(request: pytest.FixtureRequest, tmp_path: Path) -> Tiers:
    return Tiers(dense(B), tmp_path if request.param == "ssd" else None)


def write(store: Store, ids: Sequence[int] = IDS, **options: Any) -> None:
    with store.write(ids, **options) as writer:
        put_all(writer)
        writer.commit()
    store.flush(TEST_S)


def found(store: Store, ids: Sequence[int] = IDS) -> int:
    return store.match([*ids, 99]).tokens


def tier_of(store: Store, ids: Sequence[int] = IDS) -> str:
    return store.match([*ids, 99]).tier


def leave_memory(store: Store, ids: Sequence[int] = IDS) -> None:
    """Only the shelf has it afterwards."""
    pool_of(store).evict_here(store.prompt(ids).path.key(0))


def test_what_lies_on_a_shelf_is_found_until_its_time_is_over(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store, ttl_s=60)
        leave_memory(store)
        tiers.advance(59.999)
        assert (found(store), tier_of(store)) == (len(IDS), pool_of(store).shelves[0].name)
        tiers.advance(0.001)
        assert found(store) == 0
        (shelf,) = store.statistics().shelves  # type: ignore[attr-defined]
        assert shelf.committed_bytes == 0
        assert shelf.expired_records == shelf.evicted_records > 0


def test_what_is_loaded_keeps_its_end(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store, ttl_s=60)
        leave_memory(store)
        with store.read(store.match([*IDS, 99])) as lease:
            check_lease(lease, store.prompt(IDS))
        assert tier_of(store) == pool_of(store).lookups()[0].name
        tiers.advance(60)
        assert found(store) == 0
        assert store.statistics().committed_bytes == 0


def test_ends_outlive_the_process(tiers: Tiers) -> None:
    long = (*IDS, *range(500, 500 + B))
    with tiers.opened() as store:
        write(store, ttl_s=60)
        write(store, long, ttl_s=100)
    tiers.now_s = 5.0  # another boot: the pool's clock begins anew
    tiers.wall_s += 59
    if tiers.directory is None:
        tiers.now_s = 1059.0  # a medium in memory keeps the moments as they are
    with tiers.opened() as store:
        assert (found(store), found(store, long)) == (len(IDS), len(long))
        tiers.advance(1)
        assert found(store) == 0
        assert found(store, long) == len(long)
    tiers.advance(40)
    with tiers.opened() as store:
        assert found(store, long) == 0
        (shelf,) = store.statistics().shelves  # type: ignore[attr-defined]
        assert shelf.committed_bytes == 0


def test_expire_reaches_what_only_a_shelf_has_and_outlives_the_process(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store)
        leave_memory(store)
        assert store.expire(IDS) == len(IDS)
        assert found(store) == 0
        write(store, IDS[:B])
    with tiers.opened() as store:
        assert found(store) == B


def test_another_end_outlives_the_process(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store)
        assert store.expire(IDS, 50, after_tokens=0) == len(IDS)
    with tiers.opened() as store:
        assert found(store) == len(IDS)
        assert store.expire(IDS, None, after_tokens=0) == len(IDS)
    with tiers.opened() as store:
        tiers.advance(1000)
        assert found(store) == len(IDS)
        assert store.expire(IDS, 10) == len(IDS)
    tiers.advance(10)
    with tiers.opened() as store:
        assert found(store) == 0


def test_writing_again_lets_a_shelf_keep_it_for_longer(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store, ttl_s=10)
        write(store, ttl_s=100)
        leave_memory(store)
        tiers.advance(50)
        assert found(store) == len(IDS)
    with tiers.opened() as store:
        assert found(store) == len(IDS)
        write(store, ttl_s=20)  # shorter than what is known
    tiers.advance(49.9)
    with tiers.opened() as store:
        assert found(store) == len(IDS)
        tiers.advance(0.1)
        assert found(store) == 0


def test_a_shared_prefix_lives_as_long_as_anybody_wants_it(dense_tiers: Tiers) -> None:
    tiers = dense_tiers
    long = (*IDS, *range(500, 500 + 2 * B))
    with tiers.opened() as store:
        write(store, ttl_s=100)
        write(store, long, ttl_s=10)
        leave_memory(store)
        tiers.advance(10)
        assert found(store, long) == len(IDS)
    tiers.advance(80)
    with tiers.opened() as store:
        assert found(store, long) == len(IDS)
        tiers.advance(10)
        assert found(store, long) == 0


def test_expire_means_the_deepest_prefix_that_any_tier_has(dense_tiers: Tiers) -> None:
    """Memory has lost the conversation and still has the system prompt: that is not what is meant."""
    tiers = dense_tiers
    talk = (*IDS, *range(500, 500 + 2 * B))
    with tiers.opened() as store:
        write(store)
        write(store, talk)
        path = store.prompt(talk).path
        assert pool_of(store).evict_here(path.key(3)) > 0
        assert store.expire(talk) == len(talk)
        assert found(store, talk) == len(IDS)
        assert store.match([*talk, 99]).candidates[0].tier == pool_of(store).lookups()[0].name
        leave_memory(store)
        assert found(store, talk) == len(IDS)
        assert store.expire(talk, after_tokens=0) == len(IDS)
        assert found(store, talk) == 0


def test_what_memory_has_of_an_evicted_conversation_ends_with_it(dense_tiers: Tiers) -> None:
    tiers = dense_tiers
    with tiers.opened() as store:
        write(store)
        assert pool_of(store).evict_here(store.prompt(IDS).path.key(2)) > 0
        assert store.expire(IDS) == len(IDS)
        assert found(store) == 0


def test_a_hold_on_a_shelf_outlives_the_end_and_nobody_else_finds_it(tiers: Tiers) -> None:
    with tiers.opened() as store:
        write(store, ttl_s=60)
        leave_memory(store)
        best = store.match([*IDS, 99]).best
        assert best is not None
        held = pool_of(store).shelves[0].hold(best.path, shard=store.match([*IDS, 99]).shard)
        assert held is not None
        tiers.advance(60)
        assert found(store) == 0
        with pytest.raises(LeaseGoneError):
            store.pool.hold(best.path)
        held.release()
        check(store)
        write(store)
        assert found(store) == len(IDS)


def test_an_end_that_changes_while_it_is_kept_counts_on_the_shelf(tiers: Tiers) -> None:
    if tiers.directory is not None:
        pytest.skip("the gate is of the shelf in memory")
    with tiers.opened() as store:
        shelf = pool_of(store).shelves[0]
        assert isinstance(shelf, MemoryShelf)
        shelf.keeps.close()
        with store.write(IDS, ttl_s=100) as writer:
            put_all(writer)
            writer.commit()
        shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
        assert store.expire(IDS, 10) == len(IDS)
        shelf.keeps.open()
        store.flush(TEST_S)
        leave_memory(store)
        assert found(store) == len(IDS)
        tiers.advance(10)
        assert found(store) == 0


def test_what_ends_while_it_is_kept_does_not_come_to_the_shelf(tiers: Tiers) -> None:
    if tiers.directory is not None:
        pytest.skip("the gate is of the shelf in memory")
    with tiers.opened() as store:
        shelf = pool_of(store).shelves[0]
        assert isinstance(shelf, MemoryShelf)
        shelf.keeps.close()
        with store.write(IDS, ttl_s=10) as writer:
            put_all(writer)
            writer.commit()
        shelf.keeps.wait_for_somebody(Deadline.after(TEST_S))
        tiers.advance(10)
        assert found(store) == 0
        shelf.keeps.open()
        store.flush(TEST_S)
        assert found(store) == 0
        assert store.statistics().committed_bytes == 0


def test_what_is_expired_while_it_is_loaded_does_not_come_back(tiers: Tiers) -> None:
    if tiers.directory is not None:
        pytest.skip("the gate is of the shelf in memory")
    with tiers.opened() as store:
        write(store)
        leave_memory(store)
        shelf = pool_of(store).shelves[0]
        assert isinstance(shelf, MemoryShelf)
        shelf.loads.close(after=1)
        match = store.match([*IDS, 99])
        with store.read(match, layered=True) as lease:
            shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
            assert store.expire(IDS, after_tokens=0) == len(IDS)
            assert found(store) == 0
            shelf.loads.open()
            del lease
        assert found(store) == 0


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0])
def test_steps_of_the_system_clock_while_a_store_runs_change_nothing(tmp_path: Path, step_s: float) -> None:
    tiers = Tiers(hybrid(B), tmp_path)
    with tiers.opened() as store:
        write(store, ttl_s=60)
        tiers.wall_s += step_s
        tiers.advance(59)
        assert found(store) == len(IDS)
        tiers.advance(1)
        assert found(store) == 0


def test_a_system_clock_that_was_set_back_does_not_prolong_a_life_by_more_than_the_time_in_between(
    tmp_path: Path,
) -> None:
    tiers = Tiers(hybrid(B), tmp_path)
    with tiers.opened() as store:
        write(store, ttl_s=60)
        tiers.advance(30)
        write(store, range(700, 700 + B))  # the journal tells how late it is
    tiers.wall_s -= 7200
    with tiers.opened() as store:
        assert found(store) == len(IDS)
        tiers.advance(30)
        assert found(store) == 0


def test_a_system_clock_that_was_set_forward_ends_lives_early(tmp_path: Path) -> None:
    tiers = Tiers(hybrid(B), tmp_path)
    with tiers.opened() as store:
        write(store, ttl_s=60)
        write(store, range(700, 700 + B))
    tiers.wall_s += 7200
    with tiers.opened() as store:
        assert found(store) == 0
        assert found(store, range(700, 700 + B)) == B


# Quotas


@pytest.mark.parametrize("kind", ["ssd", "gpu"])
def test_a_salt_keeps_to_its_quota_in_each_tier(tmp_path: Path, kind: str) -> None:
    if kind == "gpu":
        pytest.importorskip("torch")
    spec = dense(16)
    quota_bytes = 10 * 8192 + 10_000
    limits = StoreLimits(shelf_quota=quota_bytes, shelf_quotas={b"free": None})
    where: dict[str, Any] = {"ssd": f"{tmp_path}:64MiB"} if kind == "ssd" else {"gpu": GpuOptions("4MiB", device="cpu")}
    with open_store(spec, dram="4MiB", limits=limits, **where) as store:

        def stored(salt: bytes) -> list[int]:
            return [
                number
                for number in range(6)
                if pool.shelves[0].stored_tokens(store.prompt([number] * 64, salt=salt).path) == 64
            ]

        pool = pool_of(store)
        for number in range(6):
            for salt in (b"a", b"free"):
                with store.write([number] * 64, salt=salt) as writer:
                    put_all(writer)
                    writer.commit()
                pool._keeper.flush(Deadline.after(TEST_S))
        assert stored(b"free") == list(range(6))
        assert stored(b"a") == [4, 5]
        with store.write(range(1000, 1000 + 11 * 16), salt=b"a") as writer:
            put_all(writer)
            writer.commit()
        with pytest.raises(ShelfRefusedError) if kind == "ssd" else nullcontext():
            pool._keeper.flush(Deadline.after(TEST_S))
        assert pool.statistics().shelves[0].refused == {"quota": 1}
        assert stored(b"a") == [4, 5]
        store.pool.check()


def test_checkpoints_of_one_prompt_count_once_in_a_quota(tmp_path: Path) -> None:
    limits = StoreLimits(shelf_quota="128KiB")
    with open_store(hybrid(B), dram="4MiB", ssd=f"{tmp_path}:64MiB", limits=limits) as store:
        with store.write(IDS, resume_at=(B, 2 * B, 3 * B)) as writer:
            put_all(writer)
            writer.commit()
        store.flush(TEST_S)
        pool = pool_of(store)
        used_bytes = pool.statistics().shelves[0].committed_bytes
        assert used_bytes > 128 * 1024 // 3
        assert pool.statistics().shelves[0].refused == {}


def test_what_is_written_without_a_time_to_live_gets_the_stores() -> None:
    clock = [0.0]
    with open_store(hybrid(B), dram="4MiB", limits=StoreLimits(ttl_s=60), clock=lambda: clock[0]) as store:
        for ids, ttl_s in ((IDS, None), (IDS[:B], 90)):
            with store.write(ids, ttl_s=ttl_s) as writer:
                put_all(writer)
                writer.commit()
        clock[0] = 59.9
        assert found(store) == len(IDS)
        clock[0] = 60.0
        assert found(store) == B
        clock[0] = 90.0
        assert found(store) == 0
