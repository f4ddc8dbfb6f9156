"""What the planner says of a deployment is what the simulator, which shares none of its formulas, plays through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstore.scenario import read_scenario
from kvstore.schedule.planning.latency import LoadedPlan
from kvstore.schedule.planning.plan import plan_of
from kvstore.schedule.planning.throughput import throughput
from kvstore.schedule.prefill_service import PrefillServiceModel
from kvstore.simulate.result import PARTS, Outcome
from kvstore.simulate.simulation import simulate
from kvstore.workload.traffic import traffic_of


@pytest.mark.parametrize(
    ("service", "duration_s", "bytes_per_s"),
    [
        (PrefillServiceModel(), 4000.0, 12.5e9),
        # In chunks of 2,048 tokens prefill takes over three times as long on average, and of 8,192 one and a half.
        (PrefillServiceModel("chunked"), 13000.0, 12.5e9),
        # States leave behind prefill, over a link that is half used.
        (PrefillServiceModel("chunked", 8192), 5500.0, 1.2e9),
    ],
)
def test_latency_by_closed_forms_is_that_of_the_simulator(
    service: PrefillServiceModel, duration_s: float, bytes_per_s: float
) -> None:
    scenario = read_scenario("paper-prfaas")
    links = tuple(replace(link, bytes_per_s=bytes_per_s) for link in scenario.deployment.links)
    deployment = replace(scenario.deployment, links=links, prefill_service=service)
    traffic = traffic_of(scenario.workload, block_tokens=scenario.block_tokens, seed=0, is_cached=False)
    threshold = dict(scenario.policy.settings)["threshold_tokens"]
    planned = throughput(deployment, plan_of([["pd"], ["prfaas"]], [threshold]), traffic, "mean")
    loaded = LoadedPlan(deployment, planned, traffic)
    assert loaded.stable_requests_per_s == pytest.approx(planned.requests_per_s, rel=1e-6)
    rate = 0.6 * loaded.stable_requests_per_s
    arrivals = replace(scenario.workload.arrivals, rate_per_s=rate)
    workload = replace(scenario.workload, arrivals=arrivals)
    result = simulate(
        replace(scenario, deployment=deployment, workload=workload, duration_s=duration_s, warmup_s=300.0)
    )
    requests = result.requests
    is_measured = (requests.outcome == Outcome.DONE) & (requests.arrival_s > 300)
    ttft_s = requests.ttft_s[is_measured]
    assert len(ttft_s) > 5000
    latency = loaded.at(rate)
    assert latency.ttft_mean_s == pytest.approx(float(ttft_s.mean()), rel=0.06)
    for share in (0.5, 0.9, 0.99):
        assert latency.ttft_quantile_s(share) == pytest.approx(float(np.quantile(ttft_s, share)), rel=0.1)
    parts = dict(zip(PARTS, requests.parts[is_measured].mean(axis=0).tolist(), strict=True))
    assert sum(way.share * way.prefill_s for way in latency.ways) == pytest.approx(parts["prefill_s"], rel=0.03)
    assert sum(way.share * way.transfer_s for way in latency.ways) == pytest.approx(parts["transfer_s"], rel=0.15)
    assert latency.tpot_mean_s == pytest.approx(float(np.nanmean(requests.tpot_s)), rel=0.01)
