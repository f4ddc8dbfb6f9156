"""The page of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.simulate.report.described import (
    CLUSTER_COLUMNS,
    LINK_COLUMNS,
    assumptions,
    cluster_rows,
    link_rows,
    setting_rows,
)
from kvstore.simulate.report.figures import check_drawing
from kvstore.simulate.report.files import report_file
from kvstore.simulate.report.markup import (
    alert,
    bullets,
    cards,
    document,
    heading,
    paragraph,
    picture,
    section,
    subsection,
    table,
)
from kvstore.simulate.report.plots import run_plots
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.report.wording import MISSING, gbits, number, percent, rate, seconds, stability, tokens
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.simulate.report.values import Spread, Summary
    from kvstore.simulate.result import SimulationResult

HAPPENINGS_SHOWN = 100
UNSTABLE = (
    "This run is not stable: work came faster than it was done, and the backlog still grew at the end. Percentiles and "
    "shares below describe the length of the run as much as the deployment; they would be worse after a longer one."
)


def run_page(result: SimulationResult, summary: Summary | None = None) -> str:
    """The page of one run: one self-contained HTML document.

    Raises:
        UnavailableError: matplotlib is not there.
    """
    check_drawing()
    summary = summary or summarise(result)
    scenario = result.scenario
    varied = "".join(f", {key} = {value}" for key, value in summary.settings)
    under = (
        f"Simulation of {summary.requests:,} requests over {summary.until_s - summary.from_s:,.0f} s by the policy "
        f"“{summary.policy}”, seed {summary.seed}{varied}; {stability(summary.is_stable)}."
    )
    parts = [heading(scenario.name, under)]
    if not summary.is_stable:
        parts.append(alert(UNSTABLE))
    parts += [cards(headline(summary)), section("What was simulated")]
    parts.append(table(CLUSTER_COLUMNS, cluster_rows(scenario)))
    if scenario.deployment.links:
        parts.append(table(LINK_COLUMNS, link_rows(scenario)))
    parts.append(table(("setting", "value"), setting_rows(scenario), is_text=True))
    parts += [section("What happened"), *(picture(plot) for plot in run_plots(result, summary))]
    parts += [section("In figures"), *_tables(result, summary)]
    parts += [section("What is assumed"), bullets(assumptions(scenario))]
    return document(f"{scenario.name}: {summary.policy}", parts)


def write_page(result: SimulationResult, directory: Path, summary: Summary | None = None) -> Path:
    """Write the page of one run as `report.html`.

    Raises:
        UnavailableError: matplotlib is not there.
        SimulationError: the file cannot be written.
    """
    page = run_page(result, summary)
    path = directory / "report.html"
    with report_file(path) as opened:
        opened.write(page.encode())
    return path


def headline(summary: Summary) -> list[tuple[str, str]]:
    """The figures that one looks at first: value and name."""
    verdict = "met" if summary.meets_slo else "not met"
    return [
        (rate(summary.goodput_per_s), f"goodput of {rate(summary.offered_per_s)} offered"),
        (percent(summary.good_share), f"within the SLO; {percent(summary.slo_share)} asked for, {verdict}"),
        (rate(summary.throughput_per_s), "throughput (Λ)"),
        (seconds(summary.ttft.p50), "time to first token, median"),
        (seconds(summary.ttft.p90), f"time to first token, P90; limit {seconds(summary.slo_ttft_s)}"),
        (seconds(summary.tpot.p90), f"time per output token, P90; limit {seconds(summary.slo_tpot_s)}"),
        (percent(summary.hit_share), f"of prompt tokens from caches; {percent(summary.possible_share)} possible"),
        (gbits(summary.egress_mean_bytes_per_s), "over all links, mean"),
    ]


def _tables(result: SimulationResult, summary: Summary) -> list[str]:
    parts = [
        subsection("Requests"),
        table(
            ("", "arrived", "done", "rejected", "failed", "cut off"),
            [
                (
                    "measured",
                    *(
                        tokens(each)
                        for each in (
                            summary.requests,
                            summary.done,
                            summary.rejected,
                            summary.failed,
                            summary.pending,
                        )
                    ),
                )
            ],
        ),
        subsection("Latency"),
        table(
            ("", "mean", "P50", "P75", "P90", "P95", "P99", "max", "without"),
            [_spread("time to first token", summary.ttft), _spread("time per output token", summary.tpot)],
            note="Without: measured requests that have none, since they were turned away, lost, cut off, or too short.",
        ),
        subsection("Where the time to first token went"),
        table(
            ("part", "mean", "share", "mean of the slowest tenth"),
            [
                (
                    part.label,
                    seconds(part.mean_s),
                    percent(part.share),
                    seconds(part.slowest_mean_s),
                )
                for part in summary.parts
            ],
        ),
        subsection("Routes"),
        table(
            ("prefill → decode", "requests", "share", "prompt tokens", "from cache", "TTFT mean", "TTFT P90"),
            [
                (
                    f"{route.prefill} → {route.decode}",
                    tokens(route.requests),
                    percent(route.share),
                    tokens(route.prompt_tokens_mean),
                    tokens(route.cached_tokens_mean),
                    seconds(route.ttft_mean_s),
                    seconds(route.ttft_p90_s),
                )
                for route in summary.routes
            ],
        ),
        subsection("Clusters"),
        table(
            ("cluster", "prefill busy", "waiting mean", "max", "decode full", "waiting mean", "max", "egress", "peak"),
            [
                (
                    each.name,
                    percent(each.prefill_busy_share),
                    number(each.prefill_waiting_mean),
                    number(each.prefill_waiting_max),
                    percent(each.decode_full_share),
                    number(each.decode_waiting_mean),
                    number(each.decode_waiting_max),
                    gbits(each.egress_mean_bytes_per_s),
                    gbits(each.egress_peak_bytes_per_s),
                )
                for each in summary.clusters
            ],
        ),
    ]
    if summary.links:
        rows = [
            (
                f"{link.source} → {link.target}",
                MISSING if link.delivered_bytes is None else format_bytes(link.delivered_bytes),
                gbits(link.mean_bytes_per_s),
                gbits(link.peak_bytes_per_s),
                gbits(link.capacity_mean_bytes_per_s),
                percent(link.used_share),
            )
            for link in summary.links
        ]
        parts += [subsection("Links"), table(("link", "delivered", "mean", "peak", "could carry", "used"), rows)]
    parts += [subsection("Prefix caches"), *_caches(summary)]
    if result.happenings:
        shown = [
            (f"{each.at_s:,.1f} s", each.what, each.where, each.text) for each in result.happenings[:HAPPENINGS_SHOWN]
        ]
        left_out = len(result.happenings) - len(shown)
        note = f"{left_out:,} more are not shown." if left_out else ""
        parts += [subsection("Happenings"), table(("at", "what", "where", ""), shown, is_text=True, note=note)]
    return parts


def _caches(summary: Summary) -> list[str]:
    if not summary.hits and not summary.caches:
        return [paragraph("No prefix was found in a cache.")]
    hits = [
        (hit.cluster, hit.tier, tokens(hit.requests), tokens(hit.hit_tokens), percent(hit.share))
        for hit in summary.hits
    ]
    counts = [
        (
            each.cluster,
            each.tier,
            f"{format_bytes(each.used_bytes)} of {format_bytes(each.capacity_bytes)}",
            percent(each.hit_tokens / each.asked_tokens if each.asked_tokens else None),
            format_bytes(each.evicted_bytes),
            tokens(each.refused_tokens),
        )
        for each in summary.caches
    ]
    return [
        table(
            ("prefilled in", "prefix from", "requests", "tokens", "of its prompt tokens"),
            hits,
            note=f"Together {percent(summary.hit_share)} of the prompt tokens; an unbounded cache that all clusters "
            f"shared would give {percent(summary.possible_share)}.",
        ),
        table(
            ("cache of", "tier", "holds", "hit rate", "evicted", "not kept, tokens"),
            counts,
            note="Over the whole run, warm-up included; a slower tier is asked for what a faster one lacked.",
        ),
    ]


def _spread(name: str, spread: Spread) -> tuple[str, ...]:
    values = (spread.mean, spread.p50, spread.p75, spread.p90, spread.p95, spread.p99, spread.maximum)
    return (name, *map(seconds, values), tokens(spread.missing))
