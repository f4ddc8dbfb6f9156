"""Rows as the tables of a journal's frame, and the tables of many frames as rows again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.keys import KEY_BYTES
from kvstore.limits import SALT_BYTES_MAX
from kvstore.tiers.ssd.frame import (
    DIGESTS,
    END_ROW,
    ENDS,
    FORGET_ROW,
    FORGETS,
    NODE_ROW,
    NODES,
    RECORD_ROW,
    RECORDS,
    ROOT_ROW,
    ROOTS,
    SALTS,
    SEGMENT_ROW,
    SEGMENTS,
    TABLE_BYTES,
    TABLES,
    TAILS,
)
from kvstore.tiers.ssd.names import NUMBER_MAX
from kvstore.tiers.ssd.rows import OFFSET, SEGMENT, SLOT_BYTES, EndRows, NodeRows, RecordRows, TailIds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

SegmentKey = tuple[int, tuple[int, int, int, int]]
"""A segment's nonce and its record class: group, span, first unit, unit after the last."""


def pack_tables(
    nodes: NodeRows,
    records: RecordRows,
    forgotten: Sequence[tuple[bytes, bool]],
    segments: Mapping[int, SegmentKey],
    ends: EndRows | None = None,
) -> list[npt.NDArray[Any]]:
    """The tables of a frame, in the order of `TABLES`. Places of records name segments that are among `segments`."""
    numbers = sorted(segments)
    segment_rows = np.zeros(len(numbers), SEGMENT_ROW)
    segment_rows["number"] = numbers
    segment_rows["nonce"] = [segments[number][0] for number in numbers]
    segment_rows["name"] = np.array([segments[number][1] for number in numbers], np.uint16).reshape(-1, 4)

    root_rows = np.zeros(len(nodes.roots), ROOT_ROW)
    root_rows["key"] = _digests([key for key, _ in nodes.roots])
    root_rows["salt_bytes"] = [len(salt) for _, salt in nodes.roots]
    salts = np.frombuffer(b"".join(salt for _, salt in nodes.roots), np.uint8)

    tails = TailIds.of(nodes.tail_ids)
    node_rows = np.zeros(len(nodes), NODE_ROW)
    node_rows["key"] = nodes.keys
    node_rows["parent"] = nodes.parents
    node_rows["end_tokens"] = nodes.end_tokens
    node_rows["root"] = nodes.root
    node_rows["tail_tokens"] = tails.lengths

    record_rows = np.zeros(len(records), RECORD_ROW)
    record_rows["node"] = records.node
    record_rows["grid"] = records.grids
    record_rows["segment"] = np.searchsorted(np.array(numbers, np.uint64), records.place[:, SEGMENT])
    record_rows["metadata_crc32c"] = records.metadata_crc32c
    record_rows["offset"] = records.place[:, OFFSET]
    record_rows["cost_us"] = records.cost_us
    record_rows["slot_bytes"] = records.place[:, SLOT_BYTES]

    forget_rows = np.zeros(len(forgotten), FORGET_ROW)
    forget_rows["key"] = _digests([key for key, _ in forgotten])
    forget_rows["is_state"] = [is_state for _, is_state in forgotten]
    ends = ends or EndRows.empty()
    end_rows = np.zeros(len(ends), END_ROW)
    end_rows["key"] = ends.keys
    end_rows["ends_us"] = ends.ends_us
    return [
        segment_rows, root_rows, salts, node_rows, tails.ids, record_rows, _digests(records.digests), forget_rows,
        end_rows,
    ]  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """The tables of many frames, one after the other, with references that count through all of them.

    Rows that contradict their frame (none do that a checksum vouches for and that this library wrote) are left out.

    Attributes:
        segments: nonce and class by (number), the last one that is named.
        nodes: node rows; `root` counts `roots`, an order of first appearance.
        tails: of the nodes.
        records: `node` counts `nodes`, `grid` counts `digests`, `segment` is the segment's number.
        record_nonces: of each record's segment.
        record_names: class of each record, `[m, 4]`.
        forgets: what was forgotten.
        ends: until when nodes are wanted.
        record_sequences, forget_sequences, end_sequences: of each row's frame.
        contradicting: rows that were left out.
    """

    segments: dict[int, SegmentKey]
    nodes: npt.NDArray[np.void]
    tails: TailIds
    roots: tuple[tuple[bytes, bytes], ...]
    records: npt.NDArray[np.void]
    record_segments: npt.NDArray[np.uint64]
    record_nonces: npt.NDArray[np.uint64]
    record_names: npt.NDArray[np.uint16]
    digests: npt.NDArray[np.uint8]
    forgets: npt.NDArray[np.void]
    record_sequences: npt.NDArray[np.int64]
    forget_sequences: npt.NDArray[np.int64]
    ends: npt.NDArray[np.void]
    end_sequences: npt.NDArray[np.int64]
    contradicting: int


class TableCollector:
    """Takes frames one by one, in the order of their sequence numbers."""

    def __init__(self) -> None:
        self._parts: list[list[memoryview]] = [[] for _ in TABLES]
        self._counts: list[tuple[int, ...]] = []
        self._sequences: list[int] = []

    def add(self, payload: memoryview, begins: Sequence[int], counts: tuple[int, ...], sequence: int) -> None:
        """Keep a frame's tables; the memory stays until `tables`."""
        for table, (begin, count) in enumerate(zip(begins, counts, strict=False)):
            if count:
                self._parts[table].append(payload[begin : begin + count * TABLE_BYTES[table]])
        self._counts.append(counts)
        self._sequences.append(sequence)

    def tables(self) -> Tables:
        """All that was added."""
        counts = np.array(self._counts, np.int64).reshape(-1, len(TABLES))
        sequences = np.array(self._sequences, np.int64)
        ends = np.cumsum(counts, axis=0)
        begins = ends - counts
        rows: list[npt.NDArray[Any]] = []
        for table, parts in enumerate(self._parts):
            data = b"".join(parts)
            parts.clear()
            rows.append(np.frombuffer(data, TABLES[table]))
        frames = [np.repeat(np.arange(len(counts)), counts[:, table]) for table in range(len(TABLES))]

        roots, root_numbers = _roots(rows[ROOTS], rows[SALTS], counts, frames[ROOTS])
        nodes = rows[NODES].copy()
        of = frames[NODES]
        lengths = nodes["tail_tokens"].astype(np.int64)
        is_whole_frame = np.bincount(of, lengths, len(counts)).astype(np.int64) == counts[:, TAILS]
        is_good_node = is_whole_frame[of] & (nodes["root"] < counts[of, ROOTS])
        # Tails of a frame whose lengths contradict its ids: without them the others keep their places.
        lengths[~is_whole_frame[of]] = 0
        is_good_tail = is_whole_frame[frames[TAILS]]
        tails = TailIds(rows[TAILS][is_good_tail].astype(np.uint32), np.cumsum(lengths))
        root_rows = np.where(is_good_node, nodes["root"] + begins[of, ROOTS], 0)
        nodes["root"] = root_numbers[root_rows] if len(root_numbers) else 0
        is_good_node &= nodes["root"] < len(roots)

        records = rows[RECORDS].copy()
        of = frames[RECORDS]
        is_good = (
            (records["node"] < counts[of, NODES])
            & (records["grid"] < counts[of, DIGESTS])
            & (records["segment"] < counts[of, SEGMENTS])
        )
        records, of = records[is_good], of[is_good]
        records["node"] += begins[of, NODES].astype(np.uint32)
        records["grid"] += begins[of, DIGESTS].astype(np.uint32)
        named = rows[SEGMENTS][records["segment"] + begins[of, SEGMENTS]]
        is_kept = is_good_node[records["node"]]
        contradicting = int((~is_good).sum() + (~is_good_node).sum() + (~is_kept).sum())
        # Nodes keep their places, so that records find them; the bad ones lose their keys' meaning by having no parent.
        nodes["parent"][~is_good_node] = nodes["key"][~is_good_node]
        last = rows[SEGMENTS][_last_of_each(rows[SEGMENTS]["number"])]
        last = last[last["number"] < NUMBER_MAX]
        segments: dict[int, SegmentKey] = {}
        for number, nonce, name in zip(*(last[column].tolist() for column in ("number", "nonce", "name")), strict=True):
            segments[number] = (nonce, (name[0], name[1], name[2], name[3]))
        return Tables(
            segments=segments,
            nodes=nodes,
            tails=tails,
            roots=roots,
            records=records[is_kept],
            record_segments=named["number"][is_kept],
            record_nonces=named["nonce"][is_kept],
            record_names=named["name"][is_kept],
            digests=rows[DIGESTS]["digest"],
            forgets=rows[FORGETS],
            record_sequences=sequences[of][is_kept],
            forget_sequences=sequences[frames[FORGETS]],
            ends=rows[ENDS],
            end_sequences=sequences[frames[ENDS]],
            contradicting=contradicting,
        )


def _roots(
    rows: npt.NDArray[np.void],
    salts: npt.NDArray[np.uint8],
    counts: npt.NDArray[np.int64],
    frames: npt.NDArray[np.int64],
) -> tuple[tuple[tuple[bytes, bytes], ...], npt.NDArray[np.int64]]:
    """Each root once, and the number of each row's; the number after the last for rows that contradict their frame."""
    lengths = rows["salt_bytes"].astype(np.int64)
    is_whole_frame = np.bincount(frames, lengths, len(counts)).astype(np.int64) == counts[:, SALTS]
    ends = np.cumsum(np.where(is_whole_frame[frames], lengths, 0))
    data = salts[np.repeat(is_whole_frame, counts[:, SALTS])].tobytes()
    numbers: dict[tuple[bytes, bytes], int] = {}
    found = []
    begin = 0
    keys = rows["key"].tobytes()
    for number, (end, is_good) in enumerate(zip(ends.tolist(), is_whole_frame[frames].tolist(), strict=True)):
        if is_good and end - begin <= SALT_BYTES_MAX:
            root = (keys[number * KEY_BYTES : (number + 1) * KEY_BYTES], data[begin:end])
            found.append(numbers.setdefault(root, len(numbers)))
        else:
            found.append(-1)
        begin = end
    array = np.array(found, np.int64)
    array[array < 0] = len(numbers)
    return tuple(numbers), array


def _last_of_each(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where each value stands for the last time."""
    _, positions = np.unique(values[::-1], return_index=True)
    return len(values) - 1 - positions


def _digests(digests: Sequence[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, KEY_BYTES)
