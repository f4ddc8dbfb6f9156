"""Where each piece of a record lies, and the prepared Arrow framing of its class."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kvstore._native import crc32c
from kvstore.errors import RecordTooLargeError, SpecError
from kvstore.limits import RECORD_ALIGN_BYTES, RECORD_BYTES_MAX, RECORD_HEADER_BYTES_MAX
from kvstore.record.header import FIELD_WIDTHS, blank_field
from kvstore.record.schema import CHECKSUM_COLUMN, COVERAGE_COLUMN, arrow_schema, tensor_rows
from kvstore.spec.coverage import mask_bytes

if TYPE_CHECKING:
    from kvstore.spec import CacheGroup, LayerSpan, ModelSpec, UnitRange


@dataclass(frozen=True)
class Piece:
    """One (layer, tensor, shard unit) of a record: contiguous, sent and checked as a whole.

    Attributes:
        layer: model layer number.
        tensor: index in the group's tensors.
        segment: index in the tensor's segments.
        unit: shard unit within the segment.
        rows: rows of the tensor's first axis.
        offset: bytes from the start of the record.
        size_bytes: bytes of the piece, padding of a partial block included.
    """

    layer: int
    tensor: int
    segment: int
    unit: int
    rows: int
    offset: int
    size_bytes: int


class RecordLayout:
    """Layout of one record class: a (group, span, shard units) of a spec, sparse or not. Immutable; any thread.

    A record is `header_bytes` of Arrow message metadata, padded to the alignment, then the body: one
    column per tensor (a row per layer), then the piece checksums, then the coverage of a sparse one. `slot_bytes` is
    what a tier reserves.
    """

    def __init__(
        self, spec: ModelSpec, group_index: int, span_index: int, units: UnitRange, is_sparse: bool = False
    ) -> None:
        self.spec = spec
        self.group_index = group_index
        self.group: CacheGroup = spec.groups[group_index]
        self.span: LayerSpan = spec.spans[group_index][span_index]
        self.units = units
        self.is_sparse = is_sparse
        """Layers hold only the tokens that a coverage column names; the pieces have their full size."""
        self.capacity_tokens = self.group.capacity_tokens(spec.block_tokens)
        relative, pieces_per_layer = self._relative_pieces()
        if not relative:
            raise SpecError(
                f"units {units.start} to {units.stop} of group {self.group.name!r} hold no rows of any tensor; "
                "use a worker count that divides the group's units more evenly"
            )
        self.pieces_per_layer = pieces_per_layer
        self.schema = arrow_schema(spec, self.group, self.span, units, pieces_per_layer, is_sparse)
        self.columns = tuple(
            index for index, tensor in enumerate(self.group.tensors) if tensor_rows(self.group, tensor, units)
        )
        batch = self._empty_batch()
        schema_message, message = _messages(batch)
        self.schema_message = schema_message
        self.schema_checksum = crc32c(schema_message)
        """Where the metadata checksum of every record of this class begins."""
        metadata_bytes = 8 + struct.unpack_from("<i", message, 4)[0]
        self.header_bytes = -(-metadata_bytes // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES
        if self.header_bytes > RECORD_HEADER_BYTES_MAX:
            raise RecordTooLargeError(
                f"the Arrow metadata of group {self.group.name!r} takes {self.header_bytes} bytes, the limit is "
                f"{RECORD_HEADER_BYTES_MAX}; use fewer tensors per group"
            )
        template = bytearray(self.header_bytes)
        template[:metadata_bytes] = message[:metadata_bytes]
        struct.pack_into("<i", template, 4, self.header_bytes - 8)
        self.field_offsets = {name: _find_once(template, _placeholder(name)) for name in FIELD_WIDTHS}
        for name, offset in self.field_offsets.items():
            template[offset : offset + FIELD_WIDTHS[name]] = blank_field(name)
        self.header_template = bytes(template)
        """The header with every per-record field blank."""
        self.body_bytes = len(message) - metadata_bytes
        self.record_bytes = self.header_bytes + self.body_bytes
        self.slot_bytes: int = -(-self.record_bytes // RECORD_ALIGN_BYTES) * RECORD_ALIGN_BYTES
        if self.slot_bytes > RECORD_BYTES_MAX + RECORD_HEADER_BYTES_MAX:
            raise RecordTooLargeError(
                f"a record of group {self.group.name!r} takes {self.slot_bytes} bytes, the limit is {RECORD_BYTES_MAX}"
            )
        column_offsets = _column_offsets(self, bytes(message), metadata_bytes)
        self.coverage_offset = column_offsets.pop() if is_sparse else None
        self.column_offsets = column_offsets[:-1]
        """Start of each column's data within the record, in the order of `columns`."""
        self.checksum_offset = column_offsets[-1]
        self.pieces = tuple(
            Piece(layer, tensor, segment, unit, rows, self._piece_offset(row, tensor, within), size)
            for row, layer in enumerate(self.span.layers)
            for tensor, segment, unit, rows, within, size in relative
        )

    def _relative_pieces(self) -> tuple[list[tuple[int, int, int, int, int, int]], int]:
        """(tensor, segment, unit, rows, offset within the tensor, bytes) of each piece of one layer."""
        pieces: list[tuple[int, int, int, int, int, int]] = []
        for index, tensor in enumerate(self.group.tensors):
            within = 0
            for number, segment in enumerate(tensor.segments):
                for unit in self.group.segment_units(segment, self.units):
                    size = tensor.unit_bytes(segment, self.capacity_tokens)
                    pieces.append((index, number, unit, segment.unit_rows, within, size))
                    within += size
        return pieces, len(pieces)

    def _piece_offset(self, row: int, tensor: int, within: int) -> int:
        column = self.columns.index(tensor)
        rows = tensor_rows(self.group, self.group.tensors[tensor], self.units)
        spec = self.group.tensors[tensor]
        layer_bytes = rows * spec.row_bytes * (self.capacity_tokens if spec.has_tokens else 1)
        return self.column_offsets[column] + row * layer_bytes + within

    def _empty_batch(self) -> pa.RecordBatch:
        arrays = []
        count = len(self.span.layers)
        for field in self.schema:
            type_ = field.type
            storage = type_.storage_type if isinstance(type_, pa.BaseExtensionType) else type_
            values = count * storage.list_size
            buffer = pa.py_buffer(bytes(values * storage.value_type.bit_width // 8))
            child = pa.Array.from_buffers(storage.value_type, values, [None, buffer])
            array = pa.Array.from_buffers(storage, count, [None], children=[child])
            arrays.append(pa.ExtensionArray.from_storage(type_, array) if storage is not type_ else array)
        return pa.record_batch(arrays, schema=self.schema)

    @cached_property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """Alignment padding of the body, as (offset, bytes)."""
        ends = [(piece.offset, piece.offset + piece.size_bytes) for piece in self.pieces]
        ends.append((self.checksum_offset, self.checksum_offset + self.checksum_bytes))
        if self.coverage_offset is not None:
            ends.append((self.coverage_offset, self.coverage_offset + self.coverage_bytes))
        ends.sort()
        gaps = []
        at = self.header_bytes
        for start, end in [*ends, (self.record_bytes, self.record_bytes)]:
            if start > at:
                gaps.append((at, start - at))
            at = end
        return tuple(gaps)

    @cached_property
    def framing(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
        """For `frame_records`: the class's offsets, and its gaps as an array."""
        fields = [self.field_offsets[name] for name in FIELD_WIDTHS]
        record_class = [*fields, self.schema_checksum, self.checksum_offset, self.bound_bytes]
        return np.array(record_class, np.uint64), np.array(self.gaps, np.uint64).reshape(-1, 2)

    @cached_property
    def piece_offsets(self) -> npt.NDArray[np.int64]:
        return np.array([piece.offset for piece in self.pieces], np.int64)

    @cached_property
    def piece_sizes(self) -> npt.NDArray[np.int64]:
        return np.array([piece.size_bytes for piece in self.pieces], np.int64)

    @cached_property
    def piece_ranges(self) -> npt.NDArray[np.uint64]:
        """For `intact_records`: offset and bytes of each piece, [pieces, 2]."""
        return np.stack((self.piece_offsets, self.piece_sizes), axis=1).astype(np.uint64)

    @property
    def checksum_bytes(self) -> int:
        return 4 * len(self.pieces)

    @property
    def coverage_bytes(self) -> int:
        """Bytes of the coverage column: a mask per layer."""
        return len(self.span.layers) * mask_bytes(self.capacity_tokens) if self.is_sparse else 0

    @property
    def bound_bytes(self) -> int:
        """From the checksum column's begin, what the metadata checksum covers: the coverage column, too."""
        if self.coverage_offset is None:
            return self.checksum_bytes
        return self.coverage_offset + self.coverage_bytes - self.checksum_offset

    def layer_pieces(self, layer: int) -> range:
        """Ids of the pieces of one layer of the span."""
        row = self.span.layers.index(layer)
        return range(row * self.pieces_per_layer, (row + 1) * self.pieces_per_layer)

    def tensor_pieces(self, layer: int, tensor: int) -> range:
        """Ids of the pieces of one tensor of one layer; empty if this shard holds no rows of it."""
        first = self.layer_pieces(layer).start
        within = self._tensor_ranges.get(tensor, range(0))
        return range(first + within.start, first + within.stop) if within else within

    @cached_property
    def _tensor_ranges(self) -> dict[int, range]:
        """Pieces of each tensor within those of a layer: a tensor's pieces follow one another."""
        ranges: dict[int, range] = {}
        for number, piece in enumerate(self.pieces[: self.pieces_per_layer]):
            ranges[piece.tensor] = range(ranges.get(piece.tensor, range(number, 0)).start, number + 1)
        return ranges

    def coverage(self, record: memoryview) -> memoryview:
        """The coverage column of a sparse record in memory; empty for others."""
        start = self.coverage_offset or 0
        return record[start : start + self.coverage_bytes]

    def checksums(self, record: memoryview) -> npt.NDArray[np.uint32]:
        """The checksum column of a record in memory, in piece order; writable if the memory is."""
        return np.frombuffer(record, np.uint32, len(self.pieces), self.checksum_offset)


def record_layout(
    spec: ModelSpec, group_index: int, span_index: int, units: UnitRange, is_sparse: bool = False
) -> RecordLayout:
    """The layout of a record class; built once (about a millisecond), then shared."""
    return _record_layout(spec, group_index, span_index, units, is_sparse)


@lru_cache(maxsize=1024)
def _record_layout(
    spec: ModelSpec, group_index: int, span_index: int, units: UnitRange, is_sparse: bool
) -> RecordLayout:
    return RecordLayout(spec, group_index, span_index, units, is_sparse)


def largest_slot_bytes(spec: ModelSpec) -> int:
    """Size of the largest slot that any record of a spec takes, sparse ones included."""
    return max(
        record_layout(
            spec, group, span, spec.groups[group].all_units, is_sparse=group in spec.attention_groups
        ).slot_bytes
        for group in range(len(spec.groups))
        for span in range(len(spec.spans[group]))
    )


def slot_sizes_bytes(spec: ModelSpec) -> tuple[int, ...]:
    """Sizes of the slots that unsharded records of a spec take, ascending."""
    sizes = {
        record_layout(spec, group, span, spec.groups[group].all_units).slot_bytes
        for group in range(len(spec.groups))
        for span in range(len(spec.spans[group]))
    }
    return tuple(sorted(sizes))


def _placeholder(name: str) -> bytes:
    width = FIELD_WIDTHS[name]
    return (f"<{name[8:]}>" + "." * width)[:width].encode()


def _messages(batch: pa.RecordBatch) -> tuple[bytes, bytes]:
    """The schema message and the record batch message of an Arrow IPC stream with `batch`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch, custom_metadata={name: _placeholder(name) for name in FIELD_WIDTHS})
    stream = sink.getvalue().to_pybytes()
    schema_bytes = 8 + struct.unpack_from("<i", stream, 4)[0]
    end = len(stream) - 8  # the end-of-stream marker
    return stream[:schema_bytes], stream[schema_bytes:end]


def _find_once(haystack: bytearray, needle: bytes) -> int:
    if haystack.count(needle) != 1:
        raise AssertionError(f"placeholder {needle!r} is not unique in the Arrow framing")
    return haystack.index(needle)


def _column_offsets(layout: RecordLayout, message: bytes, metadata_bytes: int) -> list[int]:
    """Start of each column's values, relative to the start of a record with the padded header."""
    buffer = pa.py_buffer(message)
    batch = pa.ipc.read_record_batch(buffer, layout.schema)
    offsets = []
    names = [*(layout.group.tensors[index].name for index in layout.columns), CHECKSUM_COLUMN]
    for name in [*names, COVERAGE_COLUMN] if layout.is_sparse else names:
        column = batch.column(batch.schema.get_field_index(name))
        storage = column.storage if isinstance(column, pa.ExtensionArray) else column
        data = storage.flatten().buffers()[1]
        offsets.append(data.address - buffer.address - metadata_bytes + layout.header_bytes)
    return offsets
