"""Connections that serve one transfer after another."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
import kvstore.transfer.attachment
import kvstore.transfer.path_watch
import kvstore.transfer.session
from kvstore.abc import TransportOptions
from kvstore.errors import PeerGoneError, TransferAbortedError
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.messages import Feature, Hello
from tests.integration.tcp_proxy import CutAfter, Proxy
from tests.integration.transfer_nodes import (
    BIG_WIDTH,
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

SPEC = tiny_spec(BIG_WIDTH)
TOKENS = 64
PROMPTS = [prompt(TOKENS, seed=seed) for seed in range(6)]
LOOPBACK = "tcp://127.0.0.1:0"
PATIENT = TransferSettings(progress_deadline_s=60.0, credit_bytes=256 << 10)
"""Idle connections are kept for a quarter of the no-progress deadline: long enough for a test that is held up."""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that little is many frames, and enough for further connections."""
    monkeypatch.setattr(kvstore.transfer.attachment, "FRAME_BYTES", 16 << 10)
    monkeypatch.setattr(kvstore.transfer.path_watch, "JOIN_BYTES_MIN", 1)


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="64MiB") as store:
        for seed, ids in enumerate(PROMPTS):
            store_prompt(store, ids, seed=seed)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="64MiB") as store:
        yield store


@pytest.fixture
def endpoint(target: kvstore.Store) -> Iterator[Endpoint]:
    # A slow receiver gives everyone the time to join.
    with Endpoint(target.pool, LOOPBACK, settings=PATIENT, observer=Recorder(pause_s=0.001)) as endpoint:
        yield endpoint


def sender_of(connections: int) -> Sender:
    return Sender(settings=TransferSettings(progress_deadline_s=60.0, connections=connections))


def send(sender: Sender, store: kvstore.Store, number: int, to: str, **options: Any) -> TransferReport:
    lease = store.read(match_all(store, PROMPTS[number]))
    return send_lease(lease, to, sender=sender, **options).result(WITHIN_S)


def assert_all_there(source: kvstore.Store, target: kvstore.Store, count: int) -> None:
    for number in range(count):
        assert_same(source, target, PROMPTS[number], TOKENS)
    assert_settled(source, target)


@pytest.mark.parametrize("connections", [1, 3])
def test_transfers_in_turn_share_their_connections(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, connections: int
) -> None:
    with Proxy(endpoint.address, lambda _: bytes) as proxy, sender_of(connections) as sender:
        for number in range(len(PROMPTS)):
            report = send(sender, source, number, proxy.address)
            assert report.reconnects == 0
            assert report.is_native
        # A branch that had not joined when everything was sent is not kept; the first connection always is.
        assert proxy.connection_count < connections * len(PROMPTS)
        if connections == 1:
            assert proxy.connection_count == 1
    assert_all_there(source, target, len(PROMPTS))


def test_further_connections_carry_their_share_again(source: kvstore.Store, target: kvstore.Store) -> None:
    carried: dict[int, int] = {}

    def count(number: int) -> Any:
        def forward(data: bytes) -> bytes:
            carried[number] = carried.get(number, 0) + len(data)
            return data

        return forward

    slow = Recorder(pause_s=0.003)
    with (
        Endpoint(target.pool, LOOPBACK, settings=PATIENT, observer=slow) as endpoint,
        Proxy(endpoint.address, count) as proxy,
        sender_of(2) as sender,
    ):
        rounds = []
        for number in range(len(PROMPTS)):
            before = dict(carried)
            send(sender, source, number, proxy.address)
            # On a busy machine the first connection may be done before another one has joined.
            rounds.append([carried[each] - before[each] for each in before if each])
    assert any(size > 16 << 10 for sizes in rounds for size in sizes), rounds
    assert_all_there(source, target, len(PROMPTS))


def test_transfers_at_once_have_connections_of_their_own(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with Proxy(endpoint.address, lambda _: bytes) as proxy, sender_of(1) as sender:
        for _ in range(2):
            leases = [source.read(match_all(source, ids)) for ids in PROMPTS]
            handles = [send_lease(lease, proxy.address, sender=sender) for lease in leases]
            for handle in handles:
                handle.result(WITHIN_S)
        assert proxy.connection_count <= len(PROMPTS)
    assert_all_there(source, target, len(PROMPTS))


def test_other_options_and_other_senders_have_other_connections(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with Proxy(endpoint.address, lambda _: bytes) as proxy, sender_of(1) as sender, sender_of(1) as other:
        send(sender, source, 0, proxy.address)
        send(sender, source, 1, proxy.address, transport=TransportOptions(pacing_bytes_per_s=1e9))
        send(other, source, 2, proxy.address)
        assert proxy.connection_count == 3
        send(sender, source, 3, proxy.address)
        assert proxy.connection_count == 3
    assert_all_there(source, target, 4)


def test_a_receiver_that_was_replaced_meanwhile(source: kvstore.Store, target: kvstore.Store) -> None:
    """Its connections are dead; the next transfer does not fail of that."""
    with sender_of(2) as sender:
        with Endpoint(target.pool, LOOPBACK, settings=PATIENT) as first:
            address = first.address
            send(sender, source, 0, address)
        with Endpoint(target.pool, address, settings=PATIENT):
            assert send(sender, source, 1, address).reconnects == 0
    assert_all_there(source, target, 2)


@pytest.mark.parametrize("connections", [1, 2])
def test_a_reused_connection_that_turns_out_dead_is_replaced(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, connections: int
) -> None:
    """The first one breaks as soon as the second transfer uses it."""
    lock = threading.Lock()
    is_cut = False

    def forward(number: int) -> Any:
        def pass_on(data: bytes) -> bytes | None:
            with lock:
                return None if is_cut and number < connections else data

        return pass_on

    with Proxy(endpoint.address, forward) as proxy, sender_of(connections) as sender:
        send(sender, source, 0, proxy.address)
        with lock:
            is_cut = True
        report = send(sender, source, 1, proxy.address)
        assert proxy.connection_count > connections
    assert report.reconnects == 0
    assert_all_there(source, target, 2)


def test_a_reused_connection_that_breaks_later_is_resumed(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    total = sum(int(record.layout.piece_sizes.sum()) for record in source.read(match_all(source, PROMPTS[0])).records)
    cut = CutAfter(total * 3 // 2)
    with Proxy(endpoint.address, lambda n: bytes if n else cut) as proxy, sender_of(1) as sender:
        send(sender, source, 0, proxy.address)
        report = send(sender, source, 1, proxy.address)
        assert proxy.connection_count == 2
    assert report.reconnects == endpoint.statistics().resumed == 1
    assert_all_there(source, target, 2)


def test_nothing_is_reused_after_a_cancel(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    seen = Recorder(pause_s=0.005)
    with Proxy(endpoint.address, lambda _: bytes) as proxy, sender_of(2) as sender:
        handle = send_lease(source.read(match_all(source, PROMPTS[0])), proxy.address, sender=sender, observer=seen)
        wait_until(lambda: seen.sent_bytes > 0, "it is under way")
        handle.cancel()
        with pytest.raises(TransferAbortedError):
            handle.result(WITHIN_S)
        before = proxy.connection_count
        send(sender, source, 0, proxy.address)
        assert proxy.connection_count > before
    assert_all_there(source, target, 1)


def test_a_receiver_whose_further_connections_end_with_their_attachment(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without REJOIN: only the first connection is kept."""

    def hello_of_old(*arguments: Any, **options: Any) -> Hello:
        hello = make_hello(*arguments, **options)
        return Hello(**{**vars(hello), "features": hello.features & ~Feature.REJOIN})

    monkeypatch.setattr(kvstore.transfer.session, "make_hello", hello_of_old)
    with Proxy(endpoint.address, lambda _: bytes) as proxy, sender_of(2) as sender:
        for number in range(3):
            send(sender, source, number, proxy.address)
        assert 1 <= proxy.connection_count <= 4
        wait_until(lambda: endpoint.connection_count == 1, "further connections have ended")
    assert_all_there(source, target, 3)


def test_a_receiver_that_died_meanwhile_is_named(source: kvstore.Store) -> None:
    with sender_of(1) as sender, child("receive") as receiver:
        send_lease(source.read(match_all(source, PROMPTS[0])), receiver.line, sender=sender).result(WITHIN_S)
        receiver.kill()
        with pytest.raises(PeerGoneError):
            send(sender, source, 1, receiver.line)
    assert_settled(source)


def test_idle_connections_end_with_the_sender(source: kvstore.Store, endpoint: Endpoint) -> None:
    with sender_of(2) as sender:
        send(sender, source, 0, endpoint.address)
        assert endpoint.connection_count >= 1
    wait_until(lambda: endpoint.connection_count == 0, "the connections have ended")
