"""How much may be written per day: a bucket of bytes that fills with wall-clock time.

It survives a restart by a small file beside the segments, and approximately: what was written since the file was
last saved is forgotten.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c
from kvstore.abc.files import FileOperation
from kvstore.clock import Deadline
from kvstore.limits import FILE_ALIGN_BYTES, SSD_BUDGET_BURST_FRACTION
from kvstore.tiers.ssd.memory import aligned
from kvstore.tiers.ssd.moves import move

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc.files import Files

DAY_S = 86400.0
BUDGET_FILE = "budget"
_MAGIC = b"KVBUDGET"
_FORM = struct.Struct("<8sddI")
_FILE_DEADLINE_S = 10.0


@dataclass(frozen=True)
class BudgetState:
    """What of a budget outlives a process.

    Attributes:
        at_s: wall-clock time of it.
        left_bytes: what could be written then; negative after more was written than the bucket held.
    """

    at_s: float
    left_bytes: float

    def packed(self) -> bytes:
        body = _FORM.pack(_MAGIC, self.at_s, self.left_bytes, 0)[:-4]
        return body + struct.pack("<I", crc32c(body))

    @classmethod
    def unpacked(cls, data: bytes) -> BudgetState | None:
        """None if these bytes are no such thing."""
        if len(data) < _FORM.size:
            return None
        magic, at_s, left_bytes, checksum = _FORM.unpack_from(data)
        if magic != _MAGIC or checksum != crc32c(data[: _FORM.size - 4]):
            return None
        return cls(at_s, left_bytes)


class WriteBudget:
    """Bytes that may be written. Not thread-safe.

    In any 24 hours no more than `bytes_per_day` is allowed, and what one batch takes beyond: an eighth of it may be
    used at once, the rest comes evenly over the day.

    Args:
        bytes_per_day: None allows everything.
        state: where to go on from; None begins with a full bucket.
        now: wall-clock seconds.
    """

    def __init__(
        self,
        bytes_per_day: int | None,
        state: BudgetState | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._bytes_per_day = bytes_per_day
        self._now = now
        self._burst_bytes = (bytes_per_day or 0) * SSD_BUDGET_BURST_FRACTION
        self._at_s = now()
        self._left_bytes = self._burst_bytes
        if state is not None:
            self._left_bytes = min(state.left_bytes, self._burst_bytes)
            # A clock that went back tells nothing of the time in between.
            self._at_s = min(state.at_s, self._at_s)
        self._fill()

    @property
    def is_limited(self) -> bool:
        return self._bytes_per_day is not None

    def allows(self, size_bytes: int) -> bool:
        """Whether so much may be written now. What is larger than the bucket may be once that is full."""
        if self._bytes_per_day is None:
            return True
        self._fill()
        return self._left_bytes >= min(size_bytes, self._burst_bytes)

    def spend(self, size_bytes: int) -> None:
        """So much was written, allowed or not."""
        if self._bytes_per_day is not None:
            self._fill()
            self._left_bytes -= size_bytes

    def state(self) -> BudgetState:
        """What to go on from after a restart."""
        self._fill()
        return BudgetState(self._at_s, self._left_bytes)

    def _fill(self) -> None:
        now_s = self._now()
        per_s = (self._bytes_per_day or 0) * (1 - SSD_BUDGET_BURST_FRACTION) / DAY_S
        passed_s = max(0.0, now_s - self._at_s)
        self._left_bytes = min(self._burst_bytes, self._left_bytes + passed_s * per_s)
        self._at_s = now_s


def load_state(files: Files) -> BudgetState | None:
    """The state that was saved beside the segments; None if there is none that can be read."""
    try:
        if files.names().get(BUDGET_FILE, 0) < FILE_ALIGN_BYTES:
            return None
        number = files.open(BUDGET_FILE)
        try:
            return BudgetState.unpacked(_moved(files, number, FileOperation.READ, b""))
        finally:
            files.close_file(number)
    except (OSError, TimeoutError):
        return None


def save_state(files: Files, state: BudgetState) -> None:
    """Save it beside the segments.

    Raises:
        OSError, DeadlineError: it could not be.
    """
    is_there = BUDGET_FILE in files.names()
    number = files.open(BUDGET_FILE, may_write=True) if is_there else files.create(BUDGET_FILE)
    try:
        _moved(files, number, FileOperation.WRITE, state.packed())
    finally:
        files.close_file(number)


def _moved(files: Files, number: int, operation: FileOperation, data: bytes) -> bytes:
    """Read or write the file's only page."""
    page = aligned(FILE_ALIGN_BYTES)
    page[: len(data)] = np.frombuffer(data, np.uint8)
    row = [int(operation), number, 0, page.ctypes.data, FILE_ALIGN_BYTES]
    move(files, [row], Deadline.after(_FILE_DEADLINE_S), page)
    return page.tobytes()
