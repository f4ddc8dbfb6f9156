"""Waiting for some of the reads of a load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.placement.ssd.loading import _Reads

if TYPE_CHECKING:
    import numpy.typing as npt


class LastFirst:
    """Reads that end one per wait, the last one first, whatever the deadline: the drive is busy, not stuck."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.ended = 0

    def wait(self, count: int, deadline: Deadline) -> npt.NDArray[np.int64]:
        self.ended = min(self.ended + 1, self.count)
        return np.arange(self.count - self.ended, self.count)


def reads(count: int) -> Any:
    batch: Any = LastFirst(count)
    drive: Any = None
    return _Reads(drive, np.arange(count), batch)


def test_a_deadline_holds_while_other_reads_end() -> None:
    waited = reads(6)
    for _ in range(2):
        with pytest.raises(DeadlineError, match="needed first"):
            waited.wait_first(1, Deadline.after(0.0))
    told = waited.wait_first(1, Deadline.after(30.0)).tolist()
    assert told == [0, 1, 2, 3, 4, 5], "what ended before the deadline is told, too"
    assert waited.wait_first(6, Deadline.after(0.0)).tolist() == []
