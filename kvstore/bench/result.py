"""What a run found: figures of each side, and rows of ours against each baseline."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.bench.rows import Absent, Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.bench.cases import Case
    from kvstore.bench.rounds import Measured

LATENCY_BYTES_MAX = 1 << 20
"""Up to this size a case is told in microseconds, too."""
RATE_UNIT, LATENCY_UNIT, CPU_UNIT = "GB/s", "us", "CPU s/GB"


@dataclass(frozen=True)
class Figures:
    """One side of one case.

    Attributes:
        gigabytes_per_s, gigabytes_per_s_min, gigabytes_per_s_max: of the rounds.
        latency_us: percentiles of single batches, by their number: 50, 90, 99.
        sender_cpu_s_per_gb, receiver_cpu_s_per_gb: medians.
        rounds: how many there are.
        is_verified: the contents were compared; None if there are none to compare.
        congestion: of its sockets.
    """

    name: str
    gigabytes_per_s: float
    gigabytes_per_s_min: float
    gigabytes_per_s_max: float
    latency_us: dict[int, float]
    sender_cpu_s_per_gb: float
    receiver_cpu_s_per_gb: float
    rounds: int
    is_verified: bool | None
    congestion: str


@dataclass(frozen=True)
class CaseResult:
    """All sides of one case under one set of conditions.

    Attributes:
        label: names case and conditions.
        ours: the side that the others are compared with.
        measured: every side that took part, ours first.
        absent: sides that did not, and why.
    """

    label: str
    case: Case
    ours: str
    measured: tuple[Measured, ...]
    absent: tuple[Absent, ...]

    @property
    def is_small(self) -> bool:
        return self.case.total_bytes <= LATENCY_BYTES_MAX

    @property
    def failure(self) -> str | None:
        """Why ours has no complete result."""
        return self._of_ours().failure

    def _of_ours(self) -> Measured:
        return next(side for side in self.measured if side.name == self.ours)

    def figures(self) -> list[Figures]:
        """Of every side that has rounds."""
        return [self._figures(side) for side in self.measured if side.seconds]

    def _figures(self, side: Measured) -> Figures:
        gigabytes = self.case.gigabytes
        rates = [gigabytes / seconds for seconds in side.round_s]
        per_round = gigabytes * self.case.batches
        return Figures(
            side.name,
            statistics.median(rates),
            min(rates),
            max(rates),
            {share: percentile(side.every_s, share) * 1e6 for share in (50, 90, 99)},
            statistics.median(side.sender_cpu_s) / per_round,
            statistics.median(side.receiver_cpu_s) / per_round,
            len(rates),
            side.is_verified,
            side.congestion,
        )

    def rows(self) -> list[Row]:
        """Ours against every other side: GB/s, microseconds of small cases, CPU seconds per GB."""
        ours = self._of_ours()
        others = [side for side in self.measured if side is not ours]
        rows = [self._row(RATE_UNIT, ours, side, ours.round_s, side.round_s) for side in others]
        if self.is_small:
            rows += [self._row(LATENCY_UNIT, ours, side, ours.round_s, side.round_s) for side in others]
        rows += [self._row(CPU_UNIT, ours, side, ours.cpu_s, side.cpu_s) for side in others]
        return [row for row in rows if row is not None]

    def _row(
        self, unit: str, ours: Measured, other: Measured, our_costs: Sequence[float], their_costs: Sequence[float]
    ) -> Row | None:
        # A side that failed on its way has fewer rounds; those that both have are pairs.
        pairs = [(mine, theirs) for mine, theirs in zip(our_costs, their_costs, strict=False) if mine and theirs]
        if not pairs:
            return None
        mine, theirs = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
        ratios = [their / own for own, their in pairs]
        per_round = self.case.gigabytes * self.case.batches

        def value(seconds: float) -> float:
            if unit == LATENCY_UNIT:
                return seconds * 1e6
            return self.case.gigabytes / seconds if unit == RATE_UNIT else seconds / per_round

        return Row(
            self.label, unit, value(mine), other.name, value(theirs), statistics.median(ratios), min(ratios), len(pairs)
        )

    def failures(self) -> list[Absent]:
        """Sides without a complete result: absent from the start, or failed."""
        failed = [Absent(side.name, f"{self.label}: {side.failure}") for side in self.measured if side.failure]
        return [*self.absent, *failed]

    def documents(self) -> list[dict[str, Any]]:
        """The figures for the JSON file."""
        return [
            {"case": self.label, "bytes": self.case.total_bytes, "records": len(self.case.record_bytes), **vars(found)}
            for found in self.figures()
        ]


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of the values do not exceed."""
    return ascending[max(0, math.ceil(len(ascending) * share / 100) - 1)]
