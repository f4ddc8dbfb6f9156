"""When sessions begin: Poisson processes, whose rate may jump between two levels or follow a sine."""

from __future__ import annotations

from itertools import count
from math import isfinite, pi, sin
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from kvstore.scenario import Arrivals


def check_arrivals(arrivals: Arrivals) -> None:
    """Raise for numbers that no process has.

    Raises:
        SimulationError: which, and what may be.
    """
    rate = arrivals.rate_per_s
    if arrivals.kind not in ("trace", "poisson", "burst", "diurnal"):
        raise SimulationError(f"arrivals {arrivals.kind!r} are unknown; use trace, poisson, burst or diurnal")
    if rate is None and arrivals.kind != "trace":
        raise SimulationError(f"{arrivals.kind} arrivals need a rate; give rate_per_s")
    if rate is not None and not (isfinite(rate) and rate > 0):
        raise SimulationError(f"rate_per_s={rate} of arrivals must be positive")
    if arrivals.kind in ("burst", "diurnal"):
        if not (isfinite(arrivals.period_s) and arrivals.period_s > 0):
            raise SimulationError(f"period_s={arrivals.period_s} of {arrivals.kind} arrivals must be positive")
        most = 2.0 if arrivals.kind == "diurnal" else 1e6
        if not 1 <= arrivals.burst_factor <= most:
            raise SimulationError(
                f"burst_factor={arrivals.burst_factor} of {arrivals.kind} arrivals must be from 1 to {most:g}: it is "
                "the highest rate as a multiple of the mean, and no rate falls below 0"
            )


def begin_times(arrivals: Arrivals, rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Ascending times without end, of this mean rate.

    `burst`: each period ends in a burst, which brings half of its requests; the rest of it has the lower rate.
    `diurnal`: the sine begins at the mean, rising. `trace`: in equal steps, for sessions that have no times of their
    own.

    Args:
        arrivals: that `check_arrivals` has passed.
    """
    if arrivals.kind == "trace":
        yield from (number / rate_per_s for number in count())
    at_s = 0.0
    if arrivals.kind == "diurnal":
        highest_per_s = rate_per_s * arrivals.burst_factor
        while True:  # thinning: candidates at the highest rate, of which each is kept by the share of it at its time
            at_s += float(rng.exponential(1 / highest_per_s))
            share = 1 + (arrivals.burst_factor - 1) * sin(2 * pi * at_s / arrivals.period_s)
            if float(rng.random()) * arrivals.burst_factor < share:
                yield at_s
    even_s = 0.0
    while True:
        even_s += float(rng.exponential(1 / rate_per_s))
        yield _burst_time_s(even_s, arrivals) if arrivals.kind == "burst" else even_s


def _burst_time_s(even_s: float, arrivals: Arrivals) -> float:
    """When a process in bursts has had as many requests as one of constant rate has after so long.

    Thinning would throw away nearly all candidates of a short and high burst.
    """
    period_s = arrivals.period_s
    burst_s = period_s / (2 * arrivals.burst_factor)
    begin_s = even_s // period_s * period_s
    had_s = even_s - begin_s
    if had_s < period_s / 2:
        return begin_s + had_s * (period_s - burst_s) / (period_s / 2)
    return begin_s + period_s - (period_s - had_s) / arrivals.burst_factor
