"""The Arrow schema of a record, and the metadata that says what it holds (docs/format.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from kvstore.errors import FormatVersionError, RecordError, SpecError
from kvstore.limits import BLOCK_TOKENS_MAX, LAYERS_MAX, SHARD_UNITS_MAX
from kvstore.spec.coverage import mask_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.spec import CacheGroup, LayerSpan, ModelSpec, TensorSpec, UnitRange

FORMAT_VERSION = "1"
CHECKSUM_COLUMN = "crc32c"
COVERAGE_COLUMN = "coverage"
COVERAGE_ALL = "all"
COVERAGE_TOKENS = "tokens"
"""Each layer holds the tokens that the coverage column names."""
CODECS_RAW = "raw"

ARROW_STORAGE = {
    "float64": pa.float64(),
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),
    "float8_e4m3fn": pa.uint8(),
    "float8_e5m2": pa.uint8(),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "int16": pa.int16(),
    "int8": pa.int8(),
    "uint8": pa.uint8(),
}
"""Arrow type that carries each logical element type."""

_RULES = ("attention", "state")
_NUMBER_DIGITS_MAX = 10


@dataclass(frozen=True)
class SchemaFields:
    """What the schema metadata of one record says, checked and parsed."""

    fingerprint: bytes
    model: str
    group: str
    rule: str
    layers: tuple[int, ...]
    span_index: int
    unit_start: int
    unit_stop: int
    unit_count: int
    block_tokens: int
    capacity_tokens: int
    codecs: str
    coverage: str

    @property
    def is_sparse(self) -> bool:
        """Whether a coverage column says which tokens each layer holds."""
        return self.coverage == COVERAGE_TOKENS


def tensor_rows(group: CacheGroup, tensor: TensorSpec, units: UnitRange) -> int:
    """Rows of `tensor` in a record that holds `units`."""
    return sum(len(group.segment_units(segment, units)) * segment.unit_rows for segment in tensor.segments)


def arrow_schema(
    spec: ModelSpec, group: CacheGroup, span: LayerSpan, units: UnitRange, pieces_per_layer: int, is_sparse: bool
) -> pa.Schema:
    """One row per layer, a fixed-shape tensor column per tensor, the piece checksums, the coverage of sparse ones.

    Raises:
        SpecError: a name of the spec cannot be written into a schema.
    """
    for tensor in group.tensors:
        if tensor.name == CHECKSUM_COLUMN:
            raise SpecError(f"group {group.name!r}: {CHECKSUM_COLUMN!r} is the column of checksums; rename the tensor")
        if tensor.name == COVERAGE_COLUMN and is_sparse:
            raise SpecError(f"group {group.name!r}: {COVERAGE_COLUMN!r} is the column of coverage; rename the tensor")
        for segment in tensor.segments:
            if not segment.name.isidentifier():
                raise SpecError(f"tensor {tensor.name!r}: the segment name {segment.name!r} is not an identifier")
    capacity = group.capacity_tokens(spec.block_tokens)
    fields: list[pa.Field] = []
    for tensor in group.tensors:
        rows = tensor_rows(group, tensor, units)
        if rows == 0:
            continue
        shape = tensor.shape(rows, capacity)
        inner_names = [f"dim{axis}" for axis in range(len(tensor.inner))]
        names = ["rows", "tokens", *inner_names] if tensor.has_tokens else ["rows", *inner_names]
        # The logical order of a token tensor is [tokens, rows, ...]; rows lie outermost in memory.
        permutation = [1, 0, *range(2, len(shape))] if tensor.has_tokens else None
        type_ = pa.fixed_shape_tensor(ARROW_STORAGE[tensor.dtype.label], shape, names, permutation)
        segments = ",".join(
            f"{segment.name}:{held.start}:{held.stop}:{segment.units}:{segment.unit_rows}"
            for segment in tensor.segments
            if len(held := group.segment_units(segment, units))
        )
        metadata = {"kvstore.dtype": tensor.dtype.label, "kvstore.segments": segments}
        fields.append(pa.field(tensor.name, type_, nullable=False, metadata=metadata))
    checksums = pa.list_(pa.field("item", pa.uint32(), nullable=False), pieces_per_layer)
    fields.append(pa.field(CHECKSUM_COLUMN, checksums, nullable=False))
    if is_sparse:
        fields.append(pa.field(COVERAGE_COLUMN, coverage_type(capacity), nullable=False))
    metadata = {
        "kvstore.version": FORMAT_VERSION,
        "kvstore.fingerprint": spec.fingerprint.hex(),
        "kvstore.model": spec.model,
        "kvstore.group": group.name,
        "kvstore.rule": group.rule.value,
        "kvstore.layers": ",".join(str(layer) for layer in span.layers),
        "kvstore.span": str(span.index),
        "kvstore.units": f"{units.start}:{units.stop}:{group.unit_count}",
        "kvstore.block_tokens": str(spec.block_tokens),
        "kvstore.capacity_tokens": str(capacity),
        "kvstore.codecs": CODECS_RAW,
        "kvstore.coverage": COVERAGE_TOKENS if is_sparse else COVERAGE_ALL,
    }
    return pa.schema(fields, metadata=metadata)


def coverage_type(capacity_tokens: int) -> pa.DataType:
    """Arrow type of the coverage column: a bit per token, the lowest bit of the first byte first."""
    return pa.list_(pa.field("item", pa.uint8(), nullable=False), mask_bytes(capacity_tokens))


def parse_schema(schema: pa.Schema) -> SchemaFields:
    """Check a foreign schema's metadata.

    Raises:
        FormatVersionError: another format version, codec chain or coverage than this reader knows.
        RecordError: the metadata is missing or malformed.
    """
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace") for key, value in (schema.metadata or {}).items()
    }
    check_version(schema.metadata or {})
    try:
        start, stop, count = (parse_number(part) for part in metadata["kvstore.units"].split(":"))
        fields = SchemaFields(
            fingerprint=parse_digest(metadata["kvstore.fingerprint"]),
            model=metadata["kvstore.model"],
            group=metadata["kvstore.group"],
            rule=metadata["kvstore.rule"],
            layers=tuple(parse_number(layer) for layer in metadata["kvstore.layers"].split(",")),
            span_index=parse_number(metadata["kvstore.span"]),
            unit_start=start,
            unit_stop=stop,
            unit_count=count,
            block_tokens=parse_number(metadata["kvstore.block_tokens"]),
            capacity_tokens=parse_number(metadata["kvstore.capacity_tokens"]),
            codecs=metadata["kvstore.codecs"],
            coverage=metadata["kvstore.coverage"],
        )
    except (KeyError, ValueError) as error:
        raise RecordError(f"the record's schema metadata is incomplete or malformed: {error}") from error
    if fields.codecs != CODECS_RAW:
        raise FormatVersionError(f"codec chain {fields.codecs!r} is not known here; known is {CODECS_RAW!r}")
    if fields.coverage not in (COVERAGE_ALL, COVERAGE_TOKENS):
        raise FormatVersionError(
            f"coverage {fields.coverage!r} is not known here; known are {COVERAGE_ALL!r} and {COVERAGE_TOKENS!r}"
        )
    _check_fields(fields)
    return fields


def _check_fields(fields: SchemaFields) -> None:
    if fields.rule not in _RULES:
        raise RecordError(f"the record's reuse rule {fields.rule!r} is none of {', '.join(_RULES)}")
    layers = fields.layers
    if list(layers) != sorted(set(layers)) or layers[-1] >= LAYERS_MAX:
        raise RecordError(f"the record's layers are not ascending numbers below {LAYERS_MAX}")
    if not fields.unit_start < fields.unit_stop <= fields.unit_count <= SHARD_UNITS_MAX:
        raise RecordError(
            f"the record's units {fields.unit_start} to {fields.unit_stop} of {fields.unit_count} are no range"
        )
    if not 1 <= fields.block_tokens <= BLOCK_TOKENS_MAX:
        raise RecordError(f"the record's block_tokens={fields.block_tokens} is outside 1 to {BLOCK_TOKENS_MAX}")
    if fields.rule == "attention" and fields.capacity_tokens != fields.block_tokens:
        raise RecordError(
            f"an attention record has room for {fields.capacity_tokens} tokens in blocks of {fields.block_tokens}"
        )
    if fields.coverage == COVERAGE_TOKENS and fields.rule != "attention":
        raise RecordError(f"a record of rule {fields.rule!r} has coverage {fields.coverage!r}; states are whole")


def check_version(metadata: Mapping[bytes, bytes]) -> None:
    """Check the format version alone: all else, checksums too, depends on it.

    Raises:
        FormatVersionError: another version than this reader knows. RecordError: there is none.
    """
    version = metadata.get(b"kvstore.version", b"").decode(errors="replace")
    if not version:
        raise RecordError("the Arrow schema has no kvstore.version; this is not a kvstore record")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"record format version {version!r} is not {FORMAT_VERSION!r}, the one that this reader knows; "
            "use a kvstore release that writes or reads it"
        )


def parse_number(text: str) -> int:
    """A decimal number in its only form: ASCII digits, no sign, no leading zero.

    Raises:
        ValueError: it is something else, or too long.
    """
    if not (text.isascii() and text.isdigit()) or len(text) > _NUMBER_DIGITS_MAX or (text[0] == "0" and text != "0"):
        raise ValueError(f"{text[:40]!r} is not a plain decimal number")
    return int(text)


def parse_digest(text: str) -> bytes:
    """Parse 32 bytes from lower-case hexadecimal.

    Raises:
        ValueError: it is something else.
    """
    if len(text) != 64 or any(character not in "0123456789abcdef" for character in text):
        raise ValueError(f"{text[:80]!r} is not 64 digits of lower-case hexadecimal")
    return bytes.fromhex(text)
