"""Frames between an attached process and its owner: a fixed header, then one message (docs/attach.md)."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from kvstore.errors import AttachProtocolError
from kvstore.limits import ATTACH_MESSAGE_BYTES_MAX

MAGIC = b"KVAT"
VERSION = 2
_HEADER = struct.Struct("<4sHHQII")
HEADER_BYTES = _HEADER.size


class Kind(enum.IntEnum):
    """What a message is. An answer has the kind and the number of its request."""

    HELLO = 1
    MATCH = 2
    HOLD = 3
    RELEASE = 4
    CHECK = 5
    ACCEPT = 6
    RETURN = 7
    TAKE = 8
    MISSING = 9
    BEGIN = 10
    COMMIT = 11
    ABORT = 12
    STILL = 13
    EVICT = 14
    CONDEMN = 15
    WATCH = 16
    STATISTICS = 17
    BEAT = 18
    BYE = 19
    INSPECT = 20
    FLUSH = 21
    EXPLAIN = 22
    STORED = 23
    EVICT_ROOT = 24
    ERROR = 32
    """Instead of an answer, or of a welcome."""
    CHANGED = 33
    """Unasked: the pool has changed."""
    EXPIRED = 34
    """Unasked: the process was silent for too long, and what it held is gone."""


FROM_OWNER = frozenset({Kind.ERROR, Kind.CHANGED, Kind.EXPIRED})
"""Kinds that only an owner sends."""


@dataclass(frozen=True)
class FrameHeader:
    """The first bytes of each frame.

    Attributes:
        kind: of the message.
        request: names the request and its answer; 0 where nothing is answered.
        size_bytes: of the message that follows.
    """

    kind: Kind
    request: int
    size_bytes: int

    def pack(self) -> bytes:
        return _HEADER.pack(MAGIC, VERSION, self.kind, self.request, self.size_bytes, 0)


def frame(kind: Kind, request: int, message: bytes) -> bytes:
    """A whole frame.

    Raises:
        AttachProtocolError: the message is over `ATTACH_MESSAGE_BYTES_MAX`.
    """
    if len(message) > ATTACH_MESSAGE_BYTES_MAX:
        raise AttachProtocolError(
            f"{kind.name} of {len(message)} bytes is over the limit of {ATTACH_MESSAGE_BYTES_MAX} bytes; use a shorter "
            "prompt or larger blocks"
        )
    return FrameHeader(kind, request, len(message)).pack() + message


def parse_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """The header at the start of `data`.

    Raises:
        AttachProtocolError: it is none of this version.
    """
    if len(data) < HEADER_BYTES:
        raise AttachProtocolError(f"a frame header has {HEADER_BYTES} bytes, {len(data)} are there")
    magic, version, kind, request, size_bytes, zero = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise AttachProtocolError("these bytes are no frame of an attached process; the other side is something else")
    if version != VERSION:
        raise AttachProtocolError(
            f"the other side speaks version {version} of the protocol between processes, this one version {VERSION}; "
            "run the same kvstore in all processes of a host"
        )
    if kind not in tuple(Kind) or zero:
        raise AttachProtocolError(f"a frame has the unknown kind {kind}, or reserved bytes that are not zero")
    if size_bytes > ATTACH_MESSAGE_BYTES_MAX:
        raise AttachProtocolError(f"a frame announces {size_bytes} bytes, the limit is {ATTACH_MESSAGE_BYTES_MAX}")
    return FrameHeader(Kind(kind), request, size_bytes)


class FrameBuffer:
    """Cuts a stream of bytes into frames. Memory grows with what arrives, never with what is announced."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._header: FrameHeader | None = None

    @property
    def waiting_bytes(self) -> int:
        """What has been fed and not been taken out as frames."""
        return len(self._data)

    def feed(self, data: bytes | memoryview) -> None:
        self._data += data

    def next(self) -> tuple[FrameHeader, memoryview] | None:
        """The next whole frame; None if more bytes are needed.

        Raises:
            AttachProtocolError: as `parse_header`.
        """
        if self._header is None:
            if len(self._data) < HEADER_BYTES:
                return None
            self._header = parse_header(self._data)
        header, end = self._header, HEADER_BYTES + self._header.size_bytes
        if len(self._data) < end:
            return None
        message = memoryview(bytes(memoryview(self._data)[HEADER_BYTES:end]))
        del self._data[:end]
        self._header = None
        return header, message
