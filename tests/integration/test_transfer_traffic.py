"""Transfers that share a sender: what is urgent overtakes, equals share, and nobody waits for somebody else's peer."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore.limits import TRANSFER_PRIORITY_DEFAULT
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferObserver, TransferSettings, TransferState, send_lease
from tests.integration.slow_link import SlowLink
from tests.integration.transfer_nodes import (
    BIG_WIDTH,
    WITHIN_S,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.handle import Handle
    from kvstore.transfer import TransferReport

SPEC = tiny_spec(BIG_WIDTH, block_tokens=32)
LOOPBACK = "tcp://127.0.0.1:0"
LINK_BYTES_PER_S = 16 << 20
URGENT, BACKGROUND = 0, 255
LONG, SHORT, OTHER = prompt(2048, seed=1), prompt(512, seed=2), prompt(2048, seed=3)
"""About 16, 4 and 16 MiB."""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(scope="module")
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="64MiB") as store:
        store_prompt(store, LONG, seed=1)
        store_prompt(store, SHORT, seed=2)
        store_prompt(store, OTHER, seed=3)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="64MiB") as store:
        yield store


@pytest.fixture
def endpoint(target: kvstore.Store) -> Iterator[Endpoint]:
    with Endpoint(target.pool, LOOPBACK) as endpoint:
        yield endpoint


def send(store: kvstore.Store, ids: list[int], to: str, sender: Sender, **options: Any) -> Handle[TransferReport]:
    return send_lease(store.read(match_all(store, ids)), to, sender=sender, **options)


def test_an_urgent_transfer_overtakes_a_background_one_on_a_slow_link(
    source: kvstore.Store, target: kvstore.Store, endpoint: Endpoint
) -> None:
    with (
        SlowLink(endpoint.address, LINK_BYTES_PER_S) as link,
        Sender(settings=TransferSettings(connections=1)) as sender,
    ):
        background = send(source, LONG, link.address, sender, priority=BACKGROUND)
        wait_until(lambda: link.bytes_of({0}) > 2 << 20, "the background transfer was well under way")
        urgent = send(source, SHORT, link.address, sender, priority=URGENT)
        report = urgent.result(WITHIN_S)
        assert not background.done()
        # From the first to the last of the urgent bytes hardly any others have passed: what had been handed to the
        # kernel, and the share that keeps the background alive.
        own = [place for place, part in enumerate(link.passed) if part.connection == 1 and part.size_bytes > 4096]
        between = sum(part.size_bytes for part in link.passed[own[0] : own[-1]] if part.connection == 0)
        assert between < report.total_bytes / 2, (between, report.total_bytes)
        assert background.result(WITHIN_S).reconnects == 0
    assert_same(source, target, LONG, len(LONG))
    assert_same(source, target, SHORT, len(SHORT))
    assert_settled(source, target)


def test_a_background_transfer_goes_on_beside_urgent_ones(source: kvstore.Store, endpoint: Endpoint) -> None:
    """The share of those that wait is in bytes: with so many urgent ones before it, some must have passed."""
    with (
        SlowLink(endpoint.address, LINK_BYTES_PER_S) as link,
        Sender(settings=TransferSettings(connections=1)) as sender,
    ):
        urgent = send(source, LONG, link.address, sender, priority=URGENT)
        wait_until(lambda: link.bytes_of({0}) > 1 << 20, "the urgent transfer was well under way")
        background = send(source, SHORT, link.address, sender, priority=BACKGROUND)
        urgent.result(WITHIN_S)
        assert link.bytes_of({1}) > 256 << 10
        background.result(WITHIN_S)


def test_equals_share_a_link_by_bytes_and_not_by_connections(source: kvstore.Store, endpoint: Endpoint) -> None:
    """One has one connection, the other five. Left alone, the link would give the other five times as much."""
    with (
        SlowLink(endpoint.address, LINK_BYTES_PER_S) as link,
        Sender(settings=TransferSettings(connections=1)) as sender,
    ):
        one = send(source, LONG, link.address, sender)
        wait_until(lambda: link.bytes_of({0}) > 0, "the first had begun")
        sender.settings = TransferSettings(connections=5)
        many = send(source, OTHER, link.address, sender)
        for handle in (one, many):
            handle.result(WITHIN_S)
    last = {part.connection: place for place, part in enumerate(link.passed)}
    both = link.passed[: min(last[0], max(last[number] for number in last if number))]
    by_one = sum(part.size_bytes for part in both if part.connection == 0)
    by_many = sum(part.size_bytes for part in both if part.connection != 0)
    # What was handed over before both were at work left by connections: four MiB for each, or so.
    assert len(last) > 4
    assert by_one > 0.4 * by_many, (by_one, by_many)


class Gate(TransferObserver):
    """Holds a receiver up until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.is_reached.set()
        self.is_open.wait(WITHIN_S)


def test_nobody_waits_for_the_peer_of_an_urgent_transfer(source: kvstore.Store, endpoint: Endpoint) -> None:
    gate = Gate()
    settings = TransferSettings(progress_deadline_s=WITHIN_S)
    with (
        kvstore.open(SPEC, dram="64MiB") as slow,
        Endpoint(slow.pool, LOOPBACK, observer=gate, settings=settings) as stuck,
        Sender(settings=settings) as sender,
    ):
        urgent = send(source, LONG, stuck.address, sender, priority=URGENT)
        assert gate.is_reached.wait(WITHIN_S)
        send(source, LONG, endpoint.address, sender, priority=BACKGROUND).result(WITHIN_S)
        assert not urgent.done()
        gate.is_open.set()
        urgent.result(WITHIN_S)


def test_many_transfers_of_all_priorities_arrive(source: kvstore.Store, target: kvstore.Store) -> None:
    settings = TransferSettings(credit_bytes=1 << 20)
    with Endpoint(target.pool, LOOPBACK, settings=settings) as endpoint, Sender() as sender:
        handles = [
            send(source, ids, endpoint.address, sender, priority=priority)
            for ids in (LONG, SHORT)
            for priority in (BACKGROUND, TRANSFER_PRIORITY_DEFAULT, URGENT, BACKGROUND, URGENT)
        ]
        for handle in handles:
            handle.result(WITHIN_S)
        assert sender.transfers() == ()
    assert_same(source, target, LONG, len(LONG))
    assert_same(source, target, SHORT, len(SHORT))


def test_a_senders_transfers_and_their_progress(source: kvstore.Store, endpoint: Endpoint) -> None:
    with SlowLink(endpoint.address, LINK_BYTES_PER_S) as link, Sender() as sender:
        handle = send(source, LONG, link.address, sender, priority=7)
        first = handle.progress()
        assert first.done_bytes <= first.total_bytes
        wait_until(lambda: handle.progress().state == TransferState.MOVING, "pieces cross")
        (snapshot,) = sender.transfers()
        assert (snapshot.priority, snapshot.prompt_tokens, snapshot.peer_address) == (7, len(LONG), link.address)
        assert snapshot.total_bytes == first.total_bytes
        report = handle.result(WITHIN_S)
        last = handle.progress()
        assert (last.state, last.done_bytes, last.total_bytes) == ("done", report.total_bytes, report.total_bytes)
