"""The files of a directory, by direct I/O: straight between the drive and the caller's memory, past the page cache."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import FileEngine
from kvstore.abc.files import FileBatch, Files
from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.limits import FILE_ALIGN_BYTES, FILE_DEPTH_DEFAULT
from kvstore.tiers.ssd.engine import choose_engine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

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

    Raises:
        OSError: the directory cannot be opened, or the engine not started.
        UnavailableError: this engine cannot run here.
    """

    def __init__(self, directory: str, *, engine: str | None = None, depth: int = FILE_DEPTH_DEFAULT) -> None:
        self._is_closed = True
        choice = choose_engine(engine, depth=depth)
        self._path = os.fspath(directory)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._descriptors: dict[int, int] = {}
        # Replaced and never changed, so that a batch keeps the names of its files.
        self._names: Mapping[int, str] = {}
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
        with self._opened(""):
            found: dict[str, int] = {}
            with os.scandir(self._directory) as entries:
                for entry in entries:
                    # One that goes while we look was not there.
                    with suppress(FileNotFoundError):
                        if entry.is_file(follow_symlinks=False):
                            found[entry.name] = entry.stat(follow_symlinks=False).st_size
            return found

    def create(self, name: str) -> int:
        with self._opened(plain_name(name)):
            return self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def open(self, name: str, *, may_write: bool = False) -> int:
        with self._opened(plain_name(name)):
            return self._open(name, os.O_RDWR if may_write else os.O_RDONLY)

    def size(self, file: int) -> int:
        with self._opened(self._names.get(file, "")):
            return os.fstat(self._descriptor(file)).st_size

    def truncate(self, file: int, size_bytes: int) -> None:
        with self._opened(self._names.get(file, "")):
            os.ftruncate(self._descriptor(file), size_bytes)

    def close_file(self, file: int) -> None:
        with self._opened(self._names.get(file, "")):
            descriptor = self._descriptor(file)
            self._engine.remove_file(file)
            del self._descriptors[file]
            self._names = {number: name for number, name in self._names.items() if number != file}
            os.close(descriptor)

    def remove(self, name: str) -> None:
        with self._opened(plain_name(name)):
            os.unlink(name, dir_fd=self._directory)

    def sync_names(self) -> None:
        with self._opened(""):
            os.fsync(self._directory)

    def free_bytes(self) -> int:
        with self._opened(""):
            system = os.fstatvfs(self._directory)
            return system.f_bavail * system.f_frsize

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        self._check_open()
        names = self._names
        try:
            return _EngineBatch(self, self._engine, self._engine.submit(operations, is_urgent), names)
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
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._close_descriptors()

    def __del__(self) -> None:
        # An object that was never opened has nothing to close.
        if not self._is_closed:
            self.close()

    def _close_descriptors(self) -> None:
        for descriptor in (*self._descriptors.values(), self._directory):
            os.close(descriptor)
        self._descriptors.clear()

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
            try:
                yield
            except OSError as error:
                if not isinstance(error, StoreClosedError):
                    error.filename = os.path.join(self._path, name)
                raise

    def _descriptor(self, file: int) -> int:
        if file not in self._descriptors:
            raise ValueError(f"no file of {self._path} that is open has the number {file}")
        return self._descriptors[file]

    def _open(self, name: str, flags: int) -> int:
        descriptor = self._open_descriptor(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            # It was asked for in case the name is a pipe's; with it io_uring would not wait for the drive.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            file = self._engine.add_file(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptors[file] = descriptor
        self._names = {**self._names, file: name}
        return file

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
