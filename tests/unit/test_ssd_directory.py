"""One directory of an SSD tier: what it refuses, what survives damage and errors, what Arrow sees of it."""

from __future__ import annotations

import errno
import os
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, SsdDirectoryError
from kvstore.limits import FILE_ALIGN_BYTES
from kvstore.spec import UnitRange
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.testing.specs import dense, hybrid, pure_state
from kvstore.tiers.ssd import frame, journal, manifest, parts, staging
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from kvstore.tiers.ssd.lock import DirectoryLock
from kvstore.tiers.ssd.memory import aligned
from kvstore.tiers.ssd.names import FileName, parse_name
from kvstore.tiers.ssd.rows import EndRows, NodeRows, RecordRows, TailIds
from kvstore.tiers.ssd.verify import bad_records, repair
from tests.ssd.contents import (
    append,
    check_recovered,
    deadline,
    load_of,
    names_of,
    path_of,
    read_slots,
    record_of,
    whole_load,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from kvstore.abc.files import FileBatch, Files
    from kvstore.spec import ModelSpec
    from tests.ssd.contents import Load

SPEC = hybrid(4)
TOKENS = range(22)
ALL = SPEC.groups[0].all_units


def open_directory(
    files: Files, spec: ModelSpec = SPEC, *, segment_bytes: int | None = None, is_read_only: bool = False
) -> SsdDirectory:
    return SsdDirectory.open(
        files, spec, capacity_bytes=1 << 30, segment_bytes=segment_bytes, is_read_only=is_read_only
    )


@pytest.fixture
def disk() -> ForgetfulDisk:
    return ForgetfulDisk(seed=1)


@pytest.fixture
def load() -> Load:
    return whole_load(SPEC, path_of(SPEC, TOKENS, b"salt"))


def contents(disk: ForgetfulDisk) -> dict[str, bytes]:
    return {name: disk.peek(name) for name in disk.names}


def journal_of(disk: ForgetfulDisk) -> str:
    (name,) = [name for name in disk.names if name.startswith("journal")]
    return name


def filled(disk: ForgetfulDisk, *loads: Load) -> list[RecordRows]:
    with closing(open_directory(disk.files())) as directory:
        return [append(directory, load) for load in loads]


# What is there


def test_what_was_appended_is_recovered(disk: ForgetfulDisk, load: Load) -> None:
    (placed,) = filled(disk, load)
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)
        nodes, records = directory.recovered
        assert dict(zip(names_of(nodes, records), records.place.tolist(), strict=True)) == dict(
            zip(load.names, placed.place.tolist(), strict=True)
        )
        assert dict(zip(names_of(nodes, records), records.metadata_crc32c, strict=True)) == dict(
            zip(load.names, placed.metadata_crc32c, strict=True)
        )
        assert all(segment.is_sealed for segment in directory.segments())
        assert directory.used_bytes >= int(placed.place[:, 2].sum())


def test_nodes_without_records_lead_to_states(disk: ForgetfulDisk) -> None:
    spec = pure_state(4)
    load = whole_load(spec, path_of(spec, TOKENS))
    with closing(open_directory(disk.files(), spec)) as directory:
        append(directory, load)
    with closing(open_directory(disk.files(), spec)) as directory:
        assert check_recovered(spec, directory) == set(load.names)
        assert len(directory.recovered[0]) == 6


def test_the_newer_of_two_copies_counts(disk: ForgetfulDisk, load: Load) -> None:
    _, newer = filled(disk, load, load)
    with closing(open_directory(disk.files())) as directory:
        assert directory.losses.replaced == len(load.names)
        assert sorted(map(tuple, directory.recovered[1].place.tolist())) == sorted(map(tuple, newer.place.tolist()))


def test_what_is_forgotten_does_not_come_back(disk: ForgetfulDisk, load: Load) -> None:
    nodes = path_of(SPEC, TOKENS, b"salt")
    with closing(open_directory(disk.files())) as directory:
        append(directory, load)
        directory.forget([nodes[-1].key], [True])
        directory.sync(deadline())
    with closing(open_directory(disk.files())) as directory:
        left = check_recovered(SPEC, directory)
        assert left == {name for name in load.names if name[1] == 0}
        directory.forget([nodes[2].key], [False])
    with closing(open_directory(disk.files())) as directory:
        above = {node.key for node in nodes[:2]}
        assert check_recovered(SPEC, directory) == {name for name in left if name[0] in above}
        # Written anew, it counts again, and with it only what was written since.
        directory.forget([nodes[2].key], [False])
        append(directory, whole_load(SPEC, nodes[:3], start=2))
    with closing(open_directory(disk.files())) as directory:
        assert {name[0] for name in check_recovered(SPEC, directory)} == {node.key for node in nodes[:3]}


def test_shards_are_contiguous_by_unit(disk: ForgetfulDisk) -> None:
    """Each shard unit has its own chain; a record of several units needs all of them above it."""
    nodes = path_of(SPEC, range(12))
    first, second = UnitRange(0, 1), UnitRange(1, 2)
    names = [(0, 0, 0, first), (1, 0, 0, first), (1, 0, 0, second), (2, 0, 0, ALL)]
    filled(disk, load_of(SPEC, nodes, names))
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == {(nodes[0].key, 0, 0, 0, 1), (nodes[1].key, 0, 0, 0, 1)}
        assert directory.losses.unreachable == 2
        append(directory, load_of(SPEC, nodes[:1], [(0, 0, 0, second)]))
    with closing(open_directory(disk.files())) as directory:
        assert len(check_recovered(SPEC, directory)) == 5


def test_states_need_attention(disk: ForgetfulDisk) -> None:
    nodes = path_of(SPEC, range(8))
    filled(
        disk, load_of(SPEC, nodes, [(0, 0, 0, ALL), (0, 1, 0, SPEC.groups[1].all_units), (1, 1, 0, UnitRange(0, 1))])
    )
    with closing(open_directory(disk.files())) as directory:
        assert {name[:2] for name in check_recovered(SPEC, directory)} == {(nodes[0].key, 0), (nodes[0].key, 1)}


# Segments


def test_plain_arrow_reads_a_sealed_segment(tmp_path: Path, load: Load) -> None:
    with closing(open_directory(DirectFiles(str(tmp_path)))) as directory:
        append(directory, load)
    seen = 0
    for path in tmp_path.glob("segment-*.arrow"):
        assert path.stat().st_size % FILE_ALIGN_BYTES == 0
        with pa.ipc.open_file(path) as reader:
            assert reader.schema.metadata[b"kvstore.fingerprint"].decode() == SPEC.fingerprint.hex()
            group = [each.name for each in SPEC.groups].index(reader.schema.metadata[b"kvstore.group"].decode())
            of_group = [(name, slot) for name, slot in zip(load.names, load.slots, strict=True) if name[1] == group]
            assert reader.num_record_batches == len(of_group)
            for number, (name, slot) in enumerate(of_group):
                batch, metadata = reader.get_batch_with_custom_metadata(number)
                batch.validate(full=True)
                assert metadata[b"kvstore.key"].decode() == name[0].hex()
                column = batch.column(0).storage.flatten().buffers()[1]
                assert column.to_pybytes()[:64] in slot.tobytes()
                seen += 1
    assert seen == len(load.names)


def test_a_full_segment_is_sealed_and_another_begun(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files(), segment_bytes=3 * 8192)) as directory:
        append(directory, load)
        append(directory, load)
        usages = [usage for usage in directory.segments() if usage.record_class[0] == 0]
        assert len(usages) == 6
        assert [usage.is_sealed for usage in usages] == [True] * 5 + [False]
        numbers = [usage.number for usage in directory.segments()]
    with closing(open_directory(disk.files(), segment_bytes=3 * 8192)) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)
        assert min(append(directory, load).place[:, 0]) > max(numbers)


def test_the_segment_used_the_longest_ago_gives_way(
    disk: ForgetfulDisk, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "OPEN_SEGMENTS_MAX", 2)
    with closing(open_directory(disk.files())) as directory:
        append(directory, load)
        assert [usage.is_sealed for usage in directory.segments()] == [True, False, False]
        append(directory, load)
        assert sum(not usage.is_sealed for usage in directory.segments()) == 2
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)


def test_numbers_are_never_used_again(disk: ForgetfulDisk, load: Load) -> None:
    used: set[int] = set()
    for _ in range(4):
        with closing(open_directory(disk.files())) as directory:
            numbers = set(append(directory, load).place[:, 0].tolist())
            assert not numbers & used
            used |= numbers
            for usage in directory.segments():
                directory.remove_segments([usage.number])
            directory.rewrite_journal(NodeRows.empty(), RecordRows.empty(), deadline())
            assert directory.segments() == []
    with closing(open_directory(disk.files())) as directory:
        assert len(directory.recovered[1]) == 0
    assert [name for name in disk.names if name.startswith("segment")] == []


def test_a_removed_segment_is_gone(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files())) as directory:
        placed = append(directory, load)
        number = int(placed.place[0, 0])
        directory.remove_segments([number])
        with pytest.raises(FileNotFoundError, match=f"no segment {number}"):
            directory.read(placed.place, load.addresses)
        with pytest.raises(FileNotFoundError):
            directory.remove_segments([number])
    disk.cut_power()
    with closing(open_directory(disk.files())) as directory:
        assert directory.recovered[1].place[:, 0].tolist().count(number) == 0


def test_segments_that_go_together_cost_one_sync(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files(), segment_bytes=3 * 8192)) as directory:
        append(directory, load)
        append(directory, load)
        numbers = [usage.number for usage in directory.segments() if usage.is_sealed]
        assert len(numbers) >= 3
        with pytest.raises(FileNotFoundError, match="no segment 1000"):
            directory.remove_segments([*numbers, 1000])
        assert set(numbers) <= {usage.number for usage in directory.segments()}
        changes = disk.changes
        directory.remove_segments(numbers)
        assert disk.changes == changes + len(numbers) + 1
        left = {usage.number for usage in directory.segments()}
        disk.cut_power()
    with closing(open_directory(disk.files())) as directory:
        assert {usage.number for usage in directory.segments()} <= left


def test_what_went_before_one_that_cannot_be_removed_is_gone_for_good(disk: ForgetfulDisk, load: Load) -> None:
    directory = open_directory(disk.files())
    append(directory, load)
    first, second, third = (usage.number for usage in directory.segments())
    disk.faults.append(Fault("remove", errno.EIO, f"segment-{second:010}"))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        directory.remove_segments([first, second, third])
    assert [usage.number for usage in directory.segments()] == [second, third]
    disk.cut_power()
    assert sorted(parse_name(name).number for name in disk.names if name.startswith("segment")) == [second, third]  # type: ignore[union-attr]


# Damage


def appended_one_by_one(disk: ForgetfulDisk) -> list[int]:
    """A chain of nodes, an append each; where the journal's frames begin."""
    nodes = path_of(SPEC, range(20))
    begins = []
    with closing(open_directory(disk.files())) as directory:
        for number in range(len(nodes)):
            begins.append(directory.journal_bytes)
            append(directory, load_of(SPEC, nodes[: number + 1], [(number, 0, 0, ALL)]))
    return begins


def recovered_count(disk: ForgetfulDisk) -> tuple[int, SsdDirectory]:
    directory = open_directory(disk.files(), is_read_only=True)
    return len(check_recovered(SPEC, directory)), directory


def test_a_damaged_batch_is_skipped_with_what_hangs_on_it(disk: ForgetfulDisk) -> None:
    begins = appended_one_by_one(disk)
    disk.flip(journal_of(disk), 8 * (begins[2] + 200))
    count, directory = recovered_count(disk)
    assert count == 2
    assert directory.damaged_pages == 1
    assert directory.losses.unreachable == 2


@pytest.mark.parametrize("what", ["head", "zeros", "torn", "cut", "gone"])
def test_a_torn_tail_is_ignored(disk: ForgetfulDisk, what: str) -> None:
    begins = appended_one_by_one(disk)
    name, last = journal_of(disk), begins[-1]
    if what == "head":
        disk.flip(name, 8 * last + 3)
    elif what == "zeros":
        disk.poke(name, last, bytes(len(disk.peek(name)) - last))
    elif what == "torn":
        disk.poke(name, last + 512, bytes(512))
    else:
        disk.cut_file(name, last + (700 if what == "cut" else 0))
    with closing(open_directory(disk.files())) as directory:
        assert len(check_recovered(SPEC, directory)) == 4
        nodes = path_of(SPEC, range(20))
        append(directory, load_of(SPEC, nodes, [(4, 0, 0, ALL)]))
    assert recovered_count(disk)[0] == 5


def test_stale_and_doubled_pages_count_for_nothing(disk: ForgetfulDisk) -> None:
    begins = appended_one_by_one(disk)
    name = journal_of(disk)
    data = disk.peek(name)
    # The frame of an earlier place, at a later one: between others and behind the last.
    disk.poke(name, begins[3], data[begins[1] : begins[2]])
    disk.poke(name, len(data), data[begins[4] :])
    count, directory = recovered_count(disk)
    assert count == 3
    assert directory.damaged_pages == 1


def test_a_journal_of_another_directory_counts_for_nothing(disk: ForgetfulDisk, load: Load) -> None:
    other = ForgetfulDisk(seed=2)
    filled(disk, load)
    filled(other, load)
    name = journal_of(disk)
    disk.poke(name, 0, other.peek(journal_of(other)))
    count, directory = recovered_count(disk)
    assert count == 0
    assert directory.losses.without_segment == 0


def test_the_end_of_a_snapshot_is_written_twice(disk: ForgetfulDisk, load: Load) -> None:
    filled(disk, load)
    disk.flip(journal_of(disk), 100)
    assert recovered_count(disk)[0] == len(load.names)
    disk.flip(journal_of(disk), 8 * FILE_ALIGN_BYTES + 100)
    # Without either, the only journal counts all the same, and is written anew.
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)
    assert journal_of(disk).startswith("journal-0000000002-")
    assert recovered_count(disk)[0] == len(load.names)


@pytest.mark.parametrize("what", ["deleted", "renamed", "cut", "swapped"])
def test_a_segment_that_is_not_there_takes_its_records_along(disk: ForgetfulDisk, load: Load, what: str) -> None:
    filled(disk, load, load)
    states = next(name for name in disk.names if name.startswith("segment-0000000002"))
    other = next(name for name in disk.names if name.startswith("segment-0000000003"))
    if what == "deleted":
        disk.delete(states)
    elif what == "renamed":
        disk.rename(states, "kept-by-hand.arrow")
    elif what == "cut":
        disk.cut_file(states, 4096)
    else:
        disk.poke(states, 0, disk.peek(other))
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == {name for name in load.names if name[1] != 1}
        assert directory.losses.without_segment == 2
    assert ("kept-by-hand.arrow" in disk.names) == (what == "renamed")


def test_a_cut_segment_keeps_what_is_before_the_cut(disk: ForgetfulDisk, load: Load) -> None:
    filled(disk, load)
    name = next(name for name in disk.names if name.startswith("segment-0000000001"))
    disk.cut_file(name, 4096 + 2 * 8192 + 100)
    with closing(open_directory(disk.files())) as directory:
        assert len(check_recovered(SPEC, directory)) == 2
    reader = pa.ipc.open_file(pa.py_buffer(disk.peek(name)))
    assert reader.num_record_batches == 2


def test_verify_finds_every_flipped_record(disk: ForgetfulDisk, load: Load) -> None:
    (placed,) = filled(disk, load)
    flipped = {0, 3, 6}
    for row in flipped:
        number, offset, _ = placed.place[row].tolist()
        name = next(name for name in disk.names if name.startswith(f"segment-{number:010d}"))
        disk.flip(name, 8 * (offset + 4100) + row)
    with closing(open_directory(disk.files())) as directory:
        steps: list[int] = []
        bad = bad_records(directory, SPEC, steps.append)
        assert {(each.key, *each.name) for each in bad} == {load.names[row] for row in flipped}
        assert {each.reason for each in bad} == {"damaged"}
        assert sum(steps) == int(placed.place[:, 2].sum())
        repair(directory, SPEC, bad)
    with closing(open_directory(disk.files())) as directory:
        assert len(directory.recovered[1]) == 0  # the first node's attention is among them


def test_verify_names_what_cannot_be_read(disk: ForgetfulDisk, load: Load) -> None:
    filled(disk, load)
    with closing(open_directory(disk.files())) as directory:
        disk.faults.append(Fault("read", errno.EIO, "segment-0000000002"))
        (bad,) = bad_records(directory, SPEC)
        assert bad.name[0] == 1
        assert bad.reason == os.strerror(errno.EIO)
        directory.remove_segments([3])
        assert [each.name[0] for each in bad_records(directory, SPEC)] == [2]


def test_a_segment_is_written_without_growing(disk: ForgetfulDisk, load: Load) -> None:
    files = disk.files()
    free_bytes = files.free_bytes()
    with closing(open_directory(files, segment_bytes=1 << 20)) as directory:
        append(directory, load)
        sizes = {name: len(disk.peek(name)) for name in disk.names if name.startswith("segment-")}
        assert set(sizes.values()) == {1 << 20}
        # What is not written yet takes no room, neither here nor on the disk.
        assert directory.used_bytes < 1 << 20
        assert free_bytes - files.free_bytes() < 1 << 20
        append(directory, load)
        assert {name: len(disk.peek(name)) for name in sizes} == sizes
        usages = directory.segments()
    for name, usage in zip(sorted(sizes), usages, strict=True):
        assert usage.size_bytes < len(disk.peek(name)) < usage.size_bytes + 2 * FILE_ALIGN_BYTES
        assert pa.ipc.open_file(pa.py_buffer(disk.peek(name))).num_record_batches > 0


@pytest.mark.parametrize("gap_bytes", [0, FILE_ALIGN_BYTES])
def test_records_that_lie_side_by_side_are_written_as_one(
    disk: ForgetfulDisk, load: Load, gap_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = aligned(sum(len(slot) + gap_bytes for slot in load.slots))
    addresses = np.empty(len(load.slots), np.uint64)
    begin = 0
    for number in np.lexsort((load.records.node, load.records.name[:, 0])).tolist():
        slot = load.slots[number]
        memory[begin : begin + len(slot)] = slot
        addresses[number] = memory.ctypes.data + begin
        begin += len(slot) + gap_bytes
    sizes: list[int] = []
    files = disk.files()
    submit = files.submit

    def watched(operations: NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        is_record = (operations[:, 3] >= memory.ctypes.data) & (operations[:, 3] < memory.ctypes.data + memory.nbytes)
        sizes.extend(operations[is_record, 4].tolist())
        return submit(operations, is_urgent=is_urgent)

    monkeypatch.setattr(files, "submit", watched)
    with closing(open_directory(files)) as directory:
        directory.append(load.nodes, load.records, addresses, deadline())
        classes = len(directory.segments())
    assert sum(sizes) == sum(map(len, load.slots))
    assert len(sizes) == (len(load.slots) if gap_bytes else classes)
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)


def test_one_segment_that_cannot_be_sealed_keeps_no_other_from_it(disk: ForgetfulDisk, load: Load) -> None:
    directory = open_directory(disk.files())
    placed = append(directory, load)
    bad, *good = sorted(name for name in disk.names if name.startswith("segment-"))
    disk.faults.append(Fault("write", errno.EIO, bad, times=None))
    directory.close()
    assert pa.ipc.open_file(pa.py_buffer(disk.peek(good[0]))).num_record_batches > 0
    assert pa.ipc.open_file(pa.py_buffer(disk.peek(good[1]))).num_record_batches > 0
    with pytest.raises(pa.ArrowInvalid):
        pa.ipc.open_file(pa.py_buffer(disk.peek(bad)))
    disk.faults.clear()
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)
        assert sorted(directory.recovered[1].place.tolist()) == sorted(placed.place.tolist())
    assert pa.ipc.open_file(pa.py_buffer(disk.peek(bad))).num_record_batches > 0


# Errors while writing


@pytest.mark.parametrize("is_short", [False, True])
def test_a_full_disk_passes(disk: ForgetfulDisk, load: Load, is_short: bool) -> None:
    with closing(open_directory(disk.files())) as directory:
        for name in ("segment-", "journal-"):
            disk.faults.append(Fault("write", errno.ENOSPC, name, is_short=is_short))
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                append(directory, load)
            assert directory.trouble == ""
            assert directory.has_settled()
        append(directory, load)
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)


@pytest.mark.parametrize("what", ["create", "truncate"])
def test_no_file_can_be_made(disk: ForgetfulDisk, load: Load, what: str) -> None:
    with closing(open_directory(disk.files())) as directory:
        before = contents(disk)
        disk.faults.append(Fault(what, errno.ENOSPC, skip=1))
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            append(directory, load)
        assert contents(disk) == before
        assert directory.trouble == ""
        append(directory, load)


def test_a_bad_place_ends_its_segment(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files())) as directory:
        before = append(directory, load)
        disk.faults.append(Fault("write", errno.EIO, "segment-0000000001"))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            append(directory, load)
        assert directory.trouble == ""
        after = append(directory, load)
        assert 1 in before.place[:, 0]
        assert 1 not in after.place[:, 0]
        assert 2 in after.place[:, 0]
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("sync", errno.EIO, "segment"),
        Fault("sync", errno.EIO, "journal"),
        Fault("write", errno.EIO, "journal"),
        Fault("write", errno.EROFS, "segment"),
        Fault("sync_names", errno.EIO),
    ],
    ids=lambda fault: f"{fault.what}-{fault.name}-{errno.errorcode[fault.number]}",
)
def test_a_failing_disk_is_written_to_no_more(disk: ForgetfulDisk, load: Load, fault: Fault) -> None:
    with closing(open_directory(disk.files())) as directory:
        first = append(directory, whole_load(SPEC, path_of(SPEC, range(4))))
        disk.faults.append(Fault(fault.what, fault.number, fault.name))
        if fault.what == "sync_names":
            # A new class makes a new file, whose name is to be made safe.
            extra = load_of(SPEC, path_of(SPEC, range(4)), [(0, 0, 0, UnitRange(0, 1))])
        else:
            extra = load
        with pytest.raises(OSError, match=os.strerror(fault.number)):
            append(directory, extra)
        assert os.strerror(fault.number) in directory.trouble
        before = contents(disk)
        with pytest.raises(OSError, match="mend the disk"):
            append(directory, load)
        with pytest.raises(OSError, match="mend the disk"):
            directory.rewrite_journal(NodeRows.empty(), RecordRows.empty(), deadline())
        directory.forget([load.names[0][0]], [False])
        assert all(isinstance(each, bytes) for each in read_slots(directory, first))
    assert contents(disk) == before
    disk.faults.clear()
    with closing(open_directory(disk.files())) as directory:
        assert len(check_recovered(SPEC, directory)) >= len(first)


def test_a_slow_disk_costs_the_append_only(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files())) as directory:
        disk.hold()
        with pytest.raises(DeadlineError):
            directory.append(load.nodes, load.records, load.addresses, Deadline.after(0.01))
        disk.release()
        assert directory.has_settled()
        assert directory.trouble == ""
        append(directory, load)
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)


def test_a_disk_that_hangs_is_given_up(disk: ForgetfulDisk, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.ssd.moves.SSD_SETTLE_S", 0.01)
    directory = open_directory(disk.files())
    disk.hold(is_begun=True)
    with pytest.raises(DeadlineError):
        directory.append(load.nodes, load.records, load.addresses, Deadline.after(0.01))
    assert not directory.has_settled()
    assert "does not answer" in directory.trouble
    disk.release()
    assert directory.has_settled()
    directory.close()
    with closing(open_directory(disk.files())) as directory:
        assert len(directory.recovered[1]) == 0
        append(directory, load)


def test_a_rewriting_that_fails_leaves_the_old_journal() -> None:
    """At whichever step: the old one goes on to count, with what is appended to it afterwards."""
    for step in range(12):
        disk = ForgetfulDisk(seed=step)
        nodes = path_of(SPEC, TOKENS, b"salt")
        directory = open_directory(disk.files())
        append(directory, whole_load(SPEC, nodes[:2], states_at=()))
        append(directory, whole_load(SPEC, nodes[:3], start=2, states_at=()))
        for what in ("create", "write", "sync", "sync_names"):
            disk.faults.append(Fault(what, errno.ENOSPC, skip=step // 4 if what == "write" else 0))
            first = open_directory(disk.files(), is_read_only=True).recovered
            try:
                directory.rewrite_journal(*first, deadline())
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - it may also succeed, if the fault comes too late
            disk.faults.clear()
        append(directory, whole_load(SPEC, nodes[:4], start=3, states_at=()))
        disk.cut_power()
        with closing(open_directory(disk.files())) as directory:
            assert {name[0] for name in check_recovered(SPEC, directory)} == {node.key for node in nodes[:4]}


# Refusals


def test_rows_that_contradict_each_other_are_refused(disk: ForgetfulDisk, load: Load) -> None:
    with closing(open_directory(disk.files())) as directory:
        before = contents(disk)
        records, nodes, addresses = load.records, load.nodes, load.addresses
        wrong = [
            (nodes, replace(records, node=records.node + 99), addresses, "names a node"),
            (nodes, replace(records, grids=records.grids - 1), addresses, "names a grid"),
            (nodes, replace(records, cost_us=records.cost_us[1:]), addresses, "differ in length"),
            (nodes, replace(records, place=records.place + 4096), addresses, "has a slot of other"),
            (nodes, replace(records, name=records.name + 7), addresses, "no records of class"),
            (replace(nodes, root=nodes.root + 1), records, addresses, "names a root"),
            (replace(nodes, tail_ids=()), records, addresses, "differ in length"),
            (nodes, records, addresses[:-1], "not one address"),
            (nodes, records, addresses + np.uint64(8), "not one address"),
            (replace(nodes, keys=nodes.keys[::-1].copy()), records, addresses, "does not carry the key"),
        ]
        for bad_nodes, bad_rows, bad_addresses, message in wrong:
            with pytest.raises(ValueError, match=message):
                directory.append(bad_nodes, bad_rows, bad_addresses, deadline())
        with pytest.raises(ValueError, match="segments that are not there"):
            directory.rewrite_journal(nodes, records, deadline())
        with pytest.raises(ValueError, match="key of 32 bytes"):
            directory.forget([b"short"], [True])
        assert contents(disk) == before
        append(directory, load)


def snapshot_of(path: Path) -> dict[str, tuple[bytes, int]]:
    return {each.name: (each.read_bytes(), each.stat().st_mtime_ns) for each in path.iterdir() if each.is_file()}


def test_a_second_owner_is_refused_by_name(tmp_path: Path, load: Load) -> None:
    with closing(open_directory(DirectFiles(str(tmp_path)))) as directory:
        append(directory, load)
        with (
            closing(DirectFiles(str(tmp_path))) as files,
            pytest.raises(SsdDirectoryError, match=f"in use by process {os.getpid()}"),
        ):
            open_directory(files)
        # Looking is allowed.
        with closing(open_directory(DirectFiles(str(tmp_path)), is_read_only=True)) as other:
            assert check_recovered(SPEC, other) == set(load.names)
    open_directory(DirectFiles(str(tmp_path))).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = DirectoryLock(str(tmp_path))
    is_forked, may_end = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(is_forked[1], b"1")
        os.read(may_end[0], 1)
        os._exit(0)
    try:
        assert os.read(is_forked[0], 1) == b"1"
        # As if this process had died, the child being alive.
        lock.abandon()
        DirectoryLock(str(tmp_path)).close()
    finally:
        os.write(may_end[1], b"1")
        os.waitpid(child, 0)
        for descriptor in (*is_forked, *may_end):
            os.close(descriptor)


def test_directories_of_others_are_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, message: str, spec: ModelSpec = SPEC) -> None:
        before = snapshot_of(path)
        for is_read_only in (False, True):
            with closing(DirectFiles(str(path))) as files, pytest.raises(SsdDirectoryError, match=message):
                open_directory(files, spec, is_read_only=is_read_only)
        assert snapshot_of(path) == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    refused(foreign, r"holds files of others \('thesis.tex'\)")

    ours = tmp_path / "ours"
    ours.mkdir()
    with closing(open_directory(DirectFiles(str(ours)))) as directory:
        append(directory, whole_load(SPEC, path_of(SPEC, TOKENS)))
    (ours / "lock").unlink()
    refused(ours, f"fingerprint {dense(4).fingerprint.hex()}", dense(4))
    monkeypatch.setattr(manifest, "DIRECTORY_VERSION", 2)
    newer = tmp_path / "newer"
    newer.mkdir()
    open_directory(DirectFiles(str(newer))).close()
    monkeypatch.undo()
    (newer / "lock").unlink()
    refused(newer, "of directory format 2, this release knows 1")

    (journal,) = ours.glob("journal-*")
    hidden = journal.rename(tmp_path / "hidden")
    before = snapshot_of(ours)
    with closing(DirectFiles(str(ours))) as files, pytest.raises(SsdDirectoryError, match="no journal"):
        open_directory(files)
    after = snapshot_of(ours)
    after.pop("lock")
    assert after == before
    hidden.rename(journal)
    (ours / "lock").unlink()
    (ours / "manifest").write_bytes(bytes(8192))
    refused(ours, "manifest of .* is missing or damaged")


def test_half_of_the_manifest_is_enough(disk: ForgetfulDisk, load: Load) -> None:
    filled(disk, load)
    size = len(disk.peek("manifest"))
    for at in (20, size // 2 - 3000):
        disk.flip("manifest", 8 * at)
        assert recovered_count(disk)[0] == len(load.names)
    disk.flip("manifest", 8 * (size // 2 + 20))
    with pytest.raises(SsdDirectoryError, match="missing or damaged"):
        open_directory(disk.files())


def test_looking_changes_nothing(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "cache"
    path.mkdir()
    with (
        closing(DirectFiles(str(path))) as files,
        pytest.raises(SsdDirectoryError, match="no directory of an SSD tier"),
    ):
        open_directory(files, is_read_only=True)
    directory = open_directory(DirectFiles(str(path)))
    append(directory, load)
    before = snapshot_of(path)
    with closing(open_directory(DirectFiles(str(path)), is_read_only=True)) as other:
        assert check_recovered(SPEC, other) == set(load.names)
        for write in (
            lambda: append(other, load),
            lambda: other.sync(deadline()),
            lambda: other.remove_segments([1]),
            lambda: other.rewrite_journal(*other.recovered, deadline()),
        ):
            with pytest.raises(OSError, match="read-only"):
                write()
        other.forget([load.names[0][0]], [False])
    assert snapshot_of(path) == before
    directory.close()


def test_a_creation_that_was_cut_off_is_done_again() -> None:
    for seed in range(8):
        disk = ForgetfulDisk(seed=seed)
        for changes in range(1, 14):
            disk.cut_after(changes)
            try:
                open_directory(disk.files()).close()
            except SsdDirectoryError:
                continue
            break
        disk.cut_after(1 << 40)
        with closing(open_directory(disk.files())) as directory:
            assert len(directory.recovered[0]) == 0


# Values


def test_tail_ids_are_a_sequence() -> None:
    tails = [np.array(each, np.uint32) for each in ([], [1, 2], [], [3], [4, 5, 6])]
    packed = TailIds.of(tails)
    assert [each.tolist() for each in packed] == [each.tolist() for each in tails]
    assert packed[-1].tolist() == [4, 5, 6]
    assert [each.tolist() for each in packed.taken(np.array([4, 0, 1]))] == [[4, 5, 6], [], [1, 2]]
    assert len(packed[1:3]) == 2
    assert TailIds.of(packed) is packed
    with pytest.raises(IndexError):
        packed[5]
    assert len(TailIds.of(()).taken(np.empty(0, np.int64))) == 0


@pytest.mark.parametrize(
    "name",
    [
        "segment-1-00.arrow",
        "journal-0000000001-0123456789abcdef.arrow",
        "x",
        "segment-0000000001-0123456789ABCDEF.arrow",
    ],
)
def test_other_names_are_none_of_ours(name: str) -> None:
    assert parse_name(name) is None


def test_names_say_what_they_are() -> None:
    for name in (FileName(7, 1 << 63, True), FileName(123, 0, False)):
        assert parse_name(str(name)) == name


def test_contents_differ() -> None:
    """The tests compare bytes that follow from names: others must not give the same."""
    first, second = path_of(SPEC, range(8))
    slots: Iterator[bytes] = (record_of(SPEC, node, 0, 0, ALL).tobytes() for node in (first, second))
    assert len(set(slots)) == 2


# A batch that takes several frames


SMALL_FRAME_BYTES = 2 * FILE_ALIGN_BYTES


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames of the journal that take a dozen nodes."""
    for module in (frame, journal, parts):
        monkeypatch.setattr(module, "JOURNAL_FRAME_BYTES_MAX", SMALL_FRAME_BYTES)
    monkeypatch.setattr(journal, "_WINDOW_BYTES", 2 * SMALL_FRAME_BYTES)


@pytest.mark.usefixtures("small_frames")
def test_a_batch_that_no_frame_takes_goes_into_several(disk: ForgetfulDisk) -> None:
    loads = [whole_load(SPEC, path_of(SPEC, range(first, first + 150), b"salt")) for first in (0, 1000)]
    with closing(open_directory(disk.files())) as directory:
        append(directory, loads[0])
        directory.forget([bytes([number]) * 32 for number in range(200)], [False] * 200)
        append(directory, loads[1])
        assert directory.journal_bytes > 2 * SMALL_FRAME_BYTES
    names = {name for load in loads for name in load.names}
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == names
        directory.rewrite_journal(*directory.recovered, deadline())
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == names


@pytest.mark.parametrize("joined_max", [0, 1 << 12])
@pytest.mark.parametrize("rows_max", [2, 1 << 15])
def test_ends_that_come_with_records_hold_for_them_whatever_was_forgotten_before(
    disk: ForgetfulDisk, load: Load, monkeypatch: pytest.MonkeyPatch, joined_max: int, rows_max: int
) -> None:
    monkeypatch.setattr(parts, "ROWS_JOINED_MAX", joined_max)
    monkeypatch.setattr(parts, "ROWS_PER_FRAME_MAX", rows_max)
    keys = load.nodes.keys
    ends = EndRows(keys, np.full((len(keys), 3), 1_770_000_000_000_000, np.uint64))
    with closing(open_directory(disk.files())) as directory:
        append(directory, load)
        directory.forget([key.tobytes() for key in keys], [False] * len(keys))
        directory.note_ends(ends, 1)
        append(directory, load)
    with closing(open_directory(disk.files())) as directory:
        assert check_recovered(SPEC, directory) == set(load.names)
        found = directory.recovered_ends
        assert {key.tobytes() for key in found.keys} == {key.tobytes() for key in keys}
        assert (found.ends_us == ends.ends_us).all()


@pytest.mark.usefixtures("small_frames")
def test_the_power_goes_off_within_a_batch_of_several_frames() -> None:
    load = whole_load(SPEC, path_of(SPEC, range(100), b"salt"))
    other = whole_load(SPEC, path_of(SPEC, range(1000, 1030)))
    for change in range(1, 200):
        disk = ForgetfulDisk(seed=change)
        filled(disk, other)
        directory = open_directory(disk.files())
        disk.cut_after(change)
        is_durable = True
        try:
            append(directory, load)
        except OSError:
            is_durable = False
        directory.close()
        is_over = not disk.boots
        disk.cut_power()
        with closing(open_directory(disk.files())) as directory:
            found = check_recovered(SPEC, directory)
            assert set(other.names) <= found <= {*other.names, *load.names}
            assert not is_durable or found == {*other.names, *load.names}
            append(directory, load)
        with closing(open_directory(disk.files())) as directory:
            assert check_recovered(SPEC, directory) == {*other.names, *load.names}
        if is_over:
            return
    pytest.fail("an append takes fewer changes than that")


@pytest.mark.usefixtures("small_frames")
def test_a_node_that_no_frame_takes_is_refused_before_anything_is_written(
    disk: ForgetfulDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "JOURNAL_FRAME_BYTES_MAX", 5000)
    spec = dense(256)
    with closing(open_directory(disk.files(), spec)) as directory:
        load = whole_load(spec, path_of(spec, range(250)))
        before = contents(disk)
        with pytest.raises(ValueError, match="use smaller blocks"):
            append(directory, load)
        assert contents(disk) == before
        assert not directory.trouble
        small = whole_load(spec, path_of(spec, range(5)))
        append(directory, small)
    with closing(open_directory(disk.files(), spec)) as directory:
        assert check_recovered(spec, directory) == set(small.names)
