"""Peers that die, stop and vanish while packets are under way between two hosts.

The same on loopback, where a dying process is always heard of: `tests/integration/test_transfer_connections.py`.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.limits import PROGRESS_DEADLINE_S
from tests.network.link import Link, Way
from tests.network.nodes import (
    Node,
    assert_absent,
    assert_same,
    assert_settled,
    assert_whole_or_absent,
    wait_for_bytes,
    wait_until,
)
from tests.network.rounds import BRISK, FEW_AND_MANY, SEED, SOAK_ROUNDS, TIMEOUT_S, TOKENS, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = Way(delay_s=0.02, rate_bits_per_s=40e6)
LATE_S = 5.0
"""What a busy machine may add to a deadline."""
pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture
def link(make_link: Callable[..., Link]) -> Link:
    return make_link(PATH)


def sender_on(link: Link, make_node: Callable[..., Node], **arguments: Any) -> tuple[Node, int]:
    """A node with a prompt on host a, and the bytes of it."""
    node = make_node(link, "a", **{**WIDE, **arguments})
    return node, node.put(SEED, TOKENS)


def receiver_on(link: Link, make_node: Callable[..., Node], **arguments: Any) -> Node:
    node = make_node(link, "b", **{**WIDE, **arguments})
    node.listen()
    return node


def note(request: pytest.FixtureRequest, what: str, seconds: float) -> None:
    """A figure for whoever runs the long form; printed with `-rP`."""
    print(f"{request.node.name}: {what} after {seconds:.2f} s")


@pytest.mark.parametrize("connections", FEW_AND_MANY)
def test_receivers_killed_at_random_points(
    link: Link, make_node: Callable[..., Node], request: pytest.FixtureRequest, connections: int
) -> None:
    """The sender ends by name; another receiver at the same address then gets everything."""
    generator = random.Random(11 + connections)
    source, size_bytes = sender_on(link, make_node, settings={**BRISK, "connections": connections})
    for _ in range(SOAK_ROUNDS or 1):
        with receiver_on(link, make_node) as target:
            source.send(target.address, SEED, TOKENS)
            wait_for_bytes(target, generator.randrange(size_bytes))
            killed_s = time.monotonic()
            target.kill()
            outcome = source.wait()
            # It may have ended before the kill.
            if outcome["failed"] is not None:
                assert outcome["failed"] == "PeerGoneError", outcome
                assert outcome["ended_s"] - killed_s < BRISK["progress_deadline_s"] + LATE_S
                note(request, "a killed receiver was noticed", outcome["ended_s"] - killed_s)
            assert_settled(source)
    with receiver_on(link, make_node) as target:
        source.send(target.address, SEED, TOKENS)
        assert source.wait()["total_bytes"] == size_bytes
        assert_same(source, target, SEED, TOKENS)
        assert_settled(source, target)


@pytest.mark.parametrize("connections", FEW_AND_MANY)
def test_senders_killed_at_random_points(
    link: Link, make_node: Callable[..., Node], request: pytest.FixtureRequest, connections: int
) -> None:
    """The receiver gives back what was reserved, and shows all of a prompt or nothing."""
    generator = random.Random(12 + connections)
    target = receiver_on(link, make_node, settings=BRISK)
    honest, size_bytes = sender_on(link, make_node)
    for _ in range(SOAK_ROUNDS or 1):
        victim, _ = sender_on(link, make_node, settings={"connections": connections})
        before_bytes = target.state()["received_bytes"]
        victim.send(target.address, SEED, TOKENS)
        wait_for_bytes(target, before_bytes + generator.randrange(size_bytes))
        killed_s = time.monotonic()
        victim.kill()
        wait_until(lambda: target.state()["connections"] == 0, "the end of the connections was noticed")
        note(request, "a killed sender was noticed", time.monotonic() - killed_s)
        assert_settled(target)
        if assert_whole_or_absent(honest, target, SEED, TOKENS):
            target.evict(SEED, TOKENS)
        victim.close()
    honest.send(target.address, SEED, TOKENS)
    assert honest.wait()["failed"] is None
    assert_same(honest, target, SEED, TOKENS)
    assert_settled(honest, target)


@pytest.mark.parametrize("connections", FEW_AND_MANY)
def test_a_stopped_receiver_is_noticed(
    link: Link, make_node: Callable[..., Node], request: pytest.FixtureRequest, connections: int
) -> None:
    """Its kernel acknowledges what arrives, and goes on offering room for a while: the deadline holds all the same."""
    source, size_bytes = sender_on(link, make_node, settings={"connections": connections})
    target = receiver_on(link, make_node)
    generator = random.Random(13 + connections)
    for _ in range(SOAK_ROUNDS or 1):
        before_bytes = target.state()["received_bytes"]
        source.send(target.address, SEED, TOKENS)
        wait_for_bytes(target, before_bytes + generator.randrange(1, size_bytes // 2))
        stopped_s = time.monotonic()
        target.stop()
        try:
            outcome = source.wait()
            noticed_s = outcome["ended_s"] - stopped_s
            assert outcome["failed"] == "PeerGoneError", outcome
            assert noticed_s < PROGRESS_DEADLINE_S + LATE_S
            note(request, "a stopped receiver was noticed", noticed_s)
            assert_settled(source)
        finally:
            target.resume()
        # It goes on and finds the connections closed; what has arrived waits for the transfer to be resumed.
        source.send(target.address, SEED, TOKENS, resume=outcome["transfer"])
        assert source.wait()["failed"] is None
        assert_same(source, target, SEED, TOKENS)
        assert_settled(source, target)
        target.evict(SEED, TOKENS)


def test_a_stopped_sender_is_noticed(
    link: Link, make_node: Callable[..., Node], request: pytest.FixtureRequest
) -> None:
    """The receiver closes after the deadline and gives up after the resume window; the sender then ends by name.

    Unless the sender's kernel had everything already: it goes on sending, and the receiver commits.
    """
    deadline_s = PROGRESS_DEADLINE_S if SOAK_ROUNDS else BRISK["progress_deadline_s"]
    settings = {"progress_deadline_s": deadline_s, "resume_window_s": 1.0}
    source, size_bytes = sender_on(link, make_node, settings=settings)
    target = receiver_on(link, make_node, settings=settings)
    generator = random.Random(14)
    for _ in range(SOAK_ROUNDS or 1):
        before_bytes = target.state()["received_bytes"]
        source.send(target.address, SEED, TOKENS)
        wait_for_bytes(target, before_bytes + generator.randrange(1, size_bytes // 2))
        stopped_s = time.monotonic()
        source.stop()
        try:
            wait_until(lambda: target.state()["connections"] == 0, "the silence was noticed")
            noticed_s = time.monotonic() - stopped_s
            assert noticed_s < deadline_s + LATE_S
            note(request, "a stopped sender was noticed", noticed_s)
            assert_settled(target)
        finally:
            source.resume()
        outcome = source.wait()
        assert outcome["failed"] in (None, "PeerGoneError", "TransferAbortedError"), outcome
        is_there = assert_whole_or_absent(source, target, SEED, TOKENS)
        assert is_there or outcome["failed"] is not None
        assert_settled(source)
        source.send(target.address, SEED, TOKENS)
        assert source.wait()["failed"] is None
        assert_same(source, target, SEED, TOKENS)
        assert_settled(source, target)
        target.evict(SEED, TOKENS)


def vanish(link: Link, node: Node) -> None:
    """A host goes, and nobody hears of it: neither FIN nor RST leaves it. Then its address is back."""
    link.down()
    node.kill()
    # What its kernel would still say about the closed connections is lost, too.
    wait_until(lambda: link.count("ba" if node.address else "ab").cut > 0, "its kernel had tried")


def test_a_receiver_that_vanishes_and_comes_back_empty(link: Link, make_node: Callable[..., Node]) -> None:
    """The new process at the address knows nothing of the connection: the transfer begins anew there, by itself."""
    source, size_bytes = sender_on(link, make_node, settings={"connections": 2})
    target = receiver_on(link, make_node)
    source.send(target.address, SEED, TOKENS)
    wait_for_bytes(target, size_bytes // 3)
    vanish(link, target)
    successor = receiver_on(link, make_node)
    link.up()
    outcome = source.wait()
    assert outcome["failed"] in (None, "PeerGoneError"), outcome
    if outcome["failed"]:
        # The new process took longer to start than the deadline.
        assert_absent(successor, SEED, TOKENS)
        source.send(successor.address, SEED, TOKENS)
        assert source.wait()["failed"] is None
    assert_same(source, successor, SEED, TOKENS)
    assert_settled(source, successor)


def test_a_sender_that_vanishes_leaves_half_open_connections(link: Link, make_node: Callable[..., Node]) -> None:
    """They are noticed by their silence, and do not hinder the process that comes back at the address."""
    source, size_bytes = sender_on(link, make_node, settings={"connections": 2})
    target = receiver_on(link, make_node, settings=BRISK)
    source.send(target.address, SEED, TOKENS)
    wait_for_bytes(target, size_bytes // 3)
    vanish(link, source)
    successor, _ = sender_on(link, make_node)
    link.up()
    successor.send(target.address, SEED, TOKENS)
    assert successor.wait()["failed"] is None
    assert_same(successor, target, SEED, TOKENS)
    assert_settled(successor, target)
    assert target.state()["received"]["aborted"] == 1
