"""Disjoint ranges of tokens that have been claimed or filled."""

from __future__ import annotations

from bisect import bisect_left


class IntervalSet:
    """Half-open integer ranges; adjacent ones merge. Not thread-safe."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __repr__(self) -> str:
        return f"IntervalSet({self.ranges})"

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))

    def overlap(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first stored range that shares a number with `[start, stop)`, or None."""
        position = bisect_left(self._stops, start + 1)
        if position < len(self._starts) and self._starts[position] < stop:
            return self._starts[position], self._stops[position]
        return None

    def add(self, start: int, stop: int) -> tuple[int, int]:
        """Add a range that overlaps nothing; the merged range that it now lies in."""
        position = bisect_left(self._starts, start)
        joins_left = position > 0 and self._stops[position - 1] == start
        joins_right = position < len(self._starts) and self._starts[position] == stop
        if joins_left:
            start = self._starts[position - 1]
        if joins_right:
            stop = self._stops[position]
        first = position - joins_left
        last = position + joins_right
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]
        return start, stop
