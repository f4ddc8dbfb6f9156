"""What a store sends and what others fetch from it leave over the same links, and take turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import kvstore
from kvstore._native import TrafficFlow
from kvstore.testing.resources import leaves_nothing
from tests.integration.transfer_nodes import (
    WITHIN_S,
    Gate,
    address,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS, OTHER = prompt(64), prompt(32, seed=1)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        store_prompt(store, IDS)
        store_prompt(store, OTHER, seed=1)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        yield store


def test_a_served_fetch_shows_among_the_links(source: kvstore.Store, target: kvstore.Store) -> None:
    node = source.listen(address("tcp"), serves=True)
    gate = Gate()
    handle = target.fetch([*IDS, 1], node.address, observer=gate)
    wait_until(lambda: bool(gate.received), "it is under way")
    (running,) = source.links()
    assert (running.peer_address, running.transfers_running) == ("tcp://127.0.0.1", 1)
    gate.is_open.set()
    received_bytes = handle.result(WITHIN_S).received_bytes
    wait_until(lambda: node.served_count == 0, "the node has heard of the commit")
    # A requester's connections have ports of their own; it is one peer all the same.
    received_bytes += target.fetch([*OTHER, 1], node.address).result(WITHIN_S).received_bytes
    wait_until(lambda: node.serving_statistics().served == 2, "the node has heard of the commit")
    (link,) = source.links()
    assert (link.peer_address, link.transfers_running, link.transfers) == ("tcp://127.0.0.1", 0, 2)
    assert link.sent_bytes >= received_bytes
    assert target.links() == ()


def test_a_fetch_that_fails_leaves_no_transfer_on_its_link(source: kvstore.Store, target: kvstore.Store) -> None:
    node = source.listen(address("tcp"), serves=True)
    gate = Gate()
    handle = target.fetch([*IDS, 1], node.address, observer=gate)
    wait_until(lambda: bool(gate.received), "it is under way")
    handle.cancel()
    gate.is_open.set()
    wait_until(lambda: node.served_count == 0, "the node has heard of it")
    (link,) = source.links()
    assert (link.transfers_running, link.connections, link.transfers) == (0, 0, 0)


def test_fetches_and_sends_take_turns_by_priority(
    source: kvstore.Store, target: kvstore.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose turn it is, one `Traffic` decides for all that leaves a store; two would know nothing of each other."""
    flows: list[tuple[object, int, bool]] = []

    def noted(traffic: Any, priority: int, is_background: bool, is_paced: bool, peer: str) -> TrafficFlow:
        flows.append((traffic, priority, is_background))
        return TrafficFlow(traffic, priority, is_background, is_paced, peer)

    monkeypatch.setattr("kvstore.transfer.outgoing_transfer.TrafficFlow", noted)
    node, receiver = source.listen(address("tcp"), serves=True), target.listen(address("tcp"))
    target.fetch([*IDS, 1], node.address, priority=200).result(WITHIN_S)
    source.send(match_all(source, OTHER), receiver.address, priority=3).result(WITHIN_S)
    (fetched, *fetch_flow), (sent, *send_flow) = flows
    assert fetched is sent
    assert (fetch_flow, send_flow) == ([200, True], [3, False])
