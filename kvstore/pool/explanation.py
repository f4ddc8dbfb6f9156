"""Why a prompt resumes where it does, tier by tier: a value, and a text for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kvstore.events import MissReason
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class GroupReport:
    """What a tier has of one cache group.

    Attributes:
        name: of the group.
        is_state: states, rather than attention blocks.
        tokens: of attention, how far it reaches without a gap, if at all; of states, the lengths at which they are
            there for all that the reader needs, deepest first, at most `CANDIDATES_MAX`.
    """

    name: str
    is_state: bool
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class CandidateReport:
    """A resume point in a tier.

    Attributes:
        tokens: its length.
        size_bytes: what restoring it moves.
        load_s: expected time to load it into memory; 0 where it lies there, None before anything was loaded.
        copy_s: expected time to copy it out; None before anything was.
    """

    tokens: int
    size_bytes: int
    load_s: float | None
    copy_s: float | None = None


@dataclass(frozen=True)
class TierReport:
    """What a tier has of a prompt, and what it lacks. Lengths are 0 where there is nothing to say.

    Attributes:
        name: of the tier.
        is_durable: whether what it holds is there again after a crash.
        attention_tokens: how far the attention of all groups reaches.
        groups: what is there of each group by itself.
        candidates: every resume point, deepest first.
        pending_tokens: what a running writer will commit.
        other_chunks_tokens: what would be found on any chunk boundaries, if that is more.
        evicted_attention_tokens: end of the block after the attention, if it was there once.
        evicted_state_tokens: the deepest length at which there once were states, beyond the resume point.
        foreign_state_tokens: the deepest length with states that are another shard's, or of other chunk boundaries.
        is_other_shard: whether the attention goes on, for shard units that the reader does not need.
        reason, reasons: why there is nothing deeper; None if all that can be used is there.
    """

    name: str
    is_durable: bool
    attention_tokens: int
    groups: tuple[GroupReport, ...]
    candidates: tuple[CandidateReport, ...]
    pending_tokens: int
    other_chunks_tokens: int
    evicted_attention_tokens: int
    evicted_state_tokens: int
    foreign_state_tokens: int
    is_other_shard: bool
    reason: MissReason | None
    reasons: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """The deepest resume point here."""
        return self.candidates[0].tokens if self.candidates else 0


@dataclass(frozen=True)
class Explanation:
    """Where a prompt can be resumed, and what stands in the way of more. `print` it.

    Attributes:
        prompt_tokens: length of the prompt.
        cap_tokens: the deepest length that can be used: an engine computes at least one token.
        has_attention: whether the model has attention groups; without them attention reaches nowhere and need not.
        tiers: each one's part, the fastest first.
        remedies: what would have to happen for a deeper resume point.
    """

    prompt_tokens: int
    cap_tokens: int
    has_attention: bool
    tiers: tuple[TierReport, ...]
    remedies: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Length of the deepest resume point."""
        return max((tier.tokens for tier in self.tiers), default=0)

    @property
    def tier(self) -> str | None:
        """The fastest tier that has it; None for a miss."""
        tokens = self.tokens
        return next((tier.name for tier in self.tiers if tier.tokens == tokens), None) if tokens else None

    def timed(self, seconds_per_byte: float) -> Explanation:
        """The same, with what copying costs."""
        tiers = tuple(
            replace(
                tier,
                candidates=tuple(
                    replace(candidate, copy_s=candidate.size_bytes * seconds_per_byte) for candidate in tier.candidates
                ),
            )
            for tier in self.tiers
        )
        return replace(self, tiers=tiers)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Explanation:
        """What `document` gave.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        tiers = tuple(_tier_of(tier) for tier in document["tiers"])
        return cls(
            int(document["prompt_tokens"]),
            int(document["cap_tokens"]),
            bool(document["has_attention"]),
            tiers,
            tuple(map(str, document["remedies"])),
        )

    def __str__(self) -> str:
        where = f"{self.tokens} tokens in {self.tier}" if self.tokens else "nothing"
        lines = [f"prompt of {self.prompt_tokens} tokens, {self.cap_tokens} can be reused: {where}"]
        for tier in self.tiers:
            lines.append(f"{tier.name}{' (durable)' if tier.is_durable else ''}")
            lines.extend(f"  {line}" for line in self._tier_lines(tier))
        if self.remedies:
            lines.append("for more")
            lines.extend(f"  - {remedy}" for remedy in self.remedies)
        return "\n".join(lines)

    def _tier_lines(self, tier: TierReport) -> list[str]:
        lines = []
        for group in tier.groups:
            if group.is_state:
                lines.append(f"states {group.name!r}: {'at ' + _lengths(group.tokens) if group.tokens else 'none'}")
            else:
                reach = group.tokens[0] if group.tokens else 0
                lines.append(f"attention {group.name!r}: reaches {reach} of {self.cap_tokens}")
        for candidate in tier.candidates[:SHOWN_MAX]:
            lines.append(f"resume point of {candidate.tokens} tokens: {_cost(candidate)}")
        if len(tier.candidates) > SHOWN_MAX:
            lines.append(f"and {len(tier.candidates) - SHOWN_MAX} shorter ones")
        if tier.pending_tokens:
            lines.append(f"pending: a writer will commit {tier.pending_tokens} tokens")
        lines.extend(f"no more: {reason}" for reason in (tier.reasons if tier.reason is not None else ()))
        return lines


SHOWN_MAX = 8


def _lengths(tokens: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, tokens[:SHOWN_MAX]))
    return shown if len(tokens) <= SHOWN_MAX else f"{shown} and {len(tokens) - SHOWN_MAX} more"


def _cost(candidate: CandidateReport) -> str:
    size = format_bytes(candidate.size_bytes)
    times = [
        f"{what} in {seconds * 1e3:.3g} ms"
        for what, seconds in (("loaded", candidate.load_s), ("copied out", candidate.copy_s))
        if seconds
    ]
    return ", ".join([size, *times])


def _tier_of(document: Mapping[str, Any]) -> TierReport:
    def number(name: str) -> int:
        return int(document[name])

    def seconds(value: Any) -> float | None:
        return None if value is None else float(value)

    reason = document["reason"]
    return TierReport(
        name=str(document["name"]),
        is_durable=bool(document["is_durable"]),
        attention_tokens=number("attention_tokens"),
        groups=tuple(
            GroupReport(str(each["name"]), bool(each["is_state"]), tuple(map(int, each["tokens"])))
            for each in document["groups"]
        ),
        candidates=tuple(
            CandidateReport(
                int(each["tokens"]), int(each["size_bytes"]), seconds(each["load_s"]), seconds(each["copy_s"])
            )
            for each in document["candidates"]
        ),
        pending_tokens=number("pending_tokens"),
        other_chunks_tokens=number("other_chunks_tokens"),
        evicted_attention_tokens=number("evicted_attention_tokens"),
        evicted_state_tokens=number("evicted_state_tokens"),
        foreign_state_tokens=number("foreign_state_tokens"),
        is_other_shard=bool(document["is_other_shard"]),
        reason=None if reason is None else MissReason(reason),
        reasons=tuple(map(str, document["reasons"])),
    )
