"""Early rejection: whoever would miss the limits is turned away before anybody works for them.

After Mooncake (Qin et al., arXiv 2407.00079, "Early Rejection Based on Prediction"). A request decodes only after its
prefill, so the decode load of this moment is the wrong one to judge by: it lags by a prefill, and admitting by it lets
the loads of prefill and decode swing against each other. Judged is the load predicted for the moment at which this
request's prefill will have ended: who decodes already and will not have ended, and who was admitted before and will
have come.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil, exp, floor, isfinite, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.errors import PlanError
from kvstore.limits import ADMITTED_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Slo
    from kvstore.schedule.policies.policy import Route
    from kvstore.schedule.policies.snapshot import ClusterState, RoutingRequest, Snapshot

LoadKind: TypeAlias = Literal["predicted", "present"]
_MEMORY_S = 60.0
"""Time constant of how many are admitted, and of how far plans were off."""
_SHARE_MAX = 0.999
"""Nobody could be admitted for certain."""
_LEADS_MAX = 64
"""Latest admissions that tell how many will overtake."""


@dataclass(frozen=True, slots=True)
class AdmissionExplanation:
    """What was predicted, against which limits.

    Attributes:
        rule: which limit decided, in a few words.
        load: `predicted` at `decode_from_s`, or `present`.
        decode_from_s: when its prefill and hand-over will have ended.
        decode_requests: that will decode with it then, itself included.
        decode_places: in all batches of the cluster.
        ttft_s, ttft_limit_s: with the wait for a place; and the limit.
        ttft_most_s: what it stays under with the probability that the objective asks for, by how far off
            plans were of late.
        tpot_s, tpot_limit_s: of a batch of that size; and the limit.
    """

    rule: str
    load: LoadKind
    decode_from_s: float
    decode_requests: float
    decode_places: int
    ttft_s: float
    ttft_most_s: float
    ttft_limit_s: float
    tpot_s: float
    tpot_limit_s: float


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a request is let in, and why."""

    is_admitted: bool
    explanation: AdmissionExplanation


@dataclass(frozen=True, slots=True)
class _Decoding:
    """What one cluster has to decode, as it was planned, and how far the plan was off.

    Attributes:
        ready_s: when the caches are there of all that were admitted and have not ended by plan, ascending.
        ends_s: when they end, ascending; as many.
        offset: how many more (or fewer) there were at `offset_s` than by plan, those unknown to the plan included.
        holding_s: mean time that a request keeps its place, of the latest ones.
        leads_s: from admission until the cache is there, of the latest ones.
        admitted: since `offset_s`.
        admitted_per_s: mean of the last minute.
        error_per_s: variance by which `offset` moved in a second.
    """

    ready_s: tuple[float, ...] = ()
    ends_s: tuple[float, ...] = ()
    offset: float = 0.0
    offset_s: float = 0.0
    holding_s: float = 0.0
    leads_s: tuple[float, ...] = ()
    admitted: int = 0
    admitted_per_s: float = 0.0
    error_per_s: float = 0.0

    def load(self, at_s: float, places: int, now_s: float) -> float:
        """How many will decode or wait for a place at this moment, as whoever is asked about now will find them."""
        # All that are not ready end later, so those that are ready less those that have ended are there.
        planned = bisect_right(self.ready_s, at_s) - bisect_right(self.ends_s, at_s)
        load = planned + self.offset + self.overtaking(at_s - now_s)
        if load < places and self.offset > 0:
            # While places are full who ends late makes all others late. Else those beyond the plan leave evenly.
            left = max(0.0, 1 - (at_s - self.offset_s) / self.holding_s) if self.holding_s > 0 else 0.0
            load -= self.offset * (1 - left)
        return max(0.0, load)

    def overtaking(self, lead_s: float) -> float:
        """How many that are still to be admitted will be ready before somebody who needs so long, and be there."""
        if not self.leads_s or self.admitted_per_s <= 0:
            return 0.0
        ahead_s = sum(min(max(lead_s - each_s, 0.0), self.holding_s) for each_s in self.leads_s)
        return self.admitted_per_s * ahead_s / len(self.leads_s)

    def place_s(self, load: float, places: int, ready_s: float) -> float:
        """When whoever is ready then gets a place: first come, first served, so those who come later do not count.

        Args:
            load: at `ready_s`.
        """
        if load < places:
            return ready_s
        ended = bisect_right(self.ends_s, ready_s)
        must_end = floor(load - places) + 1
        # Who is ready later ends later, and those that the plan does not know end at the pace of all.
        known = min(must_end, bisect_right(self.ready_s, ready_s) - ended)
        known_s = self.ends_s[ended + known - 1] if known > 0 else ready_s
        return known_s + (must_end - known) * self.holding_s / places


@dataclass(frozen=True, slots=True)
class AdmissionMemory:
    """Who was admitted, by the cluster that decodes."""

    decoding: Mapping[str, _Decoding] = field(default_factory=dict)


@dataclass(frozen=True)
class AdmissionPolicy:
    """Admits requests that will meet the limits, by what is predicted. Pure; any thread may call.

    A caller asks `decide` for a route that a router chose, and `admitted` for the memory if the request goes that way.

    Attributes:
        load: `present` judges by the decode load of the snapshot, as a baseline: it swings.
        slack: limits are this many times those of the service-level objective; above 1 admits what may just miss.

    Raises:
        PlanError: a number is out of its limits.
    """

    slo: Slo
    load: LoadKind = "predicted"
    slack: float = 1.0

    def __post_init__(self) -> None:
        if self.load not in ("predicted", "present"):
            raise PlanError(f"admission by {self.load!r} load is unknown; use 'predicted' or 'present'")
        if not (isfinite(self.slack) and self.slack > 0):
            raise PlanError(f"slack={self.slack} must be positive; 1 admits just what meets the limits")

    @cached_property
    def _deviations(self) -> float:
        return NormalDist().inv_cdf(min(max(self.slo.share, 0.5), _SHARE_MAX))

    def begin(self) -> AdmissionMemory:
        return AdmissionMemory()

    def observe(self, memory: AdmissionMemory, snapshot: Snapshot) -> AdmissionMemory:
        """Drops who has ended, and notes by how much the plan differs from what decodes; every second or so."""
        decoding = {}
        for name, state in snapshot.clusters.items():
            if state.decode_instances == 0:
                continue
            plan = memory.decoding.get(name, _Decoding())
            ended = bisect_right(plan.ends_s, snapshot.now_s)
            # As many go of either: which belong together does not matter to how many are there.
            ready_s, ends_s = plan.ready_s[ended:], plan.ends_s[ended:]
            planned = bisect_right(ready_s, snapshot.now_s)
            holding_s = plan.holding_s or _guessed_holding_s(state)
            offset = float(state.decode_running + state.decode_waiting - planned)
            passed_s = snapshot.now_s - plan.offset_s if name in memory.decoding else 0.0
            per_s, error_per_s, admitted = plan.admitted_per_s, plan.error_per_s, plan.admitted
            if passed_s > 0:
                fresh = 1 - exp(-passed_s / _MEMORY_S)
                per_s += (admitted / passed_s - per_s) * fresh
                error_per_s += ((offset - plan.offset) ** 2 / passed_s - error_per_s) * fresh
                admitted = 0
            decoding[name] = _Decoding(
                ready_s, ends_s, offset, snapshot.now_s, holding_s, plan.leads_s, admitted, per_s, error_per_s
            )
        return AdmissionMemory(decoding)

    def decide(self, memory: AdmissionMemory, snapshot: Snapshot, request: RoutingRequest, route: Route) -> Admission:
        """Whether the request would meet both limits on this route."""
        state = snapshot.clusters[route.decode]
        profile = state.cluster.profile
        instances = max(state.decode_instances, 1)
        places = instances * profile.decode_batch_max
        before_s = route.estimate.ttft_s - route.estimate.decode_wait_s
        decode_from_s = snapshot.now_s + before_s
        wait_s = wait_most_s = route.estimate.decode_wait_s
        if self.load == "predicted":
            plan = memory.decoding.get(route.decode, _Decoding())
            others = plan.load(decode_from_s, places, snapshot.now_s)
            wait_s = plan.place_s(others, places, decode_from_s) - decode_from_s
            more = self._deviations * sqrt(plan.error_per_s * (decode_from_s - plan.offset_s))
            wait_most_s = plan.place_s(others + more, places, decode_from_s) - decode_from_s
        else:
            others = float(state.decode_running + state.decode_waiting)
        batch = min(ceil((others + 1) / instances), profile.decode_batch_max)
        tpot_s = profile.decode_step(batch)
        ttft_s, ttft_most_s = before_s + wait_s, before_s + wait_most_s
        ttft_limit_s, tpot_limit_s = self.slo.ttft_s * self.slack, self.slo.tpot_s * self.slack
        rule, is_admitted = "meets both limits", True
        if state.decode_instances == 0:
            rule, is_admitted = f"cluster {route.decode!r} has no instance that decodes", False
        elif ttft_s > ttft_limit_s:
            rule, is_admitted = f"time to first token {ttft_s:.3g} s is over {ttft_limit_s:.3g} s", False
        elif ttft_most_s > ttft_limit_s:
            rule = f"time to first token {ttft_s:.3g} s may become {ttft_most_s:.3g} s, over {ttft_limit_s:.3g} s"
            is_admitted = False
        elif tpot_s > tpot_limit_s * (1 + 1e-9):
            rule, is_admitted = f"time per output token {tpot_s:.3g} s is over {tpot_limit_s:.3g} s", False
        elif self.load == "present" and others >= places:
            rule, is_admitted = f"{others:g} requests decode or wait for {places} places", False
        return Admission(
            is_admitted,
            AdmissionExplanation(
                rule,
                self.load,
                decode_from_s,
                others + 1,
                places,
                ttft_s,
                ttft_most_s,
                ttft_limit_s,
                tpot_s,
                tpot_limit_s,
            ),
        )

    def admitted(
        self, memory: AdmissionMemory, snapshot: Snapshot, request: RoutingRequest, route: Route, admission: Admission
    ) -> AdmissionMemory:
        """What to remember of a request that goes this way."""
        found = admission.explanation
        holding_s = max(request.output_tokens - 1, 0.0) * found.tpot_s
        plan = memory.decoding.get(route.decode, _Decoding(offset_s=snapshot.now_s))
        if len(plan.ends_s) >= ADMITTED_MAX:
            return memory
        ready_s, ends_s = list(plan.ready_s), list(plan.ends_s)
        insort(ready_s, found.decode_from_s)
        insort(ends_s, snapshot.now_s + found.ttft_s + holding_s)
        # A mean over the latest twenty or so.
        mean_s = plan.holding_s + (holding_s - plan.holding_s) / 20 if plan.holding_s > 0 else holding_s
        plan = replace(
            plan,
            ready_s=tuple(ready_s),
            ends_s=tuple(ends_s),
            holding_s=mean_s,
            leads_s=(*plan.leads_s[1 - _LEADS_MAX :], found.decode_from_s - snapshot.now_s),
            admitted=plan.admitted + 1,
        )
        return AdmissionMemory({**memory.decoding, route.decode: plan})


def _guessed_holding_s(state: ClusterState) -> float:
    """Before any request was admitted nothing is known of how long answers are: one batch of a few hundred tokens."""
    return 256 * max(state.tpot_s, state.cluster.profile.decode_step(1))
