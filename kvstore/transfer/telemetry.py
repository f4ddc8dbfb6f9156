"""How the links of this node are doing: per peer, smoothed, and as a snapshot for whoever schedules."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from kvstore.limits import LINKS_MAX

ROUND_TRIP_CONSTANT_S = 1.0
"""Time constant of the smoothed round-trip time."""
RATE_CONSTANT_S = 1.0
"""Time constant of the delivery rate."""
LOSS_CONSTANT_S = 10.0
"""Bytes sent and sent again are forgotten with this time constant, so that a share of few bytes weighs little."""
ROUND_TRIP_MIN_S = 300.0
"""How long the smallest round-trip time stands before a larger one replaces it."""
EXPOSED_WEIGHT = 0.25
"""Weight of the last transfer in the smoothed exposed time."""
WINDOW_S = 0.1
"""Bytes are counted over at least this long for one sample of the rate."""


@dataclass(frozen=True)
class LinkSnapshot:
    """How the link from this node to one peer is doing. A value: it does not change and holds on to nothing.

    What was never measured, or cannot be by the link's transport, is None. A link on which nothing happens keeps its
    last values; `age_s` says how old they are.

    Attributes:
        peer_address: where the peer listens, as the transfers name it.
        age_s: seconds since the last measurement when the snapshot was taken.
        transfers_running: transfers to this peer at the moment.
        connections: their connections.
        round_trip_s: smoothed round-trip time (time constant 1 s).
        round_trip_min_s: the smallest one of the last five minutes of measurements.
        delivery_bytes_per_s: what the link delivers of all transfers together (time constant 1 s). Measured while
            there was more to send than it took; a sender with little to send can raise this value, never lower it.
        retransmitted_share: bytes sent again, of all sent (time constant 10 s): what is lost, and a little more.
        queued_bytes: of running transfers, wanted by the peer and not yet on the wire.
        in_flight_bytes: on the wire and not acknowledged.
        sent_bytes: acknowledged by the peer since the link was first used.
        transfers: that have ended by a commit.
        exposed_s: what a transfer adds after its producer has finished, smoothed over transfers (weight 1/4).
        exposed_total_s: the sum of that.
        congestion_control: names of the algorithms in use, or last in use.
    """

    peer_address: str
    age_s: float
    transfers_running: int
    connections: int
    round_trip_s: float | None
    round_trip_min_s: float | None
    delivery_bytes_per_s: float | None
    retransmitted_share: float | None
    queued_bytes: int
    in_flight_bytes: int
    sent_bytes: int
    transfers: int
    exposed_s: float | None
    exposed_total_s: float
    congestion_control: tuple[str, ...]


@dataclass(frozen=True)
class LinkSample:
    """What one transfer has seen of a link since its last sample; the differences are over all its connections.

    Attributes:
        at_s: by the monotonic clock.
        connections: open ones.
        round_trip_s, round_trip_min_s: of them: the mean, and the smallest.
        acknowledged_bytes, sent_bytes, retransmitted_bytes: since the last sample.
        is_app_limited: the sender may have had less to send than the link takes.
        queued_bytes, in_flight_bytes: now.
        congestion_control: in use.
    """

    at_s: float
    connections: int = 0
    round_trip_s: float | None = None
    round_trip_min_s: float | None = None
    acknowledged_bytes: int = 0
    sent_bytes: int = 0
    retransmitted_bytes: int = 0
    is_app_limited: bool = True
    queued_bytes: int = 0
    in_flight_bytes: int = 0
    congestion_control: tuple[str, ...] = ()


@dataclass(frozen=True)
class Growth:
    """What a link has taught about numbers of connections.

    Attributes:
        connections: how many the link was last used with.
        bytes_per_s: what they carried; None if that was not measured.
        fewer_bytes_per_s: what fewer carried before.
        is_settled: more were tried, or nothing speaks for more.
        at_s: when, by the monotonic clock.
    """

    connections: int
    bytes_per_s: float | None
    fewer_bytes_per_s: float | None
    is_settled: bool
    at_s: float


class Smoothed:
    """An exponentially weighted mean over time: what is older than the time constant counts less than 1/e."""

    def __init__(self, constant_s: float) -> None:
        self._constant_s = constant_s
        self._at_s = 0.0
        self.value: float | None = None

    def note(self, value: float, at_s: float) -> None:
        if self.value is None:
            self.value = value
        else:
            weight = 1.0 - math.exp(-max(0.0, at_s - self._at_s) / self._constant_s)
            self.value += weight * (value - self.value)
        self._at_s = at_s


class Link:
    """One peer, known since a moment of the monotonic clock. Transfers report to it; any thread may call."""

    def __init__(self, peer_address: str, now_s: float) -> None:
        self.peer_address = peer_address
        self._lock = threading.Lock()
        self._running: dict[object, LinkSample] = {}
        self._round_trip = Smoothed(ROUND_TRIP_CONSTANT_S)
        self._round_trip_min: tuple[float, float] | None = None
        self._rate = Smoothed(RATE_CONSTANT_S)
        self._sent_recently = self._again_recently = 0.0
        self._measured_s = self._window_s = now_s
        self._window_bytes = 0
        self._is_window_limited = False
        self._sent_bytes = 0
        self._transfers = 0
        self._exposed_s: float | None = None
        self._exposed_total_s = 0.0
        self._congestion_control: tuple[str, ...] = ()
        self._growth: Growth | None = None

    # Reports of transfers, each named by any object of its own

    def begin(self, transfer: object, now_s: float) -> None:
        """A transfer to this peer begins to send."""
        with self._lock:
            if not self._running:
                self._begin_window(now_s)
            self._running.setdefault(transfer, LinkSample(now_s))

    def note(self, transfer: object, sample: LinkSample) -> None:
        """A transfer has looked at its connections."""
        with self._lock:
            if transfer not in self._running:
                return
            self._running[transfer] = sample
            self._take(sample)

    def end(
        self, transfer: object, exposed_s: float | None, *, bytes_per_s: float | None, unseen_bytes: int | None
    ) -> None:
        """A transfer has ended.

        Args:
            transfer: which.
            exposed_s: what it added after its producer had finished; None if it failed.
            bytes_per_s: the rate of the whole transfer, for a link of which nothing better is known.
            unseen_bytes: what it sent over connections that could not tell; None if they could.
        """
        with self._lock:
            if self._running.pop(transfer, None) is None:
                return
            now_s = time.monotonic()
            if bytes_per_s is not None and (self._rate.value is None or unseen_bytes is not None):
                self._rate.note(bytes_per_s, now_s)
                self._measured_s = now_s
            self._sent_bytes += unseen_bytes or 0
            if exposed_s is None:
                return
            self._transfers += 1
            self._exposed_total_s += exposed_s
            before_s = exposed_s if self._exposed_s is None else self._exposed_s
            self._exposed_s = before_s + EXPOSED_WEIGHT * (exposed_s - before_s)

    @property
    def transfers_running(self) -> int:
        with self._lock:
            return len(self._running)

    @property
    def round_trip_min_s(self) -> float | None:
        with self._lock:
            return None if self._round_trip_min is None else self._round_trip_min[0]

    @property
    def retransmitted_share(self) -> float | None:
        with self._lock:
            return self._share()

    @property
    def delivery_bytes_per_s(self) -> float | None:
        with self._lock:
            return self._rate.value

    @property
    def growth(self) -> Growth | None:
        """What was remembered of numbers of connections."""
        with self._lock:
            return self._growth

    @growth.setter
    def growth(self, growth: Growth) -> None:
        with self._lock:
            self._growth = growth

    def snapshot(self, now_s: float) -> LinkSnapshot:
        """The link at this moment of the monotonic clock."""
        with self._lock:
            running = self._running.values()
            return LinkSnapshot(
                peer_address=self.peer_address,
                age_s=max(0.0, now_s - self._measured_s),
                transfers_running=len(running),
                connections=sum(sample.connections for sample in running),
                round_trip_s=self._round_trip.value,
                round_trip_min_s=None if self._round_trip_min is None else self._round_trip_min[0],
                delivery_bytes_per_s=self._rate.value,
                retransmitted_share=self._share(),
                queued_bytes=sum(sample.queued_bytes for sample in running),
                in_flight_bytes=sum(sample.in_flight_bytes for sample in running),
                sent_bytes=self._sent_bytes,
                transfers=self._transfers,
                exposed_s=self._exposed_s,
                exposed_total_s=self._exposed_total_s,
                congestion_control=self._congestion_control,
            )

    # With the lock held

    def _take(self, sample: LinkSample) -> None:
        now_s = sample.at_s
        forgotten = math.exp(-max(0.0, now_s - self._measured_s) / LOSS_CONSTANT_S)
        self._sent_recently = self._sent_recently * forgotten + sample.sent_bytes
        self._again_recently = self._again_recently * forgotten + sample.retransmitted_bytes
        self._sent_bytes += sample.acknowledged_bytes
        self._congestion_control = sample.congestion_control or self._congestion_control
        self._measured_s = max(self._measured_s, now_s)
        if sample.round_trip_s is not None:
            self._round_trip.note(sample.round_trip_s, now_s)
        smallest_s = sample.round_trip_min_s
        if smallest_s is not None:
            kept = self._round_trip_min
            if kept is None or smallest_s <= kept[0] or now_s - kept[1] > ROUND_TRIP_MIN_S:
                self._round_trip_min = smallest_s, now_s
        self._window_bytes += sample.acknowledged_bytes
        self._is_window_limited |= sample.is_app_limited
        if now_s - self._window_s >= WINDOW_S:
            rate = self._window_bytes / (now_s - self._window_s)
            if not self._is_window_limited or rate > (self._rate.value or 0.0):
                self._rate.note(rate, now_s)
            self._begin_window(now_s)

    def _begin_window(self, now_s: float) -> None:
        self._window_s = now_s
        self._window_bytes = 0
        self._is_window_limited = False

    def _share(self) -> float | None:
        return min(1.0, self._again_recently / self._sent_recently) if self._sent_recently >= 1.0 else None


class LinkTable:
    """The links of one sender, a bounded number: the one that was used the longest ago is forgotten. Any thread."""

    def __init__(self, links_max: int = LINKS_MAX) -> None:
        self._links_max = links_max
        self._lock = threading.Lock()
        self._links: OrderedDict[str, Link] = OrderedDict()

    def link(self, peer_address: str) -> Link:
        """The link to a peer, a new one if it is not known."""
        with self._lock:
            found = self._links.get(peer_address)
            if found is None:
                found = self._links[peer_address] = Link(peer_address, time.monotonic())
            self._links.move_to_end(peer_address)
            while len(self._links) > self._links_max:
                self._links.popitem(last=False)
            return found

    def snapshot(self) -> tuple[LinkSnapshot, ...]:
        """All links, the one used last at the end."""
        with self._lock:
            links = list(self._links.values())
        now_s = time.monotonic()
        return tuple(link.snapshot(now_s) for link in links)
