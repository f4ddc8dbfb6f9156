"""What went through a foreign namespace."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class ForeignStatistics:
    """Counters since the store was made.

    Attributes:
        stored, stored_bytes: objects that were put, and had not been there.
        present: objects that were put, and were there already.
        refused: objects that were not stored, by reason: `full`, `late`, `busy`, `gone`.
        loaded, loaded_bytes: objects that were copied to a caller.
        missed: objects that were asked for and not copied, by reason: `absent`, `damaged`, `full`, `late`, `busy`,
            `gone`.
        looked_up, found: objects that were asked after, and those of them that were there.
        removed: objects that were removed on request.
    """

    stored: int = 0
    stored_bytes: int = 0
    present: int = 0
    loaded: int = 0
    loaded_bytes: int = 0
    looked_up: int = 0
    found: int = 0
    removed: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    missed: Mapping[str, int] = field(default_factory=dict)


class ForeignCounts:
    """Counts them. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._missed: Counter[str] = Counter()

    def count(self, **counts: int) -> None:
        """Add to counters by name."""
        with self._lock:
            self._counts.update(counts)

    def refused(self, reason: str, count: int = 1) -> None:
        """Objects were not stored."""
        with self._lock:
            self._refused[reason] += count

    def missed(self, reason: str, count: int = 1) -> None:
        """Objects were not copied."""
        with self._lock:
            self._missed[reason] += count

    def snapshot(self) -> ForeignStatistics:
        """A copy."""
        with self._lock:
            return ForeignStatistics(**self._counts, refused=dict(self._refused), missed=dict(self._missed))
