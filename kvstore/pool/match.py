"""What a match answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kvstore.pool.lazy import LazyFields

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.events import MissReason
    from kvstore.pool.path import NodePath, RecordPlace
    from kvstore.spec import ChunkGrid, Coverage, ModelSpec, Shard


@dataclass(frozen=True)
class Candidate(LazyFields):
    """A resume point that is there.

    Attributes:
        tokens: its length r: every group can be restored at exactly r.
        path: its prefix nodes, root first; the last one ends at r.
        bytes_by_group: bytes that restoring moves, by group name.
        tier: the fastest tier that has all of it.
        is_durable: whether a tier has all of it whose content is there again after a crash.
    """

    tokens: int
    path: NodePath
    bytes_by_group: Mapping[str, int]
    tier: str
    is_durable: bool = False

    @property
    def size_bytes(self) -> int:
        return sum(self.bytes_by_group.values())

    @property
    def is_exact(self) -> bool:
        """Whether every layer holds every token."""
        return self.path.is_exact

    def placed(self, *, is_durable: bool) -> Candidate:
        """The same candidate, with what is known of it; nothing is computed for it."""
        candidate = Candidate.__new__(Candidate)
        candidate.__dict__.update(self.__dict__, is_durable=is_durable)
        return candidate


@dataclass(frozen=True)
class Missing:
    """Why nothing deeper serves.

    Attributes:
        cap_tokens: the deepest length that could be used: an engine must compute at least one token.
        attention_tokens: how far the attention blocks reach without a gap.
        reason: the obstacle to look at first, in a word; says nothing if the cap was reached.
        reasons: sentences for people, the deepest obstacle first.
    """

    cap_tokens: int
    attention_tokens: int
    reason: MissReason
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Match(LazyFields):
    """The answer to "how much of this prompt is there?". True if anything is.

    Attributes:
        tokens: length of the deepest resume point, 0 for a miss.
        candidates: that one and others, deepest first.
        missing: why nothing deeper serves.
        pending_tokens: a deeper resume point that a running writer will commit; 0 if none. Never a hit.
        suggested: lengths at which this prompt should take checkpoints.
        shard: whose share was asked for.
        grid: the chunk boundaries that were asked for; None if any would do.
        grids: chunk grid digests of the records that a hand-over consists of; None otherwise.
        seconds_per_byte: what copying has cost in this store; None before any.
        load_seconds_per_byte: what loading from each other tier has cost, of those that were loaded from.

    Candidates, what is missing and the suggestions are computed when they are first looked at.
    """

    tokens: int
    candidates: tuple[Candidate, ...]
    missing: Missing
    pending_tokens: int
    suggested: tuple[int, ...]
    shard: Shard
    grid: ChunkGrid | None = None
    grids: Mapping[RecordPlace, bytes] | None = field(default=None, compare=False)
    seconds_per_byte: float | None = field(default=None, compare=False)
    load_seconds_per_byte: Mapping[str, float] | None = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return self.tokens > 0

    @property
    def expected_load_s(self) -> float | None:
        """Time to read the deepest candidate, from what copying and loading have cost in this store.

        None before any was copied. A tier that nothing was loaded from yet is taken to cost nothing.
        """
        if self.seconds_per_byte is None or self.best is None:
            return None
        load_s = (self.load_seconds_per_byte or {}).get(self.best.tier, 0.0)
        return self.best.size_bytes * (self.seconds_per_byte + load_s)

    def timed(self, seconds_per_byte: float) -> Match:
        """The same answer, with what copying costs; nothing is computed for it."""
        match = Match.__new__(Match)
        match.__dict__.update(self.__dict__, seconds_per_byte=seconds_per_byte)
        return match

    def outcome(self) -> tuple[int, str | None, MissReason | None]:
        """The deepest length that could have been, the tier of the best candidate, and why there is no deeper one.

        For who counts every match: a match whose fields are computed on demand does not compute any for this.
        """
        make = self.__dict__.get("_outcome")
        if make is not None:
            found: tuple[int, str | None, MissReason | None] = make()
            return found
        cap = self.missing.cap_tokens
        return cap, self.tier, self.missing.reason if self.tokens < cap else None

    @property
    def best(self) -> Candidate | None:
        make = self.__dict__.get("_deepest")
        if make is not None and "candidates" not in self.__dict__:  # then the others are not made for it
            deepest: Candidate | None = make()
            return deepest
        return self.candidates[0] if self.candidates else None

    @property
    def is_exact(self) -> bool:
        """Whether the deepest candidate is what a whole prefill wrote; always so unless coverage was accepted."""
        return self.best is None or self.best.is_exact

    def coverage(self, spec: ModelSpec) -> Coverage | None:
        """Which tokens each attention layer of the deepest candidate holds; None if all."""
        return None if self.best is None else self.best.path.coverage(spec)

    @property
    def tier(self) -> str | None:
        return self.best.tier if self.best is not None else None

    def at(self, tokens: int) -> Match:
        """The same answer, resuming at another candidate.

        Raises:
            ValueError: there is no candidate of that length.
        """
        for number, candidate in enumerate(self.candidates):
            if candidate.tokens == tokens:
                rest = self.candidates[number:]
                return replace(self, tokens=tokens, candidates=rest, grids=None)
        lengths = ", ".join(str(candidate.tokens) for candidate in self.candidates) or "none"
        raise ValueError(f"no resume point of {tokens} tokens was found; found: {lengths}")
