"""The best plan by trying all of them: slow, simple, and what the fast search is checked against."""

from __future__ import annotations

from itertools import combinations_with_replacement
from math import comb, inf
from typing import TYPE_CHECKING

from kvstore.errors import PlanError
from kvstore.limits import PLANS_MAX
from kvstore.schedule.planning.candidates import (
    all_divisions,
    all_orders,
    divisions_count,
    free_clusters,
    members_of,
    orders_count,
    planned,
)
from kvstore.schedule.planning.capacity import Capacity, best_flows
from kvstore.schedule.planning.score import PlanScore
from kvstore.schedule.planning.table import LengthTable, candidate_thresholds
from kvstore.schedule.planning.throughput import Throughput, throughput

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.candidates import Division, Order
    from kvstore.schedule.planning.plan import Convention, Traffic


def exhaustive_plan(
    deployment: Deployment,
    traffic: Traffic,
    convention: Convention = "at-mean",
    *,
    free: Collection[str] | None = None,
    thresholds: Sequence[float] | None = None,
    thresholds_max: int = 128,
) -> Throughput:
    """The best of all divisions of instances, orders of clusters and thresholds.

    Of plans that serve the same rate the one is taken whose prefill would go on the furthest if decode were no limit.

    Args:
        free: names of the clusters whose instances may be divided; None: those that are convertible.
        thresholds: to choose from; None: all lengths of a trace, or as many quantiles as `thresholds_max`.

    Raises:
        PlanError: there are more than `PLANS_MAX` plans, or none of them serves anything.
    """
    is_free = free_clusters(deployment, free)
    members = members_of(deployment, is_free)
    chosen = candidate_thresholds(traffic.lengths, thresholds_max) if thresholds is None else thresholds
    edges = len({0.0, inf, *chosen})
    cuts_count = comb(edges + len(members) - 2, len(members) - 1)
    count = divisions_count(deployment, is_free) * orders_count(len(members)) * cuts_count
    if count > PLANS_MAX:
        raise PlanError(
            f"{count:,} plans are more than the {PLANS_MAX:,} that an exhaustive search tries; use the fast one, fewer "
            "thresholds, or fix the instances of some clusters"
        )
    table = LengthTable.of(traffic.lengths, deployment, chosen, convention)
    capacity = Capacity.of(deployment, traffic)
    best: tuple[PlanScore, Division, Order, tuple[int, ...]] | None = None
    for division in all_divisions(deployment, is_free):
        decoding = tuple(
            cluster.instances - prefill for cluster, prefill in zip(deployment.clusters, division, strict=True)
        )
        divided = capacity.divided(division, decoding)
        for order in all_orders(members):
            for cuts in combinations_with_replacement(range(edges), len(order) - 1):
                ends = (0, *cuts, edges - 1)
                loads = [table.load(group, ends[at], ends[at + 1]) for at, group in enumerate(order)]
                rate, _ = best_flows(divided, loads)
                if best is not None and not best[0].may_lose_to(rate):
                    continue
                score = PlanScore.of(divided, loads, rate)
                if rate > 0 and (best is None or score.is_better_than(best[0])):
                    best = score, division, order, cuts
    if best is None:
        raise PlanError("no division of the instances serves every length; somebody must prefill and somebody decode")
    _, division, order, cuts = best
    limits = [float(table.thresholds[cut]) for cut in (0, *cuts, edges - 1)]
    return throughput(deployment, planned(deployment, is_free, division, order, limits), traffic, convention)
