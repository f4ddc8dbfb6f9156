"""Operations on files that are waited for."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc.files import FileOperation
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.limits import SSD_SETTLE_S
from kvstore.tiers.ssd.memory import aligned, keep_for_ever

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.abc.files import FileBatch, Files


class OperationsError(OSError):
    """Some operations of a batch failed.

    Attributes:
        numbers: which ones.
    """

    def __init__(self, error: OSError, directory: str, numbers: Sequence[int]) -> None:
        super().__init__(error.errno or errno.EIO, error.strerror or str(error), error.filename or directory)
        self.numbers = tuple(numbers)


class UnsettledError(DeadlineError):
    """The deadline passed and what had begun does not end.

    Attributes:
        batch: what is under way.
        count: how many operations it has.
        memory: that the operations still use, kept here.
    """

    def __init__(self, message: str, batch: FileBatch, count: int, memory: object) -> None:
        super().__init__(message)
        self.batch = batch
        self.count = count
        self.memory = memory


def move(
    files: Files, rows: Sequence[Sequence[int]] | npt.NDArray[np.uint64], deadline: Deadline, memory: object = None
) -> None:
    """Run operations, `[n, 5]`, and wait for all of them; `memory` is kept for those that do not end.

    Raises:
        OperationsError: some failed; all have ended.
        DeadlineError: they did not end by then, and were cancelled; all have ended.
        UnsettledError: they did not end by then, nor within `SSD_SETTLE_S` of being cancelled.
    """
    if not len(rows):
        return
    batch = files.submit(np.array(rows, np.uint64).reshape(-1, 5))
    try:
        batch.wait(len(rows), deadline)
    except DeadlineError:
        end(files.directory, batch, len(rows), memory)
        if not batch.errors():
            return
        raise
    errors = batch.errors()
    if errors:
        worst = min(errors)
        raise OperationsError(errors[worst], files.directory, sorted(errors)) from errors[worst]


def end(directory: str, batch: FileBatch, count: int, memory: object) -> None:
    """Begin no more of a batch, and wait for what was begun.

    Raises:
        UnsettledError: it does not end; `memory` is kept for it.
    """
    batch.cancel()
    try:
        batch.wait(count, Deadline.after(SSD_SETTLE_S))
    except DeadlineError as error:
        keep_for_ever((batch, memory))
        raise UnsettledError(
            f"{directory}: {error}, and those that were begun do not end", batch, count, memory
        ) from error


def sync(files: Files, numbers: Sequence[int], deadline: Deadline) -> None:
    """Make what was written to files safe. Raises as `move`."""
    move(files, [(FileOperation.SYNC, number, 0, 0, 0) for number in numbers], deadline)


def write(files: Files, file: int, offset: int, data: npt.NDArray[np.uint8], deadline: Deadline) -> None:
    """Write aligned memory. Raises as `move`."""
    move(files, [(FileOperation.WRITE, file, offset, data.ctypes.data, data.nbytes)], deadline, data)


def read(files: Files, file: int, offset: int, size_bytes: int, deadline: Deadline) -> npt.NDArray[np.uint8]:
    """Read whole pages; raises as `move`."""
    data = aligned(size_bytes)
    move(files, [(FileOperation.READ, file, offset, data.ctypes.data, data.nbytes)], deadline, data)
    return data
