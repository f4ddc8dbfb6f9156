"""What a plan serves at most, and which part of the deployment ends it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from kvstore.errors import PlanError
from kvstore.schedule.planning.capacity import BandLoad, Capacity, best_flows
from kvstore.schedule.planning.plan import divided

if TYPE_CHECKING:
    from kvstore.profile import Curve, KvSize
    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.plan import Band, Convention, Plan, Traffic
    from kvstore.schedule.prefill_service import ChunkedCurve

_BINDS = 1 - 1e-9


@dataclass(frozen=True)
class Part:
    """One thing that limits the rate.

    Attributes:
        name: `prefill of a`, `decode of a`, `link a to b`, `egress of a`, `ingress of a`.
        share: of all requests, those that load it.
        requests_per_s: Θ: of those that load it, what it could serve if nothing else ended it.
        used_share: of what it can do, at the plan's rate; 1 where it is what ends the rate.
    """

    name: str
    share: float
    requests_per_s: float
    used_share: float


@dataclass(frozen=True)
class Flow:
    """Requests of one band between the cluster that prefills them and the one that decodes them, at the plan's rate.

    Attributes:
        band: its number in the plan.
        prefill_s: T_prefill of one, by the convention.
        request_bytes: S_kv of one, by the convention; they cross a link where the clusters are two.
    """

    band: int
    prefill: str
    decode: str
    requests_per_s: float
    prefill_s: float
    request_bytes: float

    @property
    def crosses(self) -> bool:
        return self.prefill != self.decode

    @property
    def bytes_per_s(self) -> float:
        """On the link; 0 where there is none to cross."""
        return self.requests_per_s * self.request_bytes if self.crosses else 0.0


@dataclass(frozen=True)
class Throughput:
    """What a plan serves.

    Attributes:
        requests_per_s: Λ_max.
        parts: everything that something loads, in the order prefill, decode, links, egress, ingress.
        flows: how the requests then divide.
        shares: of the requests, by band.
        mean_tokens: E[L | band], by band; 0 where no request is in it.
        note: what the rate does not say: that the search for the plan left some untried, and a better one may exist.
    """

    plan: Plan
    convention: Convention
    requests_per_s: float
    parts: tuple[Part, ...]
    flows: tuple[Flow, ...]
    shares: tuple[float, ...]
    mean_tokens: tuple[float, ...]
    note: str = ""

    @property
    def binding(self) -> tuple[str, ...]:
        """Names of the parts that are full, and so end the rate."""
        return tuple(part.name for part in self.parts if part.used_share >= _BINDS)

    def part(self, name: str) -> Part:
        """The part of this name.

        Raises:
            PlanError: nothing of this plan loads it.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise PlanError(f"nothing loads {name!r}; this plan loads {', '.join(part.name for part in self.parts)}")

    def link_bytes_per_s(self, source: str | None = None, target: str | None = None) -> float:
        """Hand-overs that cross from `source` to `target` at the plan's rate; None stands for any cluster."""
        return sum(
            flow.bytes_per_s for flow in self.flows if source in (None, flow.prefill) and target in (None, flow.decode)
        )


def throughput(deployment: Deployment, plan: Plan, traffic: Traffic, convention: Convention = "at-mean") -> Throughput:
    """The largest rate at which no part of the deployment has more to do than it can: Λ_max.

    For one prefill and one PD cluster this is the paper's min(Θ_prfaas / p, Θ_pd-p / (1 - p), Θ_pd-d). In general each
    band's requests may divide over its clusters and over those that decode; they divide as serves the rate best; of
    divisions that serve the same the one is taken that leaves the busiest prefill the most room, then the one that
    moves the least bytes (a linear program).

    Raises:
        PlanError: a band in which there are requests has nobody who could prefill it.
        DeploymentError: after the plan's splits nobody decodes, or a prefill cluster reaches nobody who does.
    """
    deployment = divided(deployment, plan.splits)
    names = [cluster.name for cluster in deployment.clusters]
    capacity = Capacity.of(deployment, traffic)
    shares = [traffic.lengths.share(band.above_tokens, band.upto_tokens) for band in plan.bands]
    loads = [
        _band_load(deployment, band, share, traffic, convention) for band, share in zip(plan.bands, shares, strict=True)
    ]
    for band, load in zip(plan.bands, loads, strict=True):
        _check_served(capacity, band, load)
    rate, flows = best_flows(capacity, loads)
    described = [(name, share, limit) for name, share, limit in capacity.limits(loads, rate, flows) if share > 0]
    return Throughput(
        plan=plan,
        convention=convention,
        requests_per_s=rate,
        parts=tuple(Part(name, share, limit, rate * share / limit) for name, share, limit in described),
        flows=tuple(
            Flow(flow.band, names[flow.prefill], names[flow.decode], flow.requests_per_s,
                 loads[flow.band].prefill_s[flow.prefill], loads[flow.band].request_bytes[flow.prefill])
            for flow in flows
        ),
        shares=tuple(shares),
        mean_tokens=tuple(
            traffic.lengths.mean(band.above_tokens, band.upto_tokens) if share > 0 else 0.0
            for band, share in zip(plan.bands, shares, strict=True)
        ),
    )  # fmt: skip


def band_prefill_s(
    prefill: Curve | ChunkedCurve, traffic: Traffic, above: float, upto: float, convention: Convention
) -> float:
    """T_prefill of a band by the convention: T(E[L | band]) or E[T(L) | band].

    Raises:
        PlanError: no request is in the band.
    """
    if convention == "at-mean":
        return prefill(traffic.lengths.mean(above, upto))
    return traffic.lengths.expected(prefill.many, above, upto)


def band_bytes(kv: KvSize, traffic: Traffic, above: float, upto: float, convention: Convention) -> float:
    """S_kv of a band by the convention: S(E[L | band]) or E[S(L) | band].

    Raises:
        PlanError: no request is in the band.
    """
    if convention == "at-mean":
        return kv.total_bytes(traffic.lengths.mean(above, upto))
    return traffic.lengths.expected(kv.many, above, upto)


def _band_load(deployment: Deployment, band: Band, share: float, traffic: Traffic, convention: Convention) -> BandLoad:
    if share <= 0:
        return BandLoad(0.0, {}, {})
    numbers = {cluster.name: number for number, cluster in enumerate(deployment.clusters)}
    prefill_s, request_bytes = {}, {}
    for name in band.clusters:
        profile = deployment.cluster(name).profile
        number = numbers[name]
        curve = deployment.prefill_service.curve(profile)
        prefill_s[number] = band_prefill_s(curve, traffic, band.above_tokens, band.upto_tokens, convention)
        request_bytes[number] = band_bytes(profile.kv, traffic, band.above_tokens, band.upto_tokens, convention)
    return BandLoad(share, prefill_s, request_bytes)


def _check_served(capacity: Capacity, band: Band, load: BandLoad) -> None:
    if load.share <= 0:
        return
    names = ", ".join(band.clusters)
    end = "" if band.upto_tokens == inf else f" up to {band.upto_tokens:g}"
    what = f"prompts above {band.above_tokens:g}{end} tokens ({load.share:.1%} of all)"
    if not any(capacity.prefill_instances[number] for number in load.prefill_s):
        raise PlanError(
            f"nobody prefills {what}: {names} has no prefill instances; give it some, or move the threshold"
        )
