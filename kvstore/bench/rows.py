"""Rows of a comparison: ours against one baseline, taken in turns on one machine.

Every comparison of this project writes the same JSON: `{"machine", "commit", "rows": [{"case", "unit", "ours",
"baseline_name", "baseline", "ratio_median", "ratio_min", "rounds"}]}`. A ratio above 1 means that ours is better.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore._version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Row:
    """One comparison: medians of both sides in `unit`, and the ratios of the pairs of rounds."""

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


def report(title: str, rows: Sequence[Row], output: Path, absent: Sequence[Absent] = ()) -> None:
    """Print the table and write the JSON; baselines that are absent have a row that says so."""
    from rich.console import Console
    from rich.table import Table

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
    write_rows(output, rows, absent, machine_and_commit())
    Console().print(f"written to {output}")


def write_rows(
    output: Path, rows: Sequence[Row], absent: Sequence[Absent], place: Mapping[str, str], **more: Any
) -> None:
    """Write the JSON file, its folder too.

    Args:
        place: `machine` and `commit`.
        more: further members of the document.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    every_row: tuple[Row | Absent, ...] = (*rows, *absent)
    document = {**place, "rows": [asdict(row) for row in every_row], **more}
    output.write_text(json.dumps(document, indent=2) + "\n")


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
    """The commit of the tree that this file is part of, marked if the tree has changes; of a wheel, its version."""
    folder = Path(__file__).parent
    # An installed package may lie inside a repository that has nothing to do with it.
    if not _git(folder, "ls-files", Path(__file__).name):
        return f"version {__version__}"
    return _git(folder, "describe", "--always", "--dirty", "--exclude=*") or f"version {__version__}"


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
