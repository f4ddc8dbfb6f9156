"""Transfers between hosts with several interfaces, and over IPv6."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.network.nodes import Node, assert_same, assert_settled
from tests.network.wires import NoWiresError, Wires

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

SEED = 5
TOKENS = 2048
WIDTH = 512
SETTINGS = {"width": WIDTH, "block_tokens": 64, "dram": "96MiB"}
SLOW_MBIT = 40
QUICK_MBIT = 160


@pytest.fixture
def wires(stack: ExitStack) -> Wires:
    try:
        return stack.enter_context(Wires([SLOW_MBIT, QUICK_MBIT]))
    except NoWiresError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("by", ["targets", "sources", "ipv6"])
def test_each_interface_carries_what_its_rate_allows(by: str, wires: Wires, make_node: Callable[..., Node]) -> None:
    """Wires of which one has four times the other's rate, with the slow one as the transfer's first."""
    if by == "ipv6":
        sources = [wires.ipv6("a", wire) for wire in (0, 1)]
        targets = [f"[{wires.ipv6('b', wire)}]" for wire in (0, 1)]
    else:
        sources = [wires.ipv4("a", wire) for wire in (0, 1)] if by == "sources" else []
        targets = [wires.ipv4("b", wire) for wire in (0, 1)]
    receiver = make_node(wires, "b", **SETTINGS)
    sender = make_node(wires, "a", local_addresses=sources, **SETTINGS)
    to = receiver.listen(hosts=targets)
    size_bytes = sender.put(SEED, TOKENS)
    sender.send(to, SEED, TOKENS)
    outcome = sender.wait()
    assert outcome["failed"] is None, outcome
    assert (outcome["connections"], outcome["reconnects"]) == (2, 0)
    slow_bytes, quick_bytes = (wires.sent_bytes("a", wire) for wire in (0, 1))
    assert slow_bytes + quick_bytes >= size_bytes
    share = slow_bytes / (slow_bytes + quick_bytes)
    assert 0.1 < share < 0.3, (slow_bytes, quick_bytes, outcome)
    assert_same(sender, receiver, SEED, TOKENS)
    assert_settled(sender, receiver)
