"""The policies of one run, and what they remember from one decision to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.schedule.planning.plan import Plan
    from kvstore.schedule.policies.admit import AdmissionPolicy
    from kvstore.schedule.policies.convert import Conversion, ConversionPolicy
    from kvstore.schedule.policies.policy import Route, RoutingPolicy
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot


class Policies:
    """Asks the policies and keeps their memories; decides nothing itself. Not thread-safe.

    Args:
        policy: decides where requests go.
        admission: turns requests away early; None lets all in that have a route.
        conversion: says when an instance changes its role; None for never.
        retuned: the router for a plan that `conversion` has made; None keeps the one that there is.
    """

    def __init__(
        self,
        policy: RoutingPolicy[Any],
        admission: AdmissionPolicy | None,
        conversion: ConversionPolicy | None,
        retuned: Callable[[Plan], RoutingPolicy[Any] | None],
    ) -> None:
        self._policy = policy
        self._memory = policy.begin()
        self._admission = admission
        self._admitted = None if admission is None else admission.begin()
        self._conversion = conversion
        self._converted = None if conversion is None else conversion.begin()
        self._retuned = retuned
        self._plan: Plan | None = None

    @property
    def name(self) -> str:
        """Of the routing policy."""
        return self._policy.name

    def ask(self, snapshot: Snapshot, asked: RoutingRequest) -> Route | None:
        """Where a request goes that need not be let in any more."""
        return self._policy.route(self._memory, snapshot, asked).route

    def let_in(self, snapshot: Snapshot, asked: RoutingRequest) -> Route | None:
        """Where a request goes that has just arrived, if it is admitted; whoever remembers requests is told of it."""
        route = self.ask(snapshot, asked)
        if self._conversion is not None and self._converted is not None:
            self._converted = self._conversion.arrived(self._converted, asked, route)
        if self._admission is None or self._admitted is None or route is None:
            return route
        admission = self._admission.decide(self._admitted, snapshot, asked, route)
        if not admission.is_admitted:
            return None
        self._admitted = self._admission.admitted(self._admitted, snapshot, asked, route, admission)
        return route

    def tell(self, snapshot: Snapshot) -> Conversion | None:
        """A telemetry interval ends; the conversion that is to begin, if there is one."""
        self._memory = self._policy.observe(self._memory, snapshot)
        if self._admission is not None and self._admitted is not None:
            self._admitted = self._admission.observe(self._admitted, snapshot)
        if self._conversion is None or self._converted is None:
            return None
        memory = self._conversion.observe(self._converted, snapshot)
        decision = self._conversion.decide(memory)
        if decision.plan is not None and decision.plan != self._plan:
            self._plan = decision.plan
            self._policy = self._retuned(decision.plan) or self._policy
        if decision.conversion is not None:
            memory = self._conversion.converted(memory, snapshot, decision.conversion)
        self._converted = memory
        return decision.conversion

    def numbers(self) -> Mapping[str, float]:
        """What the routing policy shows of its memory."""
        return self._policy.numbers(self._memory)
