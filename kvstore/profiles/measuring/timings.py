"""From repeated times to a curve that never falls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING

from kvstore.errors import ProfileError
from kvstore.profile import MeasuredCurve

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Timing:
    """The seconds that one amount of work took, each time.

    Attributes:
        amount: tokens of a prompt, or requests of a batch.
    """

    amount: int
    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return median(self.seconds)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """The first and the third."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Between the quartiles, as a share of the median."""
        low, high = self.quartiles_s
        return (high - low) / self.median_s


def curve_of(timings: Sequence[Timing], what: str, *, may_repair: bool) -> tuple[MeasuredCurve, str]:
    """The curve through the medians, and a note on what was changed; empty for nothing.

    Args:
        timings: by ascending amount.
        what: is timed, for messages: `prefill`.
        may_repair: replace medians that fall by the nearest values that do not (isotonic regression).

    Raises:
        ProfileError: medians fall, and may not be repaired.
    """
    amounts = tuple(float(timing.amount) for timing in timings)
    medians = [timing.median_s for timing in timings]
    falls = [(i, 1 - after / before) for i, (before, after) in enumerate(pairwise(medians)) if after < before]
    if not falls:
        return MeasuredCurve(amounts, tuple(medians)), ""
    at, largest = max(falls, key=lambda fall: fall[1])
    fall = (
        f"{what} takes {medians[at]:.6g} s at {timings[at].amount} and {medians[at + 1]:.6g} s at "
        f"{timings[at + 1].amount}, {largest:.1%} less"
    )
    if not may_repair:
        raise ProfileError(
            f"{fall}; {len(falls)} of {len(medians)} medians fall, and a profile cannot. Measure more rounds, on a "
            "machine that does nothing else, or fewer points; --isotonic takes averages of what falls and says so in "
            "the file"
        )
    return MeasuredCurve(amounts, never_falling(medians)), (
        f"isotonic: {len(falls)} of {len(medians)} medians fell and were averaged with their neighbours; the largest "
        f"fall: {fall}"
    )


def never_falling(values: Sequence[float]) -> tuple[float, ...]:
    """The nearest sequence, by squares, that never falls: neighbours that do are replaced by their mean."""
    runs: list[list[float]] = []
    for value in values:
        runs.append([value])
        while len(runs) > 1 and fmean(runs[-2]) > fmean(runs[-1]):
            last = runs.pop()
            runs[-1].extend(last)
    found: list[float] = []
    for run in runs:
        # Means of equal runs may differ in their last bit.
        found.extend([max(fmean(run), found[-1] if found else 0.0)] * len(run))
    return tuple(found)
