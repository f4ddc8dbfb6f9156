"""The simulator against what is known exactly: queues with a closed form, a recursion, and the model's throughput."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.profile import KvSize, MeasuredCurve, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.plan import Traffic, plan_of
from kvstore.schedule.planning.queueing import mdc, mmc
from kvstore.schedule.planning.throughput import throughput
from kvstore.schedule.policies.policy import Decision, Estimate, Explanation, Route
from kvstore.workload.request import Request
from tests.unit.simulated import Fixed, one_cluster, poisson, profile_of, requests_at, simulated

REQUESTS = 40_000


def mean_and_error(waits: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error by the means of 20 batches, since neighbours wait alike."""
    batches = waits[: len(waits) // 20 * 20].reshape(20, -1).mean(axis=1)
    return float(waits.mean()), float(batches.std(ddof=1) / sqrt(20))


@pytest.mark.parametrize(
    ("servers", "used", "is_exponential"),
    [(1, 0.5, True), (1, 0.8, True), (4, 0.8, True), (1, 0.7, False), (3, 0.85, False)],
    ids=["M/M/1 at 50 %", "M/M/1 at 80 %", "M/M/4", "M/D/1", "M/D/3"],
)
def test_waiting_is_that_of_the_closed_form(servers: int, used: float, is_exponential: bool) -> None:
    rng = np.random.default_rng(7)
    arrivals_s = poisson(used * servers, REQUESTS, 8)
    tokens = np.maximum(rng.exponential(1e6, REQUESTS), 1).astype(int) if is_exponential else 10**6
    result = simulated(
        one_cluster(servers, profile=profile_of(1e-6)), requests_at(arrivals_s, tokens), telemetry_s=100.0
    )
    mean_s, error_s = mean_and_error(result.requests.parts[2000:, 0])
    expected_s = (mmc if is_exponential else mdc)(used * servers, 1.0, servers).mean_s
    assert abs(mean_s - expected_s) < 3 * error_s
    assert error_s < 0.1 * expected_s, "the comparison says something"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5000)), min_size=1, max_size=60))
def test_every_single_wait_is_that_of_the_recursion(servers: int, requests: list[tuple[float, int]]) -> None:
    """Kiefer and Wolfowitz (1955): who comes takes the server that is free first."""
    arrivals_s = np.cumsum([gap for gap, _ in requests])
    result = simulated(one_cluster(servers), requests_at(arrivals_s, [tokens for _, tokens in requests]))
    free_at_s = [0.0] * servers
    for row, (at_s, (_, tokens)) in enumerate(zip(arrivals_s, requests, strict=True)):
        first = min(range(servers), key=free_at_s.__getitem__)
        begin_s = max(free_at_s[first], at_s)
        free_at_s[first] = begin_s + tokens * 1e-3
        assert result.requests.parts[row, 0] == pytest.approx(begin_s - at_s, abs=1e-9)


class _ByLength(Fixed):
    def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
        where = "far" if request.prompt_tokens > 20_000 else "near"
        return Decision(Route(where, "near", 0, None, 0, 0, Estimate()), Explanation("length", "by length", ()))


@pytest.mark.parametrize("bound", ["prefill", "decode", "link"])
def test_a_saturated_deployment_serves_what_the_model_says(bound: str) -> None:
    """Whatever binds: prefill instances, decode batches, or the link."""
    profile = Profile(
        "test",
        "made up",
        PolynomialCurve((0.4, 0.05, 5e-4), 1000.0),
        KvSize(1e8, 2e4),
        MeasuredCurve((1.0, 20.0), (0.02, 0.025)),
        5 if bound == "decode" else 20,
        8,
        131_072,
    )
    decode, bytes_per_s = (1 if bound == "decode" else 6), (5e8 if bound == "link" else 1e10)
    deployment = Deployment(
        (Cluster("far", profile, 2, 0), Cluster("near", profile, 3, decode)), (Link("far", "near", bytes_per_s),)
    )
    lengths = np.random.default_rng(3).integers(1000, 60_000, 6000)
    traffic = Traffic(PointMasses(lengths.tolist()), 500)
    expected = throughput(deployment, plan_of([["near"], ["far"]], [20_000]), traffic, "mean")
    arrivals_s = np.arange(6000) / (1.5 * expected.requests_per_s)
    requests = [
        Request(number, float(at_s), int(tokens), 500, b"")
        for number, (at_s, tokens) in enumerate(zip(arrivals_s, lengths, strict=True))
    ]
    result = simulated(deployment, requests, _ByLength("", ""))
    table = result.requests
    assert not result.is_stable
    assert bound in expected.binding[0]
    begin_s, end_s = 0.2 * arrivals_s[-1], arrivals_s[-1]
    if bound == "link":
        # Transfers share it, so that in an overload ever more of them are under way: what counts is what crossed.
        during = (result.samples.at_s > begin_s) & (result.samples.at_s <= end_s)
        served = result.samples.link_bytes["far", "near"][during].sum() / during.sum()
        assert served == pytest.approx(bytes_per_s, rel=1e-3)
        return
    # The part that binds is never idle before the last arrival; the others wait for it, or run ahead.
    is_far = table.prompt_tokens > 20_000
    of_part = {"prefill of far": is_far, "prefill of near": ~is_far}.get(expected.binding[0], is_far | ~is_far)
    ended_s = table.finished_s if bound == "decode" else table.arrival_s + table.ttft_s
    served = ((ended_s > begin_s) & (ended_s <= end_s) & of_part).sum() / (end_s - begin_s)
    assert served == pytest.approx(expected.requests_per_s * of_part.mean(), rel=0.03)
