"""Instances are converted when that pays, once, and never for noise; thresholds move when others serve more."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.profile import PolynomialCurve
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.policies.convert import Conversion, ConversionMemory, ConversionPolicy
from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot
from kvstore.schedule.prefill_service import PrefillServiceModel, ServiceKind
from tests.unit.schedule.snapshots import PROFILE, cluster_state, snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

TO_DECODE = Conversion("pd", "prefill", "decode")
TO_PREFILL = Conversion("pd", "decode", "prefill")


def one_cluster(prefill: int = 4, decode: int = 4, conversion_s: float = 60.0) -> Deployment:
    return Deployment((Cluster("pd", PROFILE, prefill, decode, convertible=True, conversion_s=conversion_s),))


@dataclass
class Run:
    """A deployment of one cluster under traffic that changes.

    Attributes:
        conversions: that were begun, and when.
    """

    policy: ConversionPolicy
    prefill: int = 4
    decode: int = 4
    now_s: float = 0.0
    conversions: list[tuple[float, Conversion]] = field(default_factory=list)
    arriving: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory: ConversionMemory = self.policy.begin()

    def go(self, seconds: int, rate_per_s: Callable[[float], float], tokens: int, output_tokens: float) -> None:
        """Steps of 10 s; requests come evenly."""
        conversion_s = self.policy.deployment.cluster("pd").conversion_s
        owed = 0.0
        for _ in range(seconds // 10):
            self.now_s += 10
            for each in [each for each in self.arriving if each[0] <= self.now_s]:
                self.arriving.remove(each)
                self.prefill += each[1] == "prefill"
                self.decode += each[1] == "decode"
            owed += rate_per_s(self.now_s) * 10
            for _ in range(int(owed)):
                request = RoutingRequest(tokens, output_tokens, {})
                self.memory = self.policy.arrived(self.memory, request, None)
            owed -= int(owed)
            look = snapshot(self.now_s, cluster_state(prefill=self.prefill, decode=self.decode))
            self.memory = self.policy.observe(self.memory, look)
            conversion = self.policy.decide(self.memory).conversion
            if conversion is not None:
                self.conversions.append((self.now_s, conversion))
                self.memory = self.policy.converted(self.memory, look, conversion)
                self.prefill -= conversion.source == "prefill"
                self.decode -= conversion.source == "decode"
                self.arriving.append((self.now_s + conversion_s, conversion.target))


# Four instances prefill 4 / T(8192) = 5.6 prompts a second; four decode 80 / (0.025 s * 512) = 6.2 answers of 512.
LONG_ANSWERS, SHORT_ANSWERS = 1024.0, 64.0


def test_traffic_that_one_division_serves_converts_nothing() -> None:
    run = Run(ConversionPolicy(one_cluster()))
    run.go(7200, lambda _: 4.0, 8192, 512.0)
    assert run.conversions == []
    assert "can be served with headroom" in run.policy.decide(run.memory).explanation.rule


def test_longer_answers_convert_as_many_instances_as_pay_and_no_more() -> None:
    run = Run(ConversionPolicy(one_cluster()))
    run.go(1800, lambda _: 4.0, 8192, 512.0)
    run.go(7200, lambda _: 4.0, 8192, LONG_ANSWERS)
    assert {each for _, each in run.conversions} == {TO_DECODE}
    # Five decode 3.9 and three prefill 4.2 a second; with six that decode two would prefill 2.8.
    assert (run.prefill, run.decode) == (3, 5)
    assert run.conversions[0][0] > 1800


def test_traffic_that_comes_back_is_followed_back() -> None:
    run = Run(ConversionPolicy(one_cluster()))
    for _ in range(2):
        run.go(7200, lambda _: 4.0, 8192, LONG_ANSWERS)
        assert run.prefill + len(run.arriving) < 4
        run.go(7200, lambda _: 5.5, 8192, SHORT_ANSWERS)
        assert run.prefill >= 4
    assert len(run.conversions) <= 8, "as often as the traffic changes, and not more"


def test_changes_faster_than_a_conversion_pays_convert_nothing() -> None:
    run = Run(ConversionPolicy(one_cluster(conversion_s=900.0), window_s=60.0))
    for _ in range(24):
        run.go(120, lambda _: 4.0, 8192, LONG_ANSWERS)
        run.go(120, lambda _: 5.0, 8192, SHORT_ANSWERS)
    assert run.conversions == []


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1.0))
def test_noise_inside_the_band_never_converts(seed: int, spread: float) -> None:
    """Whatever the rate does below what the present division serves with headroom (4.7/s)."""
    rng = np.random.default_rng(seed)
    run = Run(ConversionPolicy(one_cluster(), window_s=30.0, review_s=60.0))
    run.go(3600, lambda _: float(rng.uniform(4.7 * (1 - spread), 4.7)), 8192, 512.0)
    assert run.conversions == []


def test_noise_about_the_edge_of_the_band_does_not_flap() -> None:
    """Four and four serve as many answers of 768 tokens as three and five; longer ones want these, shorter those."""
    rng = np.random.default_rng(4)
    run = Run(ConversionPolicy(one_cluster()))
    better: list[str] = []
    for _ in range(4 * 60):
        output_tokens = float(rng.uniform(600, 950))
        run.go(60, lambda _: 4.5, 8192, output_tokens)
        better.append("decode" if output_tokens > 768 else "prefill")
    changes = sum(a != b for a, b in pairwise(better))
    assert changes > 80, "following each minute would convert so often"
    assert len(run.conversions) <= 4, "at most one an hour"


def test_the_dearer_a_conversion_the_later_it_comes() -> None:
    begun = []
    for conversion_s in (10.0, 60.0, 240.0):
        run = Run(ConversionPolicy(one_cluster(conversion_s=conversion_s)))
        run.go(7200, lambda _: 4.0, 8192, LONG_ANSWERS)
        begun.append(run.conversions[0][0])
    assert begun == sorted(begun)
    assert begun[0] < begun[-1]


def test_one_conversion_at_a_time() -> None:
    run = Run(ConversionPolicy(one_cluster(prefill=7, decode=1, conversion_s=300.0)), prefill=7, decode=1)
    run.go(7200, lambda _: 4.0, 8192, LONG_ANSWERS)
    times = [at for at, _ in run.conversions]
    assert len(times) >= 3
    assert min(np.diff(times)) >= 300.0


def test_an_instance_that_is_lost_meanwhile_is_not_waited_for_without_end() -> None:
    run = Run(ConversionPolicy(one_cluster(prefill=7, decode=1), window_s=120.0), prefill=7, decode=1)
    while not run.conversions:
        run.go(10, lambda _: 4.0, 8192, LONG_ANSWERS)
    run.prefill -= 1
    run.go(150, lambda _: 4.0, 8192, LONG_ANSWERS)
    assert len(run.conversions) == 1
    assert "converts a prefill instance" in run.policy.decide(run.memory).explanation.rule
    run.go(3600, lambda _: 4.0, 8192, LONG_ANSWERS)
    assert len(run.conversions) > 1


def test_no_role_loses_its_last_instance_and_others_stay() -> None:
    policy = ConversionPolicy(one_cluster(prefill=1, decode=1))
    run = Run(policy, prefill=1, decode=1)
    run.go(3600, lambda _: 4.0, 8192, LONG_ANSWERS)
    fixed = replace(policy.deployment.clusters[0], convertible=False, prefill_instances=7)
    other = Run(ConversionPolicy(Deployment((fixed,))), prefill=7, decode=1)
    other.go(3600, lambda _: 4.0, 8192, LONG_ANSWERS)
    assert run.conversions == other.conversions == []


def two_clusters() -> Deployment:
    slow = replace(PROFILE, prefill=PolynomialCurve((0.469, 0.13, 2.94e-4), 1000.0))
    return Deployment(
        (Cluster("fast", PROFILE, 4, 0), Cluster("pd", slow, 3, 5, convertible=True)), (Link("fast", "pd", 1.25e9),)
    )


def fed(
    policy: ConversionPolicy, memory: ConversionMemory, mu: float, now_s: float, look: Snapshot
) -> ConversionMemory:
    rng = np.random.default_rng(int(now_s))
    for tokens in np.clip(rng.lognormal(mu, 1.0, 1024), 128, 131072):
        memory = policy.arrived(memory, RoutingRequest(int(tokens), 256.0, {}), None)
    return policy.observe(memory, replace(look, now_s=now_s))


def test_thresholds_follow_the_lengths_and_not_their_noise() -> None:
    policy = ConversionPolicy(two_clusters(), review_s=30.0)
    look = snapshot(0.0, cluster_state("fast", prefill=4, decode=0), cluster_state("pd"))
    memory = policy.observe(policy.begin(), look)
    plans = []
    for at in range(1, 11):
        memory = fed(policy, memory, 9.9, at * 120.0, look)
        plans.append(policy.decide(memory).plan)
    assert plans[0] is not None
    assert len(plans[0].thresholds) == 1
    assert len(set(plans[2:])) <= 2, "samples of the same traffic hardly ever move the threshold"
    for at in range(11, 16):
        memory = fed(policy, memory, 8.0, at * 120.0, look)
    short = policy.decide(memory).plan
    assert short is not None
    assert short.thresholds[0] < plans[-1].thresholds[0] / 2, "shorter prompts, a lower threshold"


def test_thresholds_follow_how_prompts_are_prefilled() -> None:
    """Chunks cost each cluster something else, and so divide the lengths elsewhere."""
    policy = ConversionPolicy(two_clusters(), review_s=30.0)
    look = snapshot(0.0, cluster_state("fast", prefill=4, decode=0), cluster_state("pd"))
    plans = {}
    for kind in get_args(ServiceKind):
        served = replace(look, prefill_service=PrefillServiceModel(kind))
        memory = fed(policy, policy.observe(policy.begin(), served), 9.9, 120.0, served)
        plans[kind] = policy.decide(memory).plan
    assert plans["layered"] == plans["whole"] is not None
    assert plans["chunked"] not in (None, plans["whole"])


def test_a_dead_link_or_cluster_is_planned_without() -> None:
    policy = ConversionPolicy(two_clusters(), review_s=30.0)
    dead = snapshot(0.0, cluster_state("fast", prefill=4, decode=0), cluster_state("pd"))
    links = {between: replace(link, bytes_per_s=0.0) for between, link in dead.links.items()}
    dead = replace(dead, links=links)
    memory = fed(policy, policy.observe(policy.begin(), dead), 9.9, 120.0, dead)
    stuck = policy.decide(memory)
    assert stuck.conversion is None
    assert "cannot serve" in stuck.explanation.rule
    alone = snapshot(0.0, cluster_state("pd"))
    memory = fed(policy, policy.observe(policy.begin(), alone), 9.9, 120.0, alone)
    plan = policy.decide(memory).plan
    assert plan is not None
    assert plan.bands[0].clusters == ("pd",)


def test_nothing_is_decided_before_traffic_was_seen() -> None:
    policy = ConversionPolicy(one_cluster())
    memory = policy.begin()
    for at in range(100):
        memory = policy.observe(memory, snapshot(float(at), cluster_state(prefill=4, decode=4)))
    found = policy.decide(memory)
    assert (found.conversion, found.plan) == (None, None)


@pytest.mark.parametrize("bad", [{"window_s": 0.0}, {"review_s": -1.0}, {"headroom": 0.0}, {"band": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        ConversionPolicy(one_cluster(), **bad)
