"""What a node's operator may set about transfers."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kvstore.limits import (
    CONNECT_DEADLINE_S,
    CONNECTIONS_PER_NODE_MAX,
    CONNECTIONS_PER_TRANSFER_MAX,
    CREDIT_BYTES_DEFAULT,
    MIB,
    PROGRESS_DEADLINE_S,
    TRANSFER_DEADLINE_MAX_S,
    TRANSFER_RATE_MIN_BYTES_PER_S,
    TRANSFERS_PER_NODE_MAX,
    TRANSFERS_PER_PEER_MAX,
)

RESUME_WINDOW_S = 10.0
"""How long a receiver keeps what it has of a transfer whose connection broke."""
QUEUE_DEADLINE_S = 1.0
"""How long an offer waits for space before the answer is FULL."""
TOTAL_SLACK_S = 30.0
"""What a transfer may take beyond its bytes at the least rate."""
PRODUCER_SLACK_S = 600.0
"""What it may take further while its pieces are still being computed."""
DAMAGED_PIECES_MAX = 64
"""Pieces of one transfer that may arrive damaged and be asked for again before it is given up."""

JOIN_BYTES_MIN = 8 * MIB
"""Fewer missing bytes are gone before a further connection stands."""
JOIN_UNASKED = 6
"""Where nobody has asked for several, and one way leads to a near peer, a second connection and its threads cost more
than they bring below so many times as much."""
KEEPALIVE_FRACTION = 0.1
"""Each side lets the other hear from it after this share of the no-progress deadline. What is left of the deadline when
a path is cut, TCP has for finding out that it is back: by default 4.5 s, so that cuts of 3 s are survived."""


@dataclass(frozen=True)
class TransferSettings:
    """Deadlines and bounds of one node's transfers. The defaults are those of `kvstore.limits`.

    Attributes:
        progress_deadline_s: the longest silence of a peer; of two peers' values the smaller one holds.
        connect_deadline_s: for connecting and the exchange of HELLO.
        resume_window_s: how long a broken transfer's reservation is kept; given up earlier when space is short.
        queue_deadline_s: how long an offer waits for space; at most half the no-progress deadline.
        credit_bytes: piece bytes of one transfer in flight.
        rate_min_bytes_per_s: assumed for the default total deadline.
        transfers_per_node_max, transfers_per_peer_max, connections_per_node_max: incoming ones.
        damaged_pieces_max: pieces asked for again before a transfer fails.
        connections: over how many connections a sender spreads one transfer, where both sides can; None leaves it to
            what is measured of the path.
    """

    progress_deadline_s: float = PROGRESS_DEADLINE_S
    connect_deadline_s: float = CONNECT_DEADLINE_S
    resume_window_s: float = RESUME_WINDOW_S
    queue_deadline_s: float = QUEUE_DEADLINE_S
    credit_bytes: int = CREDIT_BYTES_DEFAULT
    rate_min_bytes_per_s: float = TRANSFER_RATE_MIN_BYTES_PER_S
    transfers_per_node_max: int = TRANSFERS_PER_NODE_MAX
    transfers_per_peer_max: int = TRANSFERS_PER_PEER_MAX
    connections_per_node_max: int = CONNECTIONS_PER_NODE_MAX
    damaged_pieces_max: int = DAMAGED_PIECES_MAX
    connections: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"transfer setting {name}={value} must be positive")
        if self.connections is not None and self.connections > CONNECTIONS_PER_TRANSFER_MAX:
            raise ValueError(f"connections={self.connections} is above the limit of {CONNECTIONS_PER_TRANSFER_MAX}")

    def total_deadline_s(self, total_bytes: int, *, is_complete: bool) -> float:
        """The default total deadline of a transfer of so many bytes, within the limit."""
        seconds = TOTAL_SLACK_S + total_bytes / self.rate_min_bytes_per_s
        return min(seconds if is_complete else seconds + PRODUCER_SLACK_S, TRANSFER_DEADLINE_MAX_S)


def new_boot_epoch() -> int:
    """A random number that names one run of a node; never 0."""
    return int.from_bytes(os.urandom(8), "little") or 1
