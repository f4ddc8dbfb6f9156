"""The files of a disk that forgets (`kvstore.testing.forgetful_disk`), as a `kvstore.abc.files.Files`."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc.files import FileBatch, FileOperation, Files
from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.limits import FILE_ALIGN_BYTES
from kvstore.testing.forgetful_disk import Change, Inode, apply
from kvstore.tiers.ssd.direct_files import plain_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvstore.clock import Deadline
    from kvstore.testing.forgetful_disk import ForgetfulDisk


class ForgetfulFiles(Files):
    """The files of a `ForgetfulDisk`, open until the power is cut."""

    def __init__(self, disk: ForgetfulDisk) -> None:
        self.disk = disk
        self._boot = disk.boots
        self._open: dict[int, tuple[str, Inode, bool]] = {}
        self._next = 1
        self._batches: list[_Batch] = []
        self._is_closed = False

    @property
    def directory(self) -> str:
        return self.disk.directory

    @property
    def engine(self) -> str:
        return "memory"

    def names(self) -> Mapping[str, int]:
        with self.disk.lock:
            self._check("names", "")
            return {name: len(inode.seen) for name, inode in self.disk.names.items()}

    def create(self, name: str) -> int:
        with self.disk.lock:
            self._check("create", plain_name(name))
            if name in self.disk.names:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            inode = Inode()
            self.disk.change_name(name, inode)
            self.disk.count_change()
            return self._add(name, inode, may_write=True)

    def open(self, name: str, *, may_write: bool = False) -> int:
        with self.disk.lock:
            self._check("open", plain_name(name))
            if name not in self.disk.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            return self._add(name, self.disk.names[name], may_write=may_write)

    def size(self, file: int) -> int:
        with self.disk.lock:
            name, inode, _ = self._file(file)
            self._check("size", name)
            return len(inode.seen)

    def truncate(self, file: int, size_bytes: int) -> None:
        with self.disk.lock:
            name, inode, may_write = self._file(file)
            self._check("truncate", name)
            if not may_write:
                raise OSError(errno.EINVAL, "the file is open for reading only", name)
            self._change(inode, Change(self.disk.now(), size_bytes, None))

    def close_file(self, file: int) -> None:
        with self.disk.lock:
            self._file(file)
            if any(batch.uses(file) for batch in self._batches):
                raise ValueError(f"operations of file {file} have not ended")
            del self._open[file]

    def remove(self, name: str) -> None:
        with self.disk.lock:
            self._check("remove", plain_name(name))
            if name not in self.disk.names:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            self.disk.change_name(name, None)
            self.disk.count_change()

    def sync_names(self) -> None:
        with self.disk.lock:
            self._check("sync_names", "")
            self.disk.count_change()
            self.disk.save_names()

    def free_bytes(self) -> int:
        with self.disk.lock:
            self._check("free_bytes", "")
            return max(0, self.disk.capacity_bytes - self.disk.used_bytes)

    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        with self.disk.lock:
            self._check_open()
            rows = self._checked(operations)
            batch = _Batch(self.disk, rows[:, 1].tolist())
            self._batches = [other for other in self._batches if not other.has_ended]
            self._batches.append(batch)
            submitted = self.disk.now()
            order = list(range(len(rows)))
            self.disk.random.shuffle(order)
            for number in order:
                row = rows[number].tolist()

                self.disk.begin(
                    batch, partial(self._run_row, batch, number, row, submitted), partial(batch.end, number)
                )
            return batch

    def close(self) -> None:
        with self.disk.lock:
            self._is_closed = True
            batches = list(self._batches)
            for batch in batches:
                self.disk.drop_held(batch)
        for batch in batches:
            batch.wait_ended()
        with self.disk.lock:
            self._open.clear()
            self._batches.clear()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError(f"the files of {self.directory} are closed")

    def _check(self, what: str, name: str) -> None:
        self._check_open()
        self.disk.check(self._boot, what, name)

    def _add(self, name: str, inode: Inode, *, may_write: bool) -> int:
        number = self._next
        self._next += 1
        self._open[number] = (name, inode, may_write)
        return number

    def _file(self, file: int) -> tuple[str, Inode, bool]:
        self._check_open()
        if file not in self._open:
            raise ValueError(f"no file of {self.directory} that is open has the number {file}")
        return self._open[file]

    def _checked(self, operations: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        if operations.dtype != np.uint64 or operations.ndim != 2 or operations.shape[1] != 5:
            raise ValueError(f"operations are uint64 [n, 5], not {operations.dtype} {list(operations.shape)}")
        for kind, file, offset, address, size in operations.tolist():
            if kind not in set(FileOperation):
                raise ValueError(f"{kind} is no operation")
            self._file(file)
            if kind == FileOperation.SYNC:
                continue
            if size == 0 or address == 0 or any(value % FILE_ALIGN_BYTES for value in (offset, address, size)):
                raise ValueError(f"offset {offset}, address {address:#x}, size {size}: not multiples of 4096, or 0")
            if offset + size >= 1 << 63:
                raise ValueError(f"no file has {offset} + {size} bytes")
        return operations.copy()

    def _run_row(self, batch: _Batch, number: int, row: list[int], submitted: int) -> None:
        try:
            self._do(row, submitted)
        except OSError as error:
            batch.end(number, error)
        else:
            batch.end(number, None)

    def _do(self, row: list[int], submitted: int) -> None:
        kind, file, offset, address, size = row
        name, inode, may_write = self._open[file]
        if kind == FileOperation.SYNC:
            self._sync(name, inode, submitted)
            return
        if kind == FileOperation.READ:
            fault = self.disk.check(self._boot, "read", name)
            found = inode.seen[offset : offset + (size // 2 if fault else size)]
            ctypes.memmove(address, bytes(found), len(found))
            if len(found) < size:
                raise OSError(fault.number if fault else errno.EIO, f"the file ends at {len(inode.seen)}", name)
            return
        if not may_write:
            raise OSError(errno.EBADF, "the file is open for reading only", name)
        fault = self.disk.check(self._boot, "write", name)
        grown = max(0, offset + size - inode.used_bytes)
        if self.disk.used_bytes + grown > self.disk.capacity_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        data = ctypes.string_at(address, size // 2 if fault else size)
        self._change(inode, Change(self.disk.now(), offset, data))
        if fault:
            raise OSError(fault.number, os.strerror(fault.number), name)

    def _change(self, inode: Inode, change: Change) -> None:
        apply(inode.seen, change)
        end = change.offset + len(change.data or b"")
        inode.used_bytes = min(inode.used_bytes, end) if change.data is None else max(inode.used_bytes, end)
        inode.pending.append(change)
        self.disk.count_change()

    def _sync(self, name: str, inode: Inode, submitted: int) -> None:
        covered = [change for change in inode.pending if change.moment < submitted]
        try:
            self.disk.check(self._boot, "sync", name)
        except OSError:
            del inode.pending[: len(covered)]
            raise
        self.disk.count_change()
        for change in covered:
            apply(inode.safe, change)
        del inode.pending[: len(covered)]


class _Batch(FileBatch):
    def __init__(self, disk: ForgetfulDisk, files: list[int]) -> None:
        self._disk = disk
        self._files = files
        self._ended: list[int] = []
        self._errors: dict[int, OSError] = {}
        self._condition = threading.Condition(disk.lock)
        self._descriptor = os.eventfd(0 if files else 1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wait(self, count: int, deadline: Deadline) -> npt.NDArray[np.int64]:
        if count > len(self._files):
            raise ValueError(f"the batch has {len(self._files)} operations, not {count}")
        with self._condition:
            if not self._condition.wait_for(lambda: len(self._ended) >= count, deadline.remaining_s()):
                raise DeadlineError(f"{len(self._ended)} of {count} operations on {self._disk.directory} have ended")
            return np.array(self._ended, np.int64)

    def errors(self) -> Mapping[int, OSError]:
        with self._condition:
            return dict(self._errors)

    @property
    def descriptor(self) -> int:
        return self._descriptor

    def cancel(self) -> None:
        with self._condition:
            self._disk.drop_held(self)

    @property
    def has_ended(self) -> bool:
        return len(self._ended) == len(self._files)

    def uses(self, file: int) -> bool:
        return not self.has_ended and file in self._files

    def end(self, number: int, error: OSError | None) -> None:
        with self._condition:
            self._ended.append(number)
            if error is not None:
                self._errors[number] = error
            self._condition.notify_all()
            if self.has_ended:
                os.eventfd_write(self._descriptor, 1)

    def wait_ended(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self.has_ended)

    def __del__(self) -> None:
        os.close(self._descriptor)
