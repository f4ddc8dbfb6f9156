"""Drawing: matplotlib as inline SVG whose colours are the page's own, so that it reads in light and dark."""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = tuple(f"#0000{number:02x}" for number in range(1, 9))
"""Colours that stand for the page's `--series-1` to `--series-8`; more series begin again, with another line style."""
INK, GRID, PAPER, ALERT = "#000100", "#000200", "#000300", "#000400"
"""Stand for the page's text, grid, background, and for limits and faults."""
LINES_MAX = 8
"""In one panel of a run; captions say how many more there are."""
LEGEND_HANDLE_INCHES, LEGEND_LETTER_INCHES, LEGEND_ROW_INCHES = 0.6, 0.07, 0.2
"""What an entry of a legend takes besides its text, a letter of it, and a row."""
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_VARIABLES = {
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
    INK: "var(--ink)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    ALERT: "var(--alert)",
}
_COLOUR = re.compile("|".join(_VARIABLES))
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    # A dollar in a cluster's name is a dollar.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Plot:
    """A picture and what it shows.

    Attributes:
        svg: one `svg` element; its identifiers are its own on any page.
        caption: plain text: what is drawn, and how it was counted.
    """

    svg: str
    caption: str


def check_drawing() -> None:
    """Find out whether pages can be drawn, before anything is simulated for them.

    Raises:
        UnavailableError: matplotlib is not installed, or cannot be imported.
    """
    try:
        import matplotlib.backends.backend_svg
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UnavailableError(
            f"pages are drawn with matplotlib, which cannot be imported ({error}): pip install 'kvstore[report]', or "
            "leave --html out; figures and tables need nothing more"
        ) from error


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's settings for pages. Process-wide while it lasts: one thread draws at a time."""
    import matplotlib

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "kvstore"}):
        yield


def figure(name: str, *, columns: int = 1, height_inches: float = 2.8, **subplots: Any) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page with axes side by side; `name` tells its identifiers from others' on the page."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9.6, height_inches), layout="constrained", label=name)
    axes = made.subplots(1, columns, squeeze=False, **subplots)
    return made, list(axes[0])


def colour(number: int) -> str:
    """Of a series, by its number from 0."""
    return SERIES[number % len(SERIES)]


def line_style(number: int) -> str:
    """Of a series, by its number from 0; it changes where colours begin again."""
    return LINE_STYLES[number // len(SERIES) % len(LINE_STYLES)]


def legend_above(made: Figure, axes: Sequence[Axes]) -> None:
    """One legend above the panels, with what any of them has; the figure grows by its rows after the first."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if found:
        widest_inches = LEGEND_HANDLE_INCHES + LEGEND_LETTER_INCHES * max(map(len, found))
        columns = max(1, min(len(found), int(made.get_figwidth() / widest_inches)))
        rows = -(-len(found) // columns)
        made.set_figheight(made.get_figheight() + LEGEND_ROW_INCHES * (rows - 1))
        made.legend(found.values(), found, loc="outside upper left", ncols=columns)


def from_zero(axes: Axes, maximum: float) -> None:
    """An upright axis from 0, with room for marks at its top; up to 1 where all there is are zeros."""
    axes.set_ylim(0, 1.06 * maximum if maximum > 0 else 1.0)


def logarithmic(axes: Axes, *, is_upright: bool = False) -> None:
    """A logarithmic axis with plain numbers: powers would be formulas, which text here never is."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    (axes.set_yscale if is_upright else axes.set_xscale)("log")
    axis = axes.yaxis if is_upright else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())


def finish(made: Figure, caption: str) -> Plot:
    """Draw a figure. Equal figures give equal text."""
    drawn = io.StringIO()
    made.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Plot(_inline(drawn.getvalue(), str(made.get_label())), caption)


def _inline(document: str, name: str) -> str:
    """The `svg` element of a document, with the page's colours and identifiers that begin with `name`."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', element, count=1)
    element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)
    # Inside of tags alone: text may read like an identifier or a colour.
    element = re.sub(r"<[^!?][^>]*>", lambda tag: _of_page(tag[0], name), element)
    # What has no colour of its own would be black.
    return element.replace("<svg ", '<svg fill="var(--ink)" ', 1).strip()


def _of_page(tag: str, name: str) -> str:
    tag = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', tag)
    tag = re.sub(r'href="#([^"]*)"', rf'href="#{name}-\1"', tag)
    tag = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", tag)
    return _COLOUR.sub(lambda match: _VARIABLES[match[0]], tag)
