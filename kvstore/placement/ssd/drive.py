"""One directory of the tier: what lives in which of its segments, and how it fares."""

from __future__ import annotations

import errno
import logging
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvstore.limits import SSD_READ_ERRORS_MAX
from kvstore.units import format_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.abc.files import Files
    from kvstore.tiers.ssd.directory import SsdDirectory

LOG = logging.getLogger("kvstore.ssd")


NO_FILES = (errno.EMFILE, errno.ENFILE)
"""Too many files are open: nothing that a drive could help."""


class Drive:
    """A directory as the shelf sees it. The shelf's lock guards it; the directory is used outside of that.

    Attributes:
        number: in the slots of the index.
        directory, files: it itself.
        capacity_bytes: of all its files together.
        live_bytes: of records in the index, by segment; segments without any are missing.
        live_records: how many there are.
        pins: how many holds name a record of a segment, in the index or not any more.
        may_write: whether anything is written to it.
        has_forgotten: whether rows of forgotten records wait in the directory to be written.
        rewritten_bytes: size of the journal when it was last rewritten.
    """

    def __init__(self, number: int, directory: SsdDirectory, files: Files, capacity_bytes: int) -> None:
        self.number = number
        self.directory = directory
        self.files = files
        self.capacity_bytes = capacity_bytes
        self.live_bytes: Counter[int] = Counter()
        self.live_records = 0
        self.pins: Counter[int] = Counter()
        self.may_write = True
        self.has_forgotten = False
        self.rewritten_bytes = 0
        self._trouble = ""
        self._passing_trouble = ""
        self._read_errors = 0

    @property
    def trouble(self) -> str:
        """Why it does not work as it should, in a sentence; empty when it does."""
        return self._trouble or self._passing_trouble

    @property
    def limit_bytes(self) -> int:
        """What its files may take: its capacity, or what the file system has left."""
        try:
            return min(self.capacity_bytes, self.directory.used_bytes + self.files.free_bytes())
        except OSError:
            return self.capacity_bytes

    # What lives

    def add(self, segments: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64]) -> None:
        """Records came into the index."""
        self._count(segments, sizes, 1)

    def subtract(self, segments: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64]) -> None:
        """Records left the index."""
        self._count(segments, sizes, -1)

    def _count(self, segments: npt.NDArray[np.uint64], sizes: npt.NDArray[np.uint64], sign: int) -> None:
        self.live_records += sign * len(segments)
        numbers, inverse = np.unique(segments, return_inverse=True)
        for number, size in zip(numbers.tolist(), np.bincount(inverse, sizes).tolist(), strict=True):
            self.live_bytes[number] += sign * int(size)
            if not self.live_bytes[number]:
                del self.live_bytes[number]

    def pin(self, segments: npt.NDArray[np.uint64]) -> None:
        """Somebody may read these segments until `unpin`; each is named once."""
        self.pins.update(segments.tolist())

    def unpin(self, segments: npt.NDArray[np.uint64]) -> bool:
        """Whether there is a segment now that nobody reads and in which nothing lives."""
        is_any_dead = False
        for number in segments.tolist():
            self.pins[number] -= 1
            if not self.pins[number]:
                del self.pins[number]
                is_any_dead |= not self.live_bytes.get(number)
        return is_any_dead

    # How it fares

    def note_written(self) -> None:
        """A write has succeeded."""
        if self._passing_trouble:
            LOG.warning("%s: records are written there again", self.files.directory)
        self._passing_trouble = ""

    def note_no_room(self, size_bytes: int) -> None:
        """There was no room for a batch, and none could be made."""
        self._passing_trouble = (
            f"{self.files.directory}: no room for {format_bytes(size_bytes)}: what is there is being read, or the "
            "file system is full of other things"
        )

    def note_write_error(self, error: BaseException) -> None:
        """A write has failed. A full disk may have room again; of one that fails nobody knows what it has kept."""
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and not self.directory.trouble:
            self._pass_through(f"{self.files.directory}: the disk is full: {error}")
            return
        if isinstance(error, OSError) and error.errno in NO_FILES and not self.directory.trouble:
            self._passing_trouble = f"{self.files.directory}: too many open files: {error}; raise the limit (ulimit -n)"
            return
        if isinstance(error, TimeoutError) and not self.directory.trouble:
            self._pass_through(f"{self.files.directory}: the disk is slow: {error}")
            return
        self._stop_writing(
            self.directory.trouble
            or f"{self.files.directory}: nothing is written there any more, since a write failed: {error}; "
            "look after the drive and open the store again"
        )

    def note_read_error(self, error: OSError) -> bool:
        """A read has failed; whether there were so many that the drive is to be left out."""
        self._read_errors += 1
        if self._read_errors < SSD_READ_ERRORS_MAX:
            return False
        self._stop_writing(
            f"{self.files.directory}: left out after {self._read_errors} reads failed, the last with: {error}; "
            "look after the drive and open the store again"
        )
        return True

    def _pass_through(self, trouble: str) -> None:
        """Logged once until a write succeeds."""
        if not self._passing_trouble:
            LOG.warning("%s; what is committed meanwhile may not be kept on disk", trouble)
        self._passing_trouble = trouble

    def _stop_writing(self, trouble: str) -> None:
        self.may_write = False
        if trouble != self._trouble:
            LOG.error("%s", trouble)
        self._trouble = trouble
