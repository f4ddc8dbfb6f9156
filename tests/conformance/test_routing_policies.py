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


UNSHRUNK = settings(SETTINGS, phases=(Phase.generate,))


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
    """A policy whose routes were tampered with."""

    name = "adaptive"

    def __init__(self, policy: RoutingPolicy[Any], change: Callable[[Route], Route | None]) -> None:
        self._policy, self._change = policy, change
        self.begin, self.observe, self.numbers = policy.begin, policy.observe, policy.numbers

    def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        decision = self._policy.route(memory, snapshot, request)
        return Decision(decision.route and self._change(decision.route), decision.explanation)


@pytest.mark.parametrize(
    "change",
    [
        lambda route: None,
        lambda route: replace(route, decode="c0"),
        lambda route: replace(route, prefill="c2"),
        lambda route: replace(route, handover_bytes=route.handover_bytes + 1e6),
        lambda route: replace(route, resume_tokens=route.resume_tokens + 1),
        lambda route: replace(route, prefix_from="c1"),
        lambda route: replace(route, estimate=replace(route.estimate, queue_s=-1.0)),
    ],
)
def test_the_kit_notices(change: Callable[[Route], Route | None]) -> None:
    class Tampered(RoutingConformance):
        hypothesis_settings = UNSHRUNK

        def make(self, deployment: Deployment, slo: Slo) -> Any:
            return _Wrong(routing_policy("adaptive", {}, deployment, slo), change)

    with pytest.raises((AssertionError, KeyError)):
        Tampered().test_decisions_can_be_carried_out()


def test_the_kit_notices_a_policy_that_counts() -> None:
    class Counting(_Wrong):
        def __init__(self, policy: RoutingPolicy[Any]) -> None:
            super().__init__(policy, lambda route: replace(route, prefix_bytes=float(self.count)))
            self.count = 0

        def route(self, memory: Any, snapshot: Snapshot, request: RoutingRequest) -> Decision:
            self.count += 1
            return super().route(memory, snapshot, request)

    class Impure(RoutingConformance):
        hypothesis_settings = UNSHRUNK

        def make(self, deployment: Deployment, slo: Slo) -> Any:
            return Counting(routing_policy("adaptive", {}, deployment, slo))

    with pytest.raises(AssertionError):
        Impure().test_is_a_pure_function()
