"""Linear programs: against every vertex, and against what makes the simplex method stumble."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.planning.linear import maximize


def best_vertex(gain: np.ndarray, matrix: np.ndarray, limit: np.ndarray) -> float:
    """The gain of the best corner, from all of them."""
    rows, columns = matrix.shape
    planes = np.vstack([matrix, -np.eye(columns)])
    bounds = np.concatenate([limit, np.zeros(columns)])
    best = -np.inf
    for chosen in combinations(range(rows + columns), columns):
        system = planes[list(chosen)]
        if abs(np.linalg.det(system)) < 1e-9:
            continue
        corner = np.linalg.solve(system, bounds[list(chosen)])
        if (planes @ corner <= bounds + 1e-7).all():
            best = max(best, float(gain @ corner))
    return best


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 4), rows=st.integers(1, 4), zeros=st.booleans())
def test_no_corner_is_better(seed: int, columns: int, rows: int, zeros: bool) -> None:
    random = np.random.default_rng(seed)
    matrix = np.vstack([random.uniform(-1, 1, (rows, columns)).round(2), np.ones((1, columns))])
    limit = np.append(random.uniform(0, 1, rows).round(2) * (0.0 if zeros else 1.0), 3.0)
    gain = random.uniform(-1, 1, columns).round(2)
    solution = maximize(gain, matrix, limit)
    assert (solution >= 0).all()
    assert (matrix @ solution <= limit + 1e-9).all()
    assert gain @ solution == pytest.approx(best_vertex(gain, matrix, limit), abs=1e-7)


def test_a_program_that_goes_round_in_circles_ends() -> None:
    """Beale's example: with the steepest column alone the tableau comes back to itself after six pivots."""
    gain = np.array([0.75, -150.0, 0.02, -6.0])
    matrix = np.array([[0.25, -60.0, -0.04, 9.0], [0.5, -90.0, -0.02, 3.0], [0.0, 0.0, 1.0, 0.0]])
    solution = maximize(gain, matrix, np.array([0.0, 0.0, 1.0]))
    assert gain @ solution == pytest.approx(0.05)


def test_what_has_no_answer_is_an_error() -> None:
    with pytest.raises(PlanError, match="nothing bounds"):
        maximize(np.array([1.0]), np.array([[-1.0]]), np.array([0.0]))
    with pytest.raises(PlanError, match="negative limit"):
        maximize(np.array([1.0]), np.array([[1.0]]), np.array([-1.0]))
    with pytest.raises(PlanError, match="16777216 cells"):
        maximize(np.zeros(5000), np.zeros((5000, 5000)), np.zeros(5000))
