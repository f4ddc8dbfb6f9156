"""Time to first token and per output token under a load below the limit, from closed forms.

What is left out of the throughput model: requests come at random (Poisson), so they queue. The sum is that of the
simulator: queue, moving a prefix, prefill, the part of the hand-over that prefill does not hide, and waiting for a
place in a decode batch. Service times are always those of each length here, whatever convention the plan was made by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.schedule.link_rate import loss_limited_bytes_per_s
from kvstore.schedule.planning.decoding import DecodeLoad
from kvstore.schedule.planning.plan import divided
from kvstore.schedule.planning.queueing import Waiting, mgc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kvstore.schedule.deployment import Cluster, Deployment, Slo
    from kvstore.schedule.planning.lengths import VectorFunction
    from kvstore.schedule.planning.plan import Band, Traffic
    from kvstore.schedule.planning.throughput import Throughput

_QUANTILE_STEPS = 60


@dataclass(frozen=True)
class _Way:
    """One flow of the plan, and what its requests meet."""

    share: float
    band: Band
    prefill: Cluster
    decode: Cluster
    prefill_s: VectorFunction
    link: tuple[str, str] | None
    round_trip_s: float


@dataclass(frozen=True)
class WayLatency:
    """What the requests of one flow wait for, in seconds; means over all of them.

    Attributes:
        share: of all requests.
        transfer_s: of the hand-over, what prefill does not hide.
    """

    share: float
    prefill: str
    decode: str
    queue: Waiting
    prefix_s: float
    prefill_s: float
    transfer_s: float
    decode_load: DecodeLoad

    @property
    def ttft_s(self) -> float:
        return self.queue.mean_s + self.prefix_s + self.prefill_s + self.transfer_s + self.decode_load.wait_s


class LoadedPlan:
    """A plan, prepared to be asked for its latency at any rate. Immutable; any thread may ask.

    Args:
        planned: its flows say how requests divide, at any rate.
    """

    def __init__(self, deployment: Deployment, planned: Throughput, traffic: Traffic) -> None:
        if planned.requests_per_s <= 0:
            raise PlanError("a plan that serves nothing has no latency")
        self.traffic = traffic
        deployment = divided(deployment, planned.plan.splits)
        self._ways = tuple(
            _Way(
                flow.requests_per_s / planned.requests_per_s,
                planned.plan.bands[flow.band],
                deployment.cluster(flow.prefill),
                deployment.cluster(flow.decode),
                deployment.prefill_service.curve(deployment.cluster(flow.prefill).profile).many,
                (flow.prefill, flow.decode) if flow.crosses else None,
                _round_trip_s(deployment, flow.prefill, flow.decode),
            )
            for flow in planned.flows
        )
        self._moments = {way.prefill.name: _moments(way.prefill_s, traffic, way.band) for way in self._ways}
        self._prefilled = _sums((way.prefill.name, way.share) for way in self._ways)
        self._decoded = _sums((way.decode.name, way.share) for way in self._ways)
        self._deployment = deployment
        self._sent_bytes = self._bytes_per_request()
        self.stable_requests_per_s = min(
            *(
                deployment.cluster(name).prefill_instances / (share * self._moments[name][0])
                for name, share in self._prefilled.items()
            ),
            *(
                cluster.decode_instances * cluster.profile.decode_requests_per_s(traffic.output_tokens) / share
                for cluster, share in ((deployment.cluster(name), share) for name, share in self._decoded.items())
            ),
            *(limit / sent for limit, sent in self._sent_bytes.values()),
        )
        """The rate below which no queue grows without end: Λ_max by the convention `mean`, for this division."""

    def at(self, requests_per_s: float) -> Latency:
        """Under this rate.

        Raises:
            PlanError: the load is unstable.
        """
        if not 0 <= requests_per_s < self.stable_requests_per_s:
            raise PlanError(
                f"the load is unstable: this plan is stable below {self.stable_requests_per_s:.4g} requests/s, and "
                f"{requests_per_s:.4g} come; lower the rate, or plan for more instances"
            )
        queues = {
            name: mgc(requests_per_s * share, *self._moments[name], self._deployment.cluster(name).prefill_instances)
            for name, share in self._prefilled.items()
        }
        decoding = {
            name: DecodeLoad.of(cluster.profile, cluster.decode_instances, requests_per_s * share,
                                self.traffic.output_tokens)
            for name, share, cluster in (
                (name, share, self._deployment.cluster(name)) for name, share in self._decoded.items()
            )
        }  # fmt: skip
        available = {pair: limit - requests_per_s * sent for pair, (limit, sent) in self._sent_bytes.items()}
        return Latency(self.traffic, self._deployment, requests_per_s, self._ways, queues, decoding, available)

    def good_share(self, requests_per_s: float, slo: Slo) -> float:
        """Of the requests at this rate, those that meet both limits; 0 where the load is unstable."""
        if requests_per_s >= self.stable_requests_per_s:
            return 0.0
        return self.at(requests_per_s).good_share(slo)

    def _bytes_per_request(self) -> dict[tuple[str, str], tuple[float, float]]:
        """By link: bytes per second that it carries at most, and bytes that it carries for each request of all."""
        sent: dict[tuple[str, str], float] = {}
        for way in self._ways:
            if way.link is not None:
                mean = self.traffic.lengths.expected(
                    way.prefill.profile.kv.many, way.band.above_tokens, way.band.upto_tokens
                )
                sent[way.link] = sent.get(way.link, 0.0) + way.share * mean
            for move in self.traffic.moves:
                if move.target == way.prefill.name and move.request_bytes > 0:
                    pair = move.source, move.target
                    sent[pair] = sent.get(pair, 0.0) + way.share * move.request_bytes
        leaving = _sums((source, each) for (source, _), each in sent.items())
        entering = _sums((target, each) for (_, target), each in sent.items())
        return {
            (source, target): (
                min(
                    _link_bytes_per_s(self._deployment, source, target),
                    (self._deployment.cluster(source).egress_bytes_per_s or inf) * each / leaving[source],
                    (self._deployment.cluster(target).ingress_bytes_per_s or inf) * each / entering[target],
                ),
                each,
            )
            for (source, target), each in sent.items()
        }


@dataclass(frozen=True)
class Latency:
    """What requests meet at one rate."""

    traffic: Traffic
    deployment: Deployment
    requests_per_s: float
    _ways: tuple[_Way, ...]
    _queues: Mapping[str, Waiting]
    _decoding: Mapping[str, DecodeLoad]
    _available: Mapping[tuple[str, str], float]

    @property
    def ways(self) -> tuple[WayLatency, ...]:
        """Where the time goes, by flow."""
        return tuple(
            WayLatency(
                share=way.share,
                prefill=way.prefill.name,
                decode=way.decode.name,
                queue=self._queues[way.prefill.name],
                prefix_s=self._prefix_s(way),
                prefill_s=self._mean(way, way.prefill_s),
                transfer_s=self._mean(way, partial(self._exposed_s, way)),
                decode_load=self._decoding[way.decode.name],
            )
            for way in self._ways
        )

    @property
    def ttft_mean_s(self) -> float:
        """Mean time to first token, of all requests."""
        return sum(way.share * way.ttft_s for way in self.ways)

    def ttft_share(self, limit_s: float) -> float:
        """P(TTFT <= limit). Waiting for a decode place counts with its mean."""
        return sum(way.share * self._ttft_share(way, limit_s) for way in self._ways)

    def ttft_quantile_s(self, share: float) -> float:
        """The time to first token that this share of the requests does not exceed.

        Raises:
            PlanError: the share is not within 0 and 1, both excluded.
        """
        if not 0 < share < 1:
            raise PlanError(f"a quantile of TTFT is asked for by a share between 0 and 1, not {share}")
        low, high = 0.0, max(2 * self.ttft_mean_s, 1e-6)
        while self.ttft_share(high) < share:
            low, high = high, 2 * high
        for _ in range(_QUANTILE_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.ttft_share(middle) < share else (low, middle)
        return high

    @property
    def tpot_mean_s(self) -> float:
        """Mean time per output token, of all requests."""
        return sum(way.share * self._decoding[way.decode.name].tpot_mean_s for way in self._ways)

    def good_share(self, slo: Slo) -> float:
        """Of the requests, those that meet both limits, taken as independent of each other."""
        return sum(
            way.share * self._ttft_share(way, slo.ttft_s) * self._decoding[way.decode.name].tpot_share(slo.tpot_s)
            for way in self._ways
        )

    def _ttft_share(self, way: _Way, limit_s: float) -> float:
        queue, decoding = self._queues[way.prefill.name], self._decoding[way.decode.name]
        fixed_s = self._prefix_s(way) + decoding.wait_s

        def in_time(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
            left_s = limit_s - fixed_s - way.prefill_s(tokens) - self._exposed_s(way, tokens)
            late = np.zeros_like(left_s)
            if queue.mean_s > 0:
                late = queue.waits_share * np.exp(-np.maximum(left_s, 0.0) * queue.waits_share / queue.mean_s)
            return np.where(left_s < 0, 0.0, 1 - late)

        return self._mean(way, in_time)

    def _exposed_s(self, way: _Way, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Round trip + max(H / rate, S / rate - T): layers leave while later ones compute; others take their share.

        H are the bytes that prefill holds back to its end: none, or states where it is chunked.
        """
        if way.link is None:
            return np.zeros_like(tokens)
        kv, bytes_per_s = way.prefill.profile.kv, self._available[way.link]
        held_s = self.deployment.prefill_service.held_bytes(kv, tokens) / bytes_per_s
        return way.round_trip_s + np.maximum(kv.many(tokens) / bytes_per_s - way.prefill_s(tokens), held_s)

    def _prefix_s(self, way: _Way) -> float:
        return sum(
            _round_trip_s(self.deployment, move.source, move.target)
            + move.request_bytes / self._available[move.source, move.target]
            for move in self.traffic.moves
            if move.target == way.prefill.name and move.request_bytes > 0
        )

    def _mean(self, way: _Way, function: VectorFunction) -> float:
        return self.traffic.lengths.expected(function, way.band.above_tokens, way.band.upto_tokens)


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, each in pairs:
        sums[name] = sums.get(name, 0.0) + each
    return sums


def _moments(prefill_s: VectorFunction, traffic: Traffic, band: Band) -> tuple[float, float]:
    """E[T] and E[T²] of a band."""
    lengths, limits = traffic.lengths, (band.above_tokens, band.upto_tokens)
    return (
        lengths.expected(prefill_s, *limits),
        lengths.expected(lambda tokens: prefill_s(tokens) ** 2, *limits),
    )


def _round_trip_s(deployment: Deployment, source: str, target: str) -> float:
    link = deployment.link(source, target)
    return link.round_trip_s if link is not None else 0.0


def _link_bytes_per_s(deployment: Deployment, source: str, target: str) -> float:
    link = deployment.link(source, target)
    if link is None:
        raise PlanError(f"the plan sends from {source!r} to {target!r}, and no link leads there")
    return loss_limited_bytes_per_s(link)
