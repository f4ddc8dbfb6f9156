"""Transfers when something goes wrong: dead and stopped peers, cut connections, damaged and hostile bytes.

Whatever happens, both sides end in bounded time, a destination is complete and bit-identical or absent,
the budgets are back to where they were, and the endpoint goes on serving others.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
from kvstore._native import crc32c
from kvstore.abc import Connection, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import (
    ChecksumError,
    DeadlineError,
    KVStoreError,
    PeerGoneError,
    PeerMismatchError,
    ProtocolError,
    TransferAbortedError,
    TransferError,
)
from kvstore.registry import transport_for
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, LeaseSource, Sender, TransferSettings, send_lease
from kvstore.transfer.frames import FLAG_REMOTE, NO_TRANSFER, FrameHeader, Kind, TransferId
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import (
    Abort,
    AbortCode,
    Commit,
    Committed,
    Expose,
    Exposure,
    Hello,
    Seal,
    Want,
    WantStatus,
)
from kvstore.transfer.offer import Offer, OfferFlag, offer_rows
from kvstore.transfer.outgoing import Outgoing
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    FAST,
    WITHIN_S,
    CutConnection,
    FlipConnection,
    WrappedConnection,
    WrappedTransport,
    address,
    assert_same,
    assert_settled,
    child,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.transfer.source import Source

TOKENS = 64
IDS = prompt(TOKENS)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


@pytest.fixture
def endpoint(target: kvstore.Store, scheme: str) -> Iterator[Endpoint]:
    with Endpoint(target.pool, address(scheme), settings=FAST) as endpoint:
        yield endpoint


@pytest.fixture
def sender() -> Iterator[Sender]:
    with Sender(settings=FAST) as sender:
        yield sender


def still_serves(endpoint: Endpoint, target: kvstore.Store, seed: int = 50) -> None:
    """The endpoint takes an honest transfer."""
    with kvstore.open(tiny_spec(), dram="8MiB") as honest, Sender(settings=FAST) as sender:
        ids = prompt(12, seed=seed)
        store_prompt(honest, ids, seed=seed)
        send_lease(honest.read(match_all(honest, ids)), endpoint.address, sender=sender).result(WITHIN_S)
        assert_same(honest, target, ids, 12)


def send_over(
    sender: Sender, store: kvstore.Store, endpoint: Endpoint, wrap: Callable[[Connection, int], Connection]
) -> kvstore.transfer.TransferReport:
    """Send the prompt over a faulty network."""
    handle = send_lease(
        store.read(match_all(store, IDS)),
        endpoint.address,
        sender=sender,
        find_transport=lambda name: WrappedTransport(name, wrap),
    )
    return handle.result(WITHIN_S)


# Connections that break


@pytest.mark.parametrize("cut_after_bytes", [0, 30, 200, 700, 1500, 4000, 9000, 13000])
def test_a_cut_connection_is_replaced_and_the_transfer_resumed(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, scheme: str, cut_after_bytes: int
) -> None:
    sent: list[int] = []
    if scheme == "memory" and cut_after_bytes > 4000:
        cut_after_bytes //= 3  # the pieces themselves do not pass through the stream

    def wrap(connection: Connection, number: int) -> Connection:
        sent.append(number)
        return CutConnection(connection, cut_after_bytes) if number == 0 else connection

    if cut_after_bytes < 200:
        # Nothing was heard of the peer yet: not a resume, a failed first contact.
        with pytest.raises(PeerGoneError):
            send_over(sender, source, endpoint, wrap)
        assert match_all(target, IDS).tokens == 0
    else:
        report = send_over(sender, source, endpoint, wrap)
        assert report.reconnects == len(sent) - 1 == 1
        assert_same(source, target, IDS, TOKENS)
    assert_settled(source, target)
    still_serves(endpoint, target)


def test_a_resumed_transfer_sends_only_what_is_left(scheme: str, sender: Sender) -> None:
    if scheme == "memory":
        pytest.skip("exposed pieces do not pass through the wrapped stream")
    spec = tiny_spec(width=512)
    with (
        kvstore.open(spec, dram="64MiB") as source,
        kvstore.open(spec, dram="64MiB") as target,
        Endpoint(target.pool, address(scheme), settings=TransferSettings(credit_bytes=64 << 10)) as endpoint,
    ):
        store_prompt(source, IDS)
        report = send_over(
            sender, source, endpoint,
            lambda connection, number: CutConnection(connection, 300_000) if number == 0 else connection,
        )  # fmt: skip
        assert report.reconnects == 1
        assert endpoint.statistics().resumed == 1
        total = sum(int(r.layout.piece_sizes.sum()) for r in source.read(match_all(source, IDS)).records)
        # What was in flight when the connection broke is sent again, at most a credit's worth; no more.
        assert total <= report.total_bytes <= total + (64 << 10)
        assert_same(source, target, IDS, TOKENS)


@pytest.mark.parametrize("seed", range(4))
def test_a_network_that_keeps_breaking(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, seed: int
) -> None:
    generator = random.Random(seed)

    def wrap(connection: Connection, number: int) -> Connection:
        if number < 5:
            return CutConnection(connection, generator.randrange(300, 14_000))
        return connection

    report = send_over(sender, source, endpoint, wrap)
    assert report.reconnects <= 5
    assert_same(source, target, IDS, TOKENS)
    assert_settled(source, target)


class DeafAfterCommit(WrappedConnection):
    """Breaks after COMMIT has left and the receiver has committed, before COMMITTED is heard."""

    def __init__(self, inner: Connection, is_committed: Callable[[], bool]) -> None:
        super().__init__(inner)
        self._is_committed = is_committed
        self._has_sent_commit = threading.Event()

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        if bytes(buffers[0])[:4] == b"KVST" and bytes(buffers[0])[6] == Kind.COMMIT:
            self._has_sent_commit.set()
        super().send(buffers, deadline)

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        super().receive(into, deadline)
        if self._has_sent_commit.is_set():
            wait_until(self._is_committed, "the receiver had committed")
            self.close()
            raise PeerGoneError("the connection broke")


def test_a_break_between_commit_and_committed_is_not_ambiguous(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    def wrap(connection: Connection, number: int) -> Connection:
        return DeafAfterCommit(connection, lambda: endpoint.statistics().committed == 1) if number == 0 else connection

    report = send_over(sender, source, endpoint, wrap)
    assert report.reconnects == 1
    assert endpoint.statistics().committed == 1
    assert endpoint.statistics().resumed == 0
    assert_same(source, target, IDS, TOKENS)
    assert_settled(source, target)


def test_a_transfer_that_is_never_resumed_is_given_up(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender
) -> None:
    short = TransferSettings(resume_window_s=0.3)
    with Endpoint(target.pool, address(scheme), settings=short) as endpoint, RawPeer(endpoint, source) as peer:
        peer.offer()
        assert target.statistics().reserved_bytes > 0
        peer.close()
        wait_until(lambda: endpoint.transfer_count == 0, "the window had passed", 9.0)
        assert_settled(target)
        # A late return is told so, and does not begin anew.
        late = peer.again()
        assert late.offer_raw()[0].kind is Kind.ABORT
        late.close()


def test_a_broken_transfer_yields_to_one_that_needs_the_space(
    source: kvstore.Store, scheme: str, sender: Sender
) -> None:
    patient = TransferSettings(resume_window_s=20.0)
    with (
        kvstore.open(tiny_spec(), dram="288KiB") as target,
        Endpoint(target.pool, address(scheme), settings=patient) as endpoint,
        RawPeer(endpoint, source) as peer,
        kvstore.open(tiny_spec(), dram="8MiB") as other,
    ):
        assert peer.offer().status is WantStatus.PIECES
        peer.close()
        ids = prompt(TOKENS, seed=4)
        store_prompt(other, ids, seed=4)
        wait_until(lambda: endpoint.connection_count == 0, "the break was noticed")
        send_lease(other.read(match_all(other, ids)), endpoint.address, sender=sender).result(WITHIN_S)
        assert_same(other, target, ids, TOKENS)
        assert endpoint.statistics().aborted == 1


# Damage on the way


def wire_offset(source: kvstore.Store, endpoint: Endpoint, what: str) -> int:
    """Where on the wire the piece bytes of the first DATA frame begin, or its table, or the offer."""
    hello = make_hello(source.spec, 1, FAST, _Stream())
    offer = RawPeer(endpoint, source, connect=False).offer_payload
    start = 64 + len(hello.pack()) + 64
    pieces = sum(len(record.layout.pieces) for record in source.read(match_all(source, IDS)).records)
    first_table = start + len(offer) + 64
    return {"offer": start + 100, "table": first_table + 3, "pieces": first_table + 16 * pieces + 777,
            "header": start + len(offer) + 40}[what]  # fmt: skip


class _Stream(WrappedConnection):
    def __init__(self) -> None:
        pass

    @property
    def supports_get(self) -> bool:
        return False


@pytest.mark.parametrize("what", ["pieces", "table", "header", "offer"])
def test_a_flipped_bit_on_the_wire_is_repaired(
    source: kvstore.Store, target: kvstore.Store, sender: Sender, what: str
) -> None:
    with Endpoint(target.pool, address("tcp"), settings=FAST) as endpoint:
        offset = wire_offset(source, endpoint, what)
        report = send_over(
            sender, source, endpoint,
            lambda connection, number: FlipConnection(connection, offset) if number == 0 else connection,
        )  # fmt: skip
        # A damaged piece is asked for again; a damaged header, table or offer costs the connection.
        assert (report.pieces_again, report.reconnects) == ((1, 0) if what == "pieces" else (0, 1))
        assert endpoint.statistics().damaged_pieces == (1 if what == "pieces" else 0)
        assert_same(source, target, IDS, TOKENS)
        assert_settled(source, target)


class FlipAllData(WrappedConnection):
    """Damages the last byte of every DATA frame."""

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        data = bytearray(b"".join(bytes(buffer) for buffer in buffers))
        if data[:4] == b"KVST" and data[6] == Kind.DATA:
            data[-1] ^= 1
        self.inner.send([bytes(data)], deadline)


def test_pieces_that_keep_arriving_damaged_end_the_transfer_by_name(
    source: kvstore.Store, target: kvstore.Store, sender: Sender
) -> None:
    strict = TransferSettings(damaged_pieces_max=5)
    with Endpoint(target.pool, address("tcp"), settings=strict) as endpoint:
        with pytest.raises(TransferError, match="checksum") as caught:
            send_over(sender, source, endpoint, lambda connection, _: FlipAllData(connection))
        assert isinstance(caught.value, ChecksumError)
        assert match_all(target, IDS).tokens == 0
        assert_settled(source, target)
        still_serves(endpoint, target)


def test_a_record_damaged_in_the_senders_memory_is_never_committed(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    lease = source.read(match_all(source, IDS))
    record = lease.records[3]
    record.memory[record.layout.pieces[0].offset] ^= 1
    with pytest.raises(TransferError, match="checksum"):
        send_lease(lease, endpoint.address, sender=sender).result(WITHIN_S)
    assert match_all(target, IDS).tokens == 0
    assert_settled(source, target)


# Hostile and confused peers, spoken to frame by frame


class RawPeer:
    """A sender made by hand, which can break every rule."""

    def __init__(
        self, endpoint: Endpoint, store: kvstore.Store, *, connect: bool = True, transfer: TransferId | None = None
    ) -> None:
        self.endpoint, self.store = endpoint, store
        self.lease = store.read(match_all(store, IDS))
        self.source: Source = LeaseSource(self.lease)
        self.transfer = transfer or TransferId(random.getrandbits(60) + 1, 1)
        rows, grids = offer_rows(self.source.table)
        self.offer_payload = Offer(
            self.source.path, b"", (TOKENS,), grids, rows, self.source.total_bytes, 60_000, 128, OfferFlag.COMPLETE
        ).pack()
        self.outgoing = Outgoing(self.source)
        for number, record in enumerate(self.source.records):
            self.outgoing.pieces_whole(number, np.arange(len(record.layout.pieces)))
            self.outgoing.record_sealed(number, 7)
        self.generation = 0
        self.link: FrameLink | None = None
        if connect:
            self.connect()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self.source.close()

    def connect(self) -> None:
        transport = transport_for(self.endpoint.address)
        connection = transport.connect(self.endpoint.address, TransportOptions(), Deadline.after(WITHIN_S))
        self.link = FrameLink(connection, 5.0)
        hello = make_hello(self.store.spec, self.transfer.epoch, FAST, connection)
        self.link.send(Kind.HELLO, NO_TRANSFER, payload=hello.pack())
        header, payload = self.receive()
        assert header.kind is Kind.HELLO
        Hello.parse(payload)

    @property
    def is_one_sided(self) -> bool:
        assert self.link is not None
        return self.link.connection.supports_get

    def send(self, kind: Kind, payload: bytes = b"", *, generation: int | None = None) -> None:
        assert self.link is not None
        self.link.send(kind, self.transfer, self.generation if generation is None else generation, payload)

    def receive(self) -> tuple[FrameHeader, memoryview]:
        assert self.link is not None
        header = self.link.receive_header(Deadline.after(WITHIN_S))
        return header, self.link.receive_payload(header)

    def offer_raw(self) -> tuple[FrameHeader, memoryview]:
        self.send(Kind.OFFER, self.offer_payload)
        return self.receive()

    def offer(self) -> Want:
        header, payload = self.offer_raw()
        assert header.kind is Kind.WANT, bytes(payload)
        want = Want.parse(payload)
        self.generation = header.generation
        self.outgoing.want(want.ranges, granted_bytes=1 << 40, is_again=False)
        return want

    def expose(self) -> None:
        assert self.link is not None
        if self.is_one_sided:
            exposures = [
                Exposure(number, record.memory.nbytes, self.link.connection.expose(record.memory))
                for number, record in enumerate(self.source.records)
            ]
            self.send(Kind.EXPOSE, Expose(tuple(exposures)).pack())

    def data(self, bytes_max: int = 1 << 22, *, generation: int | None = None) -> int:
        """Send one DATA frame; the bytes of its pieces."""
        assert self.link is not None
        frame = self.outgoing.next_frame(
            self.transfer,
            self.generation if generation is None else generation,
            bytes_max,
            is_remote=self.is_one_sided,
        )
        if frame is None:
            return 0
        self.link.send_frame(frame.header, frame.payload)
        return frame.body_bytes

    def table(self, rows: list[tuple[int, int, int, int]], *, flags: int = 0) -> None:
        """Send a DATA frame with any table, its bodies zero."""
        assert self.link is not None
        from kvstore.transfer.messages import PIECE_ROW

        table = np.array(rows, PIECE_ROW).tobytes()
        body = bytes(0 if flags else sum(row[2] for row in rows))
        header = FrameHeader(
            Kind.DATA, self.transfer, self.generation, len(table) + len(body), len(rows), crc32c(table), flags
        )
        self.link.send_frame(header, [memoryview(table + body)])

    def all(self) -> None:
        """Everything that a commit needs."""
        self.expose()
        while self.data():
            continue
        while len(seals := self.outgoing.next_seals(100)):
            self.send(Kind.SEAL, Seal(seals).pack())

    def ending(self) -> tuple[Kind | None, str]:
        """What the receiver says last: an ABORT's reason, or nothing before it closes."""
        try:
            while True:
                header, payload = self.receive()
                if header.kind is Kind.ABORT:
                    return header.kind, Abort.parse(payload).reason
                if header.kind is Kind.COMMITTED:
                    return header.kind, ""
        except KVStoreError:
            return None, ""

    def again(self) -> RawPeer:
        """The same transfer over another connection."""
        return RawPeer(self.endpoint, self.store, transfer=self.transfer)

    def close(self) -> None:
        if self.link is not None:
            self.link.close()


def test_the_raw_peer_can_be_honest(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    """The control of the tests below: without a fault the same frames lead to a commit."""
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.all()
        peer.send(Kind.COMMIT, Commit(TOKENS).pack())
        assert peer.ending()[0] is Kind.COMMITTED
    assert match_all(target, IDS).tokens == TOKENS
    with target.read(match_all(target, IDS)) as lease:
        assert {record.header.cost_us for record in lease.records} == {7}


def violate(peer: RawPeer, what: str) -> None:
    """Break one rule after an offer was accepted."""
    size = int(peer.source.records[0].layout.piece_sizes[0])
    remote = FLAG_REMOTE if peer.is_one_sided else 0
    if what == "unknown record":
        peer.table([(10_000, 0, size, 0)], flags=remote)
    elif what == "unknown piece":
        peer.table([(0, 10_000, size, 0)], flags=remote)
    elif what == "wrong size":
        peer.table([(0, 0, size + 1, 0)], flags=remote)
    elif what == "piece twice in a frame":
        peer.table([(0, 0, size, 0), (0, 0, size, 0)], flags=remote)
    elif what == "piece twice":
        peer.expose()
        peer.data()
        peer.table([(0, 0, size, 0)], flags=remote)
    elif what == "commit too early":
        peer.send(Kind.COMMIT, Commit(TOKENS).pack())
    elif what == "commit without seals":
        peer.expose()
        while peer.data():
            continue
        peer.send(Kind.COMMIT, Commit(TOKENS).pack())
    elif what == "commit of a length between blocks":
        peer.all()
        peer.send(Kind.COMMIT, Commit(TOKENS - 1).pack())
    elif what == "seal of an unknown record":
        peer.send(Kind.SEAL, Seal.of([(10_000, 0)]).pack())
    elif what == "the other kind of data":
        peer.table([(0, 0, size, 0)], flags=FLAG_REMOTE ^ remote)
        if remote:
            raise AssertionError("a one-sided connection may carry both kinds")
    elif what == "expose on a stream":
        peer.send(Kind.EXPOSE, Expose((Exposure(0, 1 << 20, b"d"),)).pack())
    elif what == "get of what is not exposed":
        peer.table([(0, 0, size, 0)], flags=remote)
    elif what == "truncated message":
        peer.send(Kind.SEAL, b"\1")
    elif what == "expose of an unknown record":
        peer.send(Kind.EXPOSE, Expose((Exposure(10_000, 1 << 20, b"d"),)).pack())
    elif what == "unknown transfer":
        peer.transfer = TransferId(peer.transfer.epoch, 99)
        peer.table([(0, 0, size, 0)], flags=remote)


STREAM_ONLY = {"the other kind of data", "expose on a stream"}
VIOLATIONS = [
    "unknown record", "unknown piece", "wrong size", "piece twice in a frame", "piece twice", "commit too early",
    "commit without seals", "commit of a length between blocks", "seal of an unknown record",
    "the other kind of data", "expose on a stream", "expose of an unknown record", "get of what is not exposed",
    "truncated message", "unknown transfer",
]  # fmt: skip


@pytest.mark.parametrize("what", VIOLATIONS)
def test_a_peer_that_breaks_a_rule_is_refused(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, scheme: str, what: str
) -> None:
    if what in STREAM_ONLY and scheme == "memory":
        pytest.skip("one-sided connections allow it")
    if what == "get of what is not exposed" and scheme == "tcp":
        pytest.skip("streams have no exposures")
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        violate(peer, what)
        kind, reason = peer.ending()
        assert kind is Kind.ABORT, what
        assert reason
    wait_until(lambda: endpoint.transfer_count == 0, "the transfer was given up")
    wait_until(lambda: endpoint.connection_count == 0, "the connection was closed")
    assert match_all(target, IDS).tokens == 0
    assert_settled(source, target)
    still_serves(endpoint, target)


def test_a_reason_arrives_although_more_was_under_way(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    """Closing at once would let the system throw away the ABORT together with what was not read."""
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.send(Kind.SEAL, Seal.of([(10_000, 0)]).pack())
        for _ in range(400):
            peer.send(Kind.SEAL, Seal.of([(0, 0)] * 100).pack())
        time.sleep(0.1)
        assert peer.ending()[0] is Kind.ABORT
    assert_settled(target)


def test_more_than_the_credit_is_refused(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    tight = TransferSettings(credit_bytes=2048)
    with Endpoint(target.pool, address(scheme), settings=tight) as endpoint, RawPeer(endpoint, source) as peer:
        assert peer.offer().granted_bytes == 2048
        peer.expose()
        peer.data(4096)
        assert "credit" in peer.ending()[1]
    assert_settled(target)


def test_the_receiver_holds_the_total_deadline_too(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    """Against a sender that keeps sending, only slowly."""
    with RawPeer(endpoint, source) as peer:
        payload = bytearray(peer.offer_payload)
        struct.pack_into("<I", payload, 32, 300)
        peer.offer_payload = bytes(payload)
        peer.offer()
        peer.expose()
        time.sleep(0.1)
        peer.data(500)
        begin = time.monotonic()
        while peer.link is not None and endpoint.transfer_count and time.monotonic() - begin < WITHIN_S:
            try:
                peer.send(Kind.PING)
                time.sleep(0.02)
                peer.data(100)
            except PeerGoneError:
                break
        assert time.monotonic() - begin < WITHIN_S / 2
    wait_until(lambda: endpoint.transfer_count == 0, "it was given up")
    assert_settled(target)


def test_an_offer_that_does_not_fit_the_spec_is_refused(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with RawPeer(endpoint, source) as peer:
        honest = peer.offer_payload
        rows_at = honest.rindex(peer.source.path.keys[-1]) + 32 + 4
        for offset in range(rows_at, len(honest), 97):
            damaged = bytearray(honest)
            damaged[offset] ^= 0xFF
            peer.offer_payload = bytes(damaged)
            header, payload = peer.offer_raw()
            if header.kind is Kind.ABORT:
                assert Abort.parse(payload).code is AbortCode.INVALID
            else:
                peer.send(Kind.ABORT, Abort(AbortCode.CANCELLED, "enough").pack())
            peer.close()
            peer.transfer = TransferId(peer.transfer.epoch, peer.transfer.counter + 1)
            peer.connect()
    assert match_all(target, IDS).tokens == 0
    wait_until(lambda: endpoint.transfer_count == 0, "all were given up")
    assert_settled(target)


def test_one_node_cannot_speak_for_another(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    with RawPeer(endpoint, source) as victim, RawPeer(endpoint, source) as intruder:
        victim.offer()
        intruder.transfer = victim.transfer
        intruder.send(Kind.ABORT, Abort(AbortCode.CANCELLED, "not mine").pack())
        assert intruder.ending()[0] is None
        victim.all()
        victim.send(Kind.COMMIT, Commit(TOKENS).pack())
        assert victim.ending()[0] is Kind.COMMITTED


def test_a_second_offer_on_a_busy_connection_closes_it(source: kvstore.Store, endpoint: Endpoint) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.send(Kind.OFFER, peer.offer_payload)
        assert peer.ending()[0] is None


def test_a_connection_serves_one_transfer_after_another(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.send(Kind.ABORT, Abort(AbortCode.CANCELLED, "not this one").pack())
        assert peer.receive()[0].kind is Kind.ABORTED
        for _ in range(2):
            peer.transfer = TransferId(peer.transfer.epoch, peer.transfer.counter + 1)
            want = peer.offer()
            if want.status is WantStatus.PIECES:
                peer.all()
            peer.send(Kind.COMMIT, Commit(TOKENS).pack())
            assert peer.ending()[0] is Kind.COMMITTED
        assert want.status is WantStatus.HAVE_ALL
    assert match_all(target, IDS).tokens == TOKENS
    assert (endpoint.statistics().committed, endpoint.statistics().aborted) == (2, 1)


def test_late_frames_of_an_old_generation_are_refused(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.expose()
        peer.data(2048, generation=peer.generation + 1)
        kind, reason = peer.ending()
        assert kind is Kind.ABORT
        assert "generation" in reason
        with peer.again() as newer:
            # The refused frame has left no trace: everything is still wanted.
            want = newer.offer()
            assert newer.generation > peer.generation
            assert int(want.ranges["count"].sum()) == sum(len(r.layout.pieces) for r in peer.source.records)
            old, newer.generation = newer.generation, peer.generation
            newer.expose()
            newer.data(2048)
            assert "generation" in newer.ending()[1]
            assert old != peer.generation
    wait_until(lambda: endpoint.transfer_count == 0, "the resume window had passed", 9.0)
    assert_settled(target)


def test_a_new_connection_takes_over_from_a_hanging_one(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    """The old one is in the middle of a frame; it is closed, and what was incomplete is wanted again."""
    with RawPeer(endpoint, source) as old:
        old.offer()
        old.expose()
        first = old.data(2048)
        old.send(Kind.PING)
        assert old.receive()[0].kind is Kind.PONG
        assert old.link is not None
        seal = FrameHeader(Kind.SEAL, old.transfer, old.generation, 24)
        old.link.connection.send([seal.pack()], Deadline.after(WITHIN_S))
        with old.again() as new:
            missing = new.offer()
            sizes = [r.layout.piece_sizes for r in new.source.records]
            left = sum(
                int(sizes[record][start : start + count].sum()) for record, start, count in missing.ranges.tolist()
            )
            assert left == new.source.total_bytes - first
            new.all()
            # Also those whose last piece came over the old connection.
            new.send(Kind.SEAL, Seal.of([(number, 7) for number in range(len(sizes))]).pack())
            new.send(Kind.COMMIT, Commit(TOKENS).pack())
            assert new.ending()[0] is Kind.COMMITTED
        assert old.ending()[0] is None
    assert match_all(target, IDS).tokens == TOKENS
    assert_settled(target)


def test_commit_is_idempotent_on_any_connection(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.all()
        peer.send(Kind.COMMIT, Commit(TOKENS).pack())
        assert peer.ending()[0] is Kind.COMMITTED
    for _ in range(2):
        with peer.again() as late:
            late.send(Kind.COMMIT, Commit(TOKENS).pack())
            header, payload = late.receive()
            assert header.kind is Kind.COMMITTED
            assert Committed.parse(payload).was_known
            header, payload = late.offer_raw()
            assert header.kind is Kind.COMMITTED
    with RawPeer(endpoint, source) as stranger:
        stranger.send(Kind.COMMIT, Commit(TOKENS).pack())
        assert "not known" in stranger.ending()[1]
    assert endpoint.statistics().committed == 1


def test_a_commit_waits_for_pieces_that_are_asked_for_again(
    source: kvstore.Store, target: kvstore.Store, scheme: str, endpoint: Endpoint
) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.offer()
        record = peer.source.records[0]
        damaged = int(record.layout.pieces[0].offset)
        record.memory[damaged] ^= 1
        peer.all()
        peer.send(Kind.COMMIT, Commit(TOKENS).pack())
        while True:
            header, payload = peer.receive()
            if header.kind is Kind.WANT:
                break
        want = Want.parse(payload)
        assert (want.status, want.ranges.tolist()) == (WantStatus.AGAIN, [(0, 0, 1)])
        assert match_all(target, IDS).tokens == 0
        record.memory[damaged] ^= 1
        peer.outgoing.want(want.ranges, granted_bytes=1 << 40, is_again=True)
        peer.data()
        assert peer.ending()[0] is Kind.COMMITTED
    assert match_all(target, IDS).tokens == TOKENS


@pytest.mark.parametrize("kind", [Kind.QUERY, Kind.CANDIDATES, Kind.FETCH])
def test_questions_without_the_feature_are_answered(source: kvstore.Store, endpoint: Endpoint, kind: Kind) -> None:
    with RawPeer(endpoint, source) as peer:
        peer.send(kind, b"whatever it is")
        header, payload = peer.receive()
        assert header.kind is Kind.ABORT
        assert Abort.parse(payload).code is AbortCode.UNSUPPORTED
        # The connection stays in use.
        peer.send(Kind.PING)
        assert peer.receive()[0].kind is Kind.PONG


def test_a_receiver_of_another_version_is_named_on_both_sides(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    packed = bytearray(FrameHeader(Kind.HELLO, NO_TRANSFER, 0, 8).pack())
    struct.pack_into("<H", packed, 4, 2)
    struct.pack_into("<I", packed, 60, crc32c(packed[:60]))
    transport = transport_for(endpoint.address)
    connection = transport.connect(endpoint.address, TransportOptions(), Deadline.after(WITHIN_S))
    connection.send([bytes(packed), bytes(8)], Deadline.after(WITHIN_S))
    with pytest.raises(PeerGoneError):
        connection.receive([memoryview(bytearray(64))], Deadline.after(WITHIN_S))
    connection.close()
    assert endpoint.last_error is not None
    assert isinstance(endpoint.last_error[1], PeerMismatchError)
    assert "version 2" in str(endpoint.last_error[1])
    assert "version 1" in str(endpoint.last_error[1])


def test_a_sender_names_the_versions_of_a_foreign_receiver(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    """A receiver whose HELLO offers versions 2 to 3 only."""
    transport = transport_for(address(scheme))
    listener = transport.listen(address(scheme), TransportOptions())

    def serve() -> None:
        connection = listener.accept(Deadline.after(WITHIN_S))
        link = FrameLink(connection, 5.0)
        link.receive_payload(link.receive_header(Deadline.after(WITHIN_S)))
        hello = Hello(9, source.spec.fingerprint, "tiny", 1000, 0, 1 << 24, 4096, version_min=2, version_max=3)
        link.send(Kind.HELLO, NO_TRANSFER, payload=hello.pack())
        with pytest.raises(KVStoreError):
            link.receive_header(Deadline.after(WITHIN_S))
        link.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(PeerMismatchError, match=r"2 to 3.*1 to 1"):
        send_lease(source.read(match_all(source, IDS)), listener.address, sender=sender).result(WITHIN_S)
    thread.join(WITHIN_S)
    listener.close()


def test_a_receiver_that_answers_nonsense(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    """Seeded random answers after a proper HELLO: the sender fails by name, its lease is released."""
    generator = random.Random(6)
    transport = transport_for(address(scheme))
    listener = transport.listen(address(scheme), TransportOptions())
    over = threading.Event()

    def serve() -> None:
        while not over.is_set():
            try:
                connection = listener.accept(Deadline.after(0.2))
            except DeadlineError:
                continue
            except PeerGoneError:
                return
            link = FrameLink(connection, 1.0)
            try:
                link.receive_payload(link.receive_header(Deadline.after(WITHIN_S)))
                hello = make_hello(source.spec, 9, FAST, connection)
                link.send(Kind.HELLO, NO_TRANSFER, payload=hello.pack())
                link.receive_payload(link.receive_header(Deadline.after(WITHIN_S)))
                connection.send([generator.randbytes(300)], Deadline.after(WITHIN_S))
            except KVStoreError:
                pass
            finally:
                link.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with pytest.raises((ProtocolError, PeerGoneError)):
            send_lease(source.read(match_all(source, IDS)), listener.address, sender=sender).result(WITHIN_S)
    finally:
        over.set()
        listener.close()
        thread.join(WITHIN_S)
    assert source.pool.evict(source.prompt(IDS).path.keys[0]) > 0


# Fuzz against a live endpoint


def honest_stream(endpoint: Endpoint, source: kvstore.Store) -> bytes:
    """Every byte that an honest sender would send over a stream, COMMIT included."""
    peer = RawPeer(endpoint, source, connect=False)
    frames = [(Kind.HELLO, make_hello(source.spec, peer.transfer.epoch, FAST, _Stream()).pack(), 0)]
    frames.append((Kind.OFFER, peer.offer_payload, 0))
    stream = b""
    for kind, payload, generation in frames:
        transfer = NO_TRANSFER if kind is Kind.HELLO else peer.transfer
        stream += FrameHeader(kind, transfer, generation, len(payload), payload_crc32c=crc32c(payload)).pack() + payload
    ranges = [(number, 0, len(record.layout.pieces)) for number, record in enumerate(peer.source.records)]
    from kvstore.transfer.messages import WANT_RANGE

    peer.outgoing.want(np.array(ranges, WANT_RANGE), granted_bytes=1 << 40, is_again=False)
    while frame := peer.outgoing.next_frame(peer.transfer, 1, 4096, is_remote=False):
        stream += frame.header.pack() + b"".join(bytes(view) for view in frame.payload)
    seals = Seal(peer.outgoing.next_seals(1000)).pack()
    for kind, payload in ((Kind.SEAL, seals), (Kind.COMMIT, Commit(TOKENS).pack())):
        stream += FrameHeader(kind, peer.transfer, 1, len(payload), payload_crc32c=crc32c(payload)).pack() + payload
    peer.source.close()
    return stream


def pour(endpoint: Endpoint, data: bytes) -> None:
    """Send bytes, whatever they are, and hang up once the endpoint has nothing more to say."""
    transport = transport_for(endpoint.address)
    connection = transport.connect(endpoint.address, TransportOptions(), Deadline.after(WITHIN_S))
    try:
        connection.send([data], Deadline.after(WITHIN_S))
        while True:
            connection.receive([memoryview(bytearray(1))], Deadline.after(0.05))
    except KVStoreError:
        return
    finally:
        connection.close()


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_streams_do_no_harm(source: kvstore.Store, target: kvstore.Store, seed: int) -> None:
    generator = random.Random(seed)
    brisk = TransferSettings(resume_window_s=0.1, progress_deadline_s=1.0, connect_deadline_s=1.0)
    with Endpoint(target.pool, address("tcp"), settings=brisk) as endpoint:
        honest = honest_stream(endpoint, source)
        for round_number in range(25):
            data = bytearray(honest)
            choice = round_number % 5
            if choice == 0:
                data = bytearray(generator.randbytes(generator.randrange(1, 4000)))
            elif choice == 1:
                del data[generator.randrange(len(data)) :]
            elif choice == 2:
                for _ in range(generator.randint(1, 3)):
                    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            elif choice == 3:
                start = generator.randrange(len(data))
                del data[start : start + generator.randrange(1, 300)]
            else:
                start = generator.randrange(len(data))
                data[start:start] = generator.randbytes(generator.randrange(1, 300))
            pour(endpoint, bytes(data))
            # What became visible is whole and right, or nothing is.
            match = match_all(target, IDS)
            if match:
                assert_same(source, target, IDS, TOKENS, with_costs=False)
                target.pool.evict(target.prompt(IDS).path.keys[0])
        wait_until(lambda: endpoint.connection_count == 0, "every connection was closed")
        wait_until(lambda: endpoint.transfer_count == 0, "every transfer was given up")
        assert_settled(target)
        still_serves(endpoint, target)


def test_intact_frames_in_any_order_do_no_harm(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    """Valid frames, drawn at random: the machine of states is fuzzed, not the parsers."""
    generator = random.Random(8)
    for _ in range(25):
        with RawPeer(endpoint, source) as peer:
            try:
                peer.offer()
                for _ in range(generator.randint(1, 12)):
                    choice = generator.randrange(9)
                    if choice == 0:
                        peer.data(generator.choice([64, 2048, 1 << 20]))
                    elif choice == 1:
                        peer.expose()
                    elif choice == 2:
                        peer.send(Kind.SEAL, Seal(peer.outgoing.next_seals(3)).pack())
                    elif choice == 3:
                        peer.send(Kind.COMMIT, Commit(generator.choice([4, 32, TOKENS])).pack())
                    elif choice == 4:
                        peer.send(Kind.PING)
                    elif choice == 5:
                        peer.send(generator.choice([Kind.WANT, Kind.CREDIT, Kind.COMMITTED, Kind.PONG]))
                    elif choice == 6:
                        peer.send(Kind.ABORT, Abort(AbortCode.CANCELLED, "").pack())
                    elif choice == 7:
                        peer.send(Kind.QUERY, generator.randbytes(20))
                    else:
                        peer.all()
            except KVStoreError:
                continue
    if match := match_all(target, IDS):
        # This peer seals with a cost of its own.
        assert_same(source, target, IDS[: match.tokens], match.tokens, with_costs=False)
    wait_until(lambda: endpoint.transfer_count == 0, "every transfer was given up")
    assert_settled(target)
    still_serves(endpoint, target)


# Peers that die or stop


def test_a_killed_receiver_fails_the_transfer_in_time() -> None:
    generator = random.Random(1)
    spec, ids = tiny_spec(BIG_WIDTH), prompt(BIG_TOKENS)
    with kvstore.open(spec, dram="64MiB") as source, Sender(settings=FAST) as sender:
        store_prompt(source, ids)
        for _ in range(3):
            with child("receive") as receiver:
                handle = send_lease(
                    source.read(match_all(source, ids)),
                    receiver.line,
                    sender=sender,
                    transport=TransportOptions(pacing_bytes_per_s=8e6),
                )
                time.sleep(generator.uniform(0.0, 0.25))
                receiver.kill()
                begin = time.monotonic()
                try:
                    handle.result(WITHIN_S)
                except PeerGoneError:
                    assert time.monotonic() - begin < FAST.progress_deadline_s + 2.0
            assert source.statistics().quarantined_bytes == 0
        # No lease was lost: everything can go.
        assert source.pool.evict(source.prompt(ids).path.keys[0]) > 0
        assert_settled(source)


def test_a_killed_sender_leaves_nothing_behind() -> None:
    generator = random.Random(2)
    spec, ids = tiny_spec(BIG_WIDTH), prompt(BIG_TOKENS)
    with (
        kvstore.open(spec, dram="64MiB") as target,
        kvstore.open(spec, dram="64MiB") as reference,
        Endpoint(target.pool, "tcp://127.0.0.1:0", settings=FAST) as endpoint,
    ):
        store_prompt(reference, ids)
        for _ in range(3):
            with child("send", endpoint.address, "4e6") as sender:
                time.sleep(generator.uniform(0.0, 0.5))
                sender.kill()
                wait_until(lambda: endpoint.transfer_count == 0, "the transfer was given up")
            if match_all(target, ids):
                assert_same(reference, target, ids, BIG_TOKENS)
                target.pool.evict(target.prompt(ids).path.keys[0])
            assert_settled(target)
        assert endpoint.connection_count == 0


def test_a_stopped_receiver_is_noticed_within_the_deadline() -> None:
    spec, ids = tiny_spec(BIG_WIDTH), prompt(BIG_TOKENS)
    impatient = TransferSettings(progress_deadline_s=1.0)
    with (
        kvstore.open(spec, dram="64MiB") as source,
        Sender(settings=impatient) as sender,
        child("receive") as receiver,
        source.write(ids) as writer,
    ):
        # The producer has nothing to send, so only the keep-alive can tell.
        handle = kvstore.transfer.send_writer(writer, receiver.line, sender=sender)
        time.sleep(1.5)
        assert not handle.done()
        receiver.stop()
        begin = time.monotonic()
        with pytest.raises(PeerGoneError):
            handle.result(WITHIN_S)
        assert time.monotonic() - begin < 4.5, "the default of 5 s was in force"
    assert_settled(source)


def test_a_stopped_sender_is_noticed_within_the_deadline() -> None:
    spec = tiny_spec(BIG_WIDTH)
    impatient = TransferSettings(progress_deadline_s=0.5, resume_window_s=0.3)
    with (
        kvstore.open(spec, dram="64MiB") as target,
        Endpoint(target.pool, "tcp://127.0.0.1:0", settings=impatient) as endpoint,
        child("send", endpoint.address, "1e6") as sender,
    ):
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        sender.stop()
        begin = time.monotonic()
        wait_until(lambda: endpoint.transfer_count == 0, "it was noticed")
        assert time.monotonic() - begin < 6.0
        assert_settled(target)


def test_a_receiver_that_restarts_gets_everything_anew(source: kvstore.Store, sender: Sender) -> None:
    """Another process on the same port, with an empty pool, while the sender reconnects."""
    with kvstore.open(tiny_spec(), dram="8MiB") as first, kvstore.open(tiny_spec(), dram="8MiB") as second:
        old = Endpoint(first.pool, "tcp://127.0.0.1:0", settings=FAST)
        new: list[Endpoint] = []

        def wrap(connection: Connection, number: int) -> Connection:
            if number == 0:
                return CutConnection(connection, 5000)
            if not new:
                old._listener.close()
                new.append(Endpoint(second.pool, old.address, settings=FAST))
                connection.close()
            return connection

        try:
            report = send_over(sender, source, old, wrap)
            assert report.reconnects == 2
            assert_same(source, second, IDS, TOKENS)
            assert match_all(first, IDS).tokens == 0
        finally:
            old.close()
            for endpoint in new:
                endpoint.close()


def test_cancel_while_the_network_is_down(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    """The abort is delivered over a new connection, so the receiver need not wait for its resume window."""
    with Sender(settings=TransferSettings(progress_deadline_s=20.0)) as sender:
        is_down, is_sent = threading.Event(), threading.Event()

        class Unreachable(WrappedTransport):
            def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
                if is_down.is_set():
                    is_down.clear()
                    is_sent.wait(WITHIN_S)
                    handle.cancel("over")
                    raise PeerGoneError("the network is down")
                return super().connect(address, options, deadline)

        def wrap(connection: Connection, number: int) -> Connection:
            if number == 0:
                is_down.set()
                return CutConnection(connection, 1500)
            return connection

        network = Unreachable(endpoint.address, wrap)
        lease = source.read(match_all(source, IDS))
        handle = send_lease(lease, endpoint.address, sender=sender, find_transport=lambda _: network)
        is_sent.set()
        with pytest.raises(TransferAbortedError, match="over"):
            handle.result(WITHIN_S)
        assert endpoint.statistics().aborted == 1
        assert endpoint.transfer_count == 0
    assert_settled(source, target)
