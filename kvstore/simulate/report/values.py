"""What a run comes to: the figures that pages, tables and comparisons show. Missing figures are None, never NaN."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.simulate.result import CacheCounts


@dataclass(frozen=True)
class Spread:
    """A distribution over requests.

    Attributes:
        count: requests that have the value.
        missing: measured requests that do not: turned away, lost, or not there yet when the simulation was cut off.
    """

    count: int
    missing: int
    mean: float | None = None
    p50: float | None = None
    p75: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    maximum: float | None = None


@dataclass(frozen=True)
class PartSummary:
    """One part of the time to first token.

    Attributes:
        name: one of `kvstore.simulate.result.PARTS`.
        mean_s: over all requests that have a first token.
        share: of their mean time to first token.
        slowest_mean_s: over the tenth of them with the longest time to first token.
    """

    name: str
    mean_s: float
    share: float
    slowest_mean_s: float

    @property
    def label(self) -> str:
        """For people: `decode wait`."""
        return self.name.removesuffix("_s").replace("_", " ")


@dataclass(frozen=True)
class RouteSummary:
    """Requests that one cluster prefilled and one decoded.

    Attributes:
        share: of the measured requests.
        parts_mean_s: by `PARTS`.
    """

    prefill: str
    decode: str
    requests: int
    share: float
    prompt_tokens_mean: float
    cached_tokens_mean: float
    ttft_mean_s: float | None
    ttft_p90_s: float | None
    parts_mean_s: tuple[float, ...]


@dataclass(frozen=True)
class ClusterSummary:
    """One cluster, over the samples of the measured time; None where there are none.

    Attributes:
        prefill_busy_share: of the instances that worked as prefill; None where none did.
        decode_full_share: places taken in decode batches, of all that there were.
        egress_mean_bytes_per_s: what left over all its links.
        egress_peak_bytes_per_s: the largest of one sample.
    """

    name: str
    prefill_busy_share: float | None
    prefill_waiting_mean: float | None
    prefill_waiting_max: float | None
    decode_full_share: float | None
    decode_waiting_mean: float | None
    decode_waiting_max: float | None
    egress_mean_bytes_per_s: float | None
    egress_peak_bytes_per_s: float | None
    ingress_mean_bytes_per_s: float | None


@dataclass(frozen=True)
class LinkSummary:
    """One direction between two clusters, over the samples of the measured time; None where there are none.

    Attributes:
        used_share: of what it could carry.
    """

    source: str
    target: str
    delivered_bytes: float | None
    mean_bytes_per_s: float | None
    peak_bytes_per_s: float | None
    capacity_mean_bytes_per_s: float | None
    used_share: float | None


@dataclass(frozen=True)
class HitSummary:
    """Where prefixes came from, over the measured requests that were prefilled.

    Attributes:
        cluster: that prefilled.
        tier: that the prefix came from.
        share: of the prompt tokens that this cluster prefilled or resumed.
    """

    cluster: str
    tier: str
    requests: int
    hit_tokens: int
    share: float


@dataclass(frozen=True)
class Summary:
    """One run in figures.

    Measured are requests that arrive between `from_s`, the end of the warm-up, and `until_s`, the last arrival; rates
    are over that time.

    Attributes:
        scenario: its name.
        policy: its name.
        settings: what a sweep varied, by key; empty for a run by itself.
        offered_per_s: arrivals; None where they span no time.
        throughput_per_s: requests that ended well (Λ).
        goodput_per_s: arrivals that met both limits of the SLO.
        good_share: of the requests whose fate is known. Turned away and lost ones are not good; one that was cut off
            counts once its time to first token is beyond the limit.
        meets_slo: whether that share is what the SLO asks for, and the run is stable.
        hit_share: prompt tokens that were resumed from, of all that were asked for.
        possible_share: the same of an unbounded cache that all clusters shared.
        egress_mean_bytes_per_s: over all links; None where no sample was taken in the measured time.
        is_stable: see `SimulationResult`; where not, percentiles describe the length of the run as much as the system.
    """

    scenario: str
    policy: str
    seed: int
    settings: tuple[tuple[str, str], ...]
    from_s: float
    until_s: float
    end_s: float
    requests: int
    done: int
    rejected: int
    failed: int
    pending: int
    offered_per_s: float | None
    throughput_per_s: float | None
    goodput_per_s: float | None
    good_share: float | None
    slo_ttft_s: float
    slo_tpot_s: float
    slo_share: float
    meets_slo: bool
    ttft: Spread
    tpot: Spread
    parts: tuple[PartSummary, ...]
    routes: tuple[RouteSummary, ...]
    clusters: tuple[ClusterSummary, ...]
    links: tuple[LinkSummary, ...]
    hits: tuple[HitSummary, ...]
    hit_share: float | None
    possible_share: float | None
    caches: tuple[CacheCounts, ...]
    egress_mean_bytes_per_s: float | None
    happenings: int
    is_stable: bool
    wall_s: float

    def to_document(self) -> dict[str, Any]:
        """As plain values for JSON; settings become an object."""
        return {**asdict(self), "settings": dict(self.settings)}
