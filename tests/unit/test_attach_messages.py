"""Messages between an attached process and its owner: what is packed comes out again, and nothing odd is accepted.

Damaged messages are the business of `tests/fuzz`.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from kvstore import errors
from kvstore.abc import Slot
from kvstore.attached import messages
from kvstore.attached.faults import pack_error, parse_error
from kvstore.attached.finding import Accepted, HandOverMessage, Held, HoldRequest, MatchRequest, pack_match, parse_match
from kvstore.attached.frames import VERSION, FrameHeader, Kind, frame, parse_header
from kvstore.attached.messages import Hello, Welcome
from kvstore.attached.writing import (
    AbortRequest,
    BeginRequest,
    Begun,
    CommitRequest,
    MissingRequest,
    pack_numbers,
    parse_numbers,
)
from kvstore.errors import AttachProtocolError, KVStoreError
from kvstore.limits import ATTACH_MESSAGE_BYTES_MAX, ATTACH_RECORDS_MAX
from kvstore.pool import HandOver, JointName
from kvstore.spec import WHOLE, Shard, UnitRange
from kvstore.testing.specs import dense
from tests.fuzz.attached_targets import (
    ARENA_BYTES,
    BEGIN_NAMES,
    GRID,
    HELD,
    IDS,
    MATCH,
    MATCH_REQUEST,
    PATH,
    PROMPT,
    SPEC,
    STATISTICS,
    parse_frames,
    placed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

GRIDS = {(0, 0, 0): bytes(32), (1, 0, 0): b"g" * 32, (2, 1, 0): b"g" * 32}

ROUND_TRIPS: list[tuple[Any, Callable[[memoryview], Any]]] = [
    (Hello(77, SPEC.fingerprint), Hello.parse),
    (Welcome(9, 77, 5000, ARENA_BYTES, "dram", SPEC), Welcome.parse),
    (HoldRequest(PATH, Shard(1, 2), GRID), lambda data: HoldRequest.parse(data, SPEC)),
    (HoldRequest(PATH.prefix(2), WHOLE, None, GRIDS), lambda data: HoldRequest.parse(data, SPEC)),
    (HELD, lambda data: Held.parse(data, SPEC, PATH, ARENA_BYTES)),
    (replace(HELD, handover=None, records=()), lambda data: Held.parse(data, SPEC, PATH, ARENA_BYTES)),
    (Accepted(HandOver(1), GRIDS, HELD), lambda data: Accepted.parse(data, SPEC, PATH, ARENA_BYTES)),
    (HandOverMessage(PATH, HandOver(5, b"x" * 999), GRIDS), lambda data: HandOverMessage.parse(data, SPEC)),
    (HandOverMessage(PATH, None), lambda data: HandOverMessage.parse(data, SPEC)),
    (
        MissingRequest(PATH, tuple(name for name, _ in BEGIN_NAMES), GRID),
        lambda data: MissingRequest.parse(data, SPEC),
    ),
    (
        BeginRequest(PATH, b"tenant", BEGIN_NAMES, (0, 2), (Slot(1, 2, 4096),), True, JointName("réquest", 1, 4), 0.25),
        lambda data: BeginRequest.parse(data, SPEC),
    ),
    (Begun(4, 1, placed(), placed()[:1]), lambda data: Begun.parse(data, SPEC, PATH, ARENA_BYTES)),
    (CommitRequest(4, 8, False, None, ((0, 5), (1, 6))), CommitRequest.parse),
    (CommitRequest(4, None, True, HandOver(2, b"logits")), CommitRequest.parse),
    (AbortRequest(1 << 50, True, "because"), AbortRequest.parse),
]


@pytest.mark.parametrize("number", range(len(ROUND_TRIPS)))
def test_what_is_packed_comes_out_again(number: int) -> None:
    message, parse = ROUND_TRIPS[number]
    packed = message.pack()
    assert parse(memoryview(packed)) == message
    for wrong in (packed[:-1], packed + b"\0", packed[: len(packed) // 2]):
        with pytest.raises(AttachProtocolError):
            parse(memoryview(wrong))


@pytest.mark.parametrize("request_", [MATCH_REQUEST, MatchRequest(PROMPT, WHOLE)])
def test_a_prompt_crosses_with_all_that_its_keys_depend_on(request_: MatchRequest) -> None:
    found = MatchRequest.parse(memoryview(request_.pack()), SPEC)
    assert found.prompt.token_ids.tolist() == list(IDS)
    assert (found.shard, found.grid, found.cap_tokens) == (request_.shard, request_.grid, request_.cap_tokens)
    assert (found.prompt.path, found.prompt.salt, found.prompt.adapter) == (PATH, b"tenant", "lora")
    assert found.prompt.extras == PROMPT.extras
    assert found.prompt.tail_key(1, 7) == PROMPT.tail_key(1, 7)


def test_a_match_crosses_without_its_paths() -> None:
    packed = pack_match(MATCH)
    assert parse_match(memoryview(packed), MATCH_REQUEST, SPEC) == MATCH
    assert len(packed) < 300
    miss = replace(MATCH, tokens=0, candidates=())
    assert parse_match(memoryview(pack_match(miss)), MATCH_REQUEST, SPEC) == miss
    rising = replace(MATCH, candidates=MATCH.candidates[::-1])
    with pytest.raises(AttachProtocolError, match="ever shorter"):
        parse_match(memoryview(pack_match(rising)), MATCH_REQUEST, SPEC)


def test_statistics_and_small_messages() -> None:
    assert messages.parse_statistics(memoryview(messages.pack_statistics(STATISTICS))) == STATISTICS
    assert messages.parse_number(memoryview(messages.pack_number(7)), "STILL") == 7
    assert messages.parse_expired(memoryview(messages.pack_expired(3, "why"))) == (3, "why")
    key = (bytes(range(32)), True, Slot(1, 2, 4096))
    packed = messages.pack_key(key[0], flag=key[1], slot=key[2])
    assert messages.parse_key(memoryview(packed), "CONDEMN") == key
    with pytest.raises(AttachProtocolError, match="0 or 1"):
        messages.parse_flag(memoryview(b"\2"), "WATCH")
    with pytest.raises(AttachProtocolError, match="past the 3"):
        parse_numbers(memoryview(pack_numbers([3])), 3)


def test_errors_keep_their_kind_where_the_other_side_can_act_on_it() -> None:
    for kind in vars(errors).values():
        if not (isinstance(kind, type) and issubclass(kind, KVStoreError)):
            continue
        words = ("full", "the very words") if kind is errors.ShelfRefusedError else ("the very words",)
        found = parse_error(memoryview(pack_error(kind(*words))))
        assert isinstance(kind(*words), type(found)), "an error turned into another one"
        assert str(found) == "the very words"
    assert type(parse_error(memoryview(pack_error(errors.PoolFullError("x"))))) is errors.PoolFullError
    assert "AssertionError: what" in str(parse_error(memoryview(pack_error(AssertionError("what")))))
    with pytest.raises(AttachProtocolError, match="unknown code"):
        parse_error(memoryview(struct.pack("<HHI", 999, 0, 0)))


def test_frames() -> None:
    packed = frame(Kind.MATCH, 1 << 40, b"message")
    assert parse_header(packed) == FrameHeader(Kind.MATCH, 1 << 40, 7)
    both = packed + frame(Kind.BYE, 0, b"")
    expected = [(FrameHeader(Kind.MATCH, 1 << 40, 7), b"message"), (FrameHeader(Kind.BYE, 0, 0), b"")]
    assert parse_frames(both) == expected
    assert parse_frames(both[:-1]) == expected[:1]
    too_large = bytearray(packed)
    struct.pack_into("<I", too_large, 16, ATTACH_MESSAGE_BYTES_MAX + 1)
    other_version = bytearray(packed)
    struct.pack_into("<H", other_version, 4, VERSION + 1)
    for wrong, why in (
        (too_large, "the limit is"),
        (other_version, f"version {VERSION + 1}"),
        (b"\0" * 24, "no frame"),
    ):
        with pytest.raises(AttachProtocolError, match=why):
            parse_header(bytes(wrong))
    with pytest.raises(AttachProtocolError, match="limit"):
        frame(Kind.MATCH, 1, bytes(ATTACH_MESSAGE_BYTES_MAX + 1))


def begin(**changes: Any) -> memoryview:
    return memoryview(replace(BeginRequest(PATH, b"", BEGIN_NAMES), **changes).pack())


def test_what_does_not_fit_the_spec_or_the_path_is_refused() -> None:
    name = BEGIN_NAMES[0][0]
    units = SPEC.groups[0].all_units
    for record, why in (
        (replace(name, node=3), "do not exist"),
        (replace(name, group=9), "do not exist"),
        (replace(name, span=1), "do not exist"),
        (replace(name, units=UnitRange(0, units.stop + 1)), "shard unit"),
    ):
        with pytest.raises(AttachProtocolError, match=why):
            BeginRequest.parse(begin(names=((record, bytes(32)),)), SPEC)
    with pytest.raises(AttachProtocolError, match="twice"):
        BeginRequest.parse(begin(names=(BEGIN_NAMES[0], BEGIN_NAMES[0])), SPEC)
    with pytest.raises(AttachProtocolError, match="resume point"):
        BeginRequest.parse(begin(resume_nodes=(3,)), SPEC)
    with pytest.raises(AttachProtocolError, match="blocks of 4 tokens"):
        BeginRequest.parse(begin(), dense(16))
    with pytest.raises(AttachProtocolError, match="blocks of 4 tokens"):
        HoldRequest.parse(memoryview(HoldRequest(PATH, WHOLE).pack()), dense(16))
    with pytest.raises(AttachProtocolError, match="split over"):
        HoldRequest.parse(memoryview(HoldRequest(PATH, Shard(0, 3)).pack()), SPEC)


@pytest.mark.parametrize("field", ["offset", "slot_bytes"])
def test_a_place_outside_the_arena_is_refused(field: str) -> None:
    record = placed()[-1]
    if field == "offset":
        wrong = replace(record, offset=ARENA_BYTES - record.slot.size_bytes + 64)
    else:
        wrong = replace(record, slot=Slot(1, 1, record.layout.record_bytes - 1))
    with pytest.raises(AttachProtocolError, match="of an arena of"):
        Held.parse(memoryview(replace(HELD, records=(wrong,)).pack()), SPEC, PATH, ARENA_BYTES)


def test_announced_counts_allocate_nothing() -> None:
    head = struct.pack("<QQ", 1, 1) + struct.pack("<I", 0) + b"\0"
    table = struct.pack("<II", ATTACH_RECORDS_MAX + 1, 1)
    with pytest.raises(AttachProtocolError, match="1048577 records"):
        Held.parse(memoryview(head + table), SPEC, PATH, ARENA_BYTES)
    with pytest.raises(AttachProtocolError, match="truncated"):
        Held.parse(memoryview(head + struct.pack("<II", ATTACH_RECORDS_MAX, 1)), SPEC, PATH, ARENA_BYTES)


def test_joint_names_have_limits() -> None:
    for index, count, name in ((1, 1, "x"), (-1, 2, "x"), (0, 5000, "x"), (0, 1, ""), (0, 1, "x" * 257)):
        with pytest.raises(errors.WriteError):
            JointName(name, index, count)
