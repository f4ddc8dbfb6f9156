"""A second reader of records, from docs/format.md alone: pyarrow, NumPy and nothing of kvstore."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tests.format.float_bits import values_of

if TYPE_CHECKING:
    import numpy.typing as npt

_TABLE: list[int] = []
for _byte in range(256):
    _crc = _byte
    for _ in range(8):
        _crc = _crc >> 1 ^ (0x82F63B78 if _crc & 1 else 0)
    _TABLE.append(_crc)


def crc32c(data: bytes) -> int:
    """CRC32C bit by bit (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


@dataclass
class PlainRecord:
    """What a record holds.

    Attributes:
        metadata: of the schema.
        header: the per-record fields.
        tensors: values by (layer, name), `[rows, valid tokens, *inner]` or `[rows, *inner]`.
        logical: Arrow's own view by (layer, name): `[capacity tokens, rows, *inner]` for tensors with tokens.
        pieces: (layer, tensor, segment, unit, offset, size in bytes, checksum) in piece order.
        held: which of the valid tokens each layer holds; None if all.
    """

    metadata: dict[str, str]
    header: dict[str, str]
    tensors: dict[tuple[int, str], npt.NDArray[Any]]
    logical: dict[tuple[int, str], npt.NDArray[Any]]
    pieces: list[tuple[int, str, str, int, int, int, int]]
    held: list[list[bool]] | None


def read(stream: bytes) -> PlainRecord:
    with pa.ipc.open_stream(stream) as reader:
        batch, custom = reader.read_next_batch_with_custom_metadata()
    metadata = {key.decode(): value.decode() for key, value in batch.schema.metadata.items()}
    header = {key.decode(): value.decode() for key, value in custom.items()}
    assert metadata["kvstore.version"] == "1"
    schema_bytes = 8 + struct.unpack_from("<i", stream, 4)[0]
    header_bytes = 8 + struct.unpack_from("<i", stream, schema_bytes + 4)[0]
    record = stream[schema_bytes:]
    layers = [int(layer) for layer in metadata["kvstore.layers"].split(",")]
    valid = int(header["kvstore.valid_tokens"])
    has_tokens = metadata["kvstore.capacity_tokens"] != "0"
    tensors: dict[tuple[int, str], npt.NDArray[Any]] = {}
    logical: dict[tuple[int, str], npt.NDArray[Any]] = {}
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if field.name in ("crc32c", "coverage"):
            continue
        dtype = field.metadata[b"kvstore.dtype"].decode()
        for layer, physical, ordered in zip(
            layers,
            column.storage.flatten().to_numpy().reshape(len(layers), *field.type.shape),
            column.to_numpy_ndarray(),
            strict=True,
        ):
            tensors[layer, field.name] = values_of(physical[:, :valid] if has_tokens else physical, dtype)
            logical[layer, field.name] = values_of(ordered, dtype)
    pieces = _pieces(batch, layers, header_bytes)
    for *_, offset, size_bytes, checksum in pieces:
        assert crc32c(record[offset : offset + size_bytes]) == checksum
    held = None
    column = b"".join(struct.pack("<I", piece[-1]) for piece in pieces)
    if metadata["kvstore.coverage"] == "tokens":
        masks = [bytes(row.as_py()) for row in batch.column("coverage")]
        held = [[bool(mask[token // 8] >> token % 8 & 1) for token in range(valid)] for mask in masks]
        column += bytes(-len(column) % 8) + b"".join(masks)
    else:
        assert metadata["kvstore.coverage"] == "all"
    _check_metadata(stream, schema_bytes, header_bytes, header["kvstore.metadata_crc32c"], column)
    return PlainRecord(metadata, header, tensors, logical, pieces, held)


def _pieces(
    batch: pa.RecordBatch, layers: list[int], header_bytes: int
) -> list[tuple[int, str, str, int, int, int, int]]:
    fields = [field for field in batch.schema if field.name not in ("crc32c", "coverage")]
    starts = {}
    end = header_bytes
    for field in fields:
        starts[field.name] = end
        end += len(layers) * field.type.storage_type.list_size * field.type.value_type.bit_width // 8
        end = -(-end // 8) * 8
    pieces = []
    for row, layer in enumerate(layers):
        checksums = iter(batch.column("crc32c")[row].as_py())
        for field in fields:
            layer_bytes = field.type.storage_type.list_size * field.type.value_type.bit_width // 8
            offset = starts[field.name] + row * layer_bytes
            for segment in field.metadata[b"kvstore.segments"].decode().split(","):
                name, start, stop, _, unit_rows = segment.split(":")
                size_bytes = layer_bytes // field.type.shape[0] * int(unit_rows)
                for unit in range(int(start), int(stop)):
                    pieces.append((layer, field.name, name, unit, offset, size_bytes, next(checksums)))
                    offset += size_bytes
    return pieces


def _check_metadata(stream: bytes, schema_bytes: int, header_bytes: int, stored: str, column: bytes) -> None:
    header = stream[schema_bytes : schema_bytes + header_bytes]
    assert header.count(stored.encode()) == 1
    blank = header.replace(stored.encode(), b"crc32c:00000000")
    assert stored == f"crc32c:{crc32c(stream[:schema_bytes] + blank + column):08x}"
