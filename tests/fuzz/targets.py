"""What is fuzzed: every parser that takes bytes from a peer, another process or a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import crc32c, parse_frame_header
from kvstore.errors import KVStoreError, PeerMismatchError, ProtocolError, RecordError, SsdDirectoryError, TokenError
from kvstore.keys import ExtraInput
from kvstore.limits import FRAME_HEADER_BYTES
from kvstore.pool import HandOver
from kvstore.record import read_record_stream, write_record_stream
from kvstore.spec import ChunkGrid, Shard
from kvstore.transfer.frames import FrameHeader, Kind, TransferId, parse_header
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
    Seal,
    Want,
    WantStatus,
    parse_piece_table,
)
from kvstore.transfer.offer import Offer, check_offer
from kvstore.transfer.query import Candidates, Fetch, Query, RemoteCandidate
from tests.format.records import RECORDS, sparse_record
from tests.fuzz.attached_targets import MESSAGES, REFUSALS
from tests.fuzz.ssd_targets import (
    mend_journal,
    mend_manifest,
    parse_journal,
    parse_manifest,
    parse_segment,
    seed_journals,
    seed_manifests,
    seed_segments,
)
from tests.unit.test_messages import small_offer, small_spec, sparse_offer

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Target:
    """One parser.

    Attributes:
        seeds: intact inputs to begin from.
        parse: takes bytes; whatever it raises besides `refusals` is a bug.
        refusals: the errors by which it may refuse.
        mend: repairs the checksums of damaged bytes, so that what lies behind them is reached.
        inputs_max: how many inputs the short form tries: fewer where each takes long.
    """

    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    refusals: tuple[type[KVStoreError], ...]
    mend: Callable[[bytes], bytes] | None = None
    inputs_max: int = 20_000


def _headers() -> Target:
    transfer = TransferId(7, 9)
    headers = (
        FrameHeader(Kind.HELLO, payload_bytes=100),
        FrameHeader(Kind.OFFER, transfer, 0, 4096, payload_crc32c=5),
        FrameHeader(Kind.DATA, transfer, 3, 1 << 20, piece_count=17),
        FrameHeader(Kind.PING),
    )

    def mend(data: bytes) -> bytes:
        return data[:60] + crc32c(data[:60]).to_bytes(4, "little") if len(data) == 64 else data

    return Target(tuple(header.pack() for header in headers), parse_header, (ProtocolError, PeerMismatchError), mend)


def _native_headers() -> Target:
    """The native parser refuses what the Python one refuses, and reads the rest alike."""
    python = _headers()

    def read(data: bytes) -> tuple[int, ...] | None:
        try:
            header = parse_header(data)
        except (ProtocolError, PeerMismatchError):
            return None
        sizes = (header.payload_bytes, header.piece_count, header.payload_crc32c)
        return (int(header.kind), header.flags, *header.transfer, header.generation, *sizes)

    def parse(data: bytes) -> None:
        packed = data[:FRAME_HEADER_BYTES].ljust(FRAME_HEADER_BYTES, b"\0")
        expected = read(packed)
        try:
            found = parse_frame_header(packed)
        except (ProtocolError, PeerMismatchError):
            assert expected is None, f"only the native parser refuses {expected}"
            raise
        assert found == expected, f"the native parser reads {found}, the Python one {expected}"

    return Target(python.seeds, parse, python.refusals, python.mend)


def _message(kind: Any, *messages: Any) -> Target:
    return Target(
        tuple(message.pack() for message in messages), lambda data: kind.parse(memoryview(data)), (ProtocolError,)
    )


def _offers() -> Target:
    spec = small_spec()

    def parse(data: bytes) -> None:
        check_offer(Offer.parse(memoryview(data)), spec)

    return Target((small_offer(spec).pack(), sparse_offer(spec).pack()), parse, (ProtocolError,))


def _questions() -> Target:
    """What is parsed is answered: the node computes the keys of whatever was asked."""
    spec = small_spec()
    ids = np.arange(9, dtype=np.uint32)
    seeds = (
        Query(ids),
        Query(ids, b"salt", "adapter", (ExtraInput(4, b"image"),), Shard(1, 2), ChunkGrid((4, 9))),
    )

    def parse(data: bytes) -> None:
        Query.parse(memoryview(data)).prompt(spec)

    return Target(tuple(seed.pack() for seed in seeds), parse, (ProtocolError, TokenError))


def _piece_tables() -> Target:
    seed = np.zeros(5, PIECE_ROW).tobytes()
    return Target((seed,), lambda data: parse_piece_table(memoryview(data), 5), (ProtocolError,))


def _records() -> Target:
    seeds = tuple(write_record_stream(make()) for make in (*RECORDS, sparse_record))
    return Target(seeds, read_record_stream, (RecordError,))


def _attached(name: str) -> Target:
    seeds, parse = MESSAGES[name]
    return Target(tuple(seeds), lambda data: parse(memoryview(data)), REFUSALS)


HELLO = Hello(
    boot_epoch=5,
    fingerprint=bytes(32),
    model="model",
    progress_deadline_ms=5000,
    features=3,
    frame_payload_bytes_max=1 << 24,
    frame_pieces_max=4096,
    version_min=1,
    version_max=1,
)

TARGETS: dict[str, Callable[[], Target]] = {
    "frame-header": _headers,
    "frame-header-native": _native_headers,
    "hello": lambda: _message(Hello, HELLO),
    "offer": _offers,
    "want": lambda: _message(
        Want, Want(WantStatus.PIECES, 9, np.array([(0, 0, 2)], WANT_RANGE)), Want(WantStatus.FULL, 0, reason="full")
    ),
    "expose": lambda: _message(Expose, Expose((Exposure(0, 9, b"descriptor"), Exposure(4, 2, b"d")))),
    "seal": lambda: _message(Seal, Seal.of([(0, 1), (1, 2)])),
    "credit": lambda: _message(Credit, Credit(1 << 20, 5)),
    "commit": lambda: _message(Commit, Commit(64, HandOver(5, b"logits")), Commit(64, None)),
    "committed": lambda: _message(Committed, Committed(True, 64, 2, 4096)),
    "abort": lambda: _message(Abort, Abort(AbortCode.CANCELLED, "the user left")),
    "query": _questions,
    "candidates": lambda: _message(
        Candidates, Candidates((RemoteCandidate(9, "dram", 4096, 7), RemoteCandidate(4, "ssd", 64)), 16)
    ),
    "fetch": lambda: _message(Fetch, Fetch(9, 30_000, 128, 2)),
    "piece-table": _piece_tables,
    "record": _records,
    **{name: partial(_attached, name) for name in MESSAGES},
    "ssd-journal": lambda: Target(seed_journals(), parse_journal, (SsdDirectoryError,), mend_journal, 800),
    "ssd-manifest": lambda: Target(seed_manifests(), parse_manifest, (SsdDirectoryError,), mend_manifest, 5_000),
    "ssd-segment": lambda: Target(seed_segments(), parse_segment, (SsdDirectoryError,), inputs_max=5_000),
}
