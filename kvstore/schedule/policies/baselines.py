"""What a router is compared with: everything at home, everything to the prefill clusters, the shortest queue, chance.

None of them moves prefixes between clusters, and none remembers anything.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING
from zlib import crc32

from kvstore.errors import DeploymentError
from kvstore.schedule.policies.explain import decide
from kvstore.schedule.policies.policy import Decision, RoutingPolicy
from kvstore.schedule.policies.search import Rules

if TYPE_CHECKING:
    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

_ANY_WAY = ("the rule leaves nobody who serves: any way", Rules())


class _Forgetful(RoutingPolicy[None]):
    """A policy that remembers nothing."""

    def begin(self) -> None:
        return None

    def observe(self, memory: None, snapshot: Snapshot) -> None:
        return None


class LocalRouting(_Forgetful):
    """Prefills where it decodes: the homogeneous deployment. Of several clusters, that of the earliest first token."""

    name = "local"

    def route(self, memory: None, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        return decide(self.name, [("prefills where it decodes", Rules(is_local=True)), _ANY_WAY], snapshot, request)


class NaiveRouting(_Forgetful):
    """Prefills everything in clusters that only prefill: the paper's naive heterogeneous deployment.

    Raises:
        DeploymentError: no cluster only prefills.
    """

    name = "naive"

    def __init__(self, deployment: Deployment) -> None:
        self._rules = Rules(frozenset(each.name for each in deployment.clusters if not each.decodes))
        if not self._rules.prefill:
            raise DeploymentError(
                "the policy 'naive' sends every prompt to clusters that only prefill, and there is none; add a cluster "
                "with decode_instances = 0, or use 'local'"
            )

    def route(self, memory: None, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        choices = [("every prompt to a cluster that only prefills", self._rules), _ANY_WAY]
        return decide(self.name, choices, snapshot, request)


class LeastLoadedRouting(_Forgetful):
    """Prefills where the queue is shortest in seconds, whatever is cached there; the first of equals."""

    name = "least-loaded"

    def route(self, memory: None, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        order = sorted(
            (state.prefill_wait_s, name) for name, state in snapshot.clusters.items() if state.prefill_instances > 0
        )
        choices = [(f"waits least, {wait_s:.3g} s", Rules(frozenset((name,)))) for wait_s, name in order]
        return decide(self.name, [*choices, _ANY_WAY], snapshot, request)


class RandomRouting(_Forgetful):
    """Prefills anywhere, all clusters that prefill being equally likely.

    Chance is a digest of the moment and the prompt's length, so that equal arguments give equal answers.
    """

    name = "random"

    def route(self, memory: None, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        names = sorted(name for name, state in snapshot.clusters.items() if state.prefill_instances > 0)
        drawn = crc32(pack("<dq", snapshot.now_s, request.prompt_tokens))
        first = drawn % len(names) if names else 0
        choices = [("chance", Rules(frozenset((name,)))) for name in names[first:] + names[:first]]
        return decide(self.name, [*choices, _ANY_WAY], snapshot, request)
