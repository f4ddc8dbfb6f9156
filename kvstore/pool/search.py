"""Asking the native index how much of a prompt is there, and saying what stood in the way of more."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.events import MissReason, RemovedWhy
from kvstore.limits import CANDIDATES_MAX
from kvstore.pool.index import needs_of
from kvstore.pool.match import Candidate, Match, Missing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvstore._native import Finding
    from kvstore._native import PrefixIndex as NativeIndex
    from kvstore.pool.path import NodePath, SparseNode
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.sparse import SparseNodes
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


@dataclass(frozen=True)
class Query:
    """What is asked of the index.

    Attributes:
        prompt: ids and keys.
        path: the nodes that are looked for; the prompt's own, or those of another coverage.
        cap_tokens: the deepest length allowed.
        shard: whose share is asked for.
        grid: chunk boundaries to insist on; None takes any.
        sparse: known sparse nodes, whose tails are taken; None takes the prompt's own alone.
        groups: those that are asked for; None for all of the spec. A resume point needs all.
        gone: why nodes went that did not go to make room, by key and whether it was their states.
    """

    spec: ModelSpec
    prompt: Prompt
    path: NodePath
    cap_tokens: int
    shard: Shard
    grid: ChunkGrid | None
    sparse: SparseNodes | None = None
    groups: tuple[int, ...] | None = None
    gone: Mapping[tuple[bytes, bool], RemovedWhy] | None = None

    def went(self, node: int, *, is_state: bool) -> RemovedWhy | None:
        """Why a node of the path went, if it is known that it did not go to make room."""
        return self.gone.get((self.path.keys[node], is_state)) if self.gone else None

    def tail_node(self, blocks: int, end_tokens: int, key: bytes) -> tuple[bool, SparseNode | None]:
        """Whether the tail of this key is the prompt's, and its coverage if it is not held whole."""
        own_key, own = self._own_tail(blocks, end_tokens)
        if key == own_key:
            return True, own
        sparse = None if self.sparse is None else self.sparse.tail_node(self.prompt, self.path, blocks, end_tokens, key)
        return sparse is not None, sparse

    def _own_tail(self, blocks: int, end_tokens: int) -> tuple[bytes, SparseNode | None]:
        if self.path is self.prompt.path:
            return self.prompt.tail_node(blocks, end_tokens)
        parent = self.path.keys[blocks - 1] if blocks else self.path.root
        return self.prompt.whole_key(parent, blocks, end_tokens), None


def search(native: NativeIndex, query: Query) -> Finding:
    """Every resume point of the prompt, deepest first (at most `CANDIDATES_MAX`)."""
    prompt = query.prompt
    packed = query.path.packed
    grid = None if query.grid is None else query.grid.packed
    needs = needs_of(query.spec, query.shard, query.groups)
    excluded: list[int] = []
    while True:
        found = native.match(packed, prompt.token_ids, query.cap_tokens, needs, grid, CANDIDATES_MAX, excluded)
        if not found.has_tails:
            return found
        # The ids alone do not decide: extra inputs enter the key as well.
        foreign = [node for blocks, end, key, node in found.tails if not query.tail_node(blocks, end, key)[0]]
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
        return Missing(query.cap_tokens, attention_tokens, first_reason(query, found), reasons(query, found))

    def outcome() -> tuple[int, str | None, MissReason | None]:
        reason = first_reason(query, found) if found.tokens < query.cap_tokens else None
        return query.cap_tokens, tier if found.tokens else None, reason

    def deepest() -> Candidate | None:
        return _candidate(query, tier, *found.candidates[0]) if found.tokens else None

    return Match.lazily(
        {
            "candidates": lambda: tuple(_candidate(query, tier, *each) for each in found.candidates),
            "missing": missing,
            "suggested": suggested,
        },
        _outcome=outcome,
        _deepest=deepest,
        tokens=found.tokens,
        pending_tokens=found.pending_tokens,
        shard=query.shard,
        grid=query.grid,
    )


def _candidate(query: Query, tier: str, blocks: int, tokens: int, tail_key: bytes | None) -> Candidate:
    may_be_sparse = tail_key is not None and (query.sparse is not None or not query.path.is_exact)
    tail = query.tail_node(blocks, tokens, tail_key)[1] if may_be_sparse and tail_key is not None else None

    def path() -> NodePath:
        if tail_key is None:
            return query.path.prefix(blocks)
        tail_ids = query.prompt.token_ids[blocks * query.path.block_tokens : tokens]
        return query.path.with_tail(blocks, tail_key, tuple(tail_ids.tolist()), tail)

    makers = {"path": path, "bytes_by_group": lambda: query.spec.bytes_by_group(tokens, query.shard)}
    return Candidate.lazily(makers, tokens=tokens, tier=tier)


def joined(matches: Sequence[Match]) -> Match:
    """One answer of several, that of the exact path first: of equal lengths what holds every token comes first."""
    candidates: dict[tuple[int, bytes], Candidate] = {}
    for match in matches:
        for each in match.candidates:
            candidates.setdefault((each.tokens, each.path.key(len(each.path) - 1)), each)
    ordered = sorted(candidates.values(), key=lambda each: (-each.tokens, not each.is_exact))
    tokens = ordered[0].tokens if ordered else 0
    deepest = next(match for match in matches if match.tokens == tokens)
    pending_tokens = max(match.pending_tokens for match in matches)
    return replace(
        deepest,
        candidates=tuple(ordered[:CANDIDATES_MAX]),
        missing=matches[0].missing,
        pending_tokens=pending_tokens if pending_tokens > tokens else 0,
    )


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


_GONE = {RemovedWhy.DAMAGED: MissReason.DAMAGED, RemovedWhy.EXPIRED: MissReason.EXPIRED}


def first_reason(query: Query, found: Finding) -> MissReason:
    """The obstacle to look at first: what waiting would cure, what the reader asked for, what went, what never was."""
    best = found.tokens
    if found.pending_tokens > best:
        return MissReason.PENDING
    if found.is_other_grid:
        return MissReason.OTHER_CHUNKS
    if found.is_other_shard:
        return MissReason.OTHER_SHARD
    gone = why_gone(query, found)
    if gone is not None:
        return gone
    if found.foreign_state_tokens > best:
        return MissReason.OTHER_SHARD if query.grid is None else MissReason.OTHER_CHUNKS
    reach = found.attention_tokens if query.spec.attention_groups else 0
    if query.spec.state_groups:
        return MissReason.NO_CHECKPOINT if reach > best else MissReason.NEVER_STORED
    return MissReason.OTHER_CHUNKS if reach > best else MissReason.NEVER_STORED


def why_gone(query: Query, found: Finding) -> MissReason | None:
    """Why the block after the attention, or the deepest states, went; None if neither was there."""
    evicted_states = found.evicted_state_tokens
    was_state = evicted_states > found.tokens
    was_attention = found.evicted_attention_tokens > 0
    if not (was_state or was_attention or query.gone):
        return None
    block = query.path.block_tokens
    why = None
    node = found.attention_tokens // block
    if query.spec.attention_groups and node < len(query.path.keys):
        why = query.went(node, is_state=False)
    if why is None and was_state and not was_attention:
        why = query.went(evicted_states // block - 1, is_state=True)
    if why is not None:
        return _GONE.get(why, MissReason.EVICTED)
    return MissReason.EVICTED if was_state or was_attention else None


def reasons(query: Query, found: Finding) -> tuple[str, ...]:
    """Why nothing deeper serves, the deepest obstacle first."""
    best, attention_tokens = found.tokens, found.attention_tokens
    cap, block = query.cap_tokens, query.prompt.path.block_tokens
    if best == cap:
        return (f"{cap} is the most that can be reused: an engine computes at least one token",)
    listed: list[str] = []
    if query.spec.attention_groups and attention_tokens < cap // block * block:
        listed.append(f"attention reaches {attention_tokens} of {cap} tokens{_beyond(query, found)}")
    if query.spec.state_groups:
        if found.foreign_state_tokens > best:
            why = "other chunk boundaries or another shard" if query.grid is not None else "another shard"
            listed.append(f"the states at {found.foreign_state_tokens} are of {why}")
        if found.evicted_state_tokens > best:
            went = query.went(found.evicted_state_tokens // block - 1, is_state=True)
            listed.append(f"the states at {found.evicted_state_tokens} {_went(went)}")
        upper = min(attention_tokens, cap) or cap
        if upper > best and (not listed or attention_tokens > best):
            listed.append(f"no states are stored between {best} and {upper} tokens")
        if not listed:
            listed.append(f"{cap - best} tokens past {best} were never stored as a whole block or a tail")
        listed.append(f"the next complete states are at {best}" if best else "no complete states are stored")
    elif query.grid is not None and attention_tokens > best:
        listed.append(f"the resume point must lie on a chunk boundary; the deepest that does is {best}")
    if not listed:
        listed.append(f"{cap - best} tokens past {best} were never stored as a whole block or a tail")
    return tuple(listed)


def _beyond(query: Query, found: Finding) -> str:
    """What is known of the block at which the attention ends."""
    if found.is_other_grid:
        return "; what is stored beyond was computed on other chunk boundaries"
    if found.is_other_shard:
        return "; what is stored beyond is of another shard"
    node = found.attention_tokens // query.path.block_tokens
    why = query.went(node, is_state=False) if node < len(query.path.keys) else None
    if why is not None or found.evicted_attention_tokens:
        return f"; the records of the block after that {_went(why)}"
    return ""


def _went(why: RemovedWhy | None) -> str:
    """What became of records."""
    if why is RemovedWhy.DAMAGED:
        return "were damaged"
    return "have expired" if why is RemovedWhy.EXPIRED else "were evicted"
