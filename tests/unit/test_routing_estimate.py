"""What a router estimates is what the simulator then counts, part by part, where nothing comes in between."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.profile import PolynomialCurve
from kvstore.scenario import Scenario, Workload
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.policy import Decision, Estimate, RoutingPolicy
from kvstore.schedule.policies.table import routing_policy
from kvstore.schedule.prefill_service import ServiceKind
from kvstore.simulate.cache import ClusterCache
from kvstore.simulate.engine import Simulation
from kvstore.simulate.result import PARTS
from kvstore.workload.block_keys import Text
from kvstore.workload.request import Request
from tests.unit.simulated import profile_of, served

if TYPE_CHECKING:
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

BLOCK_TOKENS = 16
SLO = Slo(100.0, 1.0)


class Listening(RoutingPolicy[Any]):
    """Decides as another one does, and notes what it expects."""

    name = "listening"

    def __init__(self, policy: RoutingPolicy[Any]) -> None:
        self._policy = policy
        self.expected: list[Estimate] = []

    def begin(self) -> Any:
        return self._policy.begin()

    def observe(self, memory: Any, snapshot: Snapshot) -> Any:
        return self._policy.observe(memory, snapshot)

    def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        decision = self._policy.route(memory, snapshot, request)
        assert decision.route is not None
        self.expected.append(decision.route.estimate)
        return decision


def pair(
    *, bytes_per_s: float = 1e9, round_trip_s: float = 0.05, fixed_s: float = 0.4, state_bytes: float = 1e6
) -> Deployment:
    """`far` prefills for `near`, which also prefills."""
    profile = replace(profile_of(batch=64, state_bytes=state_bytes), prefill=PolynomialCurve((fixed_s, 1e-3)))
    return Deployment(
        (
            Cluster("far", profile, 1, 0, cache=CacheSize(1e12)),
            Cluster("near", profile, 1, 4, cache=CacheSize(1e12)),
        ),
        (Link("far", "near", bytes_per_s, round_trip_s), Link("near", "far", bytes_per_s, round_trip_s)),
    )


def heard(
    deployment: Deployment,
    requests: list[Request],
    name: str,
    options: dict[str, float] | None = None,
    service: ServiceKind = "whole",
) -> list[tuple[Estimate, dict[str, float]]]:
    """For each request what was expected, and what was."""
    policy = Listening(routing_policy(name, options or {}, deployment, SLO))
    scenario = Scenario(
        "test", served(deployment, service), Workload(), SLO, block_tokens=BLOCK_TOKENS, telemetry_s=0.01
    )
    caches = {each.name: ClusterCache(each, BLOCK_TOKENS) for each in deployment.clusters}
    result = Simulation(scenario, requests, policy, caches).run()
    rows = [dict(zip(PARTS, map(float, row), strict=True)) for row in result.requests.parts]
    return list(zip(policy.expected, rows, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(100, 40_000),
    st.sampled_from([1e5, 1e6, 1e9]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 1e6]),
    st.sampled_from(get_args(ServiceKind)),
)
def test_a_prompt_alone_takes_what_was_estimated(
    tokens: int, bytes_per_s: float, round_trip_s: float, state_bytes: float, service: ServiceKind
) -> None:
    deployment = pair(bytes_per_s=bytes_per_s, round_trip_s=round_trip_s, state_bytes=state_bytes)
    [(expected, counted)] = heard(deployment, [Request(0, 5.0, tokens, 1, b"")], "naive", service=service)
    for part, seconds in counted.items():
        assert getattr(expected, part) == pytest.approx(seconds), part


@pytest.mark.parametrize("bytes_per_s", [1e6, 2e4])
def test_a_prefix_comes_while_its_prompt_waits(bytes_per_s: float) -> None:
    """The third prompt continues the first one, behind the second; at 20 kB/s moving takes longer than waiting."""
    text = Text(0, BLOCK_TOKENS)
    text.grow(8000)
    requests = [
        Request(0, 0.0, 8000, 1, text.keys),
        Request(1, 60.0, 30_000, 1, b""),
        Request(2, 61.0, 20_000, 1, text.keys),
    ]
    deployment = pair(bytes_per_s=bytes_per_s, fixed_s=0.1)
    *_, (expected, counted) = heard(deployment, requests, "threshold", {"threshold_tokens": 10_000.0})
    assert expected.prefix_s > 0
    for part in ("load_s", "prefix_s", "queue_s", "prefill_s"):
        assert getattr(expected, part) == pytest.approx(counted[part], rel=0.02), part
