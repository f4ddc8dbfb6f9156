"""A cache written by one tensor-parallel size and read by another: TP 1 → n → 1 gives the same bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.errors import SpecError
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, Shard, TensorSpec
from tests.models.tiny import TINY

if TYPE_CHECKING:
    from kvstore.store import Store

    Cache = dict[tuple[int, str], np.ndarray[Any, Any]]

PROMPT_TOKENS = 41
"""Two whole blocks and a tail."""
TOKEN_IDS = list(range(100, 100 + PROMPT_TOKENS))
BLOCK_TOKENS = 16


def compressed_convolutional_attention(kv_heads: int) -> ModelSpec:
    """CCA (`kv_heads` as many as query heads) and CCGQA, arXiv 2510.04476, by hand.

    Attention works on compressed keys and values; queries and keys pass a short convolution first, and half
    of the values come from the token before, so each layer has a convolution state and a shift state too.
    """
    query_heads, head_dim = 4, 8
    heads = (Segment("heads", kv_heads, 1),)
    attention = CacheGroup(
        "attention",
        ReuseRule.ATTENTION,
        (0, 1, 2),
        (
            TensorSpec("keys", DType.BFLOAT16, heads, (head_dim,), has_tokens=True),
            TensorSpec("values", DType.BFLOAT16, heads, (head_dim,), has_tokens=True),
        ),
    )
    convolved = (Segment("query", query_heads, head_dim), Segment("key", kv_heads, head_dim))
    hidden = (Segment("hidden", 1, 64, replicated=True),)
    state = CacheGroup(
        "convolution",
        ReuseRule.STATE,
        (0, 1, 2),
        (
            TensorSpec("conv", DType.BFLOAT16, convolved, (3,), has_tokens=False),
            TensorSpec("shift", DType.BFLOAT16, hidden, (), has_tokens=False),
        ),
    )
    return ModelSpec("cca" if kv_heads == query_heads else "ccgqa", "random", BLOCK_TOKENS, (attention, state))


HAND_WRITTEN = {"cca": 4, "ccgqa": 2, "ccgqa_uneven": 3}
UNEVEN = {("ccgqa_uneven", count): "3 units of segment 'heads' split over" for count in (2, 4)}
"""(model, workers) of which some units divide by neither rule; the error says which."""


def spec_of(name: str) -> ModelSpec:
    if name in HAND_WRITTEN:
        return compressed_convolutional_attention(HAND_WRITTEN[name])
    pytest.importorskip("transformers")
    return ModelSpec.from_transformers(TINY[name](), weights="random", block_tokens=BLOCK_TOKENS, dtype="bfloat16")


def random_cache(spec: ModelSpec) -> Cache:
    """Every tensor of a whole model after the prompt, of random bytes."""
    source = np.random.default_rng(0)
    cache: Cache = {}
    for group in spec.groups:
        is_attention = group.rule is ReuseRule.ATTENTION
        tokens = PROMPT_TOKENS if is_attention else group.valid_tokens(spec.block_tokens, PROMPT_TOKENS)
        for layer in group.layers:
            for tensor in group.tensors:
                shape = tensor.shape(tensor.rows, tokens)
                data = source.integers(0, 256, int(np.prod(shape)) * tensor.dtype.itemsize, np.uint8)
                cache[layer, tensor.name] = data.view(tensor.dtype.storage).reshape(shape)
    return cache


def share_of(cache: Cache, spec: ModelSpec, index: int, count: int) -> Cache:
    """One worker's rows, cut from the whole by the rule as it is written down, without kvstore's own arithmetic."""
    share: Cache = {}
    for group in spec.groups:
        for layer in group.layers:
            for tensor in group.tensors:
                whole = cache[layer, tensor.name]
                parts, first = [], 0
                for segment in tensor.segments:
                    rows = whole[first : first + segment.rows]
                    first += segment.rows
                    if segment.replicated:
                        parts.append(rows)
                    elif segment.units >= count:
                        parts.append(np.split(rows, count)[index])
                    else:
                        parts.append(np.split(rows, segment.units)[index // (count // segment.units)])
                share[layer, tensor.name] = np.concatenate(parts)
    return share


def write(store: Store, cache: Cache, shard: Shard) -> None:
    with store.write(TOKEN_IDS, shard=shard) as writer:
        for layer in store.spec.layers:
            for group in store.spec.groups:
                if layer not in group.layers:
                    continue
                tensors: dict[str, Any] = {tensor.name: cache[layer, tensor.name] for tensor in group.tensors}
                if group.rule is ReuseRule.ATTENTION:
                    writer.put(layer, tokens=slice(0, PROMPT_TOKENS), **tensors)
                else:
                    writer.put_state(layer, at=PROMPT_TOKENS, **tensors)
        writer.commit()


def read(store: Store, shard: Shard) -> Cache:
    match = store.match([*TOKEN_IDS, 1], shard=shard)
    assert match.tokens == PROMPT_TOKENS, match
    with store.read(match, verify=True) as lease:
        assert lease.tokens == PROMPT_TOKENS
        return {(layer.number, name): layer.read(name) for layer in lease for name in layer.names}


def assert_same(found: Cache, expected: Cache) -> None:
    assert found.keys() == expected.keys()
    for slot, array in expected.items():
        assert found[slot].shape == array.shape, slot
        assert found[slot].tobytes() == array.tobytes(), slot


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [*TINY, *HAND_WRITTEN])
def test_slicing_and_joining_gives_the_same_bytes(name: str, count: int) -> None:
    spec = spec_of(name)
    cache = random_cache(spec)
    with contextlib.ExitStack() as stack:
        whole, sharded = (stack.enter_context(kvstore.open(spec, dram="32MiB")) for _ in range(2))
        write(whole, cache, Shard())
        assert_same(read(whole, Shard()), cache)
        if (name, count) in UNEVEN:
            with pytest.raises(SpecError, match=UNEVEN[name, count]):
                whole.match([*TOKEN_IDS, 1], shard=Shard(0, count))
            return
        shares = [read(whole, Shard(index, count)) for index in range(count)]
        # With fewer units than workers, one of the workers that hold the same unit writes it.
        writers = [i for i in range(count) if any(group.units_written_by(Shard(i, count)) for group in spec.groups)]
        for index, share in enumerate(shares):
            assert_same(share, share_of(cache, spec, index, count))
            assert bool(sharded.match([*TOKEN_IDS, 1])) is (index > writers[-1]), "only when every shard is there"
            write(sharded, share, Shard(index, count))
        assert_same(read(sharded, Shard()), cache)
        # From n shards to others, and a shard that the store has already.
        for other in (1, 2, 4):
            if (name, other) not in UNEVEN:
                for index in range(other):
                    assert_same(read(sharded, Shard(index, other)), share_of(cache, spec, index, other))
        sharded.pool.check()


def test_a_worker_count_that_divides_nothing_is_an_error() -> None:
    spec = spec_of("ccgqa")
    with kvstore.open(spec, dram="4MiB") as store:
        write(store, random_cache(spec), Shard())
        with pytest.raises(SpecError, match="neither evenly nor by replication"):
            store.match([*TOKEN_IDS, 1], shard=Shard(0, 3))
        with pytest.raises(SpecError, match="workers cannot write"):
            store.write([1, 2, 3], shard=Shard(0, 3))


def test_what_replicates_is_stored_once() -> None:
    """Four workers with two KV heads: each head is written by one of the two that hold it."""
    spec = spec_of("ccgqa")
    cache = random_cache(spec)
    with contextlib.ExitStack() as stack:
        whole, sharded = (stack.enter_context(kvstore.open(spec, dram="8MiB")) for _ in range(2))
        write(whole, cache, Shard())
        for index in range(4):
            write(sharded, share_of(cache, spec, index, 4), Shard(index, 4))
        sizes = []
        for store in (whole, sharded):
            with store.read(store.match([*TOKEN_IDS, 1])) as lease:
                pieces = [
                    (held.name.node, held.name.group, piece.layer, piece.tensor, piece.segment, piece.unit)
                    for held in lease.records
                    for piece in held.layout.pieces
                ]
                assert len(set(pieces)) == len(pieces)
                sizes.append(sorted(pieces))
        assert sizes[0] == sizes[1]
