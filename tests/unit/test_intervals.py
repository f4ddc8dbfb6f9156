"""Ranges of tokens that have been claimed or filled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.store.intervals import IntervalSet


def test_adjacent_ranges_merge() -> None:
    intervals = IntervalSet()
    assert intervals.add(4, 8) == (4, 8)
    assert intervals.add(10, 12) == (10, 12)
    assert intervals.add(8, 10) == (4, 12)
    assert intervals.add(0, 4) == (0, 12)
    assert intervals.ranges == [(0, 12)]


def test_overlap_names_the_range_that_is_there() -> None:
    intervals = IntervalSet()
    intervals.add(4, 8)
    intervals.add(10, 12)
    assert intervals.overlap(0, 4) is None
    assert intervals.overlap(8, 10) is None
    assert intervals.overlap(12, 99) is None
    assert intervals.overlap(7, 8) == (4, 8)
    assert intervals.overlap(0, 99) == (4, 8)
    assert intervals.overlap(8, 11) == (10, 12)
    assert intervals.overlap(5, 6) == (4, 8)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=40))
def test_against_a_set_of_numbers(ranges: list[tuple[int, int]]) -> None:
    intervals = IntervalSet()
    numbers: set[int] = set()
    for start, size in ranges:
        added = set(range(start, start + size))
        found = intervals.overlap(start, start + size)
        assert (found is not None) == bool(added & numbers)
        if found is not None:
            assert set(range(*found)) <= numbers
            assert set(range(*found)) & added
            continue
        numbers |= added
        left, right = intervals.add(start, start + size)
        assert set(range(left, right)) <= numbers
        assert left - 1 not in numbers
        assert right not in numbers
    assert {number for each in intervals.ranges for number in range(*each)} == numbers
    assert intervals.ranges == sorted(intervals.ranges)
    assert all(stop < start for (_, stop), (start, _) in zip(intervals.ranges, intervals.ranges[1:], strict=False))
