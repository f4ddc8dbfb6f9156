"""Four ways to serve one trace, at half to more than all of what the plan allows: `python -m benchmarks.routing_study`.

The paper's clusters and link, with its 1T profile. Each way gets the division of instances (and the threshold) that the
planner finds best for the trace's own lengths. Rates are shares of Λ_max of PrfaaS-PD by that plan. `--link-gbps` makes
the link narrower than the paper's; `--loss` takes half of its rate away in the middle third of the time.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.bench.rows import machine_and_commit
from kvstore.profiles import load_profile
from kvstore.scenario import Arrivals, LinkFault, PolicyChoice, Scenario, Workload
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link, Slo
from kvstore.schedule.planning.optimum import best_plan
from kvstore.schedule.planning.plan import divided
from kvstore.simulate.result import Outcome
from kvstore.simulate.simulation import simulate
from kvstore.workload.sources import requests_of
from kvstore.workload.traffic import traffic_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvstore.schedule.planning.plan import Traffic
    from kvstore.simulate.result import SimulationResult

PREFILL_INSTANCES = 4
PD_INSTANCES = 8
HOMOGENEOUS_INSTANCES = 12
CACHE_BYTES = 1e12
"""Of DRAM, for each instance."""
LOADS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
LOSS_SHARE = 0.5
SLO = Slo(ttft_s=10.0, tpot_s=0.026)
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Figure:
    """One simulation.

    Attributes:
        load: rate as a share of Λ_max of PrfaaS-PD.
        goodput_per_s: requests within both limits, of all that arrived.
        ttft_p90_s: of those that were served.
        ttft_p90_loss_s: of those that arrived while the link had half its rate.
    """

    way: str
    load: float
    requests_per_s: float
    goodput_per_s: float
    good_share: float
    ttft_mean_s: float | None
    ttft_p90_s: float | None
    ttft_p90_loss_s: float | None
    good_share_loss: float | None
    rejected_share: float
    hit_share: float | None
    egress_gbps: float
    is_stable: bool


@dataclass(frozen=True)
class Way:
    """A deployment and its policy."""

    name: str
    deployment: Deployment
    policy: PolicyChoice


def ways_of(traffic: Traffic, link_bytes_per_s: float) -> tuple[list[Way], float]:
    """The ways to serve, and Λ_max of PrfaaS-PD."""
    fast, slow = load_profile("paper-1t-h200"), load_profile("paper-1t-h20")

    def cache(instances: int) -> CacheSize:
        return CacheSize(dram_bytes=instances * CACHE_BYTES)

    def links(*names: str) -> tuple[Link, ...]:
        return tuple(Link(a, b, link_bytes_per_s, 0.01) for a in names for b in names if a != b)

    prefill = Cluster("prfaas", fast, PREFILL_INSTANCES, 0, cache=cache(PREFILL_INSTANCES))
    pd = Cluster("pd", slow, 1, PD_INSTANCES - 1, cache=cache(PD_INSTANCES))
    both = Deployment((prefill, pd), links("prfaas", "pd"))
    plan = best_plan(both, traffic, "mean", free=["pd"])
    split = divided(both, plan.plan.splits)
    threshold = (("threshold_tokens", plan.plan.thresholds[0]),)
    naive = Deployment(
        (prefill, replace(pd, prefill_instances=0, decode_instances=PD_INSTANCES)), links("prfaas", "pd")
    )
    alone = Deployment((Cluster("pd", slow, 6, HOMOGENEOUS_INSTANCES - 6, cache=cache(HOMOGENEOUS_INSTANCES)),))
    alone = divided(alone, best_plan(alone, traffic, "mean", free=["pd"]).plan.splits)
    return [
        Way("PrfaaS-PD", split, PolicyChoice("threshold", threshold)),
        Way("homogeneous", alone, PolicyChoice("local")),
        Way("naive", naive, PolicyChoice("naive")),
        Way("ours", split, PolicyChoice("adaptive", (("admission", 1.0),))),
        Way("ours, all let in", split, PolicyChoice("adaptive")),
    ], plan.requests_per_s


def p90(seconds: NDArray[np.float64]) -> float | None:
    """None where nobody was served."""
    return float(np.quantile(seconds, 0.9)) if len(seconds) else None


def figure_of(way: Way, load: float, result: SimulationResult) -> Figure:
    """What is compared, of the requests that arrived after the warm-up."""
    table, scenario = result.requests, result.scenario
    last_s = float(np.nanmax(table.arrival_s))
    begin_s = WARMUP_SHARE * last_s
    counted = table.arrival_s >= begin_s
    is_good = (table.outcome == Outcome.DONE) & (table.ttft_s <= SLO.ttft_s)
    is_good &= np.isnan(table.tpot_s) | (table.tpot_s <= SLO.tpot_s)
    served = counted & ~np.isnan(table.ttft_s)
    loss = [fault for fault in scenario.faults if isinstance(fault, LinkFault)]
    during = counted & (table.arrival_s >= loss[0].from_s) & (table.arrival_s < loss[0].until_s) if loss else None
    seconds = last_s - begin_s
    return Figure(
        way.name,
        load,
        counted.sum() / seconds,
        (counted & is_good).sum() / seconds,
        (counted & is_good).sum() / counted.sum(),
        float(table.ttft_s[served].mean()) if served.any() else None,
        p90(table.ttft_s[served]),
        None if during is None else p90(table.ttft_s[during & served]),
        None if during is None else float((during & is_good).sum() / during.sum()),
        float((table.outcome[counted] == Outcome.REJECTED).mean()),
        float(table.cached_tokens[served].sum() / table.prompt_tokens[served].sum()) if served.any() else None,
        float(table.handover_bytes[served].sum() + table.prefix_bytes[served].sum()) * 8e-9 / seconds,
        result.is_stable,
    )


def run(task: tuple[Way, float, float, Workload, bool]) -> Figure:
    """One simulation and its figure."""
    way, load, rate, workload, has_loss = task
    workload = replace(workload, arrivals=replace(workload.arrivals, rate_per_s=rate))
    faults: tuple[LinkFault, ...] = ()
    if has_loss:
        span_s = requests_in(workload) / rate
        faults = tuple(
            LinkFault(link.source, link.target, span_s / 3, span_s * 2 / 3, LOSS_SHARE) for link in way.deployment.links
        )
    scenario = Scenario(way.name, way.deployment, workload, SLO, way.policy, faults)
    return figure_of(way, load, simulate(scenario))


def requests_in(workload: Workload) -> int:
    """How many requests the workload has."""
    return sum(1 for _ in requests_of(workload, block_tokens=512, seed=0))


def shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def show(figures: Iterable[Figure], caption: str) -> None:
    table = Table(title=caption, title_justify="left")
    for column in (
        "load",
        "way",
        "offered/s",
        "goodput/s",
        "good",
        "TTFT mean s",
        "P90 s",
        "P90 in loss",
        "good in loss",
        "rejected",
        "hits",
        "Gbit/s",
        "stable",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    for each in figures:
        table.add_row(
            f"{each.load:.0%}",
            each.way,
            f"{each.requests_per_s:.2f}",
            f"{each.goodput_per_s:.2f}",
            f"{each.good_share:.1%}",
            shown(each.ttft_mean_s, ".2f"),
            shown(each.ttft_p90_s, ".2f"),
            shown(each.ttft_p90_loss_s, ".2f"),
            shown(each.good_share_loss, ".1%"),
            f"{each.rejected_share:.1%}",
            shown(each.hit_share, ".1%"),
            f"{each.egress_gbps:.1f}",
            "" if each.is_stable else "no",
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="a Mooncake trace; without it the excerpt that ships with the package")
    parser.add_argument("--link-gbps", type=float, default=100.0)
    parser.add_argument("--loads", type=lambda text: [float(each) for each in text.split(",")], default=list(LOADS))
    parser.add_argument("--loss", action="store_true", help="half the link's rate is gone in the middle third")
    parser.add_argument("--arrivals", choices=("trace", "poisson", "burst"), default="trace")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    workload = Workload("mooncake", arguments.trace, arrivals=Arrivals(arguments.arrivals, 1.0))
    traffic = traffic_of(workload, block_tokens=512, seed=0, is_cached=True)
    ways, most_per_s = ways_of(traffic, arguments.link_gbps * 1e9 / 8)
    print(f"Λ_max of PrfaaS-PD: {most_per_s:.3f}/s")
    for way in ways:
        clusters = ", ".join(
            f"{each.name} {each.prefill_instances} + {each.decode_instances}" for each in way.deployment.clusters
        )
        print(f"{way.name}: {clusters}; {way.policy.name} {dict(way.policy.settings) or ''}")
    tasks = [(way, load, load * most_per_s, workload, arguments.loss) for load in arguments.loads for way in ways]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        figures = list(pool.map(run, tasks))
    loss = ", half of it gone for a third of the time" if arguments.loss else ""
    show(figures, f"{arguments.trace or 'the excerpt'}, link of {arguments.link_gbps:g} Gbit/s{loss}")
    if arguments.out:
        rows = {**machine_and_commit(), "rows": [asdict(each) for each in figures]}
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
