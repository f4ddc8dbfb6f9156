"""Messages by which an attached process writes: packed tables, parsed with bounds checks."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore.attached.finding import NO_LENGTH, NUMBER_AND_TERM
from kvstore.attached.tables import (
    KEY_BYTES,
    MessageReader,
    PlacedRecord,
    pack_bytes,
    pack_chunks,
    pack_handover,
    pack_names,
    pack_path,
    pack_places,
    pack_slots,
    read_chunks,
    read_handover,
    read_names,
    read_path,
    read_places,
    read_salt,
    read_slots,
)
from kvstore.errors import AttachProtocolError, KVStoreError
from kvstore.limits import (
    ATTACH_RECORDS_MAX,
    ATTACH_TEXT_BYTES_MAX,
    JOINT_NAME_BYTES_MAX,
    LIFE_S_MAX,
)
from kvstore.pool import HandOver, JointName, NodePath, RecordName
from kvstore.wire import clipped_utf8

if TYPE_CHECKING:
    from kvstore.abc import Slot
    from kvstore.spec import ChunkGrid, ModelSpec

_BEGIN = struct.Struct("<BBHQ")
_US_PER_S = 1_000_000
_LIFE_US_MAX = int(LIFE_S_MAX) * _US_PER_S
_COMMIT = struct.Struct("<QIBBH")
_ABORT = struct.Struct("<QB3x")
_JOINT = struct.Struct("<III")
SEAL_ROW = np.dtype([("record", "<u4"), ("reserved", "<u4"), ("cost_us", "<u8")])


@dataclass(frozen=True)
class MissingRequest:
    """Which of these records are not committed?"""

    path: NodePath
    names: tuple[RecordName, ...]
    grid: ChunkGrid | None = None

    def pack(self) -> bytes:
        names = pack_names(self.names, [bytes(KEY_BYTES)] * len(self.names))
        return pack_path(self.path) + names + pack_chunks(self.grid)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec) -> MissingRequest:
        reader = MessageReader(data, "MISSING")
        path = read_path(reader, spec)
        names = tuple(name for name, _ in read_names(reader, spec, path))
        grid = read_chunks(reader)
        reader.finish()
        return cls(path, names, grid)


def pack_numbers(numbers: list[int]) -> bytes:
    """The answer to `MissingRequest`: positions in its list."""
    return struct.pack("<I", len(numbers)) + np.array(numbers, "<u4").tobytes()


def parse_numbers(data: memoryview, below: int) -> list[int]:
    """Numbers under a bound."""
    reader = MessageReader(data, "MISSING")
    numbers: list[int] = reader.rows(np.dtype("<u4"), reader.count(ATTACH_RECORDS_MAX, "numbers")).tolist()
    reader.finish()
    if any(number >= below for number in numbers):
        raise reader.fail(f"names a record past the {below} that were asked for")
    return numbers


@dataclass(frozen=True)
class BeginRequest:
    """Reserve what is missing of these records.

    Attributes:
        ttl_s: how long they live once they are committed, to the microsecond; None for as long as there is room.
    """

    path: NodePath
    salt: bytes
    names: tuple[tuple[RecordName, bytes], ...]
    resume_nodes: tuple[int, ...] = ()
    basis: tuple[Slot, ...] = ()
    is_transient: bool = False
    joint: JointName | None = None
    ttl_s: float | None = None

    def pack(self) -> bytes:
        ttl_us = 0 if self.ttl_s is None else max(1, min(round(self.ttl_s * _US_PER_S), _LIFE_US_MAX))
        parts = [_BEGIN.pack(self.is_transient, self.joint is not None, 0, ttl_us)]
        parts += [pack_path(self.path), pack_bytes(self.salt)]
        parts.append(pack_names([name for name, _ in self.names], [digest for _, digest in self.names]))
        parts.append(pack_numbers(list(self.resume_nodes)))
        parts.append(pack_slots(self.basis))
        if self.joint is not None:
            name = self.joint.name.encode(errors="replace")
            parts.append(_JOINT.pack(self.joint.index, self.joint.count, len(name)) + name)
        return b"".join(parts)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec) -> BeginRequest:
        reader = MessageReader(data, "BEGIN")
        is_transient, has_joint, zero, ttl_us = reader.fixed(_BEGIN)
        if is_transient > 1 or has_joint > 1 or zero:
            raise reader.fail("has flags that are neither 0 nor 1")
        if ttl_us > _LIFE_US_MAX:
            raise reader.fail(f"wants to live for {ttl_us} us; the limit is {_LIFE_US_MAX}")
        path, salt = read_path(reader, spec), read_salt(reader)
        names = tuple(read_names(reader, spec, path))
        resume_nodes = tuple(reader.rows(np.dtype("<u4"), reader.count(len(path), "resume points")).tolist())
        if any(node >= len(path) for node in resume_nodes):
            raise reader.fail("names a resume point that is no node of its path")
        basis = tuple(read_slots(reader))
        joint = _read_joint(reader) if has_joint else None
        reader.finish()
        ttl_s = ttl_us / _US_PER_S if ttl_us else None
        return cls(path, salt, names, resume_nodes, basis, bool(is_transient), joint, ttl_s)


def _read_joint(reader: MessageReader) -> JointName:
    index, count, name_bytes = reader.fixed(_JOINT)
    if name_bytes > JOINT_NAME_BYTES_MAX:
        raise reader.fail(f"has a joint commit's name of {name_bytes} bytes; the limit is {JOINT_NAME_BYTES_MAX}")
    try:
        return JointName(reader.text(name_bytes), index, count)
    except AttachProtocolError:
        raise
    except KVStoreError as error:
        raise reader.fail(str(error)) from error


@dataclass(frozen=True)
class Begun:
    """What was reserved, and what was there already."""

    number: int
    term: int
    records: tuple[PlacedRecord, ...]
    held: tuple[PlacedRecord, ...]

    def pack(self) -> bytes:
        return NUMBER_AND_TERM.pack(self.number, self.term) + pack_places(self.records) + pack_places(self.held)

    @classmethod
    def parse(cls, data: memoryview, spec: ModelSpec, path: NodePath, arena_bytes: int) -> Begun:
        reader = MessageReader(data, "BEGIN")
        number, term = reader.fixed(NUMBER_AND_TERM)
        records = tuple(read_places(reader, spec, path, arena_bytes))
        held = tuple(read_places(reader, spec, path, arena_bytes))
        reader.finish()
        return cls(number, term, records, held)


@dataclass(frozen=True)
class CommitRequest:
    """Make what is sealed visible.

    Attributes:
        number: the writer's.
        upto_tokens: None for everything.
        is_still: nothing moves in the writer's slots any more, and nothing will.
        seals: record and cost of what was sealed since the last commit.
    """

    number: int
    upto_tokens: int | None = None
    is_still: bool = False
    handover: HandOver | None = None
    seals: tuple[tuple[int, int], ...] = field(default=())

    def pack(self) -> bytes:
        upto = NO_LENGTH if self.upto_tokens is None else max(0, min(self.upto_tokens, NO_LENGTH - 1))
        rows = np.array([(record, 0, cost_us) for record, cost_us in self.seals], SEAL_ROW)
        fixed = _COMMIT.pack(self.number, upto, self.is_still, 0, 0)
        return fixed + pack_handover(self.handover) + struct.pack("<I", len(rows)) + rows.tobytes()

    @classmethod
    def parse(cls, data: memoryview) -> CommitRequest:
        reader = MessageReader(data, "COMMIT")
        number, upto, is_still, zero, zero2 = reader.fixed(_COMMIT)
        handover = read_handover(reader)
        rows = reader.rows(SEAL_ROW, reader.count(ATTACH_RECORDS_MAX, "seals"))
        reader.finish()
        if is_still > 1 or zero or zero2 or rows["reserved"].any():
            raise reader.fail("has flags or reserved bytes that mean nothing")
        seals = tuple((record, cost_us) for record, _, cost_us in rows.tolist())
        return cls(number, None if upto == NO_LENGTH else upto, bool(is_still), handover, seals)


@dataclass(frozen=True)
class AbortRequest:
    """Give a writer's uncommitted records back; `is_still` as for `CommitRequest`."""

    number: int
    is_still: bool
    reason: str

    def pack(self) -> bytes:
        return _ABORT.pack(self.number, self.is_still) + pack_bytes(clipped_utf8(self.reason, ATTACH_TEXT_BYTES_MAX))

    @classmethod
    def parse(cls, data: memoryview) -> AbortRequest:
        reader = MessageReader(data, "ABORT")
        number, is_still = reader.fixed(_ABORT)
        reason = reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a reason"))
        reader.finish()
        if is_still > 1 or any(data[_ABORT.size - 3 : _ABORT.size]):
            raise reader.fail("has flags or reserved bytes that mean nothing")
        return cls(number, bool(is_still), reason)
