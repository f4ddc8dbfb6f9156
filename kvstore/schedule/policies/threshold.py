"""The paper's short-term routing: prompts with more than t uncached tokens go to a cluster that only prefills.

While bandwidth is scarce each cluster's cache counts for itself; while it is abundant the deepest prefix of any cluster
counts, and is moved to where prefill begins. The paper has one cluster of each kind and one link; with more, scarcity
is a link's own, and among clusters of the kind that the rule chooses the one with the earliest first token is taken.

Source: Prefill-as-a-Service, arXiv 2604.15039, section on dual-timescale scheduling.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING

from kvstore.errors import DeploymentError, PlanError
from kvstore.schedule.policies.explain import decide
from kvstore.schedule.policies.mode import Band, LinkModes, observed
from kvstore.schedule.policies.policy import Decision, RoutingPolicy
from kvstore.schedule.policies.search import Rules, reachable_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot


class ThresholdRouting(RoutingPolicy[LinkModes]):
    """Long prompts to clusters that only prefill, short ones stay where they are decoded.

    Args:
        threshold_tokens: t; `kvstore plan` computes it.

    Raises:
        PlanError: t is negative or not finite.
        DeploymentError: no cluster only prefills, or none both prefills and decodes.
    """

    name = "threshold"

    def __init__(self, deployment: Deployment, threshold_tokens: float, band: Band | None = None) -> None:
        if not isfinite(threshold_tokens) or threshold_tokens < 0:
            raise PlanError(f"threshold_tokens={threshold_tokens} must be finite and not negative")
        self._threshold_tokens = threshold_tokens
        self._band = band or Band()
        self._remote = frozenset(each.name for each in deployment.clusters if not each.decodes)
        self._local = frozenset(each.name for each in deployment.clusters if each.decodes)
        if not self._remote:
            raise DeploymentError(
                "the policy 'threshold' sends long prompts to clusters that only prefill, and there is none; add a "
                "cluster with decode_instances = 0, or use 'local' or 'adaptive'"
            )
        if not any(each.decodes and each.prefill_instances for each in deployment.clusters):
            raise DeploymentError(
                "the policy 'threshold' keeps short prompts in clusters that prefill and decode, and there is none; "
                "give prefill_instances to one that decodes, or use 'naive'"
            )

    def begin(self) -> LinkModes:
        return LinkModes()

    def observe(self, memory: LinkModes, snapshot: Snapshot) -> LinkModes:
        return observed(memory, snapshot, self._band)

    def numbers(self, memory: LinkModes) -> Mapping[str, float]:
        return {"scarce_links": float(len(memory.since_s)), "threshold_tokens": self._threshold_tokens}

    def route(self, memory: LinkModes, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        scarce = memory.scarce
        local = Rules(self._local, is_local=True, prefixes="deepest", not_over=scarce)
        remote = Rules(self._remote, prefixes="deepest", not_over=scarce)
        reached = {name: reachable_tokens(name, snapshot, request, local) for name in self._local}
        uncached_tokens = request.prompt_tokens - max(reached.values())
        t = self._threshold_tokens
        if uncached_tokens <= t:
            near = frozenset(name for name in self._local if request.prompt_tokens - reached[name] <= t)
            rule = f"{uncached_tokens} uncached tokens are at most t = {t:.0f}: stays where it is decoded"
            local = Rules(near, is_local=True, prefixes="deepest", not_over=scarce)
            choices = [(rule, local), (f"{rule}, but nobody there serves: prefilled elsewhere", remote)]
        else:
            rule = f"{uncached_tokens} uncached tokens are more than t = {t:.0f}: to a cluster that only prefills"
            choices = [(rule, remote), (f"{rule}, but none serves: stays where it is decoded", local)]
        choices.append(("neither side serves by itself: any way", Rules(prefixes="deepest", not_over=scarce)))
        return decide(
            self.name,
            choices,
            snapshot,
            request,
            inputs=lambda: (("threshold_tokens", t), ("scarce_links", _shown(scarce))),
        )


def _shown(links: frozenset[tuple[str, str]]) -> str:
    return ", ".join(f"{source} to {target}" for source, target in sorted(links)) or "none"
