"""The pictures of one run. Each is drawn from some hundred points, however long the run was."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from kvstore.simulate.report.figures import (
    ALERT,
    LINES_MAX,
    Plot,
    colour,
    drawing,
    figure,
    finish,
    from_zero,
    legend_above,
    line_style,
    logarithmic,
)
from kvstore.simulate.report.measured import measured

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from kvstore.simulate.report.values import Summary
    from kvstore.simulate.result import SimulationResult

NameT = TypeVar("NameT")

POINTS = 200
"""Of a line over time."""
BINS = 60
"""Of requests, by time of arrival or by length."""
BIN_REQUESTS_MIN = 5
"""Fewer have no quantile to speak of, and leave a gap."""
PANELS_MAX = 4
"""Of what a policy remembers, side by side."""
ROUTES_MAX = 12
"""That have a bar of their own."""
MARKS_MAX = 24
"""Happenings that are drawn."""
PART_NAMES = ("queue", "load", "prefix", "prefill", "transfer", "decode wait")
GBIT_BYTES = 1e9 / 8


def run_plots(result: SimulationResult, summary: Summary) -> tuple[Plot, ...]:
    """All pictures that a run has something for, in the order in which one would ask."""
    makers: tuple[Callable[[SimulationResult, Summary], Plot | None], ...] = (
        latency_plot,
        parts_plot,
        ttft_over_time_plot,
        ttft_by_length_plot,
        queues_plot,
        use_plot,
        egress_plot,
        policy_plot,
    )
    with drawing():
        return tuple(plot for make in makers if (plot := make(result, summary)) is not None)


def latency_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """Both distributions with their limits."""
    rows = measured(result).requests
    both = (
        ("time to first token, s", result.requests.ttft_s[rows], summary.slo_ttft_s),
        ("time per output token, s", result.requests.tpot_s[rows], summary.slo_tpot_s),
    )
    if not any(np.isfinite(values).any() for _, values, _ in both):
        return None
    made, axes = figure("latency", columns=2, sharey=True)
    shares = np.linspace(0, 1, POINTS + 1)
    for axis, (label, values, limit) in zip(axes, both, strict=True):
        there = values[np.isfinite(values)]
        if len(there):
            axis.plot(np.quantile(there, shares), shares, color=colour(0))
            if there.min() > 0 and there.max() > 30 * there.min():
                logarithmic(axis)
            else:
                axis.set_xlim(0, 1.05 * max(float(there.max()), limit))
        axis.axvline(limit, color=ALERT, linestyle="--", linewidth=1, label="limit")
        axis.set(xlabel=label, ylim=(0, 1.02))
    legend_above(made, axes)
    axes[0].set_ylabel("share of requests")
    return finish(
        made, "Share of the requests with a first token that had it, and its successors, within so many seconds."
    )


def parts_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """Stacked parts of the time to first token: all requests, the slowest, each route."""
    if not summary.parts:
        return None
    bars: list[tuple[str, Sequence[float]]] = [
        ("all requests", [part.mean_s for part in summary.parts]),
        ("slowest tenth", [part.slowest_mean_s for part in summary.parts]),
    ]
    routes = sorted(summary.routes, key=lambda route: -route.requests)
    for route in routes[:ROUTES_MAX]:
        if route.parts_mean_s:
            bars.append((f"{route.prefill} → {route.decode} ({route.share:.0%})", route.parts_mean_s))
    made, (axis,) = figure("parts", height_inches=1.2 + 0.34 * len(bars))
    left = np.zeros(len(bars))
    for number, name in enumerate(PART_NAMES):
        widths = np.array([values[number] for _, values in bars])
        axis.barh(range(len(bars)), widths, left=left, color=colour(number), label=name, height=0.66)
        left += widths
    axis.set_yticks(range(len(bars)), [name for name, _ in bars])
    axis.set(xlabel="seconds, mean")
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    legend_above(made, [axis])
    caption = "Where the time to first token went; routes are named by who prefilled and who decoded."
    return finish(made, caption + _left_out(len(routes) - ROUTES_MAX, "routes with the most requests"))


def ttft_over_time_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """Median and ninth decile by time of arrival, with what happened."""
    table = result.requests
    rows = np.isfinite(table.ttft_s)
    if not rows.any():
        return None
    edges = np.linspace(0, max(float(table.arrival_s[rows].max()), 1e-9), BINS + 1)
    made, (axis,) = figure("ttft-over-time")
    for number, (share, label) in enumerate(((0.5, "median"), (0.9, "P90"))):
        at_s, values = binned_quantile(table.arrival_s[rows], table.ttft_s[rows], edges, share)
        axis.plot(at_s, values, color=colour(number), label=label)
    axis.axhline(summary.slo_ttft_s, color=ALERT, linestyle="--", linewidth=1, label="limit")
    _mark(axis, result)
    axis.set(xlabel="time of arrival, s", ylabel="time to first token, s", ylim=(0, None))
    legend_above(made, [axis])
    return finish(
        made,
        "Time to first token by time of arrival. Dashed upright lines: faults, conversions and changes of mode, listed "
        "below; dotted: end of the warm-up.",
    )


def ttft_by_length_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """Median and ninth decile by prompt length, for each cluster that prefilled."""
    table = result.requests
    rows = measured(result).requests & np.isfinite(table.ttft_s) & (table.prefill >= 0)
    if not rows.any():
        return None
    lengths = table.prompt_tokens[rows].astype(np.float64)
    edges = np.geomspace(max(lengths.min(), 1.0), lengths.max() + 1, BINS // 2 + 1)
    made, (axis,) = figure("ttft-by-length")
    clusters = result.scenario.deployment.clusters
    prefilled = {number: int((rows & (table.prefill == number)).sum()) for number in range(len(clusters))}
    shown, left_out = _largest(prefilled)
    for number, at in enumerate(shown):
        cluster, here = clusters[at], rows & (table.prefill == at)
        for share, style in ((0.5, "-"), (0.9, "--")):
            tokens = table.prompt_tokens[here].astype(np.float64)
            middles, values = binned_quantile(tokens, table.ttft_s[here], edges, share)
            if np.isfinite(values).any():
                label = f"{cluster.name}, {'median' if share == 0.5 else 'P90'}"
                axis.plot(middles, values, color=colour(number), linestyle=style, marker=".", label=label)
    logarithmic(axis)
    axis.set(xlabel="prompt tokens", ylabel="time to first token, s", ylim=(0, None))
    legend_above(made, [axis])
    caption = "Time to first token by prompt length, for each cluster that prefilled."
    return finish(made, caption + _left_out(left_out, "clusters that prefilled the most"))


def queues_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """Who waits where."""
    samples = result.samples
    kinds = (
        ("prompts that wait for prefill", samples.prefill_waiting),
        ("requests that wait for decode", samples.decode_waiting),
    )
    return _over_time(result, "queues", kinds, "Queues over time, by cluster.")


def use_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """How much of what there is works."""
    samples = result.samples
    batch_max = {each.name: each.profile.decode_batch_max for each in result.scenario.deployment.clusters}
    prefill = {name: _ratio(samples.prefill_busy[name], there) for name, there in samples.prefill_instances.items()}
    decode = {
        name: _ratio(samples.decode_running[name], there * batch_max[name])
        for name, there in samples.decode_instances.items()
    }
    kinds = (("prefill instances busy, share", prefill), ("decode places taken, share", decode))
    return _over_time(result, "use", kinds, "Share of the instances, and of the places in batches, that were in use.")


def egress_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """What each link delivered, and could have."""
    samples = result.samples
    part = measured(result)
    if not samples.link_bytes or not len(samples.at_s):
        return None
    made, (axis,) = figure("egress")
    shown, left_out = _largest({pair: float(delivered.sum()) for pair, delivered in samples.link_bytes.items()})
    for number, (source, target) in enumerate(shown):
        delivered = samples.link_bytes[source, target]
        at_s, gbits_per_s = thinned(samples.at_s, _ratio(delivered, part.steps_s * GBIT_BYTES))
        axis.plot(at_s, gbits_per_s, color=colour(number), linestyle=line_style(number), label=f"{source} → {target}")
        capacity = samples.link_capacity_bytes_per_s[source, target] / GBIT_BYTES
        at_s, capacity = thinned(samples.at_s, capacity)
        axis.plot(at_s, capacity, color=colour(number), linewidth=0.8, alpha=0.5, drawstyle="steps-pre")
    _mark(axis, result)
    axis.set(xlabel="time, s", ylabel="Gbit/s", xlim=(0, samples.at_s[-1]), ylim=(0, None))
    legend_above(made, [axis])
    caption = "What each link delivered (strong) and could have carried (thin)."
    return finish(made, caption + _left_out(left_out, "links that delivered the most"))


def policy_plot(result: SimulationResult, summary: Summary) -> Plot | None:
    """What the policy remembered: a panel for each kind of number, a line for each cluster or link in brackets."""
    panels: dict[str, list[tuple[str, NDArray[np.float64]]]] = {}
    for name, values in result.samples.policy.items():
        if np.isfinite(values).any():
            kind, _, of_what = name.partition("[")
            panels.setdefault(kind, []).append((of_what.rstrip("]"), values))
    if not panels:
        return None
    shown = list(panels.items())[:PANELS_MAX]
    made, axes = figure("policy", columns=len(shown), height_inches=2.6)
    missing = 0
    for axis, (kind, lines) in zip(axes, shown, strict=True):
        by_name = dict(lines)
        largest, left_out = _largest({of_what: float(np.nanmax(values)) for of_what, values in lines})
        missing += left_out
        for number, of_what in enumerate(largest):
            at_s, drawn = thinned(result.samples.at_s, by_name[of_what])
            axis.plot(
                at_s,
                drawn,
                color=colour(number),
                linestyle=line_style(number),
                label=of_what or None,
                drawstyle="steps-post",
            )
        axis.set(title=kind, xlabel="time, s")
        if lines[0][0]:
            axis.legend(fontsize="x-small")
        if all(np.nanmin(values) >= 0 for _, values in lines):
            from_zero(axis, max(float(np.nanmax(values)) for _, values in lines))
    return finish(made, "What the policy remembered over time." + _left_out(missing, "largest numbers"))


def binned_quantile(
    at: NDArray[np.float64], values: NDArray[np.float64], edges: NDArray[np.float64], share: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles of the bins, and the values' quantile in each: NaN, a gap, where there are too few."""
    order = np.argsort(at, kind="stable")
    parts = np.split(values[order], np.searchsorted(at[order], edges[1:-1], side="left"))
    found = [np.quantile(part, share) if len(part) >= BIN_REQUESTS_MIN else np.nan for part in parts]
    return (edges[1:] + edges[:-1]) / 2, np.array(found)


def thinned(
    at_s: NDArray[np.float64], values: NDArray[np.float64], points: int = POINTS
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most so many points: each is the mean of what it stands for, at its end."""
    if len(at_s) <= points:
        return at_s, values
    parts = np.array_split(np.arange(len(at_s)), points)
    return np.array([at_s[part[-1]] for part in parts]), np.array([values[part].mean() for part in parts])


def _ratio(values: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.full(len(values), np.nan)
    np.divide(values, whole, out=shares, where=whole > 0)
    return shares


def _over_time(
    result: SimulationResult,
    name: str,
    kinds: Sequence[tuple[str, Mapping[str, NDArray[np.float64]]]],
    caption: str,
) -> Plot | None:
    if not len(result.samples.at_s):
        return None
    made, axes = figure(name, columns=len(kinds))
    totals = [{cluster: float(np.nansum(values)) for cluster, values in by_cluster.items()} for _, by_cluster in kinds]
    # A cluster has one colour in all panels.
    shown, left_out = _largest({cluster: max(each[cluster] for each in totals) for cluster in totals[0]})
    for axis, (title, by_cluster) in zip(axes, kinds, strict=True):
        highest = 0.0
        for number, cluster in enumerate(shown):
            at_s, values = thinned(result.samples.at_s, by_cluster[cluster], POINTS // 2)
            if np.isfinite(values).any():
                highest = max(highest, float(np.nanmax(values)))
                axis.plot(at_s, values, color=colour(number), linestyle=line_style(number), label=cluster)
        _mark(axis, result)
        axis.set(title=title, xlabel="time, s", xlim=(0, result.samples.at_s[-1]))
        from_zero(axis, highest)
    legend_above(made, axes)
    return finish(made, caption + _left_out(left_out, "clusters with the most"))


def _largest(totals: Mapping[NameT, float]) -> tuple[list[NameT], int]:
    """At most `LINES_MAX` of the names, the largest, in their order; and how many are left out."""
    ranked = sorted(totals, key=lambda name: -totals[name])[:LINES_MAX]
    return [name for name in totals if name in ranked], len(totals) - len(ranked)


def _left_out(count: int, shown: str) -> str:
    return f" Drawn are the {shown}; {count} more are left out." if count > 0 else ""


def _mark(axis: Axes, result: SimulationResult) -> None:
    for happening in result.happenings[:MARKS_MAX]:
        axis.axvline(happening.at_s, color=ALERT, linestyle=(0, (4, 3)), linewidth=0.9)
    if result.scenario.warmup_s > 0:
        axis.axvline(result.scenario.warmup_s, color=ALERT, linestyle=":", linewidth=0.9)
