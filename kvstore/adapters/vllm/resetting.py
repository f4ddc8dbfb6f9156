"""Forgetting everything that is kept while steps are under way that will save: weights have changed, say."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.adapters.vllm.opening import SchedulerStore

logger = logging.getLogger(__name__)

LATE_STEPS = 4
"""Steps that vLLM may have under way when something happens between two, and what they commit is yet to be reported."""


class Resetting:
    """Clears the store, and once more when the steps have ended that were scheduled before. One thread calls.

    With asynchronous scheduling a step's saves may come after the reset, and hold what was computed before it.

    Args:
        store: the scheduler's.
    """

    def __init__(self, store: SchedulerStore) -> None:
        self._store = store
        self._saving: set[int] = set()
        self._outdated: set[int] = set()
        self._until = 0

    @property
    def is_waiting(self) -> bool:
        """Whether the store may hold what was computed before a reset: nothing in it is to be used."""
        return self._until > 0

    def reset(self, step: int) -> bool:
        """Clear the store between two steps; False if that is not possible here, or now.

        Args:
            step: number of the last one that was scheduled.
        """
        is_done = self._store.clear()
        self._outdated = set(self._saving)
        self._until = step + LATE_STEPS if self._outdated and is_done else 0
        return is_done

    def ordered(self, step: int, *, saves: bool) -> None:
        """A step was scheduled."""
        if saves:
            self._saving.add(step)
        self._saving = {each for each in self._saving if each + LATE_STEPS >= step}
        if self._until and step > self._until:
            self._clear_again()

    def saved(self, steps: Iterable[int]) -> None:
        """The saves of these steps have ended."""
        ended = set(steps)
        self._saving -= ended
        self._outdated -= ended
        if self._until and not self._outdated:
            self._clear_again()

    def _clear_again(self) -> None:
        if self._store.clear():
            self._until = 0
        else:
            logger.warning("what was computed before the reset is in use still; nothing is loaded until it is gone")
