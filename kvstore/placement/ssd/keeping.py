"""What is to be kept: one resume point's records that are lacking, and batches of them as a directory takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import ShelfRefusedError
from kvstore.keys import KEY_BYTES
from kvstore.limits import SSD_APPEND_ROWS_MAX
from kvstore.placement.ends import NEW_US, packed_keys
from kvstore.pool.rows import COST_US, DIGEST, GROUP, NODE, SPAN, STOP, Rows
from kvstore.tiers.ssd.rows import NodeRows, RecordRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvstore._native import PrefixIndex, WriteSet
    from kvstore.handle import Handle
    from kvstore.placement.ends import Ends
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.index import PrefixIndex as Index
    from kvstore.pool.path import NodePath
    from kvstore.spec import ModelSpec


class Keeping:
    """A resume point that somebody wants kept.

    Attributes:
        ends: until when it is wanted.
        size_bytes: of what was lacking when it came.
        missing: what is lacking, from `begin` on.
        addresses, costs_us: of those.
        slots: where they lie, as they get there, `[n, 3]`.
        kept_bytes: of what has come into the index.
    """

    missing: Rows
    addresses: npt.NDArray[np.uint64]
    costs_us: npt.NDArray[np.uint64]
    slots: npt.NDArray[np.uint64]
    writes: WriteSet

    def __init__(
        self, spec: ModelSpec, path: NodePath, salt: bytes, placed: PlacedRows, ends: Ends, handle: Handle[int]
    ) -> None:
        self.path = path
        self.salt = salt
        self.ends = ends
        self.handle = handle
        self.size_bytes = 0
        self.kept_bytes = 0
        self._spec = spec
        self._placed = placed
        self._has_committed = False
        self._told: npt.NDArray[np.uint64] | None = None

    def plan(self, native: PrefixIndex) -> WriteSet:
        """What is lacking as the index is.

        Raises:
            ShelfRefusedError: it cannot be kept, whatever room there is.
        """
        rows = self._placed.rows
        table = np.ascontiguousarray(rows.table[:, [NODE, GROUP, SPAN, STOP - 1, STOP, DIGEST]])
        writes = native.plan(self.path.packed, table, b"".join(rows.digests))
        if writes.is_wrong_path:
            raise ShelfRefusedError("path", f"a path of {self.path.tokens} tokens contradicts what the SSD tier has")
        if writes.gap_node is not None:
            raise ShelfRefusedError(
                "gap",
                f"node {writes.gap_node} of {self.path.tokens} tokens cannot be kept: the attention before it is "
                "neither given nor in the SSD tier; give all records of the resume point",
            )
        return writes

    def lacking_bytes(self, writes: WriteSet) -> int:
        """Of what a plan found to be lacking."""
        return sum(Rows(self._spec, self.path, *writes.missing()).slot_sizes)

    def begin(self, native: PrefixIndex) -> None:
        """Rely on the path, and fix what is to be written. Raises as `plan`."""
        self.writes = self.plan(native)
        self.missing = Rows(self._spec, self.path, *self.writes.missing())
        positions = self._placed.rows.record_names.positions_of(self.missing.record_names)
        self.addresses = self._placed.addresses[positions]
        self.costs_us = self._placed.rows.table[positions, COST_US]
        self.slots = np.zeros((len(self.missing), 3), np.uint64)
        native.enter(self.writes, self.path.packed, self.salt, [], [])

    def commit(
        self, index: Index, numbers: npt.NDArray[np.int64], slots: npt.NDArray[np.uint64]
    ) -> npt.NDArray[np.bool_]:
        """These of `missing` are durable: whether each came into the index."""
        self._has_committed = True
        self.slots[numbers] = slots
        self.writes.set_slots(self.slots)
        ready = numbers.astype(np.uint64)
        given_back = index.commit(self.writes, ready, self.costs_us[numbers], ends_at_us=NEW_US)
        index.native.prolong(packed_keys(self.path), self.ends.table)
        taken: npt.NDArray[np.bool_] = ~np.isin(numbers, np.array(given_back, np.int64))
        self.kept_bytes += int(slots[taken, 2].sum())
        return taken

    def names(self, numbers: npt.NDArray[np.int64]) -> list[tuple[object, ...]]:
        """What tells these of `missing` from all other records."""
        return [
            (self.path.key(row[NODE]), *row[GROUP : STOP + 1], self.missing.digests[row[DIGEST]])
            for row in self.missing.table[numbers].tolist()
        ]

    def told(self) -> npt.NDArray[np.uint64]:
        """Until when it is wanted, as the journals are about to be told."""
        self._told = self.ends.table
        return self._told

    @property
    def has_other_ends(self) -> bool:
        """Whether the journals were told others."""
        return self._told is not None and self._told is not self.ends.table

    @property
    def has_committed(self) -> bool:
        """Whether some of it may be in the index."""
        return self._has_committed


@dataclass(frozen=True)
class Chunk:
    """Records that become durable together.

    Attributes:
        keepings: whose they are.
        owners, numbers: of each record, which of `keepings`, and which of its `missing`; `[n]`.
    """

    keepings: Sequence[Keeping]
    owners: npt.NDArray[np.int64]
    numbers: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.numbers)

    def _column(self, column: int) -> npt.NDArray[np.uint64]:
        return self._gather([keeping.missing.table[:, column] for keeping in self.keepings])

    def _gather(self, columns: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
        gathered = np.empty(len(self), np.uint64)
        for owner, values in enumerate(columns):
            own = self.owners == owner
            gathered[own] = values[self.numbers[own]]
        return gathered

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Slot bytes of each record."""
        sizes = [np.array(keeping.missing.slot_sizes, np.uint64) for keeping in self.keepings]
        return self._gather(sizes).astype(np.int64)

    @property
    def classes(self) -> int:
        """How many record classes occur."""
        names = np.stack([self._column(column) for column in range(GROUP, STOP + 1)], axis=1)
        return len(np.unique(names, axis=0))

    def in_reading_order(self) -> Chunk:
        """The same records as a model needs them: by resume point, group, span and node."""
        order = np.lexsort((self._column(NODE), self._column(SPAN), self._column(GROUP), self.owners))
        return Chunk(self.keepings, self.owners[order], self.numbers[order])

    def rows(
        self, chosen: npt.NDArray[np.int64], *, whole_paths: bool
    ) -> tuple[NodeRows, RecordRows, npt.NDArray[np.uint64]]:
        """Some of the records as a directory takes them, with their nodes and addresses."""
        nodes = _Nodes()
        digests: dict[bytes, int] = {}
        count = len(chosen)
        node = np.empty(count, np.int32)
        grids = np.empty(count, np.int32)
        for owner, keeping in enumerate(self.keepings):
            own = np.flatnonzero(self.owners[chosen] == owner)
            if not own.size:
                continue
            table = keeping.missing.table[self.numbers[chosen[own]]]
            numbers = np.unique(table[:, NODE]).tolist()
            if whole_paths:
                numbers = list(range(numbers[-1] + 1))
            known = np.zeros(numbers[-1] + 1, np.int32)
            known[numbers] = [nodes.number(keeping, each) for each in numbers]
            node[own] = known[table[:, NODE].astype(np.int64)]
            own_digests = [digests.setdefault(each, len(digests)) for each in keeping.missing.digests]
            grids[own] = np.array(own_digests, np.int32)[table[:, DIGEST].astype(np.int64)]
        names = np.stack([self._column(column)[chosen] for column in range(GROUP, STOP + 1)], axis=1)
        place = np.zeros((count, 3), np.uint64)
        place[:, 2] = self.sizes[chosen]
        records = RecordRows(
            node,
            names.astype(np.uint16),
            grids,
            tuple(digests),
            self._gather([keeping.costs_us for keeping in self.keepings])[chosen],
            place,
            np.zeros(count, np.uint32),
        )
        return nodes.rows(), records, self._gather([keeping.addresses for keeping in self.keepings])[chosen]


class _Nodes:
    """Nodes of several paths, each once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._parents: list[bytes] = []
        self._end_tokens: list[int] = []
        self._tails: list[npt.NDArray[np.uint32]] = []
        self._root: list[int] = []
        self._roots: dict[tuple[bytes, bytes], int] = {}

    def number(self, keeping: Keeping, node: int) -> int:
        path = keeping.path
        key = path.key(node)
        known = self._numbers.get(key)
        if known is not None:
            return known
        self._parents.append(path.parent(node))
        self._end_tokens.append(path.end_tokens(node))
        self._tails.append(np.array(path.tail_ids if path.is_tail(node) else (), np.uint32))
        self._root.append(self._roots.setdefault((path.root, keeping.salt), len(self._roots)))
        return self._numbers.setdefault(key, len(self._numbers))

    def rows(self) -> NodeRows:
        return NodeRows(
            np.frombuffer(b"".join(self._numbers), np.uint8).reshape(-1, KEY_BYTES),
            np.frombuffer(b"".join(self._parents), np.uint8).reshape(-1, KEY_BYTES),
            np.array(self._end_tokens, np.uint32),
            tuple(self._tails),
            np.array(self._root, np.int32),
            tuple(self._roots),
        )


def chunks_of(keepings: Sequence[Keeping], chunk_bytes: int) -> Iterator[Chunk]:
    """What these lack, each record once, ancestors first, in parts of about so many bytes.

    What an earlier one lacks as well is left to that one.
    """
    owners, numbers, sizes = [], [], []
    seen: set[tuple[object, ...]] = set()
    for owner, keeping in enumerate(keepings):
        table = keeping.missing.table
        order = np.argsort(table[:, NODE], kind="stable")
        if len(keepings) > 1:
            names = keeping.names(order)
            is_new = [name not in seen for name in names]
            seen.update(names)
            order = order[np.array(is_new, np.bool_)]
        owners.append(np.full(len(order), owner, np.int64))
        numbers.append(order.astype(np.int64))
        sizes.append(np.array(keeping.missing.slot_sizes, np.int64)[order])
    if not owners:
        return
    owner_of, number_of, size_of = np.concatenate(owners), np.concatenate(numbers), np.concatenate(sizes)
    # A chunk of small records is one that an append takes.
    size_of = np.maximum(size_of, -(-chunk_bytes // SSD_APPEND_ROWS_MAX))
    ends = np.cumsum(size_of)
    chunk = (ends - size_of) // max(1, chunk_bytes)
    for each in np.unique(chunk).tolist():
        own = chunk == each
        yield Chunk(keepings, owner_of[own], number_of[own]).in_reading_order()
