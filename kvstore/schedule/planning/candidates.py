"""Everything that a search for a plan may try: orders of clusters, and divisions of their instances."""

from __future__ import annotations

from itertools import combinations, product
from typing import TYPE_CHECKING, TypeAlias

from kvstore.errors import PlanError
from kvstore.schedule.planning.plan import Split, plan_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.plan import Plan

Order: TypeAlias = tuple[tuple[int, ...], ...]
"""Groups of clusters by number; the first prefills the shortest prompts."""
Division: TypeAlias = tuple[int, ...]
"""Prefill instances of each cluster."""


def all_orders(members: Sequence[int]) -> Iterator[Order]:
    """Every way to put clusters into groups and the groups into an order: 1, 3, 13, 75, 541, ... of them."""
    if not members:
        yield ()
        return
    for size in range(1, len(members) + 1):
        for first in combinations(members, size):
            rest = tuple(member for member in members if member not in first)
            for order in all_orders(rest):
                yield (first, *order)


def orders_count(members: int) -> int:
    """How many `all_orders` yields: the ordered Bell number."""
    counts = [1]
    for size in range(1, members + 1):
        choose, total = 1, 0
        for first in range(1, size + 1):
            choose = choose * (size - first + 1) // first
            total += choose * counts[size - first]
        counts.append(total)
    return counts[members]


def free_clusters(deployment: Deployment, free: Collection[str] | None) -> tuple[bool, ...]:
    """Which clusters a search may divide: those named, or those that are convertible.

    Raises:
        PlanError: a name is not that of a cluster.
    """
    names = [cluster.name for cluster in deployment.clusters]
    unknown = sorted(set(free or ()) - set(names))
    if unknown:
        raise PlanError(f"{', '.join(unknown)} may be divided and is no cluster; there are {', '.join(names)}")
    return tuple(cluster.convertible if free is None else cluster.name in free for cluster in deployment.clusters)


def all_divisions(deployment: Deployment, is_free: Sequence[bool]) -> Iterator[Division]:
    """Every division that is a deployment: somebody prefills, and whoever does reaches somebody who decodes."""
    choices = [
        range(cluster.instances + 1) if may_change else (cluster.prefill_instances,)
        for cluster, may_change in zip(deployment.clusters, is_free, strict=True)
    ]
    return (division for division in product(*choices) if is_possible(deployment, division))


def is_possible(deployment: Deployment, division: Division) -> bool:
    """Whether somebody prefills, and every cluster that only prefills has a link to one that decodes."""
    decoding = {
        cluster.name
        for cluster, prefill in zip(deployment.clusters, division, strict=True)
        if prefill < cluster.instances
    }
    reaching = {link.source for link in deployment.links if link.target in decoding}
    return bool(decoding) and any(division) and all(each.name in decoding | reaching for each in deployment.clusters)


def divisions_count(deployment: Deployment, is_free: Sequence[bool]) -> int:
    """How many there are at most."""
    count = 1
    for cluster, may_change in zip(deployment.clusters, is_free, strict=True):
        count *= cluster.instances + 1 if may_change else 1
    return count


def members_of(deployment: Deployment, is_free: Sequence[bool]) -> tuple[int, ...]:
    """Clusters that prefill, or may."""
    return tuple(
        number for number, cluster in enumerate(deployment.clusters) if is_free[number] or cluster.prefill_instances
    )


def planned(
    deployment: Deployment, is_free: Sequence[bool], division: Division, order: Order, ends: Sequence[float]
) -> Plan:
    """The plan in which the groups of an order prefill the lengths between these ends, without empty ranges."""
    names = [cluster.name for cluster in deployment.clusters]
    kept = [at for at in range(len(order)) if ends[at] < ends[at + 1]]
    return plan_of(
        ([names[number] for number in order[at]] for at in kept),
        (ends[at + 1] for at in kept[:-1]),
        splits_of(deployment, is_free, division),
    )


def splits_of(deployment: Deployment, is_free: Sequence[bool], division: Division) -> tuple[Split, ...]:
    """The division as splits of the clusters that it may change."""
    return tuple(
        Split(cluster.name, prefill, cluster.instances - prefill)
        for cluster, may_change, prefill in zip(deployment.clusters, is_free, division, strict=True)
        if may_change
    )
