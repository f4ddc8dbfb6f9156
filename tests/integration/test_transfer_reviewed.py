"""Rare orders of events and faults beside the network: closing while sending, failing threads and listeners."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import LeaseError, StoreClosedError, TransferError, TransferTooLargeError, UnavailableError
from kvstore.limits import TRANSFER_DEADLINE_MAX_S, TRANSFER_PRIORITY_MAX
from kvstore.pool import RecordArrays
from kvstore.registry import transport_for
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, LeaseSource, Sender, TransferSettings, send_lease, send_writer
from kvstore.transfer.fetching import Fetching
from kvstore.transfer.frames import FLAG_REMOTE, NO_TRANSFER, Kind, TransferId
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.incoming import IncomingTransfer
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import WANT_RANGE, Abort, AbortCode
from kvstore.transfer.offer import Offer, OfferFlag, offer_rows
from kvstore.transfer.outgoing import Outgoing
from kvstore.transfer.outgoing_transfer import OutgoingTransfer
from kvstore.transfer.session import Session
from tests.integration.transfer_nodes import (
    FAST,
    WITHIN_S,
    WrappedConnection,
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
from transports.memory.listener import MemoryListener

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.transfer.source import SourceListener

TOKENS = 18
IDS = prompt(TOKENS)
WHOLE = kvstore.Shard()


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
def endpoint(target: kvstore.Store) -> Iterator[Endpoint]:
    with Endpoint(target.pool, address("memory"), settings=FAST) as endpoint:
        yield endpoint


def lease_of(store: kvstore.Store) -> kvstore.Lease:
    return store.read(match_all(store, IDS))


def assert_released(lease: kvstore.Lease) -> None:
    with pytest.raises(LeaseError):
        lease.check()


class ClosesSender(LeaseSource):
    """Its sender is closed while it starts."""

    def __init__(self, lease: kvstore.Lease, sender: Sender) -> None:
        super().__init__(lease)
        self._sender = sender

    def start(self, listener: SourceListener) -> None:
        self._sender.close()
        super().start(listener)


def test_a_sender_may_close_while_a_transfer_begins(source: kvstore.Store, endpoint: Endpoint) -> None:
    sender = Sender(settings=FAST)
    lease = lease_of(source)
    with pytest.raises(StoreClosedError):
        sender.send(ClosesSender(lease, sender), endpoint.address)
    assert_released(lease)
    assert repr(sender) == "Sender(0 transfers)"


def test_a_thread_that_cannot_start_leaves_nothing(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("kvstore-send"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with Sender(settings=FAST) as sender:
        lease = lease_of(source)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(TransferError, match="thread"):
                send_lease(lease, endpoint.address, sender=sender)
        assert_released(lease)
        assert repr(sender) == "Sender(0 transfers)"
        send_lease(lease_of(source), endpoint.address, sender=sender).result(WITHIN_S)
    assert_same(source, target, IDS, TOKENS)


@pytest.mark.parametrize("name", ["kvstore-transfer-janitor", "kvstore-accept"])
def test_an_endpoint_that_gets_no_thread_leaves_nothing(
    target: kvstore.Store, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    here = address("memory")

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    heard = list(target.pool._listeners)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(TransferError, match="raise the limit on threads"):
            target.listen(here)
    assert target.pool._listeners == heard  # type: ignore[attr-defined]
    target.listen(here).close()


@pytest.mark.parametrize("error", [OSError("not connected"), UnavailableError("no such congestion control")])
def test_an_endpoint_outlives_a_connection_that_cannot_be_accepted(
    source: kvstore.Store, target: kvstore.Store, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept = MemoryListener.accept
    errors = [error]

    def fail_once(listener: MemoryListener, deadline: Deadline) -> Any:
        if errors:
            raise errors.pop()
        return accept(listener, deadline)

    monkeypatch.setattr(MemoryListener, "accept", fail_once)
    with Endpoint(target.pool, address("memory"), settings=FAST) as endpoint, Sender(settings=FAST) as sender:
        send_lease(lease_of(source), endpoint.address, sender=sender).result(WITHIN_S)
    assert not errors


def test_an_offer_that_cannot_be_taken_up_keeps_no_space(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory was short for a moment, after the space had been reserved."""
    reserved_bytes: list[int] = []

    def fail_once(*arguments: Any) -> IncomingTransfer:
        reserved_bytes.append(target.statistics().reserved_bytes)
        if len(reserved_bytes) == 1:
            raise MemoryError
        return IncomingTransfer(*arguments)

    monkeypatch.setattr("kvstore.transfer.inbox.IncomingTransfer", fail_once)
    with Sender(settings=FAST) as sender:
        send_lease(lease_of(source), endpoint.address, sender=sender).result(WITHIN_S)
    assert len(reserved_bytes) == 2
    assert reserved_bytes[0] == reserved_bytes[1] > 0
    assert_same(source, target, IDS, TOKENS)
    assert_settled(target)


@pytest.mark.parametrize("begin", ["listen", "send", "fetch"])
def test_nothing_begins_while_a_store_closes(
    source: kvstore.Store, endpoint: Endpoint, begin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began between the list of what is to be closed and the pool's end would never be closed."""
    close = Endpoint.close
    errors: list[Exception] = []
    match = match_all(source, IDS)

    def close_late(closing: Endpoint) -> None:
        try:
            if begin == "listen":
                source.listen(address("memory"))
            elif begin == "send":
                source.send(match, endpoint.address)
            else:
                source.fetch(IDS, endpoint.address)
        except StoreClosedError as error:
            errors.append(error)
        close(closing)

    source.listen(address("memory"))
    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "close", close_late)
        source.close()
    assert len(errors) == 1


@pytest.mark.parametrize("scheme", ["tcp", "memory"])
def test_what_has_ended_is_let_go_of(
    source: kvstore.Store, target: kvstore.Store, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, and also while its handle is kept: a transfer knows much of a store's memory."""
    made: list[weakref.ref[object]] = []
    short = prompt(8, seed=1)

    def note(kind: type) -> None:
        begin = kind.__init__  # type: ignore[misc]

        def noted(self: object, *arguments: Any, **options: Any) -> None:
            begin(self, *arguments, **options)
            made.append(weakref.ref(self))

        monkeypatch.setattr(kind, "__init__", noted)

    for kind in (OutgoingTransfer, IncomingTransfer, Fetching):
        note(kind)
    gc.collect()
    gc.disable()
    try:
        receiver, node = target.listen(address(scheme)), source.listen(address(scheme), serves=True)
        store_prompt(source, short, seed=1)
        handles: list[Any] = [source.send(match_all(source, short), receiver.address)]
        handles[0].result(WITHIN_S)
        handles.append(target.fetch([*IDS, 1], node.address))
        assert handles[1].result(WITHIN_S).received_bytes
        assert len(made) == 5
        wait_until(lambda: not any(each() for each in made), "nothing of them is left")
        assert all(handle.done() for handle in handles)
    finally:
        gc.enable()


def test_a_reader_that_cannot_start_ends_the_transfer(
    source: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith("-reader"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with Sender(settings=FAST) as sender:
        with pytest.raises(RuntimeError, match="new thread"):
            send_lease(lease_of(source), endpoint.address, sender=sender).result(WITHIN_S)
        assert repr(sender) == "Sender(0 transfers)"


class Peer:
    """A sender made by hand that offers `source`'s prompt."""

    def __init__(self, store: kvstore.Store, endpoint: Endpoint, deadline_ms: int = 60_000) -> None:
        self.transfer = TransferId(1234, 1)
        with lease_of(store) as lease:
            records = LeaseSource(lease).records
            rows, grids = offer_rows(RecordArrays.of((record.name, record.layout, record.header) for record in records))
            total = sum(int(record.layout.piece_sizes.sum()) for record in records)
            self.offer = Offer(lease.path, b"", (TOKENS,), grids, rows, total, deadline_ms, 128, OfferFlag.COMPLETE)
        connection = transport_for(endpoint.address).connect(
            endpoint.address, TransportOptions(), Deadline.after(WITHIN_S)
        )
        self.link = FrameLink(connection, WITHIN_S)
        self.link.send(Kind.HELLO, NO_TRANSFER, payload=make_hello(store.spec, 1234, FAST, connection).pack())
        assert self.receive() is Kind.HELLO
        self.link.send(Kind.OFFER, self.transfer, payload=self.offer.pack())
        assert self.receive() is Kind.WANT

    def receive(self) -> Kind:
        header = self.link.receive_header(Deadline.after(WITHIN_S))
        self.link.receive_payload(header)
        return header.kind


def test_an_abort_of_another_transfer_leaves_this_one_attached(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    peer = Peer(source, endpoint)
    try:
        other = TransferId(1234, 2)
        peer.link.send(Kind.ABORT, other, payload=Abort(AbortCode.CANCELLED, "never began").pack())
        assert peer.receive() is Kind.ABORTED
        assert endpoint.transfer_count == 1
    finally:
        peer.link.close()
    wait_until(lambda: endpoint.transfer_count == 0, "its resume window had passed", 9.0)
    assert_settled(target)


def test_a_reservation_without_a_session_is_given_up_at_its_deadline(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the session has ended without detaching it."""
    monkeypatch.setattr(Session, "_detach", lambda _: None)
    peer = Peer(source, endpoint, deadline_ms=400)
    peer.link.close()
    wait_until(lambda: endpoint.transfer_count == 0, "its deadline had passed")
    assert_settled(target)


def test_a_failing_listener_does_not_keep_the_handle_waiting(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    lease = lease_of(source)
    release = lease.release

    def fail() -> None:
        release()
        raise ValueError("a listener of the pool failed")

    lease.release = fail  # type: ignore[method-assign]
    with Sender(settings=FAST) as sender:
        assert send_lease(lease, endpoint.address, sender=sender).result(WITHIN_S).tokens == TOKENS
        assert repr(sender) == "Sender(0 transfers)"
    assert "a listener of the pool failed" in caplog.text
    assert_same(source, target, IDS, TOKENS)


def test_a_closed_endpoint_hears_no_more_of_the_pool(target: kvstore.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = Endpoint(target.pool, address("memory"), settings=FAST)
    inbox = endpoint._inbox
    heard: list[int] = []
    with inbox._changed:
        monkeypatch.setattr(inbox._changed, "notify_all", lambda: heard.append(1))
        target.pool._notify()
    assert heard
    monkeypatch.undo()
    endpoint.close()
    monkeypatch.setattr(inbox._changed, "notify_all", lambda: heard.append(2))
    target.pool._notify()
    assert 2 not in heard


def test_an_offer_that_can_never_fit_costs_nobody_else_anything(source: kvstore.Store) -> None:
    patient = TransferSettings(resume_window_s=20.0)
    with (
        kvstore.open(tiny_spec(), dram="320KiB") as small,
        Endpoint(small.pool, address("memory"), settings=patient) as endpoint,
        kvstore.open(tiny_spec(), dram="8MiB") as other,
        Sender(settings=FAST) as sender,
    ):
        Peer(source, endpoint).link.close()
        wait_until(lambda: endpoint.connection_count == 0, "the break was noticed")
        ids = prompt(800, seed=3)
        store_prompt(other, ids, seed=3)
        with pytest.raises(TransferTooLargeError, match=str(small.pool.statistics().capacity_bytes)) as caught:
            send_lease(other.read(match_all(other, ids)), endpoint.address, sender=sender).result(WITHIN_S)
        assert not caught.value.retryable
        assert endpoint.transfer_count == 1
        assert endpoint.statistics().aborted == 0


class Watch(WrappedConnection):
    """Notes what is exposed, as it is at that moment."""

    def __init__(self, inner: Any, seen: list[bytes]) -> None:
        super().__init__(inner)
        self._seen = seen

    def expose(self, view: memoryview) -> bytes:
        self._seen.append(bytes(view))
        return super().expose(view)


def test_a_peer_sees_records_only_and_nothing_that_was_there_before(target: kvstore.Store, endpoint: Endpoint) -> None:
    """A slot that is reused holds the last record's bytes until it is filled."""
    # Whole blocks: a short last one is not filled to its end.
    ids, tokens = prompt(20), 20
    seen: list[bytes] = []
    transport = WrappedTransport(endpoint.address, lambda connection, _: Watch(connection, seen))
    with kvstore.open(tiny_spec(), dram="8MiB") as store, Sender(settings=FAST) as sender:
        with store.write(ids, resume_at=(tokens,)) as writer:
            for record in writer.transaction.records:
                record.memory[:] = b"\xa5" * len(record.memory)
            handle = send_writer(writer, endpoint.address, sender=sender, find_transport=lambda _: transport)
            layers = list(store.spec.layers)
            put_layer(writer, layers[0], 0, tokens, (tokens,), 0, WHOLE)
            put_layer(writer, layers[1], 0, tokens // 2, (), 0, WHOLE)
            wait_until(lambda: endpoint.transfer_count == 1, "it was offered")
            put_layer(writer, layers[1], tokens // 2, tokens, (tokens,), 0, WHOLE)
            for layer in layers[2:]:
                put_layer(writer, layer, 0, tokens, (tokens,), 0, WHOLE)
            layouts = {record.layout.record_bytes for record in writer.transaction.records}
            writer.commit()
        handle.result(WITHIN_S)
        assert_same(store, target, ids, tokens)
        # All of a prompt that is whole is exposed, none of it beyond the records' ends.
        again = prompt(tokens, seed=9)
        store_prompt(store, again, seed=9)
        send_lease(
            store.read(match_all(store, again)), endpoint.address, sender=sender, find_transport=lambda _: transport
        ).result(WITHIN_S)
        assert_same(store, target, again, tokens)
    assert seen
    assert {len(view) for view in seen} <= layouts
    assert not any(b"\xa5" * 16 in view for view in seen)


def test_pieces_of_a_record_that_grows_are_carried(source: kvstore.Store) -> None:
    with lease_of(source) as lease:
        sent = LeaseSource(lease)
        records, outgoing = sent.records, Outgoing(sent)
        want = np.array([(number, 0, len(r.layout.pieces)) for number, r in enumerate(records)], WANT_RANGE)
        outgoing.want(want, granted_bytes=1 << 40, is_again=False)
        for number, record in enumerate(records):
            outgoing.pieces_whole(number, np.arange(len(record.layout.pieces)))
        outgoing.record_sealed(1, 0)
        frames = []
        while frame := outgoing.next_frame(TransferId(1, 1), 1, 1 << 22, is_remote=True):
            frames.append(frame)
        remote = {record for f in frames if f.header.flags & FLAG_REMOTE for record, _ in f.parts}
        carried = {record for f in frames if not f.header.flags & FLAG_REMOTE for record, _ in f.parts}
        assert (remote, carried) == ({1}, set(range(len(records))) - {1})


@pytest.mark.parametrize("priority", [-1, 256, 1.5, "high"])
def test_a_priority_that_no_offer_can_carry(source: kvstore.Store, endpoint: Endpoint, priority: Any) -> None:
    lease = lease_of(source)
    with Sender(settings=FAST) as sender, pytest.raises(TransferError, match=str(TRANSFER_PRIORITY_MAX)):
        send_lease(lease, endpoint.address, sender=sender, priority=priority)
    assert_released(lease)


def test_an_unexpected_error_ends_the_connection_and_is_logged(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def fail(*_: object) -> None:
        raise LookupError("nobody expects this")

    peer = Peer(source, endpoint)
    monkeypatch.setattr(Session, "_serve", fail)
    with caplog.at_level(logging.ERROR, "kvstore.transfer"):
        peer.link.send(Kind.PING, peer.transfer)
        wait_until(lambda: endpoint.connection_count == 0, "the connection ended")
    peer.link.close()
    assert "nobody expects this" in caplog.text
    wait_until(lambda: endpoint.transfer_count == 0, "its resume window had passed", 9.0)
    assert_settled(target)


def test_total_deadlines_have_a_limit(source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint) -> None:
    lease = lease_of(source)
    with Sender(settings=FAST) as sender, pytest.raises(TransferError, match=f"{TRANSFER_DEADLINE_MAX_S:g} s"):
        send_lease(lease, endpoint.address, sender=sender, total_deadline_s=TRANSFER_DEADLINE_MAX_S + 1)
    assert_released(lease)
    assert TransferSettings().total_deadline_s(1 << 50, is_complete=False) == TRANSFER_DEADLINE_MAX_S
    peer = Peer(source, endpoint, deadline_ms=(1 << 32) - 1)
    (entry,) = endpoint._inbox._entries.values()
    peer.link.close()
    assert entry.incoming.deadline.remaining_s() <= TRANSFER_DEADLINE_MAX_S
