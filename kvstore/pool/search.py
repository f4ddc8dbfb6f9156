"""Finding resume points: the read side of the index. Pure functions over it; the pool holds its lock."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kvstore.limits import CANDIDATES_MAX
from kvstore.pool.path import NodePath

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.node import Entry, PrefixNode
    from kvstore.pool.prompt import Prompt
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


@dataclass(frozen=True)
class Needs:
    """What a worker must find: (group, span count, units) of each rule's groups."""

    attention: tuple[tuple[int, int, frozenset[int]], ...]
    states: tuple[tuple[int, int, frozenset[int]], ...]


@lru_cache(maxsize=1024)
def needs_of(spec: ModelSpec, shard: Shard) -> Needs:
    """The records that a worker needs at each node."""
    return Needs(
        *(
            tuple((group, len(spec.spans[group]), spec.groups[group].units_read_by(shard)) for group in groups)
            for groups in (spec.attention_groups, spec.state_groups)
        )
    )


@dataclass(frozen=True)
class Query:
    """A prompt as the index sees it.

    Attributes:
        prompt: ids and keys.
        cap_tokens: the deepest length allowed.
        needs: the records needed at each node.
        grid: chunk boundaries to insist on; None takes any.
    """

    prompt: Prompt
    cap_tokens: int
    needs: Needs
    grid: ChunkGrid | None


@dataclass(frozen=True)
class Found:
    """Resume points and what stood in the way of deeper ones."""

    candidates: tuple[NodePath, ...]
    attention_tokens: int
    pending_tokens: int
    branch_points: tuple[int, ...]
    reasons: tuple[str, ...]


def covering(
    records: dict[tuple[int, int], list[Entry]],
    group: int,
    spans: int,
    units: frozenset[int],
    grid: bytes | None,
) -> list[Entry] | None:
    """Entries that together hold the units of every span, or None. Under `grid` only those computed so."""
    chosen: list[Entry] = []
    for span in range(spans):
        held = covering_span(records, group, span, units, grid)
        if held is None:
            return None
        chosen.extend(held)
    return chosen


def covering_span(
    records: dict[tuple[int, int], list[Entry]], group: int, span: int, units: frozenset[int], grid: bytes | None
) -> list[Entry] | None:
    """As `covering`, for one span."""
    chosen: list[Entry] = []
    lacking = set(units)
    for entry in records.get((group, span), ()):
        if grid is not None and entry.header.grid != grid:
            continue
        held = {unit for unit in lacking if unit in entry.units}
        if held:
            chosen.append(entry)
            lacking -= held
        if not lacking:
            return chosen
    return None


def _has(
    records: dict[tuple[int, int], list[Entry]],
    needs: tuple[tuple[int, int, frozenset[int]], ...],
    grid: bytes | None,
) -> bool:
    return all(covering(records, group, spans, units, grid) is not None for group, spans, units in needs)


def attention_grid(grid: ChunkGrid | None, end_tokens: int) -> bytes | None:
    """The digest that a block ending there must carry: boundaries up to the end of the chunk it was in."""
    if grid is None:
        return None
    closing = grid.closing(end_tokens)
    return None if closing is None else grid.digest_at(closing)


def search(index: PrefixIndex, query: Query) -> Found:
    """Every resume point of the prompt, deepest first (at most `CANDIDATES_MAX`)."""
    path, block = query.prompt.path, query.prompt.path.block_tokens
    whole = min(len(path.keys), query.cap_tokens // block)
    reach = _attention_reach(index, query, whole)
    candidates: list[NodePath] = []
    pending_tokens = 0
    branch_points: list[int] = []
    deepest_state = 0
    foreign_state = 0
    for blocks in range(whole, -1, -1):
        if len(candidates) >= CANDIDATES_MAX:
            break
        node = index.get(path.keys[blocks - 1]) if blocks else None
        if blocks and node is None:
            continue
        tails = node.tails if node is not None else index.root_tails(path.root)
        for tail in _matching_tails(tails, query, blocks) if tails else ():
            if not candidates and tail.pending:
                pending_tokens = pending_tokens or tail.end_tokens
            if blocks <= reach and _is_resume_point(tail, query, attention=True):
                assert tail.tail_ids is not None
                candidates.append(NodePath(path.root, block, path.keys[:blocks], tail.key, tail.tail_ids))
        if node is None:
            continue
        if not candidates and node.pending:
            pending_tokens = pending_tokens or node.end_tokens
        if blocks <= reach and (node.states or node.had_states or not query.needs.states):
            if _is_resume_point(node, query, attention=False):
                candidates.append(path.prefix(blocks))
            elif node.states and not candidates:
                foreign_state = foreign_state or node.end_tokens
            elif node.had_states and not candidates:
                deepest_state = deepest_state or node.end_tokens
        if _others_go_on(node, path, blocks):
            branch_points.append(node.end_tokens)
    best = candidates[0].tokens if candidates else 0
    if pending_tokens <= best:
        pending_tokens = 0
    beyond = index.get(path.keys[reach]) if reach < whole else None
    is_other_grid = beyond is not None and _has(beyond.attention, query.needs.attention, None)
    reasons = _reasons(query, best, reach * block, deepest_state, foreign_state, is_other_grid=is_other_grid)
    attention_tokens = reach * block if query.needs.attention else 0
    return Found(tuple(candidates), attention_tokens, pending_tokens, tuple(reversed(branch_points)), reasons)


def _others_go_on(node: PrefixNode, path: NodePath, blocks: int) -> bool:
    """Whether other prompts left the path after `blocks` blocks, even if only ghosts remember them."""
    known = len(node.children) + len(node.tails)
    if known != 1:
        return known > 1
    own = path.keys[blocks] if blocks < len(path.keys) else path.tail_key
    return own not in node.children and own not in node.tails


def _attention_reach(index: PrefixIndex, query: Query, whole: int) -> int:
    """Whole blocks from the root whose attention is there without a gap."""
    needs = query.needs.attention
    if not needs:
        return whole
    path, block = query.prompt.path, query.prompt.path.block_tokens
    if query.grid is not None:
        for blocks in range(whole):
            node = index.get(path.keys[blocks])
            grid = attention_grid(query.grid, (blocks + 1) * block)
            if node is None or grid is None or not _has(node.attention, needs, grid):
                return blocks
        return whole
    low, high = 0, whole  # contiguity makes "blocks 1 to n are there" monotone in n
    while low < high:
        middle = (low + high + 1) // 2
        node = index.get(path.keys[middle - 1])
        if node is not None and _has(node.attention, needs, None):
            low = middle
        else:
            high = middle - 1
    return low


def _matching_tails(tails: dict[bytes, PrefixNode], query: Query, blocks: int) -> list[PrefixNode]:
    """Of the tails after `blocks` whole blocks those that the prompt continues, deepest first."""
    start = blocks * query.prompt.path.block_tokens
    matching = []
    for tail in _possible_tails(tails, query, blocks):
        assert tail.tail_ids is not None
        if tail.end_tokens <= query.cap_tokens:
            ids = query.prompt.token_ids[start : tail.end_tokens]
            # The ids alone do not decide: extra inputs enter the key as well.
            if tuple(ids.tolist()) == tail.tail_ids and query.prompt.tail_key(blocks, tail.end_tokens) == tail.key:
                matching.append(tail)
    return sorted(matching, key=lambda tail: -tail.end_tokens)


def _possible_tails(tails: dict[bytes, PrefixNode], query: Query, blocks: int) -> Iterable[PrefixNode]:
    """The tails worth comparing: all, or where many hang on one node, those that the prompt's own keys name."""
    block = query.prompt.path.block_tokens
    if len(tails) <= block:
        return tails.values()
    start = blocks * block
    ends = range(start + 1, min(start + block, query.cap_tokens + 1))
    return [tail for end in ends if (tail := tails.get(query.prompt.tail_key(blocks, end))) is not None]


def _is_resume_point(node: PrefixNode, query: Query, *, attention: bool) -> bool:
    """Whether every state is there, and for a tail its own attention block too."""
    grid = None
    if query.grid is not None:
        if not query.grid.has(node.end_tokens):
            return False
        grid = query.grid.digest_at(node.end_tokens)
    if not query.needs.attention and not query.needs.states:
        return False
    if attention and not _has(node.attention, query.needs.attention, grid):
        return False
    return _has(node.states, query.needs.states, grid)


def _reasons(
    query: Query,
    best: int,
    attention_tokens: int,
    evicted_state: int,
    foreign_state: int,
    *,
    is_other_grid: bool,
) -> tuple[str, ...]:
    cap, block = query.cap_tokens, query.prompt.path.block_tokens
    if best == cap:
        return (f"{cap} is the most that can be reused: an engine computes at least one token",)
    reasons: list[str] = []
    if query.needs.attention and attention_tokens < cap // block * block:
        why = "; what is stored beyond was computed on other chunk boundaries" if is_other_grid else ""
        reasons.append(f"attention reaches {attention_tokens} of {cap} tokens{why}")
    if query.needs.states:
        if foreign_state > best:
            why = "other chunk boundaries or another shard" if query.grid is not None else "another shard"
            reasons.append(f"the states at {foreign_state} are of {why}")
        if evicted_state > best:
            reasons.append(f"the states at {evicted_state} were evicted")
        if not reasons or attention_tokens > best:
            reasons.append(f"no states are stored between {best} and {min(attention_tokens, cap) or cap} tokens")
        reasons.append(f"the next complete states are at {best}" if best else "no complete states are stored")
    elif query.grid is not None and attention_tokens > best:
        reasons.append(f"the resume point must lie on a chunk boundary; the deepest that does is {best}")
    if not reasons:
        reasons.append(f"{cap - best} tokens past {best} were never stored as a whole block or a tail")
    return tuple(reasons)
