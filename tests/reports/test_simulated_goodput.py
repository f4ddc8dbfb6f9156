"""Bisection over simulations finds the rate at which too few requests meet their limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import PlanError, SimulationError
from kvstore.scenario import read_scenario
from kvstore.simulate.goodput import Tried, planned_requests_per_s, simulated_goodput
from tests.reports.results import result, samples, scenario

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.scenario import Scenario
    from kvstore.simulate.result import SimulationResult


def late_above(limit_per_s: float, unstable_above_per_s: float) -> Callable[[Scenario], SimulationResult]:
    """Runs of ten requests, of which one in five is late above a rate."""

    def run(changed: Scenario) -> SimulationResult:
        rate = changed.workload.arrivals.rate_per_s
        assert rate is not None
        slow = (9.0, 0, 0, 0, 0, 0) if rate > limit_per_s else (0.5, 0, 0, 0, 0, 0)
        rows = [{"arrival_s": at / rate, "parts": slow if at % 5 == 0 else (0.5, 0, 0, 0, 0, 0)} for at in range(10)]
        return result(rows, samples(3), scenario=changed, is_stable=rate <= unstable_above_per_s)

    return run


def test_the_rate_at_which_requests_become_late() -> None:
    found = simulated_goodput(scenario(), rate_max_per_s=10.0, tolerance=0.01, run=late_above(3.0, 99.0)).found
    assert 2.95 <= found.requests_per_s <= 3.0
    assert found.above_requests_per_s is not None
    assert 3.0 < found.above_requests_per_s <= 3.05
    assert found.share == 1.0


def test_what_is_not_stable_is_not_good() -> None:
    found = simulated_goodput(scenario(), rate_max_per_s=10.0, tolerance=0.01, run=late_above(9.0, 2.0)).found
    assert 1.95 <= found.requests_per_s <= 2.0


def test_low_rates_are_simulated_only_where_no_higher_one_is_good() -> None:
    """They have few requests, or take long simulated times for many."""
    goodput = simulated_goodput(scenario(), rate_max_per_s=10.0, run=late_above(3.0, 99.0))
    assert [each.requests_per_s for each in goodput.tried][:3] == [10.0, 5.0, 2.5]
    assert min(each.requests_per_s for each in goodput.tried) == 2.5
    none = simulated_goodput(scenario(), rate_max_per_s=10.0, run=late_above(0.001, 99.0))
    assert none.found.requests_per_s == 0.0
    assert none.found.note.startswith("the limits are not met at any rate")
    assert len(none.tried) == 11


def test_without_a_largest_rate_it_begins_at_the_plans_and_doubles() -> None:
    told: list[Tried] = []
    paper = read_scenario("paper-prfaas")
    assert 3.0 < planned_requests_per_s(paper) < 3.2
    toy = scenario(workload=paper.workload)
    planned = planned_requests_per_s(toy)
    goodput = simulated_goodput(toy, run=late_above(2.5 * planned, 99.0), tried=told.append)
    assert 2.45 * planned <= goodput.found.requests_per_s <= 2.5 * planned
    rates = [each.requests_per_s for each in goodput.tried]
    assert rates[:3] == [planned, 2 * planned, 4 * planned] == [*rates[:2], goodput.rate_max_per_s]
    assert len(set(rates)) == len(rates), "none is simulated twice"
    assert tuple(told) == goodput.tried
    endless = simulated_goodput(toy, run=late_above(1e9, 1e9))
    assert endless.found.requests_per_s == 16 * planned
    assert "up to the largest rate" in endless.found.note


def test_the_document_has_every_rate() -> None:
    goodput = simulated_goodput(scenario(), rate_max_per_s=10.0, settings=(("seed", 3),), run=late_above(3.0, 4.0))
    document = json.loads(json.dumps(goodput.to_document(), allow_nan=False))
    assert document["settings"] == {"seed": "3"}
    assert document["requests_per_s"] == goodput.found.requests_per_s
    assert {each["requests_per_s"]: each["is_stable"] for each in document["tried"]} == {
        each.requests_per_s: each.requests_per_s <= 4.0 for each in goodput.tried
    }


@pytest.mark.parametrize("tolerance", [0.0, 1e-4, 1.0, float("nan")])
def test_a_tolerance_has_limits(tolerance: float) -> None:
    with pytest.raises(PlanError, match=r"outside 0\.001 to 1"):
        simulated_goodput(scenario(), rate_max_per_s=1.0, tolerance=tolerance, run=late_above(1.0, 1.0))


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(SimulationError, match="no measured request"):
        simulated_goodput(scenario(), rate_max_per_s=1.0, run=lambda changed: result([], samples(1), scenario=changed))
