"""Until when what lies in several tiers is wanted: the same in all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.pool.index import LASTING_US

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.pool.path import NodePath

ATTENTION, STATES, PROMPTS = range(3)
"""Columns of `Ends.table`."""
NEW_US = 0
"""The end of what comes into an index and gets its own in the same step."""


class Ends:
    """Until when the nodes of one path are wanted, as the tier says from which they come.

    Whoever has it may be told another end while records are on their way: `table` is read when they arrive.

    Attributes:
        table: microseconds of the pool's clock, uint64 `[nodes, 3]`: of each node's attention, its states, and the
            prompts that end there. `LASTING_US` has no end, 0 is not there.
    """

    def __init__(self, table: npt.NDArray[np.uint64]) -> None:
        self.table = table

    @classmethod
    def lasting(cls, path: NodePath) -> Ends:
        """A prompt that lasts ends with the path."""
        table = np.full((len(path), 3), LASTING_US, np.uint64)
        table[:-1, STATES:] = 0
        return cls(table)

    @property
    def last_us(self) -> int:
        """When the resume point at the path's end does."""
        return int(self.table[-1].max())


def packed_keys(path: NodePath) -> bytes:
    """Keys of all nodes of a path, as the native index takes them."""
    return b"".join(path.node_keys)


def live_longer(ends: npt.NDArray[np.uint64], known: npt.NDArray[np.uint64]) -> bool:
    """Whether something that is there ends later than is known of it."""
    longer = ends > known
    longer[:, :PROMPTS] &= known[:, :PROMPTS] > 0
    return bool(longer.any())


def are_plain(ends: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Of each node whether all of it lasts, and no prompt ends there."""
    lasts = ((ends[:, :PROMPTS] == 0) | (ends[:, :PROMPTS] == LASTING_US)).all(axis=1)
    plain: npt.NDArray[np.bool_] = lasts & (ends[:, PROMPTS] == 0)
    return plain
