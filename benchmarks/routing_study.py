"""Ways to serve one workload, at half to more than all of what the plan allows: `python -m benchmarks.routing_study`.

The paper's clusters and link, with its 1T profile. Each way gets the division of instances (and the threshold) that the
planner finds best for the workload's own lengths. Rates are shares of Λ_max of PrfaaS-PD by that plan. `--workload`
takes what comes from a trace or a generator, `--seeds` several draws of it, `--link-gbps` makes the link narrower than
the paper's, and `--fault` breaks something for the middle third of the time. The table has means over the seeds, and
the lowest and highest share of requests within the limits; `--out` writes every run.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.bench.rows import machine_and_commit
from kvstore.profiles import load_profile
from kvstore.scenario import Arrivals, LinkFault, NodeFault, PolicyChoice, Scenario, Workload
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
LINK_GBPS = 100.0
BLOCK_TOKENS = 512
FAULT_SPAN = (1 / 3, 2 / 3)
"""Of the time in which requests come, between which something is broken."""
SLO = Slo(ttft_s=10.0, tpot_s=0.026)
WARMUP_SHARE = 0.1


WorkloadKind: TypeAlias = Literal["mooncake", "agentic", "multiturn", "branching"]
Fault: TypeAlias = Literal["none", "loss", "outage", "prefill", "decode", "prefill-cluster"]
"""Links have half their rate, or none; half of each cluster's instances of a role are gone, or all who only prefill."""


@dataclass(frozen=True)
class Figure:
    """One simulation.

    Attributes:
        load: rate as a share of Λ_max of PrfaaS-PD.
        goodput_per_s: requests within both limits, of all that arrived.
        ttft_p90_s: of those that were served.
        ttft_p90_fault_s: of those that arrived during the fault.
        failed_share: lost after they were let in.
    """

    way: str
    load: float
    seed: int
    requests_per_s: float
    goodput_per_s: float
    good_share: float
    ttft_mean_s: float | None
    ttft_p90_s: float | None
    ttft_p90_fault_s: float | None
    good_share_fault: float | None
    rejected_share: float
    failed_share: float
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
    if not plan.plan.thresholds:
        raise SystemExit("the best plan for this workload has no threshold, so there is no PrfaaS-PD to compare with")
    split = divided(both, plan.plan.splits)
    threshold = (("threshold_tokens", plan.plan.thresholds[0]),)
    naive = Deployment(
        (prefill, replace(pd, prefill_instances=0, decode_instances=PD_INSTANCES)), links("prfaas", "pd")
    )
    alone = Deployment((Cluster("pd", slow, 6, HOMOGENEOUS_INSTANCES - 6, cache=cache(HOMOGENEOUS_INSTANCES)),))
    alone = divided(alone, best_plan(alone, traffic, "mean", free=["pd"]).plan.splits)
    return [
        Way("PrfaaS-PD", split, PolicyChoice("threshold", threshold)),
        Way("PrfaaS-PD, early rejection", split, PolicyChoice("threshold", (*threshold, ("admission", 1.0)))),
        Way("homogeneous", alone, PolicyChoice("local")),
        Way("naive", naive, PolicyChoice("naive")),
        Way("ours", split, PolicyChoice("adaptive", (("admission", 1.0),))),
        Way("ours, all let in", split, PolicyChoice("adaptive")),
    ], plan.requests_per_s


def p90(seconds: NDArray[np.float64]) -> float | None:
    """None where nobody was served."""
    return float(np.quantile(seconds, 0.9)) if len(seconds) else None


@dataclass(frozen=True)
class Task:
    """One simulation to be made; `from_s` and `until_s` are those of its fault."""

    way: Way
    load: float
    workload: Workload
    seed: int
    fault: Fault
    from_s: float
    until_s: float
    duration_s: float | None


def figure_of(task: Task, result: SimulationResult) -> Figure:
    """What is compared, of the requests that arrived after the warm-up."""
    table = result.requests
    last_s = float(np.nanmax(table.arrival_s))
    begin_s = WARMUP_SHARE * last_s
    counted = table.arrival_s >= begin_s
    is_good = (table.outcome == Outcome.DONE) & (table.ttft_s <= SLO.ttft_s)
    is_good &= np.isnan(table.tpot_s) | (table.tpot_s <= SLO.tpot_s)
    served = counted & ~np.isnan(table.ttft_s)
    during = counted & (table.arrival_s >= task.from_s) & (table.arrival_s < task.until_s)
    has_fault = task.fault != "none" and bool(during.any())
    seconds = last_s - begin_s
    return Figure(
        task.way.name,
        task.load,
        task.seed,
        counted.sum() / seconds,
        (counted & is_good).sum() / seconds,
        (counted & is_good).sum() / counted.sum(),
        float(table.ttft_s[served].mean()) if served.any() else None,
        p90(table.ttft_s[served]),
        p90(table.ttft_s[during & served]) if has_fault else None,
        float((during & is_good).sum() / during.sum()) if has_fault else None,
        float((table.outcome[counted] == Outcome.REJECTED).mean()),
        float((table.outcome[counted] == Outcome.FAILED).mean()),
        float(table.cached_tokens[served].sum() / table.prompt_tokens[served].sum()) if served.any() else None,
        float(table.handover_bytes[served].sum() + table.prefix_bytes[served].sum()) * 8e-9 / seconds,
        result.is_stable,
    )


def faults_of(task: Task) -> tuple[LinkFault | NodeFault, ...]:
    """What breaks in a way's own deployment; nothing, where it has nothing of the kind."""
    deployment, span = task.way.deployment, (task.from_s, task.until_s)
    if task.fault == "loss" or task.fault == "outage":
        share = LOSS_SHARE if task.fault == "loss" else 0.0
        return tuple(LinkFault(link.source, link.target, *span, share) for link in deployment.links)
    if task.fault == "prefill-cluster":
        return tuple(
            NodeFault(each.name, "prefill", each.prefill_instances, *span)
            for each in deployment.clusters
            if not each.decodes
        )
    found = []
    for each in deployment.clusters:
        instances = each.prefill_instances if task.fault == "prefill" else each.decode_instances
        if task.fault != "none" and instances > 1:
            found.append(
                NodeFault(each.name, "prefill" if task.fault == "prefill" else "decode", instances // 2, *span)
            )
    return tuple(found)


def run(task: Task) -> Figure:
    """One simulation and its figure."""
    way = task.way
    scenario = Scenario(
        way.name,
        way.deployment,
        task.workload,
        SLO,
        way.policy,
        faults_of(task),
        duration_s=task.duration_s,
        seed=task.seed,
    )
    return figure_of(task, simulate(scenario))


def tasks_of(
    workload: Workload, requests: int, fault: Fault, link_gbps: float, loads: list[float], seed: int
) -> tuple[list[Task], str]:
    """Every way at every load under one seed, and what they are."""
    is_one_by_one = workload.kind == "mooncake"
    if is_one_by_one:
        workload = replace(workload, requests_max=requests)
        requests = sum(1 for _ in requests_of(workload, block_tokens=BLOCK_TOKENS, seed=seed))
    traffic = traffic_of(workload, block_tokens=BLOCK_TOKENS, seed=seed, is_cached=True)
    ways, most_per_s = ways_of(traffic, link_gbps * 1e9 / 8)
    tasks = []
    for load in loads:
        rate = load * most_per_s
        span_s = requests / rate
        from_s, until_s = (share * span_s for share in FAULT_SPAN)
        offered = replace(workload, arrivals=replace(workload.arrivals, rate_per_s=rate))
        # Sessions go on for long; their last calls would come at a rate that nobody asked for.
        duration_s = None if is_one_by_one else span_s
        tasks += [Task(way, load, offered, seed, fault, from_s, until_s, duration_s) for way in ways]
    lines = [f"seed {seed}: {requests} requests, Λ_max of PrfaaS-PD: {most_per_s:.3f}/s"]
    for way in ways:
        clusters = ", ".join(
            f"{each.name} {each.prefill_instances} + {each.decode_instances}" for each in way.deployment.clusters
        )
        lines.append(f"  {way.name}: {clusters}; {way.policy.name} {dict(way.policy.settings) or ''}")
    return tasks, "\n".join(lines)


def shown(values: list[float | None], form: str) -> str:
    """The mean, where every run has a value."""
    there = [each for each in values if each is not None]
    return format(sum(there) / len(there), form) if there and len(there) == len(values) else ""


def show(figures: Iterable[Figure], caption: str) -> None:
    table = Table(title=caption, title_justify="left")
    for column in (
        "load",
        "way",
        "offered/s",
        "goodput/s",
        "good",
        "of seeds",
        "TTFT mean s",
        "P90 s",
        "P90 in fault",
        "good in fault",
        "rejected",
        "failed",
        "hits",
        "Gbit/s",
        "stable",
    ):
        table.add_column(column, justify="left" if column == "way" else "right")
    alike: dict[tuple[float, str], list[Figure]] = {}
    for each in figures:
        alike.setdefault((each.load, each.way), []).append(each)
    for (load, way), runs in alike.items():
        good = [each.good_share for each in runs]
        table.add_row(
            f"{load:.0%}",
            way,
            shown([each.requests_per_s for each in runs], ".2f"),
            shown([each.goodput_per_s for each in runs], ".2f"),
            shown([each.good_share for each in runs], ".1%"),
            f"{min(good):.1%} - {max(good):.1%}" if len(runs) > 1 else "",
            shown([each.ttft_mean_s for each in runs], ".2f"),
            shown([each.ttft_p90_s for each in runs], ".2f"),
            shown([each.ttft_p90_fault_s for each in runs], ".2f"),
            shown([each.good_share_fault for each in runs], ".1%"),
            shown([each.rejected_share for each in runs], ".1%"),
            shown([each.failed_share for each in runs], ".1%"),
            shown([each.hit_share for each in runs], ".1%"),
            shown([each.egress_gbps for each in runs], ".1f"),
            "" if all(each.is_stable for each in runs) else "no",
        )
    Console(width=180).print(table)


def numbers(text: str) -> list[float]:
    return [float(each) for each in text.split(",")]


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=NUMBER") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=get_args(WorkloadKind), default="mooncake")
    parser.add_argument("--trace", help="a file of that kind; without it the excerpt that ships with the package")
    parser.add_argument(
        "--setting", action="append", default=[], type=_setting, metavar="NAME=NUMBER", help="of a generator"
    )
    parser.add_argument("--requests", type=int, default=12_100, help="about so many, where sessions make them")
    parser.add_argument("--link-gbps", type=float, default=LINK_GBPS)
    parser.add_argument("--loads", type=numbers, default=list(LOADS))
    parser.add_argument("--seeds", type=lambda text: [int(each) for each in text.split(",")], default=[0])
    parser.add_argument("--fault", choices=get_args(Fault), default="none", help="during the middle third")
    parser.add_argument("--arrivals", choices=("trace", "poisson", "burst"), help="trace for mooncake, else poisson")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    arguments = parser.parse_args()
    arrivals = Arrivals(arguments.arrivals or ("trace" if arguments.workload == "mooncake" else "poisson"), 1.0)
    workload = Workload(arguments.workload, arguments.trace, tuple(arguments.setting), arrivals)
    tasks: list[Task] = []
    for seed in arguments.seeds:
        of_seed, text = tasks_of(
            workload, arguments.requests, arguments.fault, arguments.link_gbps, arguments.loads, seed
        )
        print(text)
        tasks += of_seed
    tasks.sort(key=lambda task: task.load)
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        figures = list(pool.map(run, tasks))
    fault = "" if arguments.fault == "none" else f", {arguments.fault} for a third of the time"
    show(figures, f"{arguments.trace or arguments.workload}, link of {arguments.link_gbps:g} Gbit/s{fault}")
    if arguments.out:
        rows = {**machine_and_commit(), "rows": [asdict(each) for each in figures]}
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
