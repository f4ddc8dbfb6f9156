"""The best plan, fast: thresholds by dynamic programming, divisions of the instances by all of them or by climbing.

For one division and one order of clusters the rate is the least of what each range of lengths allows, so the best
thresholds follow range by range. What ranges have in common (decode, ingress, shared links) is then settled exactly,
and where it ends the rate the thresholds are moved until nothing is better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.schedule.planning.candidates import (
    all_divisions,
    all_orders,
    divisions_count,
    free_clusters,
    is_possible,
    members_of,
    orders_count,
    planned,
)
from kvstore.schedule.planning.capacity import Capacity, best_flows
from kvstore.schedule.planning.score import PlanScore
from kvstore.schedule.planning.table import LengthTable, candidate_thresholds
from kvstore.schedule.planning.throughput import Throughput, throughput

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.candidates import Division, Order
    from kvstore.schedule.planning.plan import Convention, Traffic

_ORDERS_OF_MEMBERS_MAX = 3
"""Up to so many clusters every order is tried."""
_DIVISIONS_MAX = 600
"""Up to so many divisions every one is tried."""
_FINER = 16
"""Into so many parts the ranges next to a threshold are cut, each time they are looked at more closely."""
_ROUNDS = 2


@dataclass(frozen=True)
class _Found:
    score: PlanScore
    division: Division
    order: Order
    ends: tuple[float, ...]


def best_plan(
    deployment: Deployment,
    traffic: Traffic,
    convention: Convention = "at-mean",
    *,
    free: Collection[str] | None = None,
    thresholds_max: int = 192,
) -> Throughput:
    """The plan that serves the most; of equal ones that whose prefill would go on the furthest.

    `exhaustive_plan` finds the same on small problems, given the same thresholds to choose from. With more than three
    clusters that prefill, orders are limited to those in which a cluster whose service time grows less with length gets
    the longer prompts; with many divisions it climbs from several beginnings, and may end below the top. The result's
    `note` says where that was so.

    Args:
        free: names of the clusters whose instances may be divided; None: those that are convertible.
        thresholds_max: quantiles to choose thresholds from at first; near the best ones it then looks more closely,
            except at the lengths of a trace, which it takes as they are.

    Raises:
        PlanError: no plan serves anything.
    """
    is_free = free_clusters(deployment, free)
    members = members_of(deployment, is_free)
    orders = _orders(deployment, traffic, members)
    thresholds = candidate_thresholds(traffic.lengths, thresholds_max)
    found = _Search(deployment, traffic, convention, thresholds, orders).best(is_free)
    for _ in range(_ROUNDS):
        closer = _closer(traffic, thresholds, found.ends)
        if not set(closer) - set(thresholds):
            break
        thresholds = closer
        again = _Search(deployment, traffic, convention, thresholds, [found.order]).at(found.division)
        if again is not None and again.score.is_better_than(found.score):
            found = again
    plan = planned(deployment, is_free, found.division, found.order, found.ends)
    note = _untried(divisions_count(deployment, is_free), len(members), len(orders))
    return replace(throughput(deployment, plan, traffic, convention), note=note)


class _Search:
    """One table of lengths, and the best that was found for each division."""

    def __init__(
        self,
        deployment: Deployment,
        traffic: Traffic,
        convention: Convention,
        thresholds: Iterable[float],
        orders: Sequence[Order],
    ) -> None:
        self.deployment = deployment
        self.capacity = Capacity.of(deployment, traffic)
        self.table = LengthTable.of(traffic.lengths, deployment, thresholds, convention)
        self.orders = orders
        self.found: dict[Division, _Found | None] = {}

    def best(self, is_free: Sequence[bool]) -> _Found:
        if divisions_count(self.deployment, is_free) <= _DIVISIONS_MAX:
            best = self._best_of(self._promising(list(all_divisions(self.deployment, is_free))))
        else:
            best = self._climb(is_free)
        if best is None:
            raise PlanError(
                "no division of the instances serves every length; somebody must prefill and somebody decode"
            )
        return best

    def at(self, division: Division) -> _Found | None:
        """The best plan with this division; None where it serves nothing."""
        if division not in self.found:
            self.found[division] = self._solve(division)
        return self.found[division]

    def _promising(self, divisions: list[Division]) -> Iterator[Division]:
        """Those with the most decode first; once that alone is below the best rate, no other can be better."""
        best = 0.0
        for division in sorted(divisions, key=self._decode_requests_per_s, reverse=True):
            if self._decode_requests_per_s(division) < best * (1 - 1e-6):
                return
            yield division
            found = self.found.get(division)
            if found is not None:
                best = max(best, found.score.requests_per_s)

    def _best_of(self, divisions: Iterable[Division]) -> _Found | None:
        best: _Found | None = None
        for division in divisions:
            found = self.at(division)
            if found is not None and (best is None or found.score.is_better_than(best.score)):
                best = found
        return best

    def _climb(self, is_free: Sequence[bool]) -> _Found | None:
        clusters = self.deployment.clusters
        best: _Found | None = None
        for share in (0.25, 0.5, 0.75):
            begin = tuple(
                round(cluster.instances * share) if may_change else cluster.prefill_instances
                for cluster, may_change in zip(clusters, is_free, strict=True)
            )
            # One that only prefills for others may have to go on doing so, and one that only decodes too.
            begins = [begin, tuple(cluster.prefill_instances for cluster in clusters)]
            here = self._best_of(each for each in begins if is_possible(self.deployment, each))
            step = max(max(cluster.instances for cluster in clusters) // 4, 1)
            while here is not None:
                there = self._best_of(self._neighbours(here.division, is_free, step))
                if there is not None and there.score.is_better_than(here.score):
                    here = there
                elif step > 1:
                    step //= 2
                else:
                    break
            if here is not None and (best is None or here.score.is_better_than(best.score)):
                best = here
        return best

    def _neighbours(self, division: Division, is_free: Sequence[bool], step: int) -> Iterator[Division]:
        """One or two clusters changed by a step."""
        moves = [
            (number, change) for number, may_change in enumerate(is_free) if may_change for change in (-step, step)
        ]
        pairs = [((at, by), (other, also)) for (at, by), (other, also) in product(moves, moves) if at <= other]
        for (at, by), (other, also) in pairs:
            changed = list(division)
            changed[at] += by
            if other != at:
                changed[other] += also
            possible = all(0 <= each <= cluster.instances
                           for each, cluster in zip(changed, self.deployment.clusters, strict=True))  # fmt: skip
            if possible and is_possible(self.deployment, tuple(changed)):
                yield tuple(changed)

    def _decode_requests_per_s(self, division: Division) -> float:
        return sum(self._divided(division).decode_requests_per_s)

    def _divided(self, division: Division) -> Capacity:
        decoding = (
            cluster.instances - prefill for cluster, prefill in zip(self.deployment.clusters, division, strict=True)
        )
        return self.capacity.divided(division, tuple(decoding))

    def _solve(self, division: Division) -> _Found | None:
        capacity = self._divided(division)
        limits: dict[tuple[int, ...], NDArray[np.float64]] = {}
        best: _Found | None = None
        for order in self.orders:
            for group in order:
                if group not in limits:
                    limits[group] = _range_limits(capacity, self.table, group)
            ends, rate = _best_ends([limits[group] for group in order])
            if rate <= 0 or (best is not None and not best.score.may_lose_to(rate)):
                continue
            score = self._score(capacity, order, ends)
            if score.requests_per_s < min(rate, sum(capacity.decode_requests_per_s)) * (1 - 1e-6):
                ends, score = self._moved(capacity, order, ends, score)
            if score.requests_per_s > 0 and (best is None or score.is_better_than(best.score)):
                best = _Found(score, division, order, tuple(float(self.table.thresholds[end]) for end in ends))
        return best

    def _score(self, capacity: Capacity, order: Order, ends: Sequence[int]) -> PlanScore:
        loads = [self.table.load(group, ends[at], ends[at + 1]) for at, group in enumerate(order)]
        return PlanScore.of(capacity, loads, best_flows(capacity, loads)[0])

    def _moved(
        self, capacity: Capacity, order: Order, ends: tuple[int, ...], score: PlanScore
    ) -> tuple[tuple[int, ...], PlanScore]:
        """Thresholds moved by ever smaller steps for as long as that is better: for what ranges have in common."""
        step = max((len(self.table.thresholds) - 1) // 4, 1)
        while step:
            tried = [
                (moved, self._score(capacity, order, moved))
                for at in range(1, len(ends) - 1)
                for by in (-step, step)
                for moved in [(*ends[:at], ends[at] + by, *ends[at + 1 :])]
                if all(first <= second for first, second in pairwise(moved))
            ]
            better = [each for each in tried if each[1].is_better_than(score)]
            if better:
                ends, score = max(better, key=lambda each: (each[1].requests_per_s, each[1].prefill_requests_per_s))
            else:
                step //= 2
        return ends, score


def _range_limits(capacity: Capacity, table: LengthTable, group: Sequence[int]) -> NDArray[np.float64]:
    """`[edges, edges]`: the rate of all requests at which the group is full with the lengths between two edges.

    What it has in common with other groups is left out. Infinite where there is no request, 0 where nobody serves.
    """
    served = np.zeros_like(table.share)
    is_there = table.share > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        for number in group:
            targets = capacity.targets(number)
            if capacity.prefill_instances[number] == 0 or not targets:
                continue
            rate = capacity.prefill_instances[number] / table.prefill_s[number]
            if number not in targets:
                links = sum(capacity.links[number, target] for target in targets)
                sent = min(links, capacity.egress[number]) / table.request_bytes[number]
                rate = np.minimum(rate, sent)
            for (source, target), request_bytes in capacity.moves.items():
                if target == number and request_bytes > 0:
                    rate = np.minimum(rate, capacity.links[source, target] / request_bytes)
            served += np.where(is_there, rate, 0.0)
        return np.where(is_there, served / table.share, inf)


def _best_ends(limits: Sequence[NDArray[np.float64]]) -> tuple[tuple[int, ...], float]:
    """Where the ranges of an order end, so that the least of their limits is largest, and that limit.

    Args:
        limits: of each group in turn, `[edges, edges]`.
    """
    last = len(limits[0]) - 1
    later = np.tri(last + 1, k=-1, dtype=bool)
    best = limits[0][0]
    choices = []
    for limit in limits[1:]:
        # The range before may end at any edge that is not beyond this one's.
        through = np.where(later, -1.0, np.minimum(best[:, None], limit))
        choices.append(through.argmax(axis=0))
        best = through.max(axis=0)
    ends = [last]
    for choice in reversed(choices):
        ends.append(int(choice[ends[-1]]))
    return (0, *reversed(ends)), float(best[last])


def _orders(deployment: Deployment, traffic: Traffic, members: Sequence[int]) -> list[Order]:
    if len(members) <= _ORDERS_OF_MEMBERS_MAX:
        return list(all_orders(members))
    short, long = traffic.lengths.quantile(0.05), traffic.lengths.quantile(0.95)
    clusters = deployment.clusters

    def kind(number: int) -> tuple[float, bool]:
        prefill = deployment.prefill_service.curve(clusters[number].profile)
        return -prefill(long) / prefill(short), not clusters[number].decodes

    kinds = sorted({kind(number) for number in members})
    groups = [tuple(number for number in members if kind(number) == each) for each in kinds]
    orders = [tuple(groups), (tuple(members),)]
    # Neighbours together: where one kind is too small for a range of its own.
    orders += [
        (*groups[:at], tuple(sorted(groups[at] + groups[at + 1])), *groups[at + 2 :]) for at in range(len(groups) - 1)
    ]
    return list(dict.fromkeys(orders))


def _untried(divisions: int, members: int, orders: int) -> str:
    """What a search left out; empty where it looked at everything."""
    left_out = []
    if divisions > _DIVISIONS_MAX:
        left_out.append(f"{divisions:,} divisions of the instances were climbed, not all tried")
    if members > _ORDERS_OF_MEMBERS_MAX:
        left_out.append(
            f"of {orders_count(members):,} orders of the {members} clusters that prefill {orders} were tried"
        )
    return f"a better plan may exist: {'; '.join(left_out)}" if left_out else ""


def _closer(traffic: Traffic, thresholds: Sequence[float], ends: Sequence[float]) -> tuple[float, ...]:
    """Every eighth of the thresholds, and many between the neighbours of those that were chosen."""
    lengths = traffic.lengths
    edges = [lengths.tokens_min, *thresholds, lengths.tokens_max]
    closer = set(thresholds[::8])
    for end in ends[1:-1]:
        if end in thresholds:
            at = edges.index(end, 1)
            closer.update(float(each) for each in np.linspace(edges[at - 1], edges[at + 1], 2 * _FINER + 1)[1:-1])
            closer.add(end)
    return tuple(sorted(each for each in closer if lengths.tokens_min <= each < lengths.tokens_max))
