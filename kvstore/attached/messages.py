"""Messages between an attached process and its owner: the first ones, and those of one number or none (docs/attach.md).

What passes is small: names of records, and places in the arena with their generations. A parser refuses whatever does
not fit exactly, with `AttachProtocolError` and nothing else.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from kvstore.attached.tables import (
    KEY_BYTES,
    MessageReader,
    pack_bytes,
    pack_slots,
    read_slots,
)
from kvstore.errors import AttachProtocolError, SpecError
from kvstore.limits import (
    ATTACH_TEXT_BYTES_MAX,
    MIB,
)
from kvstore.pool import PoolStatistics
from kvstore.pool.explanation import Explanation
from kvstore.pool.seam import EVICT_ROOT_MOST
from kvstore.spec import ModelSpec
from kvstore.wire import clipped_utf8

if TYPE_CHECKING:
    from kvstore.abc import Slot

SPEC_BYTES_MAX = 4 * MIB
_HELLO = struct.Struct("<I32s")
HELLO_BYTES = _HELLO.size
_WELCOME = struct.Struct("<QIIQI")
_NUMBER = struct.Struct("<Q")


@dataclass(frozen=True)
class Hello:
    """The first message of a process: who it is, and which spec it expects, zeros for any."""

    pid: int
    fingerprint: bytes = bytes(KEY_BYTES)

    def pack(self) -> bytes:
        return _HELLO.pack(self.pid, self.fingerprint)

    @classmethod
    def parse(cls, data: memoryview) -> Hello:
        reader = MessageReader(data, "HELLO")
        pid, fingerprint = reader.fixed(_HELLO)
        reader.finish()
        return cls(pid, fingerprint)


@dataclass(frozen=True)
class Welcome:
    """The owner's answer; the descriptors of the arena and of the term page come with it.

    Attributes:
        boot_epoch: random number of this run of the owner, never 0.
        pid: the owner's.
        silence_ms: a process that is silent for longer loses its leases and writers.
        arena_bytes: size of the arena.
        tier: its name in matches.
        spec: the model.
    """

    boot_epoch: int
    pid: int
    silence_ms: int
    arena_bytes: int
    tier: str
    spec: ModelSpec

    def pack(self) -> bytes:
        fixed = _WELCOME.pack(self.boot_epoch, self.pid, self.silence_ms, self.arena_bytes, 0)
        return fixed + pack_bytes(self.tier.encode()) + pack_bytes(self.spec.to_json().encode())

    @classmethod
    def parse(cls, data: memoryview) -> Welcome:
        reader = MessageReader(data, "WELCOME")
        boot_epoch, pid, silence_ms, arena_bytes, zero = reader.fixed(_WELCOME)
        tier = reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a name"))
        text = reader.text(reader.count(SPEC_BYTES_MAX, "bytes of a spec"))
        reader.finish()
        if not boot_epoch or not silence_ms or not arena_bytes or zero:
            raise reader.fail("has a zero epoch, silence or size, or reserved bytes that are not zero")
        try:
            spec = ModelSpec.from_json(text)
        except (SpecError, RecursionError) as error:
            raise reader.fail(f"has no model spec: {error}") from error
        return cls(boot_epoch, pid, silence_ms, arena_bytes, tier, spec)


def pack_number(number: int) -> bytes:
    return _NUMBER.pack(number)


def parse_number(data: memoryview, message: str) -> int:
    """A message that is one number."""
    reader = MessageReader(data, message)
    (number,) = reader.fixed(_NUMBER)
    reader.finish()
    return int(number)


def pack_key(key: bytes, *, flag: bool, slot: Slot | None = None) -> bytes:
    """EVICT and CONDEMN: a node, states or not, and which slot is meant."""
    return key + bytes([flag]) + pack_slots(() if slot is None else (slot,))


def parse_key(data: memoryview, message: str) -> tuple[bytes, bool, Slot | None]:
    """What `pack_key` packed."""
    reader = MessageReader(data, message)
    key, flag, slots = reader.bytes(KEY_BYTES), reader.flag(), read_slots(reader)
    reader.finish()
    if len(slots) > 1:
        raise reader.fail(f"names {len(slots)} slots")
    return key, flag, slots[0] if slots else None


def pack_root(root: bytes, most: int) -> bytes:
    """EVICT_ROOT: where what is to go begins, and how many blocks at a time."""
    return root + _NUMBER.pack(most)


def parse_root(data: memoryview) -> tuple[bytes, int]:
    """What `pack_root` packed."""
    reader = MessageReader(data, "EVICT_ROOT")
    root, (most,) = reader.bytes(KEY_BYTES), reader.fixed(_NUMBER)
    reader.finish()
    if not 1 <= most <= EVICT_ROOT_MOST:
        raise reader.fail(f"would evict {most} blocks; allowed are 1 to {EVICT_ROOT_MOST}")
    return root, most


def parse_flag(data: memoryview, message: str) -> bool:
    """A message that is one flag."""
    reader = MessageReader(data, message)
    flag = reader.flag()
    reader.finish()
    return flag


def parse_empty(data: memoryview, message: str) -> None:
    """A message that says nothing but its kind."""
    MessageReader(data, message).finish()


def pack_expired(term: int, reason: str) -> bytes:
    """What a process held in earlier terms than this one is gone."""
    return _NUMBER.pack(term) + pack_bytes(clipped_utf8(reason, ATTACH_TEXT_BYTES_MAX))


def parse_expired(data: memoryview) -> tuple[int, str]:
    """What `pack_expired` packed."""
    reader = MessageReader(data, "EXPIRED")
    (term,) = reader.fixed(_NUMBER)
    reason = reader.text(reader.count(ATTACH_TEXT_BYTES_MAX, "bytes of a reason"))
    reader.finish()
    return int(term), reason


_COUNTERS = frozenset(f.name for f in fields(PoolStatistics)) - {"bytes_by_salt"}


def pack_statistics(statistics: PoolStatistics) -> bytes:
    """Counters by name, as JSON: they are for people, and come and go between versions."""
    counters = {name: getattr(statistics, name) for name in sorted(_COUNTERS)}
    salts = {salt.hex(): size for salt, size in statistics.bytes_by_salt.items()}
    return json.dumps({**counters, "bytes_by_salt": salts}).encode()


def parse_statistics(data: memoryview) -> PoolStatistics:
    """Counters that this version does not know are left out."""
    try:
        document = json.loads(bytes(data))
        salts = {bytes.fromhex(salt): int(size) for salt, size in document["bytes_by_salt"].items()}
        counters = {name: int(value) for name, value in document.items() if name in _COUNTERS}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise AttachProtocolError(f"STATISTICS is not what it should be: {error}") from error
    return PoolStatistics(**counters, bytes_by_salt=salts)


def pack_explanation(explanation: Explanation) -> bytes:
    """As JSON: it is for people."""
    return json.dumps(explanation.document()).encode()


def parse_explanation(data: memoryview) -> Explanation:
    """What `pack_explanation` packed."""
    try:
        return Explanation.of_document(json.loads(bytes(data)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise AttachProtocolError(f"EXPLAIN is not what it should be: {error}") from error
