"""Whatever the deployment and its faults: every request ends once, its seconds add up, and equal runs are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.scenario import LinkFault, NodeFault
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link
from kvstore.simulate.result import Outcome
from kvstore.workload.request import Request
from tests.unit.simulated import Spread, profile_of, simulated

if TYPE_CHECKING:
    from kvstore.simulate.result import SimulationResult

seconds = st.floats(0.0, 30.0)


@st.composite
def workloads(draw: st.DrawFn) -> list[Request]:
    """Requests that share beginnings, some of which wait for others to end."""
    requests: list[Request] = []
    at_s = 0.0
    for number in range(draw(st.integers(1, 40))):
        after = draw(st.none() | st.integers(0, number - 1)) if number else None
        pause_s = draw(st.floats(0.0, 2.0))
        at_s += pause_s if after is None else 0.0
        path = [draw(st.integers(0, 1)) for _ in range(draw(st.integers(1, 6)))]
        keys = b"".join(repr(path[: end + 1]).encode().ljust(32, b".") for end in range(len(path)))
        tokens = 16 * len(path) + draw(st.integers(0, 15))
        requests.append(
            Request(number, at_s if after is None else pause_s, tokens, draw(st.integers(1, 50)), keys, keys, after)
        )
    return requests


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    profile = profile_of(draw(st.sampled_from([1e-3, 2e-2])), decode_step_s=0.05, batch=draw(st.integers(1, 3)))
    limits = st.none() | st.floats(1e3, 1e5)
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    clusters = tuple(
        Cluster(
            name,
            profile,
            draw(st.integers(1, 3)),
            draw(st.integers(1, 2)),
            draw(limits),
            draw(limits),
            CacheSize(draw(st.sampled_from([0.0, 2e4, 1e9])), draw(st.sampled_from([0.0, 1e6])), 1e4),
        )
        for name in names
    )
    pairs = [(source, target) for source in names for target in names if source != target]
    links = tuple(
        Link(*pair, draw(st.floats(1e3, 1e6)), draw(st.sampled_from([0.0, 0.1])))
        for pair in pairs
        if draw(st.booleans())
    )
    return Deployment(clusters, links)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Deployment, list[Request], tuple[LinkFault | NodeFault, ...]]:
    deployment = draw(deployments())
    faults: list[LinkFault | NodeFault] = []
    for _ in range(draw(st.integers(0, 4))):
        from_s = draw(seconds)
        until_s = from_s + draw(st.floats(0.01, 10.0))
        cluster = draw(st.sampled_from([cluster.name for cluster in deployment.clusters]))
        faults.append(
            NodeFault(cluster, draw(st.sampled_from(["prefill", "decode"])), draw(st.integers(1, 3)), from_s, until_s)
        )
        if deployment.links:
            link = draw(st.sampled_from(deployment.links))
            faults.append(LinkFault(link.source, link.target, from_s, until_s, draw(st.sampled_from([0.0, 0.5]))))
    return deployment, draw(workloads()), tuple(faults)


def run(scene: tuple[Deployment, list[Request], tuple[LinkFault | NodeFault, ...]]) -> SimulationResult:
    deployment, requests, faults = scene
    return simulated(deployment, requests, Spread(), faults=faults, telemetry_s=0.5)


@settings(max_examples=80, deadline=None)
@given(scenes())
def test_every_request_ends_once_and_its_seconds_add_up(
    scene: tuple[Deployment, list[Request], tuple[LinkFault | NodeFault, ...]],
) -> None:
    result = run(scene)
    table = result.requests
    assert len(table) == len(scene[1])
    assert np.isin(table.outcome, (Outcome.DONE, Outcome.REJECTED, Outcome.FAILED)).all()
    has_first = ~np.isnan(table.ttft_s)
    assert np.allclose(table.parts[has_first].sum(axis=1), table.ttft_s[has_first], rtol=1e-9, atol=1e-9)
    assert (table.parts[has_first] >= 0).all()
    done = table.outcome == Outcome.DONE
    assert has_first[done].all()
    assert (table.finished_s >= table.arrival_s).all()
    steps_s = (table.output_tokens - 1) * 0.05
    assert np.allclose((table.finished_s - table.arrival_s - table.ttft_s)[done], steps_s[done], atol=1e-6)
    assert (table.cached_tokens <= table.prompt_tokens - 1).all()
    # Blocks that came before are all that anybody can have; a retried prompt finds its own.
    retried = {happening.where for happening in result.happenings if "prefill instances fail" in happening.text}
    if not retried:
        waits = table.parts[:, 0] > 0
        assert (table.cached_tokens <= table.possible_tokens)[~waits].all()
    for request, arrival_s in zip(scene[1], table.arrival_s, strict=True):
        if request.after is not None:
            assert arrival_s >= table.finished_s[request.after] + request.arrival_s - 1e-9


@settings(max_examples=25, deadline=None)
@given(scenes())
def test_equal_runs_are_equal_bit_for_bit(
    scene: tuple[Deployment, list[Request], tuple[LinkFault | NodeFault, ...]],
) -> None:
    first, second = run(scene), run(scene)
    for name in first.requests.__dataclass_fields__:
        assert getattr(first.requests, name).tobytes() == getattr(second.requests, name).tobytes(), name
    assert first.happenings == second.happenings
    assert first.caches == second.caches
    assert first.end_s == second.end_s
    for pair, delivered in first.samples.link_bytes.items():
        assert delivered.tobytes() == second.samples.link_bytes[pair].tobytes()


@settings(max_examples=25, deadline=None)
@given(deployments(), workloads())
def test_bytes_that_cross_are_those_of_the_requests(deployment: Deployment, requests: list[Request]) -> None:
    """Over links without a round trip, so that nothing is on its way when the last request ends."""
    links = tuple(Link(link.source, link.target, link.bytes_per_s) for link in deployment.links)
    result = simulated(Deployment(deployment.clusters, links), requests, Spread(), telemetry_s=0.1)
    crossed = sum(float(delivered.sum()) for delivered in result.samples.link_bytes.values())
    table = result.requests
    assert crossed == np.float64(crossed)
    accepted = float(table.prefix_bytes.sum() + table.handover_bytes.sum())
    # Samples end with the last whole interval: what crossed behind it is at most an interval at full rate.
    assert crossed <= accepted * (1 + 1e-9) + 1e-3
    assert crossed >= accepted - sum(link.bytes_per_s for link in links) * 0.1 - 1e-3
