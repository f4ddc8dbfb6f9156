"""Asking the native index how much of a prompt is there, and saying what stood in the way of more."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.limits import CANDIDATES_MAX
from kvstore.pool.index import needs_of
from kvstore.pool.match import Candidate, Match, Missing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore._native import Finding
    from kvstore._native import PrefixIndex as NativeIndex
    from kvstore.pool.path import NodePath
    from kvstore.pool.prompt import Prompt
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


@dataclass(frozen=True)
class Query:
    """What is asked of the index.

    Attributes:
        prompt: ids and keys.
        cap_tokens: the deepest length allowed.
        shard: whose share is asked for.
        grid: chunk boundaries to insist on; None takes any.
    """

    spec: ModelSpec
    prompt: Prompt
    cap_tokens: int
    shard: Shard
    grid: ChunkGrid | None


def search(native: NativeIndex, query: Query) -> Finding:
    """Every resume point of the prompt, deepest first (at most `CANDIDATES_MAX`)."""
    prompt = query.prompt
    packed = prompt.path.packed
    grid = None if query.grid is None else query.grid.packed
    needs = needs_of(query.spec, query.shard)
    excluded: list[int] = []
    while True:
        found = native.match(packed, prompt.token_ids, query.cap_tokens, needs, grid, CANDIDATES_MAX, excluded)
        if not found.has_tails:
            return found
        # The ids alone do not decide: extra inputs enter the key as well.
        foreign = [node for blocks, end, key, node in found.tails if prompt.tail_key(blocks, end) != key]
        if not foreign:
            return found
        excluded.extend(foreign)


def answer(query: Query, found: Finding, tier: str, suggest: Callable[[int, Sequence[int]], tuple[int, ...]]) -> Match:
    """The match that a finding amounts to; what is not looked at is not computed.

    Args:
        suggest: checkpoints from the resume point's length and the known branch points.
    """

    def suggested() -> tuple[int, ...]:
        lengths = suggest(found.tokens, found.branch_points)
        return lengths if query.grid is None else _on_grid(lengths, found.tokens, query.prompt, query.grid)

    def missing() -> Missing:
        attention_tokens = found.attention_tokens if query.spec.attention_groups else 0
        return Missing(query.cap_tokens, attention_tokens, reasons(query, found))

    return Match.lazily(
        {
            "candidates": lambda: tuple(_candidate(query, tier, *each) for each in found.candidates),
            "missing": missing,
            "suggested": suggested,
        },
        tokens=found.tokens,
        pending_tokens=found.pending_tokens,
        shard=query.shard,
        grid=query.grid,
    )


def _candidate(query: Query, tier: str, blocks: int, tokens: int, tail_key: bytes | None) -> Candidate:
    def path() -> NodePath:
        whole = query.prompt.path
        if tail_key is None:
            return whole.prefix(blocks)
        tail_ids = query.prompt.token_ids[blocks * whole.block_tokens : tokens]
        return whole.with_tail(blocks, tail_key, tuple(tail_ids.tolist()))

    makers = {"path": path, "bytes_by_group": lambda: query.spec.bytes_by_group(tokens, query.shard)}
    return Candidate.lazily(makers, tokens=tokens, tier=tier)


def _on_grid(lengths: Sequence[int], resume_tokens: int, prompt: Prompt, grid: ChunkGrid) -> tuple[int, ...]:
    """Checkpoints moved back to chunk boundaries, since a state exists only between chunks."""
    block = prompt.path.block_tokens
    possible = [
        boundary
        for boundary in grid.boundaries
        if resume_tokens < boundary <= len(prompt) and (boundary % block == 0 or boundary == len(prompt))
    ]
    positions = {bisect_right(possible, length) for length in lengths}
    return tuple(possible[position - 1] for position in sorted(positions) if position)


def reasons(query: Query, found: Finding) -> tuple[str, ...]:
    """Why nothing deeper serves, the deepest obstacle first."""
    best, attention_tokens = found.tokens, found.attention_tokens
    cap, block = query.cap_tokens, query.prompt.path.block_tokens
    if best == cap:
        return (f"{cap} is the most that can be reused: an engine computes at least one token",)
    listed: list[str] = []
    if query.spec.attention_groups and attention_tokens < cap // block * block:
        why = "; what is stored beyond was computed on other chunk boundaries" if found.is_other_grid else ""
        listed.append(f"attention reaches {attention_tokens} of {cap} tokens{why}")
    if query.spec.state_groups:
        if found.foreign_state_tokens > best:
            why = "other chunk boundaries or another shard" if query.grid is not None else "another shard"
            listed.append(f"the states at {found.foreign_state_tokens} are of {why}")
        if found.evicted_state_tokens > best:
            listed.append(f"the states at {found.evicted_state_tokens} were evicted")
        if not listed or attention_tokens > best:
            listed.append(f"no states are stored between {best} and {min(attention_tokens, cap) or cap} tokens")
        listed.append(f"the next complete states are at {best}" if best else "no complete states are stored")
    elif query.grid is not None and attention_tokens > best:
        listed.append(f"the resume point must lie on a chunk boundary; the deepest that does is {best}")
    if not listed:
        listed.append(f"{cap - best} tokens past {best} were never stored as a whole block or a tail")
    return tuple(listed)
