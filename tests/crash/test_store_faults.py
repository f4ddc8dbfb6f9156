"""What a file system and the people around it do to a store's directory: a named error, or a miss with a counter.

The store goes on serving from memory in each case, and what it serves is right.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.errors import ConfigError, KVStoreError, ShelfRefusedError, SsdDirectoryError
from kvstore.placement.tiered import TieredPool
from kvstore.testing.specs import check_lease, dense, hybrid, put_all
from kvstore.tiers.ssd import directory as directory_module
from kvstore.tiers.ssd import staging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.placement.shelf import ShelfStatistics
    from kvstore.spec import ModelSpec
    from kvstore.store import Store

SPEC = hybrid(4)
TEST_S = 30.0
COUNT = 6


def ids_of(number: int) -> tuple[int, ...]:
    return tuple(range(1000 * number, 1000 * number + 22))


def opened(path: Path, *, capacity: str = "64MiB", dram: str = "4MiB", spec: ModelSpec = SPEC) -> Store:
    return kvstore.open(spec, dram=dram, ssd=f"{path}:{capacity}")


def write(store: Store, number: int) -> None:
    with store.write(ids_of(number)) as writer:
        put_all(writer)
        writer.commit()


def served(store: Store, number: int) -> int:
    """How much of a prompt is read, and right."""
    try:
        match = store.match((*ids_of(number), 7))
        if not match:
            return 0
        with store.read(match, deadline_s=TEST_S) as lease:
            check_lease(lease, store.prompt(ids_of(number)[: lease.tokens]))
            return lease.tokens
    except KVStoreError:
        return 0


def shelf_of(store: Store) -> ShelfStatistics:
    assert isinstance(store.pool, TieredPool)
    return store.pool.statistics().shelves[0]


def forget_memory(store: Store) -> None:
    assert isinstance(store.pool, TieredPool)
    for number in range(COUNT):
        store.pool.evict_here(store.prompt(ids_of(number)).path.key(0))


def check_serves_from_memory(store: Store) -> None:
    """New prompts are written and read, whatever the disk does."""
    for number in (100, 101):
        write(store, number)
        assert served(store, number) == 22
    store.pool.check()


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """A directory with a few prompts."""
    path = tmp_path / "kv"
    with opened(path) as store:
        for number in range(COUNT):
            write(store, number)
        store.flush(TEST_S)
    return path


# File systems


@contextmanager
def mounted(tmp_path: Path, size: str) -> Iterator[Path]:
    """A small file system of its own: ext4 on a loop device, or one in memory."""
    place, image = tmp_path / "mounted", tmp_path / "image"
    place.mkdir()
    commands = [
        [
            ["truncate", "-s", size, image],
            ["mkfs.ext4", "-q", "-m", "0", image],
            ["mount", "-o", "loop,errors=remount-ro", image, place],
        ],
        [["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place]],
    ]
    for tries in commands:
        try:
            for command in tries:
                subprocess.run(command, check=True, capture_output=True, timeout=TEST_S)
            break
        except (OSError, subprocess.SubprocessError):
            continue
    else:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["mount", "-o", "remount,rw", place], check=False, capture_output=True)
        subprocess.run(["umount", place], check=False, capture_output=True)


def test_a_file_system_that_fills_up(tmp_path: Path) -> None:
    with mounted(tmp_path, "8M") as place, opened(place / "kv", dram="16MiB") as store:
        # Somebody else takes almost all of it.
        hog = place / "hog"
        write(store, 0)
        store.flush(TEST_S)
        free = os.statvfs(place)
        hog.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - (256 << 10))))
        refused = 0
        for number in range(1, 40):
            write(store, number)
            try:
                store.flush(TEST_S)
            except ShelfRefusedError as error:
                refused += error.reason == "full"
                assert "no room" in shelf_of(store).trouble or "disk is full" in shelf_of(store).trouble
        assert refused
        assert shelf_of(store).refused["full"] == refused
        assert all(served(store, number) for number in range(40))
        # There is room again: it goes on by itself.
        hog.unlink()
        with suppress(ShelfRefusedError):  # of what was read meanwhile, and offered again
            store.flush(TEST_S)
        write(store, 50)
        store.flush(TEST_S)
        assert not shelf_of(store).trouble
        forget_memory(store)
        store.pool.check()


def test_remounted_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path, "16M") as place:
        path = place / "kv"
        with opened(path) as store:
            for number in range(COUNT):
                write(store, number)
            store.flush(TEST_S)
            # As a kernel does that has found the file system damaged: files that are open do not prevent it.
            mounts = Path("/proc/mounts").read_text().splitlines()
            device = next(line.split()[0] for line in mounts if line.split()[1] == str(place))
            trigger = f"/sys/fs/ext4/{os.path.basename(device)}/trigger_fs_error"
            try:
                Path(trigger).write_text("a test")
            except OSError as error:
                pytest.skip(f"no file system can be made to fail here: {error}")
            write(store, 60)
            with pytest.raises(ShelfRefusedError):
                store.flush(TEST_S)
            assert shelf_of(store).trouble
            forget_memory(store)
            assert [served(store, number) for number in range(COUNT)] == [22] * COUNT
            check_serves_from_memory(store)


def test_opened_on_a_read_only_file_system(tmp_path: Path) -> None:
    with mounted(tmp_path, "16M") as place:
        path = place / "kv"
        with opened(path) as store:
            write(store, 0)
            store.flush(TEST_S)
        subprocess.run(["mount", "-o", "remount,ro", place], check=True, capture_output=True, timeout=TEST_S)
        with pytest.raises(SsdDirectoryError, match=r"[Rr]ead-only file system"):
            opened(path)
        with pytest.raises(SsdDirectoryError, match=r"[Rr]ead-only file system"):
            opened(place / "new")


def test_the_directory_is_removed_underneath(filled: Path) -> None:
    with opened(filled) as store:
        shutil.rmtree(filled)
        assert [served(store, number) for number in range(COUNT)] == [22] * COUNT  # who has files open keeps them
        write(store, 60)
        with pytest.raises(ShelfRefusedError):
            store.flush(TEST_S)
        assert shelf_of(store).trouble
        check_serves_from_memory(store)
    with opened(filled) as store:
        assert not served(store, 0)
        write(store, 0)
        store.flush(TEST_S)


# Files


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("segment-*"))


def damage(path: Path, how: str) -> None:
    files = segments(path)
    if how == "truncated":
        os.truncate(files[0], 6000)
    elif how == "emptied":
        os.truncate(files[0], 0)
    elif how == "flipped":
        with files[0].open("r+b") as file:
            content = bytearray(file.read())
            content[len(content) // 2 :: 512] = bytes(byte ^ 1 for byte in content[len(content) // 2 :: 512])
            file.seek(0)
            file.write(content)
    elif how == "renamed":
        files[0].rename(path / "segment-renamed")
    elif how == "deleted":
        files[0].unlink()
    elif how == "all_deleted":
        for file in files:
            file.unlink()
    elif how == "swapped":
        files[0].rename(path / "third")
        files[1].rename(files[0])
        (path / "third").rename(files[1])
    elif how == "a_directory":
        files[0].unlink()
        files[0].mkdir()
    elif how == "a_pipe":
        files[0].unlink()
        os.mkfifo(files[0])
    elif how == "a_link":
        files[0].rename(path.parent / "moved")
        files[0].symlink_to(path.parent / "moved")


HOWS = [
    "truncated", "emptied", "flipped", "renamed", "deleted", "all_deleted", "swapped", "a_directory", "a_pipe", "a_link"
]  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("is_open", [False, True], ids=["between runs", "while open"])
def test_files_that_somebody_damages(filled: Path, how: str, is_open: bool) -> None:
    if not is_open:
        damage(filled, how)
    with opened(filled) as store:
        if is_open:
            damage(filled, how)
        first = [served(store, number) for number in range(COUNT)]
        assert set(first) <= {0, *range(4, 23)}
        if how in ("truncated", "emptied", "flipped") or (how == "all_deleted" and not is_open):
            assert 0 in first or shelf_of(store).damaged_records
        check_serves_from_memory(store)
        # What was lost is written and kept anew.
        for number in range(COUNT):
            write(store, number)
        store.flush(TEST_S)
        assert [served(store, number) for number in range(COUNT)] == [22] * COUNT
    with opened(filled) as store:
        assert not shelf_of(store).trouble
        found = [served(store, number) for number in range(COUNT)]
        assert is_open or found == [22] * COUNT
        store.pool.check()


def test_a_journal_that_somebody_damages(filled: Path) -> None:
    (journal,) = filled.glob("journal-*")
    whole = journal.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4096], whole[: len(whole) // 2 + 100] + bytes(5000)):
        journal.write_bytes(content)
        copy = filled.parent / "copy"
        shutil.copytree(filled, copy)
        with opened(copy) as store:
            assert {served(store, number) for number in range(COUNT)} <= {0, *range(4, 23)}
            check_serves_from_memory(store)
            store.flush(TEST_S)
        with opened(copy) as store:
            assert served(store, 100) == 22
        shutil.rmtree(copy)


@pytest.mark.parametrize("what", ["journal", "manifest"])
def test_without_its_journal_or_manifest_it_is_refused_and_left_alone(filled: Path, what: str) -> None:
    for file in filled.glob(f"{what}*"):
        file.unlink()
    before = {file.name: file.read_bytes() for file in filled.iterdir() if file.is_file()}
    with pytest.raises(SsdDirectoryError, match=what):
        opened(filled)
    after = {file.name: file.read_bytes() for file in filled.iterdir() if file.is_file()}
    assert {name: after.get(name) for name in before if name != "lock"} == {
        name: content for name, content in before.items() if name != "lock"
    }


# Whose directory


def test_directories_that_are_not_ours(filled: Path, tmp_path: Path) -> None:
    with pytest.raises(SsdDirectoryError, match="of model 'test-hybrid'"):
        opened(filled, spec=dense(4))
    with opened(filled), pytest.raises(SsdDirectoryError, match=f"in use by process {os.getpid()}"):
        opened(filled)
    file = tmp_path / "file"
    file.write_bytes(b"content")
    with pytest.raises(SsdDirectoryError, match=r"Not a directory|File exists"):
        opened(file)
    assert file.read_bytes() == b"content"
    with pytest.raises(SsdDirectoryError, match="No such file"):
        opened(tmp_path / "missing" / "kv")
    others = tmp_path / "others"
    others.mkdir()
    (others / "thesis.txt").write_text("of somebody")
    with pytest.raises(SsdDirectoryError, match=r"thesis\.txt"):
        opened(others)
    assert [each.name for each in others.iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError):
        kvstore.open(SPEC, dram="1MiB", ssd=f"{filled}:1KiB")


def test_a_newer_format(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvstore.tiers.ssd import manifest

    before = {file.name for file in filled.iterdir()}
    monkeypatch.setattr(manifest, "DIRECTORY_VERSION", 0)
    with pytest.raises(SsdDirectoryError, match="format 1, this release knows 0; use the release"):
        opened(filled)
    assert {file.name for file in filled.iterdir()} == before


NOBODY = 65534


def test_permission_denied(filled: Path) -> None:
    """In a child that is nobody, since root may do everything."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    filled.chmod(0o700)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            try:
                opened(filled)
            except SsdDirectoryError as error:
                status = 0 if "Permission denied" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Limits


def test_few_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More segments than this process may open files."""
    path = tmp_path / "kv"
    count = 60
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        # Segments of one record.
        monkeypatch.setattr("kvstore.placement.ssd.opening.segment_bytes", lambda _: 1)
        with opened(path) as store:
            for number in range(count):
                write(store, number)
                store.flush(TEST_S)
            assert len(segments(path)) > 2 * limit
            forget_memory(store)
            assert [served(store, number) for number in range(COUNT)] == [22] * COUNT
        with opened(path) as store:
            assert [served(store, number) for number in range(count)] == [22] * count
            shelf = shelf_of(store)
            assert not shelf.trouble
            assert not shelf.damaged_records
            store.pool.check()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_files_may_be_open(filled: Path) -> None:
    """A process that has used up its files: nothing is lost, and it goes on once there are some again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with opened(filled) as store:
        taken: list[int] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        try:
            for number in range(COUNT):
                served(store, number)
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        forget_memory(store)
        assert [served(store, number) for number in range(COUNT)] == [22] * COUNT
        assert not shelf_of(store).damaged_records
        write(store, 60)
        store.flush(TEST_S)


def test_as_many_segments_as_there_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that seal each other's segments early: at the limit the oldest make room, as they do for bytes."""
    monkeypatch.setattr(directory_module, "SEGMENTS_MAX", 24)
    monkeypatch.setattr("kvstore.placement.ssd.room.SEGMENTS_MAX", 24)
    monkeypatch.setattr(staging, "OPEN_SEGMENTS_MAX", 1)
    with opened(tmp_path / "kv") as store:
        for number in range(20):
            write(store, number)
            store.flush(TEST_S)
        assert len(segments(tmp_path / "kv")) <= 24
        shelf = shelf_of(store)
        assert shelf.evicted_records
        assert not shelf.trouble
        assert served(store, 19) == 22
        store.pool.check()
