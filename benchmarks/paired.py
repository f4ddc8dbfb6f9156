"""Comparing two ways of doing the same work on a noisy machine: both sides alternate in one run.

What a comparison prints and writes is `kvstore.bench.rows`'.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from kvstore.bench.rows import Absent, Row, report

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Absent", "Row", "compare", "report"]


def compare(
    case: str,
    amount: float,
    unit: str,
    ours: Callable[[], object],
    baseline_name: str,
    baseline: Callable[[], object],
    *,
    rounds: int,
) -> Row:
    """Time both sides in turn, after one round that is not counted.

    Args:
        amount: how much of `unit`-seconds one call does: gigabytes for GB/s, thousands of keys for k/s.
    """
    pairs = []
    for _ in range(rounds + 1):
        pairs.append((_seconds(ours), _seconds(baseline)))
    counted = pairs[1:]
    ratios = [theirs / mine for mine, theirs in counted]
    return Row(
        case,
        unit,
        amount / statistics.median(mine for mine, _ in counted),
        baseline_name,
        amount / statistics.median(theirs for _, theirs in counted),
        statistics.median(ratios),
        min(ratios),
        rounds,
    )


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
