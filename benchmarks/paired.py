"""Comparing two ways of doing the same work on a noisy machine: both sides alternate in one run.

A ratio above 1 means that ours is faster. Each comparison prints a table and writes one JSON file:
`{"machine", "commit", "rows": [{"case", "unit", "ours", "baseline_name", "baseline", "ratio_median",
"ratio_min", "rounds"}]}`.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class Row:
    """One comparison: medians of both sides in `unit` (more is better), and the ratios of the pairs."""

    case: str
    unit: str
    ours: float
    baseline_name: str
    baseline: float
    ratio_median: float
    ratio_min: float
    rounds: int


@dataclass(frozen=True)
class Absent:
    """A baseline that could not take part, and why."""

    baseline_name: str
    reason: str


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


def report(title: str, rows: Sequence[Row], output: Path, absent: Sequence[Absent] = ()) -> None:
    """Print the table and write the JSON; baselines that are absent have a row that says so."""
    table = Table(title=title)
    for column in ("case", "unit", "ours", "baseline", "median ratio", "min ratio", "rounds"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        table.add_row(
            row.case,
            row.unit,
            f"{row.ours:.2f}",
            f"{row.baseline:.2f} ({row.baseline_name})",
            f"{row.ratio_median:.2f}",
            f"{row.ratio_min:.2f}",
            str(row.rounds),
        )
    for baseline in absent:
        table.add_row("not compared", "", "", baseline.baseline_name, "", "", "")
    Console().print(table)
    for baseline in absent:
        Console().print(f"{baseline.baseline_name}: {baseline.reason}", markup=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    every_row: tuple[Row | Absent, ...] = (*rows, *absent)
    document = {**machine_and_commit(), "rows": [asdict(row) for row in every_row]}
    output.write_text(json.dumps(document, indent=2) + "\n")
    Console().print(f"written to {output}")


def machine_and_commit() -> dict[str, str]:
    """Where and of what a measurement was taken."""
    return {"machine": _machine(), "commit": _commit()}


def _machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    return result.stdout.strip() or "unknown"
