"""What the parts of a deployment can do, and how requests divide over them at the largest rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.schedule.link_rate import loss_limited_bytes_per_s
from kvstore.schedule.planning.linear import maximize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.plan import Traffic

_BUSY_COST, _BYTES_COST = 1e-6, 1e-9
"""How little the busiest prefill, and bytes, count against the rate: they only decide between divisions that serve the
same."""
_NOTHING = 1e-12


@dataclass(frozen=True)
class BandLoad:
    """What one request of a band costs each of its clusters, by the cluster's number.

    Attributes:
        share: of all requests.
    """

    share: float
    prefill_s: Mapping[int, float]
    request_bytes: Mapping[int, float]


@dataclass(frozen=True)
class FlowRate:
    """Requests of a band from one cluster's prefill to one cluster's decode, by number."""

    band: int
    prefill: int
    decode: int
    requests_per_s: float


@dataclass(frozen=True)
class Capacity:
    """What the parts of a deployment can do, by the cluster's number.

    Attributes:
        decode_instance_requests_per_s: of one decode instance that is full.
        links: bytes per second from one cluster to another, loss considered.
        egress, ingress: bytes per second; infinite where there is no limit.
        moves: bytes that come to the second cluster from the first for each request that it prefills.
    """

    names: tuple[str, ...]
    prefill_instances: tuple[int, ...]
    decode_instances: tuple[int, ...]
    decode_instance_requests_per_s: tuple[float, ...]
    links: Mapping[tuple[int, int], float]
    egress: tuple[float, ...]
    ingress: tuple[float, ...]
    moves: Mapping[tuple[int, int], float]

    @classmethod
    def of(cls, deployment: Deployment, traffic: Traffic) -> Capacity:
        """Of this deployment under this traffic.

        Raises:
            DeploymentError: a move names a cluster that is not there.
            PlanError: a prefix is to move where there is no link.
        """
        clusters = deployment.clusters
        numbers = {cluster.name: number for number, cluster in enumerate(clusters)}
        return cls(
            names=tuple(numbers),
            prefill_instances=tuple(cluster.prefill_instances for cluster in clusters),
            decode_instances=tuple(cluster.decode_instances for cluster in clusters),
            decode_instance_requests_per_s=tuple(
                cluster.profile.decode_requests_per_s(traffic.output_tokens) for cluster in clusters
            ),
            links={
                (numbers[link.source], numbers[link.target]): loss_limited_bytes_per_s(link)
                for link in deployment.links
            },
            egress=tuple(inf if each.egress_bytes_per_s is None else each.egress_bytes_per_s for each in clusters),
            ingress=tuple(inf if each.ingress_bytes_per_s is None else each.ingress_bytes_per_s for each in clusters),
            moves=_moves(deployment, traffic, numbers),
        )

    @cached_property
    def decode_requests_per_s(self) -> tuple[float, ...]:
        """Of all decode instances of a cluster together."""
        return tuple(
            instances * each
            for instances, each in zip(self.decode_instances, self.decode_instance_requests_per_s, strict=True)
        )

    def divided(self, prefill_instances: tuple[int, ...], decode_instances: tuple[int, ...]) -> Capacity:
        """With the instances divided so."""
        return replace(self, prefill_instances=prefill_instances, decode_instances=decode_instances)

    def targets(self, prefill: int) -> list[int]:
        """Clusters that may decode what this one prefills: itself, and those that a link leads to."""
        return [
            number
            for number, rate in enumerate(self.decode_requests_per_s)
            if rate > 0 and (number == prefill or (prefill, number) in self.links)
        ]

    def crossing(self, load: BandLoad, prefill: int, decode: int) -> Iterator[tuple[int, int, float]]:
        """Source, target and bytes of everything that crosses for one request."""
        if prefill != decode:
            yield prefill, decode, load.request_bytes[prefill]
        for (source, target), request_bytes in self.moves.items():
            if target == prefill:
                yield source, target, request_bytes

    def limits(
        self, loads: Sequence[BandLoad], rate: float, flows: Sequence[FlowRate]
    ) -> Iterator[tuple[str, float, float]]:
        """Name, share of all requests that load it, and what it could serve of them, for every part."""
        if rate <= 0:
            return
        clusters = range(len(self.names))
        seconds, prefilled, decoded = ([0.0] * len(clusters) for _ in range(3))
        crossed: dict[tuple[int, int], tuple[float, float]] = {}
        for flow in flows:
            load = loads[flow.band]
            seconds[flow.prefill] += flow.requests_per_s * load.prefill_s[flow.prefill]
            prefilled[flow.prefill] += flow.requests_per_s
            decoded[flow.decode] += flow.requests_per_s
            for source, target, request_bytes in self.crossing(load, flow.prefill, flow.decode):
                requests, so_far = crossed.get((source, target), (0.0, 0.0))
                crossed[source, target] = requests + flow.requests_per_s, so_far + flow.requests_per_s * request_bytes
        for number in clusters:
            if seconds[number] > 0:
                limit = self.prefill_instances[number] * prefilled[number] / seconds[number]
                yield f"prefill of {self.names[number]}", prefilled[number] / rate, limit
        for number in clusters:
            if decoded[number] > 0:
                yield f"decode of {self.names[number]}", decoded[number] / rate, self.decode_requests_per_s[number]
        for (source, target), (requests, sent) in crossed.items():
            if sent > 0:
                limit = self.links[source, target] * requests / sent
                yield f"link {self.names[source]} to {self.names[target]}", requests / rate, limit
        for side, what, limits in ((0, "egress", self.egress), (1, "ingress", self.ingress)):
            for number in clusters:
                both = [each for pair, each in crossed.items() if pair[side] == number]
                requests, sent = sum(each[0] for each in both), sum(each[1] for each in both)
                if sent > 0 and limits[number] < inf:
                    yield f"{what} of {self.names[number]}", requests / rate, limits[number] * requests / sent


def best_flows(capacity: Capacity, loads: Sequence[BandLoad]) -> tuple[float, tuple[FlowRate, ...]]:
    """The largest rate of all requests together, and how they then divide; 0 where a band cannot be served."""
    pairs = [
        (number, prefill, decode)
        for number, load in enumerate(loads)
        if load.share > 0
        for prefill in load.prefill_s
        if capacity.prefill_instances[prefill] > 0
        for decode in capacity.targets(prefill)
    ]
    bands = {number for number, _, _ in pairs}
    if any(load.share > 0 and number not in bands for number, load in enumerate(loads)):
        return 0.0, ()
    if len(pairs) == len(bands):
        return _only_flows(capacity, loads, pairs)
    # Columns: the rate, the share that the busiest prefill is used, and the flow of each pair. Flows are counted in
    # units of a rate that nothing exceeds, so that entries are near 1.
    unit = sum(capacity.decode_requests_per_s)
    matrix, limits = _rows(capacity, loads, pairs, unit)
    sent = np.array([sum(each[2] for each in capacity.crossing(loads[b], i, j)) for b, i, j in pairs])
    gain = np.concatenate(([1.0, -_BUSY_COST], -_BYTES_COST * sent / max(sent.max(), 1.0)))
    sizes = np.abs(matrix).max(axis=1)
    solution = maximize(gain, matrix / sizes[:, None], limits / sizes) * unit
    rate = float(solution[0])
    served = [0.0] * len(loads)
    for (number, _, _), each in zip(pairs, solution[2:], strict=True):
        served[number] += float(each)
    # A row asks that a band is served, not that it is served just once: more may cost nothing where nothing crosses.
    flows = tuple(
        FlowRate(*pair, float(each) * (rate * loads[pair[0]].share / served[pair[0]]))
        for pair, each in zip(pairs, solution[2:], strict=True)
        if each > _NOTHING * max(rate, _NOTHING)
    )
    return rate, flows


def _rows(
    capacity: Capacity, loads: Sequence[BandLoad], pairs: Sequence[tuple[int, int, int]], unit: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bands are served, nothing has more to do than it can, and no prefill more than the busiest one."""
    by_part: dict[tuple[str, int, int], list[float]] = {("busiest", 0, 0): [0.0, 1.0] + [0.0] * len(pairs)}

    def load_part(part: tuple[str, int, int], limit: float, column: int, each: float) -> None:
        if limit < inf:
            by_part.setdefault(part, [0.0] * (2 + len(pairs)))[column] += each * unit / limit

    for column, (number, prefill, decode) in enumerate(pairs, start=2):
        load = loads[number]
        by_part.setdefault(("band", number, 0), [load.share, 0.0] + [0.0] * len(pairs))[column] = -1.0
        load_part(("prefill", prefill, 0), capacity.prefill_instances[prefill], column, load.prefill_s[prefill])
        by_part["prefill", prefill, 0][1] = -1.0
        load_part(("decode", decode, 0), capacity.decode_requests_per_s[decode], column, 1.0)
        for source, target, request_bytes in capacity.crossing(load, prefill, decode):
            load_part(("link", source, target), capacity.links[source, target], column, request_bytes)
            load_part(("egress", source, 0), capacity.egress[source], column, request_bytes)
            load_part(("ingress", target, 0), capacity.ingress[target], column, request_bytes)
    limits = [0.0 if kind in ("band", "prefill") else 1.0 for kind, _, _ in by_part]
    loaded = [(row, limit) for row, limit in zip(by_part.values(), limits, strict=True) if any(row)]
    return np.array([row for row, _ in loaded]), np.array([limit for _, limit in loaded])


def _only_flows(
    capacity: Capacity, loads: Sequence[BandLoad], pairs: Sequence[tuple[int, int, int]]
) -> tuple[float, tuple[FlowRate, ...]]:
    """Where each band has one way only, nothing divides: the rate is the least of limit / share."""
    unit = [FlowRate(*pair, loads[pair[0]].share) for pair in pairs]
    rate = min(limit / share for _, share, limit in capacity.limits(loads, 1.0, unit))
    return rate, tuple(FlowRate(flow.band, flow.prefill, flow.decode, flow.requests_per_s * rate) for flow in unit)


def _moves(deployment: Deployment, traffic: Traffic, numbers: Mapping[str, int]) -> dict[tuple[int, int], float]:
    moves: dict[tuple[int, int], float] = {}
    for move in traffic.moves:
        source, target = deployment.cluster(move.source), deployment.cluster(move.target)
        if deployment.link(move.source, move.target) is None:
            raise PlanError(
                f"a prefix is to move from {source.name!r} to {target.name!r}, and no link leads there; add one, or "
                "leave the move out"
            )
        pair = numbers[source.name], numbers[target.name]
        moves[pair] = moves.get(pair, 0.0) + move.request_bytes
    return moves
