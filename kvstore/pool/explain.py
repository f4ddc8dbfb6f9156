"""Explaining a match: the same questions as a match asks, put to each tier for each group by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from kvstore.events import MissReason
from kvstore.pool.explanation import CandidateReport, Explanation, GroupReport, TierReport
from kvstore.pool.search import Query, first_reason, reasons
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvstore._native import Finding
    from kvstore.events import RemovedWhy
    from kvstore.pool.prompt import Prompt
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

Find: TypeAlias = "Callable[[Query], Finding]"


@dataclass(frozen=True)
class TierLookup:
    """How to look into a tier.

    Attributes:
        name: of the tier.
        find: as `Shelf.find`.
        is_durable: whether what it holds is there again after a crash.
        seconds_per_byte: what loading from it costs: 0 for memory, None before anything was loaded.
        gone: as `Query.gone`, of its index.
    """

    name: str
    find: Find
    is_durable: bool = False
    seconds_per_byte: float | None = None
    gone: Mapping[tuple[bytes, bool], RemovedWhy] | None = None


def explain(
    spec: ModelSpec, prompt: Prompt, shard: Shard, grid: ChunkGrid | None, lookups: Sequence[TierLookup]
) -> Explanation:
    """What each tier has of a prompt, held as the prompt says, and what it lacks. Nothing is changed by asking."""
    cap = len(prompt) - 1
    tiers = []
    for lookup in lookups:
        query = Query(spec, prompt, prompt.path, cap, shard, grid, gone=lookup.gone)
        tiers.append(_tier(lookup, query))
    best = max((tier.tokens for tier in tiers), default=0)
    return Explanation(len(prompt), cap, bool(spec.attention_groups), tuple(tiers), _remedies(spec, cap, best, tiers))


def _tier(lookup: TierLookup, query: Query) -> TierReport:
    spec, found = query.spec, lookup.find(query)
    is_all = found.tokens == query.cap_tokens
    anyhow = 0 if query.grid is None else lookup.find(replace(query, grid=None)).tokens
    return TierReport(
        name=lookup.name,
        is_durable=lookup.is_durable,
        attention_tokens=found.attention_tokens if spec.attention_groups else 0,
        groups=tuple(_group(lookup.find, query, number) for number in range(len(spec.groups))),
        candidates=tuple(_candidate(lookup, query, tokens) for _, tokens, _ in found.candidates),
        pending_tokens=found.pending_tokens,
        other_chunks_tokens=anyhow if anyhow > found.tokens else 0,
        evicted_attention_tokens=found.evicted_attention_tokens,
        evicted_state_tokens=found.evicted_state_tokens,
        foreign_state_tokens=found.foreign_state_tokens,
        is_other_shard=found.is_other_shard,
        reason=None if is_all else first_reason(query, found),
        reasons=() if is_all else reasons(query, found),
    )


def _group(find: Find, query: Query, number: int) -> GroupReport:
    group = query.spec.groups[number]
    found = find(replace(query, groups=(number,)))
    if group.rule is ReuseRule.ATTENTION:
        deepest = max(found.attention_tokens, found.tokens)  # which may lie in a tail
        return GroupReport(group.name, False, (deepest,) if deepest else ())
    return GroupReport(group.name, True, tuple(tokens for _, tokens, _ in found.candidates))


def _candidate(lookup: TierLookup, query: Query, tokens: int) -> CandidateReport:
    size_bytes = sum(query.spec.bytes_by_group(tokens, query.shard).values())
    load_s = None if lookup.seconds_per_byte is None else size_bytes * lookup.seconds_per_byte
    return CandidateReport(tokens, size_bytes, load_s)


def _remedies(spec: ModelSpec, cap: int, best: int, tiers: Sequence[TierReport]) -> tuple[str, ...]:
    """What would bring a deeper resume point, the cheapest first."""
    if best == cap:
        return ()
    listed = []
    pending = max((tier.pending_tokens for tier in tiers), default=0)
    if pending > best:
        listed.append(f"wait for the writer that will commit {pending} tokens: store.when_ready(prompt, {pending})")
    other = max((tier.other_chunks_tokens for tier in tiers), default=0)
    if other > best:
        listed.append(f"match without grid=: {other} tokens are there, computed on other chunk boundaries")
    if any(tier.is_other_shard or (tier.reason is MissReason.OTHER_SHARD) for tier in tiers):
        listed.append("the share of the other shards must be written: what is there has other shard units")
    reach = max((tier.attention_tokens for tier in tiers), default=0)
    if spec.state_groups and reach > best:
        listed.append(f"store states up to {reach}, to which attention reaches: write(prompt, resume_at=({reach},))")
    if any(tier.reason in (MissReason.EVICTED, MissReason.EXPIRED) for tier in tiers):
        listed.append("what was there would have to stay: more memory, another tier, a pin or a longer time to live")
    listed.append(f"prefill from {max(best, 0)} tokens on, and commit it")
    return tuple(listed)
