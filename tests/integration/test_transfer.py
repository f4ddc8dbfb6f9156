"""Whole transfers over both shapes of transport: complete and bit-identical, or absent."""

from __future__ import annotations

import asyncio
import os
import random
import select
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.errors import (
    AddressError,
    DeadlineError,
    LeaseGoneError,
    PeerGoneError,
    PeerMismatchError,
    PoolFullError,
    StoreClosedError,
    TransferAbortedError,
    TransferError,
    TransferFullError,
    TransferTooLargeError,
    WriteError,
)
from kvstore.pool import HandOver
from kvstore.spec import ChunkGrid, Shard
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, LeaseSource, Sender, TransferSettings, send_lease, send_writer
from tests.integration.transfer_nodes import (
    FAST,
    WITHIN_S,
    Recorder,
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

    from kvstore.handle import Handle
    from kvstore.transfer import TransferReport

WHOLE = Shard()


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
def endpoint(target: kvstore.Store, scheme: str) -> Iterator[Endpoint]:
    with Endpoint(target.pool, address(scheme), settings=FAST) as endpoint:
        yield endpoint


@pytest.fixture
def sender() -> Iterator[Sender]:
    with Sender(settings=FAST) as sender:
        yield sender


def send(sender: Sender, store: kvstore.Store, ids: list[int], to: str, **options: object) -> Handle[TransferReport]:
    return send_lease(store.read(match_all(store, ids)), to, sender=sender, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [3, 4, 5, 18, 40])
def test_a_resume_point_arrives_whole(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, scheme: str, tokens: int
) -> None:
    ids = prompt(tokens)
    store_prompt(source, ids)
    report = send(sender, source, ids, endpoint.address).result(WITHIN_S)
    assert_same(source, target, ids, tokens)
    assert_settled(source, target)
    with source.read(match_all(source, ids)) as lease:
        pieces = sum(len(record.layout.pieces) for record in lease.records)
        sizes = sum(int(record.layout.piece_sizes.sum()) for record in lease.records)
    assert (report.tokens, report.pieces, report.total_bytes) == (tokens, pieces, sizes)
    assert (report.pieces_skipped, report.pieces_again, report.reconnects) == (0, 0, 0)
    assert report.is_one_sided is (scheme == "memory")
    assert report.is_native is (scheme == "tcp" and os.environ["KVSTORE_TRANSFER"] != "python")
    assert report.last_byte_s is not None
    assert report.started_s <= report.last_byte_s <= report.committed_s
    assert 0 <= report.exposed_s <= report.seconds
    assert set(report.bytes_by_group) == {"full", "delta", "window"}


def test_only_what_is_missing_crosses(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source, prompt(16))
    store_prompt(source, prompt(32))
    first = send(sender, source, prompt(16), endpoint.address).result(WITHIN_S)
    second = send(sender, source, prompt(32), endpoint.address).result(WITHIN_S)
    assert_same(source, target, prompt(32), 32)
    assert second.bytes_by_group["full"] == first.bytes_by_group["full"]
    assert second.pieces_skipped > 0
    third = send(sender, source, prompt(32), endpoint.address).result(WITHIN_S)
    assert (third.pieces, third.total_bytes, third.first_byte_s) == (0, 0, None)
    assert third.pieces_skipped == second.pieces + second.pieces_skipped
    assert_settled(source, target)


def test_pieces_leave_while_the_prompt_is_computed(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender
) -> None:
    ids, recorder = prompt(18), Recorder()
    with (
        Endpoint(target.pool, address(scheme), settings=FAST, observer=recorder) as endpoint,
        source.write(ids, resume_at=(8, 18)) as writer,
    ):
        handle = send_writer(writer, endpoint.address, sender=sender, observer=recorder)
        for start, stop in ((0, 8), (8, 18)):
            for layer in source.spec.layers:
                put_layer(writer, layer, start, stop, [stop], 0, WHOLE)
                if layer == 1:
                    # Whole blocks of this chunk arrive before the next layer is computed.
                    size = 2 * 2 * 4 * 8 * 2 * (stop // 4)
                    wait_until(
                        lambda size=size: sum(r[1] for r in recorder.received if r[0] == 1) >= size,  # type: ignore[misc]
                        "the layer's blocks had arrived",
                    )
        assert not handle.done()
        assert match_all(target, ids).tokens == 0
        assert match_all(target, ids).pending_tokens >= 8
        writer.commit()
        report = handle.result(WITHIN_S)
        assert report.exposed_s < report.seconds
    assert_same(source, target, ids, 18)
    assert match_all(target, prompt(8)).tokens == 8
    assert recorder.sent_bytes == recorder.received_bytes == report.total_bytes
    assert_settled(source, target)


def test_a_producer_may_pause_longer_than_the_no_progress_deadline(
    source: kvstore.Store, target: kvstore.Store, scheme: str
) -> None:
    """Keep-alives: the deadline is about the peer, not about the model."""
    patient = TransferSettings(progress_deadline_s=1.5)
    ids = prompt(8)
    with (
        Sender(settings=patient) as sender,
        Endpoint(target.pool, address(scheme), settings=patient) as endpoint,
        source.write(ids) as writer,
    ):
        handle = send_writer(writer, endpoint.address, sender=sender)
        time.sleep(2.5)
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, 8, [8], 0, WHOLE)
        writer.commit()
        assert handle.result(WITHIN_S).reconnects == 0
    assert_same(source, target, ids, 8)


def test_the_total_deadline_holds_while_the_producer_pauses(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    ids = prompt(8)
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender, total_deadline_s=0.3)
        with pytest.raises(TransferAbortedError, match="total deadline"):
            handle.result(WITHIN_S)
        assert_settled(target)
        # The writer itself goes on.
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, 8, [8], 0, WHOLE)
        writer.commit()
    assert match_all(source, ids).tokens == 8
    assert match_all(target, ids).tokens == 0


@pytest.mark.parametrize("tokens", [7, 8, 9])
def test_a_handover_is_taken_at_its_exact_length(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, tokens: int
) -> None:
    ids = prompt(tokens)
    waiting = target.accept(ids)
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender, is_transient=True)
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, tokens, [tokens], 0, WHOLE)
        assert not waiting.done()
        writer.commit(handover=HandOver(123, b"logits"))
    handle.result(WITHIN_S)
    arrival = waiting.result(WITHIN_S)
    assert arrival.handover == HandOver(123, b"logits")
    assert arrival.match.tokens == tokens
    with arrival.lease as lease:
        assert lease.tokens == tokens
    # The tail of a hand-over goes with it; what ends at a block boundary stays.
    assert match_all(target, ids).tokens == (tokens if tokens % 4 == 0 else 0)
    assert_settled(source, target)


def test_a_lease_can_be_handed_over(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    ids = prompt(10)
    store_prompt(source, ids)
    send(sender, source, ids, endpoint.address, handover=HandOver(5)).result(WITHIN_S)
    assert target.accept(ids).result(WITHIN_S).handover == HandOver(5)


def test_salt_and_grid_travel(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender) -> None:
    ids, grid = prompt(16), ChunkGrid((8, 16))
    store_prompt(source, ids, salt=b"tenant", grid=grid)
    match = match_all(source, ids, salt=b"tenant", grid=ChunkGrid((8, 16, 17)))
    send_lease(source.read(match), endpoint.address, sender=sender).result(WITHIN_S)
    assert match_all(target, ids, salt=b"tenant", grid=ChunkGrid((8, 16, 17))).tokens == 16
    assert match_all(target, ids, salt=b"tenant", grid=ChunkGrid((4, 16, 17))).tokens == 0
    assert match_all(target, ids, salt=b"other").tokens == 0
    assert match_all(target, ids).tokens == 0
    assert target.statistics().bytes_by_salt.keys() == {b"tenant"}


def test_shards_of_two_workers_arrive_as_one_cache(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    ids = prompt(12)
    for index in range(2):
        store_prompt(source, ids, shard=Shard(index, 2))
    send(sender, source, ids, endpoint.address).result(WITHIN_S)
    assert_same(source, target, ids, 12)
    assert match_all(target, ids, shard=Shard(1, 2)).tokens == 12


def test_pieces_of_more_than_a_slice(scheme: str, sender: Sender) -> None:
    """Single pieces above the size of one receive call and of one frame."""
    spec = tiny_spec(width=1 << 19, block_tokens=2)
    ids = prompt(2)
    with (
        kvstore.open(spec, dram="96MiB") as source,
        kvstore.open(spec, dram="96MiB") as target,
        Endpoint(target.pool, address(scheme), settings=FAST) as endpoint,
        source.write(ids) as writer,
    ):
        generator = np.random.default_rng(3)
        for group in spec.groups:
            for layer in group.layers:
                for tensor in group.tensors:
                    shape = tensor.shape(tensor.rows, 2)
                    values = generator.integers(0, 250, shape, np.uint8).astype(tensor.dtype.storage)
                    tensors: dict[str, Any] = {tensor.name: values}
                    if group.name == "full":
                        writer.put(layer, tokens=slice(0, 2), **tensors)
                    else:
                        writer.put_state(layer, at=2, **tensors)
        writer.commit()
        report = send(sender, source, ids, endpoint.address).result(WITHIN_S)
        assert report.total_bytes > 30 << 20
        assert_same(source, target, ids, 2)
        assert_settled(source, target)


# Full, cancelled, refused


def test_a_full_receiver_says_so_and_is_unchanged(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids, other = prompt(20), prompt(20, seed=1)
    store_prompt(source, ids)
    with (
        kvstore.open(tiny_spec(), dram="112KiB") as target,
        Endpoint(target.pool, address(scheme), settings=FAST) as endpoint,
    ):
        store_prompt(target, other)
        with target.read(match_all(target, other)):
            before = target.statistics()
            with pytest.raises(TransferFullError, match="room") as caught:
                send(sender, source, ids, endpoint.address).result(WITHIN_S)
            assert caught.value.retryable
            assert_settled(source, target)
            assert target.statistics().committed_bytes == before.committed_bytes
        assert endpoint.statistics().full == 1


def test_a_receiver_that_can_never_hold_it_says_so(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids = prompt(400)
    store_prompt(source, ids)
    with (
        kvstore.open(tiny_spec(), dram="128KiB") as target,
        Endpoint(target.pool, address(scheme), settings=FAST) as endpoint,
    ):
        before = target.statistics()
        with pytest.raises(TransferTooLargeError, match="never have room") as caught:
            send(sender, source, ids, endpoint.address).result(WITHIN_S)
        assert not caught.value.retryable
        assert_settled(source, target)
        after = target.statistics()
        assert (after.committed_bytes, after.nodes - after.ghosts) == (before.committed_bytes, 0)
        assert endpoint.statistics().full == 1


def test_space_that_appears_in_time_is_used(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids, other = prompt(20), prompt(20, seed=1)
    store_prompt(source, ids)
    patient = TransferSettings(progress_deadline_s=8.0, queue_deadline_s=4.0)
    with (
        kvstore.open(tiny_spec(), dram="112KiB") as target,
        Endpoint(target.pool, address(scheme), settings=patient) as endpoint,
    ):
        store_prompt(target, other)
        lease = target.read(match_all(target, other))
        handle = send(sender, source, ids, endpoint.address)
        with pytest.raises(DeadlineError):
            handle.result(0.3)
        lease.release()
        handle.result(WITHIN_S)
        assert_same(source, target, ids, 20)


def test_two_full_nodes_that_send_to_each_other_both_end(scheme: str, sender: Sender) -> None:
    """Leases hold what is sent, so neither can make room for the other: both are told that it is full."""
    spec = tiny_spec()
    with (
        kvstore.open(spec, dram="112KiB") as left,
        kvstore.open(spec, dram="112KiB") as right,
        Endpoint(left.pool, address(scheme), settings=FAST) as left_endpoint,
        Endpoint(right.pool, address(scheme), settings=FAST) as right_endpoint,
    ):
        store_prompt(left, prompt(20, seed=1))
        store_prompt(right, prompt(20, seed=2))
        leases = [store.read(match_all(store, prompt(20, seed=seed))) for store, seed in ((left, 1), (right, 2))]
        handles = [
            send_lease(lease, endpoint.address, sender=sender)
            for lease, endpoint in zip(leases, (right_endpoint, left_endpoint), strict=True)
        ]
        outcomes = []
        for handle in handles:
            try:
                handle.result(WITHIN_S)
                outcomes.append("committed")
            except TransferFullError:
                outcomes.append("full")
        assert set(outcomes) <= {"committed", "full"}
        assert_settled(left, right)
        # Afterwards both can make room again.
        store_prompt(left, prompt(20, seed=3))
        assert match_all(left, prompt(20, seed=3)).tokens == 20


def test_cancel_by_the_sender_is_acknowledged(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    ids = prompt(16)
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender)
        put_layer(writer, 1, 0, 16, [], 0, WHOLE)
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        assert target.statistics().reserved_bytes > 0
        handle.cancel("not needed any more")
        with pytest.raises(TransferAbortedError, match="not needed any more"):
            handle.result(WITHIN_S)
        assert endpoint.transfer_count == 0
        assert endpoint.statistics().aborted == 1
        assert_settled(target)
    assert match_all(target, ids).tokens == 0


@pytest.mark.parametrize("is_filled", [False, True])
def test_an_aborted_writer_ends_its_transfer(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, is_filled: bool
) -> None:
    """Also one that has put everything: without a commit here there is none there."""
    ids = prompt(16)
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender)
        for layer in source.spec.layers if is_filled else (1,):
            put_layer(writer, layer, 0, 16, [16], 0, WHOLE)
    with pytest.raises(TransferAbortedError, match=r"gave up|given up"):
        handle.result(WITHIN_S)
    assert_settled(source, target)
    assert match_all(target, ids).tokens == 0


def test_a_receiver_that_closes_ends_its_transfers(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    ids = prompt(16)
    with Sender(settings=TransferSettings()) as sender, source.write(ids) as writer:
        endpoint = Endpoint(target.pool, address(scheme), settings=FAST)
        handle = send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        endpoint.close()
        endpoint.close()
        with pytest.raises(TransferAbortedError, match="closing"):
            handle.result(WITHIN_S)
    assert_settled(source, target)


def test_a_closed_sender_cancels_and_refuses(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    ids = prompt(16)
    store_prompt(source, prompt(8))
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        sender.close()
        assert handle.done()
        with pytest.raises(TransferAbortedError, match="closing"):
            handle.result(0)
        with pytest.raises(StoreClosedError):
            send(sender, source, prompt(8), endpoint.address)
    assert_settled(source, target)


def test_another_model_is_refused_on_both_sides(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids = prompt(8)
    store_prompt(source, ids)
    with (
        kvstore.open(tiny_spec(weights="sha256:other"), dram="8MiB") as target,
        Endpoint(target.pool, address(scheme), settings=FAST) as endpoint,
    ):
        prints = [store.spec.fingerprint.hex()[:16] for store in (source, target)]
        with pytest.raises(PeerMismatchError) as caught:
            send(sender, source, ids, endpoint.address).result(WITHIN_S)
        wait_until(lambda: endpoint.last_error is not None, "the receiver had noticed")
        assert endpoint.last_error is not None
        assert isinstance(endpoint.last_error[1], PeerMismatchError)
        for fingerprint in prints:
            assert fingerprint in str(caught.value)
            assert fingerprint in str(endpoint.last_error[1])
        assert_settled(source, target)


def test_nobody_listens(source: kvstore.Store, sender: Sender) -> None:
    ids = prompt(8)
    store_prompt(source, ids)
    for gone in ("tcp://127.0.0.1:1", "memory://nobody-here"):
        with pytest.raises(PeerGoneError):
            send(sender, source, ids, gone).result(WITHIN_S)
    with pytest.raises(AddressError):
        send(sender, source, ids, "pigeon://coop")
    # Every lease was given back: everything can be evicted.
    assert source.pool.evict(source.prompt(ids).path.keys[0]) > 0


@pytest.mark.parametrize("shared", [8, 10])
def test_a_prefill_that_resumed_sends_its_whole_prefix(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, shared: int
) -> None:
    """The writer computes the suffix only; a receiver that has nothing gets all of it."""
    store_prompt(source, prompt(shared))
    ids = prompt(20)
    with (
        source.read(match_all(source, prompt(shared))) as lease,
        source.write(ids, resume=lease) as writer,
    ):
        handle = send_writer(writer, endpoint.address, sender=sender)
        for layer in source.spec.layers:
            put_layer(writer, layer, shared, 20, [20], 0, WHOLE)
        writer.commit()
    handle.result(WITHIN_S)
    assert_same(source, target, ids, 20)
    assert_settled(source, target)


def test_an_ended_writer_cannot_be_sent(source: kvstore.Store, endpoint: Endpoint, sender: Sender) -> None:
    ids = prompt(8)
    with source.write(ids) as writer:
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, 8, [8], 0, WHOLE)
        writer.commit()
        with pytest.raises(WriteError):
            send_writer(writer, endpoint.address, sender=sender)


# Many at once, and slow ones


def test_sixteen_transfers_at_once(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    for seed in range(16):
        store_prompt(source, prompt(20 + seed, seed=seed), seed=seed)
    handles = [send(sender, source, prompt(20 + seed, seed=seed), endpoint.address) for seed in range(16)]
    for handle in handles:
        handle.result(WITHIN_S)
    for seed in range(16):
        assert_same(source, target, prompt(20 + seed, seed=seed), 20 + seed)
    assert endpoint.statistics().committed == 16
    assert_settled(source, target)


def test_one_prefix_from_two_senders_at_once(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    """Two writers of one prefix: both transfers succeed, one cache stays."""
    ids = prompt(24)
    writers = []
    for _ in range(2):
        writers.append(source.write(ids))
    handles = [send_writer(writer, endpoint.address, sender=sender) for writer in writers]
    wait_until(lambda: endpoint.transfer_count == 2, "both offers had arrived")
    for writer in writers:
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, 24, [24], 0, WHOLE)
        writer.commit()
    for handle in handles:
        handle.result(WITHIN_S)
    assert_same(source, target, ids, 24)
    assert_settled(source, target)


def test_credits_bound_what_is_in_flight(scheme: str, sender: Sender) -> None:
    """A slow reader slows its sender, which never has more than the credit under way."""
    spec, credit = tiny_spec(width=128), 64 << 10
    ids, recorder = prompt(200), Recorder(pause_s=0.002)
    excess: list[int] = []

    class Gauge(Recorder):
        def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
            super().piece_sent(layer, size_bytes, start_s, end_s)
            excess.append(self.sent_bytes - recorder.received_bytes)

    with (
        kvstore.open(spec, dram="32MiB") as source,
        kvstore.open(spec, dram="32MiB") as target,
        Endpoint(
            target.pool,
            address(scheme),
            settings=TransferSettings(credit_bytes=credit, progress_deadline_s=5.0),
            observer=recorder,
        ) as endpoint,
    ):
        store_prompt(source, ids)
        report = send(sender, source, ids, endpoint.address, observer=Gauge()).result(WITHIN_S)
        assert_same(source, target, ids, 200)
    assert report.total_bytes > 6 * credit
    # The observer of the receiver runs after a frame is consumed and granted anew.
    assert max(excess) <= 2 * credit


def test_a_slow_transfer_does_not_slow_its_neighbour(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source, prompt(12, seed=2))
    with source.write(prompt(12, seed=1)) as slow:
        handle = send_writer(slow, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the slow one had begun")
        send(sender, source, prompt(12, seed=2), endpoint.address).result(WITHIN_S)
        assert not handle.done()
        for layer in source.spec.layers:
            put_layer(slow, layer, 0, 12, [12], 1, WHOLE)
        slow.commit()
    handle.result(WITHIN_S)


def test_what_is_sent_stays_in_place_after_the_commit(scheme: str, sender: Sender) -> None:
    """Nothing evicts or reuses the records of a writer that has committed and is still being sent."""
    spec = tiny_spec(width=128)
    ids = prompt(64)
    with (
        kvstore.open(spec, dram="8MiB") as source,
        kvstore.open(spec, dram="8MiB") as target,
        kvstore.open(spec, dram="8MiB") as reference,
        Endpoint(
            target.pool,
            address(scheme),
            settings=TransferSettings(credit_bytes=16 << 10),
            observer=Recorder(pause_s=0.005),
        ) as endpoint,
    ):
        store_prompt(reference, ids)
        with source.write(ids) as writer:
            handle = send_writer(writer, endpoint.address, sender=sender)
            for layer in spec.layers:
                put_layer(writer, layer, 0, 64, [64], 0, WHOLE)
            writer.commit()
        assert source.pool.evict(source.prompt(ids).path.keys[0]) == 0
        assert not handle.done()
        store_prompt(source, prompt(64, seed=9), seed=9)
        handle.result(WITHIN_S)
        assert_same(reference, target, ids, 64)
        assert_settled(source, target)


def test_limits_on_transfers_are_named(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    few = TransferSettings(transfers_per_peer_max=2, transfers_per_node_max=3)
    with (
        Endpoint(target.pool, address(scheme), settings=few) as endpoint,
        Sender() as sender,
        Sender(settings=few) as other,
    ):
        writers = [source.write(prompt(8, seed=seed)) for seed in range(4)]
        for writer in writers[:2]:
            send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 2, "two transfers had begun")
        with pytest.raises(TransferError, match="2 transfers of this peer"):
            send_writer(writers[2], endpoint.address, sender=sender).result(WITHIN_S)
        send_writer(writers[2], endpoint.address, sender=other)
        wait_until(lambda: endpoint.transfer_count == 3, "three transfers had begun")
        with pytest.raises(TransferError, match="3 transfers are under way"):
            send_writer(writers[3], endpoint.address, sender=other).result(WITHIN_S)
        for writer in writers:
            writer.abort()
        wait_until(lambda: endpoint.transfer_count == 0, "all had been given up")
    assert_settled(source, target)


def test_a_senders_own_limit(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    with Sender(settings=TransferSettings(transfers_per_node_max=1)) as sender, source.write(prompt(8)) as writer:
        send_writer(writer, endpoint.address, sender=sender)
        with pytest.raises(TransferError, match="1 transfers"):
            send_writer(writer, endpoint.address, sender=sender)


def test_connections_are_limited(source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender) -> None:
    one = TransferSettings(connections_per_node_max=1)
    store_prompt(source, prompt(4))
    with (
        Endpoint(target.pool, address(scheme), settings=one) as endpoint,
        source.write(prompt(8)) as writer,
    ):
        send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the only connection was taken")
        with pytest.raises(PeerGoneError):
            send(sender, source, prompt(4), endpoint.address).result(WITHIN_S)


# The handle, the store's own calls


def test_the_handle_polls_and_awaits(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source, prompt(8))
    store_prompt(source, prompt(12, seed=1))
    handle = send(sender, source, prompt(8), endpoint.address)
    assert select.select([handle], [], [], WITHIN_S)[0] == [handle]
    assert handle.result(0).tokens == 8

    async def wait() -> TransferReport:
        return await asyncio.wait_for(send(sender, source, prompt(12, seed=1), endpoint.address), WITHIN_S)

    assert asyncio.run(wait()).tokens == 12


def test_the_stores_own_calls(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    endpoint = target.listen(address(scheme))
    ids = prompt(18)
    with source.write(ids) as writer:
        handle = writer.send(endpoint.address)
        for layer in source.spec.layers:
            put_layer(writer, layer, 0, 18, [18], 0, WHOLE)
        writer.commit()
    handle.result(WITHIN_S)
    assert_same(source, target, ids, 18)
    again = source.send(match_all(source, ids), endpoint.address).result(WITHIN_S)
    assert again.pieces == 0


def test_a_closing_store_ends_what_it_receives(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids = prompt(16)
    target = kvstore.open(tiny_spec(), dram="8MiB")
    endpoint = target.listen(address(scheme))
    with source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        target.close()
        with pytest.raises(TransferAbortedError):
            handle.result(WITHIN_S)


def test_a_pool_that_closes_under_a_transfer_ends_it(source: kvstore.Store, scheme: str, sender: Sender) -> None:
    ids = prompt(16)
    target = kvstore.open(tiny_spec(), dram="8MiB")
    with Endpoint(target.pool, address(scheme), settings=FAST) as endpoint, source.write(ids) as writer:
        handle = send_writer(writer, endpoint.address, sender=sender)
        wait_until(lambda: endpoint.transfer_count == 1, "the offer had arrived")
        target.pool.close()
        put_layer(writer, 1, 0, 16, [], 0, WHOLE)
        with pytest.raises(TransferAbortedError, match="closed"):
            handle.result(WITHIN_S)
    target.close()


@pytest.fixture
def threads_before() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_idle_nodes_do_not_work(
    threads_before: set[threading.Thread], target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    threads = [thread for thread in threading.enumerate() if thread not in threads_before]
    assert sorted(thread.name for thread in threads) == ["kvstore-accept", "kvstore-transfer-janitor"]
    assert all(thread.daemon for thread in threads)


def test_random_transfers_between_three_nodes(scheme: str, sender: Sender) -> None:
    """A seeded mixture in small pools: every transfer ends, what is visible is whole, budgets add up."""
    generator = random.Random(11)
    spec = tiny_spec()
    stores = [kvstore.open(spec, dram="160KiB") for _ in range(3)]
    endpoints = [Endpoint(store.pool, address(scheme), settings=FAST) for store in stores]
    try:
        ended = {"committed": 0, "full": 0, "aborted": 0}
        handles: list[Handle[TransferReport]] = []
        for _ in range(40):
            here, there = generator.sample(range(3), 2)
            seed, tokens = generator.randrange(4), generator.randrange(5, 33)
            ids = prompt(tokens, seed=seed)
            try:
                if match_all(stores[here], ids).tokens != tokens:
                    store_prompt(stores[here], ids, seed=seed)
                match = match_all(stores[here], ids)
                if not match:
                    continue
                lease = stores[here].read(match)
            except (PoolFullError, LeaseGoneError):
                continue  # What arrives here at the same time may need the room, at any point in between.
            handle = sender.send(LeaseSource(lease), endpoints[there].address)
            if generator.random() < 0.2:
                handle.cancel()
            handles.append(handle)
        for handle in handles:
            try:
                handle.result(WITHIN_S)
                ended["committed"] += 1
            except TransferFullError:
                ended["full"] += 1
            except TransferAbortedError:
                ended["aborted"] += 1
        assert ended["committed"] > 0
        assert_settled(*stores)
        for store in stores:
            for seed in range(4):
                for tokens in range(5, 33):
                    match = match_all(store, prompt(tokens, seed=seed))
                    if match:
                        with store.read(match) as lease:
                            assert not lease.verify()
    finally:
        for endpoint in endpoints:
            endpoint.close()
        for store in stores:
            store.close()
