"""The 64-byte frame header, and what may follow it (docs/protocol.md, "Frames").

A header can be trusted alone: it carries its own checksum and is checked completely before a byte of
its payload is received.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import NamedTuple

from kvstore._native import crc32c
from kvstore.errors import PeerMismatchError, ProtocolError
from kvstore.limits import (
    FRAME_HEADER_BYTES,
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_PIECES_MAX,
    HANDOVER_PAYLOAD_BYTES_MAX,
    KIB,
    MIB,
    RECORD_BYTES_MAX,
)

MAGIC = b"KVST"
PROTOCOL_VERSION = 1
PIECE_ROW_BYTES = 16
"""One row of a DATA frame's piece table."""
COMMIT_FIXED_BYTES = 24

_HEADER = struct.Struct("<4sHBBQQQIII16sI")
_CHECKED_BYTES = FRAME_HEADER_BYTES - 4
_RESERVED = bytes(16)

assert _HEADER.size == FRAME_HEADER_BYTES


class Kind(enum.IntEnum):
    """What a frame is. These numbers are on the wire: never change one, never use one again."""

    HELLO = 1
    OFFER = 2
    WANT = 3
    EXPOSE = 4
    DATA = 5
    SEAL = 6
    CREDIT = 7
    COMMIT = 8
    COMMITTED = 9
    ABORT = 10
    ABORTED = 11
    PING = 12
    PONG = 13
    LOST = 14
    QUERY = 32
    CANDIDATES = 33
    FETCH = 34


MATCH_KINDS = frozenset({Kind.QUERY, Kind.CANDIDATES, Kind.FETCH})
"""Only between peers that both offer `Feature.MATCH`."""

FLAG_REMOTE = 1
"""DATA only: the pieces lie in exposed memory, and the receiver gets them."""

_PAYLOAD_BYTES_MAX = {
    Kind.HELLO: 1 * KIB,
    Kind.OFFER: FRAME_PAYLOAD_BYTES_MAX,
    Kind.WANT: FRAME_PAYLOAD_BYTES_MAX,
    Kind.EXPOSE: 1 * MIB,
    Kind.SEAL: 1 * MIB,
    Kind.CREDIT: 16,
    Kind.COMMIT: HANDOVER_PAYLOAD_BYTES_MAX + COMMIT_FIXED_BYTES,
    Kind.COMMITTED: 32,
    Kind.ABORT: 2 * KIB,
    Kind.ABORTED: 0,
    Kind.PING: 0,
    Kind.PONG: 0,
    Kind.LOST: 8,
    Kind.QUERY: FRAME_PAYLOAD_BYTES_MAX,
    Kind.CANDIDATES: 2 * KIB,
    Kind.FETCH: 16,
}


class TransferId(NamedTuple):
    """Names a transfer for ever: the boot epoch of the node that began it, and its own counter."""

    epoch: int
    counter: int

    def __str__(self) -> str:
        return f"{self.epoch:016x}-{self.counter}"


NO_TRANSFER = TransferId(0, 0)
"""In frames that belong to the connection rather than to a transfer."""


@dataclass(frozen=True)
class FrameHeader:
    """What precedes each payload.

    Attributes:
        kind: what the frame is.
        transfer: the transfer that it belongs to.
        generation: number of the receiver's attachment that it is meant for; late frames carry an old one.
        payload_bytes: bytes that follow.
        piece_count: rows of a DATA frame's table; 0 in other frames.
        payload_crc32c: checksum of the payload; in DATA frames of the table alone.
        flags: `FLAG_REMOTE` or 0.
    """

    kind: Kind
    transfer: TransferId = NO_TRANSFER
    generation: int = 0
    payload_bytes: int = 0
    piece_count: int = 0
    payload_crc32c: int = 0
    flags: int = 0

    @property
    def table_bytes(self) -> int:
        return self.piece_count * PIECE_ROW_BYTES

    @property
    def body_bytes(self) -> int:
        """Bytes of the pieces that follow the table of a DATA frame."""
        return self.payload_bytes - self.table_bytes

    def pack(self) -> bytes:
        """The 64 bytes, little-endian.

        Raises:
            ProtocolError: this side tries to send what the peer would have to refuse.
        """
        _check_lengths(self)
        fields = (
            MAGIC,
            PROTOCOL_VERSION,
            self.kind,
            self.flags,
            self.transfer.epoch,
            self.transfer.counter,
            self.generation,
            self.payload_bytes,
            self.piece_count,
            self.payload_crc32c,
            _RESERVED,
        )
        packed = bytearray(_HEADER.pack(*fields, 0))
        struct.pack_into("<I", packed, _CHECKED_BYTES, crc32c(memoryview(packed)[:_CHECKED_BYTES]))
        return bytes(packed)


def parse_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """Read and check a header. After any error nothing that follows on the connection can be trusted.

    Raises:
        ProtocolError: damaged, of an unknown kind, or with lengths beyond the limits.
        PeerMismatchError: an intact header of another protocol version.
    """
    if len(data) != FRAME_HEADER_BYTES:
        raise ProtocolError(f"a frame header has {FRAME_HEADER_BYTES} bytes, not {len(data)}")
    magic, version, number, flags, epoch, counter, generation, payload, pieces, payload_crc, reserved, crc = (
        _HEADER.unpack(data)
    )
    if magic != MAGIC:
        raise ProtocolError(f"a frame begins with {magic!r} instead of {MAGIC!r}; the peer speaks another protocol")
    if crc != crc32c(memoryview(data)[:_CHECKED_BYTES]):
        raise ProtocolError(f"a frame header is damaged: its checksum {crc:08x} does not hold")
    if version != PROTOCOL_VERSION:
        raise PeerMismatchError(
            f"the peer sent a frame of protocol version {version}, this side speaks version {PROTOCOL_VERSION}; "
            "use releases of kvstore that share a version"
        )
    try:
        kind = Kind(number)
    except ValueError:
        raise ProtocolError(f"frame kind {number} is not known in protocol version {version}") from None
    if reserved != _RESERVED:
        raise ProtocolError(f"the reserved bytes of a {kind.name} header are not zero")
    header = FrameHeader(kind, TransferId(epoch, counter), generation, payload, pieces, payload_crc, flags)
    _check_lengths(header)
    return header


def _check_lengths(header: FrameHeader) -> None:
    kind = header.kind
    if header.flags & ~FLAG_REMOTE or (header.flags and kind is not Kind.DATA):
        raise ProtocolError(f"a {kind.name} frame carries unknown flags {header.flags:#04x}")
    if kind is not Kind.DATA:
        limit = _PAYLOAD_BYTES_MAX[kind]
        if header.payload_bytes > limit:
            raise ProtocolError(f"a {kind.name} frame of {header.payload_bytes} bytes is above its limit of {limit}")
        if header.piece_count:
            raise ProtocolError(f"a {kind.name} frame claims {header.piece_count} pieces; only DATA has any")
        return
    if not 1 <= header.piece_count <= FRAME_PIECES_MAX:
        raise ProtocolError(f"a DATA frame has 1 to {FRAME_PIECES_MAX} pieces, not {header.piece_count}")
    body_bytes = header.body_bytes
    if header.flags & FLAG_REMOTE:
        if body_bytes:
            raise ProtocolError(f"a DATA frame names exposed pieces and yet carries {body_bytes} further bytes")
        return
    limit = RECORD_BYTES_MAX if header.piece_count == 1 else FRAME_PAYLOAD_BYTES_MAX - header.table_bytes
    if not header.piece_count <= body_bytes <= limit:
        raise ProtocolError(
            f"a DATA frame of {header.piece_count} pieces carries {body_bytes} bytes; the limit is {limit}"
        )
