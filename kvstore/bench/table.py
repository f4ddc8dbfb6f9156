"""A result as text: one table per case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from kvstore.bench.result import RATE_UNIT

if TYPE_CHECKING:
    from kvstore.bench.result import CaseResult, Figures
    from kvstore.bench.rows import Row


def case_table(result: CaseResult) -> Table:
    """Every side of a case; sides that are missing or failed have a line with the reason."""
    title = f"{result.label}: {result.case.total_bytes / 1e6:.1f} MB in {len(result.case.record_bytes)} records"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("side")
    columns = ["GB/s", "min", "max"]
    if result.is_small:
        columns += ["us p50", "p90", "p99"]
    columns += ["CPU s/GB send", "receive", "ours/it", "min", "rounds", "cc", "bytes"]
    for column in columns:
        table.add_column(column, justify="right")
    rows = {row.baseline_name: row for row in result.rows() if row.unit == RATE_UNIT}
    for figures in result.figures():
        table.add_row(figures.name, *_cells(result, figures, rows.get(figures.name)))
    for absent in result.failures():
        table.add_row(absent.baseline_name, Text("-"), *[""] * (len(columns) - 1))
    return table


def _cells(result: CaseResult, figures: Figures, row: Row | None) -> list[str]:
    cells = [
        _number(figures.gigabytes_per_s), _number(figures.gigabytes_per_s_min), _number(figures.gigabytes_per_s_max)
    ]  # fmt: skip
    if result.is_small:
        cells += [f"{figures.latency_us[share]:.0f}" for share in (50, 90, 99)]
    cells += [_number(figures.sender_cpu_s_per_gb), _number(figures.receiver_cpu_s_per_gb)]
    cells += ["", ""] if row is None else [_number(row.ratio_median), _number(row.ratio_min)]
    checked = {True: "checked", False: "wrong", None: "not checked"}[figures.is_verified]
    return [*cells, str(figures.rounds), figures.congestion, checked]


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"
