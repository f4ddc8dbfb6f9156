"""The SSD tier while parts of a batch fail: what is durable is there, and memory is not given back too early."""

from __future__ import annotations

import errno
import gc
import weakref
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.errors import DeadlineError, ShelfRefusedError
from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.placement.ssd import room as room_module
from kvstore.placement.ssd.keeping import Keeping
from kvstore.placement.ssd.places import DRIVE_MASK, segment_index
from kvstore.placement.ssd.room import Room
from kvstore.placement.ssd.rows import unpack
from kvstore.pool.rows import SLOT, SLOT_BYTES
from kvstore.spec import WHOLE
from kvstore.store import open_store
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.shelf import Landing
from kvstore.testing.specs import hybrid
from tests.shelf_cases import keep, loads, write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvstore.placement.ssd import SsdShelf
    from kvstore.store import Store

SPEC = hybrid(4)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[Store]:
    with open_store(SPEC, dram="8MiB") as store:
        yield store


def opened(disks: Sequence[ForgetfulDisk], capacity_bytes: int, **options: object) -> SsdShelf:
    by_name = {f"disk {number}": disk for number, disk in enumerate(disks)}
    places = tuple(SsdPlace(name, capacity_bytes) for name in by_name)
    chosen = SsdOptions(places, **options)  # type: ignore[arg-type]
    return open_ssd(SPEC, chosen, make_files=lambda place, _: by_name[place.path].files())


@pytest.mark.parametrize("power", ["on", "cut"])
def test_a_share_that_is_written_stays_while_the_other_drive_fails(source: Store, power: str) -> None:
    """Room for the share of the drive that failed is not made of what its sister has just taken."""
    disks = [ForgetfulDisk(seed=number) for number in range(2)]
    with closing(opened(disks, 1 * MIB)) as shelf:
        before = write(source, range(10_000, 10_000 + 4 * 60))
        keep(shelf, before)
        before.release()
        original = write(source, range(4 * 70))
        disks[1].faults.append(Fault("write", errno.ENOSPC, times=None))
        keep(shelf, original)
        shelf.check()
        if power == "on":
            assert loads(shelf, original), "what was reported durable is not there"
        else:
            for disk in disks:
                disk.cut_power()
    if power == "cut":
        disks[1].faults.clear()
        with closing(opened(disks, 1 * MIB)) as shelf:
            assert loads(shelf, original), "what was reported durable did not outlive a crash"


def test_memory_of_cleaning_stays_while_a_drive_reads_into_it(source: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drive that hangs may answer after the deadline: it must find the memory that it was given."""
    disks = [ForgetfulDisk(seed=0)]
    given: list[weakref.ref[npt.NDArray[np.uint8]]] = []
    make = room_module._memory

    def memory(sizes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
        made, addresses = make(sizes)
        given.append(weakref.ref(made))
        return made, addresses

    monkeypatch.setattr(room_module, "_memory", memory)
    with closing(opened(disks, 8 * MIB)) as shelf:
        original = write(source, range(40))
        keep(shelf, original)
        stock = shelf._stock
        room = Room(stock, 0.05)
        drive = stock.drives[0]
        survey = stock.index.native.survey(DRIVE_MASK, segment_index(0, 0))
        nodes, records = unpack(*survey)
        slots = survey[1][0][:, SLOT : SLOT_BYTES + 1]
        disks[0].hold(is_begun=True)
        for _ in range(2):
            with pytest.raises(DeadlineError):
                room._move(drive, nodes, records, slots, np.arange(4))
        gc.collect()
        assert all(reference() is not None for reference in given), "memory was freed that a drive still writes to"
        assert not room._clean(drive), "a drive that hangs is asked for more and more"
        disks[0].release()
        room.settle()
        gc.collect()
        assert all(reference() is None for reference in given)
        assert loads(shelf, original)


def test_a_fault_in_the_end_of_a_batch_does_not_end_the_writer(source: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(opened([ForgetfulDisk(seed=0)], 8 * MIB)) as shelf:
        first, second, third = (write(source, range(number, number + 20)) for number in (0, 100, 200))
        plan, calls = Keeping.plan, []

        def failing(self: Keeping, native: object) -> object:
            calls.append(self)
            if sum(each is self for each in calls) == 3:  # when it came, when it began, and now
                raise ShelfRefusedError("path", "as if its path had been found wrong")
            return plan(self, native)  # type: ignore[arg-type]

        with monkeypatch.context() as patched:
            patched.setattr(Keeping, "plan", failing)
            with pytest.raises(ShelfRefusedError, match="wrong"):
                shelf.keep(first.path, first.salt, first.placed).result(5.0)
        assert shelf.keep(second.path, second.salt, second.placed).result(5.0) > 0
        keep(shelf, third)
        assert loads(shelf, second)
        shelf.check()


def test_memory_is_not_given_back_while_one_of_several_drives_was_asked(
    source: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that cannot begin on the second drive leaves no reads under way on the first."""
    disks = [ForgetfulDisk(seed=number) for number in range(2)]
    with closing(opened(disks, 8 * MIB)) as shelf:
        original = write(source, range(80))
        keep(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)

        def fault(*_: object) -> None:
            raise MemoryError("no memory for another batch")

        disks[0].hold()
        with monkeypatch.context() as patched:
            patched.setattr(shelf._stock.drives[1].directory, "read", fault)
            with pytest.raises(MemoryError):
                hold.load(numbers, landing.addresses)
        disks[0].release()
        assert all(landing.is_untouched(position) for position in numbers.tolist())
        hold.release()
