"""Every routing policy that comes with kvstore against the kit, and the kit against policies that are wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

from kvstore.schedule.policies.policy import Decision
from kvstore.schedule.policies.table import ROUTING_SETTINGS, routing_policy
from kvstore.testing.routing import SETTINGS, RoutingConformance

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.schedule.deployment import Deployment, Slo
    from kvstore.schedule.policies.policy import Route, RoutingPolicy
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

REQUIRED = {"threshold": {"threshold_tokens": 20_000.0}}


UNSHRUNK = settings(SETTINGS, max_examples=1000, phases=(Phase.generate,))


class _Named(RoutingConformance):
    name = ""

    def make(self, deployment: Deployment, slo: Slo) -> RoutingPolicy[Any]:
        return routing_policy(self.name, REQUIRED.get(self.name, {}), deployment, slo)


globals().update(
    {
        f"Test{name.title().replace('-', '')}": type(f"Test{name}", (_Named,), {"name": name})
        for name in ROUTING_SETTINGS
    }
)


class _Wrong:
    """A policy whose routes were tampered with, and its explanations in the same way."""

    name = "adaptive"

    def __init__(self, policy: RoutingPolicy[Any], change: Callable[[Route], Route | None]) -> None:
        self._policy, self._change = policy, change
        self.begin, self.observe, self.numbers = policy.begin, policy.observe, policy.numbers

    def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        decision = self._policy.route(memory, snapshot, request)
        if decision.route is None:
            return decision
        route = self._change(decision.route)
        first, *others = decision.explanation.candidates
        candidates = () if route is None else (replace(first, route=route), *others)
        return Decision(route, replace(decision.explanation, candidates=candidates))


def _kit(make: Callable[[RoutingPolicy[Any]], Any]) -> RoutingConformance:
    class Tampered(RoutingConformance):
        hypothesis_settings = UNSHRUNK

        def make(self, deployment: Deployment, slo: Slo) -> Any:
            return make(routing_policy("adaptive", {}, deployment, slo))

    return Tampered()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda route: None, "turned away"),
        (lambda route: replace(route, decode="c0"), "nothing decodes in c0"),
        (lambda route: replace(route, prefill="c1", decode="c1"), "handed over|resume point|nothing prefills in c1"),
        (lambda route: replace(route, prefill="elsewhere"), "heard of elsewhere"),
        (lambda route: replace(route, handover_bytes=route.handover_bytes + 1e6), "lacks|is handed over"),
        (lambda route: replace(route, prefix_bytes=route.prefix_bytes + 1e6), "lacks|no bytes of one"),
        (lambda route: replace(route, resume_tokens=route.resume_tokens + 1), "resume point"),
        (lambda route: replace(route, resume_tokens=1 << 30), "left to compute"),
        (lambda route: replace(route, prefix_from=route.prefill), "moves to another"),
        (lambda route: replace(route, estimate=replace(route.estimate, queue_s=-1.0)), "not a time"),
        (lambda route: replace(route, estimate=replace(route.estimate, queue_s=float("inf"))), "not a time"),
    ],
)
def test_the_kit_notices(change: Callable[[Route], Route | None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        _kit(lambda policy: _Wrong(policy, change)).test_decisions_can_be_carried_out()


class _Shown(_Wrong):
    """A policy that is shown something else than there is."""

    def __init__(self, policy: RoutingPolicy[Any], view: Callable[[Any], Any]) -> None:
        super().__init__(policy, lambda route: route)
        self._view = view

    def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        return super().route(memory, *self._view((snapshot, request)))


def _unaged(shown: tuple[Snapshot, RoutingRequest]) -> tuple[Snapshot, RoutingRequest]:
    now, request = shown
    clusters = {name: replace(each, age_s=0.0) for name, each in now.clusters.items()}
    return replace(
        now, clusters=clusters, links={at: replace(each, age_s=0.0) for at, each in now.links.items()}
    ), request


def _undead(shown: tuple[Snapshot, RoutingRequest]) -> tuple[Snapshot, RoutingRequest]:
    now, request = shown
    return replace(now, links={at: replace(each, bytes_per_s=1e9) for at, each in now.links.items()}), request


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (_unaged, "heard of|there is no link"),
        (_undead, "is down"),
        (lambda shown: (shown[0], replace(shown[1], allowed=None)), "sees a request"),
        (lambda shown: (shown[0], replace(shown[1], cached={})), "lacks"),
    ],
)
def test_the_kit_notices_what_was_not_looked_at(view: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        _kit(lambda policy: _Shown(policy, view)).test_decisions_can_be_carried_out()


class _Counting(_Wrong):
    def __init__(self, policy: RoutingPolicy[Any]) -> None:
        super().__init__(policy, lambda route: replace(route, prefix_bytes=float(self.count)))
        self.count = 0

    def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        self.count += 1
        return super().route(memory, snapshot, request)


class _Remembering(_Wrong):
    """Remembers by itself how often it has observed."""

    def __init__(self, policy: RoutingPolicy[Any]) -> None:
        super().__init__(policy, lambda route: replace(route, prefix_bytes=float(self.count)))
        self.count = 0
        self.observe = self._observe

    def _observe(self, memory: Any, snapshot: Snapshot) -> Any:
        self.count += 1
        return self._policy.observe(memory, snapshot)


class _Forgetting(_Wrong):
    """Empties what it was shown, once it has seen it."""

    def __init__(self, policy: RoutingPolicy[Any]) -> None:
        super().__init__(policy, lambda route: route)
        self.observe = self._observe

    def _observe(self, memory: Any, snapshot: Snapshot) -> Any:
        memory = self._policy.observe(memory, snapshot)
        snapshot.links.clear()  # type: ignore[attr-defined]
        return memory


@pytest.mark.parametrize("impure", [_Counting, _Remembering, _Forgetting])
def test_the_kit_notices_a_policy_that_is_no_pure_function(impure: Callable[[RoutingPolicy[Any]], Any]) -> None:
    with pytest.raises(AssertionError):
        _kit(impure).test_is_a_pure_function()
