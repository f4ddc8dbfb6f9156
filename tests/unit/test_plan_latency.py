"""Latency of a plan below its limit, and goodput."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.planning.decoding import DecodeLoad
from kvstore.schedule.planning.goodput import goodput, plan_goodput
from kvstore.schedule.planning.latency import LoadedPlan
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.plan import PrefixMove, Traffic, plan_of
from kvstore.schedule.planning.queueing import mdc, mmc
from kvstore.schedule.planning.throughput import Throughput, throughput
from tests.unit.planned import GBIT, H20, H200, TRAFFIC

SLO = Slo(ttft_s=6.0, tpot_s=0.03, share=0.9)


def paper(gbit: float = 100.0, round_trip_s: float = 0.0) -> Deployment:
    return Deployment(
        (Cluster("prfaas", H200, 4, 0), Cluster("pd", H20, 3, 5)),
        (Link("prfaas", "pd", gbit * GBIT, round_trip_s), Link("pd", "prfaas", gbit * GBIT, round_trip_s)),
    )


def planned(deployment: Deployment, traffic: Traffic = TRAFFIC) -> Throughput:
    return throughput(deployment, plan_of([["pd"], ["prfaas"]], [19_400]), traffic, "mean")


def loaded(deployment: Deployment, traffic: Traffic = TRAFFIC) -> LoadedPlan:
    return LoadedPlan(deployment, planned(deployment, traffic), traffic)


def test_without_load_it_is_the_papers_column() -> None:
    """Its TTFT is the service time of prefill alone."""
    latency = loaded(paper()).at(0.0)
    assert latency.ttft_mean_s == pytest.approx(2.22, rel=0.01)
    assert latency.ttft_quantile_s(0.9) == pytest.approx(3.51, rel=0.01)
    assert latency.tpot_mean_s == pytest.approx(0.025)


def test_the_limit_is_that_of_the_mean_convention() -> None:
    deployment = paper()
    assert loaded(deployment).stable_requests_per_s == pytest.approx(planned(deployment).requests_per_s, rel=1e-9)
    thin = paper(gbit=5)
    assert loaded(thin).stable_requests_per_s == pytest.approx(planned(thin).requests_per_s, rel=1e-9)


def test_round_trips_and_slow_links_add_what_prefill_does_not_hide() -> None:
    share = TRAFFIC.lengths.share(19_400)
    near, far = loaded(paper()).at(1.0), loaded(paper(round_trip_s=0.08)).at(1.0)
    assert far.ttft_mean_s - near.ttft_mean_s == pytest.approx(share * 0.08, rel=1e-9)
    # At 100 Gbit/s layers leave as fast as they are computed; at 2.2 they do not.
    assert all(way.transfer_s == 0 for way in near.ways)
    slow = loaded(paper(gbit=2.2)).at(0.1)
    assert next(way for way in slow.ways if way.prefill == "prfaas").transfer_s > 0.5


def test_a_prefix_that_is_moved_first_adds_its_time() -> None:
    traffic = replace(TRAFFIC, moves=(PrefixMove("pd", "prfaas", 125e6),))
    way = next(way for way in loaded(paper(gbit=1, round_trip_s=0.01), traffic).at(1e-6).ways if way.prefix_s)
    assert way.prefill == "prfaas"
    assert way.prefix_s == pytest.approx(1.01, rel=1e-3)


def test_one_length_on_one_cluster_is_the_queue_itself() -> None:
    """All service times equal: M/D/c, played against nothing but the closed form."""
    deployment = Deployment((Cluster("pd", H20, 4, 8),))
    traffic = Traffic(PointMasses([20_000.0]), 64)
    plan = throughput(deployment, plan_of([["pd"]]), traffic)
    service_s = H20.prefill(20_000)
    latency = LoadedPlan(deployment, plan, traffic).at(0.8 * 4 / service_s)
    queue = mdc(0.8 * 4 / service_s, service_s, 4)
    assert latency.ttft_mean_s == pytest.approx(queue.mean_s + service_s, rel=1e-6)
    assert latency.ttft_share(service_s * 0.999) == 0.0
    late = latency.ttft_quantile_s(0.95)
    assert queue.share_above(late - service_s) == pytest.approx(0.05, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(low=st.floats(0.01, 0.98), high=st.floats(0.01, 0.98), limit_s=st.floats(0.5, 30))
def test_more_load_is_never_better(low: float, high: float, limit_s: float) -> None:
    low, high = sorted((low, high))
    plan = loaded(paper())
    light, heavy = (plan.at(share * plan.stable_requests_per_s) for share in (low, high))
    assert heavy.ttft_mean_s >= light.ttft_mean_s * (1 - 1e-9)
    assert heavy.ttft_share(limit_s) <= light.ttft_share(limit_s) + 1e-9
    assert heavy.good_share(SLO) <= light.good_share(SLO) + 1e-9
    assert 0 <= heavy.ttft_share(limit_s) <= 1 + 1e-9
    for latency in (light, heavy):
        assert np.isfinite(latency.ttft_quantile_s(0.99))
        assert sum(way.share for way in latency.ways) == pytest.approx(1.0)


def test_an_unstable_load_is_an_error_that_names_the_limit() -> None:
    plan = loaded(paper())
    with pytest.raises(PlanError, match=r"unstable: this plan is stable below 3\.1"):
        plan.at(3.3)
    assert plan.good_share(3.3, SLO) == 0.0
    with pytest.raises(PlanError, match="between 0 and 1, not 1"):
        plan.at(1.0).ttft_quantile_s(1.0)


def test_steps_of_one_length_make_decode_an_erlang_queue() -> None:
    decoding = DecodeLoad.of(H20, 3, 2.0, 1024)
    queue = mmc(2.0, 0.025 * 1024, 60)
    assert decoding.waits_share == pytest.approx(queue.waits_share, rel=1e-9)
    assert decoding.wait_s == pytest.approx(queue.mean_s, rel=1e-9)
    assert decoding.batch * 3 == pytest.approx(2.0 * 0.025 * 1024, rel=1e-9)
    assert decoding.used_share == pytest.approx(2.0 / (3 * H20.decode_requests_per_s(1024)))


def test_fuller_batches_are_slower_where_steps_grow() -> None:
    profile = replace(H20, decode_step=PolynomialCurve((0.01, 0.001)), decode_batch_max=40)
    loads = [DecodeLoad.of(profile, 2, rate, 512) for rate in (0.0, 0.5, 1.5, 2.9)]
    means = [load.tpot_mean_s for load in loads]
    assert means[0] == pytest.approx(0.011)
    assert means == sorted(means)
    assert 0 < loads[2].tpot_share(loads[2].tpot_mean_s) < 1 == loads[2].tpot_share(profile.decode_step(40))
    # Little's law: places taken = rate * seconds in a batch, and seconds = tokens * the step by time spent.
    assert loads[2].batch <= 40
    with pytest.raises(PlanError, match=r"unstable: 4 requests/s to decode, and 2 instances decode 3\.1"):
        DecodeLoad.of(profile, 2, 4.0, 512)


def play_decode(profile: Profile, rate: float, tokens: float, requests: int) -> tuple[float, float]:
    """One instance, processor sharing, exponential output lengths: mean batch and share that finds all places taken."""
    random = np.random.default_rng(3)
    now = area = 0.0
    number = taken = came = 0
    while came < requests:
        running = min(number, profile.decode_batch_max)
        leaving = running / (profile.decode_step(running) * tokens) if running else 0.0
        step = random.exponential(1 / (rate + leaving))
        area += running * step
        now += step
        if random.random() < rate / (rate + leaving):
            came += 1
            taken += number >= profile.decode_batch_max
            number += 1
        else:
            number -= 1
    return area / now, taken / came


def test_batches_are_as_full_as_when_played_through() -> None:
    profile = replace(H20, decode_step=PolynomialCurve((0.01, 0.002)), decode_batch_max=12)
    rate = 0.85 * profile.decode_requests_per_s(64)
    batch, taken = play_decode(profile, rate, 64, 60_000)
    load = DecodeLoad.of(profile, 1, rate, 64)
    assert load.batch == pytest.approx(batch, rel=0.03)
    assert load.waits_share == pytest.approx(taken, abs=0.03)


def test_goodput_is_where_the_share_crosses() -> None:
    result = goodput(lambda rate: 1 - rate / 10, 0.9, rate_max_per_s=8, tolerance=1e-6)
    assert result.requests_per_s == pytest.approx(1.0, rel=1e-5)
    assert result.requests_per_s <= 1.0 <= (result.above_requests_per_s or 0)
    assert result.share >= 0.9
    assert result.note == ""


def test_goodput_says_where_there_is_none_or_no_end() -> None:
    never = goodput(lambda _: 0.5, 0.9, rate_max_per_s=8)
    assert (never.requests_per_s, never.share) == (0.0, 0.5)
    assert "not met at any rate" in never.note
    always = goodput(lambda _: 0.95, 0.9, rate_max_per_s=8)
    assert (always.requests_per_s, always.above_requests_per_s) == (8, None)
    assert "largest rate" in always.note


@pytest.mark.parametrize("told", [float("nan"), -0.1, 1.5])
def test_goodput_refuses_what_is_no_share(told: float) -> None:
    with pytest.raises(PlanError, match="is not the share"):
        goodput(lambda _: told, 0.9, rate_max_per_s=8)
    with pytest.raises(PlanError, match="goodput needs"):
        goodput(lambda _: 1.0, 0.0, rate_max_per_s=8)


def test_a_stricter_limit_leaves_less() -> None:
    deployment = paper()
    rates = [
        plan_goodput(deployment, planned(deployment), TRAFFIC, replace(SLO, ttft_s=ttft_s)).requests_per_s
        for ttft_s in (1.0, 5.0, 8.0, 30.0)
    ]
    assert rates[0] == 0.0
    assert rates == sorted(rates)
    assert 0 < rates[1] < rates[3] < planned(deployment).requests_per_s
    too_slow = plan_goodput(deployment, planned(deployment), TRAFFIC, replace(SLO, tpot_s=0.02))
    assert too_slow.requests_per_s == 0.0


def test_more_places_than_memory_holds_are_named() -> None:
    profile = Profile("p", "test", PolynomialCurve((1.0,)), KvSize(1.0, 0.0), PolynomialCurve((0.02,)), 65_536, 8, 1024)
    with pytest.raises(PlanError, match="4,294,967,296 places, over the limit of 4,194,304"):
        DecodeLoad.of(profile, 65_536, 1.0, 100.0)
