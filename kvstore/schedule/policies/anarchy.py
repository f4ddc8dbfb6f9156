"""How much better a window of requests could have been placed: the estimator PoA-hat of arXiv 2606.17081.

Costs are frozen: those that the router saw when it decided. Each cluster takes at most so many of the window, and the
cheapest assignment under that limit (Hungarian method) is compared with what was chosen. As in the paper it tells
regimes apart; it is not a factor by which anything would be faster, since costs would not have stayed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import TYPE_CHECKING

from kvstore.errors import PlanError
from kvstore.limits import ANARCHY_WINDOW_MAX

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Anarchy:
    """What one window says.

    Attributes:
        ratio: chosen ÷ best; below 1 where the choice went beyond the places that the best one respects.
        chosen_cost, best_cost: sums over the window.
        best: the column that each row has in the best assignment.
    """

    ratio: float
    chosen_cost: float
    best_cost: float
    best: tuple[int, ...]


def anarchy(costs: Sequence[Sequence[float]], chosen: Sequence[int], places: Sequence[int]) -> Anarchy:
    """Compares a window's choices with the best assignment.

    Args:
        costs: a row per request, a column per cluster, positive; infinite where a request cannot go.
        chosen: the column that each request went to.
        places: how many requests of the window each column takes.

    Raises:
        PlanError: shapes differ, a cost is not positive, the window is too long, or the places do not suffice.
    """
    if not 1 <= len(costs) <= ANARCHY_WINDOW_MAX or len(chosen) != len(costs):
        raise PlanError(
            f"a window has 1 to {ANARCHY_WINDOW_MAX} requests and a choice for each, not {len(costs)} and {len(chosen)}"
        )
    if any(len(row) != len(places) for row in costs) or not all(0 <= each < len(places) for each in chosen):
        raise PlanError(f"each request has a cost for each of the {len(places)} columns, and chose one of them")
    if not all(each > 0 for row in costs for each in row) or not all(
        isfinite(row[each]) for row, each in zip(costs, chosen, strict=True)
    ):
        raise PlanError("costs must be positive, and finite where a request went")
    slots = [column for column, count in enumerate(places) for _ in range(min(count, len(costs)))]
    if len(slots) < len(costs):
        raise PlanError(f"{len(slots)} places are too few for a window of {len(costs)} requests")
    best = _assign([[row[column] for column in slots] for row in costs])
    columns = tuple(slots[slot] for slot in best)
    chosen_cost = sum(row[each] for row, each in zip(costs, chosen, strict=True))
    best_cost = sum(row[each] for row, each in zip(costs, columns, strict=True))
    if not isfinite(best_cost):
        raise PlanError("no assignment takes every request where it may go; give more places to those columns")
    return Anarchy(chosen_cost / best_cost, chosen_cost, best_cost, columns)


def _assign(costs: list[list[float]]) -> list[int]:
    """The column of each row in the cheapest assignment: Hungarian method by shortest augmenting paths, O(n² m)."""
    rows, columns = len(costs), len(costs[0])
    ceiling = sum(max((each for each in row if isfinite(each)), default=0.0) for row in costs) * 2 + 1
    row_price, column_price = [0.0] * rows, [0.0] * (columns + 1)
    owner = [-1] * (columns + 1)
    for row in range(rows):
        # Column `columns` stands for the row that looks for a place.
        owner[columns] = row
        distance, previous, is_done = [inf] * columns, [columns] * columns, [False] * (columns + 1)
        column = columns
        while owner[column] != -1:
            is_done[column] = True
            at, step, following = owner[column], inf, -1
            for other in range(columns):
                if is_done[other]:
                    continue
                # A place that may not be had costs more than any assignment without it.
                reduced = min(costs[at][other], ceiling) - row_price[at] - column_price[other]
                if reduced < distance[other]:
                    distance[other], previous[other] = reduced, column
                if distance[other] < step:
                    step, following = distance[other], other
            for other in range(columns + 1):
                if is_done[other]:
                    row_price[owner[other]] += step
                    column_price[other] -= step
                elif other < columns:
                    distance[other] -= step
            column = following
        while column != columns:
            owner[column] = owner[previous[column]]
            column = previous[column]
    answer = [-1] * rows
    for column in range(columns):
        if owner[column] != -1:
            answer[owner[column]] = column
    return answer
