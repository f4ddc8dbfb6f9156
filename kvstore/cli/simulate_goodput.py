"""`kvstore simulate --goodput`: the largest rate at which enough requests meet both limits, by simulations."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from kvstore._version import __version__
from kvstore.cli.collected import INTERRUPTED, Collected
from kvstore.cli.printing import print_table
from kvstore.cli.progress import RatesProgress
from kvstore.cli.simulate import read_points, worker_count
from kvstore.errors import SimulationError
from kvstore.limits import SWEEP_POINT_DEADLINE_S
from kvstore.simulate.goodput import GOODPUT_TOLERANCE, SimulatedGoodput, simulated_goodput
from kvstore.simulate.report.files import check_directory, report_file
from kvstore.simulate.report.wording import MISSING, percent, rate, seconds, stability
from kvstore.simulate.simulation import simulate
from kvstore.simulate.sweep import named_apart
from kvstore.simulate.workers import run_all

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvstore.simulate.sweep import Point

RATE_KEY = "workload.arrivals.rate_per_s"


def run_goodput(
    scenarios: Sequence[str],
    *,
    rate_max_per_s: float | None,
    tolerance: float | None,
    out: Path | None,
    sweeps: Sequence[str],
    workers: int | None,
    as_json: bool,
) -> int:
    """Find the goodput of scenarios, or of a grid of each; the exit status as that of simulations."""
    points = read_points(scenarios, sweeps)
    if any(key == RATE_KEY for point in points for key, _ in point.settings):
        raise SimulationError(f"--goodput looks for the rate itself; leave --sweep {RATE_KEY} out")
    if out is not None:
        check_directory(out)
    find = partial(
        _goodput_of, rate_max_per_s=rate_max_per_s, tolerance=GOODPUT_TOLERANCE if tolerance is None else tolerance
    )
    failures: tuple[tuple[str, str], ...] = ()
    status = 0
    if len(points) == 1:
        with RatesProgress(points[0].scenario.name) as progress:
            run = partial(simulate, progress=progress.reached)
            found: tuple[SimulatedGoodput, ...] = (find(points[0], tried=progress, run=run),)
    else:
        points = named_apart(points)
        outcome: Collected[SimulatedGoodput] = Collected.of(
            [point.name for point in points],
            lambda ended: run_all(
                points,
                find,
                workers=min(worker_count(workers), len(points)),
                deadline_s=SWEEP_POINT_DEADLINE_S,
                ended=ended,
            ),
        )
        found, failures, status = outcome.values, outcome.failures, outcome.told()
    document = {
        "version": 1,
        "kvstore": __version__,
        "goodput": [each.to_document() for each in found],
        "failed": [{"run": name, "error": error} for name, error in failures],
    }
    text = json.dumps(document, indent=2, allow_nan=False)
    if out is not None and (found or status != INTERRUPTED):
        with report_file(out / "goodput.json") as opened:
            opened.write(text.encode() + b"\n")
    if as_json:
        print(text)
        return status
    if len(points) == 1:
        _print_tried(found[0])
    if found:
        _print_found(found)
        if out is not None:
            print(f"written to {out}")
    return status


def _goodput_of(point: Point, **options: Any) -> SimulatedGoodput:
    return simulated_goodput(point.scenario, settings=point.settings, **options)


def _print_tried(goodput: SimulatedGoodput) -> None:
    rows = [
        (
            rate(each.requests_per_s),
            percent(each.summary.good_share),
            "" if each.summary.is_stable else stability(each.summary.is_stable),
            f"{each.summary.requests:,}",
            seconds(each.summary.ttft.p50),
            seconds(each.summary.ttft.p90),
            seconds(each.summary.tpot.p90),
        )
        for each in sorted(goodput.tried, key=lambda each: each.requests_per_s)
    ]
    columns = ("rate", "in SLO", "", "requests", "TTFT P50", "P90", "TPOT P90")
    print_table(f"{goodput.scenario}: {len(rows)} simulations", columns, rows)


def _print_found(found: Sequence[SimulatedGoodput]) -> None:
    settings = [dict(each.settings) for each in found]
    swept = dict.fromkeys(key for each in settings for key in each)
    rows = [
        (
            each.scenario,
            *(str(setting.get(key, "")) for key in swept),
            percent(each.slo.share),
            f"{each.slo.ttft_s:g} s, {each.slo.tpot_s * 1e3:g} ms",
            rate(each.found.requests_per_s),
            percent(each.found.share),
            MISSING if each.found.above_requests_per_s is None else rate(each.found.above_requests_per_s),
            each.found.note,
        )
        for each, setting in zip(found, settings, strict=True)
    ]
    keys = [key.rpartition(".")[2] for key in swept]
    columns = ("scenario", *keys, "share", "within", "goodput", "in SLO", "too few at", "")
    print_table("Goodput: the largest rate at which enough requests meet both limits", columns, rows)
