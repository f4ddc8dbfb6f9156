"""A node that drains: what runs may end, what is new is refused by name, what is left over is given up."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.abc import TransportOptions
from kvstore.errors import PeerClosingError, PeerGoneError
from kvstore.spec import Shard
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from kvstore.transfer.attachment import Attachment
from kvstore.transfer.frames import Kind
from kvstore.transfer.inbox import Inbox
from kvstore.transfer.link import FrameLink
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    FAST,
    WITHIN_S,
    CutConnection,
    WrappedTransport,
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

    from kvstore._native import Stream
    from kvstore.transfer.frames import FrameHeader

HELD = TransportOptions(pacing_bytes_per_s=64 << 10)
"""It would take half a minute: no test waits for its end."""


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        store_prompt(store, prompt(BIG_TOKENS))
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        yield store
        assert_settled(store)


@pytest.mark.parametrize("scheme", ["tcp", "memory"])
def test_what_runs_ends_and_what_is_new_is_refused(source: kvstore.Store, target: kvstore.Store, scheme: str) -> None:
    ids = prompt(40, seed=1)
    with Endpoint(target.pool, address(scheme)) as endpoint, source.write(ids) as writer:
        handle = writer.send(endpoint.address)
        put_layer(writer, 1, 0, 40, [], 1, Shard())
        wait_until(lambda: any(status.received_bytes for status in endpoint.transfers()), "pieces have arrived")
        draining = Background(lambda: endpoint.drain(WITHIN_S))
        wait_until(lambda: endpoint._inbox._is_draining, "the drain has begun")
        refused = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address)
        with pytest.raises(PeerClosingError, match=r"CLOSING\): the node is draining.*send it elsewhere") as caught:
            refused.result(WITHIN_S)
        assert caught.value.retryable
        assert draining.is_running
        for layer in (0, 2, 3, 4):
            put_layer(writer, layer, 0, 40, [40], 1, Shard())
        writer.commit()
        assert draining.result(WITHIN_S)
        # Closing at once after the drain does not lose the answer to the commit.
        endpoint.close()
        assert handle.result(WITHIN_S).tokens == 40
    assert_same(source, target, ids, 40, with_costs=False)
    assert endpoint.statistics().committed == 1


def test_a_drain_ends_when_the_sender_has_been_told(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit is visible before its answer has left; closing in between would leave the sender in doubt."""
    told: list[Kind] = []
    send = FrameLink.send

    def send_late(link: FrameLink, kind: Kind, *arguments: Any, **options: Any) -> None:
        if kind is Kind.COMMITTED:
            wait_until(lambda: endpoint.transfer_count == 0, "the transfer is committed")
            time.sleep(0.1)  # what a drain that did not wait for the answer would use
        send(link, kind, *arguments, **options)
        told.append(kind)

    monkeypatch.setattr(FrameLink, "send", send_late)
    with Endpoint(target.pool, address("tcp")) as endpoint:
        handle = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address)
        wait_until(lambda: endpoint.statistics().committed == 1, "it is committed")
        assert endpoint.drain(WITHIN_S)
        assert Kind.COMMITTED in told
    assert handle.result(WITHIN_S).tokens == BIG_TOKENS


def test_the_deadline_passes_and_closing_gives_up_the_rest(source: kvstore.Store, target: kvstore.Store) -> None:
    with Endpoint(target.pool, address("tcp")) as endpoint:
        handle = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address, transport=HELD)
        wait_until(lambda: endpoint.transfer_count == 1, "the transfer has begun")
        assert not endpoint.drain(0.05)
        assert not endpoint.drain(0.0)
        (status,) = endpoint.transfers()
        assert status.is_attached
        assert status.received_bytes < status.offered_bytes
    with pytest.raises(PeerClosingError, match="closing"):
        handle.result(WITHIN_S)
    assert not match_all(target, prompt(BIG_TOKENS))
    assert endpoint.statistics().aborted == 1


def test_closing_tells_the_sender_whose_offer_is_being_taken_up(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has space already, and is not attached yet."""
    attach = Inbox.attach
    is_taken, may_go_on = threading.Event(), threading.Event()

    def attach_slowly(inbox: Inbox, *arguments: Any) -> Any:
        incoming = attach(inbox, *arguments)
        is_taken.set()
        assert may_go_on.wait(WITHIN_S)
        return incoming

    monkeypatch.setattr(Inbox, "attach", attach_slowly)
    endpoint = Endpoint(target.pool, address("tcp"))
    handle = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address)
    assert is_taken.wait(WITHIN_S)
    closing = Background(endpoint.close)
    try:
        with pytest.raises(PeerClosingError, match="closing"):
            handle.result(WITHIN_S)
    finally:
        may_go_on.set()
        closing.result(WITHIN_S)


def test_closing_tells_the_sender_whose_offer_waits_for_room(source: kvstore.Store) -> None:
    settings = TransferSettings(queue_deadline_s=WITHIN_S, progress_deadline_s=4 * WITHIN_S)
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="4MiB") as target:
        with target.write(prompt(BIG_TOKENS, seed=1)), Sender(settings=settings) as sender:
            endpoint = Endpoint(target.pool, address("tcp"), settings=settings)
            with source.read(match_all(source, prompt(BIG_TOKENS))) as lease:
                handle = send_lease(lease, endpoint.address, sender=sender)
                wait_until(lambda: len(endpoint.transfers()) == 1, "the offer waits")
                assert endpoint.transfer_count == 0
                endpoint.close()
                with pytest.raises(PeerClosingError, match="closing"):
                    handle.result(WITHIN_S)
        assert_settled(target)


def test_a_refusal_counts_where_a_send_notices_the_end_first(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node did not wait any longer for what is being sent; its word is there, and is just being read."""
    take = Attachment._take
    is_sending, is_told, is_broken = threading.Event(), threading.Event(), threading.Event()

    def take_late(attachment: Attachment, header: FrameHeader, payload: memoryview) -> None:
        if header.kind is Kind.ABORT:
            is_told.set()
            assert is_broken.wait(WITHIN_S)
        take(attachment, header, payload)

    def break_off(stream: Stream, *_: Any) -> Any:
        is_sending.set()
        assert is_told.wait(WITHIN_S)
        stream.close()
        is_broken.set()
        raise PeerGoneError("the connection broke while sending")

    monkeypatch.setattr(Attachment, "_take", take_late)
    monkeypatch.setattr("kvstore.transfer.attachment.send_pieces", break_off)
    with Endpoint(target.pool, address("tcp")) as endpoint:
        handle = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address)
        assert is_sending.wait(WITHIN_S)
    with pytest.raises(PeerClosingError, match="closing"):
        handle.result(WITHIN_S)


def test_a_broken_transfer_is_resumed_during_a_drain(source: kvstore.Store, target: kvstore.Store) -> None:
    settings = TransferSettings(resume_window_s=WITHIN_S)
    with Endpoint(target.pool, address("tcp"), settings=settings) as endpoint, Sender() as sender:
        seen: list[int] = []
        drains: list[Background[bool]] = []

        def wrap(connection: Any, number: int) -> Any:
            seen.append(number)
            if number == 0:
                return CutConnection(connection, 200_000)
            drains.append(Background(lambda: endpoint.drain(WITHIN_S)))
            wait_until(lambda: endpoint._inbox._is_draining, "the drain has begun")
            return connection

        transport = WrappedTransport(endpoint.address, wrap)
        lease = source.read(match_all(source, prompt(BIG_TOKENS)))
        handle = send_lease(lease, endpoint.address, sender=sender, find_transport=lambda _: transport)
        assert handle.result(WITHIN_S).reconnects >= 1
        assert all(draining.result(WITHIN_S) for draining in drains)
        assert len(seen) > 1
        assert sender.statistics().committed == 1
    assert_same(source, target, prompt(BIG_TOKENS), BIG_TOKENS)


def test_an_idle_node_has_drained_at_once(target: kvstore.Store) -> None:
    with Endpoint(target.pool, address("tcp")) as endpoint:
        assert endpoint.drain(0.0)
        assert endpoint.transfers() == ()


def test_statistics_and_log_lines_of_transfers(
    source: kvstore.Store, target: kvstore.Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "kvstore")
    with Endpoint(target.pool, address("tcp"), settings=FAST) as endpoint:
        report = source.send(match_all(source, prompt(BIG_TOKENS)), endpoint.address).result(WITHIN_S)
        store_prompt(source, prompt(BIG_TOKENS, seed=3), seed=3)
        cancelled = source.send(match_all(source, prompt(BIG_TOKENS, seed=3)), endpoint.address, transport=HELD)
        wait_until(lambda: endpoint.transfer_count == 1, "the second transfer has begun")
        cancelled.cancel()
        wait_until(lambda: endpoint.statistics().aborted == 1, "the cancel has arrived")
        received = endpoint.statistics()
    assert (received.committed, received.received_bytes) == (1, report.total_bytes)
    assert 0 < received.received_s <= report.seconds
    wait_until(lambda: source.own_sender().transfer_count == 0, "the sender has taken note")
    sent = source.own_sender().statistics()
    assert (sent.committed, sent.failed, sent.sent_bytes, sent.sent_s) == (1, 1, report.total_bytes, report.seconds)
    fields = {record.fields["event"]: record.fields for record in caplog.records if hasattr(record, "fields")}
    assert fields["transfer_committed"]["transfer"] == str(report.transfer)
    assert fields["transfer_committed"]["bytes"] == report.total_bytes
    assert fields["transfer_committed"]["peer"].startswith("tcp://127.0.0.1:")
    assert fields["transfer_aborted"]["code"] == "cancelled"
