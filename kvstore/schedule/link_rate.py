"""What a link delivers when it loses packets."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.schedule.deployment import Link

SEGMENT_BYTES = 1460
"""TCP's largest segment on Ethernet without jumbo frames."""
LINK_CONNECTIONS = 16
"""TCP connections that two clusters hold open in one direction, over which all transfers go."""
_MATHIS = 1.22


def loss_limited_bytes_per_s(link: Link, connections: int = LINK_CONNECTIONS) -> float:
    """min(capacity, connections * MSS * 1.22 / (RTT * sqrt(loss))): Mathis and others, 1997, for loss-based control.

    Without loss, or without a round trip, it is the capacity. Congestion control that is not driven by loss (BBR) does
    better than this.
    """
    slowing_s = link.round_trip_s * sqrt(link.loss)
    if connections * SEGMENT_BYTES * _MATHIS >= link.bytes_per_s * slowing_s:
        return link.bytes_per_s
    return connections * SEGMENT_BYTES * _MATHIS / slowing_s
