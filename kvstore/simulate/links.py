"""Links as fluids: transfers share them fairly, within what clusters may send and receive.

A transfer that is still being produced gets no more than what is produced. All the others of a link get the same rate,
so one counter for each link (bytes that each of them has got) tells when they end: a transfer that joins at counter c
is through at c + its bytes, and nothing has to be done for each of them when rates change.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Any

from kvstore.errors import SimulationError
from kvstore.schedule.link_rate import loss_limited_bytes_per_s
from kvstore.simulate.shares import Demand, fair_shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvstore.schedule.deployment import Deployment, Link
    from kvstore.simulate.events import Events

_NOTHING_BYTES = 1e-3


class Flow:
    """One transfer over one link."""

    __slots__ = ("amount_bytes", "argument", "begun_s", "cap", "done", "line", "number", "rate", "remaining_bytes")

    def __init__(
        self,
        line: Line,
        number: int,
        begun_s: float,
        amount_bytes: float,
        cap: float,
        done: Callable[[Any], None],
        argument: object,
    ) -> None:
        self.line = line
        self.begun_s = begun_s
        self.amount_bytes = amount_bytes
        self.number = number
        self.remaining_bytes = amount_bytes
        self.cap = cap
        self.rate = 0.0
        self.done = done
        self.argument = argument

    def behind_bytes(self, now_s: float) -> float:
        """What was made by now and has not left."""
        made_bytes = min(self.cap * (now_s - self.begun_s), self.amount_bytes) if self.cap < inf else self.amount_bytes
        return max(made_bytes - (self.amount_bytes - self.remaining_bytes), 0.0)

    def __lt__(self, other: Flow) -> bool:
        return (self.cap, self.number) < (other.cap, other.number)


class Line:
    """One link at work.

    Attributes:
        share: of its capacity that faults leave.
        accepted_bytes, delivered_bytes: since the start; cancelled transfers are taken out of what was accepted.
        limit_bytes_per_s: what its clusters may send and receive, whatever it carries.
        round_trip_s: as configured.
    """

    __slots__ = (
        "accepted_bytes",
        "capped",
        "delivered_bytes",
        "each_bytes",
        "free",
        "free_rate",
        "full_bytes_per_s",
        "group",
        "limit_bytes_per_s",
        "link",
        "marks_sum",
        "rate",
        "round_trip_s",
        "share",
        "updated_s",
        "version",
    )

    def __init__(self, link: Link, cross_share: float, limit_bytes_per_s: float) -> None:
        self.link = link
        self.limit_bytes_per_s = limit_bytes_per_s
        self.round_trip_s = link.round_trip_s
        self.full_bytes_per_s = min(link.bytes_per_s * (1.0 - cross_share), loss_limited_bytes_per_s(link))
        self.share = 1.0
        self.group: _Group
        self.free: list[tuple[float, int, Flow]] = []
        self.capped: list[Flow] = []
        self.each_bytes = 0.0
        self.marks_sum = 0.0
        self.free_rate = 0.0
        self.rate = 0.0
        self.updated_s = 0.0
        self.accepted_bytes = 0.0
        self.delivered_bytes = 0.0
        self.version = 0

    @property
    def bytes_per_s(self) -> float:
        """What it could carry at the moment, limits of clusters left out."""
        return self.full_bytes_per_s * self.share

    @property
    def delivers_bytes_per_s(self) -> float:
        """What it would deliver at the moment if its clusters sent and received nothing else."""
        return min(self.bytes_per_s, self.limit_bytes_per_s)

    def queued_bytes(self, now_s: float) -> float:
        """Ready to leave and not delivered."""
        self.advance(now_s)
        free_bytes = self.marks_sum - len(self.free) * self.each_bytes
        return max(free_bytes, 0.0) + sum(flow.behind_bytes(now_s) for flow in self.capped)

    def coming_bytes(self, now_s: float) -> float:
        """Accepted, and still to be made."""
        self.advance(now_s)
        return sum(flow.remaining_bytes - flow.behind_bytes(now_s) for flow in self.capped)

    def delivered(self, now_s: float) -> float:
        self.advance(now_s)
        return self.delivered_bytes

    def advance(self, now_s: float) -> None:
        """Deliver what the present rates deliver until now."""
        passed_s = now_s - self.updated_s
        self.updated_s = now_s
        if passed_s > 0 and self.rate > 0:
            self.each_bytes += self.free_rate * passed_s
            self.delivered_bytes += self.rate * passed_s
            for flow in self.capped:
                flow.remaining_bytes -= flow.rate * passed_s


class _Group:
    """Links whose rates depend on one another, through the limits of a cluster that they share."""

    __slots__ = ("limits", "lines", "passed")

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.passed: list[tuple[int, ...]] = []
        self.limits: list[float] = []

    def rates(self) -> None:
        """Set the rates of all flows."""
        if len(self.limits) == 1:
            line = self.lines[0]
            if not line.capped:
                line.rate = line.bytes_per_s if line.free else 0.0
                line.free_rate = line.rate / len(line.free) if line.free else 0.0
                return
        for at, line in enumerate(self.lines):
            self.limits[at] = line.bytes_per_s
        busy, demands = [], []
        for line, passed in zip(self.lines, self.passed, strict=True):
            if line.free or line.capped:
                busy.append(line)
                demands.append(Demand(len(line.free), [flow.cap for flow in line.capped], passed))
            else:
                line.rate = line.free_rate = 0.0
        if not busy:
            return
        for line, share in zip(busy, fair_shares(demands, self.limits), strict=True):
            line.free_rate = share.free
            line.rate = share.free * len(line.free) + sum(share.capped)
            for flow, rate in zip(line.capped, share.capped, strict=True):
                flow.rate = rate


class Links:
    """All links of a deployment. Not thread-safe.

    Args:
        cross_traffic: share of each link that others use, by source and target.

    Raises:
        SimulationError: cross traffic on a link that is not there, or not a share.
    """

    def __init__(
        self, deployment: Deployment, events: Events, cross_traffic: Iterable[tuple[str, str, float]] = ()
    ) -> None:
        self._events = events
        self._number = 0
        crossing = {(source, target): share for source, target, share in cross_traffic}
        for pair, share in crossing.items():
            if deployment.link(*pair) is None or not 0 <= share < 1:
                raise SimulationError(
                    f"cross traffic of {share} from {pair[0]!r} to {pair[1]!r}: name a link of the deployment and a "
                    "share in [0, 1)"
                )
        self.lines: dict[tuple[str, str], Line] = {
            (link.source, link.target): Line(
                link,
                crossing.get((link.source, link.target), 0.0),
                min(
                    deployment.cluster(link.source).egress_bytes_per_s or inf,
                    deployment.cluster(link.target).ingress_bytes_per_s or inf,
                ),
            )
            for link in deployment.links
        }
        self._group(deployment)

    def _group(self, deployment: Deployment) -> None:
        leaders: dict[str, _Group] = {}
        for (source, target), line in self.lines.items():
            limits = []
            for name, value in (
                (f"from {source}", deployment.cluster(source).egress_bytes_per_s),
                (f"into {target}", deployment.cluster(target).ingress_bytes_per_s),
            ):
                if value is not None:
                    limits.append((name, value))
            group = _Group()
            line.group = group
            group.lines.append(line)
            for name, _ in limits:
                if name in leaders and leaders[name] is not group:
                    other = leaders[name]
                    for moved in other.lines:
                        moved.group = group
                    group.lines += other.lines
                    leaders = {key: group if value is other else value for key, value in leaders.items()}
                leaders[name] = group
        groups = {id(line.group): line.group for line in self.lines.values()}
        for group in groups.values():
            named: dict[str, int] = {}
            group.limits = [line.bytes_per_s for line in group.lines]
            for at, line in enumerate(group.lines):
                passed = [at]
                for name, value in (
                    (f"from {line.link.source}", deployment.cluster(line.link.source).egress_bytes_per_s),
                    (f"into {line.link.target}", deployment.cluster(line.link.target).ingress_bytes_per_s),
                ):
                    if value is not None:
                        if name not in named:
                            named[name] = len(group.limits)
                            group.limits.append(value)
                        passed.append(named[name])
                group.passed.append(tuple(passed))

    def send(
        self, source: str, target: str, amount_bytes: float, done: Callable[[Any], None], argument: object
    ) -> None:
        """Send what is there; `done(argument)` a round trip after the last byte has left."""
        line = self.lines[source, target]
        self._number += 1
        self._settle(line.group)
        line.accepted_bytes += amount_bytes
        self._free(Flow(line, self._number, self._events.now_s, amount_bytes, inf, done, argument))
        self._set(line.group)

    def produce(
        self,
        source: str,
        target: str,
        amount_bytes: float,
        bytes_per_s: float,
        done: Callable[[Any], None],
        argument: object,
    ) -> Flow:
        """Send what is being made at this rate; the flow is to be handed to `produced`, or to `cancel`."""
        line = self.lines[source, target]
        self._number += 1
        self._settle(line.group)
        line.accepted_bytes += amount_bytes
        flow = Flow(line, self._number, self._events.now_s, amount_bytes, bytes_per_s, done, argument)
        insort(line.capped, flow)
        self._set(line.group)
        return flow

    def produced(self, flow: Flow) -> None:
        """All of it is there; what is left gets its fair share of the link."""
        line = flow.line
        self._settle(line.group)
        line.capped.remove(flow)
        if flow.remaining_bytes <= _NOTHING_BYTES:
            line.delivered_bytes += flow.remaining_bytes
            self._events.at(self._events.now_s + line.round_trip_s, flow.done, flow.argument)
        else:
            self._free(flow)
        self._set(line.group)

    def cancel(self, flow: Flow) -> float:
        """Whoever produced it is gone.

        Returns:
            Bytes that had not crossed, and will not.
        """
        line = flow.line
        self._settle(line.group)
        line.capped.remove(flow)
        line.accepted_bytes -= flow.remaining_bytes
        self._set(line.group)
        return flow.remaining_bytes

    def set_share(self, source: str, target: str, share: float) -> None:
        """The link carries this share of what it carried; transfers on their way wait where it is 0."""
        line = self.lines[source, target]
        self._settle(line.group)
        line.share = share
        self._set(line.group)

    def _free(self, flow: Flow) -> None:
        line = flow.line
        if not line.free:
            line.each_bytes = line.marks_sum = 0.0
        mark = line.each_bytes + flow.remaining_bytes
        line.marks_sum += mark
        heappush(line.free, (mark, flow.number, flow))

    def _settle(self, group: _Group) -> None:
        for line in group.lines:
            line.advance(self._events.now_s)

    def _set(self, group: _Group) -> None:
        group.rates()
        for line in group.lines:
            line.version += 1
            if line.free and line.free_rate > 0:
                left_s = (line.free[0][0] - line.each_bytes) / line.free_rate
                self._events.at(self._events.now_s + left_s, self._arrived, (line, line.version))

    def _arrived(self, which: tuple[Line, int]) -> None:
        line, version = which
        if version != line.version:
            return
        self._settle(line.group)
        # Rates have not changed since the time was computed: the first is through, whatever rounding says.
        reached = line.free[0][0]
        line.delivered_bytes += (reached - line.each_bytes) * len(line.free)
        line.each_bytes = reached
        while line.free and line.free[0][0] <= reached + _NOTHING_BYTES:
            mark, _, flow = heappop(line.free)
            line.delivered_bytes += mark - reached
            line.marks_sum -= mark
            self._events.at(self._events.now_s + line.round_trip_s, flow.done, flow.argument)
        self._set(line.group)
