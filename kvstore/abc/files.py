"""The files of one directory of an SSD tier, and moving bytes between them and memory.

A seam of its own so that tests can cut the power: an implementation may forget what was not synced.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    from kvstore.clock import Deadline


class FileOperation(IntEnum):
    """What one row of a batch does."""

    READ = 0
    WRITE = 1
    SYNC = 2


class FileBatch(ABC):
    """Operations that were submitted together. Any thread.

    The memory that they name must stay as it is until every one of them has ended; `cancel` and `wait` to get there.
    """

    @abstractmethod
    def wait(self, count: int, deadline: Deadline) -> npt.NDArray[np.int64]:
        """Block until at least `count` operations have ended in all; the numbers of all that have, as they ended.

        Raises:
            DeadlineError: fewer ended by then; those that go on do so.
        """

    @abstractmethod
    def errors(self) -> Mapping[int, OSError]:
        """Of the operations that have ended, those that failed, by number. A short read or write is one (EIO)."""

    @property
    @abstractmethod
    def descriptor(self) -> int:
        """Readable when every operation has ended. It lives as long as this object."""

    @abstractmethod
    def cancel(self) -> None:
        """Do not begin what has not been begun: it ends with ECANCELED. What has been begun ends by itself."""


class Files(ABC):
    """The files of one directory, by name. Any thread may call any method.

    Operations of one batch may run in any order and at once. An operation that was submitted after another one had
    ended sees what that one did. What was written is safe from a crash of the machine after a SYNC of the file which
    was submitted after the write had ended; a new or removed name after `sync_names`.

    Addresses, offsets and sizes of reads and writes are multiples of `FILE_ALIGN_BYTES`.
    """

    @property
    @abstractmethod
    def directory(self) -> str:
        """Where they lie, for messages."""

    @property
    @abstractmethod
    def engine(self) -> str:
        """What moves the bytes: `io_uring`, `threads` ..., as `kvstore doctor` and metrics name it."""

    @abstractmethod
    def names(self) -> Mapping[str, int]:
        """Names and sizes in bytes of the regular files that are there.

        Raises:
            OSError: the directory cannot be read.
        """

    @abstractmethod
    def create(self, name: str) -> int:
        """A new, empty file, open for reading and writing; its number.

        Raises:
            FileExistsError: the name is taken. OSError: it could not be made.
        """

    @abstractmethod
    def open(self, name: str, *, may_write: bool = False) -> int:
        """An existing file; its number.

        Raises:
            OSError: it is not there or may not be opened so.
        """

    @abstractmethod
    def size(self, file: int) -> int:
        """Bytes of an open file."""

    @abstractmethod
    def truncate(self, file: int, size_bytes: int) -> None:
        """Cut an open file to a size, or make it longer by zeros that take no room. Durable after a SYNC."""

    def rest(self, file: int) -> None:  # noqa: B027  # one that does not count open files need not do anything
        """Nothing is written to it from here on, and all of it is safe: it may be closed until it is read again.

        Then it is found again by its name: one that was removed or replaced meanwhile has gone.
        """

    @abstractmethod
    def close_file(self, file: int) -> None:
        """Close it; its operations must have ended."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a name. Who has the file open keeps it. Raises `OSError` when it cannot be done."""

    @abstractmethod
    def sync_names(self) -> None:
        """Make names that came and went safe from a crash. Raises `OSError` when it cannot be done."""

    @abstractmethod
    def free_bytes(self) -> int:
        """What the file system says is left for this user."""

    @abstractmethod
    def submit(self, operations: npt.NDArray[np.uint64], *, is_urgent: bool = False) -> FileBatch:
        """Begin operations: `[n, 5]`, each a `FileOperation`, file number, offset, memory address, size in bytes.

        A SYNC ignores the last three. Urgent batches go before others that wait, others do not starve.

        Raises:
            ValueError: a row is none of these, or not aligned. OSError: a file that rested cannot be opened again:
                `FileNotFoundError` if it has gone. Nothing was begun.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for what has begun, and close everything. Idempotent."""

    def abandon(self) -> None:  # noqa: B027  # where nothing is waited for at the end, nothing need be done
        """Instead of `close`, where something does not end: whatever it uses stays as it is until this process ends."""
