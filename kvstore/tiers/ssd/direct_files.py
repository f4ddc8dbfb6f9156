"""The files of a directory, by direct I/O: straight between the drive and the caller's memory, past the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import resource
import stat
import threading
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import FileEngine
from kvstore.abc.files import FileBatch, Files
from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.limits import FILE_ALIGN_BYTES, FILE_DEPTH_DEFAULT, FILES_IDLE_FRACTION, FILES_IDLE_MAX
from kvstore.tiers.ssd.engine import choose_engine
from kvstore.tiers.ssd.memory import keep_for_ever

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    import numpy.typing as npt

    from kvstore._native import FileEngineBatch
    from kvstore.clock import Deadline

O_DIRECT = getattr(os, "O_DIRECT", 0)
NOT_OFFERED = (errno.EINVAL, errno.EOPNOTSUPP)
"""What a file system answers that has no direct I/O."""


class DirectFiles(Files):
    """The files of one directory, moved by io_uring or by threads. Any thread.

    Where the file system has no direct I/O, the files are read and written through the page cache, and `why_not_better`
    says so. After a fork, every call in the child but `close` raises `StoreClosedError`.

    Args:
        directory: exists.
        engine: `io_uring` or `threads`; None takes the best, or what `KVSTORE_IO` says.
        depth: pieces under way at once.
        idle_max: files at rest that are kept open; by default a share of what this process may open.

    Raises:
        OSError: the directory cannot be opened, or the engine not started.
        UnavailableError: this engine cannot run here.
    """

    def __init__(
        self, directory: str, *, engine: str | None = None, depth: int = FILE_DEPTH_DEFAULT, idle_max: int | None = None
    ) -> None:
        self._is_closed = True
        choice = choose_engine(engine, depth=depth)
        self._path = os.fspath(directory)
        self._lock = threading.RLock()
        # Of what waits for the file system itself, which reads must not wait for.
        self._names_lock = threading.Lock()
        self._process = os.getpid()
        self._files: dict[int, _File] = {}
        self._next_file = 1
        # Those that rest and are open all the same, the one used the longest ago first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._idle_max = idle_max if idle_max is not None else _idle_max()
        self._directory = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._why_not_direct = _why_not_direct(self._directory)
            self._engine = choice.start()
        except BaseException:
            os.close(self._directory)
            raise
        self._choice = choice
        self._is_closed = False

    @property
    def directory(self) -> str:
        return self._path

    @property
    def engine(self) -> str:
        return f"{self._choice.name}, buffered" if self._why_not_direct else self._choice.name

    @property
    def why_not_better(self) -> str:
        """Why it is not io_uring with direct I/O; empty when it is."""
        return "; ".join(filter(None, (self._choice.why_not_better, self._why_not_direct)))

    def names(self) -> Mapping[str, int]:
        with self._named(""):
            found: dict[str, int] = {}
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    # One that goes while we look was not there.
                    with suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            found[entry.name] = entry.stat(follow_symlinks=False).st_size
            return found

    def create(self, name: str) -> int:
        with self._named(plain_name(name)):
            return self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def open(self, name: str, *, may_write: bool = False) -> int:
        with self._named(plain_name(name)):
            return self._open(name, os.O_RDWR if may_write else os.O_RDONLY)

    def size(self, file: int) -> int:
        with self._used(file) as used:
            return os.fstat(used.descriptor).st_size

    def truncate(self, file: int, size_bytes: int) -> None:
        with self._used(file) as used:
            os.ftruncate(used.descriptor, size_bytes)

    def rest(self, file: int) -> None:
        with self._opened(""):
            used = self._file(file)
            used.is_resting = True
            self._idle[file] = None
            self._close_idle(self._idle_max)

    def close_file(self, file: int) -> None:
        with self._opened(""):
            used = self._file(file)
            if used.descriptor >= 0:
                self._engine.remove_file(used.number)
            self._idle.pop(file, None)
            del self._files[file]
        if used.descriptor >= 0:
            os.close(used.descriptor)  # of a removed file that takes a while

    def remove(self, name: str) -> None:
        with self._named(plain_name(name)):
            os.unlink(name, dir_fd=self._directory)

    def sync_names(self) -> None:
        with self._named(""):
            os.fsync(self._directory)

    def free_bytes(self) -> int:
        with self._named(""):
            system = os.fstatvfs(self._directory)
            return system.f_bavail * system.f_frsize

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        # Before the lock, which another thread of the parent may have held at the fork.
        self._check_open()
        with self._lock:
            self._check_open()
            try:
                rows, names = self._numbered(operations)
                return _EngineBatch(self, self._engine, self._engine.submit(rows, is_urgent), names)
            except ValueError as error:
                raise ValueError(f"{self._path}: {error}") from None

    def close(self) -> None:
        if self._process != os.getpid():
            # The lock and the engine are the parent's; these descriptors are this process's own.
            if not self._is_closed:
                self._is_closed = True
                self._close_descriptors()
            return
        self._engine.close()
        with self._names_lock, self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._close_descriptors()

    def abandon(self) -> None:
        # Neither the end of this object nor that of the interpreter may wait for it.
        self._is_closed = True
        keep_for_ever(self._engine)

    def __del__(self) -> None:
        # An object that was never opened has nothing to close.
        if not self._is_closed:
            self.close()

    def _close_descriptors(self) -> None:
        for used in self._files.values():
            if used.descriptor >= 0:
                os.close(used.descriptor)
        os.close(self._directory)
        self._files.clear()
        self._idle.clear()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise StoreClosedError(
                f"the files of {self._path} are closed: they belong to the process that forked this one"
            )
        if self._is_closed:
            raise StoreClosedError(f"the files of {self._path} are closed")

    @contextmanager
    def _opened(self, name: str) -> Iterator[None]:
        """Open until the end of the body, whose errors name the file."""
        # Before the lock, which another thread of the parent may have held at the fork.
        self._check_open()
        with self._lock:
            self._check_open()
            with self._naming(name):
                yield

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """As `_opened`, for what is done with names: no other such call runs meanwhile, everything else does."""
        self._check_open()
        with self._names_lock:
            self._check_open()
            with self._naming(name):
                yield

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not isinstance(error, StoreClosedError):
                error.filename = os.path.join(self._path, name)
            raise

    @contextmanager
    def _used(self, file: int) -> Iterator[_File]:
        """A file that is open until the end of the body, whose errors name it."""
        known = self._files.get(file)
        with self._opened("" if known is None else known.name):
            yield self._woken(file)

    def _file(self, file: int) -> _File:
        if file not in self._files:
            raise ValueError(f"no file of {self._path} that is open has the number {file}")
        return self._files[file]

    def _open(self, name: str, flags: int) -> int:
        used = _File(name, flags)
        self._open_again(used)
        with self._lock:
            file = self._next_file
            self._next_file += 1
            self._files[file] = used
            return file

    # Files at rest

    def _numbered(self, operations: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint64], Mapping[int, str]]:
        """Operations with the numbers of the engine, and what each of its files is called."""
        if operations.dtype != np.uint64 or operations.ndim != 2 or operations.shape[1] != 5:
            return operations, {}  # the engine says what is wrong
        files, which = np.unique(operations[:, 1], return_inverse=True)
        listed = files.tolist()
        used = [self._woken(file, listed) for file in listed]
        rows = operations.copy()
        rows[:, 1] = np.array([each.number for each in used], np.uint64)[which.reshape(-1)]
        return rows, {each.number: each.name for each in used}

    def _woken(self, file: int, others: Collection[int] = ()) -> _File:
        """A file that is open, and stays so until what wants it and the others has been begun."""
        used = self._file(file)
        if used.descriptor < 0:
            try:
                self._open_again(used, others)
            except OSError as error:
                error.filename = os.path.join(self._path, used.name)
                raise
        if used.is_resting:
            self._idle[file] = None
            self._idle.move_to_end(file)
            if len(self._idle) > self._idle_max:
                self._close_idle(self._idle_max, but={file, *others})
        return used

    def _open_again(self, used: _File, others: Collection[int] = ()) -> None:
        flags = used.flags | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = self._open_descriptor(used.name, flags)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._close_idle(0, but=others):
                raise
            descriptor = self._open_descriptor(used.name, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            identity = status.st_dev, status.st_ino
            if used.identity not in (None, identity):
                raise FileNotFoundError(errno.ENOENT, "another file has taken its name")
            # It was asked for in case the name is a pipe's; with it io_uring would not wait for the drive.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            used.number = self._engine.add_file(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        used.descriptor, used.identity, used.flags = descriptor, identity, os.O_RDONLY

    def _close_idle(self, left_max: int, *, but: Collection[int] = ()) -> bool:
        """Close files that rest until so few are open, as far as nothing moves in them; whether any was closed."""
        with self._lock:
            before = len(self._idle)
            for file in list(self._idle)[: max(0, before - left_max)]:
                used = self._files[file]
                if file in but:
                    continue
                try:
                    self._engine.remove_file(used.number)
                except ValueError:  # it is being read
                    continue
                os.close(used.descriptor)
                used.descriptor = used.number = -1
                del self._idle[file]
            return len(self._idle) < before

    def _open_descriptor(self, name: str, flags: int) -> int:
        flags |= os.O_NONBLOCK
        if not self._why_not_direct:
            try:
                return os.open(name, flags | O_DIRECT, 0o600, dir_fd=self._directory)
            except OSError as error:
                if error.errno not in NOT_OFFERED:
                    raise
                # A file system without direct I/O makes the file all the same.
                flags &= ~os.O_EXCL
                descriptor = os.open(name, flags, 0o600, dir_fd=self._directory)
                self._why_not_direct = _refused(error)
                return descriptor
        return os.open(name, flags, 0o600, dir_fd=self._directory)


@dataclass(eq=False)
class _File:
    """A file that was opened.

    Attributes:
        name: of the file.
        flags: to open it with.
        descriptor, number: of the system and of the engine; -1 while it rests and is closed.
        identity: device and inode.
        is_resting: it may be closed until it is used again.
    """

    name: str
    flags: int
    descriptor: int = -1
    number: int = -1
    identity: tuple[int, int] | None = None
    is_resting: bool = False


class _EngineBatch(FileBatch):
    def __init__(
        self, files: DirectFiles, engine: FileEngine, native: FileEngineBatch, names: Mapping[int, str]
    ) -> None:
        self._path = files.directory
        self._engine = engine
        self._native = native
        self._names = names

    def wait(self, count: int, deadline: Deadline) -> npt.NDArray[np.int64]:
        if count > len(self._native):
            raise ValueError(f"the batch has {len(self._native)} operations, not {count}")
        ended = self._native.wait(count, deadline.at_s)
        if ended < count:
            raise DeadlineError(f"{ended} of {count} operations on files of {self._path} ended in time")
        return np.frombuffer(self._native.ended(), np.int64)

    def errors(self) -> Mapping[int, OSError]:
        rows = np.frombuffer(self._native.failures(), np.int64).reshape(-1, 5).tolist()
        return {
            number: OSError(code, _reason(code, offset, why), os.path.join(self._path, self._names.get(file, "")))
            for number, code, file, offset, why in rows
        }

    @property
    def descriptor(self) -> int:
        return self._native.descriptor

    def cancel(self) -> None:
        self._engine.cancel(self._native)


def plain_name(name: str) -> str:
    """The name, if it is one of a file directly in a directory.

    Raises:
        ValueError: it is none, or leads elsewhere.
    """
    if not name or "/" in name or "\0" in name or name in (".", ".."):
        raise ValueError(f"{name!r} is not the name of a file in a directory")
    return name


def _reason(code: int, offset: int, why: int) -> str:
    if why == FileEngine.WHY_FILE_END:
        return f"the file ends within what was to be read from {offset} on"
    if why == FileEngine.WHY_ENGINE:
        return f"io_uring itself has failed ({os.strerror(code)}); open the files again, or with KVSTORE_IO=threads"
    return os.strerror(code)


def _idle_max() -> int:
    """Files at rest that one directory keeps open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = FILES_IDLE_MAX if soft == resource.RLIM_INFINITY else int(soft * FILES_IDLE_FRACTION)
    return max(1, min(FILES_IDLE_MAX, allowed))


def _refused(error: OSError) -> str:
    return f"the file system refuses direct I/O ({error.strerror}), so all goes through the page cache"


def _why_not_direct(directory: int) -> str:
    """Why a directory's files cannot be moved by direct I/O, as far as a file without a name can tell; else empty."""
    if not O_DIRECT:
        return "this platform has no O_DIRECT, so all goes through the page cache"
    try:
        descriptor = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError:
        # A directory that is not written to, or a file system without such files: the first open will tell.
        return ""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | O_DIRECT)
        with mmap.mmap(-1, FILE_ALIGN_BYTES) as page:
            os.pwritev(descriptor, [page], 0)
            os.preadv(descriptor, [page], 0)
    except OSError as error:
        return _refused(error) if error.errno in NOT_OFFERED else ""
    finally:
        os.close(descriptor)
    return ""
