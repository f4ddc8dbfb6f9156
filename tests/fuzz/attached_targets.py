"""Messages between an attached process and its owner, from either side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.abc import Slot
from kvstore.attached import messages
from kvstore.attached.faults import pack_error, parse_error
from kvstore.attached.finding import (
    Accepted,
    HandOverMessage,
    Held,
    HoldRequest,
    MatchRequest,
    pack_match,
    pack_stored,
    parse_flags,
    parse_match,
    parse_stored,
)
from kvstore.attached.frames import FrameBuffer, Kind, frame
from kvstore.attached.messages import Hello, Welcome
from kvstore.attached.tables import PlacedRecord
from kvstore.attached.writing import (
    AbortRequest,
    BeginRequest,
    Begun,
    CommitRequest,
    MissingRequest,
    pack_numbers,
    parse_numbers,
)
from kvstore.errors import AttachProtocolError, PoolFullError
from kvstore.events import MissReason
from kvstore.keys import ExtraInput
from kvstore.pool import (
    Candidate,
    CandidateReport,
    Explanation,
    GroupReport,
    HandOver,
    JointName,
    Match,
    Missing,
    PoolStatistics,
    Prompt,
    RecordName,
    TierReport,
)
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import WHOLE, ChunkGrid, Shard
from kvstore.testing.specs import hybrid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SPEC = hybrid(4)
IDS = tuple(range(10))
EXTRAS = (ExtraInput(5, b"image"),)
PROMPT = Prompt.of(SPEC, IDS, salt=b"tenant", adapter="lora", extras=EXTRAS)
PATH = PROMPT.path
GRID = ChunkGrid((4, 8, 10))
ARENA_BYTES = 1 << 20
MATCH_REQUEST = MatchRequest(PROMPT, Shard(1, 2), GRID, 9)
BEGIN_NAMES = tuple((RecordName(node, 0, 0, SPEC.groups[0].all_units), bytes([node]) * 32) for node in range(len(PATH)))


def placed() -> tuple[PlacedRecord, ...]:
    """Every attention record of the path, one after the other."""
    records = []
    offset = 0
    for name, digest in BEGIN_NAMES:
        layout = record_layout(SPEC, name.group, name.span, name.units)
        end_tokens = PATH.end_tokens(name.node)
        valid_tokens = SPEC.groups[0].valid_tokens(SPEC.block_tokens, end_tokens)
        header = RecordHeader(PATH.key(name.node), PATH.parent(name.node), end_tokens, valid_tokens, digest, 5)
        records.append(PlacedRecord(name, layout, header, Slot(name.node, 7, layout.slot_bytes), offset))
        offset += layout.slot_bytes
    return tuple(records)


HELD = Held(3, 1, b"tenant", HandOver(9, b"logits"), placed())
MATCH = Match(
    tokens=10,
    candidates=tuple(
        Candidate(tokens, path, SPEC.bytes_by_group(tokens, Shard(1, 2)), "dram")
        for tokens, path in ((10, PATH), (8, PATH.prefix(2)), (4, PATH.prefix(1)))
    ),
    missing=Missing(10, 8, MissReason.NO_CHECKPOINT, ("attention reaches 8 of 10 tokens", "no states")),
    pending_tokens=0,
    suggested=(4, 8),
    shard=Shard(1, 2),
    grid=GRID,
)
EXPLANATION = Explanation(
    12,
    11,
    True,
    (
        TierReport(
            name="dram",
            is_durable=False,
            attention_tokens=8,
            groups=(GroupReport("attention", False, (8,)), GroupReport("state", True, (8, 4))),
            candidates=(CandidateReport(8, 4096, 0.0), CandidateReport(4, 2048, 0.0)),
            pending_tokens=0,
            other_chunks_tokens=0,
            evicted_attention_tokens=12,
            evicted_state_tokens=0,
            foreign_state_tokens=0,
            is_other_shard=False,
            reason=MissReason.EVICTED,
            reasons=("attention reaches 8 of 11 tokens",),
        ),
    ),
    ("prefill from 8 tokens on, and commit it",),
)
STATISTICS = PoolStatistics(matches=3, capacity_bytes=1 << 30, bytes_by_salt={b"tenant": 5})


def parse_frames(data: bytes) -> list[tuple[Any, bytes]]:
    """Every frame of a stream that arrives in two parts."""
    frames = FrameBuffer()
    found = []
    for part in (data[: len(data) // 2], data[len(data) // 2 :]):
        frames.feed(part)
        while (each := frames.next()) is not None:
            found.append((each[0], bytes(each[1])))
    return found


MESSAGES: dict[str, tuple[Sequence[bytes], Callable[[memoryview], object]]] = {
    "attached-stored": ((pack_stored([PATH, PATH.prefix(1)]),), lambda data: parse_stored(data, SPEC)),
    "attached-root": ((messages.pack_root(bytes(32), 5),), messages.parse_root),
    "attached-flags": ((b"\0\1\1",), lambda data: parse_flags(data, 3, "STORED")),
    "attached-frames": (
        (frame(Kind.BEAT, 5, b""), frame(Kind.MATCH, 6, b"message") + frame(Kind.BYE, 0, b"")),
        lambda data: parse_frames(bytes(data)),
    ),
    "attached-hello": ((Hello(77).pack(), Hello(1, SPEC.fingerprint).pack()), Hello.parse),
    "attached-welcome": ((Welcome(9, 77, 5000, ARENA_BYTES, "dram", SPEC).pack(),), Welcome.parse),
    "attached-match": (
        (MATCH_REQUEST.pack(), MatchRequest(PROMPT, WHOLE).pack()),
        lambda data: MatchRequest.parse(data, SPEC),
    ),
    "attached-matched": ((pack_match(MATCH),), lambda data: parse_match(data, MATCH_REQUEST, SPEC)),
    "attached-hold": (
        (HoldRequest(PATH, WHOLE, GRID).pack(), HoldRequest(PATH, WHOLE, None, {(0, 0, 0): bytes(32)}).pack()),
        lambda data: HoldRequest.parse(data, SPEC),
    ),
    "attached-held": ((HELD.pack(),), lambda data: Held.parse(data, SPEC, PATH, ARENA_BYTES)),
    "attached-accepted": (
        (Accepted(HandOver(1), {(0, 0, 0): bytes(32)}, HELD).pack(), b""),
        lambda data: Accepted.parse(data, SPEC, PATH, ARENA_BYTES),
    ),
    "attached-return": (
        (HandOverMessage(PATH, HandOver(5, b"x"), {(1, 0, 0): bytes(32)}).pack(), HandOverMessage(PATH, None).pack()),
        lambda data: HandOverMessage.parse(data, SPEC),
    ),
    "attached-missing": (
        (MissingRequest(PATH, tuple(name for name, _ in BEGIN_NAMES), GRID).pack(),),
        lambda data: MissingRequest.parse(data, SPEC),
    ),
    "attached-numbers": ((pack_numbers([0, 2]),), lambda data: parse_numbers(data, 3)),
    "attached-begin": (
        (
            BeginRequest(PATH, b"tenant", BEGIN_NAMES, (0, 2), (Slot(1, 2, 4096),)).pack(),
            BeginRequest(PATH, b"", BEGIN_NAMES, (), (), True, JointName("request", 1, 4)).pack(),
        ),
        lambda data: BeginRequest.parse(data, SPEC),
    ),
    "attached-begun": (
        (Begun(4, 1, placed(), placed()[:1]).pack(),),
        lambda data: Begun.parse(data, SPEC, PATH, ARENA_BYTES),
    ),
    "attached-commit": (
        (CommitRequest(4, 8, False, None, ((0, 5), (1, 6))).pack(), CommitRequest(4, None, True, HandOver(2)).pack()),
        CommitRequest.parse,
    ),
    "attached-abort": ((AbortRequest(4, True, "no reason").pack(),), AbortRequest.parse),
    "attached-number": ((messages.pack_number(1 << 40),), lambda data: messages.parse_number(data, "STILL")),
    "attached-key": (
        (messages.pack_key(bytes(32), flag=True, slot=Slot(1, 2, 4096)), messages.pack_key(bytes(32), flag=False)),
        lambda data: messages.parse_key(data, "CONDEMN"),
    ),
    "attached-flag": ((b"\0", b"\1"), lambda data: messages.parse_flag(data, "WATCH")),
    "attached-expired": ((messages.pack_expired(2, "silent"),), messages.parse_expired),
    "attached-explanation": ((messages.pack_explanation(EXPLANATION),), messages.parse_explanation),
    "attached-statistics": ((messages.pack_statistics(STATISTICS),), messages.parse_statistics),
    "attached-error": ((pack_error(PoolFullError("full")), pack_error(ValueError("odd"))), parse_error),
}
"""Intact messages, and the parser of each."""

REFUSALS = (AttachProtocolError,)
