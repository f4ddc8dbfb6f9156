"""The columns of a record that is read without its spec, checked against what its schema says (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import pyarrow as pa

from kvstore.errors import RecordError, SpecError
from kvstore.limits import RECORD_BYTES_MAX, SHARD_UNITS_MAX, TENSORS_PER_GROUP_MAX
from kvstore.record.schema import (
    ARROW_STORAGE,
    CHECKSUM_COLUMN,
    COVERAGE_COLUMN,
    SchemaFields,
    coverage_type,
    parse_number,
)
from kvstore.spec import DType

if TYPE_CHECKING:
    from collections.abc import Iterator

COLUMN_ALIGN_BYTES = 8
"""Each column's values begin at a multiple of this, counted from the start of the body."""


@dataclass(frozen=True)
class SegmentUnits:
    """Rows of one segment that a record holds: units `start` to `stop` of `units`, `unit_rows` rows each."""

    name: str
    start: int
    stop: int
    units: int
    unit_rows: int


@dataclass(frozen=True)
class TensorColumn:
    """One tensor of every layer of a record.

    Attributes:
        name: the tensor's name.
        dtype: logical element type.
        shape: of one layer as it lies in memory: `[rows, tokens, *inner]` or `[rows, *inner]`.
        has_tokens: whether the second axis counts tokens.
        segments: what the rows are.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    has_tokens: bool
    segments: tuple[SegmentUnits, ...]

    @property
    def layer_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all its tokens included."""
        return prod(self.shape[1:]) * self.dtype.itemsize

    def units(self) -> Iterator[tuple[SegmentUnits, int]]:
        """The pieces of one layer, in storage order, as (segment, unit)."""
        for segment in self.segments:
            for unit in range(segment.start, segment.stop):
                yield segment, unit


def parse_columns(schema: pa.Schema, fields: SchemaFields) -> tuple[TensorColumn, ...]:
    """Check the columns of a foreign schema.

    Raises:
        RecordError: a column is not what the schema's metadata and the format say.
    """
    others = 1 + fields.is_sparse
    if not 1 <= len(schema) - others <= TENSORS_PER_GROUP_MAX:
        raise RecordError(f"a record has 1 to {TENSORS_PER_GROUP_MAX} tensors and checksums, not {len(schema)} columns")
    columns = tuple(_parse_column(field, fields) for field in list(schema)[:-others])
    if len({column.name for column in columns}) != len(columns):
        raise RecordError("the record names a tensor twice")
    last = schema.field(len(schema) - others)
    pieces = sum(1 for column in columns for _ in column.units())
    expected = pa.list_(pa.field("item", pa.uint32(), nullable=False), pieces)
    if last.name != CHECKSUM_COLUMN or last.type != expected or last.nullable:
        raise RecordError(
            f"the column after the tensors is {last.name!r}: {last.type}, not {CHECKSUM_COLUMN!r}: {expected}"
        )
    if fields.is_sparse:
        coverage, expected = schema.field(len(schema) - 1), coverage_type(fields.capacity_tokens)
        if coverage.name != COVERAGE_COLUMN or coverage.type != expected or coverage.nullable:
            raise RecordError(
                f"the last column is {coverage.name!r}: {coverage.type}, not {COVERAGE_COLUMN!r}: {expected}"
            )
    total = sum(column.layer_bytes for column in columns) * len(fields.layers)
    if total > RECORD_BYTES_MAX:
        raise RecordError(f"the record's tensors would take {total} bytes, the limit is {RECORD_BYTES_MAX}")
    return columns


def column_offsets(columns: tuple[TensorColumn, ...], layers: int, coverage_bytes: int = 0) -> list[int]:
    """Start of each column in the body, then of the checksums, of the coverage if there is one, and the body's end."""
    pieces = sum(1 for column in columns for _ in column.units())
    offsets = [0]
    sizes = [*(column.layer_bytes * layers for column in columns), 4 * pieces * layers]
    for size in [*sizes, coverage_bytes] if coverage_bytes else sizes:
        offsets.append(-(-(offsets[-1] + size) // COLUMN_ALIGN_BYTES) * COLUMN_ALIGN_BYTES)
    return offsets


def _parse_column(field: pa.Field, fields: SchemaFields) -> TensorColumn:
    name = field.name
    if not isinstance(field.type, pa.FixedShapeTensorType) or field.nullable:
        raise RecordError(f"column {name!r} is {field.type}, not a fixed-shape tensor without nulls")
    metadata = {key.decode(errors="replace"): value for key, value in (field.metadata or {}).items()}
    label = metadata.get("kvstore.dtype", b"").decode(errors="replace")
    try:
        dtype = DType.parse(label)
    except SpecError as error:
        raise RecordError(f"column {name!r} has an unknown kvstore.dtype: {error}") from error
    if field.type.value_type != ARROW_STORAGE[label]:
        raise RecordError(f"column {name!r} carries {label} as {field.type.value_type}, not as {ARROW_STORAGE[label]}")
    shape = tuple(field.type.shape)
    has_tokens = fields.capacity_tokens > 0
    if len(shape) < 1 + has_tokens or any(size < 1 for size in shape):
        raise RecordError(f"column {name!r} has shape {list(shape)}, which lacks an axis or has an empty one")
    permutation = [1, 0, *range(2, len(shape))] if has_tokens else None
    if field.type.permutation not in ((permutation,) if has_tokens else (None, list(range(len(shape))))):
        raise RecordError(f"column {name!r} has permutation {field.type.permutation}, not {permutation}")
    if has_tokens and shape[1] != fields.capacity_tokens:
        raise RecordError(f"column {name!r} has room for {shape[1]} tokens, the record for {fields.capacity_tokens}")
    segments = _parse_segments(name, metadata.get("kvstore.segments", b""), fields)
    rows = sum((segment.stop - segment.start) * segment.unit_rows for segment in segments)
    if rows != shape[0]:
        raise RecordError(f"the segments of column {name!r} have {rows} rows, its shape {shape[0]}")
    return TensorColumn(name, dtype, shape, has_tokens, segments)


def _parse_segments(column: str, text: bytes, fields: SchemaFields) -> tuple[SegmentUnits, ...]:
    """Parse `name:start:stop:units:unit_rows,...` and hold it against the record's own units."""
    segments = []
    try:
        for part in text.decode("ascii").split(","):
            name, *numbers = part.split(":")
            start, stop, units, unit_rows = (parse_number(number) for number in numbers)
            if not name.isidentifier() or not unit_rows:
                raise ValueError(part)
            if not 1 <= units <= SHARD_UNITS_MAX or fields.unit_count % units:
                raise ValueError(f"{part} does not divide {fields.unit_count} units")
            step = fields.unit_count // units
            if (start, stop) != (-(-fields.unit_start // step), -(-fields.unit_stop // step)) or start == stop:
                raise ValueError(f"{part} does not belong to units {fields.unit_start} to {fields.unit_stop}")
            segments.append(SegmentUnits(name, start, stop, units, unit_rows))
    except ValueError as error:
        raise RecordError(f"column {column!r} has malformed segments: {error}") from error
    return tuple(segments)
