"""What scarce resources cost those who come later, by how saturated they are.

After Georgiou, "The Price of Anarchy in Disaggregated Inference" (arXiv 2606.17081): a router that only looks at each
request's own latency is nearly optimal below saturation, and herds requests to warm caches beyond it, where each makes
all others wait. That paper switches between fixed weights of affinity and load by regime. Here the weights are prices:
the seconds that others wait for one more second of work (the marginal cost that makes selfish choices optimal in a
congestion game), estimated from queues, close to 0 below the knee and growing beyond it by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, isfinite, sqrt
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.errors import PlanError
from kvstore.schedule.policies.knee import Knee, KneeDetector, KneeMemory, LoadCurve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.policies.snapshot import ClusterState, LinkState, Snapshot

Regime: TypeAlias = Literal["below", "beyond"]
"""Of the knee."""

_LINK_SHARE_MAX = 0.95
"""A measured share says nothing about the last 5 %: beyond it, a link counts as used to this share."""


@dataclass(frozen=True, slots=True)
class PrefillPressure:
    """How hard a cluster's prefill is pressed, and how that was concluded.

    Attributes:
        waiting: mean number of prompts that wait.
        utilisation: of a queue with Poisson arrivals in which as many wait.
        elasticity: percent of latency per percent of load; 1 at the knee.
        regime: with hysteresis.
        knee: as measured; its load is None where nobody measures it or it was not seen.
        by: `knee` where the elasticity is that of the measured curve, `queue` where it follows from how many wait.
    """

    waiting: float = 0.0
    utilisation: float = 0.0
    elasticity: float = 0.0
    regime: Regime = "below"
    knee: Knee | None = None
    by: Literal["knee", "queue"] = "queue"


_NO_PRESSURE = PrefillPressure()
_NOTHING_OBSERVED = KneeMemory()
_DETECTOR = KneeDetector()


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Prices at one moment: seconds that others wait for each second that a request takes of a resource.

    A route's cost to everybody is its own seconds and, for each resource, its seconds there times the price. A missing
    name has no price: nobody waits there.

    Attributes:
        decode: by cluster, for a second of one place in a batch.
        link: by source and target, for a second of the whole link.
        pressure: of prefill, by cluster; its elasticity may price it.
    """

    decode: Mapping[str, float] = field(default_factory=dict)
    link: Mapping[tuple[str, str], float] = field(default_factory=dict)
    pressure: Mapping[str, PrefillPressure] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _ClusterMemory:
    pressure: PrefillPressure = _NO_PRESSURE
    knee: KneeMemory = _NOTHING_OBSERVED
    knee_found_s: float | None = None


@dataclass(frozen=True, slots=True)
class PricingMemory:
    """What is remembered from one observation to the next, and the prices that follow from it."""

    coefficients: Coefficients = field(default_factory=Coefficients)
    observed_s: float | None = None
    clusters: Mapping[str, _ClusterMemory] = field(default_factory=dict)
    link_shares: Mapping[tuple[str, str], float] = field(default_factory=dict)


@dataclass(frozen=True)
class PricingPolicy:
    """Prices resources from snapshots. Pure; any thread may call.

    Attributes:
        smoothing_s: over how long means are taken.
        knee_every_s: how often a measured knee is looked for anew.
        leave_elasticity: a cluster that went beyond its knee (elasticity 1) is below again under this one.
        detector: finds knees where snapshots carry what prefill delivered.

    Raises:
        PlanError: a number is out of its limits.
    """

    smoothing_s: float = 60.0
    knee_every_s: float = 10.0
    leave_elasticity: float = 0.5
    detector: KneeDetector = _DETECTOR

    def __post_init__(self) -> None:
        if not (isfinite(self.smoothing_s) and self.smoothing_s > 0 and self.knee_every_s >= 0):
            raise PlanError(
                f"smoothing_s={self.smoothing_s} must be positive, knee_every_s={self.knee_every_s} not < 0"
            )
        if not 0 < self.leave_elasticity < 1:
            raise PlanError(
                f"leave_elasticity={self.leave_elasticity} must be between 0 and 1, where the knee is: the distance "
                "between both keeps noise from switching"
            )

    def begin(self) -> PricingMemory:
        return PricingMemory()

    def observe(self, memory: PricingMemory, snapshot: Snapshot) -> PricingMemory:
        """What to remember, and new `coefficients` in it; called every second or so."""
        if memory.observed_s is None:
            fresh = 1.0
        else:
            fresh = 1 - exp(-max(snapshot.now_s - memory.observed_s, 0.0) / self.smoothing_s)
        clusters: dict[str, _ClusterMemory] = {}
        decode: dict[str, float] = {}
        for name, state in snapshot.clusters.items():
            clusters[name] = self._pressed(memory.clusters.get(name, _ClusterMemory()), state, snapshot.now_s, fresh)
            if state.decode_instances > 0:
                decode[name] = decode_price(state)
        shares = {
            between: _mixed(memory.link_shares.get(between, link.used_share), link.used_share, fresh)
            for between, link in snapshot.links.items()
        }
        links = {between: link_price(shares[between], snapshot.links[between]) for between in shares}
        coefficients = Coefficients(
            decode=decode,
            link=links,
            pressure={name: each.pressure for name, each in clusters.items()},
        )
        return PricingMemory(coefficients, snapshot.now_s, clusters, shares)

    def _pressed(self, memory: _ClusterMemory, state: ClusterState, now_s: float, fresh: float) -> _ClusterMemory:
        before = memory.pressure
        waiting = _mixed(before.waiting, float(state.prefill_waiting), fresh)
        servers = max(state.prefill_instances, 1)
        utilisation = utilisation_of_queue(waiting, servers)
        elasticity = queue_elasticity(utilisation, servers)
        knee, found_s = before.knee, memory.knee_found_s
        by: Literal["knee", "queue"] = "queue"
        observed = self.detector.observe(memory.knee, state.prefills_per_s, state.prefill_latency_s)
        if observed.bins and (found_s is None or now_s - found_s >= self.knee_every_s):
            knee, found_s = self.detector.knee(observed), now_s
        if knee is not None and knee.load is not None and knee.curve is not None and state.prefills_per_s > 0:
            # What is served cannot show by how much more is wanted: a queue may only add to it.
            elasticity, by = max(elasticity, knee.curve.elasticity(state.prefills_per_s)), "knee"
            elasticity = _mixed(before.elasticity, elasticity, fresh)
        regime: Regime = (
            "beyond" if elasticity >= 1 else "below" if elasticity < self.leave_elasticity else before.regime
        )
        pressure = PrefillPressure(waiting, utilisation, elasticity, regime, knee, by)
        return _ClusterMemory(pressure, observed, found_s)


def utilisation_of_queue(waiting: float, servers: int) -> float:
    """The utilisation at which so many wait on average, by Sakasegawa: waiting = u**sqrt(2(c + 1)) / (1 - u)."""
    power, low, high = sqrt(2 * (servers + 1)), 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if middle**power < waiting * (1 - middle):
            low = middle
        else:
            high = middle
    return low


def queue_elasticity(utilisation: float, servers: int) -> float:
    """(dT/dλ)·λ/T of a queue with so many servers at this utilisation; utilisation / (1 - utilisation) of one."""
    return LoadCurve.of_servers(1.0, servers).elasticity(utilisation * servers)


def decode_price(state: ClusterState) -> float:
    """Seconds that others lose for one more second of a place in a batch.

    Each step takes longer for all in the batch, and where places are short, those who wait for one wait longer.
    """
    profile = state.cluster.profile
    places = state.decode_instances * profile.decode_batch_max
    batch = min(state.decode_running / state.decode_instances, profile.decode_batch_max - 1.0)
    step_s = profile.decode_step(max(batch, 1.0))
    slower = batch * (profile.decode_step(batch + 1) / step_s - 1) if batch >= 1 else 0.0
    blocked = max(state.decode_running + state.decode_waiting - places, 0)
    return max(slower, 0.0) + blocked / places * (1 + blocked / places)


def link_price(used_share: float, link: LinkState) -> float:
    """Seconds that other transfers lose for one second of a link that is shared fairly: u / (1 - u)² (M/G/1-PS)."""
    share = min(max(used_share, 0.0), _LINK_SHARE_MAX)
    return share / (1 - share) ** 2 if link.bytes_per_s > 0 else 0.0


def _mixed(before: float, now: float, fresh: float) -> float:
    return before + (now - before) * fresh
