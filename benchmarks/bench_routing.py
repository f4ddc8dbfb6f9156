"""Seconds of one routing decision with 16 clusters: pytest-benchmark's figures, and the 99th percentile over many.

`python -m pytest benchmarks/bench_routing.py --benchmark-only -s` prints the percentiles too. Decisions differ in load,
prompt and caches, so that their spread is that of the work, each counted at its best of a few; explanations are not
asked for, as in serving.
"""

from __future__ import annotations

import gc
import time
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, LinkState, RoutingRequest, Snapshot
from kvstore.schedule.policies.table import routing_policy

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

CLUSTERS = 16
CASES = 5000
ROUNDS = 3
KV = KvSize(state_bytes=182e6, token_bytes=17_280)
POINTS = (1024.0, 8192.0, 32768.0, 131072.0)
FAST = Profile(
    "fast", "bench", MeasuredCurve(POINTS, (0.44, 0.72, 1.84, 7.4)), KV, PolynomialCurve((0.025,)), 20, 8, 1 << 17
)
SLOW = Profile(
    "slow", "bench", MeasuredCurve(POINTS, (0.6, 1.5, 4.9, 22.4)), KV, PolynomialCurve((0.025,)), 20, 8, 1 << 17
)
SETTINGS = {"threshold": {"threshold_tokens": 19_400.0}}


def deployment() -> Deployment:
    """Half of the clusters only prefill; every two are joined."""
    clusters = tuple(
        Cluster(f"fast-{number}", FAST, 4, 0) if number % 2 else Cluster(f"slow-{number}", SLOW, 3, 5)
        for number in range(CLUSTERS)
    )
    pairs = [(source.name, target.name) for source in clusters for target in clusters if source is not target]
    return Deployment(clusters, tuple(Link(source, target, 12.5e9, 0.002) for source, target in pairs))


def cases(deployment: Deployment) -> list[tuple[Snapshot, RoutingRequest]]:
    """Snapshots from idle to overloaded, and prompts of which some clusters have something."""
    rng = np.random.default_rng(1)
    names = [each.name for each in deployment.clusters]
    found = []
    for number in range(CASES):
        load = rng.uniform(0, 1.2)
        clusters = {}
        for each in deployment.clusters:
            waiting = int(rng.poisson(2 * load / max(1.25 - load, 0.05)))
            running = int(min(load, 1) * 20 * each.decode_instances)
            clusters[each.name] = ClusterState(
                each,
                each.prefill_instances,
                waiting,
                waiting * rng.uniform(0.2, 2.0),
                each.decode_instances,
                running,
                int(rng.poisson(load)),
                0.025,
            )
        links = {
            (link.source, link.target): LinkState(
                link.source, link.target, link.bytes_per_s, rng.exponential(1e8) * load, min(load, 1), 0.002
            )
            for link in deployment.links
        }
        tokens = int(np.clip(rng.lognormal(9.9, 1.0), 128, 131072))
        holders = rng.choice(names, rng.integers(0, 7), replace=False)
        lengths = [int(tokens * rng.uniform(0, 0.95)) // 512 * 512 for _ in holders]
        cached = {
            str(name): CachedPrefix(length, length, float(rng.choice([0.001, 0.2])), "dram")
            for name, length in zip(holders, lengths, strict=True)
        }
        found.append((Snapshot(float(number), clusters, links), RoutingRequest(tokens, 1024, cached)))
    return found


@pytest.mark.parametrize("name", ["adaptive", "threshold", "local", "naive", "least-loaded", "random"])
def test_one_decision(benchmark: BenchmarkFixture, name: str) -> None:
    deployed = deployment()
    policy = routing_policy(name, SETTINGS.get(name, {}), deployed, Slo(10.0, 0.04))
    drawn = cases(deployed)
    memory: Any = policy.begin()
    for snapshot, _ in drawn[:200]:
        memory = policy.observe(memory, snapshot)
    seconds = np.empty((ROUNDS, len(drawn)))
    gc.collect()
    gc.freeze()  # the cases themselves are a heap that no server has
    try:
        for row in seconds:
            for number, (snapshot, request) in enumerate(drawn):
                begin = time.perf_counter()
                policy.route(memory, snapshot, request)
                row[number] = time.perf_counter() - begin
        turns = cycle(drawn)
        benchmark(lambda: policy.route(memory, *next(turns)))
    finally:
        gc.unfreeze()
    p50, p99 = np.percentile(seconds.min(axis=0), [50, 99]) * 1e6
    once_p99 = np.percentile(seconds, 99) * 1e6
    benchmark.extra_info |= {"clusters": CLUSTERS, "p50_us": p50, "p99_us": p99, "once_p99_us": once_p99}
    print(
        f"\n{name}: {CLUSTERS} clusters, {CASES} decisions: median {p50:.1f} us, 99th percentile {p99:.1f} us "
        f"(each the best of {ROUNDS}; once, on this machine with what else runs: {once_p99:.1f} us)"
    )
