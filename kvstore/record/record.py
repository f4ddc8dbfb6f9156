"""One record in memory: seal it, verify it, look into it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kvstore._native import crc32c, crc32c_many
from kvstore.errors import ChecksumError, RecordError
from kvstore.record.header import CHECKSUM_FIELD, FIELD_WIDTHS, RecordHeader, blank_field, checksum_field
from kvstore.record.seal import seal_records

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.record.layout import RecordLayout


class Record:
    """A record that lies in `memory`: bytes, an arena slot, a file mapping. Views share that memory.

    Raises:
        RecordError: the memory is shorter than a record of this layout.
    """

    def __init__(self, layout: RecordLayout, memory: memoryview) -> None:
        if memory.nbytes < layout.record_bytes:
            raise RecordError(f"the record is truncated: {memory.nbytes} of {layout.record_bytes} bytes are there")
        self.layout = layout
        self.memory = memory.cast("B")[: layout.record_bytes]

    def seal(self, header: RecordHeader) -> None:
        """Write the framing. Every piece and its checksum must be in place."""
        address = np.array([np.frombuffer(self.memory, np.uint8).ctypes.data], np.uint64)
        seal_records(self.layout, address, [header], [header.cost_us])

    def header(self) -> RecordHeader:
        """The per-record fields, after checking that the framing is that of this class.

        The header must equal the class's template byte for byte outside the per-record fields, so
        nothing of a foreign record's offsets is ever trusted.

        Raises:
            RecordError: the framing is another class's, or the fields contradict the class.
            ChecksumError: the checksum of schema, metadata and checksum column does not hold.
        """
        layout = self.layout
        framed = bytearray(self.memory[: layout.header_bytes])
        fields = {name: bytes(framed[layout.field_offsets[name] :][:width]) for name, width in FIELD_WIDTHS.items()}
        _blank(framed, layout, CHECKSUM_FIELD)
        expected = checksum_field(self._metadata_checksum(framed))
        if fields[CHECKSUM_FIELD] != expected:
            raise ChecksumError(
                f"the record's metadata checksum is {fields[CHECKSUM_FIELD]!r}, computed {expected!r}: "
                "the record is damaged or of another class"
            )
        for name in FIELD_WIDTHS:
            _blank(framed, layout, name)
        if framed != layout.header_template:
            raise RecordError(
                f"the record's framing is not that of group {layout.group.name!r}, span {layout.span.index}, "
                f"units {layout.units.start} to {layout.units.stop}: another spec, shard or format"
            )
        header = RecordHeader.from_fields(fields)
        valid_tokens = layout.group.valid_tokens(layout.spec.block_tokens, header.end_tokens)
        if header.valid_tokens != valid_tokens:
            raise RecordError(
                f"the record says that it holds {header.valid_tokens} tokens at {header.end_tokens}; its group "
                f"{layout.group.name!r} holds {valid_tokens} there"
            )
        return header

    def _metadata_checksum(self, framed: bytearray) -> int:
        """CRC32C over the class's schema message, the header with a blank checksum, checksum and coverage columns."""
        layout = self.layout
        column = self.memory[layout.checksum_offset : layout.checksum_offset + layout.bound_bytes]
        return crc32c(column, crc32c(framed, layout.schema_checksum))

    @property
    def checksums(self) -> npt.NDArray[np.uint32]:
        """The stored piece checksums, by piece id; writable if the memory is."""
        return self.layout.checksums(self.memory)

    def compute_checksums(self) -> npt.NDArray[np.uint32]:
        """CRC32C of every piece as it lies here now."""
        base = np.frombuffer(self.memory, np.uint8).ctypes.data
        addresses = (self.layout.piece_offsets + base).astype(np.uint64)
        return crc32c_many(addresses, self.layout.piece_sizes.astype(np.uint64))

    def verify(self) -> RecordHeader:
        """Check framing, metadata, padding and every piece.

        Raises:
            RecordError, ChecksumError: as `header`, or naming the pieces that are damaged.
        """
        header = self.header()
        for offset, size in self.layout.gaps:
            if any(self.memory[offset : offset + size]):
                raise ChecksumError(f"the padding at byte {offset} of the record is not zero: the record is damaged")
        bad = np.flatnonzero(self.compute_checksums() != self.checksums)
        if bad.size:
            piece = self.layout.pieces[int(bad[0])]
            tensor = self.layout.group.tensors[piece.tensor].name
            raise ChecksumError(
                f"{bad.size} of {len(self.layout.pieces)} pieces are damaged, the first: layer {piece.layer}, "
                f"tensor {tensor!r}, unit {piece.unit}, prefix {header.key.hex()[:16]}"
            )
        return header

    @property
    def coverage(self) -> memoryview:
        """Of a sparse record: which tokens each of its layers holds, a mask per layer. Empty for others."""
        return self.layout.coverage(self.memory)

    def piece(self, piece: int) -> memoryview:
        """The bytes of one piece."""
        offset = int(self.layout.piece_offsets[piece])
        return self.memory[offset : offset + int(self.layout.piece_sizes[piece])]

    def tensor(self, layer: int, name: str) -> npt.NDArray[np.generic]:
        """Read-only view of one layer's tensor: `[rows, capacity_tokens, *inner]` or `[rows, *inner]`.

        bfloat16 and float8 come as unsigned integers of their width.

        Raises:
            RecordError: this record has no such layer or tensor.
        """
        layout = self.layout
        names = [layout.group.tensors[index].name for index in layout.columns]
        if layer not in layout.span.layers or name not in names:
            raise RecordError(
                f"the record holds layers {layout.span.layers} with tensors {', '.join(names)}; "
                f"not layer {layer}, {name!r}"
            )
        index = next(i for i, tensor in enumerate(layout.group.tensors) if tensor.name == name)
        spec = layout.group.tensors[index]
        pieces = [layout.pieces[i] for i in layout.tensor_pieces(layer, index)]
        shape = spec.shape(sum(piece.rows for piece in pieces), layout.capacity_tokens)
        view = np.ndarray(shape, spec.dtype.storage, self.memory, pieces[0].offset)
        view.flags.writeable = False
        return view

    def to_arrow(self) -> pa.RecordBatch:
        """The sealed record as a read-only Arrow record batch over the same memory.

        From it come the Arrow C data interface and, for each column's values, DLPack.

        Raises:
            RecordError, ChecksumError: as `header`; Arrow must not follow the offsets of damaged metadata.
        """
        self.header()
        return pa.ipc.read_record_batch(pa.py_buffer(self.memory.toreadonly()), self.layout.schema)


def _blank(framed: bytearray, layout: RecordLayout, name: str) -> None:
    offset = layout.field_offsets[name]
    framed[offset : offset + FIELD_WIDTHS[name]] = blank_field(name)
