"""Conformance kit for routing policies.

A test module of the implementer's own:

    class TestMine(RoutingConformance):
        def make(self, deployment, slo):
            return MyPolicy()

Where a policy sends a request is its own business; that the request gets there, that the route says how, and that the
policy is a pure function, is the kit's. Its strategies draw deployments in which clusters are down, links are missing,
slow, dead or stale, and caches hold anything; `check_decision` holds one decision against what it was decided from.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvstore.limits import ROUTING_STALE_S
from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, LinkState, RoutingRequest, Snapshot

if TYPE_CHECKING:
    from kvstore.schedule.policies.policy import Decision, Route, RoutingPolicy

SLO = Slo(ttft_s=10.0, tpot_s=0.05)
_KV = KvSize(state_bytes=100e6, token_bytes=20e3, window_token_bytes=1e3, window_tokens=512)
FAST = Profile("fast", "test", MeasuredCurve((1e3, 1e5), (0.4, 6.0)), _KV, PolynomialCurve((0.02, 1e-4)), 8, 8, 1 << 17)
SLOW = Profile("slow", "test", PolynomialCurve((0.4, 2e-4)), _KV, PolynomialCurve((0.03, 1e-4)), 4, 8, 1 << 17)

SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
_MESH = 4


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """One cluster that only prefills, one that does both, and others; any two may be joined."""
    kinds = [(2, 0), (2, 3), *draw(st.lists(st.sampled_from([(1, 0), (1, 1), (0, 2), (3, 2)]), max_size=_MESH - 2))]
    clusters = [
        Cluster(f"c{number}", FAST if decode == 0 else SLOW, prefill, decode)
        for number, (prefill, decode) in enumerate(kinds)
    ]
    links = []
    for source in clusters:
        for target in clusters:
            is_needed = not source.decodes and target.name == "c1"
            if source is not target and (is_needed or draw(st.booleans())):
                links.append(Link(source.name, target.name, draw(st.sampled_from([1e8, 1e9, 1.25e10])), 0.01))
    return Deployment(tuple(clusters), tuple(links))


@st.composite
def snapshots(draw: st.DrawFn, deployment: Deployment) -> Snapshot:
    """Any state of a deployment; instances may be down, links dead, gone, busy, or long unheard of."""
    seconds = st.sampled_from([0.0, 0.0, 0.3, 2.0, 40.0])
    ages = st.sampled_from([0.0, 0.0, 1.0, 100.0])
    clusters = {
        each.name: ClusterState(
            each,
            draw(st.integers(0, each.prefill_instances)),
            draw(st.integers(0, 5)),
            draw(seconds),
            draw(st.integers(0, each.decode_instances)),
            draw(st.integers(0, 30)),
            draw(st.integers(0, 5)),
            draw(st.sampled_from([0.0, 0.02, 0.2])),
            draw(ages),
        )
        for each in deployment.clusters
    }
    links = {}
    for link in deployment.links:
        if draw(st.integers(0, 5)):
            rate = link.bytes_per_s * draw(st.sampled_from([0.0, 0.5, 1.0, 1.0]))
            queued_bytes = draw(seconds) * link.bytes_per_s
            used_share = draw(st.floats(0, 1))
            links[link.source, link.target] = LinkState(
                link.source, link.target, rate, queued_bytes, used_share, link.round_trip_s, 0.0, draw(ages)
            )
    return Snapshot(draw(st.floats(0, 1e6)), clusters, links)


@st.composite
def requests(draw: st.DrawFn, deployment: Deployment) -> RoutingRequest:
    """Any prompt, cached anywhere to any length, and perhaps confined to some clusters."""
    names = [each.name for each in deployment.clusters]
    prompt_tokens = draw(st.integers(1, 1 << 17))
    cached = {}
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        resume_tokens = draw(st.sampled_from([0, prompt_tokens // 2, prompt_tokens - 1, prompt_tokens]))
        attention_tokens = draw(st.integers(resume_tokens, prompt_tokens))
        cached[name] = CachedPrefix(resume_tokens, attention_tokens, draw(st.sampled_from([0.0, 0.1, 50.0])), "dram")
    allowed = draw(st.none() | st.frozensets(st.sampled_from([*names, "elsewhere"])))
    return RoutingRequest(prompt_tokens, draw(st.floats(1, 4096)), cached, allowed)


def check_decision(decision: Decision, snapshot: Snapshot, request: RoutingRequest) -> None:
    """Assert that a decision can be carried out, is honest about its bytes, and explains itself."""
    explanation = decision.explanation
    assert explanation.policy, "an explanation names its policy"
    assert explanation.rule, "an explanation names the rule that decided"
    for scored in explanation.candidates:
        check_route(scored.route, snapshot, request)
    if decision.route is None:
        return
    check_route(decision.route, snapshot, request)
    fresh = _fresh(snapshot)
    if has_a_way(fresh, request):
        check_route(decision.route, fresh, request)
    assert explanation.candidates, "what was decided was a candidate"
    first, *others = explanation.candidates
    assert first.route == decision.route, "the candidate that was taken comes first"
    assert not first.against, "nothing speaks against the candidate that was taken"
    assert all(each.against for each in others), "each candidate that was not taken says why not"


def check_route(route: Route, snapshot: Snapshot, request: RoutingRequest) -> None:
    """Assert that a route uses only what works and is allowed, and that what it says of prefixes and bytes is so."""
    for name in {route.prefill, route.decode} - set(snapshot.clusters):
        raise AssertionError(f"nothing was heard of {name}, or not for {ROUTING_STALE_S:g} s, and others serve")
    prefill, decode = snapshot.clusters[route.prefill], snapshot.clusters[route.decode]
    assert prefill.prefill_instances > 0, f"nothing prefills in {route.prefill}"
    assert decode.decode_instances > 0, f"nothing decodes in {route.decode}"
    named = {route.prefill, route.decode} | ({route.prefix_from} if route.prefix_from else set())
    assert request.allowed is None or named <= request.allowed, (
        f"{named} sees a request that only {request.allowed} may"
    )
    size = prefill.cluster.profile.kv
    if route.prefill == route.decode:
        assert route.handover_bytes == 0, "nothing is handed over inside of a cluster"
    else:
        _check_link(snapshot, route.prefill, route.decode)
        there = request.cached.get(route.decode, CachedPrefix()).attention_tokens
        missing_bytes = size.missing_bytes(request.prompt_tokens, there)
        assert route.handover_bytes == pytest.approx(missing_bytes), f"{route.decode} lacks {missing_bytes:.0f} bytes"
    assert 0 <= route.resume_tokens < request.prompt_tokens, "one token at least is left to compute"
    if route.prefix_from is None:
        own = request.cached.get(route.prefill, CachedPrefix()).resume_tokens
        assert route.resume_tokens in (0, own), f"{route.prefill} has no resume point at {route.resume_tokens}"
        assert route.prefix_bytes == 0, "no prefix moves, and no bytes of one"
    else:
        assert route.prefix_from != route.prefill, "a prefix moves to another cluster"
        _check_link(snapshot, route.prefix_from, route.prefill)
        has_tokens = request.cached.get(route.prefix_from, CachedPrefix()).resume_tokens
        assert 0 < route.resume_tokens == has_tokens, f"{route.prefix_from} has a resume point at {has_tokens} tokens"
        there = request.cached.get(route.prefill, CachedPrefix()).attention_tokens
        missing_bytes = size.missing_bytes(route.resume_tokens, there)
        assert route.prefix_bytes == pytest.approx(missing_bytes), f"{route.prefill} lacks {missing_bytes:.0f} bytes"
    estimate = route.estimate
    parts = (
        estimate.queue_s,
        estimate.load_s,
        estimate.prefix_s,
        estimate.prefill_s,
        estimate.transfer_s,
        estimate.decode_wait_s,
    )
    assert all(isfinite(part) and part >= 0 for part in parts), f"{estimate} is not a time"


def _check_link(snapshot: Snapshot, source: str, target: str) -> None:
    link = snapshot.links.get((source, target))
    assert link is not None, f"there is no link from {source} to {target}"
    assert link.bytes_per_s > 0, f"the link from {source} to {target} is down"


def _fresh(snapshot: Snapshot) -> Snapshot:
    """Without what nobody heard of for `ROUTING_STALE_S`."""
    return replace(
        snapshot,
        clusters={name: each for name, each in snapshot.clusters.items() if each.age_s <= ROUTING_STALE_S},
        links={between: each for between, each in snapshot.links.items() if each.age_s <= ROUTING_STALE_S},
    )


def has_a_way(snapshot: Snapshot, request: RoutingRequest) -> bool:
    """Whether somebody allowed prefills and reaches somebody allowed who decodes."""
    names = [name for name in snapshot.clusters if request.allowed is None or name in request.allowed]
    return any(
        snapshot.clusters[prefill].prefill_instances > 0
        and snapshot.clusters[decode].decode_instances > 0
        and (
            prefill == decode or ((link := snapshot.links.get((prefill, decode))) is not None and link.bytes_per_s > 0)
        )
        for prefill in names
        for decode in names
    )


class RoutingConformance:
    """The cases for a routing policy.

    Attributes:
        may_turn_away: whether the policy may refuse a request that there is a way for.
        hypothesis_settings: how much is tried.
    """

    may_turn_away = False
    hypothesis_settings = SETTINGS

    @abstractmethod
    def make(self, deployment: Deployment, slo: Slo) -> RoutingPolicy[Any]:
        """A policy for this deployment."""

    def test_has_a_name(self) -> None:
        deployment = Deployment(
            (Cluster("c0", FAST, 1, 0), Cluster("c1", SLOW, 1, 1)), (Link("c0", "c1", 1e9), Link("c1", "c0", 1e9))
        )
        assert self.make(deployment, SLO).name

    def test_decisions_can_be_carried_out(self) -> None:
        @self.hypothesis_settings
        @given(st.data())
        def run(data: st.DataObject) -> None:
            deployment = data.draw(deployments())
            policy = self.make(deployment, SLO)
            memory = policy.begin()
            for _ in range(data.draw(st.integers(0, 3))):
                memory = policy.observe(memory, data.draw(snapshots(deployment)))
            snapshot, request = data.draw(snapshots(deployment)), data.draw(requests(deployment))
            decision = policy.route(memory, snapshot, request)
            check_decision(decision, snapshot, request)
            assert decision.explanation.policy == policy.name
            if not has_a_way(snapshot, request):
                assert decision.route is None, "there is no way"
            elif not self.may_turn_away:
                assert decision.route is not None, f"turned away: {decision.explanation.rule}"

        run()

    def test_is_a_pure_function(self) -> None:
        @self.hypothesis_settings
        @given(st.data())
        def run(data: st.DataObject) -> None:
            deployment = data.draw(deployments())
            policy, other = self.make(deployment, SLO), self.make(deployment, SLO)
            assert policy.begin() == other.begin()
            earlier, snapshot = data.draw(snapshots(deployment)), data.draw(snapshots(deployment))
            request = data.draw(requests(deployment))
            given_before = deepcopy((earlier, snapshot, request))
            memory = policy.observe(policy.begin(), earlier)
            remembered = deepcopy(memory)
            decision = policy.route(memory, snapshot, request)
            policy.observe(memory, snapshot)
            policy.route(memory, earlier, request)
            assert (earlier, snapshot, request) == given_before, "what a policy is given stays as it is"
            assert memory == remembered, "what a policy remembers is a value of its own"
            assert policy.route(memory, snapshot, request) == decision
            assert other.observe(other.begin(), earlier) == memory
            assert other.route(memory, snapshot, request) == decision

        run()

    def test_numbers_are_numbers(self) -> None:
        @self.hypothesis_settings
        @given(st.data())
        def run(data: st.DataObject) -> None:
            deployment = data.draw(deployments())
            policy = self.make(deployment, SLO)
            memory = policy.observe(policy.begin(), data.draw(snapshots(deployment)))
            assert all(isfinite(value) for value in policy.numbers(memory).values())

        run()
