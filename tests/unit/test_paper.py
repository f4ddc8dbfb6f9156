"""The paper's figures beside ours: what is within rounding is counted right, and every cell is as near as is said."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.cli.plan_paper import print_cells
from kvstore.paper.case_study import HOMOGENEOUS, LENGTHS, NAIVE, PREFILL_ALONE, PRFAAS_PD, CaseStudy, case_study
from kvstore.paper.comparison import Cell, compared, summaries
from kvstore.paper.prefill_time import prefill_mean_s, prefill_quantile_s
from kvstore.paper.printed import Printed, printed_figures, step_of
from kvstore.profile import MeasuredCurve, PolynomialCurve
from kvstore.profiles import load_profile
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.planning.exhaustive import exhaustive_plan
from kvstore.schedule.planning.optimum import best_plan
from kvstore.schedule.planning.plan import Split

H200, H20 = load_profile("paper-1t-h200"), load_profile("paper-1t-h20")
LARGEST_ERROR = 0.03


@pytest.fixture(scope="module")
def study() -> CaseStudy:
    return case_study()


@pytest.fixture(scope="module")
def cells(study: CaseStudy) -> tuple[Cell, ...]:
    return compared(study)


@pytest.fixture
def coarse_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """For figures other than the search's."""
    monkeypatch.setattr("kvstore.paper.case_study.SEARCH_STEP_TOKENS", 20_000)


def test_steps_of_printed_texts() -> None:
    assert [step_of(text) for text in ("44", "2.45", "190.8", "1.00")] == [1.0, 0.01, 0.1, 0.01]


def test_printed_figures_are_the_nearest_numbers() -> None:
    """As one would write them: a percentage by a hundredth is no sum of rounding errors."""
    values = {each.quantity: each.value for each in printed_figures() if each.row == PRFAAS_PD}
    assert values["share_above"] == 0.496
    assert values["mean_above_tokens"] == 44_000
    assert values["threshold_tokens"] == 19_400


@given(st.floats(1, 1e4), st.sampled_from([0.01, 0.1, 1.0]), st.floats(-3, 3))
def test_errors_begin_at_the_end_of_the_interval(value: float, step: float, steps_off: float) -> None:
    error = Printed("", "", "", value, step).relative_error(value + steps_off * step)
    outside = max(abs(steps_off) - 0.5, 0.0) * step
    assert error == pytest.approx(outside / value, rel=1e-6, abs=1e-8)
    if abs(steps_off) <= 0.499:
        assert error == 0


def test_a_half_step_is_within_and_counts_are_exact() -> None:
    assert Printed("", "", "", 2.45, 0.01).relative_error(2.455) == 0
    assert Printed("", "", "", 2.45, 0.01).relative_error(2.4551) > 0
    assert Printed("", "", "", 3, 0.0).relative_error(3) == 0
    assert Printed("", "", "", 3, 0.0).relative_error(4) == pytest.approx(1 / 3)


def test_every_printed_figure_stands_once_and_is_compared(cells: tuple[Cell, ...]) -> None:
    figures = printed_figures()
    places = [(each.table, each.row, each.quantity) for each in figures]
    assert len(set(places)) == len(places)
    assert tuple(cell.printed for cell in cells) == figures
    counts = Counter(table for table, _, _ in places)
    assert counts == {"traffic": 1, "case study": 22, "search": 7, "1T model": 8}


def test_every_cell_is_within_three_percent(cells: tuple[Cell, ...]) -> None:
    for cell in cells:
        assert cell.relative_error <= LARGEST_ERROR, f"{cell.printed}: {cell.ours}"


def test_the_search_finds_the_papers_division_and_nearly_its_threshold(study: CaseStudy) -> None:
    assert study.best_prfaas_pd.plan.splits == (Split("pd", 3, 5),)
    assert study.best_homogeneous.plan.splits == (Split("pd", 9, 3),)
    (threshold,) = study.best_prfaas_pd.plan.thresholds
    assert abs(threshold / 19_400 - 1) <= LARGEST_ERROR
    # At the best threshold both prefill parts are full at once, but for the step of the search.
    prfaas, pd = (study.best_prfaas_pd.part(f"prefill of {name}") for name in ("prfaas", "pd"))
    assert prfaas.used_share == pytest.approx(1, abs=0.01)
    assert pd.used_share == pytest.approx(1, abs=0.01)


def test_the_planner_finds_nothing_worse(study: CaseStudy) -> None:
    """It may also let clusters share lengths, which the paper does not."""
    ours = study.best_prfaas_pd
    deployment = Deployment(
        (Cluster("prfaas", H200, 4, 0), Cluster("pd", H20, 3, 5, convertible=True)), (Link("prfaas", "pd", 12.5e9),)
    )
    best = best_plan(deployment, study.traffic)
    assert best.requests_per_s >= ours.requests_per_s * (1 - 1e-3)
    assert best.requests_per_s <= ours.requests_per_s * 1.02
    exact = exhaustive_plan(
        deployment, study.traffic, thresholds=[*range(10_000, 30_000, 1_000), *ours.plan.thresholds]
    )
    assert exact.requests_per_s >= ours.requests_per_s * (1 - 1e-9)


def test_the_case_study_is_what_the_equations_say(study: CaseStudy) -> None:
    """The paper's own formulas, written down again."""
    p = LENGTHS.share(above=19_400)
    long, short, mean = LENGTHS.mean(above=19_400), LENGTHS.mean(upto=19_400), LENGTHS.mean()
    prfaas = min(4 / H200.prefill(long), 12.5e9 / H200.kv.total_bytes(long))
    pd_prefill, pd_decode = 3 / H20.prefill(short), 5 * 20 / (0.025 * 1024)
    rate = min(prfaas / p, pd_prefill / (1 - p), pd_decode)
    homogeneous = min(9 / H20.prefill(mean), 3 * 20 / (0.025 * 1024))
    naive = 4 / H200.prefill(mean)
    figures = study.figures()

    def ours(row: str, quantity: str) -> float:
        return figures["case study", row, quantity].value

    assert ours(PRFAAS_PD, "prfaas_requests_per_s") == pytest.approx(prfaas)
    assert ours(PRFAAS_PD, "pd_prefill_requests_per_s") == pytest.approx(pd_prefill)
    assert ours(PRFAAS_PD, "pd_decode_requests_per_s") == pytest.approx(pd_decode)
    assert ours(PRFAAS_PD, "requests_per_s") == pytest.approx(rate)
    assert ours(PRFAAS_PD, "egress_gbps") == pytest.approx(rate * p * H200.kv.total_bytes(long) * 8 / 1e9)
    assert ours(PRFAAS_PD, "ratio") == pytest.approx(rate / homogeneous)
    assert ours(HOMOGENEOUS, "requests_per_s") == pytest.approx(homogeneous)
    assert ours(NAIVE, "requests_per_s") == pytest.approx(naive)
    assert ours(NAIVE, "ttft_p90_s") == pytest.approx(H200.prefill(LENGTHS.quantile(0.9)))


@pytest.mark.parametrize("rounded", [(-0.005, -0.005, -0.005), (0, 0, 0), (0.005, -0.005, 0.005)])
def test_the_homogeneous_row_alone_predicts_the_other(
    monkeypatch: pytest.MonkeyPatch, rounded: tuple[float, float, float]
) -> None:
    """Three of its figures give the H20's prefill time, whose profile then has no part in what PrfaaS-PD comes to."""
    printed = {
        each.quantity: each.value for each in printed_figures() if (each.table, each.row) == ("case study", HOMOGENEOUS)
    }
    square = LENGTHS.expected(lambda tokens: (tokens / 1e3) ** 2)
    mean, last = LENGTHS.mean() / 1e3, LENGTHS.quantile(0.9) / 1e3
    coefficients = np.linalg.solve(
        [[1, mean, mean**2], [1, mean, square], [1, last, last**2]],
        [
            9 / (printed["pd_prefill_requests_per_s"] + rounded[0]),
            printed["ttft_mean_s"] + rounded[1],
            printed["ttft_p90_s"] + rounded[2],
        ],
    )
    h20 = replace(H20, prefill=PolynomialCurve(tuple(coefficients), 1e3))
    monkeypatch.setattr("kvstore.paper.case_study.SEARCH_STEP_TOKENS", 700)
    study = CaseStudy(H200, h20)
    assert study.prfaas_pd.part("prefill of pd").requests_per_s == pytest.approx(1.65, abs=0.011)
    assert study.best_prfaas_pd.plan.splits == (Split("pd", 3, 5),)
    assert study.best_prfaas_pd.plan.thresholds == (19_600,)
    assert study.best_prfaas_pd.requests_per_s == pytest.approx(3.20, abs=0.005)
    # The profile's own coefficients are among those that the row allows, up to their rounding.
    assert H20.prefill(30_000) == pytest.approx(h20.prefill(30_000), rel=0.01)


def test_no_cell_is_what_a_profile_was_made_of(cells: tuple[Cell, ...]) -> None:
    """Whoever counts the list by `inferred_inputs` alone must not count copies as predictions."""
    assert isinstance(H200.prefill, MeasuredCurve)
    for cell in cells:
        assert cell.ours not in H200.prefill.ys, cell.printed


def test_what_is_predicted_needs_no_inferred_input(cells: tuple[Cell, ...]) -> None:
    predicted = {(cell.printed.row, cell.printed.quantity) for cell in cells if cell.basis == "predicted"}
    assert predicted == {
        ("prompts", "mean_tokens"),
        (PRFAAS_PD, "share_above"),
        (PRFAAS_PD, "mean_above_tokens"),
        (PRFAAS_PD, "prfaas_requests_per_s"),
        (NAIVE, "prfaas_requests_per_s"),
    }
    for cell in cells:
        assert cell.printed.quantity.startswith("ttft") == (PREFILL_ALONE in cell.inferred_inputs), cell.printed


@pytest.mark.usefixtures("coarse_search")
def test_predicted_cells_do_not_move_with_what_was_inferred(study: CaseStudy) -> None:
    """The list above is checked against the figures themselves: everything inferred is made slower or larger."""
    kv = replace(H200.kv, state_bytes=H200.kv.state_bytes * 1.2)
    slow = replace(H20, prefill=PolynomialCurve((1.0, 0.1)), decode_batch_max=16)
    figures, changed = study.figures(), CaseStudy(replace(H200, kv=kv), slow).figures()
    for place in figures.keys() & changed.keys():
        if not figures[place].inferred_inputs:
            assert changed[place] == figures[place], place
    moved = {place for place in figures.keys() & changed.keys() if changed[place].value != figures[place].value}
    assert ("case study", PRFAAS_PD, "requests_per_s") in moved
    assert ("case study", PRFAAS_PD, "egress_gbps") in moved


@pytest.mark.usefixtures("coarse_search")
def test_another_profile_would_be_noticed() -> None:
    """An instance that is a tenth slower than the printed one leaves the tolerance."""
    slower = MeasuredCurve(H200.prefill.xs, tuple(1.1 * each for each in H200.prefill.ys))  # type: ignore[union-attr]
    figures = CaseStudy(replace(H200, prefill=slower), H20).figures()
    (printed,) = (each for each in printed_figures() if (each.row, each.quantity) == (NAIVE, "prfaas_requests_per_s"))
    assert printed.relative_error(figures[printed.table, printed.row, printed.quantity].value) > LARGEST_ERROR


def test_bases_are_summarised_apart(cells: tuple[Cell, ...]) -> None:
    by_basis = {summary.basis: summary for summary in summaries(cells)}
    assert {basis: summary.cells for basis, summary in by_basis.items()} == {
        "predicted": 5, "inferred": 33,
    }  # fmt: skip
    for summary in by_basis.values():
        assert summary.mean_error <= summary.largest_error == summary.worst.relative_error
        assert summary.worst.basis == summary.basis


@settings(max_examples=25)
@given(
    st.floats(0.2, 0.8), st.floats(0.05, 0.95), st.floats(0.1, 3), st.floats(1e-6, 3e-4),
)  # fmt: skip
def test_prefill_times_are_those_of_samples(where: float, share: float, fixed_s: float, token_s: float) -> None:
    other = replace(H20, prefill=PolynomialCurve((fixed_s, token_s)))
    threshold = LENGTHS.quantile(where)
    bands = [(0.0, threshold, other), (threshold, inf, H200)]
    lengths = np.array([LENGTHS.quantile((number + 0.5) / 4000) for number in range(4000)])
    times = np.where(lengths <= threshold, other.prefill.many(lengths), H200.prefill.many(lengths))
    assert prefill_mean_s(LENGTHS, bands) == pytest.approx(times.mean(), rel=2e-3)
    quantile = prefill_quantile_s(LENGTHS, bands, share)
    assert (times <= quantile).mean() == pytest.approx(share, abs=1e-3)


def test_bands_without_requests_take_no_time() -> None:
    bands = [(0.0, 10.0, H20), (10.0, inf, H200)]
    assert prefill_mean_s(LENGTHS, bands) == pytest.approx(prefill_mean_s(LENGTHS, [(0.0, inf, H200)]))
    assert prefill_quantile_s(LENGTHS, bands, 0.9) == pytest.approx(H200.prefill(LENGTHS.quantile(0.9)))


def test_the_json_is_a_list_of_numbers(capsys: pytest.CaptureFixture[str], cells: tuple[Cell, ...]) -> None:
    print_cells(cells, as_json=True)
    document: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    assert len(document) == len(cells)
    for entry, cell in zip(document, cells, strict=True):
        assert list(entry) == ["table", "row", "quantity", "paper", "ours", "relative_error", "inferred_inputs"]
        assert entry["ours"] == cell.ours
        assert all(isinstance(entry[name], (int, float)) for name in ("paper", "ours", "relative_error"))
        assert all(isinstance(each, str) for each in entry["inferred_inputs"])


def test_the_tables_say_what_agreement_shows(capsys: pytest.CaptureFixture[str], cells: tuple[Cell, ...]) -> None:
    print_cells(cells, as_json=False)
    page = capsys.readouterr().out
    for text in ("case study", "search", "1T model", "predicted", "inferred", "within rounding"):
        assert text in page


def test_the_page_says_how_well_it_agrees(cells: tuple[Cell, ...]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    for summary in summaries(cells):
        errors = [f"{100 * error:.1f} %" if error else "0" for error in (summary.largest_error, summary.mean_error)]
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {summary.basis} |"))
        assert row.endswith(f"| {summary.cells} | {summary.within_rounding} | {errors[0]} | {errors[1]} |")


def test_the_command_prints_them(cells: tuple[Cell, ...]) -> None:
    result = CliRunner().invoke(app, ["plan", "paper", "--json"])
    assert result.exit_code == 0, result.output
    assert [entry["ours"] for entry in json.loads(result.output)] == [cell.ours for cell in cells]
