"""`kvstore simulate`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from kvstore.cli.collected import Collected
from kvstore.cli.printing import print_table
from kvstore.cli.progress import RunProgress
from kvstore.errors import SimulationError
from kvstore.scenario import scenario_table
from kvstore.simulate.report.comparison import write_comparison
from kvstore.simulate.report.figures import check_drawing
from kvstore.simulate.report.files import check_directory, summaries_document
from kvstore.simulate.report.page import UNSTABLE, headline
from kvstore.simulate.report.wording import gbits, percent, rate, seconds, stability
from kvstore.simulate.sweep import Output, axis_of, named_apart, points_of, run_point, run_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvstore.simulate.report.values import Summary
    from kvstore.simulate.sweep import Point


def run_simulate(
    scenarios: Sequence[str],
    *,
    out: Path | None,
    has_page: bool,
    sweeps: Sequence[str],
    workers: int | None,
    as_json: bool,
) -> int:
    """Simulate scenarios, or a grid of each; the exit status: 1 where one of them came to nothing, 130 on Ctrl-C."""
    if has_page:
        if out is None:
            raise SimulationError("--html draws a page, which needs a place; give --out DIR")
        # Before anything is simulated for it.
        check_drawing()
    points = read_points(scenarios, sweeps)
    if out is not None:
        check_directory(out)
    if len(points) == 1:
        return _one(points[0], out, has_page=has_page, as_json=as_json)
    return _several(named_apart(points), out, has_page=has_page, workers=worker_count(workers), as_json=as_json)


def worker_count(workers: int | None) -> int:
    """How many simulations run at a time; as many as cores by default."""
    return len(os.sched_getaffinity(0)) if workers is None else workers


def read_points(scenarios: Sequence[str], sweeps: Sequence[str]) -> Sequence[Point]:
    """The grid of each scenario, one after the other; their names may be the same."""
    axes = [axis_of(text) for text in sweeps]
    points: list[Point] = []
    for name in scenarios:
        table, base_directory, file = scenario_table(name)
        points += points_of(table, base_directory, axes, file=file)
    return points


def _one(point: Point, out: Path | None, *, has_page: bool, as_json: bool) -> int:
    with RunProgress(point.scenario.name, point.scenario.duration_s) as progress:
        summary = run_point(point, out, has_page=has_page, progress=progress)
    if as_json:
        print(json.dumps(summaries_document([summary]), indent=2, allow_nan=False))
        return 0
    _print(summary)
    if out is not None:
        print(f"written to {out}")
    return 0


def _several(points: Sequence[Point], out: Path | None, *, has_page: bool, workers: int, as_json: bool) -> int:
    output = None if out is None else Output(out, has_page)
    outcome: Collected[Summary] = Collected.of(
        [point.name for point in points], lambda ended: run_sweep(points, workers=workers, output=output, ended=ended)
    )
    runs, failures = outcome.values, outcome.failures
    if out is not None and (runs or not outcome.was_interrupted):
        title = f"Comparison: {', '.join(dict.fromkeys(point.scenario.name for point in points))}"
        if outcome.was_interrupted:
            title += f" (interrupted: {len(runs)} of {len(points)} simulations)"
        write_comparison(runs, out, title=title, failures=failures, has_page=has_page)
    if as_json:
        print(json.dumps(summaries_document(runs, failures), indent=2, allow_nan=False))
    elif runs:
        print_table(f"{len(runs)} of {len(points)} simulations", *_rows(runs))
        if out is not None:
            print(f"written to {out}")
    return outcome.told()


def _rows(runs: Sequence[Summary]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns, and a row for each run: what fits a terminal, of settings just those that differ."""
    settings = [dict(run.settings) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    varied = [key for key in keys if len({each.get(key) for each in settings}) > 1 and key != "policy.name"]
    columns = (
        "scenario", "policy", *(key.rpartition(".")[2] for key in varied), "", "offered", "goodput", "in SLO",
        "TTFT P50", "P90", "TPOT P90", "links",
    )  # fmt: skip
    rows = [
        (
            run.scenario,
            run.policy,
            *(each.get(key, "") for key in varied),
            "" if run.is_stable else stability(run.is_stable),
            rate(run.offered_per_s),
            rate(run.goodput_per_s),
            percent(run.good_share),
            seconds(run.ttft.p50),
            seconds(run.ttft.p90),
            seconds(run.tpot.p90),
            gbits(run.egress_mean_bytes_per_s),
        )
        for run, each in zip(runs, settings, strict=True)
    ]
    return columns, rows


def _print(summary: Summary) -> None:
    if not summary.is_stable:
        print(f"{stability(summary.is_stable)}: {UNSTABLE}\n")
    requests = f"{summary.requests:,} requests, {summary.rejected:,} rejected, {summary.failed:,} failed"
    title = f"{summary.scenario}: {summary.policy}, seed {summary.seed}; {requests}, {summary.pending:,} cut off"
    print_table(title, ("figure", "value"), [(name, value) for value, name in headline(summary)])
    print_table(
        "latency",
        ("", "mean", "P50", "P90", "P99", "max"),
        [
            (name, *map(seconds, (each.mean, each.p50, each.p90, each.p99, each.maximum)))
            for name, each in (("time to first token", summary.ttft), ("time per output token", summary.tpot))
        ],
    )
    print_table(
        "where the time to first token went",
        ("part", "mean", "share", "mean of the slowest tenth"),
        [
            (part.label, seconds(part.mean_s), percent(part.share), seconds(part.slowest_mean_s))
            for part in summary.parts
        ],
    )
    print_table(
        "who prefilled and decoded",
        ("prefill → decode", "requests", "share", "TTFT mean", "TTFT P90"),
        [
            (
                f"{route.prefill} → {route.decode}",
                f"{route.requests:,}",
                percent(route.share),
                seconds(route.ttft_mean_s),
                seconds(route.ttft_p90_s),
            )
            for route in summary.routes
        ],
    )
