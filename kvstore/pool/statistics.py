"""Counters and budget of a pool."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class PoolStatistics:
    """What a pool has done, and what its bytes are used for.

    `committed`, `reserved` and `quarantined` bytes are slots, headers included; together with `index_bytes`,
    the parts of the index that are in use, they are all that the budget counts.

    `quota_refusals` counts writes that were refused with `QuotaError`, `quota_evicted_records` what went because a
    salt was over its quota, `expired_records` those whose time to live was over; `evicted_records` counts both, too.
    `expired_leases` and `expired_writers` were held for longer than the store bears. `pin_refusals` counts
    `PinLimitError`.
    """

    matches: int = 0
    hits: int = 0
    commits: int = 0
    aborts: int = 0
    stored_records: int = 0
    stored_bytes: int = 0
    evicted_records: int = 0
    evicted_bytes: int = 0
    damaged_records: int = 0
    quota_refusals: int = 0
    quota_evicted_records: int = 0
    expired_records: int = 0
    expired_leases: int = 0
    expired_writers: int = 0
    pin_refusals: int = 0
    pins: int = 0
    pinned_bytes: int = 0
    capacity_bytes: int = 0
    committed_bytes: int = 0
    reserved_bytes: int = 0
    quarantined_bytes: int = 0
    index_bytes: int = 0
    nodes: int = 0
    ghosts: int = 0
    bytes_by_salt: Mapping[bytes, int] = field(default_factory=dict)

    def snapshot(self, **budget: Any) -> PoolStatistics:
        """A copy with the budget filled in."""
        return replace(self, **budget)
