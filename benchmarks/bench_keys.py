"""Keys per second: a whole prompt at once, and one block more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.keys import KeyChain, prefix_keys, root_key

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = root_key(bytes(32), salt=b"benchmark")
PROMPT_TOKENS = 131_072
TOKEN_IDS = np.random.default_rng(1).integers(0, 150_000, PROMPT_TOKENS).astype(np.uint32)


def note_keys_per_s(benchmark: Any, keys: int) -> None:
    benchmark.extra_info["keys_per_s"] = round(keys / benchmark.stats.stats.median)


@pytest.mark.parametrize("block_tokens", [16, 64, 256])
def test_keys_of_a_prompt(benchmark: BenchmarkFixture, block_tokens: int) -> None:
    keys = benchmark(prefix_keys, ROOT, TOKEN_IDS, block_tokens)
    assert len(keys) == PROMPT_TOKENS // block_tokens
    note_keys_per_s(benchmark, len(keys))


def test_one_block_more(benchmark: Any) -> None:
    chain = KeyChain(ROOT, 64)
    chain.extend(TOKEN_IDS)
    block = TOKEN_IDS[:64]
    benchmark.pedantic(chain.extend, args=(block,), rounds=2000)
    note_keys_per_s(benchmark, 1)
