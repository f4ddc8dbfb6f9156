"""Whether bandwidth is scarce, link by link, from utilisation and queue, with hysteresis."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite
from typing import TYPE_CHECKING

from kvstore.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.policies.search import LinkName
    from kvstore.schedule.policies.snapshot import LinkState, Snapshot


@dataclass(frozen=True, slots=True)
class Band:
    """When a link's bandwidth becomes scarce, and when it is abundant again. Between the two nothing changes.

    Attributes:
        scarce_share, abundant_share: of what the link could carry.
        scarce_queued_s, abundant_queued_s: seconds that what is queued needs.
        dwell_s: how long a link stays scarce at least; it becomes so at once.

    Raises:
        PlanError: a number is out of its limits, or the lower end of a band lies above its upper one.
    """

    scarce_share: float = 0.8
    abundant_share: float = 0.6
    scarce_queued_s: float = 0.5
    abundant_queued_s: float = 0.1
    dwell_s: float = 10.0

    def __post_init__(self) -> None:
        for low, high in (("abundant_share", "scarce_share"), ("abundant_queued_s", "scarce_queued_s")):
            if not (isfinite(getattr(self, high)) and 0 <= getattr(self, low) < getattr(self, high)):
                raise PlanError(
                    f"{low}={getattr(self, low)} must not be negative and lie below {high}={getattr(self, high)}, "
                    "or the mode would change with every look"
                )
        if self.scarce_share > 1:
            raise PlanError(f"scarce_share={self.scarce_share} is never reached; a link is used to 1 at most")
        if not (isfinite(self.dwell_s) and self.dwell_s >= 0):
            raise PlanError(f"dwell_s={self.dwell_s} must be finite and not negative")


@dataclass(frozen=True, slots=True)
class LinkModes:
    """Which links are scarce; all others are abundant.

    Attributes:
        since_s: by scarce link, when it became so.
    """

    since_s: Mapping[LinkName, float] = field(default_factory=dict)

    @property
    def scarce(self) -> frozenset[LinkName]:
        return frozenset(self.since_s)


def observed(modes: LinkModes, snapshot: Snapshot, band: Band) -> LinkModes:
    """The modes after a look at the links. A link that is down is scarce; one that is gone is forgotten."""
    since_s = {}
    for name, link in snapshot.links.items():
        before_s = modes.since_s.get(name)
        queued_s = _queued_s(link)
        if link.used_share >= band.scarce_share or queued_s >= band.scarce_queued_s:
            since_s[name] = snapshot.now_s if before_s is None else before_s
        elif before_s is not None:
            is_calm = link.used_share <= band.abundant_share and queued_s <= band.abundant_queued_s
            if not is_calm or snapshot.now_s - before_s < band.dwell_s:
                since_s[name] = before_s
    return LinkModes(since_s)


def _queued_s(link: LinkState) -> float:
    return link.queued_bytes / link.bytes_per_s if link.bytes_per_s > 0 else inf
