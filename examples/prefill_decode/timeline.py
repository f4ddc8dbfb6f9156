"""The timeline as an SVG: what each layer computed, sent and received, and when."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from .values import Bar, Sent

KINDS = ("compute", "send", "receive")
LEGEND = {
    "compute": "prefill computes the layer (shades: chunks)",
    "send": "its bytes leave",
    "receive": "its bytes arrive",
    "exposed": "from the end of the prefill to the commit",
}
WIDTH = 1200
LEFT, RIGHT = 132, 24
PANEL_ROWS_HEIGHT = 300
LANE_HEIGHT_MIN, LANE_HEIGHT_MAX = 3.0, 9.0
BAR_WIDTH_MIN = 0.8
TICKS_MAX = 12

LIGHT = {
    "paper": "#ffffff", "stripe": "#f3f5f8", "exposed": "#fde3b5", "ink": "#1f2328", "faint": "#d0d7de",
    "compute": "#3b6fb6", "send": "#d9641e", "receive": "#17926f",
}  # fmt: skip
DARK = {
    "paper": "#0d1117", "stripe": "#161b22", "exposed": "#553c12", "ink": "#e6edf3", "faint": "#3d444d",
    "compute": "#6ea8fe", "send": "#ff9a57", "receive": "#4fd1a5",
}  # fmt: skip
SHAPES = """
  text { font: 12px sans-serif; } .title { font-size: 16px; font-weight: bold; }
  .panel { font-size: 14px; font-weight: bold; } .end { text-anchor: end; } .middle { text-anchor: middle; }
  .odd { opacity: 0.68; } .mark { stroke-width: 1.5; stroke-dasharray: 5 3; }
"""


def _style() -> str:
    # Plain colours and one media query: many viewers know no CSS variables.
    dark = " ".join(_colours(DARK))
    return "\n".join([*_colours(LIGHT), SHAPES, f"@media (prefers-color-scheme: dark) {{ {dark} }}"])


def _colours(palette: Mapping[str, str]) -> list[str]:
    filled = ("paper", "stripe", "exposed", *KINDS)
    return [
        *(f".{name} {{ fill: {palette[name]}; }}" for name in filled),
        f"text {{ fill: {palette['ink']}; }} .grid {{ stroke: {palette['faint']}; }}",
        f".axis, .mark {{ stroke: {palette['ink']}; }}",
    ]


@dataclass(frozen=True)
class Panel:
    """One run to draw."""

    title: str
    sent: Sent
    received: tuple[Bar, ...]

    @property
    def bars(self) -> list[Bar]:
        return [*self.sent.bars, *self.received]

    @property
    def end_s(self) -> float:
        """When its last event ended, in seconds after its start."""
        return max(self.sent.committed_s, *(bar.end_s for bar in self.bars)) - self.sent.started_s


def draw_timeline(title: str, layers: Mapping[int, str], panels: Sequence[Panel]) -> str:
    """The picture, with one time axis for all panels.

    Args:
        title: of the whole.
        layers: a word about each layer, by its number; a row each.
        panels: one below the other.
    """
    lane = min(LANE_HEIGHT_MAX, max(LANE_HEIGHT_MIN, PANEL_ROWS_HEIGHT / len(layers) / (len(KINDS) + 1)))
    scale = _Scale(max(panel.end_s for panel in panels) * 1.02, lane)
    body: list[str] = []
    top = 74.0
    for panel in panels:
        body += _draw_panel(panel, layers, scale, top)
        top += scale.panel_height(len(layers))
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top:.0f}" width="{WIDTH}" height="{top:.0f}"'
        f' role="img" aria-label="{escape(title, quote=True)}">',
        f"<style>{_style()}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{top:.0f}"/>',
        _text(LEFT, 26, title, "title"),
        *_legend(),
    ]
    return "\n".join([*head, *body, "</svg>", ""])


@dataclass(frozen=True)
class _Scale:
    """Seconds and layers to coordinates."""

    end_s: float
    lane: float

    @property
    def row(self) -> float:
        return self.lane * (len(KINDS) + 1)

    def x(self, seconds: float) -> float:
        return LEFT + seconds / self.end_s * (WIDTH - LEFT - RIGHT)

    def panel_height(self, rows: int) -> float:
        return rows * self.row + 108

    def ticks(self) -> list[float]:
        step = next(
            unit * 10.0**power
            for power in range(-4, 6)
            for unit in (1, 2, 5)
            if self.end_s / (unit * 10.0**power) <= TICKS_MAX
        )
        return [number * step for number in range(int(self.end_s / step) + 1)]


def _draw_panel(panel: Panel, layers: Mapping[int, str], scale: _Scale, top: float) -> list[str]:
    rows = {layer: number for number, layer in enumerate(layers)}
    start_s = panel.sent.started_s
    first = top + 46
    bottom = first + len(rows) * scale.row
    parts = [_text(LEFT, top + 14, panel.title, "panel")]
    for layer, number in rows.items():
        y = first + number * scale.row
        if number % 2 == 0:
            parts.append(_rectangle("stripe", LEFT, y, WIDTH - LEFT - RIGHT, scale.row))
        if scale.row >= 12 or number % 2 == 0:
            label = f"layer {layer} {layers[layer]}".strip()
            parts.append(_text(LEFT - 8, y + scale.row / 2 + 4, label, "end"))
    computed, committed = (scale.x(at_s - start_s) for at_s in (panel.sent.computed_s, panel.sent.committed_s))
    parts.append(_rectangle("exposed", computed, first, max(committed - computed, BAR_WIDTH_MIN), bottom - first))
    for tick in scale.ticks():
        x = scale.x(tick)
        parts.append(_line("grid", x, first, x, bottom))
        parts.append(_text(x, bottom + 16, f"{tick:g}", "middle"))
    parts.append(_line("axis", LEFT, bottom, WIDTH - RIGHT, bottom))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 34, "seconds since the prompt arrived", "middle"))
    chunks = sorted({bar.chunk for bar in panel.bars if bar.chunk is not None})
    for bar in _merged(panel.bars, scale.end_s / (WIDTH - LEFT - RIGHT)):
        if bar.layer in rows:
            parts.append(_draw_bar(bar, start_s, first + rows[bar.layer] * scale.row, chunks, scale))
    for x in (computed, committed):
        parts.append(_line("mark", x, first - 6, x, bottom))
    parts.append(_text(computed - 4, first - 10, f"prefill ends, {panel.sent.prefill_s:.2f} s", "end"))
    is_late = committed > WIDTH - 190
    label = f"exposed {panel.sent.exposed_s * 1e3:.0f} ms, then committed"
    # Where there is no room to the right, the label goes a line higher, so that it does not meet its neighbour.
    parts.append(
        _text(committed + (0 if is_late else 4), first - (24 if is_late else 10), label, "end" if is_late else "")
    )
    return parts


def _draw_bar(bar: Bar, start_s: float, y: float, chunks: list[tuple[int, int]], scale: _Scale) -> str:
    x = scale.x(bar.start_s - start_s)
    width = max(scale.x(bar.end_s - start_s) - x, BAR_WIDTH_MIN)
    y += (KINDS.index(bar.kind) + 0.5) * scale.lane
    what = f"{bar.kind}: layer {bar.layer}, {format_bytes(bar.size_bytes)}, {(bar.end_s - bar.start_s) * 1e3:.1f} ms"
    style = bar.kind
    if bar.chunk is not None:
        what += f", tokens {bar.chunk[0]:,} to {bar.chunk[1]:,}"
        style += " odd" if chunks.index(bar.chunk) % 2 else ""
    return (
        f'<rect class="{style}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{scale.lane:.2f}">'
        f"<title>{escape(what)}</title></rect>"
    )


def _merged(bars: Iterable[Bar], gap_s: float) -> list[Bar]:
    """Bars of bytes on their way that nearly touch, as one; computed chunks stay apart."""
    merged: list[Bar] = []
    for bar in sorted(bars, key=lambda bar: (bar.kind, bar.layer, bar.start_s)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and bar.chunk is None
            and (last.kind, last.layer) == (bar.kind, bar.layer)
            and bar.start_s - last.end_s <= gap_s
        ):
            end_s, size_bytes = max(last.end_s, bar.end_s), last.size_bytes + bar.size_bytes
            merged[-1] = type(bar)(bar.kind, bar.layer, last.start_s, end_s, size_bytes)
        else:
            merged.append(bar)
    return merged


def _legend() -> list[str]:
    parts, x = [], float(LEFT)
    for style, words in LEGEND.items():
        parts += [_rectangle(style, x, 42, 22, 10), _text(x + 28, 51, words)]
        x += 52 + 6.4 * len(words)
    return parts


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _rectangle(style: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{style}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'
