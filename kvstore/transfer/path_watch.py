"""One transfer's eye on its connections: it samples them, chooses the path, and tells the link."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.errors import PeerGoneError
from kvstore.limits import KIB, MIB
from kvstore.transfer.path import BUFFER_SHARE_MIN, PathChoice, PathMeasurement, choose_path
from kvstore.transfer.report import PathReport
from kvstore.transfer.settings import JOIN_BYTES_MIN, JOIN_UNASKED
from kvstore.transfer.telemetry import Growth, LinkSample

if TYPE_CHECKING:
    from kvstore.abc import Connection, ConnectionInformation, TransportOptions
    from kvstore.transfer.report import TransferReport
    from kvstore.transfer.settings import TransferSettings
    from kvstore.transfer.telemetry import Link

SAMPLE_S = 0.08
"""Connections are looked at this often while the transfer sends; it takes some microseconds each."""
GROWTH_S = 0.6
GROWTH_ROUND_TRIPS = 10
"""A number of connections is judged after this long, and so many round trips: by the second half of that time."""
GROWTH_REMEMBERED_S = 300.0
"""Afterwards more connections are tried again."""
FRAME_S = 0.05
"""A frame takes about this long, or less, so that a slow connection does not hold much of a transfer's end."""
FRAME_BYTES_MIN = 64 * KIB
FRAME_BYTES_FIRST = 256 * KIB
"""Of a connection on a far path, or on one of several ways, which may be slow, until it is known what it carries."""
UNSENT_BYTES_MIN = 128 * KIB
"""The kernel asks for more when half of what may wait is gone: enough for the time until a sending thread runs."""
UNSENT_BYTES_MAX = 64 * MIB
LIMITED_SHARE_MIN = 0.25
"""Share of the busy time from which on what a connection waited for is reported."""
WINDOW_SHARE_MIN = 0.8
"""Share of the credit that is in flight when the credit is taken for what holds the transfer back."""


@dataclass
class _Watched:
    """A connection, and what it last said."""

    connection: Connection
    last: ConnectionInformation
    frame_bytes: int | None = None


class PathWatch:
    """Chooses and watches the path of one transfer. Any thread may call; none of it waits for a peer.

    Args:
        link: what is known of the way to the peer, and is told what is seen of it.
        options, settings: what the user has asked for.
        route_count: ways to the peer, each of which takes a connection.
    """

    def __init__(self, link: Link, options: TransportOptions, settings: TransferSettings, route_count: int = 1) -> None:
        self._link = link
        self._options = options
        self._settings = settings
        self._route_count = route_count
        self._lock = threading.Lock()
        self._watched: dict[Connection, _Watched] = {}
        self._controls: tuple[str, ...] = ()
        self._choice = PathChoice(None, 1, "not connected yet")
        self._next_s = 0.0
        self._can_tell = False
        self._buffer_max_bytes: int | None = None
        self._delivery_bytes_per_s: float | None = None
        self._wanted_bytes = 0
        self._acknowledged_bytes = 0
        self._busy_s = self._receiver_limited_s = self._buffer_limited_s = 0.0
        self._window_bytes = 0
        self._most_connections = 0
        self._names: dict[str, None] = {}
        self._growth: Growth | None = None
        self._half: tuple[float, int] | None = None
        self._is_limited = False
        self._count_since_s = 0.0

    # Connections

    def opened(self, connection: Connection) -> None:
        """A connection will carry this transfer's bytes from here on; it gets the algorithm for the path.

        Raises:
            PeerGoneError: it was closed meanwhile.
        """
        controls = connection.congestion_controls()
        found = connection.information()
        smallest_s = found.round_trip_min_s or found.round_trip_s
        with self._lock:
            self._controls = self._controls or controls
            choice = self._choose(PathMeasurement(round_trip_s=self._link.round_trip_min_s or smallest_s))
            if not self._watched:
                self._choice = replace(choice, connections=1)
            self._watched[connection] = _Watched(connection, found)
            self._buffer_max_bytes = found.buffer_max_bytes or self._buffer_max_bytes
            self._can_tell = self._can_tell or found.acknowledged_bytes is not None
            self._most_connections = max(self._most_connections, len(self._watched))
            self._count_since_s, self._half, self._is_limited = time.monotonic(), None, False
            if self._is_far(found) or self._route_count > 1:
                self._watched[connection].frame_bytes = FRAME_BYTES_FIRST
        name = choice.congestion_control
        if controls and name is not None and name != found.congestion_control:
            connection.use_congestion_control(name)
        used = name if controls else found.congestion_control
        if used is not None:
            with self._lock:
                self._names[used] = None

    def closed(self, connection: Connection) -> None:
        """A connection carries nothing any more. Without effect if it is not known."""
        with self._lock:
            self._watched.pop(connection, None)

    def begin(self, wanted_bytes: int, window_bytes: int) -> int:
        """An attachment is about to send; the number of connections that it should have.

        Args:
            wanted_bytes: what the peer lacks.
            window_bytes: what it lets be in flight.
        """
        now_s = time.monotonic()
        self._link.begin(self, now_s)
        with self._lock:
            self._wanted_bytes, self._acknowledged_bytes = wanted_bytes, 0
            self._window_bytes = window_bytes
            self._next_s = now_s + SAMPLE_S
            found = self._link.growth
            if found is not None and now_s - found.at_s <= GROWTH_REMEMBERED_S:
                self._growth = found
            self._choice = self._choose(self._measurement(wanted_bytes))
            self._count_since_s, self._half = now_s, None
            is_unasked = self._settings.connections is None and self._route_count == 1
            if wanted_bytes < JOIN_BYTES_MIN * (JOIN_UNASKED if is_unasked else 1) and not self._is_far_now():
                self._choice = replace(self._choice, connections=1)
            return self._choice.connections

    def frame_bytes(self, connection: Connection, most_bytes: int) -> int:
        """How many bytes of pieces to put into one frame on a connection."""
        watched = self._watched.get(connection)
        return most_bytes if watched is None or watched.frame_bytes is None else min(most_bytes, watched.frame_bytes)

    def unsent_bytes(self, connection: Connection) -> int:
        """How many bytes may wait in the kernel without having been sent; 0 leaves it to the kernel.

        The kernel takes many round trips' worth ahead. With several connections that would be most of the last bytes,
        and a slow one would still be sending its own when the others have long been done. On one near path, where they
        share what there is, that is a moment.
        """
        watched = self._watched.get(connection)
        if watched is None or watched.frame_bytes is None or len(self._watched) < 2:
            return 0
        if self._route_count < 2 and not self._is_far(watched.last):
            return 0
        return min(max(watched.frame_bytes, UNSENT_BYTES_MIN), UNSENT_BYTES_MAX)

    # Samples

    def sample(self, *, is_last: bool = False) -> int:
        """Look at the connections if that is due, and say how many the transfer should have.

        Called by the transfer's thread where it comes by anyhow.
        """
        now_s = time.monotonic()
        if now_s < self._next_s and not is_last:
            return self._choice.connections
        self._next_s = now_s + SAMPLE_S
        with self._lock:
            sample = self._look(now_s)
        self._link.note(self, sample)
        with self._lock:
            self._judge(sample)
            return self._choice.connections

    def _look(self, now_s: float) -> LinkSample:
        acknowledged = sent = again = in_flight = unsent = 0
        round_trips: list[float] = []
        smallest: list[float] = []
        names: dict[str, None] = {}
        rates: list[float] = []
        is_known = False
        for watched in list(self._watched.values()):
            try:
                found = watched.connection.information()
            except PeerGoneError:
                del self._watched[watched.connection]
                continue
            before, watched.last = watched.last, found
            acknowledged += _grown(before.acknowledged_bytes, found.acknowledged_bytes)
            sent += _grown(before.sent_bytes, found.sent_bytes)
            again += _grown(before.retransmitted_bytes, found.retransmitted_bytes)
            in_flight += found.in_flight_bytes or 0
            unsent += found.unsent_bytes or 0
            is_known = is_known or found.unsent_bytes is not None
            self._busy_s += _longer(before.busy_s, found.busy_s)
            self._receiver_limited_s += _longer(before.receiver_limited_s, found.receiver_limited_s)
            self._buffer_limited_s += _longer(before.buffer_limited_s, found.buffer_limited_s)
            if found.delivery_bytes_per_s is not None:
                rates.append(found.delivery_bytes_per_s)
            if found.round_trip_s is not None:
                round_trips.append(found.round_trip_s)
            if found.round_trip_min_s is not None:
                smallest.append(found.round_trip_min_s)
            if found.congestion_control is not None:
                names[found.congestion_control] = None
            if found.delivery_bytes_per_s is not None and (self._is_far(found) or found.is_app_limited is False):
                wanted = int(found.delivery_bytes_per_s * FRAME_S)
                watched.frame_bytes = max(wanted, FRAME_BYTES_MIN)
        self._acknowledged_bytes += acknowledged
        self._delivery_bytes_per_s = sum(rates) if rates else self._delivery_bytes_per_s
        self._names.update(names)
        queued = max(0, self._wanted_bytes - self._acknowledged_bytes - in_flight)
        return LinkSample(
            at_s=now_s,
            connections=len(self._watched),
            round_trip_s=sum(round_trips) / len(round_trips) if round_trips else None,
            round_trip_min_s=min(smallest, default=None),
            acknowledged_bytes=acknowledged,
            sent_bytes=sent,
            retransmitted_bytes=again,
            # With nothing left to hand over, connections run dry one by one.
            is_app_limited=not is_known or unsent == 0 or queued <= unsent,
            queued_bytes=queued,
            in_flight_bytes=in_flight,
            congestion_control=tuple(names),
        )

    def _judge(self, sample: LinkSample) -> None:
        """Let the number of connections grow once it is known what the present ones carry."""
        if self._settings.connections is not None or not self._is_far_now():
            return
        self._is_limited |= sample.is_app_limited
        round_trip_s = self._link.round_trip_min_s or 0.0
        judged_after_s = max(GROWTH_S, GROWTH_ROUND_TRIPS * round_trip_s)
        elapsed_s = sample.at_s - self._count_since_s
        if self._half is None:
            if elapsed_s >= judged_after_s / 2:
                self._half, self._is_limited = (sample.at_s, self._acknowledged_bytes), False
            return
        if elapsed_s < judged_after_s:
            return
        half_s, half_bytes = self._half
        self._count_since_s, self._half = sample.at_s, None
        if self._is_limited or sample.at_s <= half_s:
            return
        growth = self._growth
        if growth is not None and growth.is_settled:
            return
        rate = (self._acknowledged_bytes - half_bytes) / (sample.at_s - half_s)
        fewer = None if growth is None else growth.bytes_per_s
        count = self._choice.connections
        left = self._wanted_bytes - self._acknowledged_bytes
        choice = self._choose(replace(self._measurement(left), connections=count, bytes_per_s=rate,
                                      fewer_bytes_per_s=fewer))  # fmt: skip
        self._choice = replace(choice, connections=max(count, choice.connections))
        if self._choice.connections == count and fewer is None:
            return  # Nothing speaks for more, so far.
        self._growth = Growth(self._choice.connections, rate, fewer, self._choice.connections == count, sample.at_s)
        self._link.growth = self._growth

    def _measurement(self, left_bytes: int) -> PathMeasurement:
        growth = self._growth
        return PathMeasurement(
            round_trip_s=self._round_trip_s(),
            retransmitted_share=self._link.retransmitted_share,
            congestion_controls=self._controls,
            left_bytes=left_bytes,
            routes=self._route_count,
            transfers=max(1, self._link.transfers_running),
            connections=None if growth is None else growth.connections,
            buffer_max_bytes=self._buffer_max_bytes,
        )

    def _choose(self, measured: PathMeasurement) -> PathChoice:
        if not measured.congestion_controls:
            measured = replace(measured, congestion_controls=self._controls)
        return choose_path(
            measured,
            congestion_control=self._options.congestion_control,
            connections=self._settings.connections,
        )

    def _round_trip_s(self) -> float | None:
        known = [
            watched.last.round_trip_min_s or watched.last.round_trip_s
            for watched in self._watched.values()
            if watched.last.round_trip_s is not None
        ]
        return self._link.round_trip_min_s or min((value for value in known if value is not None), default=None)

    def _is_far_now(self) -> bool:
        return PathMeasurement(round_trip_s=self._round_trip_s()).is_far

    def _is_far(self, found: ConnectionInformation) -> bool:
        return PathMeasurement(round_trip_s=found.round_trip_min_s or found.round_trip_s).is_far

    # The end

    def report(self) -> PathReport:
        """What the path was like, and what was made of it."""
        with self._lock:
            return PathReport(
                connections=max(1, self._most_connections),
                congestion_control=tuple(self._names),
                why=self._choice.why,
                round_trip_s=self._round_trip_s(),
                retransmitted_share=self._link.retransmitted_share,
                limits=self._limits(),
            )

    def end(self, report: TransferReport | None) -> None:
        """The transfer has ended, by a commit or (None) otherwise; without effect if it never began to send."""
        if report is None:
            self._link.end(self, None, bytes_per_s=None, unseen_bytes=None)
        elif self._can_tell:
            self._link.end(self, report.exposed_s, bytes_per_s=self._delivery_bytes_per_s, unseen_bytes=None)
        else:
            rate, size_bytes = report.sent_bytes_per_s, report.total_bytes
            self._link.end(self, report.exposed_s, bytes_per_s=rate, unseen_bytes=size_bytes)

    def _limits(self) -> tuple[str, ...]:
        """What held the transfer back besides the network, each with the remedy."""
        if not self._is_far_now() or not self._busy_s:
            return ()
        found = []
        rate, round_trip_s = self._link.delivery_bytes_per_s, self._round_trip_s()
        product = (rate or 0.0) * (round_trip_s or 0.0)
        if self._receiver_limited_s > LIMITED_SHARE_MIN * self._busy_s:
            found.append(
                f"for {self._receiver_limited_s / self._busy_s:.0%} of the time the receiver's window was full: it "
                "takes bytes slowly, or net.ipv4.tcp_rmem allows too little there (its third number should be twice "
                f"bandwidth x delay, which is at least {product:.0f} bytes)"
            )
        buffer_bytes = (self._buffer_max_bytes or 0) * self._most_connections
        is_full = buffer_bytes != 0 and 2 * product >= BUFFER_SHARE_MIN * buffer_bytes
        if is_full or self._buffer_limited_s > LIMITED_SHARE_MIN * self._busy_s:
            found.append(
                "the send buffers were too small: raise the third number of net.ipv4.tcp_wmem here to more than twice "
                f"bandwidth x delay, which is at least {product:.0f} bytes"
            )
        if self._window_bytes and product > WINDOW_SHARE_MIN * self._window_bytes:
            found.append(
                f"bandwidth x delay is {product:.0f} bytes and the receiver grants {self._window_bytes} in flight: "
                "raise TransferSettings.credit_bytes there"
            )
        return tuple(found)


def _grown(before: int | None, now: int | None) -> int:
    return 0 if now is None else max(0, now - (before or 0))


def _longer(before: float | None, now: float | None) -> float:
    return 0.0 if now is None else max(0.0, now - (before or 0.0))
