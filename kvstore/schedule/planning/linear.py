"""Linear programs of the planner: small, dense, with a solution to begin from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.limits import LINEAR_CELLS_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ZERO = 1e-11
_DEGENERATE_PIVOTS_MAX = 64
"""Pivots without progress after which the rule is taken that cannot go round in circles."""
_PIVOTS_MAX = 100_000


def maximize(gain: NDArray[np.float64], matrix: NDArray[np.float64], limit: NDArray[np.float64]) -> NDArray[np.float64]:
    """The x >= 0 with matrix @ x <= limit for which gain @ x is largest: the simplex method on a tableau.

    Limits are not negative, so x = 0 is where it begins. The steepest column enters; when that makes no progress for
    long, the first one that gains does (Bland), with which the method always ends.

    Args:
        gain: `[columns]`.
        matrix: `[rows, columns]`; entries near 1 in size keep rounding errors small.
        limit: `[rows]`.

    Raises:
        PlanError: a limit is negative, nothing bounds the gain, or the program is too large.
    """
    rows, columns = matrix.shape
    if rows * (rows + columns) > LINEAR_CELLS_MAX:
        raise PlanError(
            f"a linear program of {rows} rows and {columns} columns is over the limit of {LINEAR_CELLS_MAX} cells; "
            "plan with fewer clusters, or with fewer ranges of lengths"
        )
    if rows and limit.min() < 0:
        raise PlanError("a linear program has a negative limit; capacities are never negative")
    tableau = np.zeros((rows + 1, columns + rows + 1))
    tableau[:rows, :columns] = matrix
    tableau[:rows, columns:-1] = np.eye(rows)
    tableau[:rows, -1] = limit
    tableau[-1, :columns] = gain
    basis = np.arange(columns, columns + rows)
    standing = 0
    for _ in range(_PIVOTS_MAX):
        reduced = tableau[-1, :-1]
        is_steepest = standing < _DEGENERATE_PIVOTS_MAX
        entering = int(np.argmax(reduced if is_steepest else reduced > _ZERO))
        if reduced[entering] <= _ZERO:
            solution = np.zeros(columns + rows)
            solution[basis] = tableau[:rows, -1]
            return solution[:columns]
        column = tableau[:rows, entering]
        candidates = np.flatnonzero(column > _ZERO)
        if not len(candidates):
            raise PlanError(
                "nothing bounds the rate of this plan; every range of lengths needs a cluster that it loads"
            )
        ratios = tableau[candidates, -1] / column[candidates]
        least = ratios.min()
        tied = candidates[ratios <= least + _ZERO]
        leaving = int(tied[np.argmin(basis[tied])])
        standing = standing + 1 if least <= _ZERO else 0
        _pivot(tableau, leaving, entering)
        basis[leaving] = entering
    raise PlanError(f"a linear program was not solved within {_PIVOTS_MAX} pivots; plan with fewer clusters")


def _pivot(tableau: NDArray[np.float64], row: int, column: int) -> None:
    tableau[row] /= tableau[row, column]
    factors = tableau[:, column].copy()
    factors[row] = 0.0
    tableau -= np.outer(factors, tableau[row])
    # What rounding leaves below zero would make a later ratio negative.
    np.maximum(tableau[:-1, -1], 0.0, out=tableau[:-1, -1])
