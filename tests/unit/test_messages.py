"""Frames and messages: every one round-trips, and nothing else is accepted."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore._native import crc32c
from kvstore.errors import PeerMismatchError, ProtocolError, TransferError, WriteError
from kvstore.keys import ExtraInput, sparse_key
from kvstore.limits import (
    CANDIDATES_MAX,
    CONNECTIONS_PER_TRANSFER_MAX,
    FRAME_HEADER_BYTES,
    FRAME_PAYLOAD_BYTES_MAX,
    FRAME_PIECES_MAX,
    QUERY_PARTS_MAX,
    RECORD_BYTES_MAX,
    TOKEN_ID_MAX,
)
from kvstore.pool import HandOver, NodePath, RecordArrays, RecordName
from kvstore.pool.path import SparseNode
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import CacheGroup, ChunkGrid, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec, UnitRange
from kvstore.transfer.frames import FLAG_REMOTE, FrameHeader, Kind, TransferId, parse_header
from kvstore.transfer.messages import (
    PIECE_ROW,
    WANT_RANGE,
    Abort,
    AbortCode,
    Commit,
    Committed,
    Credit,
    Expose,
    Exposure,
    Hello,
    Lost,
    Seal,
    Want,
    WantStatus,
    parse_piece_table,
)
from kvstore.transfer.offer import OFFER_RECORD, Offer, OfferFlag, check_offer, offer_rows
from kvstore.transfer.query import SHARDS_MAX, TIERS, Candidates, Fetch, Query, RemoteCandidate

U16 = st.integers(0, 2**16 - 1)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
DIGEST = st.binary(min_size=32, max_size=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=64)


def rows_of(dtype: np.dtype[Any], fields: st.SearchStrategy[tuple[int, ...]], *, min_size: int = 0) -> Any:
    return st.lists(fields, min_size=min_size, max_size=20).map(lambda rows: np.array(rows, dtype))


HELLOS = st.builds(
    Hello,
    boot_epoch=st.integers(1, 2**64 - 1),
    fingerprint=DIGEST,
    model=TEXT,
    progress_deadline_ms=st.integers(1, 2**32 - 1),
    features=U64,
    frame_payload_bytes_max=st.integers(1, 2**32 - 1),
    frame_pieces_max=st.integers(1, 2**32 - 1),
    version_min=st.just(1),
    version_max=st.integers(1, 9),
)
RANGES = rows_of(WANT_RANGE, st.tuples(U32, U32, U32), min_size=1)
WANTS = st.one_of(
    st.builds(Want, st.sampled_from([WantStatus.PIECES, WantStatus.AGAIN]), U64, RANGES, TEXT),
    st.builds(lambda status, granted, reason: Want(status, granted, reason=reason),
              st.sampled_from([WantStatus.HAVE_ALL, WantStatus.FULL]), U64, TEXT),
)  # fmt: skip
EXPOSES = st.lists(st.builds(Exposure, U32, U64, st.binary(min_size=1, max_size=256)), max_size=10).map(
    lambda exposures: Expose(tuple(exposures))
)
SEALS = st.lists(st.tuples(U32, U64), max_size=20).map(Seal.of)
CREDITS = st.builds(Credit, U64, U64)
COMMITS = st.builds(Commit, U64, st.none() | st.builds(HandOver, st.integers(0, TOKEN_ID_MAX), st.binary(max_size=200)))
COMMITTEDS = st.builds(Committed, st.booleans(), U64, U64, U64)
ABORTS = st.builds(Abort, st.sampled_from(list(AbortCode)), TEXT)


@st.composite
def paths(draw: st.DrawFn) -> NodePath:
    block = draw(st.integers(1, 64))
    keys = tuple(draw(st.lists(DIGEST, max_size=6)))
    tail = draw(st.integers(0 if keys else 1, block - 1)) if block > 1 else 0
    if not keys and not tail:
        keys = (draw(DIGEST),)
    ids = tuple(draw(st.lists(U32, min_size=tail, max_size=tail)))
    return NodePath(draw(DIGEST), block, keys, draw(DIGEST) if tail else None, ids)


@st.composite
def offers(draw: st.DrawFn) -> Offer:
    path = draw(paths())
    ends = [path.end_tokens(node) for node in range(len(path))]
    u8 = st.integers(0, 255)
    row = st.tuples(U32, U16, U16, U16, U16, U16, u8, u8, U32, U32, U64)
    return Offer(
        path=path,
        salt=draw(st.binary(max_size=40)),
        resume_tokens=tuple(sorted(draw(st.sets(st.sampled_from(ends))))),
        grids=tuple(draw(st.lists(DIGEST, max_size=3))),
        records=draw(rows_of(OFFER_RECORD, row)),
        total_bytes=draw(U64),
        total_deadline_ms=draw(U32),
        priority=draw(u8),
        flags=OfferFlag(draw(st.integers(0, 3))),
    )


@st.composite
def queries(draw: st.DrawFn) -> Query:
    tokens = draw(st.integers(1, 30))
    ids = np.array(draw(st.lists(U32, min_size=tokens, max_size=tokens)), np.uint32)
    extra = st.builds(ExtraInput, st.integers(0, tokens - 1), st.binary(max_size=20))
    count = draw(st.integers(1, SHARDS_MAX))
    return Query(
        ids,
        draw(st.binary(max_size=40)),
        draw(TEXT),
        tuple(draw(st.lists(extra, max_size=4))),
        Shard(draw(st.integers(0, count - 1)), count),
        draw(st.none() | st.sets(st.integers(1, 100), max_size=6).map(lambda ends: ChunkGrid(tuple(sorted(ends))))),
        draw(st.integers(1, CANDIDATES_MAX)),
    )


CANDIDATES = st.builds(
    lambda lengths, parts, pending: Candidates(
        tuple(
            RemoteCandidate(length, *part) for length, part in zip(sorted(lengths, reverse=True), parts, strict=False)
        ),
        pending,
    ),
    st.sets(st.integers(1, 2**32 - 1), max_size=8),
    st.lists(st.tuples(st.sampled_from([*TIERS, "other"]), U64, U64), min_size=8, max_size=8),
    U32,
)
FETCHES = st.builds(
    Fetch,
    st.integers(1, 2**32 - 1),
    st.integers(1, 2**32 - 1),
    st.integers(0, 255),
    st.integers(1, CONNECTIONS_PER_TRANSFER_MAX),
)

MESSAGES: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "hello": (Hello, HELLOS),
    "offer": (Offer, offers()),
    "want": (Want, WANTS),
    "expose": (Expose, EXPOSES),
    "seal": (Seal, SEALS),
    "credit": (Credit, CREDITS),
    "lost": (Lost, st.builds(Lost, U32, U32)),
    "commit": (Commit, COMMITS),
    "committed": (Committed, COMMITTEDS),
    "abort": (Abort, ABORTS),
    "query": (Query, queries()),
    "candidates": (Candidates, CANDIDATES),
    "fetch": (Fetch, FETCHES),
}


def plain(message: Any) -> dict[str, Any]:
    """Fields of a message with arrays as lists, so that they compare."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(message).items()}


@pytest.mark.parametrize("name", MESSAGES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_messages_round_trip(name: str, data: st.DataObject) -> None:
    kind, strategy = MESSAGES[name]
    message = data.draw(strategy)
    packed = message.pack()
    assert plain(kind.parse(memoryview(packed))) == plain(message)
    assert kind.parse(memoryview(packed)).pack() == packed


@pytest.mark.parametrize("name", MESSAGES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_messages_refuse_missing_and_trailing_bytes(name: str, data: st.DataObject) -> None:
    kind, strategy = MESSAGES[name]
    packed = data.draw(strategy).pack()
    with pytest.raises(ProtocolError):
        kind.parse(memoryview(packed + b"\0"))
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(ProtocolError):
        kind.parse(memoryview(packed[:cut]))


@pytest.mark.parametrize("name", MESSAGES)
@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_messages_survive_damage(name: str, data: st.DataObject) -> None:
    """A damaged message is refused or is another valid one; nothing else happens."""
    kind, strategy = MESSAGES[name]
    packed = bytearray(data.draw(strategy).pack())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = kind.parse(memoryview(packed))
    except ProtocolError:
        return
    # Text for people may be repaired and then differs; everything else must survive.
    if name not in ("hello", "want", "abort"):
        assert message.pack() == bytes(packed)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_message(data: bytes) -> None:
    for kind, _ in MESSAGES.values():
        try:
            kind.parse(memoryview(data))
        except ProtocolError:
            continue


def test_reserved_fields_must_be_zero() -> None:
    packed = bytearray(Commit(5, HandOver(7, b"x")).pack())
    packed[20] = 1
    with pytest.raises(ProtocolError, match="reserved"):
        Commit.parse(memoryview(packed))
    sealed = bytearray(Seal.of([(1, 2)]).pack())
    sealed[12] = 1
    with pytest.raises(ProtocolError, match="reserved"):
        Seal.parse(memoryview(sealed))


def test_a_commit_without_handover_carries_none_of_its_parts() -> None:
    packed = struct.pack("<QIIII", 5, 0, 9, 0, 0)
    with pytest.raises(ProtocolError, match="hand-over"):
        Commit.parse(memoryview(packed))


def test_a_handover_token_must_fit() -> None:
    with pytest.raises(WriteError, match="token"):
        Commit(5, HandOver(-1)).pack()


def test_long_reasons_are_cut_between_characters() -> None:
    abort = Abort.parse(memoryview(Abort(AbortCode.CANCELLED, "ä" * 5000).pack()))
    assert abort.reason == "ä" * 512


def test_want_names_ranges_exactly_when_it_wants_any() -> None:
    for want in (
        Want(WantStatus.PIECES),
        Want(WantStatus.AGAIN),
        Want(WantStatus.FULL, ranges=np.array([(0, 0, 1)], WANT_RANGE)),
    ):
        with pytest.raises(ProtocolError, match="ranges"):
            Want.parse(memoryview(want.pack()))


# Questions


def question(**options: Any) -> Query:
    return Query(np.arange(6, dtype=np.uint32), **options)


@pytest.mark.parametrize(
    ("query", "offset", "layout", "value", "message"),
    [
        (question(), 0, "<H", 2, "reserved"),
        (question(), 6, "<H", 1, "reserved"),
        (question(), 28, "<I", 1, "reserved"),
        (question(), 2, "<H", 1025, "salt"),
        (question(), 4, "<H", 1025, "adapter"),
        (question(), 10, "<H", 0, "shards"),
        (question(), 8, "<H", 1, "shards"),
        (question(), 12, "<I", 0, "candidates"),
        (question(), 12, "<I", CANDIDATES_MAX + 1, "candidates"),
        (question(), 16, "<I", 0, "tokens"),
        (question(), 16, "<I", (1 << 24) + 1, "tokens"),
        (question(), 16, "<I", 7, "truncated"),
        (question(), 20, "<I", 1, "boundaries"),
        (question(grid=ChunkGrid((4, 6))), 32 + 24, "<I", 6, "ascend"),
        (question(grid=ChunkGrid((4, 6))), 32 + 28, "<I", (1 << 24) + 1, "past any prompt"),
        (question(grid=ChunkGrid((4, 6))), 0, "<H", 0, "without insisting"),
        (question(extras=(ExtraInput(5, b"x"),)), 32 + 24, "<I", 6, "past its tokens"),
        (question(extras=(ExtraInput(5, b"x"),)), 32 + 28, "<I", 1 << 17, "extra input"),
        (question(adapter="lora"), 32 + 24, "<B", 0xFF, "UTF-8"),
    ],
)
def test_a_question_beyond_its_rules_is_refused(
    query: Query, offset: int, layout: str, value: int, message: str
) -> None:
    packed = bytearray(query.pack())
    Query.parse(memoryview(packed))
    struct.pack_into(layout, packed, offset, value)
    with pytest.raises(ProtocolError, match=message):
        Query.parse(memoryview(packed))


def test_a_question_beyond_one_frame_is_refused_by_who_asks() -> None:
    with pytest.raises(TransferError, match="shorter prefix"):
        Query(np.zeros(FRAME_PAYLOAD_BYTES_MAX // 4, np.uint32)).pack()


def test_the_parts_of_a_question_are_bounded() -> None:
    """Each costs the node that is asked some microseconds and an object; 16 MiB would hold millions."""
    most = ChunkGrid.every(1, upto=QUERY_PARTS_MAX)
    assert Query.parse(memoryview(question(grid=most).pack())).grid == most
    extras = (ExtraInput(0, b""),) * (QUERY_PARTS_MAX + 1)
    with pytest.raises(TransferError, match=f"{QUERY_PARTS_MAX + 1} extra inputs cannot be asked"):
        question(extras=extras).pack()
    with pytest.raises(TransferError, match=f"{QUERY_PARTS_MAX + 1} chunk boundaries cannot be asked"):
        question(grid=ChunkGrid.every(1, upto=QUERY_PARTS_MAX + 1)).pack()
    fixed = bytearray(question(grid=ChunkGrid(())).pack()[:32])
    for offset, what in ((20, "chunk boundaries"), (24, "extra inputs")):
        packed = bytearray(fixed)
        struct.pack_into("<I", packed, offset, QUERY_PARTS_MAX + 1)
        with pytest.raises(ProtocolError, match=f"{QUERY_PARTS_MAX + 1} {what}"):
            Query.parse(memoryview(packed))


def test_candidates_are_bounded_and_ordered() -> None:
    """The longest answer fits its frame; anything out of order is refused."""
    many = Candidates(tuple(RemoteCandidate(CANDIDATES_MAX - number, "dram", 1) for number in range(CANDIDATES_MAX)))
    FrameHeader(Kind.CANDIDATES, payload_bytes=len(many.pack())).pack()
    assert Candidates.parse(memoryview(many.pack())) == many
    for lengths in ((8, 8), (8, 16), (8, 0)):
        wrong = Candidates(tuple(RemoteCandidate(length, "dram", 1) for length in lengths))
        with pytest.raises(ProtocolError, match="descending"):
            Candidates.parse(memoryview(wrong.pack()))
    for offset, value in ((0, 65), (12, 3), (13, 1)):
        packed = bytearray(Candidates((RemoteCandidate(8, "dram", 1),)).pack())
        packed[offset] = value
        with pytest.raises(ProtocolError):
            Candidates.parse(memoryview(packed))


@pytest.mark.parametrize(
    "fetch", [Fetch(0, 1, 0), Fetch(1, 0, 0), Fetch(1, 1, 0, 0), Fetch(1, 1, 0, CONNECTIONS_PER_TRANSFER_MAX + 1)]
)
def test_a_fetch_of_nothing_is_refused(fetch: Fetch) -> None:
    with pytest.raises(ProtocolError, match="FETCH"):
        Fetch.parse(memoryview(fetch.pack()))


def test_the_documented_question() -> None:
    """The worked example of docs/protocol.md."""
    query = question(salt=b"s", shard=Shard(1, 2), grid=ChunkGrid((4, 6)))
    assert query.pack() == bytes.fromhex(
        "0100 0100 0000 0000 0100 0200 40000000 06000000 02000000 00000000 00000000"
        "00000000 01000000 02000000 03000000 04000000 05000000 04000000 06000000 73".replace(" ", "")
    )


# Headers


def headers() -> st.SearchStrategy[FrameHeader]:
    control = st.builds(
        FrameHeader,
        kind=st.sampled_from([kind for kind in Kind if kind not in (Kind.DATA, Kind.ABORTED, Kind.PING, Kind.PONG)]),
        transfer=st.builds(TransferId, U64, U64),
        generation=U64,
        payload_bytes=st.integers(0, 8),
        payload_crc32c=U32,
    )
    data = st.builds(
        lambda transfer, generation, pieces, body, crc, is_remote: FrameHeader(
            Kind.DATA,
            transfer,
            generation,
            pieces * 16 + (0 if is_remote else max(pieces, body)),
            pieces,
            crc,
            FLAG_REMOTE if is_remote else 0,
        ),
        st.builds(TransferId, U64, U64),
        U64,
        st.integers(1, FRAME_PIECES_MAX),
        st.integers(1, 1 << 20),
        U32,
        st.booleans(),
    )
    return control | data


@given(headers())
@settings(max_examples=200, deadline=None)
def test_headers_round_trip(header: FrameHeader) -> None:
    packed = header.pack()
    assert len(packed) == FRAME_HEADER_BYTES
    assert parse_header(packed) == header


@given(headers(), st.integers(0, 8 * FRAME_HEADER_BYTES - 1))
@settings(max_examples=200, deadline=None)
def test_any_flipped_bit_of_a_header_is_noticed(header: FrameHeader, bit: int) -> None:
    packed = bytearray(header.pack())
    packed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError):
        parse_header(packed)


@given(st.binary(min_size=FRAME_HEADER_BYTES, max_size=FRAME_HEADER_BYTES))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_no_header(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_header(data)


def resigned(header: FrameHeader, offset: int, layout: str, value: object) -> bytes:
    """A header with one field changed and its checksum made to hold again."""
    packed = bytearray(header.pack())
    struct.pack_into(layout, packed, offset, value)
    struct.pack_into("<I", packed, 60, crc32c(packed[:60]))
    return bytes(packed)


def test_a_foreign_version_is_a_mismatch_that_names_both() -> None:
    with pytest.raises(PeerMismatchError, match=r"version 7.*version 1"):
        parse_header(resigned(FrameHeader(Kind.PING), 4, "<H", 7))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (6, "<B", 0, "kind 0"),
        (6, "<B", 99, "kind 99"),
        (7, "<B", 1, "flags"),
        (44, "<B", 1, "reserved"),
        (59, "<B", 1, "reserved"),
        (32, "<I", 1, "limit"),
        (36, "<I", 1, "pieces"),
    ],
)
def test_intact_headers_with_bad_fields_are_refused(offset: int, layout: str, value: int, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse_header(resigned(FrameHeader(Kind.PING), offset, layout, value))


@pytest.mark.parametrize(
    ("pieces", "payload_bytes", "flags"),
    [
        (0, 0, 0),
        (FRAME_PIECES_MAX + 1, 1 << 20, 0),
        (2, 33, 0),
        (2, FRAME_PAYLOAD_BYTES_MAX + 1, 0),
        (1, RECORD_BYTES_MAX + 17, 0),
        (2, 33, FLAG_REMOTE),
        (1, 17, 2),
    ],
)
def test_data_headers_beyond_the_limits_are_refused(pieces: int, payload_bytes: int, flags: int) -> None:
    header = FrameHeader(Kind.DATA, TransferId(1, 1), 1, payload_bytes, pieces, 0, flags)
    with pytest.raises(ProtocolError):
        header.pack()
    intact = FrameHeader(Kind.DATA, TransferId(1, 1), 1, 17, 1)
    packed = bytearray(intact.pack())
    struct.pack_into("<B", packed, 7, flags)
    struct.pack_into("<II", packed, 32, payload_bytes, pieces)
    struct.pack_into("<I", packed, 60, crc32c(packed[:60]))
    with pytest.raises(ProtocolError):
        parse_header(packed)


def test_a_single_piece_may_be_as_large_as_a_record() -> None:
    header = FrameHeader(Kind.DATA, TransferId(1, 1), 1, RECORD_BYTES_MAX + 16, 1)
    assert parse_header(header.pack()).body_bytes == RECORD_BYTES_MAX


def test_the_documented_header() -> None:
    """The worked example of docs/protocol.md."""
    header = FrameHeader(Kind.CREDIT, TransferId(0x0123456789ABCDEF, 5), 2, 16, payload_crc32c=0x11223344)
    expected = bytes.fromhex(
        "4b565354 0100 07 00 efcdab8967452301 0500000000000000 0200000000000000"
        "10000000 00000000 44332211 00000000000000000000000000000000".replace(" ", "")
    )
    packed = header.pack()
    assert packed[:60] == expected
    assert packed[60:] == struct.pack("<I", crc32c(expected)) == bytes.fromhex("846efb08")


def test_piece_tables_have_the_stated_length() -> None:
    rows = np.array([(1, 2, 3, 4), (5, 6, 7, 8)], PIECE_ROW)
    assert parse_piece_table(memoryview(rows.tobytes()), 2).tolist() == rows.tolist()
    for count in (1, 3):
        with pytest.raises(ProtocolError):
            parse_piece_table(memoryview(rows.tobytes()), count)


# Offers against a spec


def small_spec() -> ModelSpec:
    heads = (Segment("heads", 2, 1),)
    keys = TensorSpec("keys", DType.FLOAT16, heads, (4,), has_tokens=True)
    state = TensorSpec("recurrent", DType.FLOAT32, heads, (3,), has_tokens=False)
    return ModelSpec(
        "tiny",
        "weights",
        4,
        (
            CacheGroup("full", ReuseRule.ATTENTION, (0,), (keys,)),
            CacheGroup("delta", ReuseRule.STATE, (1,), (state,)),
        ),
    )


def small_offer(spec: ModelSpec) -> Offer:
    path = NodePath(bytes(32), 4, (b"a" * 32, b"b" * 32))
    records = []
    for node, group in ((0, 0), (1, 0), (1, 1)):
        units = spec.groups[group].all_units
        end = path.end_tokens(node)
        valid = spec.groups[group].valid_tokens(4, end)
        header = RecordHeader(path.key(node), path.parent(node), end, valid, bytes(32))
        records.append((RecordName(node, group, 0, units), record_layout(spec, group, 0, units), header))
    rows, grids = offer_rows(RecordArrays.of(records))
    return Offer(path, b"s", (8,), grids, rows, int(rows["size_bytes"].sum()), 1000, 128, OfferFlag.COMPLETE)


def sparse_offer(spec: ModelSpec) -> Offer:
    """As `small_offer`, with one token of the second block."""
    whole_key, mask = b"b" * 32, b"\x04"
    path = NodePath(bytes(32), 4, (b"a" * 32, sparse_key(whole_key, mask)), sparse=(SparseNode(1, whole_key, mask),))
    offer = small_offer(spec)
    offer.records["coverage"] = (0, 1, 0)
    return replace(offer, path=path, flags=offer.flags | OfferFlag.SPARSE)


def test_a_sparse_offer_is_understood() -> None:
    spec = small_spec()
    packed = sparse_offer(spec).pack()
    offer = Offer.parse(memoryview(packed))
    assert offer.pack() == packed
    assert offer.path == sparse_offer(spec).path
    offered = check_offer(offer, spec)
    assert [layout.is_sparse for layout in map(offered.layout, range(3))] == [False, True, False]
    assert packed[-45:] == struct.pack("<II", 1, 1) + struct.pack("<I", 1) + b"b" * 32 + b"\x04"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mask": b"\x08"}, "its key is not of"),
        ({"whole_key": b"c" * 32}, "its key is not of"),
        ({"mask": b"\x0f"}, "covers all"),
        ({"mask": b"\x14"}, "none of 4 tokens"),
        ({"mask": b"\x04\x04"}, "none of 4 tokens"),
        ({"node": 2}, "ascending nodes"),
    ],
)
def test_a_coverage_that_does_not_fit_is_refused(changes: dict[str, Any], why: str) -> None:
    spec = small_spec()
    offer = sparse_offer(spec)
    node = replace(offer.path.sparse[0], **changes)
    with pytest.raises(ProtocolError, match=why):
        check_offer(replace(offer, path=replace(offer.path, sparse=(node,))), spec)


@pytest.mark.parametrize("coverage", [(0, 0, 0), (1, 1, 0), (0, 1, 1), (0, 2, 0)])
def test_records_and_the_coverage_table_say_the_same(coverage: tuple[int, int, int]) -> None:
    spec = small_spec()
    offer = sparse_offer(spec)
    offer.records["coverage"] = coverage
    with pytest.raises(ProtocolError, match="coverage"):
        check_offer(offer, spec)


def test_a_coverage_table_is_bounded_before_memory_is_taken() -> None:
    packed = sparse_offer(small_spec()).pack()
    for offset in (-45, -41):
        for value in (0, 2**32 - 1):
            damaged = bytearray(packed)
            struct.pack_into("<I", damaged, len(damaged) + offset, value)
            with pytest.raises(ProtocolError):
                Offer.parse(memoryview(damaged))


def test_an_offer_that_fits_the_spec_is_understood() -> None:
    spec = small_spec()
    offer = Offer.parse(memoryview(small_offer(spec).pack()))
    offered = check_offer(offer, spec)
    assert list(offered.names) == [
        RecordName(0, 0, 0, UnitRange(0, 2)),
        RecordName(1, 0, 0, UnitRange(0, 2)),
        RecordName(1, 1, 0, UnitRange(0, 2)),
    ]
    assert offered.valid_tokens.tolist() == [4, 4, 0]
    assert offered.end_tokens.tolist() == [4, 8, 8]


@pytest.mark.parametrize(
    ("row", "field", "value"),
    [
        (0, "node", 2),
        (0, "group", 2),
        (0, "span", 1),
        (0, "grid", 1),
        (0, "codec", 1),
        (0, "coverage", 1),
        (0, "unit_stop", 3),
        (0, "unit_start", 2),
        (0, "pieces", 3),
        (0, "size_bytes", 1),
        (0, "valid_tokens", 3),
        (1, "node", 0),
        (2, "node", 0),
    ],
)
def test_an_offer_that_does_not_fit_the_spec_is_refused(row: int, field: str, value: int) -> None:
    spec = small_spec()
    offer = small_offer(spec)
    offer.records[field][row] = value
    with pytest.raises(ProtocolError):
        check_offer(offer, spec)


def test_an_offer_must_add_up() -> None:
    spec = small_spec()
    offer = small_offer(spec)
    with pytest.raises(ProtocolError, match="add up"):
        check_offer(replace(offer, total_bytes=offer.total_bytes + 1), spec)


def test_an_offer_beyond_one_frame_is_refused_by_its_sender() -> None:
    offer = small_offer(small_spec())
    many = np.zeros(FRAME_PAYLOAD_BYTES_MAX // OFFER_RECORD.itemsize + 1, OFFER_RECORD)
    with pytest.raises(TransferError, match="shorter prefix"):
        replace(offer, records=many).pack()


@pytest.mark.parametrize("resume", [(5,), (8, 4), (4, 4), (12,)])
def test_resume_points_are_ascending_ends_of_nodes(resume: tuple[int, ...]) -> None:
    offer = replace(small_offer(small_spec()), resume_tokens=resume)
    with pytest.raises(ProtocolError, match="resume"):
        Offer.parse(memoryview(offer.pack()))


def test_counts_are_bounded_before_memory_is_taken() -> None:
    """Each count set to its largest is refused at once."""
    packed = small_offer(small_spec()).pack()
    for offset, layout in ((2, "<H"), (4, "<H"), (6, "<H"), (8, "<I"), (12, "<I"), (16, "<I"), (20, "<I")):
        damaged = bytearray(packed)
        struct.pack_into(layout, damaged, offset, 2 ** (8 * struct.calcsize(layout)) - 1)
        with pytest.raises(ProtocolError):
            Offer.parse(memoryview(damaged))


def test_a_seeded_storm_of_damaged_frames() -> None:
    """Thousands of mutated frames against the parsers: a named error or a valid frame, never anything else."""
    generator = random.Random(20)
    spec = small_spec()
    payloads: list[tuple[Any, bytes]] = [
        (Offer, small_offer(spec).pack()),
        (Want, Want(WantStatus.PIECES, 9, np.array([(0, 0, 2)], WANT_RANGE)).pack()),
        (Seal, Seal.of([(0, 1), (1, 2)]).pack()),
        (Expose, Expose((Exposure(0, 9, b"d"),)).pack()),
    ]
    for _ in range(3000):
        kind, packed = generator.choice(payloads)
        damaged = bytearray(packed)
        for _ in range(generator.randint(1, 8)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        damaged = damaged[: generator.randint(0, len(damaged))] if generator.random() < 0.3 else damaged
        try:
            message = kind.parse(memoryview(damaged))
            if isinstance(message, Offer):
                check_offer(message, spec)
        except ProtocolError:
            continue
