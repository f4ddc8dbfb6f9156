"""Long term: converting instances between prefill and decode, and thresholds that fit what comes.

Every so often the division of instances as it is, and those with one instance converted, are put to the planner with
the traffic of the last minutes. What the present one fails to serve and another would have served adds up; an instance
is converted when that has become as much as it costs to convert one there and back. This is the rule for renting or
buying when nobody knows the future (Borodin, Linial, Saks 1992): it never loses more than a small multiple of what
somebody who knows it would lose, and traffic that goes to and fro faster than a conversion pays converts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import islice
from math import exp, isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.errors import DeploymentError, PlanError
from kvstore.limits import RECENT_LENGTHS_MAX
from kvstore.schedule.deployment import Deployment
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.optimum import best_plan
from kvstore.schedule.planning.plan import Plan, Traffic
from kvstore.schedule.planning.throughput import throughput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.planning.throughput import Throughput
    from kvstore.schedule.policies.policy import Route
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

Role: TypeAlias = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Conversion:
    """One instance of a cluster gives up one role for the other; it has neither for `Cluster.conversion_s`."""

    cluster: str
    source: Role
    target: Role


@dataclass(frozen=True, slots=True)
class ConversionCandidate:
    """A conversion that was considered.

    Attributes:
        requests_per_s: what the deployment could serve after it.
        missed_requests: that were lost for not having done it, less those that it would have lost, and those forgotten.
        cost_requests: that doing it and undoing it would lose.
    """

    conversion: Conversion
    requests_per_s: float
    missed_requests: float
    cost_requests: float


@dataclass(frozen=True, slots=True)
class ConversionExplanation:
    """Why an instance is converted, or none.

    Attributes:
        rule: what decided, in a few words, with the numbers that were compared.
        rate_per_s: at which requests came, over the last minutes.
        requests_per_s: what the present division could serve.
        binding: the parts that end it.
        candidates: the most missed first.
    """

    rule: str
    rate_per_s: float = 0.0
    requests_per_s: float = 0.0
    binding: tuple[str, ...] = ()
    candidates: tuple[ConversionCandidate, ...] = ()


@dataclass(frozen=True, slots=True)
class LongTermDecision:
    """What to change for the minutes to come.

    Attributes:
        conversion: to begin now; None for none.
        plan: who prefills which lengths, for the present division; None before any traffic was seen.
    """

    conversion: Conversion | None
    plan: Plan | None
    explanation: ConversionExplanation


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A conversion that has begun.

    Attributes:
        instances: of the cluster, with either role, before it began.
        least_s: the earliest moment at which it can have ended.
        most_s: from when on it is not waited for.
    """

    conversion: Conversion
    instances: int
    least_s: float
    most_s: float

    def has_ended(self, snapshot: Snapshot) -> bool:
        state = snapshot.clusters.get(self.conversion.cluster)
        present = state.prefill_instances + state.decode_instances if state is not None else 0
        return snapshot.now_s >= self.least_s and (present >= self.instances or snapshot.now_s >= self.most_s)


@dataclass(frozen=True, slots=True)
class ConversionMemory:
    """Recent traffic, what was missed, and what follows. Sums decay, so that old traffic is forgotten."""

    uncached_tokens: tuple[int, ...] = ()
    arrived: int = 0
    output_tokens: float = 0.0
    requests_sum: float = 0.0
    output_tokens_sum: float = 0.0
    seconds_sum: float = 0.0
    observed_s: float | None = None
    reviewed_s: float | None = None
    under_way: _UnderWay | None = None
    missed: Mapping[Conversion, float] = field(default_factory=dict)
    decision: LongTermDecision = LongTermDecision(None, None, ConversionExplanation("nothing was reviewed yet"))


@dataclass(frozen=True)
class ConversionPolicy:
    """Decides on conversions in clusters that are `convertible`, one at a time. Pure; any thread may call.

    A caller tells of each request that comes (`arrived`), lets it `observe`, and does what `decide` says; once it has
    begun a conversion it says so (`converted`).

    Attributes:
        deployment: clusters and links; how many instances have which role is taken from snapshots.
        window_s: over how long traffic is remembered, and after which what was missed counts for 1 / e.
        review_s: how often divisions are compared.
        headroom: the share of what a division could serve that it is relied upon for; queues grow long before 1.
        band: what another division or other thresholds would serve more, as a share, is noise up to this.

    Raises:
        PlanError: a number is out of its limits.
    """

    deployment: Deployment
    window_s: float = 300.0
    review_s: float = 30.0
    headroom: float = 0.85
    band: float = 0.05

    def __post_init__(self) -> None:
        for what in ("window_s", "review_s"):
            if not (isfinite(getattr(self, what)) and getattr(self, what) > 0):
                raise PlanError(f"{what}={getattr(self, what)} must be positive and finite")
        if not 0 < self.headroom <= 1 or not 0 <= self.band < 1:
            raise PlanError(f"headroom={self.headroom} must be within (0, 1], band={self.band} within [0, 1)")

    def begin(self) -> ConversionMemory:
        return ConversionMemory()

    def arrived(self, memory: ConversionMemory, request: RoutingRequest, route: Route | None) -> ConversionMemory:
        """Notes a request that came, whether it was admitted or not.

        Args:
            route: that was chosen; its resume point says what need not be computed. None: all must be.
        """
        resume_tokens = route.resume_tokens if route is not None else 0
        tokens = max(request.prompt_tokens - resume_tokens, 1)
        recent = (*memory.uncached_tokens[-(RECENT_LENGTHS_MAX - 1) :], tokens)
        return replace(
            memory,
            uncached_tokens=recent,
            arrived=memory.arrived + 1,
            output_tokens=memory.output_tokens + request.output_tokens,
        )

    def observe(self, memory: ConversionMemory, snapshot: Snapshot) -> ConversionMemory:
        """What to remember after a look at the system; every second or so, though divisions are compared less often."""
        now_s = snapshot.now_s
        elapsed_s = max(now_s - memory.observed_s, 0.0) if memory.observed_s is not None else 0.0
        kept = exp(-elapsed_s / self.window_s)
        memory = replace(
            memory,
            arrived=0 if elapsed_s else memory.arrived,
            output_tokens=0.0 if elapsed_s else memory.output_tokens,
            requests_sum=memory.requests_sum * kept + (memory.arrived if elapsed_s else 0),
            output_tokens_sum=memory.output_tokens_sum * kept + (memory.output_tokens if elapsed_s else 0),
            seconds_sum=memory.seconds_sum * kept + elapsed_s,
            observed_s=now_s,
        )
        if memory.under_way is not None:
            is_over = memory.under_way.has_ended(snapshot)
            return replace(memory, reviewed_s=now_s, under_way=None if is_over else memory.under_way)
        if memory.reviewed_s is None:
            return replace(memory, reviewed_s=now_s)
        if now_s - memory.reviewed_s < self.review_s or not memory.uncached_tokens or memory.requests_sum <= 0:
            return memory
        return self._reviewed(memory, snapshot, now_s - memory.reviewed_s)

    def decide(self, memory: ConversionMemory) -> LongTermDecision:
        """The outcome of the latest review."""
        return memory.decision

    def converted(self, memory: ConversionMemory, snapshot: Snapshot, conversion: Conversion) -> ConversionMemory:
        """What to remember when a conversion has begun: none other begins before it has ended and one review after.

        An instance ends what it is at first, for as long as that takes. It is waited for until the cluster has as many
        instances as before, or, where one was lost meanwhile, for `window_s` beyond the conversion's own time.
        """
        least_s = snapshot.now_s + self.deployment.cluster(conversion.cluster).conversion_s
        state = snapshot.clusters[conversion.cluster]
        instances = state.prefill_instances + state.decode_instances
        why = ConversionExplanation(
            f"{conversion.cluster!r} converts a {conversion.source} instance, begun at {snapshot.now_s:.6g} s"
        )
        return replace(
            memory,
            under_way=_UnderWay(conversion, instances, least_s, least_s + self.window_s),
            missed={},
            decision=replace(memory.decision, conversion=None, explanation=why),
        )

    def _reviewed(self, memory: ConversionMemory, snapshot: Snapshot, elapsed_s: float) -> ConversionMemory:
        traffic = Traffic(PointMasses(memory.uncached_tokens), max(memory.output_tokens_sum / memory.requests_sum, 1.0))
        rate_per_s = memory.requests_sum / memory.seconds_sum
        present = _divided(self.deployment, snapshot)
        found = _best(present, traffic) if present is not None else None
        if present is None or found is None:
            why = ConversionExplanation(
                "the instances that work cannot serve what comes, however it is routed", rate_per_s
            )
            decision = LongTermDecision(None, memory.decision.plan, why)
            return replace(memory, reviewed_s=snapshot.now_s, decision=decision)
        plan = self._kept_plan(memory.decision.plan, present, traffic, found)
        served = min(rate_per_s, found.requests_per_s * self.headroom)
        # A division that serves what comes with room to spare misses nothing, whatever another could serve.
        candidates = []
        missed: dict[Conversion, float] = {}
        kept = exp(-elapsed_s / self.window_s)
        for conversion, after, meanwhile in _conversions(present) if served < rate_per_s else ():
            other = _best(after, traffic)
            if other is None:
                continue
            gained = min(rate_per_s, other.requests_per_s * self.headroom) - served
            amount = memory.missed.get(conversion, 0.0)
            amount = amount * kept if abs(gained) <= self.band * served else max(amount + gained * elapsed_s, 0.0)
            if amount > 0:
                missed[conversion] = amount
                cost = self._cost_requests(conversion, meanwhile, traffic, rate_per_s, served)
                candidates.append(ConversionCandidate(conversion, other.requests_per_s, amount, cost))
        if served >= rate_per_s:
            missed = {conversion: amount * kept for conversion, amount in memory.missed.items()}
        candidates.sort(key=lambda each: each.missed_requests / each.cost_requests, reverse=True)
        chosen, rule = (
            None,
            f"{rate_per_s:.3g}/s come, {found.requests_per_s * self.headroom:.3g}/s can be served with headroom",
        )
        if candidates:
            first = candidates[0]
            is_due = first.missed_requests >= first.cost_requests
            chosen = first.conversion if is_due else None
            rule = (
                f"{first.missed_requests:.4g} requests were missed, and {first.cost_requests:.4g} is what converting "
                f"one {first.conversion.source} instance of {first.conversion.cluster!r} there and back costs"
            )
        why = ConversionExplanation(rule, rate_per_s, found.requests_per_s, found.binding, tuple(candidates))
        return replace(memory, reviewed_s=snapshot.now_s, missed=missed, decision=LongTermDecision(chosen, plan, why))

    def _kept_plan(self, before: Plan | None, present: Deployment, traffic: Traffic, best: Throughput) -> Plan:
        """The bands as they were, unless the best ones serve more by `band`."""
        if before is not None:
            try:
                kept = throughput(present, before, traffic, "mean").requests_per_s
            except (PlanError, DeploymentError):
                # The clusters that it names do not prefill any more.
                kept = 0.0
            if kept >= best.requests_per_s * (1 - self.band):
                return before
        return best.plan

    def _cost_requests(
        self,
        conversion: Conversion,
        meanwhile: Deployment | None,
        traffic: Traffic,
        rate_per_s: float,
        served_per_s: float,
    ) -> float:
        """What is lost while the instance has no role, there and back; at least its share of what comes."""
        found = _best(meanwhile, traffic) if meanwhile is not None else None
        left_per_s = min(rate_per_s, found.requests_per_s * self.headroom) if found is not None else 0.0
        share_per_s = rate_per_s / sum(cluster.instances for cluster in self.deployment.clusters)
        lost_per_s = max(served_per_s - left_per_s, share_per_s)
        return 2 * lost_per_s * max(self.deployment.cluster(conversion.cluster).conversion_s, 1.0)


def _best(deployment: Deployment, traffic: Traffic) -> Throughput | None:
    """The best thresholds for this division; None where it serves nothing."""
    try:
        return best_plan(deployment, traffic, "mean", free=(), thresholds_max=24)
    except PlanError:
        return None


def _divided(deployment: Deployment, snapshot: Snapshot) -> Deployment | None:
    """The deployment with the instances that work, without clusters and links that do not; None if nobody serves."""
    clusters = []
    for cluster in deployment.clusters:
        state = snapshot.clusters.get(cluster.name)
        if state is not None and state.prefill_instances + state.decode_instances > 0:
            clusters.append(
                replace(cluster, prefill_instances=state.prefill_instances, decode_instances=state.decode_instances)
            )
    names = {cluster.name for cluster in clusters}
    links = []
    for link in deployment.links:
        seen = snapshot.links.get((link.source, link.target))
        if seen is not None and seen.bytes_per_s > 0 and {link.source, link.target} <= names:
            links.append(replace(link, bytes_per_s=seen.bytes_per_s))
    try:
        return Deployment(tuple(clusters), tuple(links), snapshot.prefill_service)
    except DeploymentError:
        return None


def _conversions(present: Deployment) -> list[tuple[Conversion, Deployment, Deployment | None]]:
    """Each conversion of one instance, the deployment after it, and without the instance; no role loses its last."""
    found = []
    for number, cluster in enumerate(present.clusters):
        roles: tuple[tuple[Role, Role, int, int], ...] = (("prefill", "decode", -1, 1), ("decode", "prefill", 1, -1))
        for source, target, prefill, decode in roles:
            has = cluster.prefill_instances if source == "prefill" else cluster.decode_instances
            into = cluster.decode_instances if source == "prefill" else cluster.prefill_instances
            if not cluster.convertible or has < 2 or into < 1:
                continue
            after = _with(present, number, prefill, decode)
            meanwhile = _with(present, number, min(prefill, 0), min(decode, 0))
            if after is not None:
                found.append((Conversion(cluster.name, source, target), after, meanwhile))
    return found


def _with(deployment: Deployment, number: int, prefill: int, decode: int) -> Deployment | None:
    cluster = deployment.clusters[number]
    changed = replace(
        cluster,
        prefill_instances=cluster.prefill_instances + prefill,
        decode_instances=cluster.decode_instances + decode,
    )
    clusters = (*islice(deployment.clusters, number), changed, *islice(deployment.clusters, number + 1, None))
    try:
        return replace(deployment, clusters=clusters)
    except DeploymentError:
        return None
