"""The values of a scenario."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kvstore.schedule.deployment import Deployment, Slo


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    Attributes:
        kind: `trace`: at the trace's own times, scaled to `rate_per_s` where that is given; `poisson`; `burst`: Poisson
            whose rate jumps between two levels; `diurnal`: Poisson whose rate follows a sine.
        rate_per_s: mean rate; None keeps a trace's own.
        burst_factor: the higher level of `burst`, or the peak of `diurnal`, as a multiple of the mean.
        period_s: of one cycle.
    """

    kind: Literal["trace", "poisson", "burst", "diurnal"] = "trace"
    rate_per_s: float | None = None
    burst_factor: float = 2.0
    period_s: float = 600.0


@dataclass(frozen=True)
class Workload:
    """What comes.

    Attributes:
        kind: a reader of traces (`mooncake`, `agentic`) or a generator (`lognormal`, `multiturn`, `branching`).
        path: of a trace; None takes the excerpt that ships with the package.
        settings: of a generator, by name (`mu`, `sigma`, `tokens_min`, `tokens_max`, `output_tokens`, ...).
        requests_max: at most so many.
    """

    kind: Literal["mooncake", "agentic", "lognormal", "multiturn", "branching"] = "lognormal"
    path: str | None = None
    settings: tuple[tuple[str, float], ...] = ()
    arrivals: Arrivals = Arrivals()
    requests_max: int = 1_000_000


@dataclass(frozen=True)
class LinkFault:
    """A link carries only a share of its rate for a while; 0 is an outage."""

    source: str
    target: str
    from_s: float
    until_s: float
    share: float


@dataclass(frozen=True)
class NodeFault:
    """Instances of a cluster are gone for a while, with the requests that they were at."""

    cluster: str
    role: Literal["prefill", "decode"]
    instances: int
    from_s: float
    until_s: float


@dataclass(frozen=True)
class PolicyChoice:
    """Which routing policy decides, and its settings by name."""

    name: str = "adaptive"
    settings: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Scenario:
    """Everything that a simulation depends on; equal scenarios give equal results.

    Attributes:
        telemetry_s: how often policies observe, and how old their snapshots may be.
        warmup_s: requests that arrive earlier are simulated and left out of the summary.
        duration_s: requests that would arrive later are not simulated; None takes the whole workload.
        block_tokens: tokens per block of the caches.
        cross_traffic: share of each link that others use, by source and target.
    """

    name: str
    deployment: Deployment
    workload: Workload
    slo: Slo
    policy: PolicyChoice = PolicyChoice()
    faults: tuple[LinkFault | NodeFault, ...] = ()
    cross_traffic: tuple[tuple[str, str, float], ...] = ()
    telemetry_s: float = 1.0
    warmup_s: float = 0.0
    duration_s: float | None = None
    block_tokens: int = 512
    seed: int = 0
