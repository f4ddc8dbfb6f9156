"""Goodput by simulation: the largest rate at which enough requests meet both limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvstore.errors import PlanError, SimulationError
from kvstore.limits import SIMULATED_GOODPUT_DOUBLINGS_MAX, SIMULATED_GOODPUT_TOLERANCE_MIN
from kvstore.schedule.planning.goodput import goodput
from kvstore.schedule.planning.optimum import best_plan
from kvstore.simulate.report.summary import summarise
from kvstore.workload.problem import problem_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.scenario import Scenario
    from kvstore.schedule.deployment import Slo
    from kvstore.schedule.planning.goodput import Goodput
    from kvstore.simulate.report.values import Summary
    from kvstore.simulate.result import SimulationResult

GOODPUT_TOLERANCE = 0.02
"""Between the good and the bad rate, of the good one: closer ones differ by the seed."""


@dataclass(frozen=True)
class Tried:
    """A rate of arrivals, and the figures of the simulation at it."""

    requests_per_s: float
    summary: Summary


@dataclass(frozen=True)
class SimulatedGoodput:
    """A rate that was searched for by simulations.

    Attributes:
        found: the rate.
        slo: that was to be met.
        rate_max_per_s: no higher rate was tried.
        tried: in the order in which they were.
    """

    scenario: str
    settings: tuple[tuple[str, Any], ...]
    slo: Slo
    rate_max_per_s: float
    found: Goodput
    tried: tuple[Tried, ...]

    def to_document(self) -> dict[str, Any]:
        """As JSON has it: numbers, texts and None."""
        return {
            "scenario": self.scenario,
            "settings": {key: str(value) for key, value in self.settings},
            "requests_per_s": self.found.requests_per_s,
            "above_requests_per_s": self.found.above_requests_per_s,
            "good_share": self.found.share,
            "note": self.found.note,
            "ttft_s": self.slo.ttft_s,
            "tpot_s": self.slo.tpot_s,
            "share": self.slo.share,
            "rate_max_per_s": self.rate_max_per_s,
            "tried": [
                {
                    "requests_per_s": each.requests_per_s,
                    "is_stable": each.summary.is_stable,
                    "requests": each.summary.requests,
                    "good_share": each.summary.good_share,
                    "ttft_p90_s": each.summary.ttft.p90,
                    "tpot_p90_s": each.summary.tpot.p90,
                }
                for each in self.tried
            ],
        }


def planned_requests_per_s(scenario: Scenario) -> float:
    """The throughput that the planner gives a scenario: where to begin to look for its goodput.

    It may be higher: some may miss the limits, and early rejection spares the others what those would have cost.

    Raises:
        PlanError: no plan serves anything.
        SimulationError, TraceError: the workload cannot be read.
    """
    problem = problem_of(scenario)
    return best_plan(problem.deployment, problem.traffic, "mean").requests_per_s


def simulated_goodput(
    scenario: Scenario,
    *,
    rate_max_per_s: float | None = None,
    tolerance: float = GOODPUT_TOLERANCE,
    settings: tuple[tuple[str, Any], ...] = (),
    tried: Callable[[Tried], None] | None = None,
    run: Callable[[Scenario], SimulationResult] | None = None,
) -> SimulatedGoodput:
    """Bisection over the rate of arrivals, a simulation at each, all with the scenario's seed.

    A rate at which a run is not stable counts as one at which nobody meets the limits: its shares would fall with the
    length of the run. About ten simulations; more where no rate up to half of the largest one is good.

    Args:
        rate_max_per_s: no higher rate is tried; None begins at `planned_requests_per_s`, and doubles it while it is
            good, up to `SIMULATED_GOODPUT_DOUBLINGS_MAX` times.
        tolerance: between the good and the bad rate, of the good one.
        settings: what of the scenario was set, by key; they go along.
        tried: told of each rate, when its simulation has ended.
        run: simulates, in place of `simulate`.

    Raises:
        SimulationError: at some rate a simulation came to no measured request whose fate is known, or cannot run.
        PlanError: a number is out of its limits, or no plan serves anything.
        DeploymentError, TraceError: it cannot be simulated.
    """
    from kvstore.simulate.simulation import simulate

    if not SIMULATED_GOODPUT_TOLERANCE_MIN <= tolerance < 1:
        raise PlanError(
            f"a tolerance of {tolerance} is outside {SIMULATED_GOODPUT_TOLERANCE_MIN:g} to 1; below that the answer is "
            "the seed's, and another seed has another one"
        )
    does = simulate if run is None else run
    known: dict[float, float] = {}
    ended: list[Tried] = []

    def meets(rate_per_s: float) -> float:
        if rate_per_s not in known:
            known[rate_per_s] = simulated(rate_per_s)
        return known[rate_per_s]

    def simulated(rate_per_s: float) -> float:
        arrivals = replace(scenario.workload.arrivals, rate_per_s=rate_per_s)
        changed = replace(scenario, workload=replace(scenario.workload, arrivals=arrivals))
        summary = summarise(does(changed), settings=settings)
        ended.append(Tried(rate_per_s, summary))
        if tried is not None:
            tried(ended[-1])
        if not summary.is_stable:
            return 0.0
        if summary.good_share is None:
            raise SimulationError(
                f"scenario {scenario.name!r} at {rate_per_s:g} requests/s: no measured request has ended; make "
                "duration_s longer, or warmup_s shorter"
            )
        return summary.good_share

    most = planned_requests_per_s(scenario) if rate_max_per_s is None else rate_max_per_s
    share = scenario.slo.share
    if rate_max_per_s is None:
        for _ in range(SIMULATED_GOODPUT_DOUBLINGS_MAX):
            if meets(most) < share:
                break
            most *= 2
    found = goodput(meets, share, rate_max_per_s=most, tolerance=tolerance, halves=True)
    return SimulatedGoodput(scenario.name, settings, scenario.slo, most, found, tuple(ended))
