"""Chunk grids: boundaries, what closes a block, digests."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError
from kvstore.limits import PROMPT_TOKENS_MAX
from kvstore.spec.grid import UNKNOWN_GRID, ChunkGrid
from tests.vectors import make_keys as reference

VECTORS = json.loads(reference.VECTORS.read_text(encoding="utf-8"))
grids = st.lists(st.integers(1, 400), unique=True, max_size=12).map(lambda values: ChunkGrid(tuple(sorted(values))))


@pytest.mark.parametrize("case", VECTORS["grids"], ids=lambda case: str(case["boundaries"]))
def test_pinned_digests(case: dict) -> None:
    grid = ChunkGrid(tuple(case["boundaries"]))
    assert [grid.digest_at(boundary).hex() for boundary in (0, *grid.boundaries)] == case["digests"]


@given(grids)
def test_digests_equal_the_second_implementation(grid: ChunkGrid) -> None:
    assert [grid.digest_at(b) for b in (0, *grid.boundaries)] == reference.grid_digests(grid.boundaries)


@given(grids, grids)
def test_digests_agree_exactly_where_the_grids_do(first: ChunkGrid, second: ChunkGrid) -> None:
    for boundary in set(first.boundaries) & set(second.boundaries):
        same = first.up_to(boundary) == second.up_to(boundary)
        assert (first.digest_at(boundary) == second.digest_at(boundary)) == same
    assert UNKNOWN_GRID not in [first.digest_at(b) for b in (0, *first.boundaries)]


def test_every() -> None:
    assert ChunkGrid.every(512, upto=1100).boundaries == (512, 1024, 1100)
    assert ChunkGrid.every(512, upto=1024).boundaries == (512, 1024)
    assert ChunkGrid.every(512, upto=100).boundaries == (100,)
    assert ChunkGrid.every(1, upto=3).boundaries == (1, 2, 3)
    assert ChunkGrid.every(512, upto=0).boundaries == ()


@given(st.integers(1, 50), st.integers(0, 300), st.integers(1, 50), st.integers(0, 300))
def test_extending_counts_from_the_last_boundary(chunk: int, first: int, then: int, more: int) -> None:
    grid = ChunkGrid.every(chunk, upto=first).extended_to(first + more, then)
    assert grid.up_to(first) == ChunkGrid.every(chunk, upto=first)
    sizes = [end - start for start, end in grid.chunks(first)]
    assert sum(sizes) == more
    assert all(size == then for size in sizes[:-1])
    assert grid.end == first + more


def test_a_resumed_run_stays_on_the_grid_when_it_resumes_on_a_boundary() -> None:
    whole = ChunkGrid.every(256, upto=1000)
    resumed = ChunkGrid.every(256, upto=512).extended_to(1000, 256)
    assert resumed == whole
    assert ChunkGrid.every(256, upto=500).extended_to(1000, 256) != whole


@given(grids, st.integers(-2, 410))
def test_closing_and_has(grid: ChunkGrid, end: int) -> None:
    all_boundaries = [0, *grid.boundaries]
    assert grid.closing(end) == next((b for b in all_boundaries if b >= end), None)
    assert grid.has(end) == (end in all_boundaries)


def test_chunks() -> None:
    grid = ChunkGrid((3, 5, 9))
    assert list(grid.chunks()) == [(0, 3), (3, 5), (5, 9)]
    assert list(grid.chunks(5)) == [(5, 9)]
    assert list(grid.chunks(9)) == []
    assert list(ChunkGrid(()).chunks()) == []


@pytest.mark.parametrize(
    "boundaries", [(0,), (-1,), (3, 3), (5, 3), (1.0,), (True,), ("4",), (1, PROMPT_TOKENS_MAX + 1)]
)
def test_bad_boundaries(boundaries: tuple) -> None:
    with pytest.raises(SpecError, match="boundary"):
        ChunkGrid(boundaries)


def test_misuse() -> None:
    grid = ChunkGrid((4, 8))
    for call in (grid.digest_at, grid.up_to, grid.chunks):
        for length in (3, 9, -4):
            with pytest.raises(SpecError, match="no chunk ends at length"):
                call(length)
    with pytest.raises(SpecError, match="at least 1"):
        ChunkGrid.every(0, upto=4)
    for end in (7, PROMPT_TOKENS_MAX + 1):
        with pytest.raises(SpecError, match=str(end)):
            grid.extended_to(end, 4)
    with pytest.raises(SpecError):
        ChunkGrid.every(4, upto=-1)
    with pytest.raises(FrozenInstanceError):
        grid.boundaries = ()  # type: ignore[misc]
