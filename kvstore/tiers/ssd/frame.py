"""One frame of a journal: a head that can be trusted alone, then tables of fixed-width rows (docs/format.md)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c
from kvstore.keys import KEY_BYTES
from kvstore.limits import FILE_ALIGN_BYTES, JOURNAL_FRAME_BYTES_MAX
from kvstore.tiers.ssd.memory import aligned, padded
from kvstore.tiers.ssd.names import NUMBER_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

FRAME_MAGIC = b"KVSJRNL1"
HEAD_BYTES = 128
SEQUENCE_MAX = (1 << 62) - 1
# Magic, checksums of head and payload; directory, journal, nonce, sequence, offset; kind, payload bytes, next segment;
# rows of each table; reserved; wall clock.
_HEAD = struct.Struct("<8sII16sQQQQIIQ9I4xQ")
_HEAD_CRC_OFFSET = 8

SEGMENT_ROW = np.dtype([("number", "<u8"), ("nonce", "<u8"), ("name", "<u2", 4)])
ROOT_ROW = np.dtype([("key", "u1", KEY_BYTES), ("salt_bytes", "<u4"), ("zero", "<u4")])
NODE_ROW = np.dtype(
    [("key", "u1", KEY_BYTES), ("parent", "u1", KEY_BYTES), ("end_tokens", "<u4"), ("root", "<u4"),
     ("tail_tokens", "<u4"), ("zero", "<u4")]
)  # fmt: skip
RECORD_ROW = np.dtype(
    [("node", "<u4"), ("grid", "<u4"), ("segment", "<u4"), ("metadata_crc32c", "<u4"), ("offset", "<u8"),
     ("cost_us", "<u8"), ("slot_bytes", "<u4"), ("zero", "<u4")]
)  # fmt: skip
FORGET_ROW = np.dtype([("key", "u1", KEY_BYTES), ("is_state", "<u4"), ("zero", "<u4")])
END_ROW = np.dtype([("key", "u1", KEY_BYTES), ("ends_us", "<u8", 3)])
SALT_BYTE = np.dtype("u1")
TAIL_ID = np.dtype("<u4")
DIGEST_ROW = np.dtype([("digest", "u1", KEY_BYTES)])
TABLES = (SEGMENT_ROW, ROOT_ROW, SALT_BYTE, NODE_ROW, TAIL_ID, RECORD_ROW, DIGEST_ROW, FORGET_ROW, END_ROW)
"""In the order in which they lie in a payload, each padded to 8 bytes."""
TABLE_BYTES = tuple(table.itemsize for table in TABLES)
SEGMENTS, ROOTS, SALTS, NODES, TAILS, RECORDS, DIGESTS, FORGETS, ENDS = range(9)

assert _HEAD.size == HEAD_BYTES
assert all(size % 8 == 0 for size in TABLE_BYTES if size > 4)


class FrameKind(IntEnum):
    """What a frame is."""

    BATCH = 1
    """What one append added."""
    SNAPSHOT = 2
    """A part of what there was when the journal was begun."""
    SNAPSHOT_END = 3
    """The snapshot before it is complete: earlier journals count only from its sequence number on."""


@dataclass(frozen=True)
class FrameHead:
    """What the head of a frame says.

    Attributes:
        directory_id: 16 bytes, of the manifest.
        journal, nonce: of the journal's file.
        sequence: ascending through all journals of a directory.
        offset: where in the file it lies.
        kind: what it is.
        payload_bytes: of its tables.
        next_segment: no segment up to it, itself excluded, is to be made any more.
        counts: rows of each of `TABLES`.
        payload_checksum: CRC32C.
        wall_us: wall-clock microseconds since 1970 when it was written; 0 where nobody said.
    """

    directory_id: bytes
    journal: int
    nonce: int
    sequence: int
    offset: int
    kind: FrameKind
    payload_bytes: int
    next_segment: int
    counts: tuple[int, ...]
    payload_checksum: int
    wall_us: int

    @property
    def frame_bytes(self) -> int:
        """Of head, payload and padding."""
        return padded(HEAD_BYTES + self.payload_bytes)

    def table_begins(self) -> list[int]:
        """Where each table begins in the payload, and where the last one ends."""
        begins = [0]
        for count, size in zip(self.counts, TABLE_BYTES, strict=True):
            begins.append(begins[-1] + -(-count * size // 8) * 8)
        return begins


def pack_frame(
    tables: Sequence[npt.NDArray[np.void] | npt.NDArray[np.uint8] | npt.NDArray[np.uint32]],
    *,
    directory_id: bytes,
    journal: int,
    nonce: int,
    sequence: int,
    offset: int,
    kind: FrameKind,
    next_segment: int,
    wall_us: int = 0,
) -> npt.NDArray[np.uint8]:
    """A frame in aligned memory.

    Raises:
        ValueError: it would be larger than `JOURNAL_FRAME_BYTES_MAX`.
    """
    counts = [len(table) for table in tables]
    payload_bytes = sum(-(-count * size // 8) * 8 for count, size in zip(counts, TABLE_BYTES, strict=True))
    if padded(HEAD_BYTES + payload_bytes) > JOURNAL_FRAME_BYTES_MAX:
        raise ValueError(
            f"one batch of the journal would take {payload_bytes} bytes, the limit is {JOURNAL_FRAME_BYTES_MAX}; "
            "append fewer records at a time"
        )
    frame = aligned(HEAD_BYTES + payload_bytes)
    at = HEAD_BYTES
    for table, size in zip(tables, TABLE_BYTES, strict=True):
        data = np.frombuffer(np.ascontiguousarray(table).tobytes(), np.uint8)
        frame[at : at + len(data)] = data
        at += -(-len(table) * size // 8) * 8
    head = bytearray(
        _HEAD.pack(
            FRAME_MAGIC, 0, crc32c(frame[HEAD_BYTES : HEAD_BYTES + payload_bytes]), directory_id, journal, nonce,
            sequence, offset, kind, payload_bytes, next_segment, *counts, wall_us,
        )
    )  # fmt: skip
    struct.pack_into("<I", head, _HEAD_CRC_OFFSET, crc32c(head))
    frame[:HEAD_BYTES] = np.frombuffer(head, np.uint8)
    return frame


def parse_head(head: bytes) -> FrameHead | None:
    """The head of a frame, if these `HEAD_BYTES` are one that is sound by itself."""
    if len(head) != HEAD_BYTES or not head.startswith(FRAME_MAGIC):
        return None
    (_, head_checksum, payload_checksum, directory_id, journal, nonce, sequence, offset, kind, payload_bytes,
     next_segment, *counts, wall_us) = _HEAD.unpack(head)  # fmt: skip
    blank = head[:_HEAD_CRC_OFFSET] + bytes(4) + head[_HEAD_CRC_OFFSET + 4 :]
    if crc32c(blank) != head_checksum or not FrameKind.BATCH <= kind <= FrameKind.SNAPSHOT_END:
        return None
    frame = FrameHead(
        directory_id, journal, nonce, sequence, offset, FrameKind(kind), payload_bytes, next_segment, tuple(counts),
        payload_checksum, wall_us,
    )  # fmt: skip
    if frame.frame_bytes > JOURNAL_FRAME_BYTES_MAX or frame.table_begins()[-1] != payload_bytes:
        return None
    if next_segment > NUMBER_MAX or sequence > SEQUENCE_MAX:
        return None
    return frame


def has_payload(view: memoryview, head: FrameHead, at: int) -> bool:
    """Whether the frame that begins at `at` lies in a view with all of its payload, and the checksum holds."""
    begin = at + HEAD_BYTES
    payload = view[begin : begin + head.payload_bytes]
    return payload.nbytes == head.payload_bytes and crc32c(payload) == head.payload_checksum


def magic_pages(view: memoryview) -> npt.NDArray[np.int64]:
    """Offsets, multiples of `FILE_ALIGN_BYTES`, at which a frame may begin."""
    whole = view.nbytes // FILE_ALIGN_BYTES * FILE_ALIGN_BYTES
    words = np.frombuffer(view[:whole], np.uint64)[:: FILE_ALIGN_BYTES // 8]
    return np.flatnonzero(words == np.frombuffer(FRAME_MAGIC, np.uint64)[0]) * FILE_ALIGN_BYTES
