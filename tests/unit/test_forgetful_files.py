"""The disk that forgets: what is safe survives every power cut, and what is not does not always."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.testing.files import PAGE, READ, WRITE, Memory, file_of, rows, run, run_well, sync
from kvstore.testing.forgetful_disk import SECTOR_BYTES, Fault, ForgetfulDisk
from kvstore.testing.resources import Background

if TYPE_CHECKING:
    from kvstore.abc.files import Files

SEEDS = range(60)


def safe_file(files: Files, name: str, content: Memory) -> int:
    file = file_of(files, name, content)
    run_well(files, [sync(file)])
    files.sync_names()
    return file


@pytest.mark.parametrize("seed", SEEDS)
def test_what_was_synced_survives(seed: int) -> None:
    disk = ForgetfulDisk(seed=seed)
    content = Memory(4 * PAGE).fill(seed)
    safe_file(disk.files(), "file", content)
    for _ in range(3):
        disk.cut_power()
    assert disk.peek("file") == content.bytes()
    assert disk.files().names() == {"file": 4 * PAGE}


def test_what_was_not_synced_is_kept_lost_or_torn() -> None:
    """Sector by sector, each old or new, and every mixture comes."""
    kinds = set()
    for seed in SEEDS:
        disk = ForgetfulDisk(seed=seed)
        files = disk.files()
        old, new = Memory(2 * PAGE).fill(1), Memory(2 * PAGE).fill(2)
        file = safe_file(files, "file", old)
        run_well(files, [(WRITE, file, 0, new.address(), 2 * PAGE)])
        disk.cut_power()
        seen = disk.peek("file")
        assert len(seen) == 2 * PAGE
        for at in range(0, 2 * PAGE, SECTOR_BYTES):
            sector = seen[at : at + SECTOR_BYTES]
            assert sector in (old.bytes(at, SECTOR_BYTES), new.bytes(at, SECTOR_BYTES))
        kinds.add("kept" if seen == new.bytes() else "lost" if seen == old.bytes() else "torn")
    assert kinds == {"kept", "lost", "torn"}


def test_a_file_that_grew_has_any_size_afterwards() -> None:
    sizes = set()
    for seed in SEEDS:
        disk = ForgetfulDisk(seed=seed)
        files = disk.files()
        content = Memory(4 * PAGE).fill(1)
        file = safe_file(files, "file", Memory(PAGE).fill(2))
        run_well(files, [(WRITE, file, PAGE, content.address(), 4 * PAGE)])
        disk.cut_power()
        sizes.add(len(disk.peek("file")))
    assert {PAGE, 5 * PAGE} < sizes


def test_names_survive_by_sync_names_only() -> None:
    found = set()
    for seed in SEEDS:
        disk = ForgetfulDisk(seed=seed)
        files = disk.files()
        safe_file(files, "safe", Memory(PAGE))
        safe_file(files, "removed", Memory(PAGE))
        run_well(files, [sync(files.create("new"))])
        files.remove("removed")
        disk.cut_power()
        assert "safe" in disk.names
        found.add(frozenset(disk.names) - {"safe"})
    assert found == {frozenset(names) for names in ((), ("new",), ("removed",), ("new", "removed"))}


def test_a_sync_covers_what_ended_before_it_was_submitted() -> None:
    """In one batch with the write, nothing is promised."""
    survived = set()
    for seed in SEEDS:
        disk = ForgetfulDisk(seed=seed)
        files = disk.files()
        content = Memory(PAGE).fill(1)
        file = safe_file(files, "file", Memory(PAGE))
        run_well(files, [(WRITE, file, 0, content.address(), PAGE), sync(file)])
        disk.cut_power()
        survived.add(disk.peek("file") == content.bytes())
    assert survived == {True, False}


def test_a_failed_sync_forgets() -> None:
    """As on Linux: the next sync succeeds, and the bytes are not safe. They are until the cut, as far as one sees."""
    disk = ForgetfulDisk(seed=3)
    files = disk.files()
    old, new = Memory(PAGE).fill(1), Memory(PAGE).fill(2)
    file = safe_file(files, "file", old)
    run_well(files, [(WRITE, file, 0, new.address(), PAGE)])
    disk.faults.append(Fault("sync", errno.EIO))
    assert {error.errno for error in run(files, [sync(file)]).errors().values()} == {errno.EIO}
    run_well(files, [sync(file)])
    assert disk.peek("file") == new.bytes()
    disk.cut_power()
    assert disk.peek("file") == old.bytes()


@pytest.mark.parametrize("change", range(1, 7))
def test_the_power_goes_off_in_the_middle(change: int) -> None:
    disk = ForgetfulDisk(seed=change)
    files = disk.files()
    content = Memory(PAGE).fill(1)
    disk.cut_after(change)
    done, number = 0, None
    try:
        file = files.create("file")
        done += 1
        for step in ((WRITE, file, 0, content.address(), PAGE), sync(file)):
            error = run(files, [step]).errors().get(0)
            if error is not None:
                raise error
            done += 1
        files.truncate(file, 2 * PAGE)
        done += 1
        files.sync_names()
        done += 1
        files.remove("file")
        done += 1
    except OSError as error:
        number = error.errno
    assert number == errno.EIO
    assert done == change - 1
    assert disk.boots == 1
    with pytest.raises(OSError, match="power"):
        files.names()
    if change == 6:
        assert disk.files().names() in ({}, {"file": PAGE}, {"file": 2 * PAGE})


def test_chosen_errors() -> None:
    disk = ForgetfulDisk(seed=1)
    files = disk.files()
    content = Memory(2 * PAGE).fill(1)
    file = file_of(files, "file", content)
    disk.faults += [
        Fault("write", errno.EROFS, name="file", skip=1),
        Fault("read", errno.EIO, is_short=True),
        Fault("create", errno.ENOSPC, times=None),
    ]
    write = (WRITE, file, 0, content.address(), PAGE)
    run_well(files, [write])
    assert run(files, [write]).errors()[0].errno == errno.EROFS
    run_well(files, [write])
    into = Memory(2 * PAGE)
    read = (READ, file, 0, into.address(), 2 * PAGE)
    assert run(files, [read]).errors()[0].errno == errno.EIO
    assert into.bytes() == content.bytes(0, PAGE) + bytes(PAGE)
    run_well(files, [read])
    for _ in range(3):
        with pytest.raises(OSError, match="No space"):
            files.create("another")
    disk.faults.clear()
    files.create("another")


def test_a_full_disk() -> None:
    disk = ForgetfulDisk(seed=1, capacity_bytes=3 * PAGE)
    files = disk.files()
    content = Memory(2 * PAGE).fill(1)
    file = file_of(files, "file", content)
    assert files.free_bytes() == PAGE
    more = (WRITE, file, 2 * PAGE, content.address(), 2 * PAGE)
    assert run(files, [more]).errors()[0].errno == errno.ENOSPC
    run_well(files, [(WRITE, file, 0, content.address(), 2 * PAGE)])
    files.truncate(file, 9 * PAGE)  # a hole takes no room
    assert files.free_bytes() == PAGE
    files.truncate(file, 0)
    assert files.free_bytes() == 3 * PAGE
    run_well(files, [(*more[:2], 0, *more[3:])])


def test_held_operations_wait() -> None:
    disk = ForgetfulDisk(seed=1)
    files = disk.files()
    content = Memory(4 * PAGE).fill(1)
    file = files.create("file")
    disk.hold()
    batch = files.submit(rows(*((WRITE, file, page * PAGE, content.address(page * PAGE), PAGE) for page in range(4))))
    with pytest.raises(DeadlineError):
        batch.wait(1, Deadline.after(0))
    with pytest.raises(ValueError, match="ended"):
        files.close_file(file)
    assert disk.release(2) == 2
    assert len(batch.wait(2, Deadline.after(0))) == 2
    batch.cancel()
    assert len(batch.wait(4, Deadline.after(0))) == 4
    assert [error.errno for error in batch.errors().values()] == [errno.ECANCELED] * 2
    disk.release()
    run_well(files, [(WRITE, file, 0, content.address(), PAGE)])


def test_what_has_begun_is_not_cancelled() -> None:
    disk = ForgetfulDisk(seed=1)
    files = disk.files()
    content = Memory(PAGE).fill(1)
    file = files.create("file")
    disk.hold(is_begun=True)
    batch = files.submit(rows((WRITE, file, 0, content.address(), PAGE)))
    batch.cancel()
    closing = Background(files.close)
    with pytest.raises(DeadlineError):
        batch.wait(1, Deadline.after(0.05))
    disk.release()
    closing.result(30)
    assert batch.errors() == {}
    assert disk.peek("file") == content.bytes()


def test_damage_by_hand() -> None:
    disk = ForgetfulDisk(seed=1)
    content = Memory(PAGE).fill(1)
    safe_file(disk.files(), "file", content)
    disk.flip("file", 8 * 100 + 3)
    seen = disk.peek("file")
    assert [at for at in range(PAGE) if seen[at] != content.bytes()[at]] == [100]
    assert seen[100] ^ content.bytes()[100] == 8
    disk.rename("file", "other")
    disk.cut_file("other", 100)
    disk.cut_power()
    assert disk.files().names() == {"other": 100}
    disk.delete("other")
    disk.cut_power()
    assert disk.files().names() == {}
