"""The paper's rule, its modes with hysteresis, the baselines, what the adaptive router learns, and policies by name."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import DeploymentError, PlanError
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.mode import Band, LinkModes, observed
from kvstore.schedule.policies.policy import Decision
from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, LinkState, RoutingRequest, Snapshot
from kvstore.schedule.policies.table import ROUTING_SETTINGS, routing_policy

KV = KvSize(1e6, 1e3)
FAST = Profile("fast", "test", PolynomialCurve((0.3, 5e-5)), KV, PolynomialCurve((0.02,)), 10, 8, 1 << 17)
SLOW = Profile("slow", "test", PolynomialCurve((0.3, 2e-4)), KV, PolynomialCurve((0.02,)), 10, 8, 1 << 17)
PAIR = Deployment(
    (Cluster("fa", FAST, 4, 0), Cluster("pd", SLOW, 3, 5)), (Link("fa", "pd", 1e9, 0.01), Link("pd", "fa", 1e9, 0.01))
)
SLO = Slo(10.0, 0.05)
LINKS = [(each.source, each.target) for each in PAIR.links]


def look(
    now_s: float = 0.0,
    *,
    share: float = 0.0,
    queued_s: float = 0.0,
    down: tuple[str, ...] = (),
    waits: dict[str, float] | None = None,
) -> Snapshot:
    clusters = {
        each.name: ClusterState(
            each, each.prefill_instances, 0, (waits or {}).get(each.name, 0.0), each.decode_instances, 0, 0, 0.02
        )
        for each in PAIR.clusters
    }
    for name in down:
        clusters[name] = replace(clusters[name], prefill_instances=0)
    links = {(s, t): LinkState(s, t, 1e9, queued_s * 1e9, share, 0.01) for s, t in LINKS}
    return Snapshot(now_s, clusters, links)


def routed(
    policy: Any, snapshot: Snapshot, tokens: int, cached: dict[str, CachedPrefix] | None = None, memory: Any = None
) -> Decision:
    decision = policy.route(
        policy.begin() if memory is None else memory, snapshot, RoutingRequest(tokens, 100.0, cached or {})
    )
    assert isinstance(decision, Decision)
    return decision


def prefills(decision: Decision) -> str:
    assert decision.route is not None
    return decision.route.prefill


def test_long_uncached_prompts_go_to_the_cluster_that_only_prefills() -> None:
    policy = routing_policy("threshold", {"threshold_tokens": 10_000.0}, PAIR, SLO)
    assert prefills(routed(policy, look(), 10_000)) == "pd"
    assert prefills(routed(policy, look(), 10_001)) == "fa"
    assert prefills(routed(policy, look(), 15_000, {"pd": CachedPrefix(5000, 5000)})) == "pd"
    decision = routed(policy, look(), 10_001)
    assert "10001 uncached tokens are more than t = 10000" in decision.explanation.rule
    assert ("threshold_tokens", 10_000.0) in decision.explanation.inputs


def test_in_scarcity_each_cache_counts_for_itself() -> None:
    policy = routing_policy("threshold", {"threshold_tokens": 10_000.0}, PAIR, SLO)
    cached = {"fa": CachedPrefix(12_000, 12_000)}
    decision = routed(policy, look(), 20_000, cached)
    assert decision.route is not None
    assert (decision.route.prefill, decision.route.prefix_from) == ("pd", "fa"), "abundant: moved, and short enough"
    scarce = policy.observe(policy.begin(), look(share=0.9))
    decision = routed(policy, look(), 20_000, cached, scarce)
    assert decision.route is not None
    assert (decision.route.prefill, decision.route.prefix_from) == ("fa", None)
    assert policy.numbers(scarce)["scarce_links"] == 2


def test_a_side_that_is_down_is_gone_round() -> None:
    policy = routing_policy("threshold", {"threshold_tokens": 10_000.0}, PAIR, SLO)
    assert prefills(routed(policy, look(down=("fa",)), 50_000)) == "pd"
    assert prefills(routed(policy, look(down=("pd",)), 100)) == "fa"
    gone = replace(look(), links={})
    decision = routed(policy, gone, 50_000)
    assert prefills(decision) == "pd"
    assert "none serves" in decision.explanation.rule
    dead = look(down=("fa", "pd"))
    decision = routed(policy, dead, 50_000)
    assert decision.route is None
    assert ("fa", "left out: no instance works") in decision.explanation.inputs


def test_who_may_not_see_a_request_does_not() -> None:
    policy = routing_policy("adaptive", {}, PAIR, SLO)
    request = RoutingRequest(100_000, 10.0, {"fa": CachedPrefix(90_000, 90_000)}, frozenset({"pd"}))
    decision = policy.route(policy.begin(), look(), request)
    assert decision.route is not None
    assert (decision.route.prefill, decision.route.prefix_from) == ("pd", None)
    assert ("fa", "left out: may not see this request") in decision.explanation.inputs


@pytest.mark.parametrize("name", [name for name in ROUTING_SETTINGS if name != "naive"])
def test_what_nobody_heard_of_serves_only_when_nothing_else_does(name: str) -> None:
    """The stale cluster looks idle and is the one that the rule prefers, the other one is busy."""
    triple = Deployment((*PAIR.clusters, Cluster("near", SLOW, 1, 1)), PAIR.links)
    policy = routing_policy(name, {"threshold_tokens": 10_000.0} if name == "threshold" else {}, triple, SLO)
    pd = replace(look().clusters["pd"], age_s=100.0)
    near = ClusterState(triple.clusters[2], 1, 0, 20.0, 1, 0, 0, 0.02)
    for tokens in (100, 50_000):
        for now_s in range(4):
            decision = routed(policy, Snapshot(float(now_s), {"pd": pd, "near": near}, {}), tokens)
            assert decision.route is not None
            assert {decision.route.prefill, decision.route.decode} == {"near"}
            assert ("pd", "left out: nothing was heard of it for 100 s") in decision.explanation.inputs
        assert prefills(routed(policy, Snapshot(0.0, {"pd": pd}, {}), tokens)) == "pd"


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.floats(0.601, 0.799), st.floats(0, 0.499)), min_size=1, max_size=30),
    st.sampled_from([0.0, 0.9]),
)
def test_a_signal_inside_the_band_never_changes_the_mode(signals: list[tuple[float, float]], first: float) -> None:
    modes = observed(LinkModes(), look(0.0, share=first), Band())
    before = modes.scarce
    for number, (share, queued_s) in enumerate(signals, 1):
        modes = observed(modes, look(100.0 * number, share=share, queued_s=queued_s), Band())
        assert modes.scarce == before


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 1), st.sampled_from([0.0, 0.3, 2.0])), max_size=60))
def test_any_signal_makes_a_link_scarce_at_most_once_a_dwell(steps: list[tuple[float, float, float]]) -> None:
    band, modes, now_s, scarce_at_s = Band(dwell_s=10.0), LinkModes(), 0.0, []
    for step_s, share, queued_s in steps:
        now_s += step_s
        before, modes = modes, observed(modes, look(now_s, share=share, queued_s=queued_s), band)
        if modes.scarce - before.scarce:
            scarce_at_s.append(now_s)
    assert all(later - earlier >= band.dwell_s for earlier, later in pairwise(scarce_at_s))


def test_modes_are_entered_at_once_and_left_when_calm_for_long_enough() -> None:
    band = Band(dwell_s=10.0)
    modes = observed(LinkModes(), look(0.0, queued_s=0.6), band)
    assert modes.scarce == set(LINKS)
    assert observed(modes, look(9.0), band).scarce == set(LINKS)
    assert observed(modes, look(10.0, share=0.7), band).scarce == set(LINKS)
    assert not observed(modes, look(10.0), band).scarce
    assert not observed(modes, replace(look(1.0), links={}), band).scarce, "a link that is gone is forgotten"
    dead = {name: replace(each, bytes_per_s=0.0) for name, each in look().links.items()}
    assert observed(LinkModes(), replace(look(), links=dead), band).scarce == set(LINKS)


@pytest.mark.parametrize(
    "wrong",
    [{"scarce_share": 0.5}, {"scarce_share": 1.5}, {"abundant_queued_s": -1.0}, {"dwell_s": float("nan")}],
)
def test_a_band_without_an_inside_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=next(iter(wrong))):
        Band(**wrong)


def test_baselines_do_what_they_are_called() -> None:
    waits = look(waits={"fa": 3.0, "pd": 1.0})
    assert prefills(routed(routing_policy("local", {}, PAIR, SLO), look(), 50_000)) == "pd"
    assert prefills(routed(routing_policy("naive", {}, PAIR, SLO), waits, 10)) == "fa"
    assert prefills(routed(routing_policy("least-loaded", {}, PAIR, SLO), waits, 100_000)) == "pd"
    chance = routing_policy("random", {}, PAIR, SLO)
    counts = [prefills(routed(chance, look(float(number)), 1000 + number)) for number in range(400)]
    assert 160 < counts.count("fa") < 240


def test_the_adaptive_router_keeps_short_prompts_from_what_is_busy() -> None:
    """Both are busy: the long prompt gains more from the fast cluster than the short one, and gets it."""
    policy = routing_policy("adaptive", {}, PAIR, SLO)
    assert prefills(routed(policy, look(), 1500)) == "fa", "while there is room, the earliest first token"
    busy = {"fa": 3.0, "pd": 1.0}
    memory = policy.begin()
    for second in range(300):
        memory = policy.observe(memory, look(float(second), waits=busy))
    now = look(300.0, waits=busy)
    assert policy.numbers(memory)["prefill_price[fa]"] == pytest.approx(4.0, rel=0.1)
    assert prefills(routed(policy, now, 1500, memory=memory)) == "pd"
    assert prefills(routed(policy, now, 60_000, memory=memory)) == "fa"
    for second in range(300, 900):
        memory = policy.observe(memory, look(float(second)))
    assert policy.numbers(memory)["prefill_price[fa]"] < 0.01, "what was is forgotten"


def test_prices_by_elasticity_are_bounded_too() -> None:
    policy = routing_policy("adaptive", {"by_elasticity": 1.0}, PAIR, SLO)
    memory = policy.begin()
    for second in range(300):
        crowded = look(float(second), waits={"fa": 100.0})
        states = {name: replace(each, prefill_waiting=200) for name, each in crowded.clusters.items()}
        memory = policy.observe(memory, replace(crowded, clusters=states))
    assert policy.numbers(memory)["prefill_price[fa]"] == pytest.approx(4.0)


def test_the_price_of_a_link_is_bounded() -> None:
    policy = routing_policy("adaptive", {}, PAIR, SLO)
    memory = policy.begin()
    for second in range(300):
        memory = policy.observe(memory, look(float(second), share=1.0))
    assert policy.numbers(memory)["link_price[fa, pd]"] == 4.0


def test_batches_that_are_late_make_their_places_dearer() -> None:
    policy = routing_policy("adaptive", {}, PAIR, SLO)
    now = look()
    slow = replace(now, clusters={**now.clusters, "pd": replace(now.clusters["pd"], tpot_s=0.1)})
    assert policy.numbers(policy.observe(policy.begin(), slow))["decode_price[pd]"] == pytest.approx(1.0)


def test_scores_follow_from_what_an_explanation_says() -> None:
    """Every candidate's: its seconds, and what it takes of each resource times the price that is among the inputs."""
    policy = routing_policy("adaptive", {}, PAIR, SLO)
    memory = policy.begin()
    for second in range(100):
        memory = policy.observe(memory, look(float(second), share=0.5, waits={"fa": 3.0, "pd": 1.0}))
    now = look(100.0, share=0.5, waits={"fa": 3.0, "pd": 1.0})
    slow = {name: replace(each, tpot_s=0.06) for name, each in now.clusters.items()}
    memory = policy.observe(memory, replace(now, clusters=slow))
    explanation = routed(policy, now, 60_000, {"pd": CachedPrefix(20_000, 30_000)}, memory).explanation
    prices = {name: value for name, value in explanation.inputs if isinstance(value, float) and "_price[" in name}
    assert min(prices.values()) > 0
    assert {each.route.prefix_from for each in explanation.candidates} == {None, "pd"}
    for each in explanation.candidates:
        route, seconds = each.route, each.route.estimate.ttft_s
        seconds += prices[f"prefill_price[{route.prefill}]"] * route.estimate.prefill_s
        seconds += prices["link_price[fa, pd]"] * route.handover_bytes / 1e9
        seconds += prices["link_price[pd, fa]"] * route.prefix_bytes / 1e9
        seconds += prices["decode_price[pd]"] * 100.0 * SLOW.decode_step(10)
        assert each.score == pytest.approx(seconds)


def test_every_candidate_says_why_not() -> None:
    explanation = routed(routing_policy("adaptive", {}, PAIR, SLO), look(waits={"pd": 7.0}), 30_000).explanation
    first, *others = explanation.candidates
    assert not first.against
    assert [each.against for each in others] == ["11.5 s worse: waits for prefill 7 s more"]
    assert others[0].score - first.score == pytest.approx(11.5, rel=0.01)


@pytest.mark.parametrize(
    ("name", "given_settings", "message"),
    [
        ("fastest", {}, "there are adaptive, threshold"),
        ("adaptive", {"memory": 3.0}, "it has memory_s, price_scale, by_elasticity"),
        ("local", {"memory_s": 3.0}, "it has none"),
        ("adaptive", {"memory_s": 0.0}, "memory_s=0.0"),
        ("adaptive", {"price_scale": -1.0}, "price_scale=-1.0"),
        ("threshold", {}, "kvstore plan"),
        ("threshold", {"threshold_tokens": float("nan")}, "threshold_tokens=nan"),
        ("threshold", {"threshold_tokens": 5.0, "abundant_share": 0.9}, "abundant_share=0.9"),
    ],
)
def test_what_is_wrong_is_named(name: str, given_settings: dict[str, float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        routing_policy(name, given_settings, PAIR, SLO)


@pytest.mark.parametrize("name", ["threshold", "naive"])
def test_policies_that_need_a_prefill_cluster_say_so(name: str) -> None:
    alone = Deployment((Cluster("pd", SLOW, 3, 5),))
    with pytest.raises(DeploymentError, match="decode_instances = 0"):
        routing_policy(name, {"threshold_tokens": 1.0} if name == "threshold" else {}, alone, SLO)


def test_a_threshold_needs_somebody_to_keep_short_prompts() -> None:
    naive = Deployment((Cluster("fa", FAST, 4, 0), Cluster("pd", SLOW, 0, 8)), PAIR.links)
    with pytest.raises(DeploymentError, match="use 'naive'"):
        routing_policy("threshold", {"threshold_tokens": 1.0}, naive, SLO)


def test_every_name_is_that_of_its_policy() -> None:
    for name in ROUTING_SETTINGS:
        policy = routing_policy(name, {"threshold_tokens": 1.0} if name == "threshold" else {}, PAIR, SLO)
        assert policy.name == name
