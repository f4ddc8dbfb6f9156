"""Goodput by simulation: the largest rate at which enough requests meet both limits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError
from kvstore.schedule.planning.goodput import goodput
from kvstore.simulate.report.summary import summarise

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.scenario import Scenario
    from kvstore.schedule.planning.goodput import Goodput
    from kvstore.simulate.result import SimulationResult


def simulated_goodput(
    scenario: Scenario,
    *,
    rate_max_per_s: float,
    tolerance: float = 0.02,
    run: Callable[[Scenario], SimulationResult] | None = None,
) -> Goodput:
    """Bisection over the rate of arrivals, a simulation at each, all with the scenario's seed.

    A rate at which a run is not stable counts as one at which nobody meets the limits: its shares would fall with the
    length of the run.

    Args:
        rate_max_per_s: no higher rate is tried; the throughput that `kvstore plan` computes is a good one.
        tolerance: between the good and the bad rate, of the good one.
        run: simulates, in place of `simulate`.

    Raises:
        SimulationError: at some rate a simulation came to no measured request whose fate is known, or cannot run.
        PlanError: a number is out of its limits.
    """
    from kvstore.simulate.simulation import simulate

    does = simulate if run is None else run

    def meets(rate_per_s: float) -> float:
        arrivals = replace(scenario.workload.arrivals, rate_per_s=rate_per_s)
        changed = replace(scenario, workload=replace(scenario.workload, arrivals=arrivals))
        summary = summarise(does(changed))
        if not summary.is_stable:
            return 0.0
        if summary.good_share is None:
            raise SimulationError(
                f"scenario {scenario.name!r} at {rate_per_s:g} requests/s: no measured request has ended; make "
                "duration_s longer, or warmup_s shorter"
            )
        return summary.good_share

    return goodput(meets, scenario.slo.share, rate_max_per_s=rate_max_per_s, tolerance=tolerance)
