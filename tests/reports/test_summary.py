"""Figures of results that are written down, checked by hand; and of drawn ones, against what must hold for all."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.schedule.deployment import Slo
from kvstore.simulate.report.summary import spread, summarise
from kvstore.simulate.result import PARTS, CacheCounts, Outcome
from tests.reports.results import LINK_BYTES_PER_S, drawn, result, samples, scenario

NAN = float("nan")
NEVER = {"ttft_s": NAN, "tpot_s": NAN, "finished_s": NAN, "parts": (NAN,) * 6}


def test_rates_are_over_the_measured_time() -> None:
    rows = [{"arrival_s": float(second)} for second in range(11)]
    summary = summarise(result(rows))
    assert (summary.requests, summary.done, summary.from_s, summary.until_s) == (11, 11, 0.0, 10.0)
    assert summary.offered_per_s == pytest.approx(1.1)
    # Each takes 1 s to its first token and 99 steps of 20 ms: those of seconds 0 to 7 have ended by 10.98.
    assert summary.throughput_per_s == pytest.approx(0.8)
    assert summary.goodput_per_s == pytest.approx(1.1)
    assert summary.good_share == 1.0
    assert summary.meets_slo


def test_the_warm_up_is_left_out() -> None:
    slow = (9.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    rows = [{"arrival_s": 1.0, "parts": slow}, {"arrival_s": 5.0}, {"arrival_s": 7.0}]
    summary = summarise(result(rows, scenario=scenario(warmup_s=5.0)))
    assert (summary.requests, summary.from_s, summary.until_s) == (2, 5.0, 7.0)
    assert summary.ttft.maximum == pytest.approx(1.0)
    assert summarise(result(rows)).ttft.maximum == pytest.approx(9.0)


def test_who_is_good() -> None:
    late, cut = {"parts": (3.0, 0, 0, 0, 0, 0)}, {"outcome": Outcome.PENDING}
    rows = [
        {"arrival_s": 0.0},
        {"arrival_s": 1.0, **late},
        {"arrival_s": 2.0, "tpot_s": 0.06},
        {"arrival_s": 3.0, "tpot_s": NAN, "output_tokens": 1, "finished_s": 4.0},
        {"arrival_s": 4.0, **NEVER, "outcome": Outcome.REJECTED, "prefill": -1, "decode": -1},
        {"arrival_s": 5.0, **NEVER, "outcome": Outcome.FAILED},
        {"arrival_s": 6.0, **NEVER, **cut},
        {"arrival_s": 9.5, **NEVER, **cut},
        {"arrival_s": 9.0, **cut, "tpot_s": NAN, "finished_s": NAN},
    ]
    summary = summarise(result(rows, end_s=10.0))
    assert (summary.done, summary.rejected, summary.failed, summary.pending) == (4, 1, 1, 3)
    # Good: the first and the one with a single token. Not known yet: the two that came within 2 s of the end.
    assert summary.good_share == pytest.approx(2 / 7)
    assert summary.goodput_per_s == pytest.approx(2 / 9.5)
    assert not summary.meets_slo
    assert (summary.ttft.count, summary.ttft.missing) == (5, 4)


def test_an_unstable_run_meets_nothing() -> None:
    rows = [{"arrival_s": float(second)} for second in range(5)]
    assert summarise(result(rows)).meets_slo
    assert not summarise(result(rows, is_stable=False)).meets_slo


def test_parts_and_their_tail() -> None:
    rows = [{"arrival_s": float(each), "parts": (0.0, 0, 0, 1.0, 0, 0)} for each in range(9)]
    rows.append({"arrival_s": 9.0, "parts": (10.0, 0, 0, 1.0, 0, 0)})
    parts = {part.name: part for part in summarise(result(rows)).parts}
    assert tuple(parts) == PARTS
    assert parts["queue_s"].mean_s == pytest.approx(1.0)
    assert parts["queue_s"].share == pytest.approx(0.5)
    assert parts["queue_s"].slowest_mean_s == pytest.approx(10.0)
    assert parts["prefill_s"].slowest_mean_s == pytest.approx(1.0)


def test_routes_and_hits() -> None:
    rows = [
        {"arrival_s": 0.0, "cached_tokens": 500, "possible_tokens": 800, "tier": 0},
        {"arrival_s": 1.0, "cached_tokens": 250, "possible_tokens": 800, "tier": 1, "prefill": 1},
        {"arrival_s": 2.0, "prefill": 1},
        {"arrival_s": 3.0, **NEVER, "outcome": Outcome.REJECTED, "prefill": -1, "decode": -1},
    ]
    summary = summarise(result(rows))
    assert [(each.prefill, each.decode, each.requests) for each in summary.routes] == [
        ("far", "near", 1),
        ("near", "near", 2),
    ]
    assert summary.routes[1].share == 0.5
    assert [(hit.cluster, hit.tier, hit.hit_tokens, hit.share) for hit in summary.hits] == [
        ("far", "dram", 500, 0.5),
        ("near", "ssd", 250, 0.125),
    ]
    assert summary.hit_share == pytest.approx(0.25)
    assert summary.possible_share == pytest.approx(1600 / 3000)


def test_links_and_clusters() -> None:
    sampled = samples(
        10,
        link_bytes=[0, 0, *[LINK_BYTES_PER_S / 2] * 4, LINK_BYTES_PER_S, 0, 9e9, 9e9],
        far_busy=[2] * 10,
        far_waiting=[0, 4] * 5,
        near_running=[6] * 10,
    )
    rows = [{"arrival_s": 2.0}, {"arrival_s": 8.0}]
    summary = summarise(result(rows, sampled, scenario=scenario(warmup_s=2.0)))
    (link,) = summary.links
    # Six samples count, those that end at 3 to 8 s.
    assert link.delivered_bytes == 3 * LINK_BYTES_PER_S
    assert link.mean_bytes_per_s == pytest.approx(LINK_BYTES_PER_S / 2)
    assert link.peak_bytes_per_s == LINK_BYTES_PER_S
    assert link.used_share == pytest.approx(0.5)
    far, near = summary.clusters
    assert far.egress_mean_bytes_per_s == near.ingress_mean_bytes_per_s == link.mean_bytes_per_s
    assert far.ingress_mean_bytes_per_s == near.egress_peak_bytes_per_s == 0
    assert (far.prefill_busy_share, far.prefill_waiting_mean, far.prefill_waiting_max) == (1.0, 2.0, 4.0)
    assert (far.decode_full_share, near.decode_full_share) == (None, 0.5)


def test_figures_of_samples_that_were_not_taken_are_missing() -> None:
    """A run shorter than a telemetry interval moved bytes that nobody sampled: not none of them."""
    summary = summarise(result([{"arrival_s": 0.0}, {"arrival_s": 5.0}], samples(1, step_s=60.0)))
    assert summary.goodput_per_s == pytest.approx(0.4)
    assert summary.egress_mean_bytes_per_s is None
    (link,) = summary.links
    assert (link.delivered_bytes, link.mean_bytes_per_s, link.peak_bytes_per_s, link.used_share) == (None,) * 4
    for cluster in summary.clusters:
        assert cluster.prefill_waiting_mean is None
        assert cluster.decode_waiting_max is None
        assert cluster.egress_peak_bytes_per_s is None


def test_a_run_without_anything_has_no_figures_and_no_nan() -> None:
    summary = summarise(result([], samples(0), scenario=scenario(warmup_s=3.0)))
    assert summary.offered_per_s is summary.goodput_per_s is summary.good_share is summary.hit_share is None
    assert summary.ttft.p99 is None
    assert not summary.meets_slo
    json.dumps(summary.to_document(), allow_nan=False)


def test_what_never_came_is_not_measured() -> None:
    rows = [{"arrival_s": 1.0}, {"arrival_s": NAN, **NEVER, "outcome": Outcome.PENDING, "prefill": -1, "decode": -1}]
    assert summarise(result(rows)).requests == 1


def test_settings_and_caches_go_along() -> None:
    caches = (CacheCounts("near", "dram", 1e9, 5e8, 100, 50, 0.0),)
    document = summarise(result([{}], caches=caches), settings=(("seed", 3),)).to_document()
    assert document["settings"] == {"seed": "3"}
    assert document["caches"][0]["hit_tokens"] == 50


@given(st.integers(0, 1_000), st.floats(0.0, 60.0))
@settings(deadline=None, max_examples=30)
def test_what_holds_for_all(seed: int, warmup_s: float) -> None:
    run = drawn(seed, requests=120)
    run = replace(run, scenario=replace(run.scenario, warmup_s=warmup_s, slo=Slo(1.5, 0.04, 0.9)))
    summary = summarise(run)
    json.dumps(summary.to_document(), allow_nan=False)
    assert summary.done + summary.rejected + summary.failed + summary.pending == summary.requests
    assert summary.ttft.count + summary.ttft.missing == summary.requests
    if summary.parts:
        assert sum(part.mean_s for part in summary.parts) == pytest.approx(summary.ttft.mean)
        assert sum(part.share for part in summary.parts) == pytest.approx(1.0)
    if summary.offered_per_s is not None and summary.goodput_per_s is not None:
        assert summary.goodput_per_s <= summary.offered_per_s
    assert sum(route.requests for route in summary.routes) <= summary.requests
    if summary.hit_share is not None:
        assert sum(hit.hit_tokens for hit in summary.hits) == pytest.approx(
            summary.hit_share
            * run.requests.prompt_tokens[(run.requests.arrival_s >= warmup_s) & (run.requests.prefill >= 0)].sum()
        )


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_quantiles_ascend(values: list[float]) -> None:
    found = spread(np.array([*values, np.nan]))
    assert (found.count, found.missing) == (len(values), 1)
    ascending = [found.p50, found.p75, found.p90, found.p95, found.p99, found.maximum]
    assert ascending == sorted(ascending, key=lambda value: value or 0.0)
