"""Which congestion control and how many connections a path gets: one pure function of what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.limits import MIB

NEAR_ROUND_TRIP_S = 0.001
"""Shorter round trips are within a machine or a rack, where losses are rare."""
NEAR_CONGESTION_CONTROL = "cubic"
"""Carries twice what `bbr` does at small round-trip times: that models a path which it can hardly measure there."""
NEAR_CONNECTIONS = 2
"""The second one keeps a second core busy at each end."""
FAR_CONGESTION_CONTROL = "bbr"
"""Does not take a lost packet for a full link: one connection fills a long lossy path."""
FAR_CONNECTIONS = 1
"""With `bbr`: a second one carries no more, and both lose a tenth of their bytes until they have found their shares."""
LOSS_BOUND_CONNECTIONS = 8
"""Without `bbr` a far path begins with these; each gives way to every loss, and so carries a small part."""
LOSS_BOUND_CONNECTIONS_MAX = 32
LOSS_SHARE_MIN = 1e-5
"""Share of the bytes that were sent again from which on losses hold a loss-based algorithm back."""
BUFFER_SHARE_MIN = 0.75
"""A send buffer is what holds a connection back when twice bandwidth x delay is this much of it: losses that are being
repaired keep as many bytes again."""
GROWTH_PAYS = 1.15
"""Twice the connections must carry this much more, or they were not worth it."""
FAR_BYTES_PER_CONNECTION_MIN = 1 * MIB
"""Fewer bytes have left before a further connection is past its slow start."""


@dataclass(frozen=True)
class PathMeasurement:
    """What is known of a path. None is what nobody has measured.

    Attributes:
        round_trip_s: smallest round-trip time.
        retransmitted_share: bytes that were sent again, of all that were sent.
        congestion_controls: algorithms that this process may choose, the system's own first; () if there is no choice.
        left_bytes: of the transfer that is to be sent.
        routes: ways to the peer, such as pairs of network interfaces; each takes a connection at least.
        transfers: to this peer at the moment, this one counted.
        connections: how many the rates below belong to; None if none was measured.
        bytes_per_s: what they carried together while there was more to send; None if that was not the case.
        buffer_max_bytes: of one connection: the most that this side keeps of bytes which are not acknowledged.
        fewer_bytes_per_s: what fewer connections carried, before the last growth.
    """

    round_trip_s: float | None = None
    retransmitted_share: float | None = None
    congestion_controls: tuple[str, ...] = ()
    left_bytes: int | None = None
    routes: int = 1
    transfers: int = 1
    connections: int | None = None
    bytes_per_s: float | None = None
    buffer_max_bytes: int | None = None
    fewer_bytes_per_s: float | None = None

    @property
    def is_far(self) -> bool:
        return self.round_trip_s is not None and self.round_trip_s >= NEAR_ROUND_TRIP_S


@dataclass(frozen=True)
class PathChoice:
    """How a transfer is to use its path.

    Attributes:
        congestion_control: algorithm of its connections; None leaves each what it has.
        connections: how many.
        why: for people.
    """

    congestion_control: str | None
    connections: int
    why: str


def choose_path(
    measured: PathMeasurement, *, congestion_control: str | None = None, connections: int | None = None
) -> PathChoice:
    """The choice for a path; pure.

    Args:
        measured: of the path, and of the transfer that wants to use it.
        congestion_control, connections: what the user has asked for, which always holds.
    """
    name, why = _algorithm(measured, congestion_control)
    if connections is not None:
        return PathChoice(name, connections, f"{why}; {connections} connections as asked")
    if not measured.is_far:
        return PathChoice(name, max(NEAR_CONNECTIONS, measured.routes), why)
    is_loss_bound = name != FAR_CONGESTION_CONTROL
    first = LOSS_BOUND_CONNECTIONS if is_loss_bound else FAR_CONNECTIONS
    count, because = _grown(measured, first, _held_back(measured, is_loss_bound=is_loss_bound))
    return PathChoice(name, _bounded(count, measured), f"{why}; {because}")


def _algorithm(measured: PathMeasurement, asked: str | None) -> tuple[str | None, str]:
    choices = measured.congestion_controls
    where = _where(measured)
    if asked is not None:
        return asked, f"{where}: {asked} as asked"
    if not choices:
        return None, f"{where}: congestion control is not this process's to choose"
    if measured.round_trip_s is None:
        return choices[0], f"{where}: {choices[0]} is the system's choice"
    wanted = FAR_CONGESTION_CONTROL if measured.is_far else NEAR_CONGESTION_CONTROL
    if wanted in choices:
        return wanted, f"{where}: {wanted}"
    return choices[0], f"{where}: {choices[0]}, since {wanted} is not to be had by this process"


def _where(measured: PathMeasurement) -> str:
    if measured.round_trip_s is None:
        return "round-trip time unknown"
    return f"round trip {measured.round_trip_s * 1000:.3g} ms, {'far' if measured.is_far else 'near'}"


def _held_back(measured: PathMeasurement, *, is_loss_bound: bool) -> str | None:
    """What keeps one connection from carrying more, where that is something that more of them are a remedy for."""
    share = measured.retransmitted_share
    if is_loss_bound and share is not None and share >= LOSS_SHARE_MIN:
        return f"{share:.2%} is lost"
    buffer_bytes = (measured.buffer_max_bytes or 0) * (measured.connections or 0)
    needed_bytes = 2 * (measured.bytes_per_s or 0.0) * (measured.round_trip_s or 0.0)
    if buffer_bytes and needed_bytes >= BUFFER_SHARE_MIN * buffer_bytes:
        return "each one's send buffer is full"
    return None


def _grown(measured: PathMeasurement, first: int, held_back: str | None) -> tuple[int, str]:
    """How many connections a far path gets, and why."""
    count = measured.connections
    if count is None:
        return first, f"{first} connections to begin with"
    if measured.bytes_per_s is None:
        return count, f"{count} connections as before"
    if held_back is None:
        return count, f"{count} connections, which nothing holds back"
    if measured.fewer_bytes_per_s is not None and measured.bytes_per_s < measured.fewer_bytes_per_s * GROWTH_PAYS:
        return count, f"{count} connections, since more did not carry more"
    grown = min(2 * count, LOSS_BOUND_CONNECTIONS_MAX)
    return max(grown, count), f"{max(grown, count)} connections, since {held_back} and more carry more"


def _bounded(count: int, measured: PathMeasurement) -> int:
    """Transfers to one peer share the connections that pay for its path; a small transfer needs few."""
    shared = max(measured.routes, -(-count // max(1, measured.transfers)))
    if measured.left_bytes is not None:
        shared = min(shared, measured.left_bytes // FAR_BYTES_PER_CONNECTION_MIN)
    return max(1, shared)
