"""Which records of a batch go to which drive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt


def stripe(sizes: npt.NDArray[np.int64], weights: Sequence[float]) -> npt.NDArray[np.int64]:
    """The number of the drive for each record, in the order in which they are read.

    Each goes to the drive that has got the least for its weight so far, so any stretch of a prefix is spread over
    all of them, and each gets its share.

    Args:
        sizes: bytes of each record.
        weights: of each drive, positive.
    """
    if len(weights) == 1:
        return np.zeros(len(sizes), np.int64)
    given = [0.0] * len(weights)
    chosen = np.empty(len(sizes), np.int64)
    for number, size in enumerate(sizes.tolist()):
        best = min(range(len(weights)), key=lambda drive: (given[drive] + size) / weights[drive])
        given[best] += size
        chosen[number] = best
    return chosen
