"""The simulator's caches: the pool's own index and checkpoints over memory that is counted."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import DeploymentError, SimulationError
from kvstore.pool import LadderCheckpoints
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import CacheSize, Cluster
from kvstore.schedule.policies.snapshot import NOTHING_CACHED
from kvstore.simulate import tier
from kvstore.simulate.cache import ClusterCache
from kvstore.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 16
STATE_BYTES, TOKEN_BYTES = 1000.0, 10.0
BLOCK_BYTES = int(TOKEN_BYTES * BLOCK)
HYBRID = KvSize(STATE_BYTES, TOKEN_BYTES)
DENSE = KvSize(0.0, TOKEN_BYTES)
WINDOWED = KvSize(0.0, TOKEN_BYTES, 7.0, 40)
STATES_ONLY = KvSize(STATE_BYTES, 0.0)


def cache_of(
    dram_bytes: float = 1e15, ssd_bytes: float = 0.0, *, kv: KvSize = HYBRID, block_tokens: int = BLOCK
) -> ClusterCache:
    profile = Profile("p", "made up", PolynomialCurve((0.1, 0.1), 1000.0), kv, PolynomialCurve((0.02,)), 8, 1, 1 << 20)
    size = CacheSize(dram_bytes, ssd_bytes, ssd_read_bytes_per_s=1000.0)
    return ClusterCache(Cluster("here", profile, 1, 1, cache=size), block_tokens)


def keys_of(blocks: Sequence[object]) -> bytes:
    """Chained, as real ones are: each covers all before it."""
    chain, joined = 0, b""
    for block in blocks:
        chain = hash((chain, block)) & (1 << 63) - 1
        joined += chain.to_bytes(32, "little")
    return joined


def request_of(blocks: Sequence[object], tokens: int | None = None, salt: bytes = b"") -> Request:
    return Request(0, 0.0, len(blocks) * BLOCK + 1 if tokens is None else tokens, 8, keys_of(blocks), salt=salt)


def store(cache: ClusterCache, request: Request, resume_tokens: int = 0) -> None:
    cache.store(request, keys=request.keys, tokens=request.prompt_tokens, resume_tokens=resume_tokens)


def serve(cache: ClusterCache, request: Request) -> int:
    """Find, begin there, and keep the prompt; where it began."""
    found = cache.find(request)
    cache.used(request, found)
    store(cache, request, found.resume_tokens)
    return found.resume_tokens


def test_a_prompt_is_found_up_to_its_last_whole_block_and_never_whole() -> None:
    for kv in (HYBRID, DENSE, WINDOWED, STATES_ONLY):
        cache = cache_of(kv=kv)
        store(cache, request_of(range(4)))
        assert cache.find(request_of(range(4))).resume_tokens == 64
        found = cache.find(request_of(range(4), tokens=64))  # one token must be computed
        assert found.resume_tokens == (48 if kv is DENSE else 0)
        assert cache.find(request_of([9, 9])) == NOTHING_CACHED
        cache.check()


def test_attention_without_a_state_is_no_resume_point() -> None:
    cache = cache_of()
    store(cache, request_of(range(8)))
    found = cache.find(request_of([*range(5), 99]))
    assert (found.resume_tokens, found.attention_tokens, found.tier) == (0, 5 * BLOCK, "")


def test_a_branch_point_gets_a_state_with_the_second_prompt() -> None:
    cache = cache_of()
    one, two, three = (request_of([*range(5), name, name + 1]) for name in (100, 200, 300))
    store(cache, one)
    assert serve(cache, two) == 0
    assert serve(cache, three) == 5 * BLOCK


def test_the_state_of_a_handed_over_cache_is_at_its_end_only() -> None:
    cache = cache_of()
    request = request_of(range(64))
    store(cache, request, resume_tokens=request.prompt_tokens - 1)
    assert cache.counts()[0].used_bytes == 64 * BLOCK_BYTES + STATE_BYTES
    assert cache.find(request).resume_tokens == 64 * BLOCK


def test_states_are_where_the_ladder_says() -> None:
    cache = cache_of()
    request = request_of(range(128))
    store(cache, request)
    lengths = LadderCheckpoints().suggest(128 * BLOCK, 0, (), BLOCK)
    assert len(lengths) > 2
    for length in lengths:
        diverging = request_of([*range(length // BLOCK), -1, -2])
        assert cache.find(diverging).resume_tokens == length
    assert cache.counts()[0].used_bytes == 128 * BLOCK_BYTES + len(lengths) * STATE_BYTES


def test_a_window_weighs_what_its_tokens_do() -> None:
    cache = cache_of(kv=WINDOWED)
    store(cache, request_of(range(2)))
    assert cache.counts()[0].used_bytes == 2 * BLOCK_BYTES + ceil(7.0 * 32)
    store(cache, request_of([7, 8, 9]))
    assert cache.counts()[0].used_bytes == 5 * BLOCK_BYTES + ceil(7.0 * 32) + ceil(7.0 * 40)


def test_what_was_used_last_stays() -> None:
    cache = cache_of(3 * (4 * BLOCK_BYTES + STATE_BYTES))
    prompts = [request_of([name, 1, 2, 3]) for name in range(4)]
    for prompt in prompts[:3]:
        serve(cache, prompt)
    assert serve(cache, prompts[0]) == 64
    serve(cache, prompts[3])
    assert [cache.find(prompt).resume_tokens for prompt in prompts] == [64, 0, 64, 64]
    counts = cache.counts()[0]
    assert counts.evicted_bytes > 0
    assert counts.hit_tokens == 64
    assert counts.asked_tokens == 5 * 65
    cache.check()


def test_what_is_too_large_is_refused_and_disturbs_nothing() -> None:
    cache = cache_of(4 * BLOCK_BYTES + STATE_BYTES)
    small, large = request_of(range(4)), request_of(range(100, 108))
    store(cache, small)
    store(cache, large)
    assert cache.find(small).resume_tokens == 64
    assert cache.find(large) == NOTHING_CACHED
    assert cache.counts()[0].refused_tokens == large.prompt_tokens
    assert cache.counts()[0].evicted_bytes == 0
    cache.check()


def test_a_text_that_needs_its_own_prefix_and_more_room_than_the_rest_is_refused() -> None:
    """Its own blocks are not evicted for it."""
    cache = cache_of(6 * BLOCK_BYTES + STATE_BYTES)
    store(cache, request_of(range(4)))
    longer = request_of(range(6))
    store(cache, longer, resume_tokens=64)
    assert cache.counts()[0].refused_tokens == longer.prompt_tokens
    assert cache.find(longer).resume_tokens == 64
    cache.check()


def test_what_memory_evicts_is_found_on_ssd_and_comes_back() -> None:
    cache = cache_of(4 * BLOCK_BYTES + STATE_BYTES, 1e12)
    first, second = request_of(range(4)), request_of([*range(2), 8, 9])
    serve(cache, first)
    serve(cache, request_of([50, 51, 52, 53]))
    found = cache.find(first)
    assert (found.resume_tokens, found.tier) == (64, "ssd")
    assert found.load_s == pytest.approx((4 * BLOCK_BYTES + STATE_BYTES) / 1000.0)
    cache.used(first, found)
    assert cache.find(first).tier == "dram"
    assert cache.find(first).load_s == 0
    assert cache.find(second).attention_tokens == 2 * BLOCK
    dram, ssd = cache.counts()
    assert (dram.tier, ssd.tier) == ("dram", "ssd")
    assert (dram.hit_tokens, ssd.hit_tokens) == (0, 64)
    assert dram.asked_tokens == ssd.asked_tokens == 3 * 65
    cache.check()


def test_ssd_is_asked_for_what_memory_has_not() -> None:
    cache = cache_of(1e12, 1e12)
    serve(cache, request_of(range(4)))
    assert serve(cache, request_of([*range(4), 9])) == 64
    dram, ssd = cache.counts()
    assert (dram.asked_tokens, dram.hit_tokens) == (65 + 81, 64)
    assert (ssd.asked_tokens, ssd.hit_tokens) == (65 + 81 - 64, 0)


def test_only_what_memory_lacks_is_loaded() -> None:
    cache = cache_of(5 * BLOCK_BYTES + STATE_BYTES, 1e12)
    first = request_of(range(4))
    serve(cache, first)
    serve(cache, request_of([60]))  # takes the place of the state, which is the oldest of the first prompt
    found = cache.find(first)
    assert found.attention_tokens == 64
    assert found.tier == "ssd"
    assert found.load_s == pytest.approx(STATE_BYTES / 1000.0)


def test_ssd_alone_serves() -> None:
    cache = cache_of(0.0, 1e12)
    assert serve(cache, request_of(range(4))) == 0
    assert serve(cache, request_of(range(4))) == 64
    assert [counts.tier for counts in cache.counts()] == ["ssd"]


def test_without_memory_nothing_is_kept() -> None:
    cache = cache_of(0.0)
    assert serve(cache, request_of(range(4))) == 0
    assert serve(cache, request_of(range(4))) == 0
    assert cache.counts() == ()


def test_finding_counts_nothing() -> None:
    cache = cache_of()
    store(cache, request_of(range(4)))
    before = cache.counts()
    cache.find(request_of(range(4)))
    assert cache.counts() == before


def test_prompts_shorter_than_a_block_are_nobodys() -> None:
    cache = cache_of()
    assert serve(cache, Request(0, 0.0, 5, 1, b"")) == 0
    assert cache.counts()[0].used_bytes == 0


def test_a_key_that_names_two_prefixes_is_an_error() -> None:
    cache = cache_of()
    store(cache, request_of(range(4)))
    moved = request_of(range(4)).keys[32:64] + request_of(range(4)).keys[:32]
    with pytest.raises(SimulationError, match="names two prefixes"):
        cache.store(request_of(range(2)), keys=moved, tokens=32, resume_tokens=0)
    with pytest.raises(SimulationError, match="names two prefixes"):
        store(cache, request_of(range(5), salt=b"another"))


def test_a_block_beyond_what_the_index_counts_is_an_error() -> None:
    with pytest.raises(SimulationError, match="choose smaller blocks"):
        cache_of(kv=KvSize(0.0, 1e6), block_tokens=1 << 13)


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("what", ["dram_bytes", "ssd_bytes", "ssd_read_bytes_per_s"])
def test_a_size_that_cannot_be_is_an_error(what: str, wrong: float) -> None:
    with pytest.raises(DeploymentError, match=what):
        CacheSize(**{what: wrong})
    with pytest.raises(DeploymentError, match="must be positive"):
        CacheSize(ssd_bytes=1.0, ssd_read_bytes_per_s=0.0)


def test_records_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier, "SIMULATED_RECORDS_MAX", 6)
    cache = cache_of()
    store(cache, request_of(range(4)))
    with pytest.raises(SimulationError, match=r"more than 6 blocks; choose larger blocks"):
        store(cache, request_of(range(10, 14)))
    cache.check()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from((HYBRID, DENSE, WINDOWED, STATES_ONLY)),
    st.integers(1, 60),
    st.sampled_from((0, 100)),
)
def test_budgets_hold_and_equal_histories_give_equal_answers(
    seed: int, kv: KvSize, capacity_blocks: int, ssd_blocks: int
) -> None:
    rng = np.random.default_rng(seed)
    caches = [cache_of(capacity_blocks * 500.0, ssd_blocks * 500.0, kv=kv) for _ in range(2)]
    texts: list[list[int]] = [[]]
    for _ in range(60):
        shared = texts[int(rng.integers(max(0, len(texts) - 5), len(texts)))]
        cut = int(rng.integers(0, len(shared) + 1))
        blocks = [*shared[:cut], *rng.integers(0, 1000, int(rng.integers(1, 12))).tolist()]
        texts.append(blocks)
        request = request_of(blocks)
        answers = [cache.find(request) for cache in caches]
        assert answers[0] == answers[1]
        assert answers[0].resume_tokens <= answers[0].attention_tokens <= request.prompt_tokens
        for cache in caches:
            serve(cache, request)
            cache.check()
        after = caches[0].find(request)
        if not sum(counts.refused_tokens for counts in caches[0].counts()):
            assert after.resume_tokens == len(blocks) * BLOCK  # what was just stored is there
    assert caches[0].counts() == caches[1].counts()
