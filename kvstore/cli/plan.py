"""`kvstore plan`: who prefills what, with how many instances, and what comes of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import inf, isinf
from typing import TYPE_CHECKING, get_args

from kvstore.cli.printing import print_table, printable
from kvstore.errors import PlanError
from kvstore.scenario import read_scenario
from kvstore.schedule.planning.exhaustive import exhaustive_plan
from kvstore.schedule.planning.goodput import Goodput, plan_goodput
from kvstore.schedule.planning.latency import LoadedPlan
from kvstore.schedule.planning.optimum import best_plan
from kvstore.schedule.planning.plan import CONVENTIONS, divided
from kvstore.schedule.prefill_service import ServiceKind
from kvstore.workload.problem import problem_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.scenario import Scenario
    from kvstore.schedule.planning.latency import Latency
    from kvstore.schedule.planning.plan import Convention, Traffic
    from kvstore.schedule.planning.throughput import Throughput
    from kvstore.schedule.prefill_service import PrefillService

LOADS = (0.5, 0.8, 0.9)
"""Shares of the stable rate at which latency is shown."""
_GBIT = 8 / 1e9


@dataclass(frozen=True)
class _Planned:
    """A plan and all that is said of it."""

    scenario: Scenario
    traffic: Traffic
    is_cached: bool
    throughput: Throughput
    loaded: LoadedPlan
    goodput: Goodput
    latencies: tuple[Latency, ...]
    unstable_requests_per_s: float | None


@dataclass(frozen=True)
class _Service:
    """One way to prefill the mean prompt of a band, alone on an instance and beside a full batch that decodes."""

    cluster: str
    tokens: float
    kind: ServiceKind
    alone: PrefillService
    beside: PrefillService


def run_plan(
    name: str,
    *,
    convention: str,
    divide: Sequence[str],
    is_fixed: bool,
    is_exhaustive: bool,
    requests_per_s: float | None,
    as_json: bool,
) -> int:
    """Plan a scenario; the exit status."""
    known = next((each for each in CONVENTIONS if each == convention), None)
    if known is None:
        raise PlanError(f"the convention {convention!r} is unknown; use {' or '.join(CONVENTIONS)}")
    if is_fixed and divide:
        raise PlanError("--fixed leaves all instances as they are, and --divide names some that may change; use one")
    planned = _plan(read_scenario(name), known, divide, is_fixed, is_exhaustive, requests_per_s)
    if as_json:
        print(json.dumps(_document(planned), indent=2, allow_nan=False))
    else:
        _print(planned)
    return 0


def _plan(
    scenario: Scenario,
    convention: Convention,
    divide: Sequence[str],
    is_fixed: bool,
    is_exhaustive: bool,
    requests_per_s: float | None,
) -> _Planned:
    problem = problem_of(scenario)
    deployment, traffic = problem.deployment, problem.traffic
    free = list(divide) or ([] if is_fixed else None)
    search = exhaustive_plan if is_exhaustive else best_plan
    throughput = search(deployment, traffic, convention, free=free)
    loaded = LoadedPlan(deployment, throughput, traffic)
    stable = loaded.stable_requests_per_s
    asked = scenario.workload.arrivals.rate_per_s if requests_per_s is None else requests_per_s
    if asked is not None and not 0 < asked < inf:
        raise PlanError(f"{asked} requests/s is no rate; it must be positive")
    rates = sorted({*(share * stable for share in LOADS), *([asked] if asked is not None and asked < stable else [])})
    return _Planned(
        scenario=replace(scenario, deployment=deployment),
        traffic=traffic,
        is_cached=problem.is_cached,
        throughput=throughput,
        loaded=loaded,
        goodput=plan_goodput(deployment, throughput, traffic, scenario.slo),
        latencies=tuple(loaded.at(rate) for rate in rates),
        unstable_requests_per_s=asked if asked is not None and asked >= stable else None,
    )


def _services(planned: _Planned) -> list[_Service]:
    """Every way to prefill, for each cluster that does."""
    throughput, deployment = planned.throughput, planned.scenario.deployment
    bands = {flow.prefill: flow.band for flow in throughput.flows}
    found = []
    for name, band in bands.items():
        profile, tokens = deployment.cluster(name).profile, throughput.mean_tokens[band]
        for kind in get_args(ServiceKind):
            model = replace(deployment.prefill_service, kind=kind)
            beside = model.service(profile, tokens, decode_batch=profile.decode_batch_max)
            found.append(_Service(name, tokens, kind, model.service(profile, tokens), beside))
    return found


def _document(planned: _Planned) -> dict[str, object]:
    throughput, slo = planned.throughput, planned.scenario.slo
    return {
        "scenario": planned.scenario.name,
        "convention": throughput.convention,
        "lengths": "uncached" if planned.is_cached else "whole",
        "requests_per_s": throughput.requests_per_s,
        "note": throughput.note,
        "binding": list(throughput.binding),
        "bands": [
            {
                "above_tokens": band.above_tokens,
                "upto_tokens": None if isinf(band.upto_tokens) else band.upto_tokens,
                "clusters": list(band.clusters),
                "share": share,
                "mean_tokens": mean_tokens,
            }
            for band, share, mean_tokens in zip(
                throughput.plan.bands, throughput.shares, throughput.mean_tokens, strict=True
            )
        ],
        "clusters": [
            {
                "cluster": cluster.name,
                "prefill_instances": cluster.prefill_instances,
                "decode_instances": cluster.decode_instances,
            }
            for cluster in divided(planned.scenario.deployment, throughput.plan.splits).clusters
        ],
        "parts": [
            {
                "part": part.name,
                "requests_per_s": part.requests_per_s,
                "share": part.share,
                "used_share": part.used_share,
            }
            for part in throughput.parts
        ],
        "flows": [
            {
                "prefill": flow.prefill,
                "decode": flow.decode,
                "requests_per_s": flow.requests_per_s,
                "prefill_s": flow.prefill_s,
                "request_bytes": flow.request_bytes,
                "link_bytes_per_s": flow.bytes_per_s,
            }
            for flow in throughput.flows
        ],
        "prefill_service": planned.scenario.deployment.prefill_service.kind,
        "prefill_services": [
            {
                "cluster": each.cluster,
                "mean_tokens": each.tokens,
                "prefill_service": each.kind,
                "pieces": each.alone.pieces,
                "prefill_s": each.alone.prefill_s,
                "piece_s": each.alone.piece_s,
                "states_from_s": each.alone.states_from_s,
                "prefill_beside_decode_s": each.beside.prefill_s,
                "decode_step_s": each.beside.decode_step_s,
            }
            for each in _services(planned)
        ],
        "stable_requests_per_s": planned.loaded.stable_requests_per_s,
        "unstable_requests_per_s": planned.unstable_requests_per_s,
        "extrapolated": list(_extrapolated(planned)),
        "latency": [
            {
                "requests_per_s": latency.requests_per_s,
                "ttft_mean_s": latency.ttft_mean_s,
                "ttft_p50_s": latency.ttft_quantile_s(0.5),
                "ttft_p90_s": latency.ttft_quantile_s(0.9),
                "ttft_p99_s": latency.ttft_quantile_s(0.99),
                "tpot_mean_s": latency.tpot_mean_s,
                "good_share": latency.good_share(slo),
            }
            for latency in planned.latencies
        ],
        "goodput": {
            "requests_per_s": planned.goodput.requests_per_s,
            "ttft_s": slo.ttft_s,
            "tpot_s": slo.tpot_s,
            "share": slo.share,
            "note": planned.goodput.note,
        },
    }


def _print(planned: _Planned) -> None:
    throughput, slo, deployment = planned.throughput, planned.scenario.slo, planned.scenario.deployment
    print(
        f"{printable(planned.scenario.name)}: {throughput.requests_per_s:.3g} requests/s at most, ended by "
        f"{printable(', '.join(throughput.binding))}" + (f" ({throughput.note})" if throughput.note else "") + "\n"
    )
    flows = throughput.flows
    print_table(
        "Who prefills what" + (" (lengths that an unlimited cache does not have)" if planned.is_cached else ""),
        ("tokens", "share", "mean", "by", "for", "requests/s", "prefill s", "MB", "Gbit/s on the link"),
        [
            (
                _range(band.above_tokens, band.upto_tokens),
                f"{throughput.shares[flow.band]:.1%}",
                f"{throughput.mean_tokens[flow.band]:,.0f}",
                flow.prefill,
                flow.decode,
                f"{flow.requests_per_s:.3g}",
                f"{flow.prefill_s:.3g}",
                f"{flow.request_bytes / 1e6:,.0f}",
                f"{flow.bytes_per_s * _GBIT:.3g}" if flow.crosses else "",
            )
            for flow, band in ((flow, throughput.plan.bands[flow.band]) for flow in flows)
        ],
    )
    before = {cluster.name: cluster for cluster in deployment.clusters}
    print_table(
        "Instances",
        ("cluster", "prefill", "decode", "in the scenario"),
        [
            (
                cluster.name,
                str(cluster.prefill_instances),
                str(cluster.decode_instances),
                f"{before[cluster.name].prefill_instances} + {before[cluster.name].decode_instances}",
            )
            for cluster in divided(deployment, throughput.plan.splits).clusters
        ],
    )
    print_table(
        f"What limits the rate (service times by the convention {throughput.convention})",
        ("part", "requests/s of its own", "share of all", "used"),
        [
            (part.name, f"{part.requests_per_s:.3g}", f"{part.share:.1%}", f"{part.used_share:.1%}")
            for part in throughput.parts
        ],
    )
    print_table(
        f"The mean prompt by each prefill service; this plan has {deployment.prefill_service.kind}",
        (
            "by",
            "tokens",
            "service",
            "pieces",
            "prefill s",
            "others wait s",
            "states from s",
            "beside a batch s",
            "TPOT ms",
        ),
        [
            (
                each.cluster,
                f"{each.tokens:,.0f}",
                each.kind,
                str(each.alone.pieces),
                f"{each.alone.prefill_s:.3g}",
                f"{each.alone.piece_s:.3g}",
                f"{each.alone.states_from_s:.3g}",
                f"{each.beside.prefill_s:.3g}",
                f"{each.beside.decode_step_s * 1e3:,.0f}",
            )
            for each in _services(planned)
        ],
    )
    print_table(
        f"Latency by closed forms, Poisson arrivals; stable below {planned.loaded.stable_requests_per_s:.3g} a second",
        ("requests/s", "TTFT mean s", "p50", "p90", "p99", "TPOT ms", "within the limits"),
        [
            (
                f"{latency.requests_per_s:.3g}",
                f"{latency.ttft_mean_s:.3g}",
                *(f"{latency.ttft_quantile_s(share):.3g}" for share in (0.5, 0.9, 0.99)),
                f"{latency.tpot_mean_s * 1e3:.3g}",
                f"{latency.good_share(slo):.1%}",
            )
            for latency in planned.latencies
        ],
    )
    if planned.unstable_requests_per_s is not None:
        print(f"{planned.unstable_requests_per_s:.3g} requests/s is unstable: queues grow without end.\n")
    if names := _extrapolated(planned):
        print(
            f"Extrapolated: {printable(', '.join(names))} get prompts longer than the tokens_max of their profiles; "
            "measure longer ones.\n"
        )
    found = planned.goodput
    print(
        f"Goodput: {found.requests_per_s:.3g} requests/s with {slo.share:.0%} within TTFT {slo.ttft_s:g} s and TPOT "
        f"{slo.tpot_s * 1e3:g} ms" + (f" ({found.note})" if found.note else "")
    )


def _extrapolated(planned: _Planned) -> tuple[str, ...]:
    """Clusters that prefill longer prompts than their profile speaks for."""
    longest_tokens = planned.traffic.lengths.tokens_max
    return tuple(
        cluster.name
        for cluster in planned.scenario.deployment.clusters
        if any(
            cluster.name in band.clusters and min(band.upto_tokens, longest_tokens) > cluster.profile.tokens_max
            for band in planned.throughput.plan.bands
        )
    )


def _range(above: float, upto: float) -> str:
    if isinf(upto):
        return f"> {above:,.0f}" if above > 0 else "all"
    return f"{above:,.0f} to {upto:,.0f}"
