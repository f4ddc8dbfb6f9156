"""Things that end by themselves at some moment, unless they are ended before. Whoever has them holds a lock."""

from __future__ import annotations

import heapq
import math
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")

STALE_MAX = 64
"""Entries of things that were ended before, beside as many as there are things."""


class Endings(Generic[T]):
    """Things with the moments at which they end, the next one first. Bounded by the things that are there."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._entries: dict[T, int] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, thing: T, ends_s: float) -> None:
        """A thing that is not there yet."""
        number = self._entries[thing] = next(self._numbers)
        heapq.heappush(self._heap, (ends_s, number, thing))

    def remove(self, thing: T) -> None:
        """It was ended; without effect if it is not there."""
        self._entries.pop(thing, None)
        if len(self._heap) > 2 * len(self._entries) + STALE_MAX:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapq.heapify(self._heap)

    def take_due(self, now_s: float) -> list[T]:
        """What has ended by now, the first first; it is not there any more."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry):
                del self._entries[entry[2]]
                due.append(entry[2])
        return due

    @property
    def next_s(self) -> float:
        """When something may end; infinite while nothing does."""
        return self._heap[0][0] if self._heap else math.inf

    def _is_current(self, entry: tuple[float, int, T]) -> bool:
        return self._entries.get(entry[2]) == entry[1]
