"""The best assignment of a window is the best, and the ratio says how far a choice was from it."""

from __future__ import annotations

from itertools import product
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.policies.anarchy import anarchy


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    costs = draw(
        st.lists(st.lists(st.floats(0.01, 100), min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
    places = draw(st.lists(st.integers(0, rows), min_size=columns, max_size=columns))
    if sum(places) < rows:
        places[0] += rows - sum(places)
    return costs, places


@given(windows())
def test_the_best_assignment_is_that_of_exhaustive_search(window: tuple[list[list[float]], list[int]]) -> None:
    costs, places = window
    rows, columns = len(costs), len(places)
    allowed = [
        each
        for each in product(range(columns), repeat=rows)
        if all(each.count(column) <= places[column] for column in range(columns))
    ]
    best_cost = min(sum(row[column] for row, column in zip(costs, each, strict=True)) for each in allowed)
    for chosen in (allowed[0], allowed[-1]):
        found = anarchy(costs, chosen, places)
        assert found.best_cost == pytest.approx(best_cost)
        assert found.best in allowed
        assert found.ratio >= 1 - 1e-9, "no choice within the places is better than the best"


def test_herding_to_a_warm_cluster_shows() -> None:
    costs = [[1.0, 1.1]] * 8
    assert anarchy(costs, [0, 1] * 4, [4, 4]).ratio == pytest.approx(1)
    herded = [[1.0 + each, 1.1] for each in range(8)]
    assert anarchy(herded, [0] * 8, [4, 4]).ratio > 2


def test_a_request_never_goes_where_it_cannot() -> None:
    found = anarchy([[inf, 5.0], [1.0, 1.0]], [1, 0], [1, 1])
    assert (found.best, found.ratio) == ((1, 0), 1.0)
    with pytest.raises(PlanError, match="no assignment"):
        anarchy([[inf, 5.0], [inf, 1.0]], [1, 1], [1, 1])


@pytest.mark.parametrize(
    ("costs", "chosen", "places", "message"),
    [
        ([], [], [1], "a window has"),
        ([[1.0]] * 65, [0] * 65, [65], "a window has"),
        ([[1.0, 2.0]], [0], [1], "a cost for each"),
        ([[1.0]], [1], [1], "a cost for each"),
        ([[0.0]], [0], [1], "positive"),
        ([[float("nan")]], [0], [1], "positive"),
        ([[1.0], [1.0]], [0, 0], [1], "too few"),
    ],
)
def test_bad_windows_are_refused(costs: list[list[float]], chosen: list[int], places: list[int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        anarchy(costs, chosen, places)
