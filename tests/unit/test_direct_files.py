"""What the kit of files cannot see: direct I/O and its fall-back, the choice of an engine, forks, foreign names."""

from __future__ import annotations

import errno
import gc
import math
import os
import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kvstore._native import FileEngine, choose_file_engine, file_engines
from kvstore.clock import Deadline
from kvstore.errors import StoreClosedError, UnavailableError
from kvstore.limits import (
    FILE_ALIGN_BYTES,
    FILE_BATCH_OPERATIONS_MAX,
    FILE_DEPTH_MAX,
    FILE_OPERATIONS_MAX,
    FILE_PIECE_BYTES,
)
from kvstore.testing.files import PAGE, READ, WRITE, Memory, file_of, rows, run, run_well, sync
from kvstore.testing.resources import leaves_nothing
from kvstore.tiers.ssd import direct_files
from kvstore.tiers.ssd.direct_files import O_DIRECT, DirectFiles
from kvstore.tiers.ssd.engine import choose_engine

WHY_NO_RING = dict(file_engines(8))["io_uring"]
ENGINES = ("threads", *(() if WHY_NO_RING else ("io_uring",)))
each_engine = pytest.mark.parametrize("engine", ENGINES)


def test_limits_are_those_of_the_native_engine() -> None:
    assert FileEngine.ALIGN_BYTES == FILE_ALIGN_BYTES
    assert FileEngine.BATCH_OPERATIONS_MAX == FILE_BATCH_OPERATIONS_MAX
    assert FileEngine.OPERATIONS_MAX == FILE_OPERATIONS_MAX


# Engines


def test_an_engine_is_chosen_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVSTORE_IO", raising=False)
    best = choose_engine()
    assert (best.name, best.why_not_better) == (("threads", WHY_NO_RING) if WHY_NO_RING else ("io_uring", ""))
    named = choose_engine("threads")
    assert named.name == "threads"
    assert named.why_not_better
    monkeypatch.setenv("KVSTORE_IO", "threads")
    assert choose_engine().name == "threads"
    assert "KVSTORE_IO=threads forces it" in choose_engine().why_not_better


def test_an_engine_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnavailableError, match="magic"):
        choose_engine("magic")
    monkeypatch.setenv("KVSTORE_IO", "magic")
    with pytest.raises(UnavailableError, match="KVSTORE_IO=magic"):
        choose_engine()
    for depth in (0, FILE_DEPTH_MAX + 1):
        with pytest.raises(ValueError, match=str(depth)):
            choose_engine("threads", depth=depth)


def test_an_engine_of_nonsense() -> None:
    for depth, urgent_depth, piece_bytes in (
        (0, 1, 4096),
        (1 << 31, 1, 4096),
        (1, 1 << 31, 4096),
        (1, 1, 0),
        (1, 1, 4097),
    ):
        with pytest.raises(ValueError, match="an engine has a depth"):
            FileEngine("threads", depth, urgent_depth, piece_bytes)


@each_engine
def test_a_moment_that_is_none_has_passed(tmp_path: Path, engine: str) -> None:
    native = FileEngine(engine, 4, 2, PAGE)
    reading, writing = os.pipe()
    into = Memory(PAGE)
    if engine == "io_uring":  # threads cannot read a pipe at an offset, so nothing would be under way
        batch = native.submit(rows((READ, native.add_file(reading), 0, into.address(), PAGE)), False)
        assert batch.wait(1, math.nan) == batch.wait(1, -math.inf) == 0
        os.write(writing, bytes(PAGE))
        assert batch.wait(1, math.inf) == 1
    native.close()
    os.close(reading)
    os.close(writing)


@pytest.mark.skipif(bool(WHY_NO_RING), reason=f"no io_uring: {WHY_NO_RING}")
def test_a_ring_that_fails_says_so(tmp_path: Path) -> None:
    content = Memory(PAGE).fill(1)
    with closing(DirectFiles(str(tmp_path), engine="io_uring")) as files:
        file = file_of(files, "file", content)
        rings = [int(name) for name in os.listdir("/proc/self/fd") if "io_uring" in _target(name)]
        nothing = os.open("/dev/null", os.O_RDONLY)
        for ring in rings:
            os.dup2(nothing, ring, inheritable=False)
        os.close(nothing)
        # The first may be taken yet: the kernel looks at the ring when it is asked for more.
        for _ in range(2):
            batch = files.submit(rows((WRITE, file, 0, content.address(), PAGE), sync(file)))
            batch.wait(2, Deadline.after(30))
        errors = batch.errors()
        assert len(errors) == 2
        for error in errors.values():
            assert "io_uring itself has failed" in str(error)
            assert error.filename == str(tmp_path / "file")


LEAVING = """
import sys, tempfile, threading, time
import numpy as np
from kvstore._native import FileEngine

engine = FileEngine(sys.argv[1], 4, 2, 4096)
file = tempfile.TemporaryFile()
sync = np.array([[2, engine.add_file(file.fileno()), 0, 0, 0]], np.uint64)
batch = engine.submit(sync, False)
waits = threading.Event()

def wait():
    while True:
        waits.set()
        batch.wait(2, time.monotonic() + 0.01)  # of one

threading.Thread(target=wait, daemon=True).start()
waits.wait()
print("leaving", flush=True)
"""


@each_engine
def test_an_interpreter_that_ends_while_a_thread_waits(engine: str) -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING, engine], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


FORBIDDEN = """
import ctypes, os, struct, sys

# seccomp: io_uring_setup returns EPERM, all else is allowed
load, jump, give = 0x20, 0x15, 0x06
program = b"".join(
    struct.pack("HBBI", *step)
    for step in ((load, 0, 0, 0), (jump, 0, 1, 425), (give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000))
)
buffer = ctypes.create_string_buffer(program)
filters = struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filters, 0, 0):
    sys.exit(77)
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.testing.files import Memory, file_of, sync, run_well
files = DirectFiles(sys.argv[1])
file = file_of(files, "file", Memory(4096 * 300).fill(1))
run_well(files, [sync(file)])
files.close()
print(files.engine.partition(",")[0], "|", files.why_not_better)
"""


@pytest.mark.skipif(bool(WHY_NO_RING), reason="io_uring is missing here anyway")
def test_where_io_uring_is_forbidden(tmp_path: Path) -> None:
    """As a container's seccomp profile does it."""
    environment = {name: value for name, value in os.environ.items() if name != "KVSTORE_IO"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip("no seccomp filter may be set here")
    assert done.returncode == 0, done.stderr
    engine, _, why = done.stdout.strip().partition(" | ")
    assert engine == "threads"
    assert "forbidden" in why


# Direct I/O


@each_engine
def test_direct_io_is_used_where_there_is_some(tmp_path: Path, engine: str) -> None:
    with closing(DirectFiles(str(tmp_path), engine=engine)) as files:
        file = file_of(files, "file", Memory(PAGE).fill(1))
        flags = _flags_of(tmp_path / "file")
        assert bool(flags & O_DIRECT) == (files.engine == engine)
        assert not flags & os.O_NONBLOCK
        run_well(files, [sync(file)])


@each_engine
@pytest.mark.parametrize("is_noticed_at_open", [True, False])
def test_a_file_system_without_direct_io(
    tmp_path: Path, engine: str, is_noticed_at_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read and written all the same, past the end and all, and said."""
    open_file = os.open

    def refusing(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & O_DIRECT and path == "file":
            # Linux makes the file before it finds out.
            os.close(open_file(path, flags & ~O_DIRECT, mode, dir_fd=dir_fd))
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return open_file(path, flags, mode, dir_fd=dir_fd)

    if is_noticed_at_open:
        monkeypatch.setattr(direct_files, "_why_not_direct", lambda _: "this one has none")
    else:
        monkeypatch.setattr(os, "open", refusing)
    content, into = Memory(300 * PAGE).fill(1), Memory(300 * PAGE)
    with closing(DirectFiles(str(tmp_path), engine=engine)) as files:
        file = file_of(files, "file", content)
        run_well(files, [sync(file)])
        run_well(files, [(READ, file, 0, into.address(), 300 * PAGE)])
        assert into.bytes() == content.bytes()
        files.truncate(file, 2 * PAGE + 5)
        assert run(files, [(READ, file, PAGE, into.address(), 2 * PAGE)]).errors()[0].errno == errno.EIO
        assert files.engine == f"{engine}, buffered"
        assert "this one has none" in files.why_not_better or "refuses direct I/O" in files.why_not_better


def test_errors_name_the_file(tmp_path: Path) -> None:
    with closing(DirectFiles(str(tmp_path))) as files:
        file = file_of(files, "some-file", Memory(PAGE))
        into = Memory(PAGE)
        error = run(files, [(READ, file, 8 * PAGE, into.address(), PAGE)]).errors()[0]
        assert error.filename == str(tmp_path / "some-file")
        assert "ends" in str(error)
        assert str(8 * PAGE) in str(error)
        with pytest.raises(FileNotFoundError, match=str(tmp_path / "absent")):
            files.open("absent")
        batch = files.submit(rows((READ, file, 0, into.address(), PAGE)))
        batch.wait(1, Deadline.after(30))
        files.close_file(file)
        assert batch.errors() == {}


@each_engine
def test_a_full_disk_is_an_error_of_the_operation(tmp_path: Path, engine: str) -> None:
    """By a limit on file sizes, which every file system has: EFBIG instead of ENOSPC, on the same path."""
    program = """
import resource, signal, sys
from kvstore.testing.files import Memory, rows, run
from kvstore.tiers.ssd.direct_files import DirectFiles
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
files = DirectFiles(sys.argv[1], engine=sys.argv[2])
file = files.create("file")
content = Memory(3 << 20).fill(1)
batch = run(files, [(1, file, 0, content.address(), 1 << 20), (1, file, 1 << 20, content.address(), 2 << 20)])
print({number: error.errno for number, error in batch.errors().items()})
files.close()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), engine],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.strip() == str({1: errno.EFBIG}), done.stderr


# What leads elsewhere


def test_only_regular_files_of_the_directory(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside").write_bytes(bytes(PAGE))
    (inside / "link").symlink_to(tmp_path / "outside")
    (inside / "folder").mkdir()
    os.mkfifo(inside / "pipe")
    (inside / "file").write_bytes(bytes(PAGE))
    with leaves_nothing(), closing(DirectFiles(str(inside))) as files:
        assert files.names() == {"file": PAGE}
        for name in ("link", "folder", "pipe"):
            for may_write in (False, True):
                with pytest.raises(OSError, match=name):
                    files.open(name, may_write=may_write)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with leaves_nothing():
        with pytest.raises(FileNotFoundError):
            DirectFiles(str(tmp_path / "absent"))
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(NotADirectoryError):
            DirectFiles(str(tmp_path / "file"))


# Ends


@each_engine
def test_files_that_are_dropped_are_closed(tmp_path: Path, engine: str) -> None:
    with leaves_nothing():
        files = DirectFiles(str(tmp_path), engine=engine)
        content = Memory(FILE_PIECE_BYTES).fill(1)
        batch = files.submit(rows(*((WRITE, files.create("file"), 0, content.address(), FILE_PIECE_BYTES),)))
        del files
        gc.collect()
        assert len(batch.wait(1, Deadline.after(30))) == 1
        del batch


@each_engine
def test_a_forked_child_touches_nothing(tmp_path: Path, engine: str) -> None:
    content, into = Memory(64 * PAGE).fill(1), Memory(64 * PAGE)
    with closing(DirectFiles(str(tmp_path), engine=engine)) as files:
        file = file_of(files, "file", content)
        batch = files.submit(rows(*((READ, file, 0, into.address(), 64 * PAGE) for _ in range(50))))
        for _ in range(3):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = _refusals(files, batch, file)
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
        assert len(batch.wait(50, Deadline.after(30))) == 50
        assert batch.errors() == {}
        assert into.bytes() == content.bytes()
        run_well(files, [(WRITE, file, 0, content.address(), PAGE), sync(file)])


def _refusals(files: DirectFiles, batch: object, file: int) -> int:
    """In the child: 0 if everything is refused that would need the parent's threads."""
    from kvstore.abc.files import FileBatch

    assert isinstance(batch, FileBatch)
    calls = (
        files.names,
        lambda: files.size(file),
        lambda: files.create("new"),
        lambda: files.submit(rows(sync(file))),
        lambda: batch.wait(1, Deadline.after(1)),
        batch.errors,
        batch.cancel,
    )
    for call in calls:
        try:
            call()
        except StoreClosedError:
            continue
        return 2
    files.close()
    files.close()
    return 0


def _flags_of(path: Path) -> int:
    """Of a descriptor of this process that has the file open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                text = Path(f"/proc/self/fdinfo/{name}").read_text()
                return int(text.partition("flags:")[2].split()[0], 8)
        except FileNotFoundError:
            continue
    raise AssertionError(f"{path} is not open")


def test_native_choice_takes_a_name() -> None:
    assert choose_file_engine(8, "threads")[0] == "threads"
    assert np.array_equal([name for name, _ in file_engines(8)], ["io_uring", "threads"])


# Files at rest


def resting(directory: Path, engine: str, count: int = 6) -> tuple[DirectFiles, list[int]]:
    """Files of which one is kept open at rest; each holds its number."""
    files = DirectFiles(str(directory), engine=engine, idle_max=1)
    opened = [file_of(files, f"file {number}", Memory(PAGE).fill(number)) for number in range(count)]
    for file in opened:
        files.rest(file)
    return files, opened


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@each_engine
def test_files_at_rest_are_closed_until_they_are_read(tmp_path: Path, engine: str) -> None:
    with closing(DirectFiles(str(tmp_path), engine=engine)):
        few = descriptors()
    files, opened = resting(tmp_path, engine)
    with closing(files):
        assert descriptors() <= few + 1
        for number in (0, 3, 0, 5):
            into = Memory(PAGE)
            run_well(files, [(READ, opened[number], 0, into.address(), PAGE)])
            assert into.bytes() == Memory(PAGE).fill(number).bytes()
            assert files.size(opened[number]) == PAGE
            assert descriptors() <= few + 1
        intos = [Memory(PAGE) for _ in opened]
        run_well(files, [(READ, file, 0, into.address(), PAGE) for file, into in zip(opened, intos, strict=True)])
        assert [into.bytes() for into in intos] == [Memory(PAGE).fill(number).bytes() for number in range(6)]


@each_engine
def test_a_file_at_rest_that_went_or_was_replaced_has_gone(tmp_path: Path, engine: str) -> None:
    files, opened = resting(tmp_path, engine)
    with closing(files):
        (tmp_path / "file 0").unlink()
        (tmp_path / "file 1").rename(tmp_path / "file 2")
        for number in (0, 1, 2):
            with pytest.raises(FileNotFoundError, match=f"file {number}"):
                files.submit(rows((READ, opened[number], 0, Memory(PAGE).address(), PAGE)))
            files.close_file(opened[number])
        into = Memory(PAGE)
        run_well(files, [(READ, opened[3], 0, into.address(), PAGE)])
        assert into.bytes() == Memory(PAGE).fill(3).bytes()


@each_engine
def test_what_rests_gives_way_where_no_more_files_may_be_opened(tmp_path: Path, engine: str) -> None:
    with closing(DirectFiles(str(tmp_path), engine=engine, idle_max=1000)) as files:
        opened = [file_of(files, f"file {number}", Memory(PAGE).fill(number)) for number in range(20)]
        for file in opened:
            files.rest(file)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() - 1, hard))
        try:
            another = file_of(files, "another", Memory(PAGE).fill(99))
            assert files.size(opened[7]) == PAGE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert files.size(another) == PAGE
