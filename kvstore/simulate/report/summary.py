"""Figures of a run, from its result alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.simulate.report.measured import Measured, good_and_decided, measured
from kvstore.simulate.report.values import (
    ClusterSummary,
    HitSummary,
    LinkSummary,
    PartSummary,
    RouteSummary,
    Spread,
    Summary,
)
from kvstore.simulate.result import PARTS, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvstore.simulate.result import SimulationResult

SLOWEST_SHARE = 0.1
"""Of the requests, whose mean stands for the tail."""


def summarise(result: SimulationResult, *, settings: Iterable[tuple[str, object]] = ()) -> Summary:
    """The figures of a run.

    Args:
        result: what was simulated.
        settings: what a sweep varied, to tell this run from its neighbours.
    """
    table, scenario, slo = result.requests, result.scenario, result.scenario.slo
    part = measured(result)
    rows = part.requests
    outcomes = np.bincount(table.outcome[rows], minlength=len(Outcome))
    is_good, is_decided = good_and_decided(result)
    decided = int((is_decided & rows).sum())
    good = int((is_good & rows).sum())
    good_share = good / decided if decided else None
    ends = (table.outcome == Outcome.DONE) & (table.finished_s > part.from_s) & (table.finished_s <= part.until_s)
    links = _links(result, part)
    asked_tokens = int(table.prompt_tokens[rows & (table.prefill >= 0)].sum())
    return Summary(
        scenario=scenario.name,
        policy=scenario.policy.name,
        seed=scenario.seed,
        settings=tuple((key, str(value)) for key, value in settings),
        from_s=part.from_s,
        until_s=part.until_s,
        end_s=result.end_s,
        requests=int(rows.sum()),
        done=int(outcomes[Outcome.DONE]),
        rejected=int(outcomes[Outcome.REJECTED]),
        failed=int(outcomes[Outcome.FAILED]),
        pending=int(outcomes[Outcome.PENDING]),
        offered_per_s=_rate(int(rows.sum()), part),
        throughput_per_s=_rate(int(ends.sum()), part),
        goodput_per_s=_rate(good, part),
        good_share=good_share,
        slo_ttft_s=slo.ttft_s,
        slo_tpot_s=slo.tpot_s,
        slo_share=slo.share,
        meets_slo=good_share is not None and good_share >= slo.share and result.is_stable,
        ttft=spread(table.ttft_s[rows]),
        tpot=spread(table.tpot_s[rows]),
        parts=_parts(table.parts[rows], table.ttft_s[rows]),
        routes=_routes(result, rows),
        clusters=_clusters(result, part),
        links=links,
        hits=_hits(result, rows),
        hit_share=_share(int(table.cached_tokens[rows & (table.prefill >= 0)].sum()), asked_tokens),
        possible_share=_share(int(table.possible_tokens[rows & (table.prefill >= 0)].sum()), asked_tokens),
        caches=result.caches,
        egress_mean_bytes_per_s=_per_second(sum(link.delivered_bytes or 0.0 for link in links), part),
        happenings=len(result.happenings),
        is_stable=result.is_stable,
        wall_s=result.wall_s,
    )


def spread(values: NDArray[np.float64]) -> Spread:
    """The distribution of the values that are there, quantiles by linear interpolation."""
    there = values[np.isfinite(values)]
    missing = len(values) - len(there)
    if not len(there):
        return Spread(0, missing)
    p50, p75, p90, p95, p99 = (float(each) for each in np.quantile(there, (0.5, 0.75, 0.9, 0.95, 0.99)))
    return Spread(len(there), missing, float(there.mean()), p50, p75, p90, p95, p99, float(there.max()))


def _rate(count: int, part: Measured) -> float | None:
    return count / part.span_s if part.span_s > 0 else None


def _share(count: float, whole: float) -> float | None:
    return count / whole if whole > 0 else None


def _parts(parts: NDArray[np.float64], ttft_s: NDArray[np.float64]) -> tuple[PartSummary, ...]:
    has_first = np.isfinite(ttft_s)
    if not has_first.any():
        return ()
    parts, ttft_s = parts[has_first], ttft_s[has_first]
    slowest = parts[ttft_s >= np.quantile(ttft_s, 1 - SLOWEST_SHARE)].mean(axis=0)
    means, whole = parts.mean(axis=0), float(ttft_s.mean())
    return tuple(
        PartSummary(name, float(mean), float(mean) / whole if whole > 0 else 0.0, float(slow))
        for name, mean, slow in zip(PARTS, means, slowest, strict=True)
    )


def _routes(result: SimulationResult, rows: NDArray[np.bool_]) -> tuple[RouteSummary, ...]:
    table, clusters = result.requests, result.scenario.deployment.clusters
    found: list[RouteSummary] = []
    for prefill, decode in sorted({*zip(table.prefill[rows].tolist(), table.decode[rows].tolist(), strict=True)}):
        if prefill < 0 or decode < 0:
            continue
        here = rows & (table.prefill == prefill) & (table.decode == decode)
        first = here & np.isfinite(table.ttft_s)
        ttft = spread(table.ttft_s[first])
        found.append(
            RouteSummary(
                prefill=clusters[prefill].name,
                decode=clusters[decode].name,
                requests=int(here.sum()),
                share=float(here.sum() / rows.sum()),
                prompt_tokens_mean=float(table.prompt_tokens[here].mean()),
                cached_tokens_mean=float(table.cached_tokens[here].mean()),
                ttft_mean_s=ttft.mean,
                ttft_p90_s=ttft.p90,
                parts_mean_s=tuple(map(float, table.parts[first].mean(axis=0))) if first.any() else (),
            )
        )
    return tuple(found)


def _links(result: SimulationResult, part: Measured) -> tuple[LinkSummary, ...]:
    samples, steps_s = result.samples, part.steps_s[part.samples]
    found: list[LinkSummary] = []
    for (source, target), delivered in samples.link_bytes.items():
        moved = delivered[part.samples]
        could_bytes = float((samples.link_capacity_bytes_per_s[source, target][part.samples] * steps_s).sum())
        found.append(
            LinkSummary(
                source=source,
                target=target,
                delivered_bytes=float(moved.sum()) if len(moved) else None,
                mean_bytes_per_s=_per_second(float(moved.sum()), part),
                peak_bytes_per_s=_max(moved / steps_s),
                capacity_mean_bytes_per_s=_per_second(could_bytes, part),
                used_share=_share(float(moved.sum()), could_bytes),
            )
        )
    return tuple(found)


def _clusters(result: SimulationResult, part: Measured) -> tuple[ClusterSummary, ...]:
    samples, steps_s = result.samples, part.steps_s[part.samples]
    found: list[ClusterSummary] = []
    for cluster in result.scenario.deployment.clusters:
        name = cluster.name
        leaving, entering = np.zeros(len(steps_s)), np.zeros(len(steps_s))
        for (source, target), delivered in samples.link_bytes.items():
            if name in (source, target):
                (leaving if name == source else entering)[:] += delivered[part.samples]
        prefill_waiting = samples.prefill_waiting[name][part.samples]
        decode_waiting = samples.decode_waiting[name][part.samples]
        prefill_instances = float(samples.prefill_instances[name][part.samples].sum())
        decode_places = float(samples.decode_instances[name][part.samples].sum()) * cluster.profile.decode_batch_max
        found.append(
            ClusterSummary(
                name=name,
                prefill_busy_share=_share(float(samples.prefill_busy[name][part.samples].sum()), prefill_instances),
                prefill_waiting_mean=_mean(prefill_waiting),
                prefill_waiting_max=_max(prefill_waiting),
                decode_full_share=_share(float(samples.decode_running[name][part.samples].sum()), decode_places),
                decode_waiting_mean=_mean(decode_waiting),
                decode_waiting_max=_max(decode_waiting),
                egress_mean_bytes_per_s=_per_second(float(leaving.sum()), part),
                egress_peak_bytes_per_s=_max(leaving / steps_s),
                ingress_mean_bytes_per_s=_per_second(float(entering.sum()), part),
            )
        )
    return tuple(found)


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _max(values: NDArray[np.float64]) -> float | None:
    return float(values.max()) if len(values) else None


def _per_second(whole: float, part: Measured) -> float | None:
    """Over the time that the measured samples speak for."""
    sampled_s = float(part.steps_s[part.samples].sum())
    return whole / sampled_s if sampled_s > 0 else None


def _hits(result: SimulationResult, rows: NDArray[np.bool_]) -> tuple[HitSummary, ...]:
    table, found = result.requests, []
    for number, cluster in enumerate(result.scenario.deployment.clusters):
        here = rows & (table.prefill == number)
        asked_tokens = int(table.prompt_tokens[here].sum())
        for tier, name in enumerate(result.tiers):
            hit = here & (table.tier == tier) & (table.cached_tokens > 0)
            if hit.any():
                tokens = int(table.cached_tokens[hit].sum())
                found.append(HitSummary(cluster.name, name, int(hit.sum()), tokens, tokens / asked_tokens))
    return tuple(found)
