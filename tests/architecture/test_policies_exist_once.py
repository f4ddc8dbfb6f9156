"""Policies are written once: what decides in a simulation is what decides in a server."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.workload.request import Request
from tests.unit.simulated import Spread, requests_at, simulated, two_clusters

if TYPE_CHECKING:
    from kvstore.schedule.policies.policy import Decision
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot

ROOT = Path(__file__).parents[2] / "kvstore"
SIMULATED = sorted(path for part in ("simulate", "workload") for path in (ROOT / part).rglob("*.py"))
SEAMS = {"RoutingPolicy", "CheckpointPolicy", "EvictionPolicy"}
SEAM_METHODS = {"route", "observe", "suggest", "decide", "admitted", "victims"}
DECIDE = ("schedule/policies", "schedule/prefill_service.py", "schedule/link_rate.py", "pool", "placement")


def definitions(path: Path) -> set[str]:
    """Public names of classes and functions that a file defines at its top."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, kinds) and node.name[0] != "_"}


def test_nothing_in_the_simulator_is_a_policy() -> None:
    for path in SIMULATED:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                assert not bases & SEAMS, f"{path}: {node.name} implements a policy; it belongs to kvstore.schedule"
            if isinstance(node, ast.FunctionDef):
                assert node.name not in SEAM_METHODS, f"{path}: {node.name} is a method of a policy's seam"


def test_no_name_of_a_policy_is_defined_a_second_time() -> None:
    files = [path for part in DECIDE for path in (sorted((ROOT / part).rglob("*.py")) or [ROOT / part])]
    decided = {name for path in files for name in definitions(path)}
    assert {"RoutingPolicy", "PrefillServiceModel", "loss_limited_bytes_per_s", "LadderCheckpoints"} <= decided
    for path in SIMULATED:
        twice = definitions(path) & decided
        assert not twice, f"{path} defines {', '.join(sorted(twice))}, which kvstore.schedule or the pool has already"


class _Recorded(Spread):
    """Notes what it was asked, and what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, Snapshot, RoutingRequest]] = []
        self.said: list[Decision] = []

    def route(self, memory: int, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        decision = super().route(memory, snapshot, request)
        self.asked.append((memory, snapshot, request))
        self.said.append(decision)
        return decision


def test_what_happens_is_what_the_policy_says_when_asked_outside_of_the_simulation() -> None:
    """A server that is shown the same snapshots decides the same, and nothing in the simulator overrides it."""
    keys = [b"".join(bytes([5, block]).ljust(32, b".") for block in range(number % 7)) for number in range(200)]
    requests = [
        Request(each.number, each.arrival_s, each.prompt_tokens, 1, keys[each.number])
        for each in requests_at([number * 0.21 for number in range(200)], [100 + number for number in range(200)])
    ]
    recorded = _Recorded()
    result = simulated(two_clusters(2, dram=1e9), requests, recorded)
    server = Spread()
    assert len(recorded.asked) == 200
    for row, (asked, said) in enumerate(zip(recorded.asked, recorded.said, strict=True)):
        route = server.route(*asked).route
        assert route is not None
        assert route == said.route
        names = [cluster.name for cluster in result.scenario.deployment.clusters]
        assert names[result.requests.prefill[row]] == route.prefill
        assert names[result.requests.decode[row]] == route.decode
        # It may only find more than it was routed for: what came while it waited.
        assert result.requests.cached_tokens[row] >= route.resume_tokens
