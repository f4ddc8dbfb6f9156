"""How flows share what limits them: max-min fairness."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Demand:
    """The flows of one link.

    Attributes:
        free: flows that take what they get.
        capped: what each of the others can use at most, ascending, bytes/s.
        limits: which of the shared limits they pass.
    """

    free: int
    capped: Sequence[float]
    limits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What the flows of one link get, bytes/s.

    Attributes:
        free: each of the free ones.
        capped: the others, in the order of the demand.
    """

    free: float
    capped: tuple[float, ...]


def fair_shares(demands: Sequence[Demand], limits: Sequence[float]) -> list[Share]:
    """Max-min fair rates by progressive filling.

    All rates rise together. A flow stops at its cap; all flows that pass a limit stop when it is used up. So nobody
    can get more without somebody who has less, or as much, getting less.

    Args:
        demands: by link; each passes at least one limit.
        limits: bytes/s of each.
    """
    left = list(limits)
    rising = [0] * len(limits)
    free_rates: list[float | None] = [None if demand.free else 0.0 for demand in demands]
    capped_rates: list[list[float]] = [[] for _ in demands]
    stopped = [False] * len(demands)
    for demand in demands:
        for limit in demand.limits:
            rising[limit] += demand.free + len(demand.capped)
    while True:
        level, tightest = inf, -1
        for limit, flows in enumerate(rising):
            if flows and left[limit] / flows < level:
                level, tightest = left[limit] / flows, limit
        if tightest < 0:
            break
        lowest_cap, lowest = inf, -1
        for number, demand in enumerate(demands):
            if not stopped[number] and len(capped_rates[number]) < len(demand.capped):
                cap = demand.capped[len(capped_rates[number])]
                if cap < lowest_cap:
                    lowest_cap, lowest = cap, number
        if lowest_cap <= level:
            capped_rates[lowest].append(lowest_cap)
            for limit in demands[lowest].limits:
                left[limit] = max(left[limit] - lowest_cap, 0.0)
                rising[limit] -= 1
            continue
        for number, demand in enumerate(demands):
            if stopped[number] or tightest not in demand.limits:
                continue
            stopped[number] = True
            capped_left = len(demand.capped) - len(capped_rates[number])
            capped_rates[number] += [level] * capped_left
            if free_rates[number] is None:
                free_rates[number] = level
            for limit in demand.limits:
                left[limit] = max(left[limit] - level * (demand.free + capped_left), 0.0)
                rising[limit] -= demand.free + capped_left
    return [Share(free or 0.0, tuple(capped)) for free, capped in zip(free_rates, capped_rates, strict=True)]
