"""Which requests and samples of a run count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.simulate.result import Outcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.simulate.result import SimulationResult


@dataclass(frozen=True)
class Measured:
    """The part of a run after its warm-up.

    Attributes:
        from_s: end of the warm-up.
        until_s: the last arrival; at least `from_s`. What the system does afterwards, empty of new work, is left out.
        requests: which requests arrive in it, `[requests]` of bool.
        samples: which samples end in it, `[samples]` of bool.
        steps_s: the time that each sample speaks for, `[samples]`.
    """

    from_s: float
    until_s: float
    requests: NDArray[np.bool_]
    samples: NDArray[np.bool_]
    steps_s: NDArray[np.float64]

    @property
    def span_s(self) -> float:
        return self.until_s - self.from_s


def measured(result: SimulationResult) -> Measured:
    """What of a run counts."""
    arrival_s, at_s = result.requests.arrival_s, result.samples.at_s
    from_s = result.scenario.warmup_s
    # A later turn of a session that never came has no time of arrival.
    requests = arrival_s >= from_s
    until_s = max(from_s, float(arrival_s[requests].max())) if requests.any() else from_s
    steps_s = np.diff(at_s, prepend=min(0.0, float(at_s[0])) if len(at_s) else 0.0)
    return Measured(from_s, until_s, requests, (at_s > from_s) & (at_s <= until_s) & (steps_s > 0), steps_s)


def good_and_decided(result: SimulationResult) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which requests met both limits of the SLO, and of which it is known whether they do; `[requests]` each."""
    table, slo = result.requests, result.scenario.slo
    is_done = table.outcome == Outcome.DONE
    # One output token has no time between tokens.
    is_good = is_done & (table.ttft_s <= slo.ttft_s) & ~(table.tpot_s > slo.tpot_s)
    has_waited_s = np.where(np.isnan(table.ttft_s), result.end_s - table.arrival_s, table.ttft_s)
    is_late = (table.outcome == Outcome.PENDING) & (has_waited_s > slo.ttft_s)
    return is_good, (table.outcome != Outcome.PENDING) | is_late
