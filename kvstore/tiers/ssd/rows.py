"""Nodes and records as arrays: what an append takes, what a recovery gives, and what the journal holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

from kvstore.keys import KEY_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

GROUP, SPAN, START, STOP = range(4)
"""Columns of `RecordRows.name`."""
SEGMENT, OFFSET, SLOT_BYTES = range(3)
"""Columns of `RecordRows.place`."""
ENDLESS_US = (1 << 64) - 1
"""The end of what lasts."""


class TailIds(Sequence["npt.NDArray[np.uint32]"]):
    """Token ids of tails, by node; empty for whole blocks. Most are, so they are kept in one array.

    Attributes:
        ids: of all tails, one after the other, uint32.
        ends: where in `ids` those of each node end, int64 `[n]`.
    """

    def __init__(self, ids: npt.NDArray[np.uint32], ends: npt.NDArray[np.int64]) -> None:
        self.ids = ids
        self.ends = ends

    @classmethod
    def of(cls, tails: Sequence[npt.NDArray[np.uint32]]) -> TailIds:
        """Any sequence of arrays."""
        if isinstance(tails, TailIds):
            return tails
        lengths = np.fromiter(map(len, tails), np.int64, len(tails))
        ids = np.concatenate([np.empty(0, np.uint32), *(np.asarray(tail, np.uint32) for tail in tails if len(tail))])
        return cls(ids, np.cumsum(lengths))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each node's tail, `[n]`."""
        return np.diff(self.ends, prepend=np.int64(0))

    def taken(self, numbers: npt.NDArray[np.int64]) -> TailIds:
        """Those of these nodes, in their order."""
        lengths = self.lengths[numbers]
        ends = np.cumsum(lengths)
        # Positions in the new array, each moved to where its tail lies in the old one.
        shifts = self.ends[numbers] - ends
        return TailIds(self.ids[np.arange(ends[-1] if len(ends) else 0) + np.repeat(shifts, lengths)], ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.uint32]: ...
    @overload
    def __getitem__(self, index: slice) -> TailIds: ...
    def __getitem__(self, index: int | slice) -> npt.NDArray[np.uint32] | TailIds:
        if isinstance(index, slice):
            return self.taken(np.arange(len(self))[index])
        number = range(len(self))[index]
        return self.ids[self.ends[number - 1] if number else 0 : self.ends[number]]


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

    def taken(self, numbers: npt.NDArray[np.int64]) -> NodeRows:
        """Those of these numbers, in their order, with the roots that they need."""
        used, root = np.unique(self.root[numbers], return_inverse=True)
        return NodeRows(
            self.keys[numbers],
            self.parents[numbers],
            self.end_tokens[numbers],
            TailIds.of(self.tail_ids).taken(numbers),
            root.astype(np.int32).reshape(-1),
            tuple(self.roots[number] for number in used.tolist()),
        )

    @classmethod
    def empty(cls) -> NodeRows:
        """No nodes."""
        keys = np.empty((0, KEY_BYTES), np.uint8)
        return cls(keys, keys, np.empty(0, np.uint32), TailIds.of(()), np.empty(0, np.int32), ())


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

    def taken(self, numbers: npt.NDArray[np.int64]) -> RecordRows:
        """Those of these numbers, in their order, with the digests that they need; nodes are numbered as before."""
        used, grids = np.unique(self.grids[numbers], return_inverse=True)
        return RecordRows(
            self.node[numbers],
            self.name[numbers],
            grids.astype(np.int32).reshape(-1),
            tuple(self.digests[number] for number in used.tolist()),
            self.cost_us[numbers],
            self.place[numbers],
            self.metadata_crc32c[numbers],
        )

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


@dataclass(frozen=True)
class EndRows:
    """Until when nodes are wanted, `k` of them. A later row of a node replaces an earlier one; who has none lasts.

    Attributes:
        keys: prefix keys, uint8 `[k, 32]`.
        ends_us: wall-clock microseconds since 1970 of the node's attention, of its states, and of the prompts that end
            there, uint64 `[k, 3]`. `ENDLESS_US` has no end; 0 is not there.
    """

    keys: npt.NDArray[np.uint8]
    ends_us: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.keys)

    def taken(self, numbers: npt.NDArray[np.int64]) -> EndRows:
        """Those of these numbers, in their order."""
        return EndRows(self.keys[numbers], self.ends_us[numbers])

    @classmethod
    def join(cls, parts: Sequence[EndRows]) -> EndRows:
        """One after the other."""
        empty = cls.empty()
        return cls(
            np.concatenate([empty.keys, *(each.keys for each in parts)]),
            np.concatenate([empty.ends_us, *(each.ends_us for each in parts)]),
        )

    @classmethod
    def empty(cls) -> EndRows:
        """No nodes."""
        return cls(np.empty((0, KEY_BYTES), np.uint8), np.empty((0, 3), np.uint64))
