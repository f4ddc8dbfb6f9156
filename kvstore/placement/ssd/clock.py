"""The pool's clock, which begins anew with the machine, and that by which a journal says when something ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from kvstore.pool.index import LASTING_US
from kvstore.pool.lifetimes import US_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt


class JournalClock:
    """Wall-clock time that runs with the pool's clock and never before what a journal tells (docs/tiers.md).

    Args:
        clock: the pool's, seconds.
        wall: the system's, seconds since 1970; asked once.
        told_us: the latest that a journal tells.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        told_us: int = 0,
    ) -> None:
        self._clock = clock
        self._shift_us = max(int(wall() * US_PER_S), told_us) - self.moment_us

    @property
    def moment_us(self) -> int:
        """By the pool's clock."""
        return int(self._clock() * US_PER_S)

    @property
    def wall_us(self) -> int:
        """By the journal's."""
        return self.moment_us + self._shift_us

    def to_wall(self, ends_us: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Moments of the pool's clock, as a journal has them."""
        return _shifted(ends_us, self._shift_us)

    def to_moments(self, ends_us: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """What a journal has, by the pool's clock."""
        return _shifted(ends_us, -self._shift_us)


def _shifted(ends_us: npt.NDArray[np.uint64], by_us: int) -> npt.NDArray[np.uint64]:
    """What has no end has none, what is not there is not; what ended before the clock began ends as it begins."""
    is_moment = (ends_us != 0) & (ends_us < np.uint64(1 << 62))
    moments = np.maximum(np.where(is_moment, ends_us, 0).astype(np.int64) + by_us, 1).astype(np.uint64)
    return np.where(is_moment, moments, np.where(ends_us == 0, 0, LASTING_US).astype(np.uint64))
