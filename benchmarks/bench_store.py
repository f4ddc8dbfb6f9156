"""What the calls around the bytes cost: match, read, seal, on a long hybrid prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

PROMPT_TOKENS = 32_768
HEADS = (Segment("heads", 2, 1),)
SPEC = ModelSpec(
    "benchmark",
    "random",
    64,
    (
        CacheGroup(
            "attention",
            ReuseRule.ATTENTION,
            (1,),
            tuple(TensorSpec(name, DType.BFLOAT16, HEADS, (16,), True) for name in ("keys", "values")),
        ),
        CacheGroup("state", ReuseRule.STATE, (0,), (TensorSpec("recurrent", DType.FLOAT32, HEADS, (16, 16), False),)),
    ),
)
TOKEN_IDS = np.random.default_rng(1).integers(0, 150_000, PROMPT_TOKENS + 1)
SHAPE = (2, PROMPT_TOKENS, 16)


@pytest.fixture(scope="module")
def store() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="64MiB") as store:
        with store.write(TOKEN_IDS[:-1], resume_at=(PROMPT_TOKENS // 2, PROMPT_TOKENS)) as writer:
            values = np.zeros(SHAPE, np.uint16)
            writer.put(1, tokens=slice(0, PROMPT_TOKENS), keys=values, values=values)
            for at in writer.resume_at:
                writer.put_state(0, at=at, recurrent=np.zeros((2, 16, 16), np.float32))
            writer.commit()
        yield store


def test_match_with_keys_given(benchmark: BenchmarkFixture, store: kvstore.Store) -> None:
    prompt = store.prompt(TOKEN_IDS)
    assert benchmark(store.match, prompt).tokens == PROMPT_TOKENS


def test_match_from_token_ids(benchmark: BenchmarkFixture, store: kvstore.Store) -> None:
    assert benchmark(store.match, TOKEN_IDS).tokens == PROMPT_TOKENS


def test_lease_and_release(benchmark: BenchmarkFixture, store: kvstore.Store) -> None:
    match = store.match(TOKEN_IDS)
    benchmark(lambda: store.read(match).release())


def test_reserve_and_abort(benchmark: BenchmarkFixture, store: kvstore.Store) -> None:
    prompt = store.prompt(TOKEN_IDS[: PROMPT_TOKENS // 8] + 1)
    benchmark(lambda: store.write(prompt).abort())
