"""Attached processes on a pool with a shelf: the owner loads for them, within their deadline, and goes on meanwhile."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.attached import Owner
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, LoadFailedError, PoolError, UnavailableError
from kvstore.placement.tiered import TieredPool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.resources import Background
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEST_S = 30.0
SPEC = hybrid(4)
IDS = tuple(range(22))
MORE = (*IDS, 99)


class Host:
    """An owner with a shelf, and a process that is attached to it (here in the same process)."""

    def __init__(self, path: str, silence_s: float) -> None:
        arena = ArenaTier(4 << 20, largest_slot_bytes=largest_slot_bytes(SPEC), slot_sizes_bytes=slot_sizes_bytes(SPEC))
        self.shelf = MemoryShelf(SPEC, capacity_bytes=8 << 20, medium=ShelfMedium())
        self.pool = TieredPool(SPEC, arena, [self.shelf], close_deadline_s=TEST_S)
        self.owner = Store(self.pool, Owner(self.pool, arena, path, silence_s=silence_s))
        self.worker = kvstore.attach(path, deadline_s=TEST_S)

    def write(self) -> None:
        """A prompt that lies on the shelf only."""
        with self.worker.write(IDS, resume_at=[8, 22]) as writer:
            put_all(writer)
            writer.commit()
        self.worker.flush(TEST_S)
        self.forget_here()

    def forget_here(self) -> None:
        """Nothing of the prompt is in memory any more; a worker's release arrives a moment later."""
        until = Deadline.after(TEST_S)
        while not self.pool.evict_here(self.owner.prompt(IDS).path.key(0)):
            assert not until.has_passed, "somebody still holds it"

    def close(self) -> None:
        self.shelf.loads.open()
        self.worker.close()
        if not self.pool.is_closed:
            self.pool.check()
        self.owner.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with closing(Host(str(tmp_path / "socket"), TEST_S)) as opened:
        yield opened


def test_a_worker_finds_and_reads_what_the_shelf_has(host: Host) -> None:
    host.write()
    found = host.worker.match(MORE)
    assert [(each.tokens, each.tier, each.is_durable) for each in found.candidates] == [
        (22, "memory", True),
        (8, "memory", True),
    ]
    with host.worker.read(found, deadline_s=TEST_S) as lease:
        check_lease(lease, host.worker.prompt(IDS))
    found = host.worker.match(MORE)
    assert [(each.tier, each.is_durable) for each in found.candidates] == [("dram", True), ("memory", True)]
    with host.worker.read(found, layered=True, deadline_s=TEST_S) as lease:
        check_lease(lease, host.worker.prompt(IDS))
    assert host.pool.statistics().loading.loads == 1
    host.forget_here()
    assert host.worker.match(MORE).load_seconds_per_byte == host.owner.match(MORE).load_seconds_per_byte


def test_other_requests_go_on_while_one_loads(tmp_path: Path) -> None:
    """The owner answers signs of life and matches meanwhile; the process is not taken for silent, nor the owner."""
    with closing(Host(str(tmp_path / "socket"), 2.0)) as host:
        host.write()
        with host.worker.write(range(100, 108)) as writer:  # what a silent process would lose
            host.shelf.loads.close(after=1)
            reading = Background(lambda: host.worker.read(host.worker.match(MORE), deadline_s=TEST_S))
            host.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
            beats = Deadline.after(3.0)  # longer than the silence that the owner bears
            while not beats.has_passed:
                assert host.worker.match(MORE).tokens == 22
            assert reading.is_running
            host.shelf.loads.open()
            with reading.result(TEST_S) as lease:
                check_lease(lease, host.worker.prompt(IDS))
            put_all(writer)
            writer.commit()
        assert host.worker.match((*range(100, 108), 1)).tokens == 8


def test_a_read_that_is_late_goes_on_at_the_owner(host: Host) -> None:
    host.write()
    host.shelf.loads.close(after=1)
    with pytest.raises(DeadlineError):
        host.worker.read(host.worker.match(MORE), deadline_s=0.05)
    host.shelf.loads.open()
    with host.worker.read(host.worker.match(MORE), deadline_s=TEST_S) as lease:
        check_lease(lease, host.worker.prompt(IDS))
    assert host.pool.statistics().loading.loads == 1


def test_damage_is_the_next_best_candidate_there_too(host: Host) -> None:
    host.write()
    host.shelf.damage(host.owner.prompt(IDS).path.key(5), is_state=True)
    found = host.worker.match(MORE)
    with host.worker.read(found, deadline_s=TEST_S) as lease:
        assert lease.tokens == 8
        check_lease(lease, host.worker.prompt(IDS[:8]))
    host.forget_here()
    host.shelf.damage(host.owner.prompt(IDS).path.key(0), is_state=False)
    with pytest.raises(LoadFailedError):
        host.worker.read(host.worker.match(MORE), deadline_s=TEST_S)


def test_a_worker_that_goes_leaves_nothing(host: Host) -> None:
    """It went while the owner was loading for it: nobody holds what comes."""
    host.write()
    host.shelf.loads.close(after=1)
    reading = Background(lambda: host.worker.read(host.worker.match(MORE), deadline_s=TEST_S))
    host.shelf.loads.wait_for_somebody(Deadline.after(TEST_S))
    host.worker.close()
    with pytest.raises(kvstore.KVStoreError):
        reading.result(TEST_S)
    host.shelf.loads.open()
    with host.owner.read(host.owner.match(MORE), deadline_s=TEST_S) as lease:
        check_lease(lease, host.owner.prompt(IDS))
    host.forget_here()
    assert host.owner.match(MORE).tier == "memory"
    assert host.pool.statistics().reserved_bytes == 0


def test_a_flush_says_what_was_not_kept(host: Host) -> None:
    host.shelf.refuses = "full"
    with host.worker.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    with pytest.raises(PoolError, match="1 'full'"):
        host.worker.flush(TEST_S)


def test_a_flush_without_anything_durable(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with (
        kvstore.open(SPEC, dram="1MiB", socket=path),
        kvstore.attach(path, deadline_s=TEST_S) as worker,
        pytest.raises(UnavailableError, match="ssd="),
    ):
        worker.flush(TEST_S)
