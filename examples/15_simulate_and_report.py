"""What happens under a plan, in figures and pages: `python examples/15_simulate_and_report.py [DIR]`.

The paper's case study, with its threshold and with our router, at a load near what the model says it can carry. With a
directory, figures, tables and (where matplotlib is installed) pages are written into it.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import UnavailableError
from kvstore.scenario import PolicyChoice, Scenario, read_scenario
from kvstore.simulate.report.comparison import write_comparison
from kvstore.simulate.report.figures import check_drawing
from kvstore.simulate.report.files import write_result
from kvstore.simulate.report.page import write_page
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.report.wording import gbits
from kvstore.simulate.simulation import simulate

if TYPE_CHECKING:
    from kvstore.simulate.report.values import Summary


def pages_can_be_drawn() -> bool:
    try:
        check_drawing()
    except UnavailableError as error:
        print("no pages:", error)
        return False
    return True


def run(scenario: Scenario, directory: Path | None) -> Summary:
    result = simulate(scenario)
    summary = summarise(result)
    print(
        f"{summary.policy}: {summary.requests} requests, goodput {summary.goodput_per_s:.2f} of "
        f"{summary.offered_per_s:.2f}/s, time to first token {summary.ttft.p50:.1f} s (median), "
        f"{summary.ttft.p90:.1f} s (P90)"
    )
    for part in summary.parts:
        if part.share >= 0.01:
            print(f"    {part.label}: {part.mean_s:.2f} s")
    if directory is not None:
        write_result(result, directory / summary.policy, summary)
        if pages_can_be_drawn():
            write_page(result, directory / summary.policy, summary)
    return summary


directory = Path(sys.argv[1]) if len(sys.argv) > 1 else None
paper = read_scenario("paper-prfaas")
# Ten minutes of it; the ready-made scenario simulates an hour.
paper = replace(paper, warmup_s=60.0, duration_s=600.0)
runs = [run(each, directory) for each in (paper, replace(paper, policy=PolicyChoice("adaptive")))]
threshold, adaptive = runs
print(f"stable: {threshold.is_stable}, {adaptive.is_stable}")
(link,) = [each for each in threshold.links if each.source == "prfaas"]
print(f"the link carried {gbits(link.mean_bytes_per_s)} of {gbits(link.capacity_mean_bytes_per_s)}")
if directory is not None:
    written = write_comparison(runs, directory, has_page=pages_can_be_drawn())
    print("written:", ", ".join(path.name for path in written))
