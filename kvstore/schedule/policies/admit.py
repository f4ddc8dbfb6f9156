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
from math import ceil, isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.errors import PlanError
from kvstore.limits import ADMITTED_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Slo
    from kvstore.schedule.policies.policy import Route
    from kvstore.schedule.policies.snapshot import ClusterState, RoutingRequest, Snapshot

LoadKind: TypeAlias = Literal["predicted", "present"]


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
        tpot_s, tpot_limit_s: of a batch of that size; and the limit.
    """

    rule: str
    load: LoadKind
    decode_from_s: float
    decode_requests: float
    decode_places: int
    ttft_s: float
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
        begins_s, ends_s: of all that were admitted and have not ended by plan, ascending; as many of each.
        offset: how many more (or fewer) there were at `offset_s` than by plan, those unknown to the plan included.
        holding_s: mean time that a request keeps its place, of the latest ones.
    """

    begins_s: tuple[float, ...] = ()
    ends_s: tuple[float, ...] = ()
    offset: float = 0.0
    offset_s: float = 0.0
    holding_s: float = 0.0

    def load(self, at_s: float) -> float:
        """How many will decode, or wait for a place, at this moment."""
        # All that have not begun end later, so those that have begun less those that have ended are there.
        planned = bisect_right(self.begins_s, at_s) - bisect_right(self.ends_s, at_s)
        # Those whom the plan did not know leave as evenly as all others.
        left = max(0.0, 1 - (at_s - self.offset_s) / self.holding_s) if self.holding_s > 0 else 0.0
        return max(0.0, planned + self.offset * left)

    def first_below(self, places: float, from_s: float) -> float:
        """The first moment from `from_s` on at which fewer than `places` are there."""
        if self.load(from_s) < places:
            return from_s
        for end_s in self.ends_s[bisect_right(self.ends_s, from_s) :]:
            if self.load(end_s) < places:
                return end_s
        return max(from_s, self.offset_s + self.holding_s)


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
        wait_share: of the limit of the time to first token, that may be planned as a wait for a place. In a lasting
            overload the wait is as long as it may be; were that all of the limit, any error would make everybody late.

    Raises:
        PlanError: a number is out of its limits.
    """

    slo: Slo
    load: LoadKind = "predicted"
    slack: float = 1.0
    wait_share: float = 0.1

    def __post_init__(self) -> None:
        if self.load not in ("predicted", "present"):
            raise PlanError(f"admission by {self.load!r} load is unknown; use 'predicted' or 'present'")
        if not (isfinite(self.slack) and self.slack > 0):
            raise PlanError(f"slack={self.slack} must be positive; 1 admits just what meets the limits")
        if not 0 <= self.wait_share <= 1:
            raise PlanError(f"wait_share={self.wait_share} must be a share of the limit, 0 to 1")

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
            # As many begins go as ends: which begin belongs to which end does not matter to how many are there.
            begins_s, ends_s = plan.begins_s[ended:], plan.ends_s[ended:]
            planned = bisect_right(begins_s, snapshot.now_s)
            holding_s = plan.holding_s or _guessed_holding_s(state)
            offset = float(_decoding_at_present(state) - planned)
            decoding[name] = _Decoding(begins_s, ends_s, offset, snapshot.now_s, holding_s)
        return AdmissionMemory(decoding)

    def decide(self, memory: AdmissionMemory, snapshot: Snapshot, request: RoutingRequest, route: Route) -> Admission:
        """Whether the request would meet both limits on this route."""
        state = snapshot.clusters[route.decode]
        profile = state.cluster.profile
        instances = max(state.decode_instances, 1)
        places = instances * profile.decode_batch_max
        before_s = route.estimate.ttft_s - route.estimate.decode_wait_s
        decode_from_s = snapshot.now_s + before_s
        wait_s = route.estimate.decode_wait_s
        if self.load == "predicted":
            plan = memory.decoding.get(route.decode, _Decoding())
            others = plan.load(decode_from_s)
            wait_s = plan.first_below(places, decode_from_s) - decode_from_s
        else:
            others = float(_decoding_at_present(state))
        batch = min(ceil((others + 1) / instances), profile.decode_batch_max)
        tpot_s = profile.decode_step(batch)
        ttft_s = before_s + wait_s
        ttft_limit_s, tpot_limit_s = self.slo.ttft_s * self.slack, self.slo.tpot_s * self.slack
        rule, is_admitted = "meets both limits", True
        if state.decode_instances == 0:
            rule, is_admitted = f"cluster {route.decode!r} has no instance that decodes", False
        elif ttft_s > ttft_limit_s:
            rule, is_admitted = f"time to first token {ttft_s:.3g} s is over {ttft_limit_s:.3g} s", False
        elif wait_s > ttft_limit_s * self.wait_share:
            rule = f"no place for {wait_s:.3g} s after prefill, more than {self.wait_share:.0%} of {ttft_limit_s:.3g} s"
            is_admitted = False
        elif tpot_s > tpot_limit_s * (1 + 1e-9):
            rule, is_admitted = f"time per output token {tpot_s:.3g} s is over {tpot_limit_s:.3g} s", False
        elif self.load == "present" and others >= places:
            rule, is_admitted = f"{others:g} requests decode or wait for {places} places", False
        return Admission(
            is_admitted,
            AdmissionExplanation(
                rule, self.load, decode_from_s, others + 1, places, ttft_s, ttft_limit_s, tpot_s, tpot_limit_s
            ),
        )

    def admitted(
        self, memory: AdmissionMemory, snapshot: Snapshot, request: RoutingRequest, route: Route, admission: Admission
    ) -> AdmissionMemory:
        """What to remember of a request that goes this way."""
        found = admission.explanation
        begin_s = snapshot.now_s + found.ttft_s
        holding_s = max(request.output_tokens - 1, 0.0) * found.tpot_s
        plan = memory.decoding.get(route.decode, _Decoding(offset_s=snapshot.now_s))
        if len(plan.ends_s) >= ADMITTED_MAX:
            return memory
        begins_s, ends_s = list(plan.begins_s), list(plan.ends_s)
        insort(begins_s, begin_s)
        insort(ends_s, begin_s + holding_s)
        # A mean over the latest twenty or so.
        mean_s = plan.holding_s + (holding_s - plan.holding_s) / 20 if plan.holding_s > 0 else holding_s
        plan = replace(plan, begins_s=tuple(begins_s), ends_s=tuple(ends_s), holding_s=mean_s)
        return AdmissionMemory({**memory.decoding, route.decode: plan})


def _decoding_at_present(state: ClusterState) -> int:
    """Who decodes or waits for a place; while there are places, those who wait are hand-overs that are under way."""
    places = state.decode_instances * state.cluster.profile.decode_batch_max
    return state.decode_running + (state.decode_waiting if state.decode_running >= places else 0)


def _guessed_holding_s(state: ClusterState) -> float:
    """Before any request was admitted nothing is known of how long answers are: one batch of a few hundred tokens."""
    return 256 * max(state.tpot_s, state.cluster.profile.decode_step(1))
