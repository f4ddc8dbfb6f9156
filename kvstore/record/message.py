"""What an encapsulated Arrow IPC message claims to be, found out before Arrow itself reads it.

Arrow would inflate a compressed body to whatever size it names, and some versions of it crash on damaged
metadata. So the few fields that bound the work and lead to the checksum are read first, here:
https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format and
https://github.com/apache/arrow/blob/main/format/Message.fbs.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.errors import RecordError
from kvstore.limits import RECORD_BYTES_MAX, RECORD_HEADER_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

CONTINUATION = 0xFFFFFFFF
"""First four bytes of every encapsulated message."""
PREFIX_BYTES = 8
"""The continuation marker and the length of the metadata."""
END_OF_STREAM = struct.pack("<Ii", CONTINUATION, 0)


class MessageKind(enum.IntEnum):
    """The union tags of `MessageHeader` that a record uses."""

    SCHEMA = 1
    RECORD_BATCH = 3


@dataclass(frozen=True)
class MessageFrame:
    """Sizes of one message.

    Attributes:
        metadata_bytes: prefix, metadata and its padding: where the body begins.
        body_bytes: bytes of the body, padding included.
        custom_metadata: of a schema, by name.
        buffers: of a record batch, as (offset in the body, bytes).
    """

    metadata_bytes: int
    body_bytes: int
    custom_metadata: Mapping[bytes, bytes] = field(default_factory=dict)
    buffers: tuple[tuple[int, int], ...] = ()


def message_frame(view: memoryview, offset: int, kind: MessageKind) -> MessageFrame:
    """Check a message's framing and that all of it is there, without trusting any of its offsets.

    Raises:
        RecordError: no message of that kind lies there, it is truncated, too large, or compressed.
    """
    what = kind.name.lower().replace("_", " ")
    if view.nbytes < offset + PREFIX_BYTES:
        raise RecordError(f"the record is truncated before its {what} message")
    marker, size = struct.unpack_from("<Ii", view, offset)
    if marker != CONTINUATION:
        raise RecordError(f"no Arrow {what} message begins at byte {offset}; this is not a record")
    if not 0 < size <= RECORD_HEADER_BYTES_MAX:
        raise RecordError(f"the {what} metadata claims {size} bytes, the limit is {RECORD_HEADER_BYTES_MAX}")
    begin = offset + PREFIX_BYTES
    if view.nbytes < begin + size:
        raise RecordError(f"the record is truncated in its {what} metadata")
    metadata = view[begin : begin + size]
    try:
        message = _follow(metadata, 0)
        tag = _scalar(metadata, _field(metadata, message, 1), "<B")
        header = _field(metadata, message, 2)
        if tag != kind or not header:
            raise RecordError(f"the message at byte {offset} is no {what} message")
        body_bytes = _scalar(metadata, _field(metadata, message, 3), "<q")
        table = _follow(metadata, header)
        frame = MessageFrame(PREFIX_BYTES + int(size), body_bytes)
        if kind is MessageKind.SCHEMA:
            frame = replace(frame, custom_metadata=_key_values(metadata, _field(metadata, table, 2)))
        elif _field(metadata, table, 3):
            raise RecordError("the record's Arrow body is compressed; records have codec chains instead")
        else:
            frame = replace(frame, buffers=_buffers(metadata, _field(metadata, table, 2)))
    except struct.error as error:
        raise RecordError(f"the {what} metadata is malformed: {error}") from error
    if not 0 <= body_bytes <= RECORD_BYTES_MAX:
        raise RecordError(f"the {what} body claims {body_bytes} bytes, the limit is {RECORD_BYTES_MAX}")
    if view.nbytes < begin + size + body_bytes:
        raise RecordError(f"the record is truncated in its {what} body")
    return frame


def schema_table(metadata: bytes) -> int:
    """Where the `Schema` table lies in a sound schema message's metadata, which begins behind the prefix."""
    view = memoryview(metadata)
    return _follow(view, _field(view, _follow(view, 0), 2))


def _key_values(metadata: memoryview, position: int) -> dict[bytes, bytes]:
    """A vector of Arrow's `KeyValue` tables."""
    found = {}
    for entry in _vector(metadata, position, 4):
        table = _follow(metadata, entry)
        key, value = (_string(metadata, _field(metadata, table, index)) for index in (0, 1))
        found[key] = value
    return found


def _buffers(metadata: memoryview, position: int) -> tuple[tuple[int, int], ...]:
    """A vector of Arrow's `Buffer` structs."""
    return tuple(
        (_unpack(metadata, entry, "<q"), _unpack(metadata, entry + 8, "<q"))
        for entry in _vector(metadata, position, 16)
    )


def _vector(metadata: memoryview, position: int, item_bytes: int) -> range:
    """Positions of a vector's items; none where the vector is absent."""
    if not position:
        return range(0)
    start = _follow(metadata, position)
    count = _unpack(metadata, start, "<I")
    if count * item_bytes > metadata.nbytes:
        raise struct.error(f"a vector claims {count} items")
    return range(start + 4, start + 4 + count * item_bytes, item_bytes)


def _string(metadata: memoryview, position: int) -> bytes:
    if not position:
        return b""
    start = _follow(metadata, position)
    return bytes(metadata[start + 4 : start + 4 + _unpack(metadata, start, "<I")])


def _scalar(metadata: memoryview, position: int, form: str) -> int:
    """A number of a flatbuffer; an absent field (position 0) has the default 0."""
    return _unpack(metadata, position, form) if position else 0


def _follow(metadata: memoryview, position: int) -> int:
    return position + _unpack(metadata, position, "<I")


def _field(metadata: memoryview, table: int, index: int) -> int:
    """Position of a table's field, or 0 where it is absent."""
    vtable = table - _unpack(metadata, table, "<i")
    entry = 4 + 2 * index
    if entry + 2 > _unpack(metadata, vtable, "<H"):
        return 0
    offset = _unpack(metadata, vtable + entry, "<H")
    return table + offset if offset else 0


def _unpack(metadata: memoryview, position: int, form: str) -> int:
    # A negative position would count from the end.
    if position < 0:
        raise struct.error(f"a flatbuffer offset leads to byte {position}")
    return int(struct.unpack_from(form, metadata, position)[0])
