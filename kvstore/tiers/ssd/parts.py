"""Rows cut into parts that a frame of the journal can take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.limits import FILE_ALIGN_BYTES, JOURNAL_FRAME_BYTES_MAX
from kvstore.tiers.ssd.frame import (
    DIGEST_ROW,
    FORGET_ROW,
    HEAD_BYTES,
    NODE_ROW,
    RECORD_ROW,
    ROOT_ROW,
    SEGMENT_ROW,
    TABLES,
    TAIL_ID,
)
from kvstore.tiers.ssd.rows import EndRows, NodeRows, RecordRows, TailIds

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROWS_PER_FRAME_MAX = 1 << 15
ROWS_JOINED_MAX = 1 << 12
"""A node takes 1.2 KiB with a tail, and 1 KiB more with a salt of its own."""
_PADDING_BYTES = HEAD_BYTES + 8 * len(TABLES) + FILE_ALIGN_BYTES
_RECORD_BYTES = RECORD_ROW.itemsize + DIGEST_ROW.itemsize + SEGMENT_ROW.itemsize
"""At most: others may share its digest and its segment."""


def parts_of(nodes: NodeRows, records: RecordRows) -> Iterator[tuple[NodeRows, RecordRows]]:
    """Consecutive nodes with their records, few enough for a frame; nothing for no nodes.

    Raises:
        ValueError: a node with its records is too large for any frame. Nothing was given before.
    """
    if not len(nodes):
        return
    limit_bytes = JOURNAL_FRAME_BYTES_MAX - _PADDING_BYTES
    sizes = _sizes(nodes, records)
    _check_sizes(sizes)
    byte_ends = np.cumsum(sizes)
    order = np.argsort(records.node, kind="stable")
    row_ends = np.searchsorted(records.node[order], np.arange(len(nodes)), side="right")
    first = 0
    while first < len(nodes):
        before_rows, before_bytes = (int(row_ends[first - 1]), int(byte_ends[first - 1])) if first else (0, 0)
        fitting = [
            int(np.searchsorted(row_ends, before_rows + ROWS_PER_FRAME_MAX, side="right")),
            int(np.searchsorted(byte_ends, before_bytes + limit_bytes, side="right")),
            first + ROWS_PER_FRAME_MAX,
            len(nodes),
        ]
        stop = max(first + 1, min(fitting))
        part = records.taken(order[before_rows : int(row_ends[stop - 1])])
        shifted = RecordRows(
            part.node - np.int32(first), part.name, part.grids, part.digests, part.cost_us, part.place,
            part.metadata_crc32c,
        )  # fmt: skip
        yield nodes.taken(np.arange(first, stop)), shifted
        first = stop


Part = tuple[NodeRows, RecordRows, "Sequence[tuple[bytes, bool]]"]


def frames_of(nodes: NodeRows, records: RecordRows, forgotten: Sequence[tuple[bytes, bool]]) -> list[Part]:
    """What each frame of a batch takes: what was forgotten comes before records. One without rows for none.

    Raises as `parts_of`.
    """
    parts = [(*part, ()) for part in parts_of(nodes, records)]
    limit_bytes = JOURNAL_FRAME_BYTES_MAX - _PADDING_BYTES
    left_bytes = limit_bytes - (int(_sizes(nodes, records).sum()) if len(nodes) else 0)
    if len(parts) <= 1 and len(forgotten) <= min(ROWS_PER_FRAME_MAX, left_bytes // FORGET_ROW.itemsize):
        return [(nodes, records, forgotten)]
    count = max(1, min(ROWS_PER_FRAME_MAX, limit_bytes // FORGET_ROW.itemsize))
    none = NodeRows.empty(), RecordRows.empty()
    return [*((*none, forgotten[begin : begin + count]) for begin in range(0, len(forgotten), count)), *parts]


def end_parts_of(ends: EndRows) -> list[EndRows]:
    """Rows of ends, few enough for a frame of their own."""
    numbers = np.arange(len(ends))
    return [ends.taken(numbers[at : at + ROWS_PER_FRAME_MAX]) for at in range(0, len(ends), ROWS_PER_FRAME_MAX)]


def frames_with_ends(
    nodes: NodeRows, records: RecordRows, forgotten: Sequence[tuple[bytes, bool]], ends: EndRows
) -> list[tuple[Part, EndRows]]:
    """As `frames_of`, with rows of ends: they hold for records that come with them, so what is forgotten is before.

    Raises as `parts_of`.
    """
    parts = frames_of(nodes, records, forgotten)
    no_ends = EndRows.empty()
    if not len(ends):
        return [(part, no_ends) for part in parts]
    if len(parts) == 1 and _may_join(parts[0], ends):
        return [(parts[0], ends)]
    no_nodes, no_records = NodeRows.empty(), RecordRows.empty()
    before = frames_of(no_nodes, no_records, forgotten) if forgotten else []
    after = frames_of(nodes, records, ()) if len(nodes) else []
    return [
        *((part, no_ends) for part in before),
        *(((no_nodes, no_records, ()), each) for each in end_parts_of(ends)),
        *((part, no_ends) for part in after),
    ]


def _may_join(part: Part, ends: EndRows) -> bool:
    """Whether rows of ends surely fit beside others in one frame."""
    nodes, records, forgotten = part
    return len(ends) <= ROWS_JOINED_MAX and len(nodes) + len(records) + len(forgotten) <= ROWS_JOINED_MAX


def check_fits(nodes: NodeRows, records: RecordRows) -> None:
    """Whether frames can take these at all. Raises as `parts_of`."""
    if len(nodes):
        _check_sizes(_sizes(nodes, records))


def _check_sizes(sizes: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
    if sizes.max() > JOURNAL_FRAME_BYTES_MAX - _PADDING_BYTES:
        raise ValueError(
            f"a node with its records takes up to {sizes.max()} bytes of the journal, of which one batch has "
            f"{JOURNAL_FRAME_BYTES_MAX}; use smaller blocks, or fewer groups and shards"
        )


def _sizes(nodes: NodeRows, records: RecordRows) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """What each node takes in a frame with its records, at most."""
    salt_bytes = np.array([len(salt) for _, salt in nodes.roots] or [0], np.int64)
    sizes = NODE_ROW.itemsize + TAIL_ID.itemsize * TailIds.of(nodes.tail_ids).lengths.astype(np.int64)
    sizes = sizes + ROOT_ROW.itemsize + salt_bytes[nodes.root]
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.bincount(records.node, minlength=len(nodes))
    total: np.ndarray[tuple[int], np.dtype[np.int64]] = sizes + _RECORD_BYTES * counts
    return total
