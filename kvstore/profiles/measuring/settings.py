"""What is measured, and how often."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.errors import ProfileError
from kvstore.limits import (
    PROFILE_BATCH_MAX,
    PROFILE_DEADLINE_S,
    PROFILE_DECODE_STEPS_MAX,
    PROFILE_POINTS_MAX,
    PROFILE_ROUNDS_MAX,
    PROMPT_TOKENS_MAX,
)


@dataclass(frozen=True)
class MeasuringSettings:
    """What is measured, and how often.

    Attributes:
        lengths: prompt tokens whose prefill is timed, ascending.
        batches: requests per decode step, ascending.
        rounds: over all lengths, then over all batches; the median counts.
        context_tokens: that each request of a decode batch has seen.
        decode_steps: timed in each round of each batch.
        may_repair: take averages of medians that fall, and say so in the profile; otherwise such a measurement is
            refused.
        deadline_s: for all of it. A forward that has begun is not interrupted.

    Raises:
        ProfileError: a value is out of its limits; the message names it.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int = 5
    context_tokens: int = 512
    decode_steps: int = 8
    may_repair: bool = False
    deadline_s: float = PROFILE_DEADLINE_S

    def __post_init__(self) -> None:
        for what, largest in (("lengths", PROMPT_TOKENS_MAX), ("batches", PROFILE_BATCH_MAX)):
            values = getattr(self, what)
            if not 1 <= len(values) <= PROFILE_POINTS_MAX or sorted(set(values)) != list(values):
                raise ProfileError(
                    f"{what} must be 1 to {PROFILE_POINTS_MAX} ascending numbers, not {', '.join(map(str, values))}"
                )
            _check(what, values[0], 1, largest)
            _check(what, values[-1], 1, largest)
        _check("rounds", self.rounds, 1, PROFILE_ROUNDS_MAX)
        _check("context_tokens", self.context_tokens, 1, PROMPT_TOKENS_MAX)
        _check("decode_steps", self.decode_steps, 1, PROFILE_DECODE_STEPS_MAX)
        if not 0 < self.deadline_s <= PROFILE_DEADLINE_S:
            raise ProfileError(f"deadline_s={self.deadline_s} is outside 0 to {PROFILE_DEADLINE_S:g}")

    @property
    def forwards(self) -> int:
        """Timed and untimed prefills and sessions of decoding together: the length of the progress."""
        return (self.rounds + 1) * (len(self.lengths) + len(self.batches))


def _check(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ProfileError(f"{what}={value} is outside {least} to {most}")
