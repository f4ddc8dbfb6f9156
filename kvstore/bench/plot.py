"""A result as a picture: a self-contained SVG, which every browser shows, made without further packages."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from kvstore.bench.result import RATE_UNIT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvstore.bench.result import CaseResult

WIDTH = 900
LABEL_WIDTH = 240
BAR_HEIGHT = 16
GAP = 6
TITLE_HEIGHT = 34
VALUE_WIDTH = 150
OURS, THEIRS, RANGE = "#1f6fb2", "#b9c4ce", "#333333"


def write_plot(path: Path, results: Sequence[CaseResult], caption: str) -> None:
    """One panel of bars per case: median GB/s, with a line from the slowest to the fastest round."""
    parts: list[str] = []
    top = TITLE_HEIGHT
    for result in results:
        panel, top = _panel(result, top)
        parts += panel
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + GAP}" '
        f'viewBox="0 0 {WIDTH} {top + GAP}" font-family="sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{top + GAP}" fill="#ffffff"/>'
    title = _text(GAP, 18, caption, size=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, background, title, *parts, "</svg>"]) + "\n")


def _panel(result: CaseResult, top: int) -> tuple[list[str], int]:
    figures = result.figures()
    parts = [_text(GAP, top + 16, f"{result.label}, GB/s", size=14)]
    top += 24
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / max((each.gigabytes_per_s_max for each in figures), default=1.0)
    rows = {row.baseline_name: row for row in result.rows() if row.unit == RATE_UNIT}
    for each in figures:
        middle = top + BAR_HEIGHT / 2
        low, high = (LABEL_WIDTH + scale * value for value in (each.gigabytes_per_s_min, each.gigabytes_per_s_max))
        value = f"{each.gigabytes_per_s:.2f}"
        if each.name in rows:
            value += f" (ours/it {rows[each.name].ratio_median:.2f})"
        parts += [
            _text(GAP, middle + 4, each.name),
            f'<rect x="{LABEL_WIDTH}" y="{top}" width="{scale * each.gigabytes_per_s:.1f}" height="{BAR_HEIGHT}" '
            f'fill="{OURS if each.name == result.ours else THEIRS}"/>',
            f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="{RANGE}"/>',
            _text(high + GAP, middle + 4, value),
        ]
        top += BAR_HEIGHT + GAP
    for absent in result.failures():
        parts.append(_text(GAP, top + 12, f"{absent.baseline_name}: no result"))
        top += BAR_HEIGHT + GAP
    return parts, top + 2 * GAP


def _text(x: float, y: float, text: str, *, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}">{escape(text)}</text>'
