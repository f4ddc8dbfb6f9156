"""Sparse records between nodes: streamed, resumed, found there by those who accept coverage, refused where unknown."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
import kvstore.transfer
from kvstore import Coverage
from kvstore.errors import TransferError
from kvstore.pool import HandOver
from kvstore.spec import ReuseRule
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import check_lease, hybrid, put_all, put_states, put_tokens, tensors_of
from kvstore.transfer import Endpoint, Sender, session
from kvstore.transfer.messages import Feature, Hello
from tests.integration.transfer_nodes import (
    FAST,
    WITHIN_S,
    CutConnection,
    Recorder,
    WrappedTransport,
    address,
    assert_settled,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Connection

SPEC = hybrid(4)
IDS = tuple(range(38))
MORE = (*IDS, 99)
COVERAGE = Coverage.of_masks({1: np.arange(38) % 3 != 1, 3: np.arange(38) < 22})
LATER = Coverage.of_ranges(38, {3: [(0, 22), (30, 38)]})
"""Whole up to 20 tokens."""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(params=["tcp", "tcp, python", "memory"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, path = request.param.partition(", ")
    monkeypatch.setenv("KVSTORE_TRANSFER", path)
    return str(name)


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="8MiB") as store:
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="8MiB") as store:
        yield store


@pytest.fixture
def endpoint(target: kvstore.Store, scheme: str) -> Iterator[Endpoint]:
    with Endpoint(target.pool, address(scheme), settings=FAST) as endpoint:
        yield endpoint


@pytest.fixture
def sender() -> Iterator[Sender]:
    with Sender(settings=FAST) as sender:
        yield sender


def store_prompt(store: kvstore.Store, coverage: Coverage | None = COVERAGE, **options: object) -> None:
    with store.write(IDS, coverage=coverage, resume_at=(8, 38), **options) as writer:  # type: ignore[arg-type]
        put_all(writer)
        writer.commit()


def send(sender: Sender, store: kvstore.Store, to: str, **options: object) -> kvstore.transfer.TransferReport:
    lease = store.read(store.match(MORE, accept_coverage=True))
    handle = kvstore.transfer.send_lease(lease, to, sender=sender, **options)  # type: ignore[arg-type]
    return handle.result(WITHIN_S)


def check_arrived(target: kvstore.Store, coverage: Coverage = COVERAGE) -> None:
    match = target.match(MORE, accept_coverage=True)
    assert (match.tokens, match.coverage(SPEC)) == (38, coverage)
    named = target.match(MORE, coverage=coverage.followed_by(Coverage(1)))
    assert (named.tokens, named.coverage(SPEC)) == (38, coverage)
    with target.read(match, verify=True) as lease:
        check_lease(lease, target.prompt(IDS))
    assert target.match(MORE).tokens < 38


def test_a_sparse_resume_point_arrives(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source)
    send(sender, source, endpoint.address)
    check_arrived(target)
    assert not target.match(MORE)
    again = send(sender, source, endpoint.address)
    assert (again.pieces, again.total_bytes) == (0, 0)
    assert_settled(source, target)


def test_whole_blocks_before_the_first_gap_are_not_sent_twice(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source, LATER)
    first = send(sender, source, endpoint.address)
    check_arrived(target, LATER)
    store_prompt(source, Coverage.of_ranges(38, {3: [(0, 24)]}))
    second = send(sender, source, endpoint.address)
    assert 0 < second.bytes_by_group["attention"] < first.bytes_by_group["attention"]
    assert_settled(source, target)


def test_both_kinds_stand_side_by_side_at_the_receiver(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    store_prompt(source)
    send(sender, source, endpoint.address)
    store_prompt(source, None)
    report = send(sender, source, endpoint.address)
    assert report.total_bytes > 0
    match = target.match(MORE)
    assert (match.tokens, match.is_exact) == (38, True)
    with target.read(match, verify=True) as lease:
        check_lease(lease, target.prompt(IDS))
    found = target.match(MORE, accept_coverage=True)
    assert [(each.tokens, each.is_exact) for each in found.candidates][:2] == [(38, True), (38, False)]


def test_pieces_leave_as_they_become_whole(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender
) -> None:
    """In any order and chunks; pieces of which nothing is held are there from the start."""
    recorder, order = Recorder(), random.Random(3)
    puts = []
    for layer, _ in tensors_of(SPEC, ReuseRule.ATTENTION):
        ends = [0, *sorted(order.sample(range(1, 38), 3)), 38]
        puts.extend((layer, start, stop) for start, stop in pairwise(ends))
    order.shuffle(puts)
    with (
        Endpoint(target.pool, address(scheme), settings=FAST, observer=recorder) as endpoint,
        source.write(IDS, coverage=COVERAGE, resume_at=(8, 38)) as writer,
    ):
        handle = kvstore.transfer.send_writer(writer, endpoint.address, sender=sender)
        for layer, start, stop in puts:
            seen = recorder.received_bytes
            put_tokens(writer, start, stop, layer=layer)
            if layer == 1 and stop // 4 > -(-start // 4):
                wait_until(lambda seen=seen: recorder.received_bytes > seen, "a whole block arrived")  # type: ignore[misc]
        assert not target.match(MORE, accept_coverage=True)
        put_states(writer, 8)
        put_states(writer, 38)
        writer.commit()
        handle.result(WITHIN_S)
    check_arrived(target)
    assert_settled(source, target)


@pytest.mark.parametrize("cut_after_bytes", [300, 1_200, 2_400])
def test_a_broken_sparse_transfer_is_resumed(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, cut_after_bytes: int
) -> None:
    store_prompt(source)

    def wrap(connection: Connection, number: int) -> Connection:
        return CutConnection(connection, cut_after_bytes) if number == 0 else connection

    transport = WrappedTransport(endpoint.address, wrap)
    report = send(sender, source, endpoint.address, find_transport=lambda _: transport)
    assert report.reconnects == 1
    check_arrived(target)
    assert_settled(source, target)


def test_a_hand_over_carries_its_coverage(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    exact, accepting = target.accept(IDS), target.accept(IDS, accept_coverage=True)
    with source.write(IDS, coverage=COVERAGE) as writer:
        handle = kvstore.transfer.send_writer(writer, endpoint.address, sender=sender, is_transient=True)
        put_all(writer)
        writer.commit(handover=HandOver(5, b"logits"))
        handle.result(WITHIN_S)
    arrival = accepting.result(WITHIN_S)
    assert (arrival.handover.first_token, arrival.lease.coverage) == (5, COVERAGE)
    with arrival.lease as lease:
        check_lease(lease, target.prompt(IDS))
    assert not exact.done()
    exact.cancel()


def _without_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node that answers is of a release that knows nothing of coverage."""
    make = session.make_hello

    def older(*arguments: object, **options: object) -> Hello:
        hello = make(*arguments, **options)  # type: ignore[arg-type]
        features = hello.features & ~Feature.SPARSE
        return Hello(**{**vars(hello), "features": features})

    monkeypatch.setattr(session, "make_hello", older)


def test_a_peer_that_knows_no_coverage_is_sent_nothing(
    source: kvstore.Store, target: kvstore.Store, scheme: str, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_sparse(monkeypatch)
    recorder = Recorder()
    store_prompt(source)
    with Endpoint(target.pool, address(scheme), settings=FAST, observer=recorder) as endpoint:
        with pytest.raises(TransferError, match="does not take sparse records"):
            send(sender, source, endpoint.address)
        assert endpoint.statistics().refused == endpoint.statistics().aborted == recorder.received_bytes == 0
        store_prompt(source, None)
        send(sender, source, endpoint.address)
    assert target.match(MORE).tokens == 38
    assert_settled(source, target)


def test_a_whole_resume_point_needs_no_feature(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender
) -> None:
    """What every layer holds is offered as it always was: an older peer takes it."""
    store_prompt(source, LATER)
    lease = source.read(source.match(MORE[:21]))
    assert (lease.tokens, lease.is_exact) == (8, True)
    kvstore.transfer.send_lease(lease, endpoint.address, sender=sender).result(WITHIN_S)
    assert target.match(MORE).tokens == 8


def test_an_offer_of_sparse_records_needs_the_feature(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint, sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender that offers coverage without having said that it would breaks a rule."""
    from kvstore.transfer import connector

    make = connector.make_hello
    monkeypatch.setattr(
        connector,
        "make_hello",
        lambda *arguments, **options: Hello(
            **{**vars(hello := make(*arguments, **options)), "features": hello.features & ~Feature.SPARSE}
        ),
    )
    store_prompt(source)
    with pytest.raises(TransferError, match="INVALID"):
        send(sender, source, endpoint.address)
    assert_settled(source, target)
