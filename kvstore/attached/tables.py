"""Paths, record names and record places as packed tables: what most messages consist of."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kvstore.abc import Slot
from kvstore.errors import AttachProtocolError, KVStoreError, SpecError
from kvstore.limits import (
    ATTACH_RECORDS_MAX,
    HANDOVER_PAYLOAD_BYTES_MAX,
    PROMPT_TOKENS_MAX,
    SALT_BYTES_MAX,
)
from kvstore.pool import HandOver, NodePath, RecordName
from kvstore.pool.path import SparseNode, wrong_sparse
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import ChunkGrid, Shard, UnitRange
from kvstore.spec.coverage import block_mask_bytes
from kvstore.wire import Reader

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvstore.pool.path import RecordPlace
    from kvstore.record import RecordLayout
    from kvstore.spec import ModelSpec

KEY_BYTES = 32
Rows = npt.NDArray[np.void]

NAME_ROW = np.dtype(
    [
        ("node", "<u4"),
        ("group", "<u2"),
        ("span", "<u2"),
        ("unit_start", "<u2"),
        ("unit_stop", "<u2"),
        ("grid", "<u4"),
    ]
)
"""A record's name, and which digest of the table's own list its chunk grid has."""
PLACE_ROW = np.dtype(
    [
        *((name, NAME_ROW[name].str) for name in NAME_ROW.names or ()),
        ("slot", "<u8"),
        ("generation", "<u8"),
        ("slot_bytes", "<u8"),
        ("offset", "<u8"),
        ("cost_us", "<u8"),
    ]
)
"""A record's name and where it lies: slot with generation, and bytes from the start of the arena."""
SLOT_ROW = np.dtype([("slot", "<u8"), ("generation", "<u8"), ("slot_bytes", "<u8")])
_GRID_ROW = np.dtype([("node", "<u4"), ("group", "<u2"), ("span", "<u2"), ("grid", "<u4")])

_PATH = struct.Struct("<HHI")
_COUNTS = struct.Struct("<II")
_COUNT = struct.Struct("<I")
_SHARD = struct.Struct("<II")
_HANDOVER = struct.Struct("<II")


class MessageReader(Reader):
    """A `Reader` of messages between processes."""

    def __init__(self, data: memoryview, message: str) -> None:
        super().__init__(data, message, AttachProtocolError)
        self.message = message

    def fail(self, what: str) -> AttachProtocolError:
        """The error for a message that says something impossible."""
        return AttachProtocolError(f"{self.message} {what}")

    def count(self, most: int, what: str) -> int:
        """A number of things, at most `most`."""
        (count,) = self.fixed(_COUNT)
        if count > most:
            raise self.fail(f"has {count} {what}; allowed are {most}")
        return int(count)

    def flag(self) -> bool:
        """One byte that is 0 or 1."""
        value = self.bytes(1)[0]
        if value > 1:
            raise self.fail(f"has {value} where 0 or 1 is expected")
        return bool(value)


# Paths


def pack_path(path: NodePath) -> bytes:
    tail = np.array(path.tail_ids, "<u4").tobytes()
    fixed = _PATH.pack(path.block_tokens, len(path.tail_ids), len(path.keys))
    sparse = [_COUNT.pack(each.node) + each.whole_key + each.mask for each in path.sparse]
    return b"".join((fixed, path.root, path.tail_key or b"", tail, *path.keys, _COUNT.pack(len(sparse)), *sparse))


def read_path(reader: MessageReader, spec: ModelSpec) -> NodePath:
    """A path of at least one node, in blocks of the spec."""
    block, tail, keys = reader.fixed(_PATH)
    if block != spec.block_tokens or tail >= block or not 0 < keys * block + tail <= PROMPT_TOKENS_MAX:
        raise reader.fail(f"has a path of {keys} blocks of {block} tokens and a tail of {tail}")
    root = reader.bytes(KEY_BYTES)
    tail_key = reader.bytes(KEY_BYTES) if tail else None
    tail_ids = tuple(reader.rows(np.dtype("<u4"), tail).tolist())
    path = NodePath(root, block, read_digests(reader, keys), tail_key, tail_ids)
    count = reader.count(len(path), "sparse nodes")
    return replace(path, sparse=_read_sparse(reader, spec, path, count)) if count else path


def _read_sparse(reader: MessageReader, spec: ModelSpec, path: NodePath, count: int) -> tuple[SparseNode, ...]:
    size = block_mask_bytes(spec)
    sparse = []
    for _ in range(count):
        (node,) = reader.fixed(_COUNT)
        sparse.append(SparseNode(node, reader.bytes(KEY_BYTES), reader.bytes(size)))
    wrong = wrong_sparse(spec, path, sparse)
    if wrong is not None:
        raise reader.fail(wrong)
    return tuple(sparse)


def read_digests(reader: MessageReader, count: int) -> tuple[bytes, ...]:
    data = reader.bytes(KEY_BYTES * count)
    return tuple(data[start : start + KEY_BYTES] for start in range(0, len(data), KEY_BYTES))


# Small parts


def pack_bytes(data: bytes) -> bytes:
    return _COUNT.pack(len(data)) + data


def pack_shard(shard: Shard) -> bytes:
    return _SHARD.pack(shard.index, shard.count)


def read_shard(reader: MessageReader) -> Shard:
    index, count = reader.fixed(_SHARD)
    try:
        return Shard(index, count)
    except SpecError as error:
        raise reader.fail(str(error)) from error


def pack_chunks(grid: ChunkGrid | None) -> bytes:
    if grid is None:
        return b"\0"
    return b"\1" + _COUNT.pack(len(grid.boundaries)) + np.array(grid.boundaries, "<u4").tobytes()


def read_chunks(reader: MessageReader) -> ChunkGrid | None:
    if not reader.flag():
        return None
    count = reader.count(PROMPT_TOKENS_MAX, "chunk boundaries")
    try:
        return ChunkGrid(tuple(reader.rows(np.dtype("<u4"), count).tolist()))
    except SpecError as error:
        raise reader.fail(str(error)) from error


def pack_handover(handover: HandOver | None) -> bytes:
    if handover is None:
        return b"\0"
    return b"\1" + _HANDOVER.pack(handover.first_token, len(handover.payload)) + handover.payload


def read_handover(reader: MessageReader) -> HandOver | None:
    if not reader.flag():
        return None
    first_token, payload_bytes = reader.fixed(_HANDOVER)
    if payload_bytes > HANDOVER_PAYLOAD_BYTES_MAX:
        raise reader.fail(f"carries a hand-over of {payload_bytes} bytes; the limit is {HANDOVER_PAYLOAD_BYTES_MAX}")
    return HandOver(first_token, reader.bytes(payload_bytes))


def pack_grids(grids: Mapping[RecordPlace, bytes] | None) -> bytes:
    """Chunk grid digests by place, or none."""
    if grids is None:
        return b"\0"
    numbers: dict[bytes, int] = {}
    rows = [(*place, numbers.setdefault(digest, len(numbers))) for place, digest in grids.items()]
    return b"\1" + _COUNTS.pack(len(rows), len(numbers)) + np.array(rows, _GRID_ROW).tobytes() + b"".join(numbers)


def read_grids(reader: MessageReader) -> dict[RecordPlace, bytes] | None:
    if not reader.flag():
        return None
    count, digest_count = reader.fixed(_COUNTS)
    _check_table(reader, count, digest_count)
    rows = reader.rows(_GRID_ROW, count)
    digests = read_digests(reader, digest_count)
    _check_digests(reader, rows, digests)
    return {(node, group, span): digests[grid] for node, group, span, grid in rows.tolist()}


def read_salt(reader: MessageReader) -> bytes:
    return reader.bytes(reader.count(SALT_BYTES_MAX, "bytes of salt"))


# Records


def pack_names(names: Sequence[RecordName], digests: Iterable[bytes]) -> bytes:
    """Names with the chunk grid digest of each."""
    numbers: dict[bytes, int] = {}
    rows = [
        (n.node, n.group, n.span, n.units.start, n.units.stop, numbers.setdefault(digest, len(numbers)))
        for n, digest in zip(names, digests, strict=True)
    ]
    return _COUNTS.pack(len(rows), len(numbers)) + np.array(rows, NAME_ROW).tobytes() + b"".join(numbers)


def read_names(reader: MessageReader, spec: ModelSpec, path: NodePath) -> list[tuple[RecordName, bytes]]:
    """Names that exist in the spec and on the path, each once, with their digests."""
    count, digest_count = reader.fixed(_COUNTS)
    _check_table(reader, count, digest_count)
    rows = reader.rows(NAME_ROW, count)
    digests = read_digests(reader, digest_count)
    _check_digests(reader, rows, digests)
    named = [
        (_name(reader, spec, path, node, group, span, start, stop), digests[grid])
        for node, group, span, start, stop, grid in rows.tolist()
    ]
    if len({name for name, _ in named}) != len(named):
        raise reader.fail("names a record twice")
    return named


@dataclass(frozen=True)
class PlacedRecord:
    """A record that lies in the arena.

    Attributes:
        name, layout, header: what it is; the cost of a record that is being written is 0.
        slot: its descriptor; the generation tells it from what lies there later.
        offset: bytes from the start of the arena.
    """

    name: RecordName
    layout: RecordLayout
    header: RecordHeader
    slot: Slot
    offset: int


def pack_places(records: Sequence[PlacedRecord]) -> bytes:
    numbers: dict[bytes, int] = {}
    rows = [
        (
            *(r.name.node, r.name.group, r.name.span, r.name.units.start, r.name.units.stop),
            numbers.setdefault(r.header.grid, len(numbers)),
            *(r.slot.index, r.slot.generation, r.slot.size_bytes, r.offset, r.header.cost_us),
        )
        for r in records
    ]
    return _COUNTS.pack(len(rows), len(numbers)) + np.array(rows, PLACE_ROW).tobytes() + b"".join(numbers)


def read_places(reader: MessageReader, spec: ModelSpec, path: NodePath, arena_bytes: int) -> list[PlacedRecord]:
    """Records that exist in the spec and on the path, and lie wholly within the arena."""
    count, digest_count = reader.fixed(_COUNTS)
    _check_table(reader, count, digest_count)
    rows = reader.rows(PLACE_ROW, count)
    digests = read_digests(reader, digest_count)
    _check_digests(reader, rows, digests)
    records: list[PlacedRecord] = []
    for node, group, span, start, stop, grid, slot, generation, slot_bytes, offset, cost_us in rows.tolist():
        name = _name(reader, spec, path, node, group, span, start, stop)
        is_sparse = node in path.masks and group in spec.attention_groups
        layout = record_layout(spec, group, span, name.units, is_sparse)
        if slot_bytes < layout.record_bytes or offset % 64 or offset + slot_bytes > arena_bytes:
            raise reader.fail(f"has a record of {slot_bytes} bytes at {offset} of an arena of {arena_bytes} bytes")
        end_tokens = path.end_tokens(node)
        valid_tokens = spec.groups[group].valid_tokens(spec.block_tokens, end_tokens)
        header = RecordHeader(path.key(node), path.parent(node), end_tokens, valid_tokens, digests[grid], cost_us)
        records.append(PlacedRecord(name, layout, header, Slot(slot, generation, slot_bytes), offset))
    return records


def pack_slots(slots: Sequence[Slot]) -> bytes:
    rows = np.array([(slot.index, slot.generation, slot.size_bytes) for slot in slots], SLOT_ROW)
    return _COUNT.pack(len(rows)) + rows.tobytes()


def read_slots(reader: MessageReader) -> list[Slot]:
    count = reader.count(ATTACH_RECORDS_MAX, "slots")
    return [Slot(*row) for row in reader.rows(SLOT_ROW, count).tolist()]


def _name(
    reader: MessageReader, spec: ModelSpec, path: NodePath, node: int, group: int, span: int, start: int, stop: int
) -> RecordName:
    if node >= len(path) or group >= len(spec.groups) or span >= len(spec.spans[group]):
        raise reader.fail(f"names node {node}, group {group}, span {span}, which do not exist")
    if stop > spec.groups[group].unit_count:
        raise reader.fail(f"names shard unit {stop - 1} of {spec.groups[group].unit_count}")
    try:
        name = RecordName(node, group, span, UnitRange(start, stop))
        record_layout(spec, group, span, name.units)
    except KVStoreError as error:
        raise reader.fail(f"names a record that cannot be: {error}") from error
    return name


def _check_table(reader: MessageReader, count: int, digest_count: int) -> None:
    if count > ATTACH_RECORDS_MAX or digest_count > count:
        raise reader.fail(
            f"has {count} records on {digest_count} chunk grids; allowed are {ATTACH_RECORDS_MAX} records"
        )


def _check_digests(reader: MessageReader, rows: npt.NDArray[Any], digests: tuple[bytes, ...]) -> None:
    if len(rows) and int(rows["grid"].max()) >= len(digests):
        raise reader.fail(f"names chunk grid {int(rows['grid'].max())} of {len(digests)}")
