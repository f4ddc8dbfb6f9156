"""Prefill in chunks, by layer groups or all mixed: pieces leave as they become whole, and arrive in that order."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.spec import ReuseRule
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import check_lease, dense, hybrid, put_states, put_tokens
from kvstore.transfer import Endpoint, Sender, TransferObserver, send_writer
from tests.integration.transfer_nodes import FAST, WITHIN_S, address, assert_settled, match_all, prompt, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.spec import ModelSpec

BLOCK = 4
TOKENS = 18
"""Four whole blocks and a tail."""
CHECKPOINTS = (8, TOKENS)
CHUNKS = ((0, 8), (8, 16), (16, TOKENS))


@dataclass(frozen=True)
class Put:
    """One call of `put`, or of `put_state` if it has no tokens: then `stop` is the length."""

    layer: int
    start: int
    stop: int

    @property
    def is_state(self) -> bool:
        return self.start == self.stop


@dataclass(frozen=True)
class Arrived:
    layer: int
    size_bytes: int


class Watcher(TransferObserver):
    """What has left and arrived, in order."""

    def __init__(self) -> None:
        self.sent: list[Arrived] = []
        self.received: list[Arrived] = []

    def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.sent.append(Arrived(layer, size_bytes))

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        self.received.append(Arrived(layer, size_bytes))

    @property
    def received_bytes(self) -> int:
        return sum(each.size_bytes for each in self.received)


class Filling:
    """What is whole after which puts, from the spec alone."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._filled: dict[int, set[int]] = {}

    def whole_bytes(self, put: Put) -> int:
        """Bytes of the pieces that become whole by this put."""
        rule = ReuseRule.STATE if put.is_state else ReuseRule.ATTENTION
        groups = [group for group in self._spec.groups if put.layer in group.layers and group.rule is rule]
        layer_bytes = sum(group.layer_bytes(BLOCK) for group in groups)
        if put.is_state:
            return layer_bytes
        filled = self._filled.setdefault(put.layer, set())
        before = self._whole_blocks(filled)
        filled.update(range(put.start, put.stop))
        return (self._whole_blocks(filled) - before) * layer_bytes

    @staticmethod
    def _whole_blocks(filled: set[int]) -> int:
        blocks = (range(start, min(start + BLOCK, TOKENS)) for start in range(0, TOKENS, BLOCK))
        return sum(filled.issuperset(block) for block in blocks)


def layers_of(spec: ModelSpec, rule: ReuseRule) -> list[int]:
    return sorted(layer for group in spec.groups if group.rule is rule for layer in group.layers)


def puts_of(spec: ModelSpec, layer: int, chunks: tuple[tuple[int, int], ...] = CHUNKS) -> list[Put]:
    """What a layer produces, chunk by chunk; its states at the ends of chunks that are checkpoints."""
    if layer in layers_of(spec, ReuseRule.ATTENTION):
        return [Put(layer, start, stop) for start, stop in chunks]
    return [Put(layer, at, at) for at in CHECKPOINTS]


def layer_major(spec: ModelSpec) -> list[Put]:
    """Layered prefill: each layer computes the whole prompt."""
    return [put for layer in spec.layers for put in puts_of(spec, layer, ((0, TOKENS),))]


def token_major(spec: ModelSpec) -> list[Put]:
    """Chunked prefill: each chunk passes through all layers."""
    puts = [put for layer in spec.layers for put in puts_of(spec, layer)]
    return sorted(puts, key=lambda put: (put.stop, put.layer))


def by_layer_groups(spec: ModelSpec) -> list[Put]:
    """Layer groups one after the other, each chunk by chunk."""
    half = len(spec.layers) // 2
    groups = (spec.layers[:half], spec.layers[half:])
    return [put for group in groups for put in token_major(spec) if put.layer in group]


def mixed(spec: ModelSpec) -> list[Put]:
    """No order at all, in chunks that end anywhere."""
    source = random.Random(4)
    puts = []
    for layer in spec.layers:
        ends = [0, *sorted(source.sample(range(1, TOKENS), 3)), TOKENS]
        puts.extend(puts_of(spec, layer, tuple(pairwise(ends))))
    source.shuffle(puts)
    return puts


ORDERS = (layer_major, token_major, by_layer_groups, mixed)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(params=["tcp", "tcp, python", "memory"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, _, path = request.param.partition(", ")
    monkeypatch.setenv("KVSTORE_TRANSFER", path)
    return str(name)


@pytest.fixture(params=[hybrid, dense])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    made: ModelSpec = request.param(BLOCK)
    return made


def produce(writer: kvstore.Writer, put: Put) -> None:
    if put.is_state:
        put_states(writer, put.stop, layer=put.layer)
    else:
        put_tokens(writer, put.start, put.stop, layer=put.layer)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("puts_before", [0, 5], ids=["from the start", "begun in the middle"])
def test_pieces_arrive_as_they_are_produced(
    spec: ModelSpec, scheme: str, order: Callable[[ModelSpec], list[Put]], puts_before: int
) -> None:
    """After each put all that it made whole arrives, and nothing else does, long before the writer commits."""
    ids, watcher, filling = prompt(TOKENS), Watcher(), Filling(spec)
    puts = order(spec)
    with (
        kvstore.open(spec, dram="8MiB") as source,
        kvstore.open(spec, dram="8MiB") as target,
        Sender(settings=FAST) as sender,
        Endpoint(target.pool, address(scheme), settings=FAST, observer=watcher) as endpoint,
        source.write(ids, resume_at=CHECKPOINTS) as writer,
    ):
        whole_bytes = sum(filling.whole_bytes(put) for put in puts[:puts_before])
        for put in puts[:puts_before]:
            produce(writer, put)
        handle = send_writer(writer, endpoint.address, sender=sender, observer=watcher)
        wait_until(lambda: watcher.received_bytes >= whole_bytes, "what was there already had arrived")
        assert watcher.received_bytes == whole_bytes
        for put in puts[puts_before:]:
            seen = len(watcher.received)
            made_bytes = filling.whole_bytes(put)
            whole_bytes += made_bytes
            produce(writer, put)
            wait_until(lambda: watcher.received_bytes >= whole_bytes, f"what {put} had made whole arrived")  # noqa: B023
            arrived = watcher.received[seen:]
            assert {each.layer for each in arrived} <= {put.layer}
            assert sum(each.size_bytes for each in arrived) == made_bytes
        assert not handle.done()
        assert match_all(target, ids).tokens == 0
        # A piece is reported as sent after its bytes have left, so perhaps after they have arrived.
        wait_until(lambda: {each.layer for each in watcher.sent} == set(spec.layers), "every layer was reported sent")
        writer.commit()
        report = handle.result(WITHIN_S)
        assert report.total_bytes == watcher.received_bytes == whole_bytes
        assert report.pieces_again == 0
        for store in (source, target):
            match = match_all(store, ids)
            assert match.tokens == TOKENS
            with store.read(match, verify=True) as lease:
                check_lease(lease, store.prompt(ids))
        assert_settled(source, target)


def test_a_chunk_that_ends_inside_a_block_holds_back_that_blocks_pieces_only(scheme: str) -> None:
    spec = hybrid(BLOCK)
    ids, watcher = prompt(TOKENS), Watcher()
    block_bytes = spec.groups[0].layer_bytes(BLOCK)
    with (
        kvstore.open(spec, dram="8MiB") as source,
        kvstore.open(spec, dram="8MiB") as target,
        Sender(settings=FAST) as sender,
        Endpoint(target.pool, address(scheme), settings=FAST, observer=watcher) as endpoint,
        source.write(ids, resume_at=CHECKPOINTS) as writer,
    ):
        handle = send_writer(writer, endpoint.address, sender=sender)
        layer = spec.groups[0].layers[0]
        put_tokens(writer, 0, 6, layer=layer)
        # A state that is put afterwards overtakes the open block: once it is there, the block would be, too.
        put_states(writer, 8, layer=0)
        state_bytes = spec.groups[1].layer_bytes(BLOCK)
        wait_until(lambda: watcher.received_bytes >= block_bytes + state_bytes, "the whole block and the state arrived")
        assert watcher.received_bytes == block_bytes + state_bytes
        put_tokens(writer, 6, 8, layer=layer)
        wait_until(lambda: watcher.received_bytes >= 2 * block_bytes + state_bytes, "the rest of the block arrived")
        writer.abort()
        with pytest.raises(kvstore.KVStoreError):
            handle.result(WITHIN_S)
        assert_settled(source, target)
