"""A simulated cluster's cache: finding and storing prompts of 27,000 tokens in blocks of 512."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import CacheSize, Cluster
from kvstore.simulate.cache import ClusterCache
from kvstore.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT_TOKENS, BLOCK_TOKENS = 27_136, 512
SIZES = {
    "unbounded": CacheSize(1e15),
    "evicting": CacheSize(4e11),
    "evicting, with SSD": CacheSize(4e11, 4e12),
}


def cache_of(size: CacheSize, *, has_states: bool) -> ClusterCache:
    kv = KvSize(173.92 * 2**20 if has_states else 0.0, 17_280.0)
    profile = Profile("p", "made up", PolynomialCurve((0.4, 0.1), 1000.0), kv, PolynomialCurve((0.02,)), 8, 1, 1 << 20)
    return ClusterCache(Cluster("here", profile, 1, 1, cache=size), BLOCK_TOKENS)


def requests(seed: int = 1) -> Iterator[Request]:
    """Half of the prompts begin with a part of one of the last 300."""
    rng = np.random.default_rng(seed)
    latest: list[bytes] = []
    while True:
        keys = b""
        if latest and rng.random() < 0.5:
            earlier = latest[int(rng.integers(len(latest)))]
            keys = earlier[: 32 * int(rng.integers(1, len(earlier) // 32))]
        keys += rng.bytes(PROMPT_TOKENS // BLOCK_TOKENS * 32 - len(keys))
        latest = [*latest[-299:], keys]
        yield Request(0, 0.0, PROMPT_TOKENS + 1, 1024, keys)


@pytest.mark.parametrize("has_states", [True, False], ids=["hybrid", "dense"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_prompt_is_found_used_and_stored(benchmark: Any, size: CacheSize, has_states: bool) -> None:
    cache, coming = cache_of(size, has_states=has_states), requests()

    def serve(request: Request) -> None:
        found = cache.find(request)
        cache.used(request, found)
        cache.store(request, keys=request.keys, tokens=request.prompt_tokens, resume_tokens=found.resume_tokens)

    for _ in range(1000):
        serve(next(coming))
    benchmark.pedantic(serve, setup=lambda: ((next(coming),), {}), rounds=3000)
    cache.check()


@pytest.mark.parametrize("has_states", [True, False], ids=["hybrid", "dense"])
def test_a_prompt_is_found(benchmark: Any, has_states: bool) -> None:
    """What a router asks of each cluster, for each request."""
    cache, coming = cache_of(SIZES["unbounded"], has_states=has_states), requests()
    kept = [next(coming) for _ in range(1000)]
    for request in kept:
        cache.store(request, keys=request.keys, tokens=request.prompt_tokens, resume_tokens=0)
    asked = cycle(kept)
    benchmark(lambda: cache.find(next(asked)))
