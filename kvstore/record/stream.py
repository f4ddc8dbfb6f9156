"""A record as a standalone Arrow IPC stream: schema message, record batch message, end of stream."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kvstore._native import crc32c, crc32c_many
from kvstore.errors import ChecksumError, RecordError
from kvstore.limits import RECORD_ALIGN_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES_MAX
from kvstore.record.columns import TensorColumn, column_offsets, parse_columns
from kvstore.record.header import CHECKSUM_PREFIX, CHECKSUM_ZERO, RecordHeader, checksum_field
from kvstore.record.message import END_OF_STREAM, MessageFrame, MessageKind, message_frame
from kvstore.record.schema import COVERAGE_TOKENS, SchemaFields, check_version, parse_schema
from kvstore.spec.coverage import mask_bytes, unpack_block

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.record.record import Record

STREAM_BYTES_MAX = RECORD_BYTES_MAX + 2 * RECORD_HEADER_BYTES_MAX + len(END_OF_STREAM)

BUFFERS_PER_COLUMN = 3
"""Of a fixed-size list: its validity, its items' validity, its items."""
_CHECKSUM_FIELD = re.compile(re.escape(CHECKSUM_PREFIX) + rb"[0-9a-f]{8}")


@dataclass(frozen=True)
class StreamedPiece:
    """One piece of a record that was read without its spec.

    Attributes:
        layer: model layer number.
        tensor: name of the tensor.
        segment: name of the segment.
        unit: shard unit within the segment.
        rows: rows of the tensor's first axis.
        offset: bytes from the start of the record batch message.
        size_bytes: bytes of the piece.
        checksum: its CRC32C.
    """

    layer: int
    tensor: str
    segment: str
    unit: int
    rows: int
    offset: int
    size_bytes: int
    checksum: int


@dataclass(frozen=True)
class StreamedRecord:
    """A verified record that was read without its spec.

    Attributes:
        fields: what the schema's metadata says.
        header: the per-record fields.
        columns: the tensors, in storage order.
        pieces: the pieces, in piece order.
        coverage: of a sparse record, which tokens each layer holds: a mask per layer. None if they hold all.
        batch: the Arrow record batch, over the memory that was read.
        schema_bytes: bytes of the schema message; the record batch message follows it.
        header_bytes: bytes of the record batch message before its body.
    """

    fields: SchemaFields
    header: RecordHeader
    columns: tuple[TensorColumn, ...]
    pieces: tuple[StreamedPiece, ...]
    coverage: bytes | None
    batch: pa.RecordBatch
    schema_bytes: int
    header_bytes: int

    def tensor(self, layer: int, name: str) -> npt.NDArray[np.generic]:
        """Read-only view of one layer's tensor: `[rows, capacity_tokens, *inner]` or `[rows, *inner]`.

        bfloat16 and float8 come as unsigned integers of their width.

        Raises:
            RecordError: the record has no such layer or tensor.
        """
        names = [column.name for column in self.columns]
        if layer not in self.fields.layers or name not in names:
            raise RecordError(
                f"the record holds layers {self.fields.layers} with tensors {', '.join(names)}; "
                f"not layer {layer}, {name!r}"
            )
        column = self.columns[names.index(name)]
        values = self.batch.column(names.index(name)).storage.flatten().to_numpy()
        shape = (self.batch.num_rows, *column.shape)
        view: npt.NDArray[np.generic] = values.reshape(shape)[self.fields.layers.index(layer)]
        view.flags.writeable = False
        return view


def write_record_stream(record: Record) -> bytes:
    """The bytes of a sealed record that any Arrow implementation opens with its stream reader."""
    return b"".join((record.layout.schema_message, record.memory, END_OF_STREAM))


def read_record_stream(data: bytes | bytearray | memoryview) -> StreamedRecord:
    """Read and verify a standalone record of any spec. The result's views keep `data` alive.

    Raises:
        FormatVersionError: a version, codec chain or coverage that this reader does not know.
        ChecksumError: metadata, padding or a piece is damaged.
        RecordError: not a record, truncated, oversized or inconsistent.
    """
    view = memoryview(data).toreadonly().cast("B")
    if view.nbytes > STREAM_BYTES_MAX:
        raise RecordError(f"{view.nbytes} bytes are more than any record; the limit is {STREAM_BYTES_MAX}")
    schema_frame = message_frame(view, 0, MessageKind.SCHEMA)
    check_version(schema_frame.custom_metadata)
    start = schema_frame.metadata_bytes
    if schema_frame.body_bytes:
        raise RecordError("the record's schema message has a body")
    frame = message_frame(view, start, MessageKind.RECORD_BATCH)
    if frame.metadata_bytes % RECORD_ALIGN_BYTES:
        raise RecordError(f"the record's header is {frame.metadata_bytes} bytes, no multiple of {RECORD_ALIGN_BYTES}")
    record = view[start : start + frame.metadata_bytes + frame.body_bytes]
    rest = view[start + record.nbytes :]
    if rest != END_OF_STREAM:
        raise RecordError(
            f"{rest.nbytes} bytes follow the record, where Arrow's {len(END_OF_STREAM)} bytes end-of-stream marker "
            "belongs: it is truncated, or something else follows"
        )
    # Before Arrow parses any of it: damage stops here.
    is_sparse = schema_frame.custom_metadata.get(b"kvstore.coverage") == COVERAGE_TOKENS.encode()
    checksums = _checked_metadata(view[:start], record, frame, is_sparse=is_sparse)
    schema = _read_schema(view[:start])
    fields = parse_schema(schema)
    columns = parse_columns(schema, fields)
    batch, custom = _read_batch(view)
    header = RecordHeader.from_fields({key.decode(errors="replace"): value for key, value in (custom or {}).items()})
    coverage_bytes = len(fields.layers) * mask_bytes(fields.capacity_tokens) if fields.is_sparse else 0
    relative = column_offsets(columns, len(fields.layers), coverage_bytes)
    offsets = [frame.metadata_bytes + offset for offset in relative]
    _check_body(batch, fields, columns, offsets, record, checksums)
    _check_valid_tokens(fields, header)
    pieces = _pieces(fields, columns, offsets, checksums)
    _check_pieces(record, pieces, checksums)
    others = [(offsets[len(columns)], checksums.nbytes)]
    coverage = None
    if coverage_bytes:
        others.append((offsets[-2], coverage_bytes))
        coverage = bytes(record[offsets[-2] : offsets[-2] + coverage_bytes])
        _check_coverage(fields, header, coverage)
    _check_padding(record, pieces, frame.metadata_bytes, others)
    return StreamedRecord(fields, header, columns, pieces, coverage, batch, start, frame.metadata_bytes)


def _checked_metadata(
    schema: memoryview, record: memoryview, frame: MessageFrame, *, is_sparse: bool
) -> npt.NDArray[np.uint32]:
    """The checksum column, after checking schema, header and column against the metadata checksum.

    In a sparse record the coverage column follows the checksums, and is covered with them.
    """
    header = bytearray(record[: frame.metadata_bytes])
    fields = list(_CHECKSUM_FIELD.finditer(header))
    columns_behind = BUFFERS_PER_COLUMN if is_sparse else 0
    if len(fields) != 1 or len(frame.buffers) <= columns_behind:
        raise ChecksumError("the record has no metadata checksum, or several: it is damaged, or no kvstore record")
    offset, size_bytes = frame.buffers[-1 - columns_behind]
    end = sum(frame.buffers[-1])
    if offset < 0 or size_bytes <= 0 or size_bytes % 4 or not offset + size_bytes <= end <= frame.body_bytes:
        raise RecordError(f"the record's checksum column claims bytes {offset} to {offset + size_bytes} of the body")
    checksums = np.frombuffer(record, np.uint32, size_bytes // 4, frame.metadata_bytes + offset)
    stored = fields[0].group()
    header[fields[0].start() : fields[0].end()] = CHECKSUM_ZERO
    bound = record[frame.metadata_bytes + offset : frame.metadata_bytes + end]
    if checksum_field(crc32c(bound, crc32c(header, crc32c(schema)))) != stored:
        raise ChecksumError("the record's metadata checksum does not hold: the record is damaged")
    return checksums


def _read_schema(message: memoryview) -> pa.Schema:
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(message))
        # Names that are not UTF-8 fail only once they are looked at.
        schema.names  # noqa: B018
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise RecordError(f"this is not a readable Arrow schema: {error}") from error
    return schema


def _read_batch(stream: memoryview) -> tuple[pa.RecordBatch, pa.KeyValueMetadata | None]:
    try:
        with pa.ipc.open_stream(stream) as reader:
            batch, custom = reader.read_next_batch_with_custom_metadata()
            batch.validate(full=True)
    except (pa.ArrowException, StopIteration, ValueError, OSError) as error:
        raise RecordError(f"this is not a readable Arrow record: {error}") from error
    return batch, custom


def _check_body(
    batch: pa.RecordBatch,
    fields: SchemaFields,
    columns: tuple[TensorColumn, ...],
    offsets: list[int],
    record: memoryview,
    checksums: npt.NDArray[np.uint32],
) -> None:
    """Every column's values lie where the format says, without nulls."""
    if batch.num_rows != len(fields.layers):
        raise RecordError(f"the record has {batch.num_rows} rows for {len(fields.layers)} layers")
    if len(checksums) != len(fields.layers) * sum(1 for column in columns for _ in column.units()):
        raise RecordError(f"the record has {len(checksums)} checksums, which is not one per piece")
    if offsets[-1] != record.nbytes:
        raise RecordError(f"the record has {record.nbytes} bytes, its columns make {offsets[-1]}")
    base = np.frombuffer(record, np.uint8).ctypes.data
    if checksums.ctypes.data != base + offsets[len(columns)]:
        raise RecordError(f"the checksum column does not begin at byte {offsets[len(columns)]} of the record")
    for index, offset in enumerate(offsets[:-1]):
        column = batch.column(index)
        storage = column.storage if index < len(columns) else column
        values = storage.flatten()
        data = values.buffers()[1]
        name = batch.schema.field(index).name
        if column.null_count or storage.null_count or values.null_count:
            raise RecordError(f"column {name!r} has nulls")
        if data is None or data.address != base + offset:
            raise RecordError(f"column {name!r} does not begin at byte {offset} of the record")


def _check_valid_tokens(fields: SchemaFields, header: RecordHeader) -> None:
    if fields.rule == "attention":
        expected = (header.end_tokens - 1) % fields.block_tokens + 1
    else:
        expected = min(header.end_tokens, fields.capacity_tokens)
    if header.valid_tokens != expected:
        raise RecordError(
            f"the record says that it holds {header.valid_tokens} tokens at {header.end_tokens}, which makes {expected}"
        )


def _pieces(
    fields: SchemaFields, columns: tuple[TensorColumn, ...], offsets: list[int], checksums: npt.NDArray[np.uint32]
) -> tuple[StreamedPiece, ...]:
    pieces: list[StreamedPiece] = []
    for row, layer in enumerate(fields.layers):
        for column, start in zip(columns, offsets, strict=False):
            offset = start + row * column.layer_bytes
            for segment, unit in column.units():
                size_bytes = segment.unit_rows * column.row_bytes
                checksum = int(checksums[len(pieces)])
                pieces.append(
                    StreamedPiece(
                        layer, column.name, segment.name, unit, segment.unit_rows, offset, size_bytes, checksum
                    )
                )
                offset += size_bytes
    return tuple(pieces)


def _check_pieces(record: memoryview, pieces: tuple[StreamedPiece, ...], checksums: npt.NDArray[np.uint32]) -> None:
    base = np.frombuffer(record, np.uint8).ctypes.data
    addresses = np.array([base + piece.offset for piece in pieces], np.uint64)
    computed = crc32c_many(addresses, np.array([piece.size_bytes for piece in pieces], np.uint64))
    bad = np.flatnonzero(computed != checksums)
    if bad.size:
        first = pieces[int(bad[0])]
        raise ChecksumError(
            f"{bad.size} of {len(pieces)} pieces are damaged, the first: layer {first.layer}, tensor {first.tensor!r}, "
            f"segment {first.segment!r}, unit {first.unit}"
        )


def _check_coverage(fields: SchemaFields, header: RecordHeader, coverage: bytes) -> None:
    """No layer holds a token that is not valid."""
    block = fields.block_tokens
    held = unpack_block(coverage, len(fields.layers), mask_bytes(block) * 8)
    if held[:, header.valid_tokens :].any():
        raise RecordError(f"the record covers tokens past the {header.valid_tokens} that it holds")


def _check_padding(
    record: memoryview, pieces: tuple[StreamedPiece, ...], header_bytes: int, others: list[tuple[int, int]]
) -> None:
    at = header_bytes
    parts = sorted([*((piece.offset, piece.size_bytes) for piece in pieces), *others, (record.nbytes, 0)])
    for offset, size_bytes in parts:
        if any(record[at:offset]):
            raise ChecksumError(f"the padding at byte {at} of the record is not zero: the record is damaged")
        at = offset + size_bytes
