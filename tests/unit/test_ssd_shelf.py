"""What the SSD tier does when there is no room, when disks fail, and when it ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import ShelfRefusedError, SsdDirectoryError, StoreClosedError
from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.placement.ssd.writer import Writer
from kvstore.pool import Hold
from kvstore.spec import WHOLE, ChunkGrid
from kvstore.store import open_store
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.shelf import Landing, query_of
from kvstore.testing.specs import hybrid, pure_state, put_all
from tests.shelf_cases import TEST_S, keep, loads, write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from kvstore.placement.ssd import SsdShelf
    from kvstore.spec import ModelSpec
    from kvstore.store import Store

SPEC = hybrid(4)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[Store]:
    with open_store(SPEC, dram="4MiB") as store:
        yield store


def refusal(shelf: SsdShelf, holds: Iterable[Hold]) -> ShelfRefusedError | None:
    """Keep one after the other until one is refused: how."""
    for hold in holds:
        try:
            keep(shelf, hold)
        except ShelfRefusedError as error:
            return error
    return None


def tokens_found(shelf: SsdShelf, source: Store, ids: Sequence[int]) -> int:
    return shelf.find(query_of(source.spec, source.prompt((*ids, 0)))).tokens


class Disks:
    """Some disks, and the tier over them."""

    def __init__(self, count: int = 1, capacity_bytes: int = 32 * MIB, **disk: int) -> None:
        self.disks = {f"disk {number}": ForgetfulDisk(seed=number, **disk) for number in range(count)}
        self.capacity_bytes = capacity_bytes

    def __getitem__(self, number: int) -> ForgetfulDisk:
        return self.disks[f"disk {number}"]

    def open(self, spec: ModelSpec = SPEC, **options: object) -> SsdShelf:
        places = tuple(SsdPlace(name, self.capacity_bytes // len(self.disks)) for name in self.disks)
        chosen = SsdOptions(places, **options)  # type: ignore[arg-type]
        return open_ssd(spec, chosen, make_files=lambda place, _: self.disks[place.path].files())


# Room


def test_reclaim_writes_less_than_twice_what_is_kept(source: Store) -> None:
    """Some prompts are used again and again while others pass through, so segments die in part."""
    with closing(Disks(capacity_bytes=2 * MIB).open()) as shelf:
        favourites = [write(source, range(number, number + 24)) for number in (100_000, 200_000, 300_000)]
        passing = 0
        while shelf.statistics().kept_bytes < 16 * MIB:
            for hold in favourites:
                keep(shelf, hold)
            passing += 1
            hold = write(source, range(1000 * passing, 1000 * passing + 32))
            keep(shelf, hold)
            hold.release()
            found = shelf.statistics()
            assert found.used_bytes <= found.capacity_bytes
        assert found.evicted_records > 0
        # Framing and the journal are as large as these tiny records: what is left of them is the records' own part.
        assert found.written_bytes < 2 * found.kept_bytes + 64 * passing * 1024
        assert found.committed_bytes > found.capacity_bytes // 4
        for hold in favourites:
            assert loads(shelf, hold), "what was used all the time was dropped"
        shelf.check()


@pytest.mark.parametrize("count", [1, 2])
def test_what_came_last_goes_last_also_after_a_restart(source: Store, count: int) -> None:
    """Looking does not count as a use, and what is dropped is dropped in the order in which it came."""
    disks = Disks(count, capacity_bytes=2 * MIB * count)
    holds = [write(source, range(1000 * number, 1000 * number + 4 * number)) for number in (9, 3, 7, 1, 8, 2)]
    with closing(disks.open()) as shelf:
        for hold in holds:
            keep(shelf, hold)
    with closing(disks.open()) as shelf:
        ids = [range(1000 * number, 1000 * number + 4 * number) for number in (9, 3, 7, 1, 8, 2)]
        are_there = [True] * len(holds)
        number = 100
        while any(are_there):
            passing = write(source, range(1000 * number, 1000 * number + 20))
            keep(shelf, passing)
            passing.release()
            number += 1
            are_there = [tokens_found(shelf, source, each) == len(each) for each in ids]
            assert are_there == sorted(are_there), "something newer was dropped first"
            assert number < 400


def test_a_hold_keeps_its_segments(source: Store) -> None:
    with closing(Disks(capacity_bytes=2 * MIB).open()) as shelf:
        original = write(source, range(24))
        keep(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        shelf.condemn(original.path.key(0), is_state=False)
        for number in range(1, 60):
            passing = write(source, range(1000 * number, 1000 * number + 24))
            keep(shelf, passing)
            passing.release()
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        assert list(hold.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))) == []
        for number, there in enumerate(original.placed.memories):
            size_bytes = hold.rows.layouts()[number].record_bytes
            assert landing.record(number)[:size_bytes] == there[:size_bytes]
        hold.release()
        shelf.check()


def test_everything_held_is_full(source: Store) -> None:
    with closing(Disks(capacity_bytes=MIB).open()) as shelf:
        holds = []
        refused = None
        for number in range(1, 100):
            original = write(source, range(1000 * number, 1000 * number + 24))
            refused = refusal(shelf, [original])
            if refused is not None:
                break
            hold = shelf.hold(original.path, shard=WHOLE)
            assert hold is not None
            holds.append((original, hold))
        assert refused is not None
        assert refused.reason == "full"
        assert shelf.statistics().refused == {"full": 1}
        for original, hold in holds:
            hold.release()
            assert loads(shelf, original)
        keep(shelf, original)
        shelf.check()


def test_the_queue_is_bounded(source: Store) -> None:
    disks = Disks()
    with closing(disks.open(queue_bytes=1 << 17, batch_bytes=1 << 16)) as shelf:
        holds = [write(source, range(1000 * number, 1000 * number + 20)) for number in range(1, 9)]
        disks[0].hold()
        handles = [shelf.keep(hold.path, hold.salt, hold.placed) for hold in holds]
        while not all(handle.done() for handle in handles):
            disks[0].release(1)
        disks[0].release()
        taken = []
        for hold, handle in zip(holds, handles, strict=True):
            with suppress(ShelfRefusedError):
                handle.result(TEST_S)
                taken.append(hold)
        assert 0 < len(taken) < len(holds)
        assert all(loads(shelf, hold) for hold in taken)
        assert shelf.statistics().refused == {"queue": len(holds) - len(taken)}


def test_a_day_has_its_writes(source: Store) -> None:
    """What is over the budget is refused by name, also after a restart."""
    disks = Disks()
    with closing(disks.open(write_bytes_per_day=2 * MIB)) as shelf:
        refused = refusal(shelf, (write(source, range(1000 * each, 1000 * each + 20)) for each in range(1, 99)))
        assert refused is not None
        assert refused.reason == "budget"
        assert shelf.statistics().written_bytes < MIB
    with closing(disks.open(write_bytes_per_day=2 * MIB)) as shelf:
        refused = refusal(shelf, (write(source, range(1000 * each, 1000 * each + 20)) for each in range(101, 111)))
        assert refused is not None
        assert "per day" in str(refused)
        assert shelf.statistics().written_bytes < MIB // 2
    with closing(disks.open()) as shelf:
        keep(shelf, write(source, range(500)))


# Disks that fail


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_read_only(source: Store, number: int) -> None:
    disks = Disks()
    with closing(disks.open()) as shelf:
        first, second = write(source, range(20)), write(source, range(100, 120))
        keep(shelf, first)
        disks[0].faults.append(Fault("sync", number, times=None))
        for _ in range(2):
            with pytest.raises(ShelfRefusedError) as refused:
                keep(shelf, second)
            assert refused.value.reason == "read only"
        assert "disk 0" not in shelf.statistics().trouble  # names the directory as its files do
        assert disks[0].directory in shelf.statistics().trouble
        assert loads(shelf, first)
        assert tokens_found(shelf, source, range(100, 120)) == 0
        shelf.check()
    disks[0].faults.clear()
    with closing(disks.open()) as shelf:
        assert not shelf.statistics().trouble
        assert loads(shelf, first)
        keep(shelf, second)
        assert loads(shelf, second)


def test_a_full_disk_takes_records_again_once_there_is_room(source: Store) -> None:
    disks = Disks(capacity_bytes=32 * MIB)
    with closing(disks.open()) as shelf:
        first, second = write(source, range(20)), write(source, range(100, 120))
        keep(shelf, first)
        disks[0].faults.append(Fault("write", errno.ENOSPC, times=1))
        with pytest.raises(ShelfRefusedError) as refused:
            keep(shelf, second)
        assert refused.value.reason == "full"
        assert "full" in shelf.statistics().trouble
        keep(shelf, second)
        assert not shelf.statistics().trouble
        assert loads(shelf, first)
        assert loads(shelf, second)


def test_a_disk_that_is_slow_is_given_up_for_the_time_being(source: Store) -> None:
    disks = Disks()
    with closing(disks.open(write_deadline_s=0.1)) as shelf:
        original = write(source, range(20))
        disks[0].hold()
        with pytest.raises(ShelfRefusedError) as refused:
            keep(shelf, original)
        assert refused.value.reason == "slow"
        assert "slow" in shelf.statistics().trouble
        disks[0].release()
    with closing(disks.open()) as shelf:
        keep(shelf, original)
        assert loads(shelf, original)
        assert not shelf.statistics().trouble
        shelf.check()


def test_a_file_system_smaller_than_the_capacity(source: Store) -> None:
    """Others fill the disk: the tier makes do with what is left."""
    disks = Disks(capacity_bytes=32 * MIB)
    disks[0].capacity_bytes = 2 * MIB
    with closing(disks.open()) as shelf:
        for number in range(1, 40):
            original = write(source, range(1000 * number, 1000 * number + 24))
            keep(shelf, original)
            original.release()
        found = shelf.statistics()
        assert found.evicted_records > 0
        assert found.used_bytes <= 2 * MIB
        assert not found.trouble


def test_what_a_drive_does_is_logged_once(source: Store, caplog: pytest.LogCaptureFixture) -> None:
    disks = Disks()
    with closing(disks.open()) as shelf, caplog.at_level("WARNING", "kvstore.ssd"):
        disks[0].faults.append(Fault("write", errno.ENOSPC, times=None))
        for number in range(2):
            assert refusal(shelf, [write(source, range(100 * number, 100 * number + 40))])
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "the disk is full" in caplog.text
        disks[0].faults.clear()
        keep(shelf, write(source, range(200, 240)))
        assert "records are written there again" in caplog.records[-1].message
        caplog.clear()
        disks[0].faults.append(Fault("write", errno.EROFS, times=None))
        for number in range(3, 5):
            assert refusal(shelf, [write(source, range(100 * number, 100 * number + 40))])
        assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_one_drive_of_two_fails(source: Store) -> None:
    """The other one goes on with everything, and what lay on both is a miss once it cannot be read."""
    disks = Disks(2)
    with closing(disks.open()) as shelf:
        first, second = write(source, range(40)), write(source, range(100, 140))
        keep(shelf, first)
        for disk in disks.disks.values():
            assert any(name.startswith("segment") for name in disk.names), "records are not spread over both"
        disks[0].faults.append(Fault("write", errno.EROFS, times=None))
        keep(shelf, second)
        assert loads(shelf, first)
        assert loads(shelf, second)
        assert shelf.statistics().trouble.count(";") <= 1
        disks[0].faults.append(Fault("read", errno.EIO, times=None))
        assert not loads(shelf, first)
        assert tokens_found(shelf, source, range(40)) == 0
        assert loads(shelf, second)
        disks[0].faults.clear()
        assert keep(shelf, first) > 0
        assert loads(shelf, first)
        shelf.check()


@pytest.mark.parametrize("failing", [0, 1])
def test_what_is_dropped_while_a_drive_fails_is_not_said_to_be_kept(
    source: Store, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """One drive's journal has the states of another variant, and then that all of them were dropped."""
    disks = Disks(2)
    prompt = source.prompt(range(16))
    grids = [ChunkGrid.every(tokens, upto=16) for tokens in (4, 16)]
    holds = []
    for grid in grids:
        with source.write(prompt, grid=grid) as writer:
            put_all(writer)
            writer.commit()
        hold = source.pool.hold(prompt.path, grid=grid)
        assert isinstance(hold, Hold)
        holds.append(hold)
    with closing(disks.open()) as shelf:
        keep(shelf, holds[0])
        append = Writer._append

        def append_and_drop(self: Writer, *arguments: Any) -> Any:
            failed = append(self, *arguments)
            if failed:
                shelf.condemn(prompt.path.key(3), is_state=True)
            return failed

        monkeypatch.setattr(Writer, "_append", append_and_drop)
        disks[failing].faults.append(Fault("write", errno.ENOSPC, name="segment"))
        with pytest.raises(ShelfRefusedError) as refused:
            keep(shelf, holds[1])
        assert refused.value.reason == "damaged"
        keep(shelf, holds[1])
        for disk in disks.disks.values():
            disk.cut_power()
    with closing(disks.open()) as shelf:
        found = shelf.hold(prompt.path, shard=WHOLE, grid=grids[1])
        assert found is not None
        found.release()


def test_a_drive_whose_reads_fail_is_left_out(source: Store) -> None:
    disks = Disks(2)
    with closing(disks.open()) as shelf:
        holds = [write(source, range(1000 * number, 1000 * number + 40)) for number in range(1, 7)]
        for hold in holds:
            keep(shelf, hold)
        disks[1].faults.append(Fault("read", errno.EIO, times=None))
        for hold in holds:
            assert not loads(shelf, hold)
        assert "left out" in shelf.statistics().trouble
        keep(shelf, holds[0])
        assert loads(shelf, holds[0])
        shelf.check()
    disks[1].faults.clear()
    with closing(disks.open()) as shelf:
        assert all(loads(shelf, hold) for hold in holds), "what could not be read was forgotten for good"


def test_a_drive_that_is_lost_takes_only_what_it_held(source: Store) -> None:
    disks = Disks(2)
    original = write(source, range(40))
    with closing(disks.open()) as shelf:
        keep(shelf, original)
    for name in list(disks[1].names):
        disks[1].delete(name)
    with closing(disks.open()) as shelf:
        assert not loads(shelf, original)
        keep(shelf, original)
        assert loads(shelf, original)
        shelf.check()


def test_a_drive_that_cannot_be_opened_is_left_out(source: Store) -> None:
    disks = Disks(2)
    with closing(disks.open()) as shelf:
        keep(shelf, write(source, range(40)))
    disks[1].faults.append(Fault("names", errno.EIO, times=None))
    with closing(disks.open()) as shelf:
        assert "left out" in shelf.statistics().trouble
        assert shelf.statistics().capacity_bytes == 16 * MIB
        original = write(source, range(40))
        keep(shelf, original)
        assert loads(shelf, original)
    disks[0].faults.append(Fault("names", errno.EIO, times=None))
    with pytest.raises(SsdDirectoryError, match="no directory"):
        disks.open()


def test_what_hangs_on_a_drive_that_cannot_be_opened_is_there_with_it_again(source: Store) -> None:
    """It was promised: the other drive keeps its share, whatever is written, dropped and cleaned meanwhile."""
    disks = Disks(2)
    originals = [write(source, range(number * 100, number * 100 + 40)) for number in range(6)]
    with closing(disks.open()) as shelf:
        for original in originals:
            keep(shelf, original)
    for out in (0, 1):
        fault = Fault("names", errno.EIO, times=None)
        disks[out].faults.append(fault)
        with closing(disks.open()) as shelf:
            assert not all(loads(shelf, original) for original in originals)
            for number in range(10, 40):
                churn = write(source, range(number * 100, number * 100 + 40))
                keep(shelf, churn)
                shelf.evict(churn.path.key(0))
            shelf.check()
        disks[out].faults.remove(fault)
        with closing(disks.open()) as shelf:
            assert all(loads(shelf, original) for original in originals)
            shelf.check()


def test_another_models_directory_is_an_error_whatever_else_there_is() -> None:
    disks = Disks(2)
    disks.open().close()
    with pytest.raises(SsdDirectoryError, match="fingerprint"):
        disks.open(hybrid(4, weights="other"))


def test_a_segment_that_vanishes_is_a_miss(source: Store) -> None:
    disks = Disks()
    original = write(source, range(40))
    with closing(disks.open()) as shelf:
        keep(shelf, original)
    victim = min(name for name in disks[0].names if name.startswith("segment"))
    disks[0].delete(victim)
    with closing(disks.open()) as shelf:
        assert not loads(shelf, original)
        shelf.check()
        keep(shelf, original)
        assert loads(shelf, original)


def test_models_without_attention() -> None:
    """Nodes without records lead to states, over one drive and several, also after a restart."""
    spec = pure_state(4)
    for count in (1, 2):
        disks = Disks(count)
        with open_store(spec, dram="2MiB") as source:
            originals = [write(source, range(30)), write(source, range(9))]
            with closing(disks.open(spec)) as shelf:
                for original in originals:
                    keep(shelf, original)
                shelf.check()
            for disk in disks.disks.values():
                disk.cut_power()
            with closing(disks.open(spec)) as shelf:
                assert all(loads(shelf, original) for original in originals)
                shelf.check()


# Ends


def test_close_with_writes_in_flight(source: Store) -> None:
    """What is being written is finished, what waits fails; nothing is half there."""
    disks = Disks()
    shelf = disks.open(batch_bytes=1 << 16)
    holds = [write(source, range(1000 * number, 1000 * number + 20)) for number in range(1, 7)]
    disks[0].hold()
    handles = [shelf.keep(hold.path, hold.salt, hold.placed) for hold in holds]
    closer = threading.Thread(target=shelf.close)
    closer.start()
    until = Deadline.after(TEST_S)
    while not shelf._writer._is_closing:
        until.check("closing to begin")
    while closer.is_alive():
        disks[0].release(1)
        closer.join(0.001)
    disks[0].release()
    durable = []
    for hold, handle in zip(holds, handles, strict=True):
        try:
            handle.result(0.0)
            durable.append(hold)
        except StoreClosedError:
            pass
    assert len(durable) < len(holds)
    disks[0].cut_power()
    with closing(disks.open()) as again:
        assert all(loads(again, hold) for hold in durable)
        again.check()


def test_the_child_of_a_fork_has_nothing(source: Store, tmp_path: Path) -> None:
    """In real files: the child may go on and end, and the parent does not notice."""
    original = write(source, range(20))
    with closing(open_ssd(SPEC, f"{tmp_path / 'kv'}:64MiB")) as shelf:
        keep(shelf, original)
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_in_child, args=(shelf, original))
        child.start()
        child.join(TEST_S)
        assert child.exitcode == 0
        assert loads(shelf, original)
        keep(shelf, write(source, range(200, 230)))
    assert os.listdir(tmp_path / "kv")
    with closing(open_ssd(SPEC, f"{tmp_path / 'kv'}:64MiB")) as again:
        assert loads(again, original)


def _in_child(shelf: SsdShelf, original: Hold) -> None:
    shelf.close_in_child()
    assert shelf.hold(original.path, shard=WHOLE) is None
    with pytest.raises(StoreClosedError):
        shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    shelf.close()
    os._exit(0)


def test_two_owners(source: Store, tmp_path: Path) -> None:
    with (
        closing(open_ssd(SPEC, f"{tmp_path}:64MiB")),
        pytest.raises(SsdDirectoryError, match="in use"),
    ):
        open_ssd(SPEC, f"{tmp_path}:64MiB")
