"""Small deployments, workloads and policies for tests of the simulator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.scenario import Scenario, Workload
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.policy import Decision, Estimate, Explanation, Route, RoutingPolicy
from kvstore.schedule.policies.snapshot import NOTHING_CACHED
from kvstore.schedule.prefill_service import PrefillServiceModel, ServiceKind
from kvstore.simulate.cache import ClusterCache
from kvstore.simulate.engine import Simulation
from kvstore.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot
    from kvstore.simulate.result import SimulationResult

SLO = Slo(10.0, 0.1)


def profile_of(
    prefill_s_per_token: float = 1e-3, *, decode_step_s: float = 0.01, batch: int = 4, state_bytes: float = 0.0
) -> Profile:
    """T(l) proportional to l, so that a workload's lengths are its service times."""
    return Profile(
        "test",
        "made up",
        PolynomialCurve((0.0, prefill_s_per_token)),
        KvSize(state_bytes, 100.0),
        MeasuredCurve((1.0, max(batch, 2)), (decode_step_s, decode_step_s)),
        batch,
        1,
        1 << 20,
    )


class Fixed(RoutingPolicy[int]):
    """Sends everything the same way, resuming at what the prefilling cluster has, or at what another one has."""

    def __init__(self, prefill: str, decode: str, prefix_from: str | None = None) -> None:
        self.name = "fixed"
        self._prefill = prefill
        self._decode = decode
        self._prefix_from = prefix_from

    def begin(self) -> int:
        return 0

    def observe(self, memory: int, snapshot: Snapshot) -> int:
        return memory + 1

    def route(self, memory: int, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        here = request.cached.get(self._prefill, NOTHING_CACHED).resume_tokens
        there = request.cached.get(self._prefix_from or "", NOTHING_CACHED).resume_tokens
        source = self._prefix_from if there > here else None
        route = Route(self._prefill, self._decode, max(here, there), source, 0.0, 0.0, Estimate())
        return Decision(route, Explanation("fixed", "always", ()))


class Spread(Fixed):
    """Takes live clusters in turn, and turns away what nobody can serve."""

    def __init__(self) -> None:
        super().__init__("", "")
        self.name = "spread"

    def route(self, memory: int, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        routes = [
            Route(prefill, decode, request.cached.get(prefill, NOTHING_CACHED).resume_tokens, None, 0, 0, Estimate())
            for prefill, first in snapshot.clusters.items()
            for decode, second in snapshot.clusters.items()
            if first.prefill_instances and second.decode_instances
            if prefill == decode or (prefill, decode) in snapshot.links
        ]
        chosen = routes[(request.prompt_tokens + memory) % len(routes)] if routes else None
        return Decision(chosen, Explanation("spread", "in turn", ()))


def one_cluster(prefill: int = 1, decode: int = 1, *, profile: Profile | None = None, dram: float = 0.0) -> Deployment:
    return Deployment((Cluster("one", profile or profile_of(), prefill, decode, cache=CacheSize(dram)),))


def two_clusters(
    prefill: int = 1,
    decode: int = 1,
    *,
    bytes_per_s: float = 1e9,
    round_trip_s: float = 0.0,
    profile: Profile | None = None,
    dram: float = 0.0,
) -> Deployment:
    """`far` prefills for `near`."""
    profile = profile or profile_of()
    return Deployment(
        (
            Cluster("far", profile, prefill, 0, cache=CacheSize(dram)),
            Cluster("near", profile, 1, decode, cache=CacheSize(dram)),
        ),
        (Link("far", "near", bytes_per_s, round_trip_s), Link("near", "far", bytes_per_s, round_trip_s)),
    )


def served(deployment: Deployment, kind: ServiceKind) -> Deployment:
    """The deployment, prefilling this way."""
    return replace(deployment, prefill_service=PrefillServiceModel(kind))


def simulated(
    deployment: Deployment,
    requests: Iterable[Request],
    policy: RoutingPolicy[int] | None = None,
    **settings: object,
) -> SimulationResult:
    """Run it; `settings` are those of a scenario."""
    scenario = Scenario("test", deployment, Workload(), SLO, **{"block_tokens": 16, **settings})  # type: ignore[arg-type]
    caches = {
        cluster.name: ClusterCache(cluster, scenario.block_tokens)
        for cluster in deployment.clusters
        if cluster.cache.dram_bytes
    }
    first = deployment.clusters[0].name
    last = deployment.clusters[-1].name
    return Simulation(scenario, requests, policy or Fixed(first, last), caches).run()


def requests_at(
    arrivals_s: Iterable[float], prompt_tokens: int | Iterable[int] = 1000, output_tokens: int = 1
) -> list[Request]:
    arrivals = list(arrivals_s)
    lengths = [prompt_tokens] * len(arrivals) if isinstance(prompt_tokens, int) else list(prompt_tokens)
    return [
        Request(number, float(at_s), int(tokens), output_tokens, b"")
        for number, (at_s, tokens) in enumerate(zip(arrivals, lengths, strict=True))
    ]


def poisson(rate_per_s: float, count: int, seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count))
