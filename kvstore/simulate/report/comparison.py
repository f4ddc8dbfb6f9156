"""The page of several runs: policies beside one another, over load or whatever a sweep varied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from kvstore.simulate.report.figures import (
    ALERT,
    MARKERS,
    PAPER,
    Plot,
    check_drawing,
    colour,
    drawing,
    figure,
    finish,
    from_zero,
    legend_above,
    line_style,
    logarithmic,
)
from kvstore.simulate.report.files import report_file, write_summaries
from kvstore.simulate.report.markup import alert, document, heading, picture, section, table
from kvstore.simulate.report.wording import gbits, percent, rate, seconds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from kvstore.simulate.report.values import Summary

LOGARITHMIC_FROM = 10.0
"""Times as large as the least that times to first token reach, for an axis to be logarithmic."""
SEED, RATE = "seed", "rate_per_s"
"""Keys, and the last part of a key, that a comparison reads as repetitions and as load."""


@dataclass(frozen=True)
class Point:
    """One place on a line: runs that differ in their seeds alone.

    Attributes:
        x: where it lies.
        runs: at least one.
    """

    x: float
    runs: tuple[Summary, ...]


@dataclass(frozen=True)
class Lines:
    """Runs as lines over one axis.

    Attributes:
        axis: its label.
        series: points by name, in order of x.
        ticks: names of places 0, 1, 2 … where the axis has no numbers.
    """

    axis: str
    series: dict[str, tuple[Point, ...]]
    ticks: tuple[str, ...] = ()


Value = Callable[["Summary"], float | None]


def _egress_gbits_per_s(run: Summary) -> float | None:
    return None if run.egress_mean_bytes_per_s is None else run.egress_mean_bytes_per_s * 8 / 1e9


PANELS: tuple[tuple[str, str, Value], ...] = (
    ("ttft", "time to first token, P90, s", lambda run: run.ttft.p90),
    ("ttft", "time to first token, median, s", lambda run: run.ttft.p50),
    ("goodput", "goodput, requests/s", lambda run: run.goodput_per_s),
    ("goodput", "share within the SLO", lambda run: run.good_share),
    ("rest", "over all links, Gbit/s", _egress_gbits_per_s),
    ("rest", "prompt tokens from caches, share", lambda run: run.hit_share),
)


def comparison_page(
    runs: Sequence[Summary], *, title: str = "Comparison", failures: Iterable[tuple[str, str]] = ()
) -> str:
    """The page of several runs: one self-contained HTML document.

    Args:
        runs: in the order in which they are listed.
        title: of the page.
        failures: runs that came to nothing: their name, and why.

    Raises:
        UnavailableError: matplotlib is not there.
    """
    check_drawing()
    failures = list(failures)
    policies = ", ".join(dict.fromkeys(run.policy for run in runs))
    parts = [heading(title, f"{len(runs)} simulations; policies: {policies or 'none'}.")]
    unstable = sum(not run.is_stable for run in runs)
    if unstable:
        are = "is" if unstable == 1 else "are"
        parts.append(
            alert(
                f"{unstable} of {len(runs)} runs {are} not stable (open marks, “NOT STABLE” below"
                "): work came faster than it was done, and their percentiles would be worse after longer runs."
            )
        )
    if failures:
        parts.append(
            alert(f"{len(failures)} of {len(runs) + len(failures)} runs came to nothing; they are listed below.")
        )
    if runs:
        with drawing():
            parts += [section("Side by side"), *(picture(plot) for plot in comparison_plots(runs))]
        parts += [section("In figures"), table(*comparison_rows(runs))]
    if failures:
        parts += [section("Runs that came to nothing"), table(("run", "why"), failures, is_text=True)]
    return document(title, parts)


def write_comparison(
    runs: Sequence[Summary],
    directory: Path,
    *,
    title: str = "Comparison",
    failures: Iterable[tuple[str, str]] = (),
    has_page: bool = False,
) -> tuple[Path, ...]:
    """Write `comparison.json`, `comparison.csv` and, if asked, `comparison.html`.

    Raises:
        UnavailableError: matplotlib is not there, and a page is asked for.
        SimulationError: a file cannot be written.
    """
    failures = list(failures)
    page = comparison_page(runs, title=title, failures=failures) if has_page else None
    written = list(write_summaries(runs, directory, "comparison", failures))
    if page is not None:
        written.append(directory / "comparison.html")
        with report_file(written[-1]) as opened:
            opened.write(page.encode())
    return tuple(written)


def comparison_rows(runs: Sequence[Summary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a row for each run."""
    keys = list(dict.fromkeys(key for run in runs for key, _ in run.settings))
    columns = (
        "scenario", "policy", *keys, "", "offered", "goodput", "within SLO", "Λ", "TTFT P50", "TTFT P90", "TTFT P99",
        "TPOT P90", "links", "from cache", "rejected", "failed",
    )  # fmt: skip
    rows = [
        (
            run.scenario,
            run.policy,
            *(dict(run.settings).get(key, "") for key in keys),
            "stable" if run.is_stable else "NOT STABLE",
            rate(run.offered_per_s),
            rate(run.goodput_per_s),
            percent(run.good_share),
            rate(run.throughput_per_s),
            seconds(run.ttft.p50),
            seconds(run.ttft.p90),
            seconds(run.ttft.p99),
            seconds(run.tpot.p90),
            gbits(run.egress_mean_bytes_per_s),
            percent(run.hit_share),
            f"{run.rejected:,}",
            f"{run.failed:,}",
        )
        for run in runs
    ]
    return columns, rows


def comparison_plots(runs: Sequence[Summary]) -> tuple[Plot, ...]:
    """Pictures of several runs, two panels each; inside of `drawing`."""
    lines = lines_of(runs)
    limits = {run.slo_ttft_s for run in runs}
    plots: list[Plot] = []
    for name in dict.fromkeys(panel for panel, _, _ in PANELS):
        panels = [(label, value) for panel, label, value in PANELS if panel == name]
        made, axes = figure(f"comparison-{name}", columns=len(panels), height_inches=3.2)
        for axis, (label, value) in zip(axes, panels, strict=True):
            _draw(axis, lines, value)
            if name == "ttft" and len(limits) == 1:
                axis.axhline(limits.copy().pop(), color=ALERT, linestyle="--", linewidth=1)
            axis.set(xlabel=lines.axis, ylabel=label)
            found = [each for each in map(value, runs) if each]
            # Times to first token below and beyond saturation differ by orders of magnitude.
            if name == "ttft" and found and max(found) > LOGARITHMIC_FROM * min(found):
                logarithmic(axis, is_upright=True)
            else:
                from_zero(axis, max(found, default=0.0))
            if lines.ticks:
                axis.set_xticks(range(len(lines.ticks)), list(lines.ticks), rotation=20, ha="right")
        legend_above(made, axes)
        plots.append(finish(made, _CAPTIONS[name]))
    return tuple(plots)


_CAPTIONS = {
    "ttft": "Time to first token; dashed: the limit. Open marks: not stable. Upright bars span seeds, where there are "
    "several.",
    "goodput": "Requests that met both limits of the SLO: per second, and as a share of those whose fate is known.",
    "rest": "What crossed links, on average over the measured time, and what caches saved.",
}


def lines_of(runs: Sequence[Summary]) -> Lines:
    """Runs as lines: over the offered load where a rate was varied, else over the number that was varied most.

    Runs that differ in their seeds alone are one point.
    """
    varied = {
        key: list(dict.fromkeys(dict(run.settings).get(key, "") for run in runs))
        for key in dict.fromkeys(key for run in runs for key, _ in run.settings)
        if key.rpartition(".")[2] != SEED
    }
    rates = [key for key in varied if key.rpartition(".")[2] == RATE and len(varied[key]) > 1]
    numeric = [key for key, values in varied.items() if len(values) > 1 and all(map(_is_number, values))]
    ranked = rates or sorted(numeric, key=lambda key: -len(varied[key]))
    over = ranked[0] if ranked else None
    has_names = len({run.scenario for run in runs}) > 1
    # Runs by line, then by what places them on it.
    grouped: dict[str, dict[tuple[tuple[str, str], ...], list[Summary]]] = {}
    for run in runs:
        others = [(key, value) for key, value in run.settings if key in varied and key not in (over, "policy.name")]
        name = " ".join([*([run.scenario] if has_names else []), run.policy])
        told = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in others if len(varied[key]) > 1)
        place = tuple((key, value) for key, value in run.settings if key in varied)
        grouped.setdefault(f"{name}, {told}" if told else name, {}).setdefault(place, []).append(run)
    series: dict[str, tuple[Point, ...]] = {}
    for number, (name, places) in enumerate(grouped.items()):
        points = []
        for place, group in places.items():
            if over is None:
                x: float | None = float(number)
            elif over in rates:
                offered = [run.offered_per_s for run in group if run.offered_per_s is not None]
                x = fmean(offered) if offered else None
            else:
                x = float(dict(place)[over]) if over in dict(place) else None
            if x is not None:
                points.append(Point(x, tuple(group)))
        series[name] = tuple(sorted(points, key=lambda point: point.x))
    if over is None:
        return Lines("", series, tuple(grouped))
    return Lines("offered, requests/s" if over in rates else over, series)


def _draw(axis: Axes, lines: Lines, value: Value) -> None:
    for number, (name, points) in enumerate(lines.series.items()):
        there = [
            (point, [each for each in map(value, point.runs) if each is not None])
            for point in points
            if any(value(run) is not None for run in point.runs)
        ]
        xs = [point.x for point, _ in there]
        ys = [fmean(values) for _, values in there]
        marker = MARKERS[number % len(MARKERS)]
        axis.plot(xs, ys, color=colour(number), linestyle=line_style(number), marker=marker, clip_on=False, label=name)
        for (point, values), y in zip(there, ys, strict=True):
            if len(values) > 1:
                axis.vlines(point.x, min(values), max(values), color=colour(number), linewidth=1)
            if not all(run.is_stable for run in point.runs):
                axis.plot(
                    [point.x], [y], marker=marker, color=colour(number), markerfacecolor=PAPER, clip_on=False, zorder=3
                )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
