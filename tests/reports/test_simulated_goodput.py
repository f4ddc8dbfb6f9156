"""Bisection over simulations finds the rate at which too few requests meet their limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvstore.errors import SimulationError
from kvstore.simulate.goodput import simulated_goodput
from tests.reports.results import result, samples, scenario

if TYPE_CHECKING:
    from kvstore.scenario import Scenario
    from kvstore.simulate.result import SimulationResult


def late_above(limit_per_s: float, unstable_above_per_s: float) -> object:
    """Runs of ten requests, of which one in five is late above a rate."""

    def run(changed: Scenario) -> SimulationResult:
        rate = changed.workload.arrivals.rate_per_s
        assert rate is not None
        slow = (9.0, 0, 0, 0, 0, 0) if rate > limit_per_s else (0.5, 0, 0, 0, 0, 0)
        rows = [{"arrival_s": at / rate, "parts": slow if at % 5 == 0 else (0.5, 0, 0, 0, 0, 0)} for at in range(10)]
        return result(rows, samples(3), scenario=changed, is_stable=rate <= unstable_above_per_s)

    return run


def test_the_rate_at_which_requests_become_late() -> None:
    found = simulated_goodput(scenario(), rate_max_per_s=10.0, tolerance=0.01, run=late_above(3.0, 99.0))  # type: ignore[arg-type]
    assert 2.95 <= found.requests_per_s <= 3.0
    assert found.above_requests_per_s is not None
    assert 3.0 < found.above_requests_per_s <= 3.05
    assert found.share == 1.0


def test_what_is_not_stable_is_not_good() -> None:
    found = simulated_goodput(scenario(), rate_max_per_s=10.0, tolerance=0.01, run=late_above(9.0, 2.0))  # type: ignore[arg-type]
    assert 1.95 <= found.requests_per_s <= 2.0


def test_nothing_measured_is_an_error() -> None:
    with pytest.raises(SimulationError, match="no measured request"):
        simulated_goodput(scenario(), rate_max_per_s=1.0, run=lambda changed: result([], samples(1), scenario=changed))
