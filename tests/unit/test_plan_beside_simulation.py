"""What the planner says of a deployment is what the simulator, which shares none of its formulas, plays through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstore.scenario import read_scenario
from kvstore.schedule.planning.latency import LoadedPlan
from kvstore.schedule.planning.plan import plan_of
from kvstore.schedule.planning.throughput import throughput
from kvstore.simulate.result import Outcome
from kvstore.simulate.simulation import simulate
from kvstore.workload.traffic import traffic_of


def test_latency_by_closed_forms_is_that_of_the_simulator() -> None:
    scenario = read_scenario("paper-prfaas")
    traffic = traffic_of(scenario.workload, block_tokens=scenario.block_tokens, seed=0, is_cached=False)
    threshold = dict(scenario.policy.settings)["threshold_tokens"]
    planned = throughput(scenario.deployment, plan_of([["pd"], ["prfaas"]], [threshold]), traffic, "mean")
    loaded = LoadedPlan(scenario.deployment, planned, traffic)
    rate = 0.6 * loaded.stable_requests_per_s
    arrivals = replace(scenario.workload.arrivals, rate_per_s=rate)
    workload = replace(scenario.workload, arrivals=arrivals)
    result = simulate(replace(scenario, workload=workload, duration_s=4000.0, warmup_s=300.0))
    requests = result.requests
    ttft_s = requests.ttft_s[(requests.outcome == Outcome.DONE) & (requests.arrival_s > 300)]
    assert len(ttft_s) > 5000
    latency = loaded.at(rate)
    assert latency.ttft_mean_s == pytest.approx(float(ttft_s.mean()), rel=0.06)
    for share in (0.5, 0.9, 0.99):
        assert latency.ttft_quantile_s(share) == pytest.approx(float(np.quantile(ttft_s, share)), rel=0.1)
    assert latency.tpot_mean_s == pytest.approx(float(np.nanmean(requests.tpot_s)), rel=0.01)
