"""What a receiver decides: whose offer gets space first, what is under way, and what it gives up."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
import kvstore.transfer.attachment
import kvstore.transfer.path_watch
from kvstore.errors import TransferAbortedError
from kvstore.events import Stored
from kvstore.keys import prefix_keys, root_key
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import (
    Endpoint,
    Sender,
    TransferId,
    TransferSettings,
    TransferState,
    send_lease,
    send_writer,
)
from kvstore.transfer.frames import Kind
from kvstore.transfer.messages import Abort, AbortCode
from tests.integration.slow_link import SlowLink
from tests.integration.tcp_proxy import CutAfter, Proxy
from tests.integration.test_transfer_faults import IDS, RawPeer
from tests.integration.transfer_nodes import (
    BIG_WIDTH,
    FAST,
    WITHIN_S,
    address,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    put_layer,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.events import EventStream
    from kvstore.handle import Handle
    from kvstore.transfer import IncomingStatus, TransferReport

LOOPBACK = "tcp://127.0.0.1:0"
PATIENT = TransferSettings(progress_deadline_s=WITHIN_S, queue_deadline_s=WITHIN_S / 3)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


@pytest.fixture
def sender() -> Iterator[Sender]:
    with Sender(settings=PATIENT) as sender:
        yield sender


def send(store: kvstore.Store, ids: list[int], to: str, sender: Sender, **options: Any) -> Handle[TransferReport]:
    return send_lease(store.read(match_all(store, ids)), to, sender=sender, **options)


def is_waiting(endpoint: Endpoint, priority: int) -> bool:
    return any(
        (found.priority, found.state) == (priority, TransferState.WAITING_FOR_SPACE) for found in endpoint.transfers()
    )


def commit_order(stream: EventStream, *prompts: list[int]) -> list[int]:
    """Numbers of the prompts in the order in which the store of the stream committed their first blocks.

    Asked of the receiver: when a sender hears of a commit depends on when its thread runs.
    """
    first_keys = [prefix_keys(root_key(tiny_spec().fingerprint), ids, tiny_spec().block_tokens)[0] for ids in prompts]
    order: list[int] = []
    for event in stream.each(deadline_s=WITHIN_S):
        if isinstance(event, Stored):
            order += [number for number, key in enumerate(first_keys) if key in event.keys]
        if len(order) == len(prompts):
            return order
    raise AssertionError(f"only {order} of the prompts were committed")


def only(endpoint: Endpoint) -> IncomingStatus:
    wait_until(lambda: len(endpoint.transfers()) == 1, "a transfer was there")
    return endpoint.transfers()[0]


# Whose offer gets space


def test_the_urgent_offer_that_came_later_gets_the_space_first(
    source: kvstore.Store, scheme: str, sender: Sender
) -> None:
    held, low, urgent = (prompt(20, seed=seed) for seed in (1, 2, 3))
    for seed, ids in ((2, low), (3, urgent)):
        store_prompt(source, ids, seed=seed)
    with (
        kvstore.open(tiny_spec(), dram="112KiB") as target,
        Endpoint(target.pool, address(scheme), settings=PATIENT) as endpoint,
    ):
        store_prompt(target, held, seed=1)
        stream = target.events()
        with target.read(match_all(target, held)):
            first = send(source, low, endpoint.address, sender, priority=200)
            wait_until(lambda: is_waiting(endpoint, 200), "the first offer waits")
            second = send(source, urgent, endpoint.address, sender, priority=0)
            wait_until(lambda: is_waiting(endpoint, 0), "the urgent offer waits")
            assert first.progress().state == TransferState.WAITING_FOR_SPACE
        # There is space for one of them only; the other one takes it over once that is there.
        second.result(WITHIN_S)
        first.result(WITHIN_S)
        assert commit_order(stream, low, urgent) == [1, 0]
        assert_same(source, target, low, len(low))
        assert_settled(target)


def test_a_nodes_last_place_goes_to_the_most_urgent(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender
) -> None:
    low, urgent = prompt(8, seed=2), prompt(8, seed=3)
    store_prompt(source, low, seed=2)
    store_prompt(source, urgent, seed=3)
    one = TransferSettings(
        progress_deadline_s=WITHIN_S, queue_deadline_s=WITHIN_S / 3, transfers_per_node_max=1, transfers_per_peer_max=1
    )
    stream = target.events()
    with Endpoint(target.pool, address(scheme), settings=one) as endpoint, ExitStack() as senders:
        peers = [senders.enter_context(Sender(settings=PATIENT)) for _ in range(2)]
        with source.write(prompt(8, seed=1)) as writer:
            running = send_writer(writer, endpoint.address, sender=sender)
            wait_until(lambda: endpoint.transfer_count == 1, "the only place was taken")
            first = send(source, low, endpoint.address, peers[0], priority=200)
            wait_until(lambda: is_waiting(endpoint, 200), "the first offer waits")
            second = send(source, urgent, endpoint.address, peers[1], priority=0)
            wait_until(lambda: is_waiting(endpoint, 0), "the urgent offer waits")
        with pytest.raises(TransferAbortedError):
            running.result(WITHIN_S)
        second.result(WITHIN_S)
        first.result(WITHIN_S)
        assert commit_order(stream, low, urgent) == [1, 0]
    assert_settled(source, target)


# Cancelled by the receiver


def test_what_arrives_can_be_seen_and_cancelled(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender
) -> None:
    with Endpoint(target.pool, address(scheme), settings=PATIENT) as endpoint:
        with source.write(IDS) as writer:
            handle = send_writer(writer, endpoint.address, sender=sender, priority=3)
            put_layer(writer, 1, 0, 16, [], 0, kvstore.spec.Shard())
            wait_until(lambda: only(endpoint).received_bytes > 0, "pieces arrived")
            (snapshot,) = endpoint.transfers()
            assert (snapshot.priority, snapshot.state, snapshot.tokens) == (3, TransferState.MOVING, len(IDS))
            (sent,) = sender.transfers()
            assert (sent.transfer, sent.total_bytes) == (snapshot.transfer, snapshot.expected_bytes)
            assert 0 < snapshot.received_bytes < snapshot.expected_bytes
            assert endpoint.cancel(snapshot.transfer, "the operator wants the memory")
            with pytest.raises(TransferAbortedError, match=r"CANCELLED.*the operator wants the memory"):
                handle.result(WITHIN_S)
            assert handle.progress().state == "failed"
            assert endpoint.transfers() == ()
            assert not endpoint.cancel(snapshot.transfer)
            assert_settled(target)
        store_prompt(source, IDS)
        send(source, IDS, endpoint.address, sender).result(WITHIN_S)
    assert_same(source, target, IDS, len(IDS))
    assert_settled(source, target)


def test_nothing_is_cancelled_that_is_not_there(target: kvstore.Store) -> None:
    with Endpoint(target.pool, LOOPBACK) as endpoint:
        assert not endpoint.cancel(TransferId(1, 1))
        assert endpoint.transfers() == ()


def test_a_waiting_offer_can_be_cancelled(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids, held = prompt(20, seed=1), prompt(20, seed=2)
    store_prompt(source, ids, seed=1)
    with (
        kvstore.open(tiny_spec(), dram="112KiB") as target,
        Endpoint(target.pool, address(scheme), settings=PATIENT) as endpoint,
    ):
        store_prompt(target, held, seed=2)
        with target.read(match_all(target, held)):
            handle = send(source, ids, endpoint.address, sender)
            assert only(endpoint).state is TransferState.WAITING_FOR_SPACE
            assert endpoint.cancel(only(endpoint).transfer, "not for this node")
            with pytest.raises(TransferAbortedError, match="not for this node"):
                handle.result(WITHIN_S)
            wait_until(lambda: endpoint.transfers() == (), "the line is empty")
        send(source, ids, endpoint.address, sender).result(WITHIN_S)
        assert_same(source, target, ids, len(ids))
        assert_settled(target)


def test_a_cancelled_transfer_is_refused_from_then_on(
    source: kvstore.Store, target: kvstore.Store, scheme: str
) -> None:
    store_prompt(source, IDS)
    with Endpoint(target.pool, address(scheme), settings=FAST) as endpoint, RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.data(64)
        assert endpoint.cancel(peer.transfer, "enough")
        assert peer.ending() == (Kind.ABORT, "enough")
        peer.send(Kind.ABORTED)
        with peer.again() as again:
            header, payload = again.offer_raw()
            assert (header.kind, Abort.parse(payload)) == (Kind.ABORT, Abort(AbortCode.CANCELLED, "enough"))
        assert_settled(target)


def test_a_detached_transfer_can_be_cancelled(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    store_prompt(source, IDS)
    with Endpoint(target.pool, address(scheme), settings=PATIENT) as endpoint, RawPeer(endpoint, source) as peer:
        peer.offer()
        peer.close()
        wait_until(lambda: only(endpoint).state is TransferState.DETACHED, "the break was noticed")
        assert endpoint.cancel(peer.transfer, "nobody came back")
        assert endpoint.transfers() == ()
        assert_settled(target)
        with peer.again() as again:
            header, payload = again.offer_raw()
            assert (header.kind, Abort.parse(payload).reason) == (Kind.ABORT, "nobody came back")


BIG_SPEC = tiny_spec(BIG_WIDTH)
BIG = prompt(256, seed=5)


@pytest.fixture
def big_source() -> Iterator[kvstore.Store]:
    with kvstore.open(BIG_SPEC, dram="32MiB") as store:
        store_prompt(store, BIG, seed=5)
        yield store


@pytest.fixture
def small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 2 MiB are many frames, and enough for further connections."""
    monkeypatch.setattr(kvstore.transfer.attachment, "FRAME_BYTES", 16 << 10)
    monkeypatch.setattr(kvstore.transfer.path_watch, "JOIN_BYTES_MIN", 1)


@pytest.mark.usefixtures("small_frames")
def test_cancel_while_several_connections_carry_pieces(big_source: kvstore.Store) -> None:
    settings = TransferSettings(credit_bytes=512 << 10, connections=3, progress_deadline_s=WITHIN_S)
    with (
        kvstore.open(BIG_SPEC, dram="32MiB") as target,
        Endpoint(target.pool, LOOPBACK, settings=settings) as endpoint,
        SlowLink(endpoint.address, 4 << 20) as link,
        Sender(settings=settings) as sender,
    ):
        handle = send(big_source, BIG, link.address, sender)
        wait_until(lambda: len({part.connection for part in link.passed if part.size_bytes > 4096}) == 3, "all carry")
        assert endpoint.cancel(only(endpoint).transfer, "enough of it")
        with pytest.raises(TransferAbortedError, match="enough of it"):
            handle.result(WITHIN_S)
        wait_until(lambda: endpoint.connection_count == 0, "every connection has ended")
        assert_settled(big_source, target)
        assert match_all(target, BIG).tokens == 0


@pytest.mark.usefixtures("small_frames")
@pytest.mark.parametrize("seed", range(3))
def test_cancel_at_any_time_leaves_all_or_nothing(big_source: kvstore.Store, seed: int) -> None:
    """From offers to commits: what was cancelled is not there, and what is there was not cancelled."""
    generator = random.Random(seed)
    outcomes = set()
    for _ in range(8):
        settings = TransferSettings(connections=generator.choice([1, 3]), progress_deadline_s=WITHIN_S)
        with (
            kvstore.open(BIG_SPEC, dram="32MiB") as target,
            Endpoint(target.pool, LOOPBACK, settings=settings) as endpoint,
            Sender(settings=settings) as sender,
        ):
            handle = send(big_source, BIG, endpoint.address, sender)
            transfer = TransferId(sender.boot_epoch, 1)
            wait_until(lambda: handle.done() or bool(endpoint.transfers()), "the offer came")  # noqa: B023
            time.sleep(generator.choice([0.0, 0.0, 0.002, 0.005, 0.02]))
            is_cancelled = endpoint.cancel(transfer, "at any time")
            try:
                handle.result(WITHIN_S)
                is_committed = True
            except TransferAbortedError:
                is_committed = False
            assert is_cancelled != is_committed
            assert match_all(target, BIG).tokens == (len(BIG) if is_committed else 0)
            assert_settled(target)
        outcomes.add(is_cancelled)
    assert_settled(big_source)
    assert outcomes


# Resumed


@pytest.mark.usefixtures("small_frames")
def test_a_transfer_of_several_connections_resumes_with_what_is_missing(big_source: kvstore.Store) -> None:
    """Counted on the wire, over all connections: once everything, and what was in flight when they broke."""
    credit_bytes = 256 << 10
    settings = TransferSettings(credit_bytes=credit_bytes, connections=3, progress_deadline_s=10.0)
    carried: dict[int, int] = {}

    def forward(number: int) -> Any:
        cut = CutAfter(200_000) if number == 0 else bytes

        def count(data: bytes) -> bytes | None:
            passed = cut(data)
            carried[number] = carried.get(number, 0) + len(passed or b"")
            return passed

        return count

    with (
        kvstore.open(BIG_SPEC, dram="32MiB") as target,
        Endpoint(target.pool, LOOPBACK, settings=settings) as endpoint,
        Proxy(endpoint.address, forward) as proxy,
        Sender(settings=settings) as sender,
    ):
        report = send(big_source, BIG, proxy.address, sender).result(WITHIN_S)
        assert report.reconnects == endpoint.statistics().resumed == 1
        assert_same(big_source, target, BIG, len(BIG))
    with big_source.read(match_all(big_source, BIG)) as lease:
        total = sum(int(record.layout.piece_sizes.sum()) for record in lease.records)
    # OFFER twice, tables, seals and the like.
    overhead_bytes = 128 << 10
    assert total <= sum(carried.values()) <= total + credit_bytes + overhead_bytes
