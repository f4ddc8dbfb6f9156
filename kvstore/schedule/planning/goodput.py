"""Goodput: the largest rate at which a stated share of the requests meets its limits (DistServe, OSDI 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from kvstore.errors import PlanError
from kvstore.schedule.planning.latency import LoadedPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.schedule.deployment import Deployment, Slo
    from kvstore.schedule.planning.plan import Traffic
    from kvstore.schedule.planning.throughput import Throughput

_STEPS_MAX = 60
_LEAST = 1e-3
"""Of the largest rate: below it nothing is looked for."""


@dataclass(frozen=True)
class Goodput:
    """A rate, and what was asked of it.

    Attributes:
        requests_per_s: the largest rate found at which enough requests met their limits; 0 where there is none.
        share: of the requests that met them at that rate, or at the least one tried where it is 0.
        above_requests_per_s: the least rate found at which too few did; None where even the largest rate was good.
        note: what the numbers do not say: that no rate is good, or that the largest one is.
    """

    requests_per_s: float
    share: float
    above_requests_per_s: float | None
    note: str = ""


def goodput(
    meets: Callable[[float], float],
    share: float,
    *,
    rate_max_per_s: float,
    tolerance: float = 1e-3,
    halves: bool = False,
) -> Goodput:
    """Bisection for the largest rate at which `meets` says at least `share`.

    `meets` is taken to fall with the rate. One that is measured may waver; what comes out is then one place where it
    crosses, with the good and the bad rate beside it.

    Args:
        meets: share of the requests that meet their limits at a rate: from closed forms, or from a simulation.
        rate_max_per_s: no higher rate is tried.
        tolerance: between the good and the bad rate, of the good one.
        halves: look for a good rate by halving, rather than at the least one first: for a simulation, which has few
            requests at low rates, or simulates long times for many.

    Raises:
        PlanError: a number is out of its limits, or `meets` says no share.
    """
    if not (0 < share <= 1 and isfinite(rate_max_per_s) and rate_max_per_s > 0 and 0 < tolerance < 1):
        raise PlanError(
            f"goodput needs a share in (0, 1], a positive rate_max_per_s and a tolerance in (0, 1), not {share}, "
            f"{rate_max_per_s}, {tolerance}"
        )

    def asked(rate: float) -> float:
        met = meets(rate)
        if not 0 <= met <= 1 + 1e-9:
            raise PlanError(f"at {rate:g} requests/s {met} is not the share of requests that meet their limits")
        return met

    at_top = asked(rate_max_per_s)
    if at_top >= share:
        return Goodput(rate_max_per_s, at_top, None, "the limits are met up to the largest rate that was tried")
    high = rate_max_per_s
    least = rate_max_per_s * _LEAST
    low = high / 2 if halves else least
    met = asked(low)
    while met < share and low > least:
        high, low = low, max(low / 2, least)
        met = asked(low)
    if met < share:
        return Goodput(
            0.0,
            met,
            low,
            f"the limits are not met at any rate: {met:.1%} meet them at {low:.3g} requests/s, not {share:.1%}",
        )
    for _ in range(_STEPS_MAX):
        if high - low <= tolerance * low:
            break
        middle = (low + high) / 2
        at_middle = asked(middle)
        if at_middle >= share:
            low, met = middle, at_middle
        else:
            high = middle
    return Goodput(low, met, high)


def plan_goodput(deployment: Deployment, planned: Throughput, traffic: Traffic, slo: Slo) -> Goodput:
    """The goodput of a plan by closed forms: Poisson arrivals, prefill as M/G/c, decode as processor sharing.

    Raises:
        PlanError: the plan serves nothing, or the limits are out of theirs.
    """
    loaded = LoadedPlan(deployment, planned, traffic)
    return goodput(
        lambda rate: loaded.good_share(rate, slo),
        slo.share,
        rate_max_per_s=loaded.stable_requests_per_s,
        tolerance=1e-4,
    )
