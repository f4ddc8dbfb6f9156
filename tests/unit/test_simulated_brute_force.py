"""Per request, the simulator against a second one that is slow, simple and written without it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.scenario import LinkFault, NodeFault, Scenario, Workload
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.policies.policy import Decision, Estimate, Explanation, Route
from kvstore.simulate.engine import Simulation
from kvstore.simulate.result import PARTS, Outcome
from kvstore.workload.request import Request
from tests.unit.brute_force import BruteForce, BruteJob
from tests.unit.simulated import SLO, Fixed, served

NAMES = ("a", "b", "c")


class ByLength(Fixed):
    """The way of a request follows from its length, whatever happens."""

    def __init__(self, ways: list[tuple[str, str]]) -> None:
        super().__init__("", "")
        self.ways = ways

    def way(self, prompt_tokens: int) -> tuple[str, str]:
        return self.ways[prompt_tokens % len(self.ways)]

    def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
        route = Route(*self.way(request.prompt_tokens), 0, None, 0.0, 0.0, Estimate())
        return Decision(route, Explanation("by length", "always", ()))


def scene(seed: int) -> tuple[Scenario, list[Request], ByLength]:
    """Random, and without ties in time, whose order nobody promises."""
    rng = np.random.default_rng(seed)
    names = NAMES[: rng.integers(1, 4)]

    def limit() -> float | None:
        return float(rng.uniform(2e4, 3e5)) if rng.random() < 0.4 else None

    batch = int(rng.integers(1, 4))
    profile = Profile(
        "test",
        "made up",
        PolynomialCurve((rng.uniform(0.01, 0.3), rng.uniform(0.1, 0.4), rng.uniform(0.0, 0.02)), 1000.0),
        KvSize(float(rng.uniform(0, 1e5)), 50.0),
        MeasuredCurve((1.0, max(batch, 2)), (0.02, float(rng.uniform(0.02, 0.06)))),
        batch,
        1,
        1 << 20,
    )
    clusters = tuple(
        Cluster(name, profile, int(rng.integers(1, 4)), int(rng.integers(1, 3)), limit(), limit()) for name in names
    )
    links = tuple(
        Link(source, target, float(rng.uniform(2e4, 4e5)), float(rng.choice([0.0, 0.13])))
        for source in names
        for target in names
        if source != target and rng.random() < 0.8
    )
    faults: list[LinkFault | NodeFault] = []
    for _ in range(int(rng.integers(0, 4))):
        from_s = float(rng.uniform(0, 15))
        until_s = from_s + float(rng.uniform(0.1, 8))
        if links and rng.random() < 0.6:
            link = links[rng.integers(len(links))]
            share = float(rng.choice([0.0, 0.3, 0.5]))
            faults.append(LinkFault(link.source, link.target, from_s, until_s, share))
        else:
            cluster = clusters[rng.integers(len(clusters))]
            # Several that come back at once would go on in step, and end their requests at one time.
            role = "decode" if cluster.decode_instances == 1 and rng.random() < 0.5 else "prefill"
            faults.append(NodeFault(cluster.name, role, 99, from_s, until_s))
    requests: list[Request] = []
    at_s, first = 0.0, 0
    for number in range(int(rng.integers(1, 30))):
        # Those that come after others stand behind the one that begins their session.
        after = int(rng.integers(first, number)) if number and rng.random() < 0.4 else None
        first = number if after is None else first
        pause_s = float(rng.exponential(0.4))
        at_s += pause_s if after is None else 0.0
        requests.append(
            Request(
                number,
                at_s if after is None else pause_s,
                int(rng.integers(200, 9000)),
                int(rng.choice([1, 2, 40, 90])),
                b"",
                after=after,
            )
        )
    scenario = Scenario(
        "test",
        served(Deployment(clusters, links), "chunked" if rng.random() < 0.4 else "whole"),
        Workload(),
        SLO,
        cross_traffic=tuple((link.source, link.target, 0.25) for link in links if rng.random() < 0.3),
        faults=tuple(faults),
        telemetry_s=0.7,
    )
    return scenario, requests, ByLength([(name, name) for name in names] + [(e.source, e.target) for e in links])


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_request_has_the_times_that_brute_force_finds(seed: int) -> None:
    scenario, requests, policy = scene(seed)
    expected: list[BruteJob] = BruteForce(scenario, requests, lambda request: policy.way(request.prompt_tokens)).run()
    table = Simulation(scenario, requests, policy, {}).run().requests
    expected = [job for job in expected if not np.isnan(job.arrival_s)]
    assert [Outcome(outcome).name.lower() for outcome in table.outcome] == [job.outcome for job in expected]
    assert table.arrival_s == pytest.approx([job.arrival_s for job in expected], abs=1e-5)
    assert table.finished_s == pytest.approx([job.finished_s for job in expected], abs=1e-5)
    assert table.ttft_s == pytest.approx([job.ttft_s for job in expected], abs=1e-5, nan_ok=True)
    for row, job in enumerate(expected):
        if job.ttft_s == job.ttft_s:
            parts = [job.parts.get(name, 0.0) for name in PARTS]
            assert table.parts[row] == pytest.approx(parts, abs=1e-5), f"request {row}"
    assert table.handover_bytes[table.outcome == Outcome.DONE] == pytest.approx(
        [job.crossed_bytes for job in expected if job.outcome == "done"], abs=1.0
    )
