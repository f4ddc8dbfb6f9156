"""`Store.explain`: what it says agrees with what a match finds, and names each obstacle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import SpecError, StoreClosedError, TokenError
from kvstore.events import MissReason
from kvstore.limits import CANDIDATES_MAX
from kvstore.pool import Explanation, Pool
from kvstore.pool.explain import TierLookup, explain
from kvstore.spec import WHOLE, ChunkGrid, Shard
from kvstore.store import open_store
from kvstore.testing.specs import dense, hybrid, latent, pure_state, put_all

if TYPE_CHECKING:
    from kvstore.store import Store

B = 16
IDS = [(7 * number) % 1000 for number in range(70)]


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None, **more: Any) -> None:
    with store.write(ids, resume_at=resume_at, **more) as writer:
        put_all(writer)
        writer.commit()


def groups_of(explanation: Explanation, tier: int = 0) -> dict[str, tuple[int, ...]]:
    return {group.name: group.tokens for group in explanation.tiers[tier].groups}


def test_where_everything_is() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (32, 64))
        before = store.statistics()
        explanation = store.explain(IDS)
        assert store.statistics() == before, "asking has changed something"
        assert (explanation.tokens, explanation.tier, explanation.cap_tokens) == (64, "dram", 69)
        assert groups_of(explanation) == {"attention": (64,), "state": (64, 32), "window": (64, 32)}
        match = store.match(IDS)
        (tier,) = explanation.tiers
        assert [(each.tokens, each.size_bytes) for each in tier.candidates] == [
            (each.tokens, each.size_bytes) for each in match.candidates
        ]
        assert tier.candidates[0].copy_s is None
        assert tier.reasons == match.missing.reasons
        assert "64 tokens in dram" in str(explanation)
        with store.read(match) as lease:
            lease.layer(1).read("keys")
        timed = store.explain(IDS).tiers[0].candidates[0]
        assert timed.copy_s == pytest.approx(store.match(IDS).expected_load_s)
        assert (timed.load_s, "copied out in" in str(store.explain(IDS))) == (0.0, True)


def test_all_that_can_be_used_is_there() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (70,))
        explanation = store.explain([*IDS, 1])
        assert (explanation.tokens, explanation.tiers[0].reason, explanation.remedies) == (70, None, ())
        assert groups_of(explanation) == {"attention": (70,), "state": (70,), "window": (70,)}, "a tail counts"


def test_obstacles_and_remedies() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (32, 64), grid=ChunkGrid.every(32, upto=70))
        key = store.prompt(IDS).path.key
        other = store.explain(IDS, grid=ChunkGrid.every(16, upto=70))
        assert (other.tokens, other.tiers[0].reason) == (0, MissReason.OTHER_CHUNKS)
        assert other.tiers[0].other_chunks_tokens == 64
        assert any("match without grid=: 64 tokens" in remedy for remedy in other.remedies)
        store.pool.evict(key(3), states_only=True)
        evicted = store.explain(IDS)
        assert (evicted.tokens, evicted.tiers[0].evicted_state_tokens) == (32, 64)
        assert evicted.tiers[0].reason is MissReason.EVICTED
        assert any("resume_at=(64,)" in remedy for remedy in evicted.remedies)
        with store.write([*IDS, 1], resume_at=(71,)) as writer:
            pending = store.explain([*IDS, 1, 2])
            assert (pending.tiers[0].pending_tokens, pending.tiers[0].reason) == (71, MissReason.PENDING)
            assert any("store.when_ready(prompt, 71)" in remedy for remedy in pending.remedies)
            writer.abort()
        store.pool.condemn(key(0), is_state=False)
        damaged = store.explain(IDS)
        assert (damaged.tokens, damaged.tiers[0].reason) == (0, MissReason.DAMAGED)
        assert "were damaged" in str(damaged)
        unknown = store.explain(IDS, salt=b"other")
        assert (unknown.tokens, unknown.tiers[0].reason) == (0, MissReason.NEVER_STORED)


def test_another_shard() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (64,), shard=Shard(0, 2))
        explanation = store.explain(IDS, shard=Shard(1, 2))
        assert (explanation.tokens, explanation.tiers[0].reason) == (0, MissReason.OTHER_SHARD)
        assert explanation.tiers[0].is_other_shard
        assert any("other shards" in remedy for remedy in explanation.remedies)
        assert store.explain(IDS, shard=Shard(0, 2)).tokens == 64


@pytest.mark.parametrize("make", [dense, pure_state, latent], ids=lambda make: make.__name__)
def test_other_models(make: Any) -> None:
    with open_store(make(B), dram="8MiB") as store:
        write(store, IDS, (64,))
        explanation = store.explain(IDS)
        assert explanation.tokens == store.match(IDS).tokens == 64
        assert explanation.has_attention == bool(store.spec.attention_groups)
        assert (explanation.tiers[0].attention_tokens > 0) == explanation.has_attention
        assert str(explanation)


def test_several_tiers() -> None:
    """A tier that has more than memory is named, and what loading from it costs."""
    spec = hybrid(B)
    with open_store(spec, dram="8MiB") as fast, open_store(spec, dram="8MiB") as slow:
        write(fast, IDS, (32,))
        write(slow, IDS, (64,))
        pools = [fast.pool, slow.pool]
        assert all(isinstance(pool, Pool) for pool in pools)
        lookups = [*pools[0].lookups(), *pools[1].lookups()]  # type: ignore[attr-defined]
        lookups[1] = TierLookup("ssd", lookups[1].find, is_durable=True, seconds_per_byte=1e-6)
        explanation = explain(spec, fast.prompt(IDS), WHOLE, None, lookups)
        assert (explanation.tokens, explanation.tier) == (64, "ssd")
        assert [tier.tokens for tier in explanation.tiers] == [32, 64]
        candidate = explanation.tiers[1].candidates[0]
        assert candidate.load_s == pytest.approx(candidate.size_bytes * 1e-6)
        assert "ssd (durable)" in str(explanation)
        assert "loaded in" in str(explanation)


def test_a_text_stays_short() -> None:
    with open_store(dense(1), dram="8MiB") as store:
        ids = list(range(CANDIDATES_MAX + 9))
        write(store, ids)
        text = str(store.explain(ids))
        assert f"and {CANDIDATES_MAX - 8} shorter ones" in text
        assert len(text.splitlines()) < 20


def test_what_cannot_be_explained() -> None:
    store = open_store(dense(B), dram="8MiB")
    with pytest.raises(TokenError):
        store.explain([])
    with pytest.raises(SpecError):
        store.explain(IDS, shard=(0, 2))  # type: ignore[arg-type]
    store.close()
    with pytest.raises(StoreClosedError):
        store.explain(IDS)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.booleans()), max_size=4),
    st.lists(st.integers(0, 1), min_size=2, max_size=12),
    st.sampled_from((None, 2, 4)),
)
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_the_match(stored: list[tuple[list[int], bool]], asked: list[int], chunk: int | None) -> None:
    """Whatever is there: the same candidates, the same reason, and it survives its JSON form."""
    with open_store(hybrid(4), dram="4MiB") as store:
        for ids, is_on_grid in stored:
            write(store, ids, grid=ChunkGrid.every(4, upto=len(ids)) if is_on_grid else None)
        grid = None if chunk is None else ChunkGrid.every(chunk, upto=len(asked))
        explanation = store.explain(asked, grid=grid)
        match = store.match(asked, grid=grid)
        (tier,) = explanation.tiers
        assert [each.tokens for each in tier.candidates] == [each.tokens for each in match.candidates]
        assert tier.reason == match.outcome()[2]
        for group in tier.groups:
            if group.is_state:
                assert {each.tokens for each in match.candidates} <= set(group.tokens)
            elif match:
                assert group.tokens[0] >= match.tokens
        assert bool(explanation.remedies) == (match.tokens < len(asked) - 1)
        assert Explanation.of_document(explanation.document()) == explanation
        assert str(explanation)
