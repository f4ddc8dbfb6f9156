"""Deadlines: every wait has one."""

from __future__ import annotations

import time
from dataclasses import dataclass

from kvstore.errors import DeadlineError


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock by which something must have happened."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment `seconds` from now."""
        return cls(time.monotonic() + seconds)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - time.monotonic())

    @property
    def has_passed(self) -> bool:
        return time.monotonic() >= self.at_s

    def earlier(self, other: Deadline) -> Deadline:
        return self if self.at_s <= other.at_s else other

    def check(self, waiting_for: str) -> None:
        """Raise `DeadlineError` naming what was waited for, if the moment has passed."""
        if self.has_passed:
            raise DeadlineError(f"the deadline passed while waiting for {waiting_for}")
