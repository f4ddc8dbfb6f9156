"""Nodes and records as arrays: what an append takes, what a recovery gives, and what the journal holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

GROUP, SPAN, START, STOP = range(4)
"""Columns of `RecordRows.name`."""
SEGMENT, OFFSET, SLOT_BYTES = range(3)
"""Columns of `RecordRows.place`."""


@dataclass(frozen=True)
class NodeRows:
    """Prefix nodes, one a row, `n` of them. A parent that is not among them is a root, or was given before.

    Attributes:
        keys: prefix keys, uint8 `[n, 32]`; each once.
        parents: key of the node before, the root's for the first, uint8 `[n, 32]`.
        end_tokens: length of the prefix at whose end the node lies, uint32 `[n]`.
        tail_ids: of a tail, its token ids, uint32; empty for whole blocks.
        root: number in `roots` of the root that the chain starts from, int32 `[n]`.
        roots: root key and salt, each once.
    """

    keys: npt.NDArray[np.uint8]
    parents: npt.NDArray[np.uint8]
    end_tokens: npt.NDArray[np.uint32]
    tail_ids: Sequence[npt.NDArray[np.uint32]]
    root: npt.NDArray[np.int32]
    roots: tuple[tuple[bytes, bytes], ...]

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def empty(cls) -> NodeRows:
        """No nodes."""
        keys = np.empty((0, KEY_BYTES), np.uint8)
        return cls(keys, keys, np.empty(0, np.uint32), (), np.empty(0, np.int32), ())


@dataclass(frozen=True)
class RecordRows:
    """Records, one a row, `m` of them.

    Attributes:
        node: row of the record's node in the `NodeRows` beside, int32 `[m]`.
        name: group, span, first unit and the unit after the last, uint16 `[m, 4]`.
        grids: number in `digests` of its chunk grid, int32 `[m]`.
        digests: chunk grid digests, each once, 32 bytes.
        cost_us: microseconds of prefill that it saves, uint64 `[m]`.
        place: segment number, offset in its file and slot bytes, uint64 `[m, 3]`. An append takes the slot bytes only.
        metadata_crc32c: the checksum in the record's own metadata, uint32 `[m]`; an append reads it from the record.
    """

    node: npt.NDArray[np.int32]
    name: npt.NDArray[np.uint16]
    grids: npt.NDArray[np.int32]
    digests: tuple[bytes, ...]
    cost_us: npt.NDArray[np.uint64]
    place: npt.NDArray[np.uint64]
    metadata_crc32c: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.node)

    @classmethod
    def empty(cls) -> RecordRows:
        """No records."""
        return cls(
            np.empty(0, np.int32),
            np.empty((0, 4), np.uint16),
            np.empty(0, np.int32),
            (),
            np.empty(0, np.uint64),
            np.empty((0, 3), np.uint64),
            np.empty(0, np.uint32),
        )
