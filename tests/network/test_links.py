"""Transfers over long, lossy, lopsided and broken links.

What breaks a connection is tested in `tests/integration/test_transfer_faults.py` and `test_transfer_connections.py`,
on loopback. Here nothing breaks by itself: packets are late or do not arrive, and nobody says so.
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
    wait_until,
)
from tests.network.rounds import BRISK, FEW_AND_MANY, LONG_FORM, SEED, SOAK_ROUNDS, TIMEOUT_S, TOKENS, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

LATE_S = 5.0
"""What a busy machine may add to a deadline."""
pytestmark = pytest.mark.timeout(TIMEOUT_S)


class Pair:
    """A link, a sender on host a with a prompt, and a receiver on host b."""

    def __init__(self, link: Link, make_node: Callable[..., Node], **arguments: Any) -> None:
        self.link = link
        self.source = make_node(link, "a", **{**WIDE, **arguments})
        self.target = make_node(link, "b", **{**WIDE, **arguments})
        self.target.listen()

    def send(self, seed: int = SEED, tokens: int = TOKENS, **options: Any) -> int:
        """Begin; the bytes that are to cross."""
        size_bytes = self.source.put(seed, tokens)
        self.source.send(self.target.address, seed, tokens, **options)
        return size_bytes

    def assert_arrives(self, size_bytes: int, seed: int = SEED, tokens: int = TOKENS) -> dict[str, Any]:
        outcome = self.source.wait()
        assert outcome["failed"] is None, outcome
        assert outcome["total_bytes"] == size_bytes
        assert_same(self.source, self.target, seed, tokens)
        assert_settled(self.source, self.target)
        return outcome


@pytest.fixture
def make_pair(make_link: Callable[..., Link], make_node: Callable[..., Node]) -> Callable[..., Pair]:
    def make(way: Way, back: Way | None = None, **arguments: Any) -> Pair:
        return Pair(make_link(way, back), make_node, **arguments)

    return make


@pytest.mark.parametrize("connections", FEW_AND_MANY)
def test_a_long_fat_path(make_pair: Callable[..., Pair], connections: int) -> None:
    pair = make_pair(Way(delay_s=0.05, loss=0.002, rate_bits_per_s=200e6), settings={"connections": connections})
    size_bytes = pair.send(tokens=512)
    assert pair.assert_arrives(size_bytes, tokens=512)["reconnects"] == 0
    assert pair.link.count("ab").lost > 0


def test_one_percent_of_the_packets_is_lost(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair(Way(delay_s=0.02, loss=0.01, rate_bits_per_s=200e6))
    for seed in range(1, 2 + SOAK_ROUNDS):
        assert pair.assert_arrives(pair.send(seed), seed)["reconnects"] == 0
    assert pair.link.count("ab").lost > 0
    assert pair.link.count("ba").lost > 0


@pytest.mark.parametrize("is_narrow_back", [True, pytest.param(False, marks=LONG_FORM)])
def test_rates_that_differ_by_direction(make_pair: Callable[..., Pair], is_narrow_back: bool) -> None:
    """The acknowledgements, or the pieces, have a thirtieth of what the other direction has. Both nodes send."""
    narrow, wide = Way(0.01, rate_bits_per_s=3e6), Way(0.01, rate_bits_per_s=100e6)
    pair = make_pair(wide if is_narrow_back else narrow, narrow if is_narrow_back else wide)
    pair.source.listen()
    tokens = 64
    there, back = pair.source.put(1, tokens), pair.target.put(2, tokens)
    pair.source.send(pair.target.address, 1, tokens)
    pair.target.send(pair.source.address, 2, tokens)
    for node, size_bytes in ((pair.source, there), (pair.target, back)):
        outcome = node.wait()
        assert (outcome["failed"], outcome.get("total_bytes")) == (None, size_bytes), outcome
        assert outcome["reconnects"] == 0
    assert_same(pair.source, pair.target, 1, tokens)
    assert_same(pair.target, pair.source, 2, tokens)
    assert_settled(pair.source, pair.target)


def cut(pair: Pair, packets: int) -> float:
    """Have the link go down both ways at a packet of the pieces; when it was."""
    wait_until(lambda: not pair.link.count("ab").is_up, f"{packets} packets had been sent")
    pair.link.down("ba")
    return time.monotonic()


def test_a_link_that_stops_for_three_seconds(make_pair: Callable[..., Pair]) -> None:
    """It goes on where it was, over the same connections. What TCP waits between its attempts must not add to it.

    The short form is a case where doubling pauses would: attempts after .4, 1.2, 2.8 and 6 s.
    """
    generator = random.Random(3)
    for number in range(1 + SOAK_ROUNDS):
        delay_s = generator.choice((0.005, 0.04, 0.1)) if number else 0.1
        connections = generator.choice((1, 2, 4))
        pair = make_pair(Way(delay_s, rate_bits_per_s=40e6), settings={"connections": connections})
        packets = generator.randrange(60, 1200 if number else 300)
        pair.link.down_after("ab", packets)
        size_bytes = pair.send()
        cut(pair, packets)
        time.sleep(3.0)
        pair.link.up()
        assert pair.assert_arrives(size_bytes)["reconnects"] == 0
        for node in (pair.source, pair.target):
            node.close()
        pair.link.close()


@pytest.mark.parametrize("connections", FEW_AND_MANY)
def test_a_link_that_stops_for_longer_than_the_deadline(make_pair: Callable[..., Pair], connections: int) -> None:
    """A failure by name at the no-progress deadline, and once the link is back the transfer is resumed by its id."""
    is_long = SOAK_ROUNDS > 0
    deadline_s, stop_s = (PROGRESS_DEADLINE_S, 8.0) if is_long else (BRISK["progress_deadline_s"], 3.0)
    generator = random.Random(8)
    for _ in range(SOAK_ROUNDS or 1):
        pair = make_pair(
            Way(0.02, rate_bits_per_s=40e6),
            settings={"connections": connections, "progress_deadline_s": deadline_s, "resume_window_s": 30.0},
        )
        packets = generator.randrange(200, 1000)
        pair.link.down_after("ab", packets)
        size_bytes = pair.send()
        began_s = cut(pair, packets)
        outcome = pair.source.wait()
        assert outcome["failed"] == "PeerGoneError", outcome
        assert outcome["transfer"] is not None
        assert outcome["ended_s"] - began_s < deadline_s + LATE_S
        assert pair.source.state()["sending"] == 0
        # The reservation and what has arrived of it wait.
        assert pair.target.state()["transfers"] == 1
        assert_absent(pair.target, SEED, TOKENS)
        arrived_bytes = pair.target.state()["received_bytes"]
        assert 0 < arrived_bytes < size_bytes
        time.sleep(max(0.0, began_s + stop_s - time.monotonic()))
        pair.link.up()
        pair.source.send(pair.target.address, SEED, TOKENS, resume=outcome["transfer"])
        again = pair.source.wait()
        assert again["failed"] is None, again
        assert again["total_bytes"] == size_bytes - arrived_bytes
        assert pair.target.state()["received"]["resumed"] == 1
        assert_same(pair.source, pair.target, SEED, TOKENS)
        assert_settled(pair.source, pair.target)
        for node in (pair.source, pair.target):
            node.close()
        pair.link.close()


def test_a_link_that_does_not_come_back(make_pair: Callable[..., Pair]) -> None:
    """Both sides end by themselves: the sender by name, the receiver by giving the reservation back."""
    generator = random.Random(9)
    settings = {} if SOAK_ROUNDS else BRISK
    deadline_s = PROGRESS_DEADLINE_S if SOAK_ROUNDS else BRISK["progress_deadline_s"]
    for _ in range(SOAK_ROUNDS or 1):
        pair = make_pair(Way(0.02, rate_bits_per_s=40e6), settings=settings)
        packets = generator.randrange(20, 1200)
        pair.link.down_after("ab", packets)
        pair.send()
        began_s = cut(pair, packets)
        outcome = pair.source.wait()
        assert outcome["failed"] == "PeerGoneError", outcome
        assert outcome["ended_s"] - began_s < deadline_s + LATE_S
        assert_settled(pair.source, pair.target)
        assert_absent(pair.target, SEED, TOKENS)
        assert pair.target.state()["received"]["aborted"] <= 1
        # An id whose reservation is gone is refused by name, and sending anew works.
        pair.link.up()
        pair.source.send(pair.target.address, SEED, TOKENS, resume=outcome["transfer"])
        assert pair.source.wait()["failed"] == "TransferAbortedError"
        pair.source.send(pair.target.address, SEED, TOKENS)
        assert pair.source.wait()["failed"] is None
        assert_same(pair.source, pair.target, SEED, TOKENS)
        assert_settled(pair.source, pair.target)
        for node in (pair.source, pair.target):
            node.close()
        pair.link.close()
