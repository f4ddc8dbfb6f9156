"""Head and tail of a segment: what makes records that lie one after the other an Arrow IPC file.

https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format and
https://github.com/apache/arrow/blob/main/format/File.fbs.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c
from kvstore.limits import FILE_ALIGN_BYTES
from kvstore.record.message import CONTINUATION, END_OF_STREAM, PREFIX_BYTES, schema_table
from kvstore.tiers.ssd.memory import aligned, padded

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.record import RecordLayout

ARROW_MAGIC = b"ARROW1"
_BEGIN = ARROW_MAGIC + bytes(2)
_END = struct.Struct("<I6s")
STAMP_BYTES = 64
_STAMP_CRC_OFFSET = STAMP_BYTES - 4
# Magic, directory id, number and nonce of the file, class, reserved, checksum.
_HEAD_STAMP = struct.Struct("<8s16sQQ4H12xI")
_HEAD_MAGIC = b"KVSSEGM1"
# Magic, directory id, number and nonce, end of the records, checksum of the footer, reserved, checksum.
_TAIL_STAMP = struct.Struct("<8s16sQQQI8xI")
_TAIL_MAGIC = b"KVSSEAL1"
_BLOCK = np.dtype([("offset", "<i8"), ("metadata_bytes", "<i4"), ("zero", "<i4"), ("body_bytes", "<i8")])
_METADATA_V5 = 4
_BLOCKS_BEGIN = 48
FOOTER_BYTES_MAX = 64 << 20
"""A segment of so many records that its list of them would be larger is sealed before."""

assert _HEAD_STAMP.size == _TAIL_STAMP.size == STAMP_BYTES


@dataclass(frozen=True)
class SegmentStamp:
    """Which file a head or a tail belongs to."""

    directory_id: bytes
    number: int
    nonce: int


def head_bytes(layout: RecordLayout) -> int:
    """Size of a segment's head: where its first record begins."""
    return padded(len(_BEGIN) + len(layout.schema_message) + STAMP_BYTES)


def pack_head(layout: RecordLayout, stamp: SegmentStamp) -> npt.NDArray[np.uint8]:
    """The magic and the class's schema message, its metadata padded; the last bytes of the padding are the stamp."""
    size_bytes = head_bytes(layout)
    head = bytearray(size_bytes)
    head[: len(_BEGIN)] = _BEGIN
    head[len(_BEGIN) : len(_BEGIN) + len(layout.schema_message)] = layout.schema_message
    struct.pack_into("<II", head, len(_BEGIN), CONTINUATION, size_bytes - len(_BEGIN) - PREFIX_BYTES)
    name = (layout.group_index, layout.span.index, layout.units.start, layout.units.stop)
    packed = bytearray(_HEAD_STAMP.pack(_HEAD_MAGIC, stamp.directory_id, stamp.number, stamp.nonce, *name, 0))
    head[-STAMP_BYTES:] = _with_checksum(packed)
    return _aligned_copy(head)


def parse_head_stamp(page: bytes) -> SegmentStamp | None:
    """The stamp at the end of a head; None if it is damaged."""
    packed = page[-STAMP_BYTES:]
    if not packed.startswith(_HEAD_MAGIC) or _with_checksum(bytearray(packed)) != packed:
        return None
    _, directory_id, number, nonce, *_ = _HEAD_STAMP.unpack(packed)
    return SegmentStamp(directory_id, number, nonce)


def pack_tail(
    layout: RecordLayout, stamp: SegmentStamp, offsets: npt.NDArray[np.uint64], end: int
) -> npt.NDArray[np.uint8]:
    """End of stream, a stamp, zeros, and the footer at the very end.

    Args:
        offsets: of the segment's records.
        end: where the last record's slot ends, and this begins.
    """
    footer = _footer(layout, offsets)
    tail = bytearray(_tail_bytes(len(footer)))
    packed = _TAIL_STAMP.pack(_TAIL_MAGIC, stamp.directory_id, stamp.number, stamp.nonce, end, crc32c(footer), 0)
    tail[: len(END_OF_STREAM)] = END_OF_STREAM
    tail[len(END_OF_STREAM) : len(END_OF_STREAM) + STAMP_BYTES] = _with_checksum(bytearray(packed))
    tail[-_END.size - len(footer) : -_END.size] = footer
    tail[-_END.size :] = _END.pack(len(footer), ARROW_MAGIC)
    return _aligned_copy(tail)


def tail_bytes_of(last_page: bytes) -> int:
    """Size of the tail of a file, by its last page; 0 if it has none."""
    footer_bytes, magic = _END.unpack(last_page[-_END.size :])
    return _tail_bytes(footer_bytes) if magic == ARROW_MAGIC and footer_bytes <= FOOTER_BYTES_MAX else 0


def parse_tail(tail: bytes, stamp: SegmentStamp) -> int | None:
    """Where the records of a sealed segment end; None if this is not its sound tail."""
    packed = tail[len(END_OF_STREAM) : len(END_OF_STREAM) + STAMP_BYTES]
    if not packed.startswith(_TAIL_MAGIC) or _with_checksum(bytearray(packed)) != packed:
        return None
    _, directory_id, number, nonce, end, footer_checksum, _ = _TAIL_STAMP.unpack(packed)
    footer_bytes, _ = _END.unpack(tail[-_END.size :])
    footer = tail[-_END.size - footer_bytes : -_END.size]
    if SegmentStamp(directory_id, number, nonce) != stamp or crc32c(footer) != footer_checksum:
        return None
    return int(end)


def _tail_bytes(footer_bytes: int) -> int:
    return padded(len(END_OF_STREAM) + STAMP_BYTES + footer_bytes + _END.size)


def _footer(layout: RecordLayout, offsets: npt.NDArray[np.uint64]) -> bytes:
    """Arrow's `Footer` table. The schema is that of the schema message, whose flatbuffer is copied as it is.

    Offsets within a flatbuffer are relative, so a copy of a whole one remains valid wherever it lies.
    """
    schema = layout.schema_message[PREFIX_BYTES:]
    blocks = np.zeros(len(offsets), _BLOCK)
    blocks["offset"] = offsets
    blocks["metadata_bytes"] = layout.header_bytes
    blocks["body_bytes"] = layout.body_bytes
    schema_begin = _BLOCKS_BEGIN + blocks.nbytes
    head = bytearray(_BLOCKS_BEGIN)
    vtable, table, dictionaries, batches = 4, 16, 36, _BLOCKS_BEGIN - 4
    struct.pack_into("<I", head, 0, table)
    # Sizes of vtable and table; where the fields version, schema, dictionaries and recordBatches lie in the table.
    struct.pack_into("<6H", head, vtable, 12, 20, 16, 4, 8, 12)
    schema_at = schema_begin + schema_table(schema)
    fields = (table - vtable, schema_at - (table + 4), dictionaries - (table + 8), batches - (table + 12), _METADATA_V5)
    struct.pack_into("<iIIIh", head, table, *fields)
    struct.pack_into("<I", head, batches, len(blocks))
    footer = bytes(head) + blocks.tobytes() + schema
    # So that it begins at a multiple of 8 in the file, the tail being one.
    return footer + bytes((-len(footer) - _END.size) % 8)


def _with_checksum(packed: bytearray) -> bytes:
    struct.pack_into("<I", packed, _STAMP_CRC_OFFSET, 0)
    struct.pack_into("<I", packed, _STAMP_CRC_OFFSET, crc32c(packed))
    return bytes(packed)


def _aligned_copy(data: bytearray) -> npt.NDArray[np.uint8]:
    assert len(data) % FILE_ALIGN_BYTES == 0
    copy = aligned(len(data))
    copy[:] = np.frombuffer(data, np.uint8)
    return copy
