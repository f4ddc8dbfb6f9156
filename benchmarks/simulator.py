"""The simulator's speed and its distance from what is known exactly: `python -m benchmarks.simulator`.

Requests per second on one core, by scenario, with routing and caches; and mean waits against the closed forms of
`kvstore.schedule.planning.queueing`, each over several seeds, with 95 % confidence of the difference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.bench.rows import machine_and_commit
from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.scenario import PolicyChoice, Scenario, Workload
from kvstore.scenario.reading import read_scenario
from kvstore.schedule.deployment import Cluster, Deployment, Slo
from kvstore.schedule.planning.queueing import mdc, mmc
from kvstore.schedule.policies.table import routing_policy
from kvstore.simulate.engine import Simulation
from kvstore.simulate.simulation import simulate
from kvstore.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUES = (
    ("M/M/1", 1, 0.5, True),
    ("M/M/1", 1, 0.8, True),
    ("M/M/1", 1, 0.9, True),
    ("M/M/4", 4, 0.8, True),
    ("M/M/16", 16, 0.9, True),
    ("M/D/1", 1, 0.8, False),
    ("M/D/4", 4, 0.8, False),
    ("M/D/16", 16, 0.9, False),
)
SPEEDS = ("paper-prfaas", "paper-adaptive", "three-clusters")
SERVICE_S_PER_TOKEN = 1e-6


@dataclass(frozen=True)
class QueueRow:
    """Mean waits of one queue, in mean service times.

    Attributes:
        confidence: 95 % of the simulated mean lie within this much of it.
    """

    queue: str
    used_share: float
    closed_form: float
    simulated: float
    confidence: float
    relative_error: float
    requests: int


@dataclass(frozen=True)
class SpeedRow:
    """One core's work on a scenario."""

    scenario: str
    requests: int
    seconds: float
    requests_per_s: float
    is_stable: bool


def queue_row(name: str, servers: int, used: float, is_exponential: bool, requests: int, seeds: int) -> QueueRow:
    profile = Profile(
        "queue",
        "made up",
        PolynomialCurve((0.0, SERVICE_S_PER_TOKEN)),
        KvSize(0.0, 1.0),
        MeasuredCurve((1.0,), (1.0,)),
        1,
        1,
        1 << 30,
    )
    slo = Slo(1e9, 1e9)
    deployment = Deployment((Cluster("one", profile, servers, 1),))
    scenario = Scenario("queue", deployment, Workload(), slo, PolicyChoice("local"), telemetry_s=1000.0)
    means = []
    for seed in range(seeds):
        policy = routing_policy("local", {}, deployment, slo)
        coming = _coming(
            np.random.default_rng([seed, servers, round(100 * used), is_exponential]),
            used * servers,
            is_exponential,
            requests,
        )
        result = Simulation(scenario, coming, policy, {}).run()
        means.append(float(result.requests.parts[requests // 10 :, 0].mean()))
    closed = (mmc if is_exponential else mdc)(used * servers, 1.0, servers).mean_s
    mean = statistics.fmean(means)
    confidence = _student(seeds - 1) * statistics.stdev(means) / sqrt(seeds)
    return QueueRow(name, used, closed, mean, confidence, mean / closed - 1, requests * seeds)


def _student(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's distribution, by the expansion of Cornish and Fisher."""
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _coming(rng: np.random.Generator, rate_per_s: float, is_exponential: bool, count: int) -> Iterator[Request]:
    arrivals_s = np.cumsum(rng.exponential(1 / rate_per_s, count)).tolist()
    mean_tokens = 1 / SERVICE_S_PER_TOKEN
    lengths = rng.exponential(mean_tokens, count) if is_exponential else np.full(count, mean_tokens)
    for number, (at_s, tokens) in enumerate(zip(arrivals_s, lengths.tolist(), strict=True)):
        yield Request(number, at_s, max(round(tokens), 1), 1, b"")


def speed_row(name: str, requests: int) -> SpeedRow:
    scenario = read_scenario(name)
    workload = replace(scenario.workload, requests_max=requests)
    begin = time.process_time()
    result = simulate(replace(scenario, workload=workload, duration_s=None))
    seconds = time.process_time() - begin
    count = len(result.requests)
    return SpeedRow(name, count, seconds, count / seconds, result.is_stable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=100_000, help="of each scenario whose speed is measured")
    parser.add_argument("--queue-requests", type=int, default=100_000, help="of each queue and seed")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the rows here")
    chosen = parser.parse_args()
    queues = [queue_row(*queue, chosen.queue_requests, chosen.seeds) for queue in QUEUES]
    speeds = [speed_row(name, chosen.requests) for name in SPEEDS]
    console = Console()
    table = Table("queue", "load", "closed form", "simulated", "± 95 %", "error", title="Mean wait, in service times")
    for row in queues:
        table.add_row(
            row.queue,
            f"{row.used_share:.0%}",
            f"{row.closed_form:.4f}",
            f"{row.simulated:.4f}",
            f"{row.confidence:.4f}",
            f"{row.relative_error:+.2%}",
        )
    console.print(table)
    table = Table("scenario", "requests", "seconds", "requests/s", "stable", title="One core")
    for each in speeds:
        table.add_row(
            each.scenario,
            f"{each.requests:,}",
            f"{each.seconds:.1f}",
            f"{each.requests_per_s:,.0f}",
            "yes" if each.is_stable else "no",
        )
    console.print(table)
    if chosen.json is not None:
        document = {
            **machine_and_commit(),
            "queues": [asdict(row) for row in queues],
            "speeds": [asdict(each) for each in speeds],
        }
        chosen.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
