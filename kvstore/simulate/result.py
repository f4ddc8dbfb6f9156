"""What a simulation produces: a row per request, samples over time, and what happened besides."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kvstore.scenario import Scenario


class Outcome(IntEnum):
    """How a request ended."""

    PENDING = 0
    """The simulation was cut off before it ended."""
    DONE = 1
    REJECTED = 2
    """Turned away on arrival."""
    FAILED = 3
    """Lost to a failure after it was accepted, or given up."""


PARTS = ("queue_s", "load_s", "prefix_s", "prefill_s", "transfer_s", "decode_wait_s")
"""Where the time to first token goes, in order; they add up to `ttft_s` exactly as far as float64 adds."""


@dataclass(frozen=True)
class RequestTable:
    """A row per request, in the order of the workload. Float columns are NaN where something did not come to pass.

    Attributes:
        prefill, decode: numbers of clusters in the deployment; -1 for none.
        tier: number in `SimulationResult.tiers` of where the prefix came from; -1 for none.
        cached_tokens: length that prefill began at.
        possible_tokens: the longest prefix that came before: what an unbounded common cache would give.
        parts: seconds by `PARTS`, `[requests, 6]`.
        ttft_s: until the decoding cluster has the cache and a place in a batch; the first token comes with it.
        tpot_s: per output token after the first.
        finished_s: since the start.
        prefix_bytes, handover_bytes: that were sent for it over links, by attempts that failed too.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    cached_tokens: NDArray[np.int64]
    possible_tokens: NDArray[np.int64]
    tier: NDArray[np.int8]
    prefill: NDArray[np.int16]
    decode: NDArray[np.int16]
    outcome: NDArray[np.int8]
    parts: NDArray[np.float64]
    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    finished_s: NDArray[np.float64]
    prefix_bytes: NDArray[np.float64]
    handover_bytes: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.arrival_s)


SAMPLED_BY_CLUSTER = (
    "prefill_waiting",
    "prefill_busy",
    "prefill_instances",
    "decode_running",
    "decode_waiting",
    "decode_instances",
)
"""Fields of `Samples` that there are once for each cluster."""


@dataclass(frozen=True)
class Samples:
    """The system at equal steps of time.

    Attributes:
        at_s: `[samples]`.
        prefill_waiting, prefill_busy, prefill_instances, decode_running, decode_waiting, decode_instances: by cluster,
            `[samples]` each.
        link_bytes: delivered by each link since the sample before.
        link_capacity_bytes_per_s: what it could carry.
        policy: numbers that the policy remembers (prices, scarce links), by name.
    """

    at_s: NDArray[np.float64]
    prefill_waiting: Mapping[str, NDArray[np.float64]]
    prefill_busy: Mapping[str, NDArray[np.float64]]
    prefill_instances: Mapping[str, NDArray[np.float64]]
    decode_running: Mapping[str, NDArray[np.float64]]
    decode_waiting: Mapping[str, NDArray[np.float64]]
    decode_instances: Mapping[str, NDArray[np.float64]]
    link_bytes: Mapping[tuple[str, str], NDArray[np.float64]]
    link_capacity_bytes_per_s: Mapping[tuple[str, str], NDArray[np.float64]]
    policy: Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Happening:
    """Something worth a mark on the axis of time: a fault or a conversion."""

    at_s: float
    what: str
    where: str
    text: str


@dataclass(frozen=True)
class CacheCounts:
    """What one tier of one cluster's cache did, in tokens and bytes.

    Attributes:
        asked_tokens: of prompts that prefill looked for here; what a faster tier had is not asked of a slower one.
        hit_tokens: of these, that prefill began behind.
        refused_tokens: of texts that were not kept, since not all of them would fit.
    """

    cluster: str
    tier: str
    capacity_bytes: float
    used_bytes: float
    asked_tokens: int
    hit_tokens: int
    evicted_bytes: float
    refused_tokens: int = 0


@dataclass(frozen=True)
class SimulationResult:
    """One run.

    Attributes:
        tiers: names that `RequestTable.tier` numbers.
        is_stable: whether the backlog at the last arrival is no more than what the last tenth of the time explains, and
            did not grow over the second half; where not, percentiles describe the length of the run as much as the
            deployment, and reports say so.
        wall_s: how long the simulation took.
    """

    scenario: Scenario
    requests: RequestTable
    samples: Samples
    happenings: tuple[Happening, ...]
    caches: tuple[CacheCounts, ...]
    tiers: tuple[str, ...]
    end_s: float
    is_stable: bool
    wall_s: float
