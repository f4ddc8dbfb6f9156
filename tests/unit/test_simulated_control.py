"""Early rejection and conversions in the simulator: what the policies say is carried out, and nothing is lost by it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.scenario import NodeFault, Scenario, Workload
from kvstore.schedule.deployment import Slo
from kvstore.schedule.policies.admit import AdmissionPolicy
from kvstore.schedule.policies.convert import Conversion, ConversionPolicy
from kvstore.schedule.policies.policy import Decision, Estimate, Explanation, Route
from kvstore.simulate.conversions import Conversions
from kvstore.simulate.engine import Simulation
from kvstore.simulate.events import Events
from kvstore.simulate.job import Job
from kvstore.simulate.result import Outcome
from kvstore.simulate.site import Site
from kvstore.workload.request import Request
from tests.unit.simulated import Fixed, one_cluster, poisson, profile_of, requests_at

if TYPE_CHECKING:
    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.policies.snapshot import RoutingRequest, Snapshot
    from kvstore.simulate.result import SimulationResult


class Estimating(Fixed):
    """Estimates the queue as the snapshot says, which in one cluster is exact."""

    def route(self, memory: int, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        estimate = Estimate(queue_s=snapshot.clusters["one"].prefill_wait_s, prefill_s=request.prompt_tokens * 1e-3)
        return Decision(Route("one", "one", 0, None, 0.0, 0.0, estimate), Explanation("estimating", "always", ()))


def run(deployment: Deployment, requests: list[Request], slo: Slo, **policies: object) -> SimulationResult:
    scenario = Scenario("test", deployment, Workload(), slo)
    return Simulation(scenario, requests, Estimating("one", "one"), {}, **policies).run()  # type: ignore[arg-type]


def test_whoever_would_be_late_is_turned_away_and_nobody_else() -> None:
    """At three times what one instance can do: those who are let in meet the limit, and it is busy all the time."""
    slo = Slo(5.0, 1.0)
    requests = requests_at(poisson(3.0, 600, 1), 1000)
    result = run(one_cluster(), requests, slo, admission=AdmissionPolicy(slo))
    table = result.requests
    done = table.outcome == Outcome.DONE
    assert set(table.outcome.tolist()) == {Outcome.DONE, Outcome.REJECTED}
    assert table.ttft_s[done].max() <= 5.0 + 1e-9
    assert done.sum() >= 0.95 * table.arrival_s.max()
    assert result.is_stable
    everybody = run(one_cluster(), requests, slo)
    assert (everybody.requests.outcome == Outcome.DONE).all()
    assert not everybody.is_stable


def test_policies_are_told_what_a_server_could_know_of_an_answer() -> None:
    told = []

    class Listening(Estimating):
        def route(self, memory: int, snapshot: Snapshot, request: RoutingRequest) -> Decision:
            told.append(request.output_tokens)
            return super().route(memory, snapshot, request)

    requests = requests_at([0.0, 100.0, 200.0], 100, output_tokens=1000)
    scenario = Scenario("test", one_cluster(), Workload(), Slo(5.0, 1.0))
    Simulation(scenario, requests, Listening("one", "one"), {}).run()
    assert told == [256.0, 628.0, 752.0], "a prior, and then the mean of the prior and those that ended"


def test_instances_move_to_where_the_work_is() -> None:
    """Prefill can do 2/s and 3/s come; decode has many times what it needs. Instances change, one after another."""
    profile = profile_of(decode_step_s=0.01, batch=4)
    deployment = one_cluster(2, 6, profile=profile)
    cluster = replace(deployment.clusters[0], convertible=True, conversion_s=20.0)
    deployment = replace(deployment, clusters=(cluster,))
    requests = requests_at(poisson(3.0, 6000, 2), 1000, output_tokens=100)
    slo = Slo(5.0, 1.0)
    policy = ConversionPolicy(deployment, window_s=120.0, review_s=10.0)
    fixed = run(deployment, requests, slo)
    converted = run(deployment, requests, slo, conversion=policy)
    assert not fixed.is_stable
    assert (converted.requests.outcome == Outcome.DONE).all()
    late = slice(4000, None)
    assert np.median(converted.requests.ttft_s[late]) < 5 < np.median(fixed.requests.ttft_s[late])
    total = converted.samples.prefill_instances["one"] + converted.samples.decode_instances["one"]
    assert total.max() == 8
    assert total.min() == 7, "one instance at a time has no role"
    assert total[-1] == 8
    texts = [happening.text for happening in converted.happenings if happening.what == "conversion"]
    assert texts[:2] == [
        "a decode instance is to become one for prefill",
        "a decode instance has become one for prefill",
    ]
    assert len(texts) == 2 * (converted.samples.prefill_instances["one"][-1] - 2)


def test_one_instance_changes_at_a_time_however_long_it_has_to_end_what_it_is_at() -> None:
    """Answers take 20 s, converting takes 10, and divisions are compared every 10 s."""
    deployment = one_cluster(2, 6, profile=profile_of(decode_step_s=0.05, batch=16))
    cluster = replace(deployment.clusters[0], convertible=True, conversion_s=10.0)
    deployment = replace(deployment, clusters=(cluster,))
    requests = requests_at(poisson(2.6, 1000, 2), 1000, output_tokens=400)
    policy = ConversionPolicy(deployment, window_s=120.0, review_s=10.0)
    result = run(deployment, requests, Slo(5.0, 1.0), conversion=policy)
    texts = [happening.text for happening in result.happenings]
    assert len(texts) >= 4
    assert texts == [
        "a decode instance is to become one for prefill",
        "a decode instance has become one for prefill",
    ] * (len(texts) // 2)


@pytest.mark.parametrize(("source", "target"), [("prefill", "decode"), ("decode", "prefill")])
@pytest.mark.parametrize("is_lost", [False, True])
def test_an_instance_ends_what_it_is_at_before_it_changes(source: str, target: str, is_lost: bool) -> None:
    events = Events()
    done: list[tuple[float, int]] = []
    deployment = one_cluster(1, 1)
    cluster = replace(deployment.clusters[0], conversion_s=5.0)

    def start(job: Job, instance: int) -> None:
        events.at(events.now_s + 2.0, lambda _: site.prefill.busy.get(instance) is job and end(job, instance))

    def end(job: Job, instance: int) -> None:
        done.append((events.now_s, job.request.number))
        site.prefill.finished(instance)

    site = Site(
        0,
        cluster,
        None,
        events,
        start=start,
        placed=lambda _: None,
        finished=lambda job: done.append((events.now_s, job.request.number)),
    )
    job = Job(Request(0, 0.0, 1000, 201, b""), 0.0)
    job.service_s = job.end_s = 2.0
    if source == "prefill":
        site.prefill.expect(job)
        site.prefill.enqueue(job)
    else:
        site.decode.expected += 1
        site.decode.join(job)
    conversions = Conversions(events, {"one": site}, list)
    conversions.begin(Conversion("one", source, target))  # type: ignore[arg-type]
    counts = {"prefill": lambda: site.prefill.instances, "decode": lambda: site.decode.instances}
    assert counts[source]() == 0
    assert counts[target]() == 1
    if is_lost:
        lost = (site.prefill if source == "prefill" else site.decode).fail(lambda of, count: list(range(count)), 1)
        assert lost == [job]
    events.run(100.0)
    if is_lost:
        assert not done
        assert (counts[source](), counts[target]()) == (0, 1), "it failed before it could change"
    else:
        assert done == [(pytest.approx(2.0), 0)]
        assert (counts[source](), counts[target]()) == (0, 2)
        assert conversions.happenings[-1].at_s == pytest.approx(7.0)


def test_faults_and_conversions_together_lose_no_instance() -> None:
    deployment = one_cluster(3, 5)
    cluster = replace(deployment.clusters[0], convertible=True, conversion_s=7.0)
    deployment = replace(deployment, clusters=(cluster,))
    requests = requests_at(poisson(4.0, 3000, 3), 1000, output_tokens=50)
    slo = Slo(5.0, 1.0)
    faults = tuple(
        NodeFault("one", role, 1, at_s, at_s + 15.0)  # type: ignore[arg-type]
        for at_s in (100.0, 130.0, 160.0, 300.0)
        for role in ("prefill", "decode")
    )
    scenario = Scenario("test", deployment, Workload(), slo, faults=faults)
    policy = ConversionPolicy(deployment, window_s=60.0, review_s=5.0)
    result = Simulation(scenario, requests, Estimating("one", "one"), {}, conversion=policy).run()
    assert np.isin(result.requests.outcome, (Outcome.DONE, Outcome.FAILED)).all()
    total = result.samples.prefill_instances["one"] + result.samples.decode_instances["one"]
    assert total[-1] == 8
    assert total.max() <= 8
