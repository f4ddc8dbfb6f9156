"""`kvstore plan paper`: the published figures of Prefill-as-a-Service beside ours."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING

from kvstore.cli.printing import print_table
from kvstore.paper.case_study import case_study
from kvstore.paper.comparison import compared, summaries

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.paper.comparison import Cell


def run_plan_paper(*, as_json: bool) -> int:
    """Print every cell, and how well predicted and inferred ones agree; the exit status."""
    print_cells(compared(case_study()), as_json=as_json)
    return 0


def print_cells(cells: Sequence[Cell], *, as_json: bool) -> None:
    """Print these cells as JSON, or as tables with a summary by what agreement shows."""
    if as_json:
        print(json.dumps([_document(cell) for cell in cells], indent=2, ensure_ascii=False, allow_nan=False))
        return
    for table, members in groupby(cells, key=lambda cell: cell.printed.table):
        columns = ("row", "quantity", "paper", "ours", "error", "inputs that the paper does not print")
        print_table(table, columns, [_row(cell) for cell in members])
    print_table(
        "Agreement",
        ("cells", "number", "within rounding", "largest error", "mean error", "worst cell"),
        [
            (
                summary.basis,
                str(summary.cells),
                str(summary.within_rounding),
                f"{summary.largest_error:.2%}",
                f"{summary.mean_error:.2%}",
                f"{summary.worst.printed.row}, {summary.worst.printed.quantity}" if summary.largest_error else "",
            )
            for summary in summaries(cells)
        ],
    )
    print(
        "predicted: from printed inputs alone. inferred: through inputs that were inferred from the paper's own\n"
        "tables, so agreement shows the arithmetic, not the model."
    )


def _document(cell: Cell) -> dict[str, object]:
    return {
        "table": cell.printed.table,
        "row": cell.printed.row,
        "quantity": cell.printed.quantity,
        "paper": cell.printed.value,
        "ours": cell.ours,
        "relative_error": cell.relative_error,
        "inferred_inputs": list(cell.inferred_inputs),
    }


def _row(cell: Cell) -> tuple[str, ...]:
    error = f"{cell.relative_error:.2%}" if cell.relative_error else "within rounding"
    ours, paper = _shown(cell.ours), _shown(cell.printed.value)
    return cell.printed.row, cell.printed.quantity, paper, ours, error, _joined(cell.inferred_inputs)


def _joined(inputs: tuple[str, ...]) -> str:
    """Each profile once, with all that was inferred of it."""
    by_profile: dict[str, list[str]] = {}
    for each in inputs:
        profile, _, part = each.partition(": ")
        by_profile.setdefault(profile, []).append(part)
    return "; ".join(f"{profile}: {', '.join(parts)}" for profile, parts in by_profile.items())


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
