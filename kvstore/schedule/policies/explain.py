"""Decisions in order of preference, each able to say what else there was and why not."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, TypeAlias

from kvstore.limits import ROUTING_CANDIDATES_MAX, ROUTING_STALE_S
from kvstore.schedule.policies.policy import Decision, Explanation, Scored
from kvstore.schedule.policies.search import FREE, Candidate, best_route

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.schedule.policies.search import Prices, Rules
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

    Inputs: TypeAlias = Callable[[], tuple[tuple[str, float | str], ...]]

_PARTS = ("price", "load_s", "prefix_s", "queue_s", "prefill_s", "transfer_s", "decode_wait_s")
_WORDS = {
    "price": "others wait",
    "load_s": "loads its prefix",
    "prefix_s": "moves its prefix",
    "queue_s": "waits for prefill",
    "prefill_s": "computes",
    "transfer_s": "waits for its hand-over",
    "decode_wait_s": "waits for a place",
}


def decide(
    policy: str,
    choices: Sequence[tuple[str, Rules]],
    snapshot: Snapshot,
    request: RoutingRequest,
    prices: Prices = FREE,
    inputs: Inputs = tuple,
) -> Decision:
    """The best route under the first rules that allow any.

    Clusters and links that nothing was heard of for `ROUTING_STALE_S` serve only where no rules allow any other way.

    Args:
        policy: name of the policy.
        choices: what rule it is, in words, and what it permits; the preferred first.
        inputs: gives the remembered values that go in, for the explanation.
    """
    for stale_s in (ROUTING_STALE_S, inf):
        for rule, rules in choices:
            best = best_route(snapshot, request, rules, prices, None, stale_s)
            if best is not None:
                return Decision(best.route(), _Why(policy, rule, snapshot, request, rules, prices, stale_s, inputs))
    rule, rules = "there is no way: nobody prefills and reaches somebody who decodes", choices[-1][1]
    return Decision(None, _Why(policy, rule, snapshot, request, rules, prices, inf, inputs))


class _Why:
    """Decides once more, and takes notes."""

    __slots__ = ("_arguments",)

    def __init__(
        self,
        policy: str,
        rule: str,
        snapshot: Snapshot,
        request: RoutingRequest,
        rules: Rules,
        prices: Prices,
        stale_s: float,
        inputs: Inputs,
    ) -> None:
        self._arguments = (policy, rule, snapshot, request, rules, prices, stale_s, inputs)

    def __call__(self) -> Explanation:
        policy, rule, snapshot, request, rules, prices, stale_s, inputs = self._arguments
        considered: list[Candidate] = []
        best = best_route(snapshot, request, rules, prices, considered, stale_s)
        scored: list[Scored] = []
        if best is not None:
            considered.sort(key=lambda each: (each is not best, each.score))
            scored = [Scored(best.route(), best.score)]
            scored += [
                Scored(each.route(), each.score, _against(each, best)) for each in considered[1:ROUTING_CANDIDATES_MAX]
            ]
        return Explanation(policy, rule, tuple(scored), (*inputs(), *_left_out(snapshot, request, rules, stale_s)))


def _against(candidate: Candidate, best: Candidate) -> str:
    more_s = candidate.score - best.score
    if more_s <= 0:
        return "no better"
    part = max(_PARTS, key=lambda name: getattr(candidate, name) - getattr(best, name))
    return f"{more_s:.3g} s worse: {_WORDS[part]} {getattr(candidate, part) - getattr(best, part):.3g} s more"


def _left_out(snapshot: Snapshot, request: RoutingRequest, rules: Rules, stale_s: float) -> list[tuple[str, str]]:
    """Clusters and links that could not be candidates, or only for a part, and why."""
    found = []
    for name, state in snapshot.clusters.items():
        if request.allowed is not None and name not in request.allowed:
            found.append((name, "left out: may not see this request"))
        elif state.prefill_instances <= 0 and state.decode_instances <= 0:
            found.append((name, "left out: no instance works"))
        elif state.age_s > stale_s:
            found.append((name, f"left out: nothing was heard of it for {state.age_s:.3g} s"))
        else:
            if rules.prefill is not None and name not in rules.prefill and state.prefill_instances > 0:
                found.append((name, "does not prefill this one: the rule"))
            if state.prefill_instances <= 0 < state.cluster.prefill_instances:
                found.append((name, "does not prefill: no such instance works"))
            if state.decode_instances <= 0 < state.cluster.decode_instances:
                found.append((name, "does not decode: no such instance works"))
    for (source, target), link in snapshot.links.items():
        if link.bytes_per_s <= 0:
            found.append((f"{source} to {target}", "left out: the link is down"))
        elif link.age_s > stale_s:
            found.append((f"{source} to {target}", f"left out: nothing was heard of it for {link.age_s:.3g} s"))
    return found
