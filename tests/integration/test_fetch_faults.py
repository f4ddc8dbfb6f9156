"""Fetches over networks that break, from nodes that die, and peers that break the rules."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import (
    ChecksumError,
    KVStoreError,
    PeerGoneError,
    PoolFullError,
    ProtocolError,
    TransferAbortedError,
    TransferError,
)
from kvstore.handle import Progress
from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX
from kvstore.registry import transport_for
from kvstore.spec import WHOLE, Shard
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Fetcher, TransferSettings
from kvstore.transfer.frames import NO_TRANSFER, FrameHeader, Kind, TransferId
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import WANT_RANGE, Abort, AbortCode, Hello, Want, WantStatus
from kvstore.transfer.offer import Offer
from kvstore.transfer.path_watch import PathWatch
from kvstore.transfer.query import Candidates, Fetch, Query
from kvstore.transfer.serving import Question, Serving
from tests.integration.tcp_proxy import CutAfter, Proxy
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    FAST,
    WITHIN_S,
    DeafConnection,
    Gate,
    Recorder,
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
    from collections.abc import Iterator

    from kvstore.pool import Candidate

IDS = prompt(BIG_TOKENS)
SHORT = replace(FAST, credit_bytes=64 << 10)
"""A requester that grants little: frames are small, and the node is never far ahead."""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(scope="module")
def there() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def here() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as store:
        yield store


@pytest.fixture
def node(there: kvstore.Store, scheme: str) -> Iterator[Endpoint]:
    with Endpoint(there.pool, address(scheme), settings=FAST, serves=True) as endpoint:
        yield endpoint


@pytest.fixture
def tcp(there: kvstore.Store) -> Iterator[Endpoint]:
    with Endpoint(there.pool, address("tcp"), settings=FAST, serves=True) as endpoint:
        yield endpoint


@pytest.fixture
def fetcher(here: kvstore.Store) -> Iterator[Fetcher]:
    with Fetcher(here.pool, settings=SHORT) as fetcher:
        yield fetcher


def nothing_is_served(node: Endpoint) -> None:
    wait_until(lambda: node.served_count == 0, "every served transfer has ended")


def total_bytes(store: kvstore.Store) -> int:
    best = match_all(store, IDS).best
    assert best is not None
    return best.size_bytes


# Connections that break


@pytest.mark.parametrize("cut_after_bytes", [40, 180, 400, 60_000, 700_000, 1_900_000])
def test_a_broken_fetch_is_resumed(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, cut_after_bytes: int
) -> None:
    """The first connection breaks after so many bytes: before the answer, before the offer, among the pieces."""
    number = itertools.count()

    def wrap(connection: Any, _: int) -> Any:
        return DeafConnection(connection, cut_after_bytes) if next(number) == 0 else connection

    recorder = Recorder()
    with Fetcher(here.pool, settings=SHORT, find_transport=lambda name: WrappedTransport(name, wrap)) as fetcher:
        handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, observer=recorder)
        if cut_after_bytes < 100:
            # Nothing was heard of the node before: that is an error at once, as for a transfer that is sent.
            with pytest.raises(PeerGoneError):
                handle.result(WITHIN_S)
            return
        report = handle.result(WITHIN_S)
    assert (report.tokens, report.reconnects) == (BIG_TOKENS, 1)
    assert report.received_bytes == recorder.received_bytes == total_bytes(there), "nothing crossed twice"
    assert_same(there, here, IDS, BIG_TOKENS)
    assert_settled(here, there)
    nothing_is_served(node)
    counted = node.serving_statistics()
    assert counted.served == counted.fetches - counted.failed == 1


@pytest.mark.parametrize("cut_after_bytes", [700, 50_000, 1_000_000])
def test_a_native_fetch_is_resumed(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher, cut_after_bytes: int
) -> None:
    with Proxy(
        tcp.address, lambda number: bytes, lambda number: CutAfter(cut_after_bytes) if number == 0 else bytes
    ) as proxy:
        report = fetcher.fetch(here.prompt([*IDS, 1]), proxy.address).result(WITHIN_S)
    assert (report.tokens, report.reconnects, report.received_bytes) == (BIG_TOKENS, 1, total_bytes(there))
    assert_same(there, here, IDS, BIG_TOKENS)
    assert_settled(here, there)
    nothing_is_served(tcp)
    assert tcp.serving_statistics().fetches == 1, "it was the same transfer"


def test_a_network_that_keeps_breaking(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    with Proxy(tcp.address, lambda number: bytes, lambda number: CutAfter(400_000)) as proxy:
        report = fetcher.fetch(here.prompt([*IDS, 1]), proxy.address).result(WITHIN_S)
    assert report.tokens == BIG_TOKENS
    assert report.reconnects > 2
    assert_same(there, here, IDS, BIG_TOKENS)
    assert_settled(here, there)
    nothing_is_served(tcp)


def test_a_node_that_restarts_is_asked_anew(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    """Another run of the node has another epoch and knows nothing of the question."""
    with Endpoint(there.pool, address("tcp"), settings=FAST, serves=True) as second:

        def backward(number: int) -> Any:
            return CutAfter(400_000) if number == 0 else bytes

        with Proxy(tcp.address, lambda number: bytes, backward) as proxy:
            slow = Recorder(0.002)
            handle = fetcher.fetch(here.prompt([*IDS, 1]), proxy.address, observer=slow)
            wait_until(lambda: bool(slow.received), "it is under way")
            proxy.retarget(second.address)
            report = handle.result(WITHIN_S)
        assert report.tokens == BIG_TOKENS
        assert report.reconnects >= 1
        assert (tcp.serving_statistics().fetches, second.serving_statistics().fetches) == (1, 1)
        assert_same(there, here, IDS, BIG_TOKENS)
        assert_settled(here, there)
        nothing_is_served(second)
    nothing_is_served(tcp)
    assert tcp.serving_statistics().failed == 1


def test_a_fetch_that_this_side_gave_up_while_it_was_cut_is_asked_anew(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    """Another fetch needed the space: what the node still sends is not taken up again, and the node is not blamed."""
    given_up = []

    def backward(number: int) -> Any:
        if number == 1:
            # Between one connection and the next.
            (incoming,) = fetcher._inbox.transfers()  # type: ignore[union-attr]
            abort = Abort(AbortCode.CLOSING, "another transfer needed the space")
            wait_until(
                lambda: fetcher._inbox.give_up(incoming.transfer, abort, only_detached=True),  # type: ignore[union-attr]
                "the first connection has ended",
            )
            given_up.append(incoming.transfer)
        return CutAfter(400_000) if number == 0 else bytes

    with Proxy(tcp.address, lambda number: bytes, backward) as proxy:
        report = fetcher.fetch(here.prompt([*IDS, 1]), proxy.address).result(WITHIN_S)
    assert report.tokens == BIG_TOKENS
    assert given_up
    assert report.transfer not in given_up
    assert_same(there, here, IDS, BIG_TOKENS)
    assert_settled(here, there)
    nothing_is_served(tcp)


def test_a_transfer_that_ended_is_not_taken_for_another_one(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that uses a transfer's name again brings nothing by it, and the fetch does not claim that it did."""
    first = fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S)
    assert first.transfer is not None
    here.pool.evict(here.prompt(IDS).path.key(0))
    monkeypatch.setattr(node._serving, "_counter", itertools.repeat(first.transfer.counter))
    with pytest.raises(ProtocolError, match="which was committed here before"):
        fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S)
    assert match_all(here, IDS).tokens == 0
    assert_settled(here)


def test_pieces_that_keep_arriving_damaged_end_the_fetch_by_name(here: kvstore.Store, scheme: str) -> None:
    strict = replace(FAST, damaged_pieces_max=5)
    with (
        kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as there,
        Endpoint(there.pool, address(scheme), settings=FAST, serves=True) as node,
        Fetcher(here.pool, settings=strict) as fetcher,
    ):
        store_prompt(there, IDS)
        with there.read(match_all(there, IDS)) as lease:
            record = lease.records[0]
            record.memory.cast("B")[int(record.layout.piece_offsets[0])] ^= 1
        with pytest.raises(ChecksumError, match=r"given up here.*look at the sender's memory"):
            fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S)
        assert match_all(here, IDS).tokens == 0
        assert_settled(here)
        nothing_is_served(node)


def test_a_question_that_the_node_has_forgotten_is_asked_anew(
    here: kvstore.Store, there: kvstore.Store, tcp: Endpoint, fetcher: Fetcher
) -> None:
    """It gave the transfer up, because nobody called back for longer than it waits."""
    with Proxy(tcp.address, lambda number: bytes, lambda number: CutAfter(400_000) if number == 0 else bytes) as proxy:
        slow = Recorder(0.002)
        handle = fetcher.fetch(here.prompt([*IDS, 1]), proxy.address, observer=slow)
        wait_until(lambda: tcp.served_count == 1, "it is being served")
        (served,) = tcp._serving._served.values()  # type: ignore[union-attr]
        served.connector.stop_waiting()
        assert handle.result(WITHIN_S).tokens == BIG_TOKENS
    assert_same(there, here, IDS, BIG_TOKENS)
    assert_settled(here, there)


def test_a_fetch_over_several_connections(there: kvstore.Store) -> None:
    spec = tiny_spec(4096)
    settings = TransferSettings(connections=3)
    with (
        kvstore.open(spec, dram="64MiB") as big,
        kvstore.open(spec, dram="64MiB") as here,
        Endpoint(big.pool, address("tcp"), serves=True) as node,
        Fetcher(here.pool, settings=settings) as fetcher,
        Proxy(node.address, lambda number: bytes) as proxy,
    ):
        ids = prompt(256)
        store_prompt(big, ids)
        slow = Recorder(0.0005)
        report = fetcher.fetch(here.prompt([*ids, 1]), proxy.address, observer=slow).result(WITHIN_S)
        assert (report.tokens, report.reconnects) == (256, 0)
        assert proxy.connection_count == 3
        assert report.received_bytes == slow.received_bytes
        assert_same(big, here, ids, 256)
        assert_settled(big, here)
        nothing_is_served(node)
        wait_until(lambda: node.connection_count == 0, "its connections have ended")


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_one_of_several_connections_breaks(broken: int) -> None:
    spec = tiny_spec(4096)
    settings = TransferSettings(progress_deadline_s=3.0, connections=3)

    def backward(number: int) -> Any:
        # On a busy machine the others may leave little to the first one.
        return CutAfter(1_500_000 if broken else 200_000) if number == broken else bytes

    with (
        kvstore.open(spec, dram="64MiB") as big,
        kvstore.open(spec, dram="64MiB") as here,
        Endpoint(big.pool, address("tcp"), settings=settings, serves=True) as node,
        Fetcher(here.pool, settings=settings) as fetcher,
        Proxy(node.address, lambda number: bytes, backward) as proxy,
    ):
        ids = prompt(256)
        store_prompt(big, ids)
        report = fetcher.fetch(here.prompt([*ids, 1]), proxy.address, observer=Recorder(0.0005)).result(WITHIN_S)
        assert report.tokens == 256
        assert (report.reconnects > 0) == (broken == 0)
        assert_same(big, here, ids, 256)
        assert_settled(big, here)
        nothing_is_served(node)
        assert node.serving_statistics().fetches == 1


def test_a_further_connection_that_breaks_before_its_number_is_known() -> None:
    """What the node has sent over it cannot be named: the attachment begins anew, with one connection."""
    spec = tiny_spec(4096)
    with (
        kvstore.open(spec, dram="64MiB") as big,
        kvstore.open(spec, dram="64MiB") as here,
        Endpoint(big.pool, address("tcp"), serves=True) as node,
        Fetcher(here.pool) as fetcher,
        Proxy(node.address, lambda number: bytes, lambda number: CutAfter(0) if number == 1 else bytes) as proxy,
    ):
        ids = prompt(256)
        store_prompt(big, ids)
        report = fetcher.fetch(here.prompt([*ids, 1]), proxy.address, observer=Recorder(0.002)).result(WITHIN_S)
        assert (report.tokens, report.reconnects) == (256, 1)
        assert proxy.connection_count == 3
        assert_same(big, here, ids, 256)
        assert_settled(big, here)
        nothing_is_served(node)


@pytest.mark.parametrize("reason", ["paced", "told to"])
def test_a_node_that_sends_over_one_connection(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no further connection, and the requester goes on with the first."""
    spec = tiny_spec(4096)
    options = TransportOptions(pacing_bytes_per_s=32 << 20 if reason == "paced" else None)
    settings = TransferSettings(connections=1 if reason == "told to" else None)
    with (
        kvstore.open(spec, dram="64MiB") as big,
        kvstore.open(spec, dram="64MiB") as here,
        Endpoint(big.pool, address("tcp"), transport=options, settings=settings, serves=True) as node,
        Fetcher(here.pool) as fetcher,
        Proxy(node.address, lambda number: bytes) as proxy,
    ):
        ids = prompt(256)
        store_prompt(big, ids)
        opened = PathWatch.opened
        taken = 0

        def note(self: PathWatch, connection: Any) -> None:
            nonlocal taken
            taken += 1
            opened(self, connection)

        monkeypatch.setattr(PathWatch, "opened", note)
        report = fetcher.fetch(here.prompt([*ids, 1]), proxy.address).result(WITHIN_S)
        assert (report.tokens, report.reconnects) == (256, 0)
        assert proxy.connection_count == 2
        assert taken == 1
        assert_same(big, here, ids, 256)
        nothing_is_served(node)


def test_a_node_that_has_no_use_for_further_connections(there: kvstore.Store, here: kvstore.Store) -> None:
    """A further connection that no attachment waits for is answered by number 0."""
    settings = TransferSettings(progress_deadline_s=2.0, connect_deadline_s=0.5)
    with Endpoint(there.pool, address("tcp"), settings=settings, serves=True) as node, Guest(node, here) as guest:
        hello = make_hello(here.spec, guest.question.epoch, FAST, guest.link.connection, can_join=True)
        other = FrameLink(guest.dial(), 5.0)
        other.send(Kind.HELLO, TransferId(guest.theirs.boot_epoch, 99), 1, hello.pack())
        header = other.receive_header(Deadline.after(WITHIN_S))
        assert (header.kind, header.generation) == (Kind.HELLO, 0)
        other.close()


def test_a_further_connection_of_another_peer_is_not_taken() -> None:
    """A node's transfers and generations are easily guessed; whoever joins one must be who asked for it."""
    spec = tiny_spec(4096)
    settings = TransferSettings(connections=2)
    with (
        kvstore.open(spec, dram="64MiB") as big,
        kvstore.open(spec, dram="64MiB") as here,
        Endpoint(big.pool, address("tcp"), settings=settings, serves=True) as node,
    ):
        ids = prompt(256)
        store_prompt(big, ids)
        with Guest(node, here, can_join=True) as guest:
            guest.query(ids)
            header, payload = guest.ask(Kind.FETCH, Fetch(256, 60_000, 128, connections=2).pack())
            assert header.kind is Kind.OFFER
            records = Offer.parse(payload).records
            every = np.zeros(len(records), WANT_RANGE)
            every["record"], every["count"] = np.arange(len(records)), records["pieces"]
            want = Want(WantStatus.PIECES, 64 << 20, every)
            # From here on a branch of the node waits for a further connection of generation 1.
            guest.link.send(Kind.WANT, header.transfer, 1, want.pack())
            assert guest.link.receive_header(Deadline.after(WITHIN_S)).kind is Kind.DATA
            numbers = []
            for epoch in (guest.question.epoch + 1, guest.question.epoch):
                link = FrameLink(guest.dial(), 5.0)
                hello = make_hello(spec, epoch, FAST, link.connection, can_join=True)
                link.send(Kind.HELLO, header.transfer, 1, hello.pack())
                numbers.append(link.receive_header(Deadline.after(WITHIN_S)).generation)
                link.close()
            assert numbers == [0, 1]


# Nodes and requesters that die


def test_a_node_killed_in_the_middle_is_noticed(here: kvstore.Store, fetcher: Fetcher) -> None:
    with child("serve") as process:
        slow = Recorder()
        handle = fetcher.fetch(here.prompt([*IDS, 1]), process.line, observer=slow)
        wait_until(lambda: bool(slow.received), "it is under way")
        start_s = time.monotonic()
        process.kill()
        with pytest.raises(PeerGoneError):
            handle.result(WITHIN_S)
    assert time.monotonic() - start_s < WITHIN_S / 2
    assert match_all(here, IDS).tokens == 0
    assert_settled(here)


def test_a_stopped_node_is_noticed(here: kvstore.Store, fetcher: Fetcher) -> None:
    with child("serve") as process:
        slow = Recorder()
        handle = fetcher.fetch(here.prompt([*IDS, 1]), process.line, observer=slow)
        wait_until(lambda: bool(slow.received), "it is under way")
        process.stop()
        start_s = time.monotonic()
        with pytest.raises(PeerGoneError):
            handle.result(WITHIN_S)
        assert time.monotonic() - start_s < WITHIN_S / 2
    assert_settled(here)


def test_a_node_stopped_before_the_answer_is_noticed(here: kvstore.Store) -> None:
    with child("serve") as process, Fetcher(here.pool, settings=replace(FAST, connect_deadline_s=0.5)) as fetcher:
        process.stop()
        with pytest.raises(PeerGoneError):
            fetcher.fetch(here.prompt([*IDS, 1]), process.line).result(WITHIN_S)
        with pytest.raises(PeerGoneError):
            fetcher.query(here.prompt(IDS), process.line, deadline_s=WITHIN_S).result(WITHIN_S)


@pytest.mark.parametrize("is_killed", [True, False])
def test_a_requester_that_is_gone_frees_everything(there: kvstore.Store, is_killed: bool) -> None:
    """Killed or stopped: the node's lease ends in bounded time."""
    options = TransportOptions(pacing_bytes_per_s=1 << 20)
    with Endpoint(there.pool, address("tcp"), settings=FAST, transport=options, serves=True) as node:
        with child("fetch", node.address) as process:
            wait_until(lambda: node.served_count == 1, "it is being served")
            if is_killed:
                process.kill()
            else:
                process.stop()
            nothing_is_served(node)
            wait_until(lambda: node.connection_count == 0, "its connections have ended")
        assert node.serving_statistics().failed == 1


def test_a_requester_that_falls_silent_frees_everything(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint
) -> None:
    with Guest(node, here) as guest:
        guest.query(IDS)
        header, _ = guest.ask(Kind.FETCH, Fetch(guest.tokens, 60_000, 128).pack())
        assert header.kind is Kind.OFFER
        assert node.served_count == 1
        nothing_is_served(node)
    wait_until(lambda: node.connection_count == 0, "its connection has ended")


# Giving up


def test_a_requester_cancels(here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher) -> None:
    slow = Recorder(0.02)
    handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, observer=slow)
    wait_until(lambda: bool(slow.received), "it is under way")
    handle.cancel("the user left")
    with pytest.raises(TransferAbortedError, match="the user left"):
        handle.result(WITHIN_S)
    assert_settled(here)
    nothing_is_served(node)
    assert match_all(here, IDS).tokens == 0
    assert fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S).tokens == BIG_TOKENS
    assert_same(there, here, IDS, BIG_TOKENS)


def test_cancelling_at_any_moment_leaves_nothing(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher
) -> None:
    generator = random.Random(4)
    for _ in range(8):
        handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, observer=Recorder(0.0005))
        time.sleep(generator.random() * 0.02)
        handle.cancel()
        try:
            handle.result(WITHIN_S)
        except TransferAbortedError:
            continue
        here.pool.evict(here.prompt(IDS).path.key(0))
    wait_until(lambda: fetcher.running_count == 0, "every fetch has ended")
    assert_settled(here)
    nothing_is_served(node)


def test_a_node_closes(here: kvstore.Store, there: kvstore.Store, scheme: str, fetcher: Fetcher) -> None:
    with Endpoint(there.pool, address(scheme), settings=FAST, serves=True) as node:
        slow = Recorder(0.02)
        handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, observer=slow)
        wait_until(lambda: bool(slow.received), "it is under way")
        node.close()
        with pytest.raises(TransferAbortedError, match="closing"):
            handle.result(WITHIN_S)
    assert node.served_count == 0
    assert_settled(here)


def test_a_store_closes(there: kvstore.Store, node: Endpoint) -> None:
    with kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as here:
        slow = Recorder(0.004)
        handle = here.fetch([*IDS, 1], node.address, observer=slow)
        wait_until(lambda: bool(slow.received), "it is under way")
    with pytest.raises(TransferAbortedError, match="closing"):
        handle.result(WITHIN_S)
    nothing_is_served(node)


def test_the_total_deadline_holds(here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher) -> None:
    handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, total_deadline_s=0.3, observer=Recorder(0.02))
    with pytest.raises(TransferAbortedError, match="deadline"):
        handle.result(WITHIN_S)
    assert_settled(here)
    nothing_is_served(node)


def test_the_total_deadline_is_the_requesters_whatever_the_node_says(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Serving.begin

    def begin_for_long(self: Serving, question: Question, fetch: Fetch, address: str) -> Any:
        return begin(self, question, replace(fetch, total_deadline_ms=3_600_000), address)

    monkeypatch.setattr(Serving, "begin", begin_for_long)
    slow = Recorder(0.1)
    start_s = time.monotonic()
    handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, total_deadline_s=0.3, observer=slow)
    with pytest.raises(TransferAbortedError, match="deadline"):
        handle.result(WITHIN_S)
    assert slow.received_bytes < total_bytes(there)
    assert time.monotonic() - start_s < WITHIN_S / 2
    assert_settled(here)
    nothing_is_served(node)


def test_a_fetch_says_how_far_it_has_come(here: kvstore.Store, node: Endpoint, fetcher: Fetcher) -> None:
    gate = Gate()
    handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address, observer=gate)
    assert handle.progress().state in ("connecting", "moving")
    wait_until(lambda: handle.progress().done_bytes > 0, "some of it is here")
    moving = handle.progress()
    assert 0 < moving.done_bytes < moving.total_bytes
    gate.is_open.set()
    report = handle.result(WITHIN_S)
    assert handle.progress() == Progress(report.received_bytes, moving.total_bytes, "done")


def test_a_fetch_that_waits_for_space_can_be_cancelled(there: kvstore.Store, tcp: Endpoint) -> None:
    """Its place in the line is given up at once, not when it would have been its turn."""
    patient = TransferSettings(progress_deadline_s=4 * WITHIN_S, queue_deadline_s=2 * WITHIN_S)
    with (
        kvstore.open(tiny_spec(BIG_WIDTH), dram="64MiB") as here,
        Endpoint(there.pool, address("tcp"), settings=patient, serves=True) as node,
        Fetcher(here.pool, settings=patient) as fetcher,
        here.write(prompt(BIG_TOKENS, seed=5)),
    ):
        reserved_bytes = here.statistics().reserved_bytes
        begin = here.pool.begin

        def full(*arguments: Any, **options: Any) -> Any:
            raise PoolFullError("no room")

        here.pool.begin = full  # type: ignore[method-assign]
        handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address)
        wait_until(lambda: fetcher._inbox is not None and bool(fetcher._inbox.transfers()), "it waits for space")
        handle.cancel("no longer wanted")
        with pytest.raises(TransferAbortedError, match="no longer wanted"):
            handle.result(WITHIN_S)
        here.pool.begin = begin  # type: ignore[method-assign]
        assert here.statistics().reserved_bytes == reserved_bytes
        nothing_is_served(node)


def test_an_unanswered_question_can_be_cancelled(here: kvstore.Store) -> None:
    """Something accepts and says nothing."""
    transport = transport_for("memory://")
    with_nobody = transport.listen(address("memory"), TransportOptions())
    try:
        with Fetcher(here.pool, settings=replace(FAST, connect_deadline_s=0.3)) as fetcher:
            handle = fetcher.query(here.prompt(prompt(8)), with_nobody.address, deadline_s=WITHIN_S)
            connection = with_nobody.accept(Deadline.after(WITHIN_S))
            handle.cancel("no longer wanted")
            with pytest.raises(KVStoreError, match="no longer wanted"):
                handle.result(WITHIN_S)
            connection.close()
    finally:
        with_nobody.close()


# Peers that break the rules


class Guest:
    """A requester made by hand."""

    def __init__(
        self, node: Endpoint, store: kvstore.Store, question: TransferId | None = None, *, can_join: bool = False
    ) -> None:
        self.node, self.store = node, store
        self.question = question or TransferId(random.getrandbits(60) + 1, 1)
        self.tokens = 0
        self.link = FrameLink(self.dial(), 5.0)
        hello = make_hello(store.spec, self.question.epoch, FAST, self.link.connection, can_join=can_join)
        self.link.send(Kind.HELLO, NO_TRANSFER, payload=hello.pack())
        header = self.link.receive_header(Deadline.after(WITHIN_S))
        self.theirs = Hello.parse(self.link.receive_payload(header))

    def dial(self) -> Any:
        transport = transport_for(self.node.address)
        return transport.connect(self.node.address, TransportOptions(), Deadline.after(WITHIN_S))

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def ask(self, kind: Kind, payload: bytes, question: TransferId | None = None) -> tuple[FrameHeader, memoryview]:
        self.link.send(kind, question or self.question, payload=payload)
        header = self.link.receive_header(Deadline.after(WITHIN_S))
        return header, self.link.receive_payload(header)

    def query(self, ids: list[int]) -> Candidates:
        header, payload = self.ask(Kind.QUERY, Query.of(self.store.prompt([*ids, 1]), WHOLE, None).pack())
        assert (header.kind, header.transfer) == (Kind.CANDIDATES, self.question)
        candidates = Candidates.parse(payload)
        self.tokens = candidates.candidates[0].tokens if candidates.candidates else 0
        return candidates

    def is_refused(self, kind: Kind, payload: bytes, code: AbortCode, question: TransferId | None = None) -> None:
        """The node says why, and the connection stays in use."""
        header, reason = self.ask(kind, payload, question)
        assert header.kind is Kind.ABORT
        assert Abort.parse(reason).code is code
        self.link.send(Kind.PING, NO_TRANSFER)
        assert self.link.receive_header(Deadline.after(WITHIN_S)).kind is Kind.PONG

    def is_closed(self, kind: Kind, payload: bytes, question: TransferId | None = None) -> None:
        """The node ends the connection without a word."""
        with pytest.raises(KVStoreError):
            self.ask(kind, payload, question)


def test_what_a_guest_may_not_do(here: kvstore.Store, there: kvstore.Store, node: Endpoint) -> None:
    fetch = Fetch(BIG_TOKENS, 60_000, 128).pack()
    with Guest(node, here) as guest:
        # FETCH before any question, of another question, of what is not there.
        guest.is_refused(Kind.FETCH, fetch, AbortCode.UNKNOWN_TRANSFER)
        assert guest.query(IDS).candidates[0].tokens == BIG_TOKENS
        other = TransferId(guest.question.epoch, 2)
        guest.is_refused(Kind.FETCH, fetch, AbortCode.UNKNOWN_TRANSFER, other)
        header, payload = guest.ask(Kind.FETCH, Fetch(8, 60_000, 128).pack())
        assert header.kind is Kind.CANDIDATES
        assert Candidates.parse(payload).candidates[0].tokens == BIG_TOKENS
        # A share that the model does not have.
        impossible = Query(np.array([1, 2], np.uint32), shard=Shard(0, 3)).pack()
        guest.is_refused(Kind.QUERY, impossible, AbortCode.INVALID)
        guest.is_refused(Kind.FETCH, fetch, AbortCode.UNKNOWN_TRANSFER)
        guest.is_refused(Kind.CANDIDATES, Candidates().pack(), AbortCode.UNSUPPORTED)
    for payload in (b"", b"nonsense", fetch):
        with Guest(node, here) as guest:
            guest.is_closed(Kind.QUERY, payload)
    for payload in (b"", bytes(16), Fetch(8, 1, 0, CONNECTIONS_PER_TRANSFER_MAX + 1).pack()):
        with Guest(node, here) as guest:
            guest.query(IDS)
            guest.is_closed(Kind.FETCH, payload)
    with Guest(node, here) as guest:
        # In the name of another node.
        guest.is_closed(Kind.QUERY, Query.of(here.prompt(IDS), WHOLE, None).pack(), TransferId(7, 1))
    assert node.served_count == 0
    assert node.serving_statistics().fetches == 0
    assert node.last_error is not None


def test_a_second_connection_takes_over(here: kvstore.Store, there: kvstore.Store, node: Endpoint) -> None:
    """A requester that comes back while its old connection still looks alive gets the same offer, byte for byte."""
    fetch = Fetch(BIG_TOKENS, 60_000, 128).pack()
    with Guest(node, here) as guest, Guest(node, here) as second:
        guest.query(IDS)
        header, offer = guest.ask(Kind.FETCH, fetch)
        assert header.kind is Kind.OFFER
        assert header.transfer.epoch == guest.theirs.boot_epoch
        # Only who said HELLO with the question's epoch may go on with it.
        second.is_closed(Kind.FETCH, fetch, guest.question)
        assert node.served_count == 1
        with Guest(node, here, guest.question) as again:
            again_header, again_offer = again.ask(Kind.FETCH, fetch)
            assert (again_header.transfer, bytes(again_offer)) == (header.transfer, bytes(offer))
            assert Offer.parse(offer).resume_tokens == (BIG_TOKENS,)
            with pytest.raises(PeerGoneError):
                guest.link.receive_header(Deadline.after(WITHIN_S))
    nothing_is_served(node)


def test_one_question_is_served_once(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two connections that ask for the same at the same moment: one of them gets it, and the other one is told."""
    fetch = Fetch(BIG_TOKENS, 60_000, 128).pack()
    # Both look before either has begun.
    monkeypatch.setattr(Serving, "resume", lambda self, identity: None)
    with Guest(node, here) as guest, Guest(node, here, guest.question) as second:
        guest.query(IDS)
        second.query(IDS)
        header, _ = guest.ask(Kind.FETCH, fetch)
        assert header.kind is Kind.OFFER
        second.is_refused(Kind.FETCH, fetch, AbortCode.STALE_GENERATION)
        assert (node.served_count, node.serving_statistics().fetches) == (1, 1)
    nothing_is_served(node)
    wait_until(lambda: node.connection_count == 0, "its connections have ended")


def test_a_node_brings_nothing_that_was_not_asked_for(
    here: kvstore.Store, there: kvstore.Store, node: Endpoint, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = prompt(12, seed=9)
    if not match_all(there, other):
        store_prompt(there, other, seed=9)

    def foreign(self: Serving, question: Question, tokens: int) -> Candidate:
        best = match_all(there, other).best
        assert best is not None
        return best

    monkeypatch.setattr(Serving, "_candidate", foreign)
    with pytest.raises(TransferError, match="another prefix"):
        fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S)
    assert match_all(here, other).tokens == match_all(here, IDS).tokens == 0
    assert here.statistics().committed_bytes == 0
    assert_settled(here)
    nothing_is_served(node)


def test_a_node_that_claims_too_much(
    here: kvstore.Store, node: Endpoint, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume point past the prompt is no answer."""
    from kvstore.transfer.query import RemoteCandidate

    monkeypatch.setattr(
        Serving, "candidates", lambda self, question: Candidates((RemoteCandidate(1 << 20, "dram", 1),))
    )
    with pytest.raises(ProtocolError, match="past what was asked"):
        fetcher.query(here.prompt(prompt(8)), node.address, deadline_s=WITHIN_S).result(WITHIN_S)
    with pytest.raises(ProtocolError, match="past what was asked"):
        fetcher.fetch(here.prompt(prompt(8)), node.address).result(WITHIN_S)


def test_fuzzed_questions_do_no_harm(here: kvstore.Store, there: kvstore.Store, tcp: Endpoint) -> None:
    generator = random.Random(11)
    intact = [
        (Kind.QUERY, Query.of(here.prompt([*prompt(20), 1]), WHOLE, None).pack()),
        (Kind.FETCH, Fetch(BIG_TOKENS, 500, 128).pack()),
        (Kind.CANDIDATES, Candidates().pack()),
    ]
    for _ in range(40):
        with Guest(tcp, here) as guest:
            try:
                for _ in range(3):
                    kind, packed = generator.choice(intact)
                    damaged = bytearray(packed)
                    for _ in range(generator.randint(0, 3)):
                        damaged[generator.randrange(len(damaged))] = generator.randrange(256)
                    header, _ = guest.ask(kind, bytes(damaged))
                    assert header.kind in (Kind.CANDIDATES, Kind.ABORT, Kind.OFFER)
            except KVStoreError:
                continue
    nothing_is_served(tcp)
    wait_until(lambda: tcp.connection_count == 0, "its connections have ended")
    with Fetcher(here.pool, settings=FAST) as fetcher:
        assert fetcher.fetch(here.prompt([*IDS, 1]), tcp.address).result(WITHIN_S).tokens == BIG_TOKENS
