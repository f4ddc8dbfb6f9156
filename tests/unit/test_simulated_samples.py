"""Samples of a run against its rows: queues by Little's law, and instances that change roles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.scenario import Scenario, Workload
from kvstore.schedule.deployment import Slo
from kvstore.schedule.policies.convert import (
    Conversion,
    ConversionExplanation,
    ConversionPolicy,
    LongTermDecision,
)
from kvstore.simulate.engine import Simulation
from kvstore.simulate.result import PARTS
from kvstore.workload.request import Request
from tests.unit.simulated import Fixed, one_cluster, profile_of, requests_at, simulated, two_clusters

if TYPE_CHECKING:
    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.policies.convert import ConversionMemory, Role

STEP_S = 0.02


def test_queues_in_samples_are_the_waiting_in_the_rows() -> None:
    """The mean of a queue times its duration is what all requests waited in it."""
    rng = np.random.default_rng(5)
    arrivals_s = np.cumsum(rng.exponential(0.6, 200))
    requests = [
        Request(number, float(at_s), int(rng.integers(100, 900)), int(rng.integers(50, 350)), b"")
        for number, at_s in enumerate(arrivals_s)
    ]
    deployment = two_clusters(1, 2, round_trip_s=0.3, profile=profile_of(batch=2))
    result = simulated(deployment, requests, Fixed("far", "near"), telemetry_s=STEP_S)
    waited_s = dict(zip(PARTS, result.requests.parts.sum(axis=0), strict=True))
    samples = result.samples
    # Whoever is being prefilled or handed over waits for no place yet.
    assert waited_s["prefill_s"] > 20
    assert waited_s["transfer_s"] > 20
    assert waited_s["queue_s"] > 20
    assert waited_s["decode_wait_s"] > 20
    assert samples.prefill_waiting["far"].sum() * STEP_S == pytest.approx(waited_s["queue_s"], rel=0.02)
    assert samples.decode_waiting["near"].sum() * STEP_S == pytest.approx(waited_s["decode_wait_s"], rel=0.02)
    assert samples.prefill_busy["far"].sum() * STEP_S == pytest.approx(waited_s["prefill_s"], rel=0.02)


class Once(ConversionPolicy):
    """Converts one instance when all have work."""

    def __init__(self, deployment: Deployment, conversion: Conversion) -> None:
        super().__init__(deployment)
        object.__setattr__(self, "conversion", conversion)

    def decide(self, memory: ConversionMemory) -> LongTermDecision:
        conversion: Conversion = getattr(self, "conversion")  # noqa: B009
        may_begin = memory.observed_s == 4.0
        return LongTermDecision(conversion if may_begin else None, None, ConversionExplanation("test"))


@pytest.mark.parametrize(("source", "target"), [("prefill", "decode"), ("decode", "prefill")])
def test_an_instance_that_leaves_is_there_until_its_work_ends(source: Role, target: Role) -> None:
    """Else more of a cluster's instances would work than it has."""
    deployment = one_cluster(2, 2, profile=profile_of(batch=2))
    cluster = replace(deployment.clusters[0], convertible=True, conversion_s=5.0)
    deployment = replace(deployment, clusters=(cluster,))
    scenario = Scenario("test", deployment, Workload(), Slo(10.0, 0.1), telemetry_s=0.5)
    requests = requests_at([0.0] * 8, 3000, output_tokens=1000)
    policy = Once(deployment, Conversion("one", source, target))
    result = Simulation(scenario, requests, Fixed("one", "one"), {}, conversion=policy).run()
    samples = result.samples
    assert (samples.prefill_busy["one"] <= samples.prefill_instances["one"]).all()
    assert (samples.decode_running["one"] <= 2 * samples.decode_instances["one"]).all()
    there = samples.prefill_instances["one"] + samples.decode_instances["one"]
    assert there.min() == 3
    assert there[-1] == 4
