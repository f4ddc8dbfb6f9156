"""Where requests are prefilled: a fast cluster that only prefills, a slower one that decodes, and a link between them.

A router takes snapshots from telemetry. Here they are written by hand, so that one sees what follows from what.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, LinkState, RoutingRequest, Snapshot
from kvstore.schedule.policies.table import routing_policy

if TYPE_CHECKING:
    from kvstore.schedule.policies.policy import Decision

size = KvSize(state_bytes=180e6, token_bytes=17_000)  # a hybrid model: states of one size, attention by the token
decode_step = PolynomialCurve((0.025,))
points = (1e3, 8e3, 32e3, 128e3)
quick = Profile("quick", "made up", MeasuredCurve(points, (0.4, 0.7, 1.8, 7.4)), size, decode_step, 20, 8, 131_072)
slow = Profile("slow", "made up", MeasuredCurve(points, (0.6, 1.5, 4.9, 22.0)), size, decode_step, 20, 8, 131_072)

deployment = Deployment(
    (Cluster("fast", quick, prefill_instances=4, decode_instances=0), Cluster("home", slow, 3, 5)),
    (Link("fast", "home", 12.5e9, round_trip_s=0.01), Link("home", "fast", 12.5e9, round_trip_s=0.01)),
)
policy = routing_policy("adaptive", {}, deployment, Slo(ttft_s=10.0, tpot_s=0.05))


def look(now_s: float, waits: dict[str, tuple[int, float]], *, link_share: float = 1.0) -> Snapshot:
    """A snapshot: prompts that wait and for how long, by cluster, and the share of their rate that links have."""
    clusters = {}
    for each in deployment.clusters:
        waiting, wait_s = waits.get(each.name, (0, 0.0))
        clusters[each.name] = ClusterState(
            each, each.prefill_instances, waiting, wait_s, each.decode_instances, 60, 0, tpot_s=0.025
        )
    links = {
        (link.source, link.target): LinkState(
            link.source, link.target, link_share * link.bytes_per_s, 0.0, 0.2, link.round_trip_s
        )
        for link in deployment.links
    }
    return Snapshot(now_s, clusters, links)


def show(decision: Decision, what: str) -> None:
    route = decision.route
    if route is None:
        print(f"{what}: nobody. {decision.explanation.rule}")
        return
    print(
        f"{what}: {route.prefill} prefills from {route.resume_tokens}, {route.decode} decodes; "
        f"{route.prefix_bytes / 1e6:.0f} MB of prefix move, {route.handover_bytes / 1e6:.0f} MB are handed over, "
        f"first token after {route.estimate.ttft_s:.2f} s"
    )
    for scored in decision.explanation.candidates[1:2]:
        print(f"    next best: {scored.route.prefill}, {scored.against}")


memory = policy.begin()
idle = look(0.0, {})
for tokens in (2000, 48_000):
    show(policy.route(memory, idle, RoutingRequest(tokens, 500.0, {})), f"{tokens} tokens")

crowded = {"fast": (12, 4.0), "home": (1, 0.5)}
for second in range(120):  # observed all the while: prices follow
    memory = policy.observe(memory, look(float(second), crowded))
busy = look(120.0, crowded)
print(", ".join(f"{name} {value:.2f}" for name, value in policy.numbers(memory).items()))
for tokens in (2000, 100_000):
    show(policy.route(memory, busy, RoutingRequest(tokens, 500.0, {})), f"fast is crowded, {tokens} tokens")

turn = RoutingRequest(48_000, 500.0, {"home": CachedPrefix(40_000, 44_000, load_s=0.05, tier="dram")})
show(policy.route(policy.begin(), idle, turn), "48000 tokens of which home has 40000")
show(policy.route(policy.begin(), look(0.0, {}, link_share=0.0), RoutingRequest(48_000, 500.0, {})), "the link is down")
confined = replace(turn, allowed=frozenset({"fast"}))
show(policy.route(policy.begin(), idle, confined), "48000 tokens that may only be seen by fast")
