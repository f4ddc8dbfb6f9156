"""Until when something is wanted is as safe as the bytes are: what is said to last is there after a power cut."""

from __future__ import annotations

import errno
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from kvstore.clock import Deadline
from kvstore.errors import ShelfRefusedError, StoreClosedError
from kvstore.placement.ends import Ends
from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.placement.tiered import TieredPool
from kvstore.pool.index import LASTING_US
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store, open_store
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.testing.specs import dense, put_all
from kvstore.tiers import ArenaTier
from tests.shelf_cases import TEST_S, keep, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvstore.placement.ssd import SsdShelf
    from kvstore.pool import Hold

SPEC = dense(4)
MIB = 1 << 20
IDS = tuple(range(12))
SOON_S = 60.0


class Machine:
    """Some disks, and the clocks of a machine that is switched off and on."""

    def __init__(self, disks: int) -> None:
        self.disks = [ForgetfulDisk(seed=number, directory=f"disk {number}") for number in range(disks)]
        self.now_s = 1000.0
        self.wall_s = 1_770_000_000.0

    def open(self) -> SsdShelf:
        places = tuple(SsdPlace(disk.directory, 8 * MIB) for disk in self.disks)
        files = {disk.directory: disk.files for disk in self.disks}
        return open_ssd(
            SPEC,
            SsdOptions(places),
            make_files=lambda place, _: files[place.path](),
            clock=lambda: self.now_s,
            now=lambda: self.wall_s,
        )

    @contextmanager
    def store(self) -> Iterator[Store]:
        tier = ArenaTier(MIB, largest_slot_bytes=largest_slot_bytes(SPEC), slot_sizes_bytes=slot_sizes_bytes(SPEC))
        with Store(TieredPool(SPEC, tier, [self.open()], clock=lambda: self.now_s, close_deadline_s=1.0)) as store:
            yield store

    def cut_power(self) -> None:
        for disk in self.disks:
            disk.cut_power()
            disk.faults.clear()

    def pass_time(self) -> None:
        self.now_s += 2 * SOON_S
        self.wall_s += 2 * SOON_S

    @property
    def soon_us(self) -> int:
        return int((self.now_s + SOON_S) * 1e6)


@pytest.fixture
def source() -> Iterator[Store]:
    with open_store(SPEC, dram="4MiB") as store:
        yield store


def full() -> Fault:
    return Fault("write", errno.ENOSPC, times=None)


def put(store: Store, ids: Iterable[int], *, ttl_s: float | None = None) -> None:
    with store.write(ids, ttl_s=ttl_s) as writer:
        put_all(writer)
        writer.commit()


def keep_until(shelf: SsdShelf, hold: Hold, ends_us: int) -> None:
    ends = Ends.lasting(hold.path)
    ends.table[ends.table == LASTING_US] = ends_us
    shelf.keep(hold.path, hold.salt, hold.placed, ends).result(TEST_S)


def is_there(shelf: SsdShelf, hold: Hold) -> bool:
    return shelf.stored_tokens(hold.path) == hold.path.tokens


def is_there_again(machine: Machine, hold: Hold) -> bool:
    with closing(machine.open()) as shelf:
        return is_there(shelf, hold)


def test_a_disk_that_takes_no_ends_has_not_kept_it_for_longer(source: Store) -> None:
    machine, hold = Machine(1), write(source, IDS)
    with closing(machine.open()) as shelf:
        keep_until(shelf, hold, machine.soon_us)
        machine.disks[0].faults.append(full())
        for _ in range(2):
            with pytest.raises(ShelfRefusedError):
                keep(shelf, hold)
        machine.disks[0].faults.clear()
        keep(shelf, hold)
        machine.cut_power()
    machine.pass_time()
    assert is_there_again(machine, hold)


def test_every_disk_hears_of_ends_also_one_that_gets_no_record(source: Store) -> None:
    machine, hold = Machine(2), write(source, IDS)
    longer = write(source, range(16))
    with closing(machine.open()) as shelf:
        keep_until(shelf, hold, machine.soon_us)
        assert all(drive.live_records for drive in shelf._stock.drives)
        # One more record goes to the first disk.
        machine.disks[1].faults.append(full())
        with pytest.raises(ShelfRefusedError):
            keep(shelf, longer)
        assert is_there(shelf, longer)
        machine.disks[1].faults.clear()
        keep(shelf, longer)
        machine.cut_power()
    machine.pass_time()
    assert is_there_again(machine, longer)


def test_a_disk_that_had_it_forgets_until_when_it_was_wanted(source: Store) -> None:
    machine, first, hold = Machine(2), write(source, range(4)), write(source, range(8))
    with closing(machine.open()) as shelf:
        keep(shelf, first)
        machine.disks[0].faults.append(full())
        keep_until(shelf, hold, machine.soon_us)
        machine.disks[0].faults.clear()
        machine.disks[1].faults.append(full())
        assert shelf.evict(hold.path.key(1)) > 0
        # To the first disk; the second one has another copy that ends soon.
        with pytest.raises(ShelfRefusedError):
            keep(shelf, hold)
        machine.disks[1].faults.clear()
        keep(shelf, hold)
        machine.cut_power()
    machine.pass_time()
    assert is_there_again(machine, hold)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_flush_waits_for_ends_that_were_set(number: int) -> None:
    machine = Machine(1)
    with machine.store() as store:
        put(store, IDS, ttl_s=SOON_S)
        store.flush(TEST_S)
        machine.disks[0].faults.append(Fault("write", number, times=None))
        assert store.expire(IDS, None, after_tokens=0) == len(IDS)
        with pytest.raises(ShelfRefusedError):
            store.flush(TEST_S)
        machine.disks[0].faults.clear()
        if number == errno.EROFS:
            with pytest.raises(ShelfRefusedError, match="written"):
                store.flush(TEST_S)
            return
        store.flush(TEST_S)
        machine.cut_power()
    machine.pass_time()
    with machine.store() as store:
        assert store.match((*IDS, 99)).tokens == len(IDS)


def test_what_was_expired_is_gone_once_it_is_flushed() -> None:
    machine = Machine(1)
    with machine.store() as store:
        put(store, IDS)
        store.flush(TEST_S)
        machine.disks[0].faults.append(full())
        assert store.expire(IDS) == len(IDS)
        with pytest.raises(ShelfRefusedError):
            store.flush(TEST_S)
        machine.disks[0].faults.clear()
        store.flush(TEST_S)
        machine.cut_power()
    with machine.store() as store:
        assert store.match((*IDS, 99)).tokens == 0


def test_what_is_committed_anew_lasts_once_it_is_flushed() -> None:
    machine = Machine(1)
    with machine.store() as store:
        for ttl_s in (SOON_S, None):
            put(store, IDS, ttl_s=ttl_s)
            store.flush(TEST_S)
        machine.cut_power()
    machine.pass_time()
    with machine.store() as store:
        assert store.match((*IDS, 99)).tokens == len(IDS)


def read_only() -> Fault:
    return Fault("write", errno.EROFS, times=None)


def test_what_a_disk_says_that_is_written_no_more_is_not_promised_otherwise(source: Store) -> None:
    machine, hold = Machine(2), write(source, IDS)
    other = write(source, range(100, 112))
    with closing(machine.open()) as shelf:
        keep_until(shelf, hold, machine.soon_us)
        machine.disks[1].faults.append(read_only())
        for _ in range(2):
            with pytest.raises(ShelfRefusedError):
                keep(shelf, hold)
        with pytest.raises(ShelfRefusedError, match="cannot be overruled") as refused:
            shelf.write_ends(Deadline.after(TEST_S))
        assert refused.value.reason == "read only"
        keep(shelf, other)
        machine.cut_power()
    machine.pass_time()
    with closing(machine.open()) as shelf:
        assert not is_there(shelf, hold)
        assert is_there(shelf, other)


def test_too_many_ends_to_name_are_all_unsafe(source: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.placement.ssd.stock.SSD_UNSAFE_ENDS_MAX", 2)
    machine, hold = Machine(1), write(source, IDS)
    with closing(machine.open()) as shelf:
        keep_until(shelf, hold, machine.soon_us)
        machine.disks[0].faults.append(full())
        with pytest.raises(ShelfRefusedError):
            keep(shelf, hold)
        with pytest.raises(ShelfRefusedError):
            shelf.write_ends(Deadline.after(TEST_S))
        machine.disks[0].faults.clear()
        shelf.write_ends(Deadline.after(TEST_S))
        keep(shelf, hold)
        machine.cut_power()
    machine.pass_time()
    assert is_there_again(machine, hold)


def test_a_disk_in_trouble_has_written_no_ends() -> None:
    """A segment could not be sealed behind a batch that was written: what is told of ends goes nowhere."""
    machine = Machine(1)
    with machine.store() as store:
        put(store, IDS, ttl_s=SOON_S)
        store.flush(TEST_S)
        (shelf,) = store.pool.shelves  # type: ignore[attr-defined]
        directory = shelf._stock.drives[0].directory
        machine.disks[0].faults.append(read_only())
        directory._to_seal.extend(directory._segments.values())
        directory._seal_retired()
        assert directory.trouble
        assert store.expire(IDS, None, after_tokens=0) == len(IDS)
        for _ in range(2):
            with pytest.raises(ShelfRefusedError):
                store.flush(TEST_S)
        put(store, IDS)
        with pytest.raises(ShelfRefusedError):
            store.flush(TEST_S)


def test_a_flush_that_tells_what_was_refused_has_written_the_ends() -> None:
    machine = Machine(1)
    with machine.store() as store:
        put(store, IDS, ttl_s=SOON_S)
        store.flush(TEST_S)
        machine.disks[0].faults.append(full())
        assert store.expire(IDS, None, after_tokens=0) == len(IDS)
        put(store, range(100, 112))
        deadline = Deadline.after(TEST_S)
        while not store.statistics().keeping.dropped:  # type: ignore[attr-defined]
            assert not deadline.has_passed
            time.sleep(1e-3)
        machine.disks[0].faults.clear()
        with pytest.raises(ShelfRefusedError, match="1 'full'"):
            store.flush(TEST_S)
        machine.cut_power()
    machine.pass_time()
    with machine.store() as store:
        assert store.match((*IDS, 99)).tokens == len(IDS)


def test_a_shelf_that_closes_does_not_say_that_ends_are_written(source: Store) -> None:
    machine, hold = Machine(1), write(source, IDS)
    shelf = machine.open()
    with closing(shelf):
        keep_until(shelf, hold, machine.soon_us)
        machine.disks[0].faults.append(full())
        with pytest.raises(ShelfRefusedError):
            keep(shelf, hold)
    with pytest.raises(StoreClosedError):
        shelf.write_ends(Deadline.after(TEST_S))
