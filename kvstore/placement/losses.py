"""What could not be kept, until somebody who waited for it has been told."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass
class _Flush:
    """One that runs.

    Attributes:
        told_before: what others had told.
        others: what was lost since, and committed after this one began.
        untold: what was lost since, and committed, or committed once more, after this one began.
    """

    told_before: Counter[str]
    others: Counter[str] = field(default_factory=Counter)
    untold: Counter[str] = field(default_factory=Counter)


class UntoldLosses:
    """What was not kept, by reason, and which of it `flush` has told. Not thread-safe.

    A loss is told by each flush that began after its commit, until one of them has ended: of two at once, both tell it.
    """

    def __init__(self) -> None:
        self.moment = 0
        """How many flushes have begun."""
        self._lost: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._flushes: dict[int, _Flush] = {}

    def lose(self, reason: str, first: int, last: int) -> None:
        """One more, first and last committed at these moments."""
        self._lost[reason] += 1
        for began, flush in self._flushes.items():
            flush.others[reason] += first >= began
            flush.untold[reason] += last >= began

    @contextmanager
    def flushing(self) -> Iterator[Callable[[], Counter[str]]]:
        """While a flush runs; gives what ends it: what it has to tell."""
        self.moment += 1
        began = self.moment
        flush = self._flushes[began] = _Flush(self._told.copy())

        def end() -> Counter[str]:
            self._told |= self._lost - flush.untold
            return self._lost - flush.told_before - flush.others

        try:
            yield end
        finally:
            del self._flushes[began]
