"""How long prefill takes over all requests of a plan, without queueing.

What the paper's TTFT columns are, as their numbers say; the paper does not.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.profile import Profile
    from kvstore.schedule.planning.lengths import LengthDistribution

_STEPS = 60
"""Of a bisection: float64 has 53 bits."""


def prefill_mean_s(lengths: LengthDistribution, bands: Sequence[tuple[float, float, Profile]]) -> float:
    """E[T_prefill(L)].

    Args:
        bands: lengths above the first number and up to the second, and what prefills them.
    """
    return sum(
        lengths.share(above, upto) * lengths.expected(profile.prefill.many, above, upto)
        for above, upto, profile in bands
        if lengths.share(above, upto) > 0
    )


def prefill_quantile_s(
    lengths: LengthDistribution, bands: Sequence[tuple[float, float, Profile]], share: float
) -> float:
    """The least time within which this share of all requests is prefilled."""

    def share_within(time_s: float) -> float:
        within = 0.0
        for above, upto, profile in bands:
            fits = _last(lambda tokens: profile.prefill(tokens) <= time_s, lengths.tokens_min, lengths.tokens_max)  # noqa: B023
            within += lengths.share(above, min(upto, fits)) if fits > above else 0.0
        return within

    slowest_s = max(profile.prefill(min(upto, lengths.tokens_max)) for _, upto, profile in bands)
    return _last(lambda time_s: share_within(time_s) < share, 0.0, slowest_s)


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The end of the range in which something holds from `low` on; minus infinity where it does not hold there."""
    if holds(high):
        return high
    if not holds(low):
        return -inf
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
