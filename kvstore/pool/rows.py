"""Records of a path as arrays: what native calls take and give. Objects are made only of those that are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, overload

import numpy as np

from kvstore.abc import SlotRows
from kvstore.keys import KEY_BYTES
from kvstore.pool.path import RecordName
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import ReuseRule, UnitRange
from kvstore.spec.coverage import span_mask

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.record import RecordLayout
    from kvstore.spec import ModelSpec

NODE, GROUP, SPAN, START, STOP, SLOT, GENERATION, SLOT_BYTES, COST_US, DIGEST = range(10)
"""Columns of the tables that the native index returns."""


class RecordNames(Sequence[RecordName]):
    """Names of records, as an array of shape [n, 5]: node, group, span, first unit, unit after the last."""

    def __init__(self, table: npt.NDArray[np.uint64]) -> None:
        self.table = table

    @classmethod
    def of(cls, names: Iterable[RecordName]) -> RecordNames:
        if isinstance(names, RecordNames):
            return names
        rows = [(name.node, name.group, name.span, name.units.start, name.units.stop) for name in names]
        return cls(np.array(rows, np.uint64).reshape(-1, 5))

    @classmethod
    def of_spans(cls, nodes: Sequence[int] | range, group: int, spans: int, units: UnitRange) -> RecordNames:
        """Every span of a group at each of these nodes."""
        table = np.empty((len(nodes), spans, 5), np.uint64)
        table[:, :, 0] = np.asarray(nodes, np.uint64)[:, None]
        table[:, :, 1] = group
        table[:, :, 2] = np.arange(spans)
        table[:, :, 3] = units.start
        table[:, :, 4] = units.stop
        return cls(table.reshape(-1, 5))

    @classmethod
    def join(cls, parts: Sequence[RecordNames]) -> RecordNames:
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.table for part in parts]) if parts else np.empty((0, 5), np.uint64))

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> RecordName: ...
    @overload
    def __getitem__(self, index: slice) -> RecordNames: ...
    def __getitem__(self, index: int | slice) -> RecordName | RecordNames:
        if isinstance(index, slice):
            return RecordNames(self.table[index])
        node, group, span, start, stop = self.table[index].tolist()
        return RecordName(node, group, span, UnitRange(start, stop))

    @cached_property
    def classes(self) -> tuple[list[tuple[int, int, int, int]], npt.NDArray[np.int64]]:
        """What occurs of (group, span, first unit, unit after the last), and the number of each record's."""
        columns = self.table[:, GROUP : STOP + 1]
        # Records of one class mostly follow one another.
        is_first = np.ones(len(columns), np.bool_)
        is_first[1:] = (columns[1:] != columns[:-1]).any(axis=1)
        numbers: dict[tuple[int, int, int, int], int] = {}
        runs = [
            numbers.setdefault((group, span, start, stop), len(numbers))
            for group, span, start, stop in columns[is_first].tolist()
        ]
        return list(numbers), np.array(runs, np.int64)[is_first.cumsum() - 1]

    def positions_of(self, others: RecordNames) -> npt.NDArray[np.int64]:
        """Where each of `others`, all of which are among these, stands here."""
        both = RecordNames.join([self, others])
        classes, numbers = both.classes
        keys = both.table[:, NODE].astype(np.int64) * len(classes) + numbers
        order = np.argsort(keys[: len(self)])
        found: npt.NDArray[np.int64] = order[np.searchsorted(keys[: len(self)], keys[len(self) :], sorter=order)]
        return found


class Rows:
    """Records of a path in a table of the native index, one a row.

    Attributes:
        spec, path: the model, and the path that nodes are counted on.
        table: [n, 10], columns as above; the last one counts `digests`.
        digests: chunk grid digests, each once.
    """

    def __init__(self, spec: ModelSpec, path: NodePath, table: npt.NDArray[np.uint64], digests: bytes) -> None:
        self.spec = spec
        self.path = path
        self.table = table
        self.digests = [digests[at : at + KEY_BYTES] for at in range(0, len(digests), KEY_BYTES)]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def end_tokens(self) -> npt.NDArray[np.int64]:
        """Where each record's prefix ends."""
        nodes = self.table[:, NODE].astype(np.int64)
        ends = (nodes + 1) * self.path.block_tokens
        ends[nodes >= len(self.path.keys)] = self.path.tokens
        return ends

    @cached_property
    def classes(self) -> tuple[list[RecordLayout], npt.NDArray[np.int64]]:
        """The layouts that occur, and the number of each record's."""
        return layouts_of(self.spec, self.path, self.record_names)

    @cached_property
    def record_names(self) -> RecordNames:
        """Their names, as an array."""
        return RecordNames(self.table[:, : STOP + 1])

    @property
    def slot_sizes(self) -> list[int]:
        """Bytes that each record takes in a tier."""
        layouts, numbers = self.classes
        sizes: list[int] = np.array([layout.slot_bytes for layout in layouts], np.int64)[numbers].tolist()
        return sizes

    def slots(self) -> SlotRows:
        return SlotRows(self.table[:, SLOT : SLOT_BYTES + 1])

    def names(self) -> list[RecordName]:
        units = {layout.units for layout in self.classes[0]}
        shared = {(each.start, each.stop): each for each in units}
        return [
            RecordName(node, group, span, shared[start, stop])
            for node, group, span, start, stop in self.table[:, : STOP + 1].tolist()
        ]

    def layouts(self) -> list[RecordLayout]:
        layouts, numbers = self.classes
        return [layouts[number] for number in numbers.tolist()]

    def grid(self, row: int) -> bytes:
        """Chunk grid digest of a record."""
        return self.digests[int(self.table[row, DIGEST])]

    def places(self) -> list[tuple[RecordPlace, bytes]]:
        """Where each record belongs, and its chunk grid digest."""
        rows = self.table[:, [NODE, GROUP, SPAN, DIGEST]].tolist()
        return [((node, group, span), self.digests[digest]) for node, group, span, digest in rows]

    def headers(self) -> list[RecordHeader]:
        path, groups, block = self.path, self.spec.groups, self.spec.block_tokens
        columns = self.table[:, [NODE, GROUP, DIGEST, COST_US]].tolist()
        return [
            RecordHeader(
                path.key(node),
                path.parent(node),
                end_tokens,
                groups[group].valid_tokens(block, end_tokens),
                self.digests[digest],
                cost_us,
            )
            for (node, group, digest, cost_us), end_tokens in zip(columns, self.end_tokens.tolist(), strict=True)
        ]

    @cached_property
    def valid_tokens(self) -> npt.NDArray[np.int64]:
        """Tokens that each record really holds."""
        return valid_tokens(self.spec, self.table[:, GROUP].astype(np.int64), self.end_tokens)

    @cached_property
    def framing(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
        """What framing a record takes: key, parent and grid, `[n, 96]`; end, valid tokens and cost, `[n, 3]`."""
        root, _, keys, tail_key, _ = self.path.packed
        chain = np.frombuffer(b"".join((root, keys, tail_key or b"")), np.uint8).reshape(-1, KEY_BYTES)
        grids = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, KEY_BYTES)
        nodes = self.table[:, NODE].astype(np.int64)
        digests = np.concatenate(
            (chain[nodes + 1], chain[nodes], grids[self.table[:, DIGEST].astype(np.int64)]), axis=1
        )
        numbers = np.stack((self.end_tokens, self.valid_tokens, self.table[:, COST_US].astype(np.int64)), axis=1)
        return digests, numbers.astype(np.uint64)

    def covered(self) -> list[tuple[int, bytes]]:
        """Sparse records, with what their coverage columns hold."""
        masks = self.path.masks
        if not masks:
            return []
        rows = np.flatnonzero(np.isin(self.table[:, NODE], list(masks))).tolist()
        named = [(row, *self.table[row, : SPAN + 1].tolist()) for row in rows]
        return [
            (row, span_mask(self.spec, masks[node], group, span))
            for row, node, group, span in named
            if group in self.spec.attention_groups
        ]

    def padded(self) -> list[int]:
        """Records that will be filled in part only."""
        layouts, numbers = self.classes
        capacity = np.array([layout.capacity_tokens for layout in layouts], np.int64)[numbers]
        is_state = np.array([layout.group.rule is ReuseRule.STATE for layout in layouts], np.bool_)[numbers]
        block = self.spec.block_tokens
        valid = np.where(is_state, np.minimum(self.end_tokens, capacity), (self.end_tokens - 1) % block + 1)
        rows: list[int] = np.flatnonzero((capacity > 0) & (valid < capacity)).tolist()
        return rows


def valid_tokens(
    spec: ModelSpec, groups: npt.NDArray[np.int64], end_tokens: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """As `CacheGroup.valid_tokens`, for records of these groups that end at these lengths."""
    windows = np.array([group.window_tokens or 0 for group in spec.groups], np.int64)[groups]
    is_attention = np.array([group.rule is ReuseRule.ATTENTION for group in spec.groups], np.bool_)[groups]
    return np.where(is_attention, (end_tokens - 1) % spec.block_tokens + 1, np.minimum(end_tokens, windows))


def layouts_of(spec: ModelSpec, path: NodePath, names: RecordNames) -> tuple[list[RecordLayout], npt.NDArray[np.int64]]:
    """The layouts of records of a path, each once, and the number of each record's."""
    classes, numbers = names.classes
    layouts = [record_layout(spec, group, span, UnitRange(*units)) for group, span, *units in classes]
    if path.masks:
        is_attention = np.array([group in spec.attention_groups for group, *_ in classes], np.bool_)[numbers]
        is_sparse = np.isin(names.table[:, NODE], list(path.masks)) & is_attention
        used, numbers = np.unique(numbers * 2 + is_sparse, return_inverse=True)
        chosen = [(layouts[number // 2], bool(number % 2)) for number in used.tolist()]
        layouts = [
            record_layout(spec, each.group_index, each.span.index, each.units, sparse) for each, sparse in chosen
        ]
    return layouts, numbers
