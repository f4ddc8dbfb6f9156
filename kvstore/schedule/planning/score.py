"""Which of two plans is better."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.schedule.planning.capacity import best_flows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.schedule.planning.capacity import BandLoad, Capacity

_EQUAL = 1e-9
_UNLIMITED = 1e6
"""Times as fast as it is, decode is no limit."""


@dataclass(frozen=True)
class PlanScore:
    """A plan is better that serves more; among equals, the one whose prefill would serve more if decode did not end it.

    Attributes:
        requests_per_s: Λ_max.
        prefill_requests_per_s: the same with unlimited decode: how far from waiting prompts are.
    """

    requests_per_s: float
    prefill_requests_per_s: float

    @classmethod
    def of(cls, capacity: Capacity, loads: Sequence[BandLoad], requests_per_s: float) -> PlanScore:
        fast = tuple(each * _UNLIMITED for each in capacity.decode_instance_requests_per_s)
        prefill_requests_per_s, _ = best_flows(replace(capacity, decode_instance_requests_per_s=fast), loads)
        return cls(requests_per_s, prefill_requests_per_s)

    def may_lose_to(self, requests_per_s: float) -> bool:
        """Whether a plan of this rate might be better, whatever else it has."""
        return requests_per_s >= self.requests_per_s * (1 - _EQUAL)

    def is_better_than(self, other: PlanScore) -> bool:
        if not other.may_lose_to(self.requests_per_s):
            return False
        if self.requests_per_s > other.requests_per_s * (1 + _EQUAL):
            return True
        return self.prefill_requests_per_s > other.prefill_requests_per_s * (1 + _EQUAL)
