"""One answer of what several tiers have of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.limits import CANDIDATES_MAX
from kvstore.pool.match import Candidate, Match

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def joined_tiers(
    matches: Sequence[Match],
    are_durable: Sequence[bool],
    load_seconds_per_byte: Mapping[str, float],
    *,
    may_be_sparse: bool,
) -> Match:
    """The answer of all tiers together.

    Each tier's set is contiguous from the root by itself, so what one knows as a resume point is whole there. Of equal
    lengths the first tier's counts. Candidates are joined when they are first looked at.

    Args:
        matches: of each tier, the fastest first; the first is the pool's own.
        are_durable: whether what each of them finds outlives a crash.
        load_seconds_per_byte: what loading has cost, by tier.
        may_be_sparse: whether candidates may be there that do not hold every token.
    """
    own = matches[0]
    deepest = max(matches, key=lambda match: match.tokens)  # the first of them
    tokens = deepest.tokens

    def candidates() -> tuple[Candidate, ...]:
        found: dict[int, Candidate] = {}
        sparse: list[Candidate] = []
        for match, is_durable in zip(matches, are_durable, strict=True):
            for each in match.candidates:
                if may_be_sparse and not each.is_exact:
                    sparse.append(each)
                    continue
                known = found.get(each.tokens)
                if known is None or (is_durable and not known.is_durable):
                    found[each.tokens] = (known or each).placed(is_durable=is_durable)
        # Sorting is stable: of equal lengths what holds every token comes first.
        ordered = sorted((*found.values(), *sparse), key=lambda each: -each.tokens)
        return tuple(ordered[:CANDIDATES_MAX])

    return Match.lazily(
        {"candidates": candidates, "missing": lambda: deepest.missing, "suggested": lambda: deepest.suggested},
        _outcome=deepest.outcome,
        tokens=tokens,
        pending_tokens=own.pending_tokens if own.pending_tokens > tokens else 0,
        shard=own.shard,
        grid=own.grid,
        load_seconds_per_byte=load_seconds_per_byte,
    )
