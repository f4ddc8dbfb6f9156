"""The matrix as lines while it runs, a table at the end, and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.engines.matrix import Cell

HEADINGS = ("engine", "model", "case", "verdict", "difference", "spread", "control", "caught")


def line(cell: Cell) -> str:
    """One cell for who is waiting."""
    parts = [f"{cell.engine} {cell.model}, {cell.case}: {cell.verdict}"]
    if cell.difference is not None:
        parts.append(f"differs by {cell.difference:.3g}")
    if cell.spread is not None:
        parts.append(f"spread {cell.spread:.3g}")
    if cell.control is not None:
        parts.append(f"control {cell.control:.3g}, {'caught' if cell.is_caught else 'NOT CAUGHT'}")
    parts += [f"{name} {value:g}" for name, value in cell.figures.items()]
    return ", ".join(parts) + (f": {cell.reason}" if cell.reason else "")


def table(cells: Sequence[Cell]) -> str:
    """All cells, aligned."""
    rows = [HEADINGS, *(_row(cell) for cell in cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(cell: Cell) -> tuple[str, ...]:
    caught = "" if cell.is_caught is None else ("yes" if cell.is_caught else "NO")
    numbers = ("" if value is None else f"{value:.3g}" for value in (cell.difference, cell.spread, cell.control))
    return (cell.engine, cell.model, cell.case, str(cell.verdict), *numbers, caught)


def write(cells: Sequence[Cell], path: Path) -> None:
    """All cells as JSON; a number that is not finite becomes text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for cell in cells:
        row = asdict(cell) | {"is_caught": cell.is_caught, "is_good": cell.is_good}
        rows.append({key: str(value) if value == float("inf") else value for key, value in row.items()})
    path.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n")
