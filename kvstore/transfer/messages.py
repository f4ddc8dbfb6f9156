"""Control messages: fixed little-endian layouts, parsed with bounds checks (docs/protocol.md, "Messages").

Each class packs itself and has a `parse` that refuses what does not fit exactly: missing or trailing
bytes, reserved bytes that are not zero, counts beyond the limits.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.errors import ProtocolError
from kvstore.limits import FRAME_PAYLOAD_BYTES_MAX, HANDOVER_PAYLOAD_BYTES_MAX, RECORD_BYTES_MAX, TOKEN_ID_MAX
from kvstore.pool.path import HandOver
from kvstore.transfer.frames import COMMIT_FIXED_BYTES, PIECE_ROW_BYTES
from kvstore.wire import Reader, check_zero, clipped_utf8

REASON_BYTES_MAX = 1024
NAME_BYTES_MAX = 256
DESCRIPTOR_BYTES_MAX = 256

PIECE_ROW = np.dtype([("record", "<u4"), ("piece", "<u4"), ("size_bytes", "<u4"), ("crc32c", "<u4")])
"""A row of a DATA frame's table: piece `piece` of the offer's record `record`."""
WANT_RANGE = np.dtype([("record", "<u4"), ("first", "<u4"), ("count", "<u4")])
"""Pieces `[first, first + count)` of one record."""
SEAL_ROW = np.dtype([("record", "<u4"), ("reserved", "<u4"), ("cost_us", "<u8")])
_EXPOSE_ROW = np.dtype([("record", "<u4"), ("descriptor_bytes", "<u2"), ("reserved", "<u2"), ("size_bytes", "<u8")])

Rows = npt.NDArray[np.void]

assert PIECE_ROW.itemsize == PIECE_ROW_BYTES
assert RECORD_BYTES_MAX <= 0xFFFFFFFF


class Feature(enum.IntFlag):
    """What a peer can do beyond the minimum. Unknown bits are ignored."""

    GET = 1
    """One-sided reads, over connections that have them."""
    MATCH = 2
    """QUERY, CANDIDATES and FETCH. Whether a node answers is another matter."""
    JOIN = 4
    """Further connections that carry pieces of a transfer."""
    SPARSE = 8
    """Offers of which layers hold only some tokens."""
    REJOIN = 32
    """Further connections that stay open after their attachment, and join another one."""


class AbortCode(enum.IntEnum):
    """Why a transfer was given up."""

    CANCELLED = 1
    UNSUPPORTED = 2
    UNKNOWN_TRANSFER = 3
    STALE_GENERATION = 4
    CHECKSUM = 5
    INVALID = 6
    LIMIT = 7
    DEADLINE = 8
    CLOSING = 9
    SOURCE = 10
    INTERNAL = 11
    TOO_LARGE = 12


class WantStatus(enum.IntEnum):
    """What the receiver answers to an offer."""

    PIECES = 0
    AGAIN = 1
    """Not an answer but a repeat: these pieces arrived damaged."""
    HAVE_ALL = 2
    FULL = 3


_HELLO = struct.Struct("<HHIQQ32sIIIHH")
_WANT = struct.Struct("<BBHIQ")
_COUNT = struct.Struct("<II")
_CREDIT = struct.Struct("<QQ")
_LOST = struct.Struct("<II")
_COMMIT = struct.Struct("<QIIII")
_COMMITTED = struct.Struct("<IIQQQ")
_ABORT = struct.Struct("<HHI")

assert _COMMIT.size == COMMIT_FIXED_BYTES


@dataclass(frozen=True)
class Hello:
    """The first frame of each side.

    Attributes:
        boot_epoch: random number of this run of the node; never 0.
        fingerprint: of the model spec.
        model: name of the model, for people.
        progress_deadline_ms: the longest silence that this side bears; the smaller of both holds.
        features: `Feature` bits.
        frame_payload_bytes_max, frame_pieces_max: the largest DATA frame that this side takes.
        version_min, version_max: protocol versions that this side speaks.
    """

    boot_epoch: int
    fingerprint: bytes
    model: str
    progress_deadline_ms: int
    features: int
    frame_payload_bytes_max: int
    frame_pieces_max: int
    version_min: int = 1
    version_max: int = 1

    def pack(self) -> bytes:
        name = clipped_utf8(self.model, NAME_BYTES_MAX)
        fixed = _HELLO.pack(
            self.version_min,
            self.version_max,
            0,
            self.features,
            self.boot_epoch,
            self.fingerprint,
            self.frame_payload_bytes_max,
            self.frame_pieces_max,
            self.progress_deadline_ms,
            len(name),
            0,
        )
        return fixed + name

    @classmethod
    def parse(cls, data: memoryview) -> Hello:
        reader = Reader(data, "HELLO")
        low, high, zero, features, epoch, fingerprint, payload, pieces, progress_ms, name_bytes, zero2 = reader.fixed(
            _HELLO
        )
        check_zero("HELLO", zero, zero2)
        if name_bytes > NAME_BYTES_MAX:
            raise ProtocolError(f"HELLO carries a name of {name_bytes} bytes, the limit is {NAME_BYTES_MAX}")
        model = reader.text(name_bytes)
        reader.finish()
        if epoch == 0 or low > high or progress_ms == 0 or payload == 0 or pieces == 0:
            raise ProtocolError("HELLO carries a zero epoch or limit, or an empty range of versions")
        return cls(epoch, fingerprint, model, progress_ms, features, payload, pieces, low, high)


@dataclass(frozen=True)
class Want:
    """What the receiver lacks. `granted_bytes` counts all payload bytes it allows in this generation."""

    status: WantStatus
    granted_bytes: int = 0
    ranges: Rows = field(default_factory=lambda: np.empty(0, WANT_RANGE))
    reason: str = ""

    def pack(self) -> bytes:
        reason = clipped_utf8(self.reason, REASON_BYTES_MAX)
        fixed = _WANT.pack(self.status, 0, len(reason), len(self.ranges), self.granted_bytes)
        return fixed + self.ranges.tobytes() + reason

    @classmethod
    def parse(cls, data: memoryview) -> Want:
        reader = Reader(data, "WANT")
        status, zero, reason_bytes, count, granted_bytes = reader.fixed(_WANT)
        check_zero("WANT", zero)
        if status not in tuple(WantStatus):
            raise ProtocolError(f"WANT carries the unknown status {status}")
        if reason_bytes > REASON_BYTES_MAX:
            raise ProtocolError(f"WANT carries a reason of {reason_bytes} bytes, the limit is {REASON_BYTES_MAX}")
        ranges = reader.rows(WANT_RANGE, count)
        reason = reader.text(reason_bytes)
        reader.finish()
        if bool(count) != (status in (WantStatus.PIECES, WantStatus.AGAIN)):
            raise ProtocolError(f"WANT with status {WantStatus(status).name} names {count} ranges of pieces")
        return cls(WantStatus(status), granted_bytes, ranges, reason)


@dataclass(frozen=True)
class Exposure:
    """One record's memory, readable by the peer until the transfer ends."""

    record: int
    size_bytes: int
    descriptor: bytes


@dataclass(frozen=True)
class Expose:
    """Where the receiver finds wanted records, over one-sided connections."""

    exposures: tuple[Exposure, ...]

    def pack(self) -> bytes:
        rows = np.zeros(len(self.exposures), _EXPOSE_ROW)
        for row, exposure in zip(rows, self.exposures, strict=True):
            row["record"] = exposure.record
            row["descriptor_bytes"] = len(exposure.descriptor)
            row["size_bytes"] = exposure.size_bytes
        descriptors = b"".join(exposure.descriptor for exposure in self.exposures)
        return _COUNT.pack(len(rows), 0) + rows.tobytes() + descriptors

    @classmethod
    def parse(cls, data: memoryview) -> Expose:
        reader = Reader(data, "EXPOSE")
        count, zero = reader.fixed(_COUNT)
        rows = reader.rows(_EXPOSE_ROW, count)
        check_zero("EXPOSE", zero, *rows["reserved"].tolist())
        exposures = []
        for record, descriptor_bytes, _, size_bytes in rows.tolist():
            if not 1 <= descriptor_bytes <= DESCRIPTOR_BYTES_MAX:
                raise ProtocolError(
                    f"EXPOSE carries a descriptor of {descriptor_bytes} bytes; 1 to {DESCRIPTOR_BYTES_MAX} are allowed"
                )
            exposures.append(Exposure(record, size_bytes, reader.bytes(descriptor_bytes)))
        reader.finish()
        return cls(tuple(exposures))


@dataclass(frozen=True)
class Seal:
    """Records of which every piece has been sent, with what they cost to compute (`SEAL_ROW`)."""

    rows: Rows

    @classmethod
    def of(cls, records: list[tuple[int, int]]) -> Seal:
        """From (record, cost_us) pairs."""
        rows = np.zeros(len(records), SEAL_ROW)
        rows["record"] = [record for record, _ in records]
        rows["cost_us"] = [cost_us for _, cost_us in records]
        return cls(rows)

    def pack(self) -> bytes:
        return _COUNT.pack(len(self.rows), 0) + self.rows.tobytes()

    @classmethod
    def parse(cls, data: memoryview) -> Seal:
        reader = Reader(data, "SEAL")
        count, zero = reader.fixed(_COUNT)
        rows = reader.rows(SEAL_ROW, count)
        reader.finish()
        check_zero("SEAL", zero, bool(rows["reserved"].any()))
        return cls(rows)


@dataclass(frozen=True)
class Credit:
    """Payload bytes granted and received so far in this generation; both only grow."""

    granted_bytes: int
    received_bytes: int

    def pack(self) -> bytes:
        return _CREDIT.pack(self.granted_bytes, self.received_bytes)

    @classmethod
    def parse(cls, data: memoryview) -> Credit:
        reader = Reader(data, "CREDIT")
        granted_bytes, received_bytes = reader.fixed(_CREDIT)
        reader.finish()
        return cls(granted_bytes, received_bytes)


@dataclass(frozen=True)
class Lost:
    """A further connection has ended: of what it carried, only the first `frames` DATA frames have arrived."""

    connection: int
    frames: int

    def pack(self) -> bytes:
        return _LOST.pack(self.connection, self.frames)

    @classmethod
    def parse(cls, data: memoryview) -> Lost:
        reader = Reader(data, "LOST")
        connection, frames = reader.fixed(_LOST)
        reader.finish()
        return cls(connection, frames)


@dataclass(frozen=True)
class Commit:
    """Make everything up to `upto_tokens` visible; with what a decode process needs, if it is a hand-over."""

    upto_tokens: int
    handover: HandOver | None = None

    def pack(self) -> bytes:
        if self.handover is None:
            return _COMMIT.pack(self.upto_tokens, 0, 0, 0, 0)
        payload = self.handover.payload
        if not 0 <= self.handover.first_token <= TOKEN_ID_MAX or len(payload) > HANDOVER_PAYLOAD_BYTES_MAX:
            raise ProtocolError(
                f"a hand-over has a token id of 0 to {TOKEN_ID_MAX} and at most {HANDOVER_PAYLOAD_BYTES_MAX} bytes "
                f"beside it; this one has {self.handover.first_token} and {len(payload)}"
            )
        return _COMMIT.pack(self.upto_tokens, 1, self.handover.first_token, len(payload), 0) + payload

    @classmethod
    def parse(cls, data: memoryview) -> Commit:
        reader = Reader(data, "COMMIT")
        upto_tokens, has_handover, first_token, payload_bytes, zero = reader.fixed(_COMMIT)
        check_zero("COMMIT", zero)
        payload = reader.bytes(payload_bytes)
        reader.finish()
        if has_handover > 1 or (not has_handover and (first_token or payload_bytes)):
            raise ProtocolError("COMMIT carries parts of a hand-over without being one")
        return cls(upto_tokens, HandOver(first_token, payload) if has_handover else None)


@dataclass(frozen=True)
class Committed:
    """The resume point is visible at the receiver.

    Attributes:
        was_known: the transfer had been committed before this connection.
        received_bytes, received_pieces: what crossed, over all connections.
        elapsed_us: from the first offer to the commit, by the receiver's clock.
    """

    was_known: bool
    received_bytes: int
    received_pieces: int
    elapsed_us: int

    def pack(self) -> bytes:
        return _COMMITTED.pack(self.was_known, 0, self.received_bytes, self.received_pieces, self.elapsed_us)

    @classmethod
    def parse(cls, data: memoryview) -> Committed:
        reader = Reader(data, "COMMITTED")
        was_known, zero, received_bytes, received_pieces, elapsed_us = reader.fixed(_COMMITTED)
        reader.finish()
        check_zero("COMMITTED", zero, was_known > 1)
        return cls(bool(was_known), received_bytes, received_pieces, elapsed_us)


@dataclass(frozen=True)
class Abort:
    """One side gives the transfer up."""

    code: AbortCode
    reason: str

    def pack(self) -> bytes:
        reason = clipped_utf8(self.reason, REASON_BYTES_MAX)
        return _ABORT.pack(self.code, len(reason), 0) + reason

    @classmethod
    def parse(cls, data: memoryview) -> Abort:
        reader = Reader(data, "ABORT")
        code, reason_bytes, zero = reader.fixed(_ABORT)
        check_zero("ABORT", zero)
        if reason_bytes > REASON_BYTES_MAX:
            raise ProtocolError(f"ABORT carries a reason of {reason_bytes} bytes, the limit is {REASON_BYTES_MAX}")
        reason = reader.text(reason_bytes)
        reader.finish()
        if code not in tuple(AbortCode):
            raise ProtocolError(f"ABORT carries the unknown code {code}")
        return cls(AbortCode(code), reason)


def parse_piece_table(data: memoryview, piece_count: int) -> Rows:
    """The table of a DATA frame; its sizes are checked against layouts later, by who knows them."""
    reader = Reader(data, "DATA")
    rows = reader.rows(PIECE_ROW, piece_count)
    reader.finish()
    return rows


assert FRAME_PAYLOAD_BYTES_MAX >= HANDOVER_PAYLOAD_BYTES_MAX
