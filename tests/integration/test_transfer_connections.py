"""Native transfers over sockets: one or several connections, cut, damaged and misused."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
import kvstore.transfer.attachment
import kvstore.transfer.path_watch
import kvstore.transfer.session
from kvstore._native import crc32c
from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import KVStoreError, PeerGoneError
from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX
from kvstore.registry import transport_for
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, LeaseSource, Sender, TransferSettings, send_lease
from kvstore.transfer.frames import FrameHeader, Kind, TransferId
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import PIECE_ROW, Abort, Commit, Hello, Lost, Seal, Want
from kvstore.transfer.offer import Offer, OfferFlag, offer_rows
from kvstore.transfer.outgoing import Outgoing
from tests.integration.tcp_proxy import CutAfter, FlipAt, Proxy
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    FAST,
    WITHIN_S,
    Recorder,
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
    from collections.abc import Iterator

    from kvstore.transfer import TransferReport

IDS = prompt(BIG_TOKENS)
SPEC = tiny_spec(BIG_WIDTH)
LOOPBACK = "tcp://127.0.0.1:0"
SOAK_ROUNDS = int(os.environ.get("KVSTORE_SOAK_ROUNDS", "0"))
"""The long form of the tests that kill: so many rounds of each."""
SMALL_CREDIT = TransferSettings(credit_bytes=256 << 10, progress_deadline_s=5.0, resume_window_s=2.0)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 2 MiB are many frames, and enough for further connections."""
    monkeypatch.setattr(kvstore.transfer.attachment, "FRAME_BYTES", 16 << 10)
    monkeypatch.setattr(kvstore.transfer.path_watch, "JOIN_BYTES_MIN", 1)


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        yield store


@pytest.fixture
def endpoint(target: kvstore.Store) -> Iterator[Endpoint]:
    with Endpoint(target.pool, LOOPBACK, settings=SMALL_CREDIT) as endpoint:
        yield endpoint


def sender_of(connections: int) -> Sender:
    return Sender(settings=TransferSettings(progress_deadline_s=5.0, connect_deadline_s=5.0, connections=connections))


def send(store: kvstore.Store, to: str, connections: int, **options: Any) -> TransferReport:
    with sender_of(connections) as sender:
        return send_lease(store.read(match_all(store, IDS)), to, sender=sender, **options).result(WITHIN_S)


@pytest.mark.parametrize("connections", [1, 2, 5])
def test_a_transfer_over_several_connections(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, connections: int
) -> None:
    with Proxy(endpoint.address, lambda _: bytes) as proxy:
        report = send(source, proxy.address, connections)
        # A branch that came too late found nothing to carry; it had connected all the same, or was told to end.
        assert 1 <= proxy.connection_count <= connections
    assert report.reconnects == 0
    total = sum(int(record.layout.piece_sizes.sum()) for record in source.read(match_all(source, IDS)).records)
    assert report.total_bytes == endpoint.statistics().received_bytes == total
    assert_same(source, target, IDS, BIG_TOKENS)
    assert_settled(source, target)


def test_further_connections_carry_their_share(source: kvstore.Store, target: kvstore.Store) -> None:
    """With a slow receiver everyone has the time to join."""
    carried: dict[int, int] = {}

    def count(number: int) -> Any:
        def forward(data: bytes) -> bytes:
            carried[number] = carried.get(number, 0) + len(data)
            return data

        return forward

    slow = Recorder(pause_s=0.002)
    with (
        Endpoint(target.pool, LOOPBACK, settings=SMALL_CREDIT, observer=slow) as endpoint,
        Proxy(endpoint.address, count) as proxy,
    ):
        report = send(source, proxy.address, 3)
        assert proxy.connection_count == 3
        wait_until(lambda: slow.received_bytes == report.total_bytes, "every piece was seen")
    assert all(size > 16 << 10 for size in carried.values()), carried
    assert_same(source, target, IDS, BIG_TOKENS)


def test_observers_see_every_piece_once(source: kvstore.Store, endpoint: Endpoint) -> None:
    seen = Recorder()
    report = send(source, endpoint.address, 3, observer=seen)
    assert seen.sent_bytes == report.total_bytes


@pytest.mark.parametrize("cut_after_bytes", [64 + 20, 300, 40_000, 150_000])
def test_a_further_connection_that_breaks_costs_nothing_else(
    source: kvstore.Store, target: kvstore.Store, cut_after_bytes: int
) -> None:
    slow = Recorder(pause_s=0.001)
    with (
        Endpoint(target.pool, LOOPBACK, settings=SMALL_CREDIT, observer=slow) as endpoint,
        Proxy(endpoint.address, lambda n: CutAfter(cut_after_bytes) if n else bytes) as proxy,
    ):
        report = send(source, proxy.address, 3)
        assert report.reconnects == 0
        assert endpoint.statistics().resumed == 0
        assert_same(source, target, IDS, BIG_TOKENS)
        wait_until(lambda: endpoint.connection_count == 0, "all connections have ended")
    assert_settled(source, target)


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize("cut_after_bytes", [50_000, 400_000])
def test_a_first_connection_that_breaks_is_resumed(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, connections: int, cut_after_bytes: int
) -> None:
    """The first connection of all is cut; with it end those that had joined, and all is begun anew."""
    cut = CutAfter(cut_after_bytes)
    with Proxy(endpoint.address, lambda n: bytes if n else cut) as proxy:
        report = send(source, proxy.address, connections)
    assert report.reconnects <= 1
    if connections == 1:
        assert report.reconnects == endpoint.statistics().resumed == 1
    assert_same(source, target, IDS, BIG_TOKENS)
    assert_settled(source, target)


@pytest.mark.parametrize("seed", range(4))
def test_bits_flip_anywhere(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, seed: int) -> None:
    generator = random.Random(seed)

    def forward(number: int) -> Any:
        return FlipAt(generator.randrange(400, 500_000)) if number < 4 else bytes

    with Proxy(endpoint.address, forward) as proxy:
        try:
            send(source, proxy.address, 2)
        except KVStoreError:
            # An OFFER or a SEAL was hit again and again.
            assert not match_all(target, IDS).tokens
        else:
            assert_same(source, target, IDS, BIG_TOKENS)
    assert_settled(source, target)


def test_a_receiver_that_takes_no_further_connections(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hello_of_old(*arguments: Any, **_: Any) -> Hello:
        return make_hello(*arguments)

    monkeypatch.setattr(kvstore.transfer.session, "make_hello", hello_of_old)
    with Proxy(endpoint.address, lambda _: bytes) as proxy:
        send(source, proxy.address, 4)
        assert proxy.connection_count == 1
    assert_same(source, target, IDS, BIG_TOKENS)


def test_a_paced_transfer_keeps_to_one_connection(source: kvstore.Store, endpoint: Endpoint) -> None:
    with Proxy(endpoint.address, lambda _: bytes) as proxy:
        send(source, proxy.address, 4, transport=TransportOptions(pacing_bytes_per_s=5e7))
        assert proxy.connection_count == 1


def test_the_number_of_connections_is_limited() -> None:
    with pytest.raises(ValueError, match="connections=65"):
        TransferSettings(connections=CONNECTIONS_PER_TRANSFER_MAX + 1)


# A sender made by hand


class Hand:
    """The first connection of a transfer, and others that join it."""

    def __init__(self, store: kvstore.Store, endpoint: Endpoint) -> None:
        self.store, self.endpoint = store, endpoint
        self.source = LeaseSource(store.read(match_all(store, IDS)))
        self.transfer = TransferId(random.getrandbits(60) + 1, 1)
        self.outgoing = Outgoing(self.source)
        self.outgoing.records_complete(0, np.ones(len(self.source.records), np.uint64))
        self.links: list[FrameLink] = []
        self.first, _ = self.greet(TransferId(0, 0), 0)
        rows, grids = offer_rows(self.source.table)
        offer = Offer(
            self.source.path, b"", (BIG_TOKENS,), grids, rows, self.source.total_bytes, 60_000, 128, OfferFlag.COMPLETE
        )
        self.first.send(Kind.OFFER, self.transfer, payload=offer.pack())
        header, payload = self.receive()
        assert header.kind is Kind.WANT
        self.generation = header.generation
        self.outgoing.want(Want.parse(payload).ranges, granted_bytes=1 << 40, is_again=False)

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        for link in self.links:
            link.close()
        self.source.close()

    def greet(self, transfer: TransferId, generation: int) -> tuple[FrameLink, int]:
        """A connection after HELLO, and the number that it got."""
        connection = transport_for(self.endpoint.address).connect(
            self.endpoint.address, TransportOptions(), Deadline.after(WITHIN_S)
        )
        link = FrameLink(connection, 5.0)
        self.links.append(link)
        hello = make_hello(self.store.spec, self.transfer.epoch, FAST, connection, can_join=True)
        link.send(Kind.HELLO, transfer, generation, hello.pack())
        header = link.receive_header(Deadline.after(WITHIN_S))
        link.receive_payload(header)
        assert (header.kind, header.transfer) == (Kind.HELLO, transfer)
        return link, header.generation

    def join(self) -> tuple[FrameLink, int]:
        return self.greet(self.transfer, self.generation)

    def frame(self, bytes_max: int = 8192) -> bytes:
        frame = self.outgoing.next_frame(self.transfer, self.generation, bytes_max, is_remote=False)
        if frame is None:
            return b""
        self.outgoing.sent(frame)
        return frame.header.pack() + b"".join(bytes(view) for view in frame.payload)

    def send_rest(self, link: FrameLink) -> None:
        while frame := self.frame():
            raw(link, frame)
        while len(seals := self.outgoing.next_seals(100)):
            self.first.send(Kind.SEAL, self.transfer, self.generation, Seal(seals).pack())

    def commit(self) -> None:
        self.first.send(Kind.COMMIT, self.transfer, self.generation, Commit(BIG_TOKENS).pack())

    def receive(self) -> tuple[FrameHeader, memoryview]:
        """The next frame on the first connection that is not CREDIT."""
        while True:
            header = self.first.receive_header(Deadline.after(WITHIN_S))
            payload = self.first.receive_payload(header)
            if header.kind is not Kind.CREDIT:
                return header, payload


def raw(link: FrameLink, data: bytes) -> None:
    assert link.native is not None
    link.native.send([data])


@pytest.fixture
def roomy(target: kvstore.Store) -> Iterator[Endpoint]:
    """Without a limit on what is in flight, so that tests need not wait for credit."""
    with Endpoint(target.pool, LOOPBACK, settings=TransferSettings(progress_deadline_s=2.0)) as endpoint:
        yield endpoint


def test_commit_may_overtake_pieces(source: kvstore.Store, target: kvstore.Store, roomy: Endpoint) -> None:
    with Hand(source, roomy) as hand:
        second, number = hand.join()
        assert number == 1
        late = [hand.frame(), hand.frame()]
        hand.send_rest(hand.first)
        hand.commit()
        wait_until(lambda: roomy.transfer_count == 1, "it waits")
        for frame in late:
            raw(second, frame)
        assert hand.receive()[0].kind is Kind.COMMITTED
    assert match_all(target, IDS).tokens == BIG_TOKENS
    wait_until(lambda: roomy.connection_count == 0, "the connections have ended")
    assert_settled(target)


def test_what_a_further_connection_did_not_deliver_is_named(
    source: kvstore.Store, target: kvstore.Store, roomy: Endpoint
) -> None:
    with Hand(source, roomy) as hand:
        second, number = hand.join()
        frames = [hand.frame() for _ in range(3)]
        raw(second, frames[0] + frames[1] + frames[2][:-100])
        second.close()
        header, payload = hand.receive()
        assert (header.kind, Lost.parse(payload)) == (Kind.LOST, Lost(number, 2))
        raw(hand.first, frames[2])
        hand.send_rest(hand.first)
        hand.commit()
        assert hand.receive()[0].kind is Kind.COMMITTED
    assert match_all(target, IDS).tokens == BIG_TOKENS


def test_a_silent_further_connection_is_given_up(source: kvstore.Store, target: kvstore.Store, roomy: Endpoint) -> None:
    with Hand(source, roomy) as hand:
        _, number = hand.join()
        wait_until(lambda: ping(hand) or roomy.connection_count == 1, "the silent connection was closed")
        while (answer := hand.receive())[0].kind is Kind.PONG:
            continue
        assert (answer[0].kind, Lost.parse(answer[1])) == (Kind.LOST, Lost(number, 0))


def ping(hand: Hand) -> bool:
    hand.first.send(Kind.PING, hand.transfer, hand.generation)
    time.sleep(0.1)
    return False


def test_only_attached_transfers_can_be_joined(source: kvstore.Store, target: kvstore.Store, roomy: Endpoint) -> None:
    with Hand(source, roomy) as hand:
        assert hand.greet(TransferId(hand.transfer.epoch, 77), hand.generation)[1] == 0
        assert hand.greet(hand.transfer, hand.generation + 1)[1] == 0
        assert [hand.join()[1] for _ in range(CONNECTIONS_PER_TRANSFER_MAX)] == [
            *range(1, CONNECTIONS_PER_TRANSFER_MAX),
            0,
        ]
        # Another node cannot join what is not its own.
        stranger = Hand(source, roomy)
        with stranger:
            assert stranger.greet(hand.transfer, hand.generation)[1] == 0


@pytest.mark.parametrize("what", ["control", "late", "twice", "unknown", "damaged table", "damaged header"])
def test_rules_broken_on_a_further_connection(
    source: kvstore.Store, target: kvstore.Store, roomy: Endpoint, what: str
) -> None:
    with Hand(source, roomy) as hand:
        second, number = hand.join()
        frame = bytearray(hand.frame())
        if what == "control":
            second.send(Kind.COMMIT, hand.transfer, hand.generation, Commit(BIG_TOKENS).pack())
        elif what == "late":
            hand.generation -= 1
            raw(second, hand.frame())
            hand.generation += 1
        elif what == "twice":
            raw(second, bytes(frame * 2))
        elif what == "unknown":
            table = np.array([(9999, 0, 10, 0)], PIECE_ROW).tobytes()
            header = FrameHeader(Kind.DATA, hand.transfer, hand.generation, len(table) + 10, 1, crc32c(table))
            raw(second, header.pack() + table + bytes(10))
        else:
            frame[70 if what == "damaged table" else 9] ^= 1
            raw(second, bytes(frame))
        header, payload = hand.receive()
        if what in ("twice", "unknown"):
            assert header.kind is Kind.ABORT
            assert "DATA" in Abort.parse(payload).reason
        else:
            assert (header.kind, Lost.parse(payload)) == (Kind.LOST, Lost(number, 0))
    wait_until(lambda: roomy.connection_count == 0, "the connections have ended")
    wait_until(lambda: match_all(target, IDS).tokens == 0, "nothing is visible")
    # What was not aborted is given up by the resume window; closing does that at once.
    roomy.close()
    assert_settled(target)


# Peers that die or stop while native code is at work


def test_a_receiver_stopped_in_mid_stream_is_noticed(source: kvstore.Store) -> None:
    impatient = TransferSettings(progress_deadline_s=0.5, connections=2)
    with Sender(settings=impatient) as sender, child("receive") as receiver:
        seen = Recorder()
        seen.piece_sent = lambda *_: time.sleep(0.005)  # type: ignore[method-assign]
        handle = send_lease(source.read(match_all(source, IDS)), receiver.line, sender=sender, observer=seen)
        time.sleep(0.05)
        receiver.stop()
        try:
            begin = time.monotonic()
            with pytest.raises(PeerGoneError):
                handle.result(WITHIN_S)
            assert time.monotonic() - begin < 5.0
        finally:
            receiver.process.send_signal(signal.SIGCONT)
    assert_settled(source)


def test_senders_killed_at_random_points(target: kvstore.Store, source: kvstore.Store) -> None:
    """What is visible afterwards is whole and bit for bit the same, and every byte of the budget is accounted for."""
    generator = random.Random(7)
    settings = TransferSettings(progress_deadline_s=2.0, resume_window_s=0.2, credit_bytes=256 << 10)
    with Endpoint(target.pool, LOOPBACK, settings=settings) as endpoint:
        for _ in range(SOAK_ROUNDS or 3):
            with child("send", endpoint.address, "0") as peer:
                time.sleep(generator.uniform(0.0, 0.03))
                peer.kill()
                wait_until(lambda: endpoint.transfer_count == 0, "the transfer has ended")
            wait_until(lambda: endpoint.connection_count == 0, "the connections have ended")
            if match_all(target, IDS):
                assert_same(source, target, IDS, BIG_TOKENS)
                target.pool.evict(target.prompt(IDS).path.keys[0])
            assert_settled(target)


def test_receivers_killed_at_random_points(source: kvstore.Store) -> None:
    generator = random.Random(8)
    with sender_of(2) as sender:
        for _ in range(SOAK_ROUNDS or 3):
            with child("receive") as receiver:
                handle = send_lease(source.read(match_all(source, IDS)), receiver.line, sender=sender)
                time.sleep(generator.uniform(0.0, 0.02))
                receiver.kill()
                with contextlib.suppress(PeerGoneError):
                    handle.result(WITHIN_S)
            assert_settled(source)
        # No lease was lost: everything can go.
        assert source.pool.evict(source.prompt(IDS).path.keys[0]) > 0


@pytest.mark.parametrize("connections", [1, 3])
def test_two_nodes_with_full_stores_that_send_to_each_other_both_end(connections: int) -> None:
    """Each holds a prompt that fills it, and both send at once: success or FULL, never a wait for each other."""
    ids = [prompt(BIG_TOKENS, seed=seed) for seed in (1, 2)]
    settings = TransferSettings(queue_deadline_s=0.3, connections=connections)
    with (
        kvstore.open(SPEC, dram="5MiB") as left,
        kvstore.open(SPEC, dram="5MiB") as right,
        Endpoint(left.pool, LOOPBACK, settings=settings) as to_left,
        Endpoint(right.pool, LOOPBACK, settings=settings) as to_right,
        Sender(settings=settings) as sender,
    ):
        store_prompt(left, ids[0], seed=1)
        store_prompt(right, ids[1], seed=2)
        leases = left.read(match_all(left, ids[0])), right.read(match_all(right, ids[1]))
        handles = [
            send_lease(lease, to.address, sender=sender) for lease, to in zip(leases, (to_right, to_left), strict=True)
        ]
        outcomes = []
        for handle in handles:
            try:
                handle.result(WITHIN_S)
                outcomes.append("sent")
            except kvstore.errors.TransferFullError:
                outcomes.append("full")
        # What was sent is whole; what did not fit has left no trace.
        for outcome, store, sent in zip(outcomes, (right, left), ids, strict=True):
            assert match_all(store, sent).tokens in ((0, BIG_TOKENS) if outcome == "sent" else (0,))
        assert_settled(left, right)
