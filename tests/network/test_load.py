"""Much at once over an emulated link: many transfers, many pieces, readers that are slow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.network.link import Link, Way
from tests.network.nodes import Node, assert_same, assert_settled, wait_for_bytes, wait_until
from tests.network.rounds import LONG_FORM, SEED, SOAK_ROUNDS, TIMEOUT_S, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSFERS = 64
"""As many as one peer may have under way."""
pytestmark = pytest.mark.timeout(TIMEOUT_S)


def test_sixty_four_transfers_at_once(make_link: Callable[..., Link], make_node: Callable[..., Node]) -> None:
    """All of them end, and so does what they took: threads, descriptors, reservations."""
    link = make_link(Way(delay_s=0.02, loss=0.002, rate_bits_per_s=100e6))
    source, target = (make_node(link, host, width=32, dram="64MiB") for host in ("a", "b"))
    target.listen()
    seeds = range(1, TRANSFERS + 1)
    tokens = 32
    sizes = {seed: source.put(seed, tokens) for seed in seeds}
    for number in range(1 + SOAK_ROUNDS // 10):
        before = [node.state() for node in (source, target)]
        for seed in seeds:
            source.send(target.address, seed, tokens, name=str(seed))
        for seed in seeds:
            outcome = source.wait(str(seed))
            assert (outcome["failed"], outcome.get("total_bytes")) == (None, sizes[seed]), outcome
        for seed in seeds:
            assert_same(source, target, seed, tokens)
        assert_settled(source, target)
        for node, state in zip((source, target), before, strict=True):
            for what in ("threads", "descriptors"):
                wait_until(
                    lambda node=node, what=what, state=state: node.state()[what] <= state[what],  # type: ignore[misc]
                    f"the {what} of round {number} were given back",
                )
        for seed in seeds:
            target.evict(seed, tokens)
        assert target.state()["committed_bytes"] == 0


def test_a_batch_of_sixteen_thousand_pieces(make_link: Callable[..., Link], make_node: Callable[..., Node]) -> None:
    """One token a block: 4096 blocks of two layers with two tensors each, 512 and 128 bytes a piece."""
    link = make_link(Way(delay_s=0.02, loss=0.002, rate_bits_per_s=200e6))
    source, target = (make_node(link, host, width=16, block_tokens=1, dram="64MiB") for host in ("a", "b"))
    target.listen()
    tokens = 4096
    size_bytes = source.put(SEED, tokens)
    source.send(target.address, SEED, tokens)
    outcome = source.wait()
    assert outcome["failed"] is None, outcome
    assert outcome["pieces"] >= 10_000
    assert outcome["total_bytes"] == size_bytes
    assert_same(source, target, SEED, tokens)
    assert_settled(source, target)


def test_a_slow_reader_slows_its_sender_and_not_its_neighbour(
    make_link: Callable[..., Link], make_node: Callable[..., Node]
) -> None:
    """Two receivers on one host, one of which takes its time. Its sender never has more under way than it granted."""
    link = make_link(Way(delay_s=0.005, rate_bits_per_s=100e6))
    credit_bytes = 256 << 10
    source = make_node(link, "a", **WIDE)
    slow = make_node(link, "b", **WIDE, pause_s=0.02, settings={"credit_bytes": credit_bytes})
    quick = make_node(link, "b", **WIDE)
    slow.listen(7001)
    quick.listen(7002)
    seeds, tokens = (1, 2), 256
    for seed in seeds:
        source.put(seed, tokens)
    source.send(slow.address, 1, tokens, name="slow")
    wait_for_bytes(slow, 1)
    source.send(quick.address, 2, tokens, name="quick")
    assert source.wait("quick")["failed"] is None
    # 32 frames of five layers, each of which takes a pause, are not over by now.
    state = slow.state()
    assert state["transfers"] == 1
    sent_bytes = source.state()["sent_bytes"] - quick.state()["received_bytes"]
    # What was consumed and not yet reported to the observer is one frame for each connection.
    assert 0 < sent_bytes - slow.state()["received_bytes"] <= credit_bytes + 4 * WIDE["frame_bytes"]
    assert source.wait("slow")["failed"] is None
    for seed, target in zip(seeds, (slow, quick), strict=True):
        assert_same(source, target, seed, tokens)
    assert_settled(source, slow, quick)


@LONG_FORM
def test_a_reader_behind_a_narrow_link_slows_only_itself(
    make_link: Callable[..., Link], make_node: Callable[..., Node]
) -> None:
    """One sender, two receivers: what takes a second for the one beyond the link reaches the near one meanwhile."""
    narrow = make_link(Way(delay_s=0.01, rate_bits_per_s=8e6))
    source, target = make_node(narrow, "a", **WIDE), make_node(narrow, "b", **WIDE)
    neighbour = make_node(narrow, "a", **WIDE)
    target.listen()
    neighbour.listen()
    for seed in (1, 2):
        source.put(seed, 256)
    source.send(target.address, 1, 256, name="narrow")
    wait_for_bytes(target, 1)
    source.send(neighbour.address, 2, 256, name="neighbour")
    assert source.wait("neighbour")["failed"] is None
    assert target.state()["transfers"] == 1
    assert source.wait("narrow")["failed"] is None
    assert_same(source, target, 1, 256)
    assert_same(source, neighbour, 2, 256)
    assert_settled(source, target, neighbour)
