"""One request at a time: where its seconds go, and what is kept of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest

from kvstore.errors import SimulationError
from kvstore.profile import MeasuredCurve, PolynomialCurve
from kvstore.scenario import Arrivals, LinkFault, NodeFault, read_scenario
from kvstore.schedule.deployment import Cluster, Deployment
from kvstore.schedule.policies.table import routing_policy
from kvstore.schedule.prefill_service import ServiceKind
from kvstore.simulate.result import PARTS, Outcome
from kvstore.simulate.simulation import simulate
from kvstore.workload.request import Request
from kvstore.workload.seen import SeenKeys
from tests.unit.simulated import (
    SLO,
    Fixed,
    Spread,
    one_cluster,
    profile_of,
    requests_at,
    served,
    simulated,
    two_clusters,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


def parts_of(result: object, row: int = 0) -> dict[str, float]:
    table = result.requests  # type: ignore[attr-defined]
    return {name: value for name, value in zip(PARTS, table.parts[row].tolist(), strict=True) if value}


def keys_of(*names: str) -> bytes:
    return b"".join(name.encode().ljust(32, b".") for name in names)


class FarWhileItWorks(Fixed):
    """Prefills in `far` while it has an instance, else in `near` while that has one."""

    def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
        clusters = snapshot.clusters
        if not clusters["far"].prefill_instances and clusters["near"].prefill_instances:
            return Fixed("near", "near").route(memory, snapshot, request)
        return super().route(memory, snapshot, request)


def test_a_prompt_in_one_cluster_waits_and_is_prefilled() -> None:
    result = simulated(one_cluster(), requests_at([0.0, 0.5], 1000, output_tokens=11))
    assert parts_of(result, 0) == {"prefill_s": pytest.approx(1.0)}
    assert parts_of(result, 1) == {"queue_s": pytest.approx(0.5), "prefill_s": pytest.approx(1.0)}
    assert result.requests.ttft_s == pytest.approx([1.0, 1.5])
    assert result.requests.finished_s == pytest.approx([1.1, 2.1])
    assert result.requests.tpot_s == pytest.approx([0.01, 0.01])
    assert result.requests.outcome.tolist() == [Outcome.DONE] * 2
    assert result.requests.handover_bytes.tolist() == [0.0, 0.0]


def test_a_hand_over_hides_behind_prefill_where_the_link_is_fast() -> None:
    result = simulated(two_clusters(bytes_per_s=1e6, round_trip_s=0.2), requests_at([0.0]))
    assert parts_of(result) == {"prefill_s": pytest.approx(1.0), "transfer_s": pytest.approx(0.2)}
    assert result.requests.handover_bytes.tolist() == [100_000.0]


def test_what_a_slow_link_leaves_behind_is_seen() -> None:
    result = simulated(two_clusters(bytes_per_s=1e4), requests_at([0.0]))
    assert parts_of(result) == {"prefill_s": pytest.approx(1.0), "transfer_s": pytest.approx(9.0)}
    assert sum(result.samples.link_bytes["far", "near"]) == pytest.approx(100_000, rel=0.2)


def test_states_of_a_chunked_prefill_leave_last() -> None:
    profile = profile_of(state_bytes=50_000.0)
    whole = simulated(two_clusters(bytes_per_s=2e5, profile=profile), requests_at([0.0], 10_000))
    chunked = simulated(served(two_clusters(bytes_per_s=2e5, profile=profile), "chunked"), requests_at([0.0], 10_000))
    assert parts_of(whole)["transfer_s"] == pytest.approx(0, abs=1e-6) if "transfer_s" in parts_of(whole) else True
    assert parts_of(chunked)["transfer_s"] == pytest.approx(50_000 / 2e5)


def test_layered_prefill_takes_as_long_as_whole_and_chunks_take_longer() -> None:
    """On instances that only prefill; T has a fixed part, so each chunk of 2,048 tokens costs it again."""
    profile = replace(profile_of(), prefill=PolynomialCurve((0.5, 1e-3)))
    ttft_s = {
        kind: simulated(served(one_cluster(profile=profile), kind), requests_at([0.0], 4096)).requests.ttft_s[0]
        for kind in get_args(ServiceKind)
    }
    assert ttft_s["whole"] == ttft_s["layered"] == pytest.approx(0.5 + 4.096)
    assert ttft_s["chunked"] == pytest.approx(2 * (0.5 + 2.048))


def test_a_full_batch_makes_the_next_one_wait_for_a_place() -> None:
    profile = profile_of(decode_step_s=0.5, batch=1)
    result = simulated(one_cluster(2, profile=profile), requests_at([0.0, 0.0], 1000, output_tokens=5))
    assert parts_of(result, 1) == {"prefill_s": pytest.approx(1.0), "decode_wait_s": pytest.approx(2.0)}


def test_batches_slow_down_as_they_grow() -> None:
    """Two requests of 11 tokens, the second half way through the first: 5 steps alone, 10 together, 5 alone."""
    profile = replace(profile_of(), decode_step=MeasuredCurve((1.0, 2.0), (0.1, 0.2)), decode_batch_max=2)
    result = simulated(one_cluster(2, profile=profile), requests_at([0.0, 0.5], 1000, output_tokens=11))
    # Together from 1.5 s on: the first has 5 steps to go, until 2.5; the second then has 5 left alone, until 3.0.
    assert result.requests.finished_s == pytest.approx([2.5, 3.0])


def test_a_prompt_resumes_from_what_its_cluster_has() -> None:
    first = Request(0, 0.0, 48, 1, keys_of("a", "b", "c"))
    second = Request(1, 10.0, 64, 1, keys_of("a", "b", "c", "d"))
    result = simulated(one_cluster(dram=1e9), [first, second])
    assert result.requests.cached_tokens.tolist() == [0, 48]
    assert result.requests.possible_tokens.tolist() == [0, 48]
    assert parts_of(result, 1) == {"prefill_s": pytest.approx(0.016)}
    assert result.tiers == ("dram",)
    assert result.requests.tier.tolist() == [-1, 0]
    assert sum(counts.hit_tokens for counts in result.caches) == 48


def test_what_came_while_a_prompt_waited_counts_too() -> None:
    """Both arrive at once; the second finds at its start what the first has left."""
    requests = [Request(number, 0.0, 64, 1, keys_of("a", "b", "c", f"d{number}")) for number in range(2)]
    result = simulated(one_cluster(dram=1e9), requests)
    assert result.requests.cached_tokens.tolist() == [0, 48]


def test_equal_keys_are_equal_as_a_whole() -> None:
    """Keys may differ in their last bytes only."""
    seen = SeenKeys()
    seen.add(b"a" * 32 + b"a" * 31 + b"b")
    assert seen.blocks(b"a" * 32 + b"a" * 31 + b"b") == 2
    assert seen.blocks(b"a" * 31 + b"c") == 0


def test_a_prefix_moves_from_another_cluster() -> None:
    first = Request(0, 0.0, 48, 1, keys_of("a", "b", "c"))
    second = Request(1, 10.0, 64, 1, keys_of("a", "b", "c", "d"))

    class NearThenFar(Fixed):
        def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
            self._prefill = "far" if request.prompt_tokens == 64 else "near"
            return super().route(memory, snapshot, request)

    deployment = two_clusters(bytes_per_s=1e4, round_trip_s=0.25, dram=1e9)
    result = simulated(deployment, [first, second], NearThenFar("far", "near", "near"))
    assert result.requests.prefix_bytes.tolist() == [0.0, 4800.0]
    assert result.requests.cached_tokens.tolist() == [0, 48]
    # Only the last block is not in `near` yet, and crosses back: 1600 bytes in 0.16 s, of which 0.016 s hide.
    assert result.requests.handover_bytes.tolist() == [0.0, 1600.0]
    assert parts_of(result, 1) == {
        "prefix_s": pytest.approx(0.48 + 0.25),
        "prefill_s": pytest.approx(0.016),
        "transfer_s": pytest.approx(0.16 - 0.016 + 0.25),
    }


def test_turns_come_after_those_before_them() -> None:
    requests = [
        Request(0, 0.0, 1000, 11, b""),
        Request(1, 2.0, 1000, 11, b"", after=0),
        Request(2, 0.5, 1000, 11, b""),
    ]
    result = simulated(one_cluster(), requests)
    assert result.requests.arrival_s == pytest.approx([0.0, 3.1, 0.5])
    assert result.requests.outcome.tolist() == [Outcome.DONE] * 3


def test_what_would_arrive_late_is_left_out() -> None:
    requests = [
        Request(0, 0.0, 1000, 11, b""),
        Request(1, 1.0, 1000, 11, b"", after=0),
        Request(2, 30.0, 1000, 11, b"", after=0),
        Request(3, 1.0, 1000, 11, b"", after=2),
        Request(4, 20.0, 1000, 11, b""),
        Request(5, 21.0, 1000, 11, b""),
    ]
    taken = []

    def workload() -> Iterator[Request]:
        for request in requests:
            taken.append(request.number)
            yield request

    result = simulated(one_cluster(), workload(), duration_s=10.0)
    assert result.requests.arrival_s == pytest.approx([0.0, 2.1])
    assert taken == [0, 1, 2, 3, 4]


def test_a_failed_prefill_instance_loses_its_time_and_not_its_prompt() -> None:
    fault = NodeFault("one", "prefill", 1, 0.4, 2.0)
    result = simulated(one_cluster(), requests_at([0.0]), faults=(fault,))
    assert parts_of(result) == {"queue_s": pytest.approx(2.0), "prefill_s": pytest.approx(1.0)}
    assert [happening.what for happening in result.happenings] == ["fault", "fault"]


def test_a_prompt_whose_instances_fail_again_and_again_is_given_up() -> None:
    faults = tuple(NodeFault("one", "prefill", 1, at_s + 0.4, at_s + 0.5) for at_s in range(0, 40, 1))
    result = simulated(one_cluster(), requests_at([0.0]), faults=faults)
    assert result.requests.outcome.tolist() == [Outcome.FAILED]
    assert math.isnan(result.requests.ttft_s[0])


def test_prompts_that_wait_where_no_instance_is_left_go_another_way() -> None:
    """The first one was being prefilled at `far`, where nobody comes back for long; the others waited behind it."""
    fault = NodeFault("far", "prefill", 1, 0.5, 100.0)
    result = simulated(two_clusters(), requests_at([0.0, 0.1, 0.2]), FarWhileItWorks("far", "near"), faults=(fault,))
    assert result.requests.outcome.tolist() == [Outcome.DONE] * 3
    assert result.requests.prefill.tolist() == [1, 1, 1]
    assert result.requests.ttft_s == pytest.approx([1.5, 2.4, 3.3])
    for row, waited_s in enumerate((0.5, 1.4, 2.3)):
        assert parts_of(result, row) == {"queue_s": pytest.approx(waited_s), "prefill_s": pytest.approx(1.0)}


def test_a_prefix_that_comes_where_no_instance_is_left_goes_another_way() -> None:
    """It is on its way from `near` to `far` for 0.73 s; meanwhile the instance goes that it was for."""

    class NearThenFar(FarWhileItWorks):
        def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
            chosen = super() if request.prompt_tokens == 64 else Fixed("near", "near")
            return chosen.route(memory, snapshot, request)

    requests = [Request(0, 0.0, 48, 1, keys_of("a", "b", "c")), Request(1, 10.0, 64, 1, keys_of("a", "b", "c", "d"))]
    deployment = two_clusters(bytes_per_s=1e4, round_trip_s=0.25, dram=1e9)
    fault = NodeFault("far", "prefill", 1, 10.3, 100.0)
    result = simulated(deployment, requests, NearThenFar("far", "near", "near"), faults=(fault,))
    assert result.requests.prefill.tolist() == [1, 1]
    assert result.requests.cached_tokens.tolist() == [0, 48]
    assert result.requests.prefix_bytes.tolist() == [0.0, 4800.0]
    assert parts_of(result, 1) == {"prefix_s": pytest.approx(0.73), "prefill_s": pytest.approx(0.016)}


def test_prompts_without_another_way_wait_for_the_first_one_that_comes_back() -> None:
    """Both clusters are without an instance while they wait; `near` has one again long before `far`."""
    faults = (NodeFault("near", "prefill", 1, 0.2, 3.0), NodeFault("far", "prefill", 1, 0.5, 100.0))
    result = simulated(two_clusters(), requests_at([0.0, 0.1]), FarWhileItWorks("far", "near"), faults=faults)
    assert result.requests.outcome.tolist() == [Outcome.DONE] * 2
    assert result.requests.prefill.tolist() == [1, 1]
    assert result.requests.ttft_s == pytest.approx([4.0, 4.9])


@pytest.mark.parametrize("back_s", [1000.0, math.inf])
def test_prompts_without_another_way_take_the_link_that_comes_back(back_s: float) -> None:
    """`near` has no instance any more, and the way from `far` is closed until 50 s.

    The first one was at work on the instance that failed, and nobody else could take it.
    """
    faults = (LinkFault("far", "near", 5.0, 50.0, 0.0), NodeFault("near", "prefill", 1, 10.5, back_s))
    deployment = two_clusters()
    policy = routing_policy("least-loaded", {}, deployment, SLO)
    result = simulated(deployment, requests_at([10.0, 10.1, 10.2]), policy, faults=faults)
    assert result.requests.outcome.tolist() == [Outcome.FAILED, Outcome.DONE, Outcome.DONE]
    assert result.requests.prefill.tolist()[1:] == [0, 0]
    assert all(50.0 < finished_s < 60.0 for finished_s in result.requests.finished_s[1:])


def test_a_failed_decode_instance_loses_its_requests() -> None:
    fault = NodeFault("one", "decode", 1, 1.05, 2.0)
    result = simulated(one_cluster(), requests_at([0.0, 1.0], 1000, output_tokens=11), faults=(fault,))
    assert result.requests.outcome.tolist() == [Outcome.FAILED, Outcome.DONE]
    assert result.requests.ttft_s == pytest.approx([1.0, 1.0])
    assert result.requests.finished_s == pytest.approx([1.05, 2.1])


def test_a_hand_over_waits_for_a_link_that_comes_back() -> None:
    fault = LinkFault("far", "near", 0.5, 4.0, 0.0)
    result = simulated(two_clusters(bytes_per_s=1e5), requests_at([0.0]), faults=(fault,))
    assert parts_of(result) == {"prefill_s": pytest.approx(1.0), "transfer_s": pytest.approx(3.5)}


def test_a_hand_over_over_a_link_that_never_comes_back_is_given_up() -> None:
    fault = LinkFault("far", "near", 0.5, math.inf, 0.0)
    result = simulated(two_clusters(bytes_per_s=1e5), requests_at([0.0]), faults=(fault,))
    assert result.requests.outcome.tolist() == [Outcome.FAILED]


def test_a_failed_producer_takes_its_bytes_back() -> None:
    fault = NodeFault("far", "prefill", 1, 0.5, 1.0)
    result = simulated(two_clusters(bytes_per_s=1e6), requests_at([0.0]), faults=(fault,), telemetry_s=0.25)
    assert result.requests.outcome.tolist() == [Outcome.DONE]
    assert result.requests.ttft_s == pytest.approx([2.0])
    assert sum(result.samples.link_bytes["far", "near"]) == pytest.approx(150_000, rel=1e-3)
    assert result.requests.handover_bytes == pytest.approx([150_000])


def test_policies_see_what_links_deliver_and_how_old_that_is() -> None:
    """The cluster may send 30 kB/s, over a link of 100 kB/s: a transfer of 100 kB is under way all the time."""
    deployment = two_clusters(bytes_per_s=1e5)
    far, near = deployment.clusters
    deployment = Deployment((replace(far, egress_bytes_per_s=3e4), near), deployment.links)
    seen = []

    class Looking(Fixed):
        def route(self, memory, snapshot, request):  # type: ignore[no-untyped-def]
            seen.append(snapshot.links["far", "near"])
            return super().route(memory, snapshot, request)

    simulated(deployment, requests_at([0.0, 10.125, 20.25, 30.5]), Looking("far", "near"), telemetry_s=1.0)
    assert [link.bytes_per_s for link in seen] == [3e4] * 4
    assert [link.age_s for link in seen] == pytest.approx([0.0, 0.125, 0.25, 0.5])
    busy: list[float] = []

    class Watching(Fixed):
        def observe(self, memory, snapshot):  # type: ignore[no-untyped-def]
            busy.append(snapshot.links["far", "near"].used_share)
            return memory

    simulated(deployment, requests_at(np.arange(20.0)), Watching("far", "near"), telemetry_s=1.0)
    assert max(busy) == pytest.approx(1.0, abs=0.02)


def test_nobody_can_serve_it() -> None:
    fault = NodeFault("one", "decode", 1, 0.0, math.inf)
    result = simulated(one_cluster(), requests_at([1.0]), Spread(), faults=(fault,))
    assert result.requests.outcome.tolist() == [Outcome.REJECTED]
    assert result.requests.prefill.tolist() == [-1]


def test_too_much_is_labelled() -> None:
    calm = simulated(one_cluster(), requests_at(np.arange(500) * 2.0))
    assert calm.is_stable
    busy = simulated(one_cluster(), requests_at(np.arange(500) * 0.5))
    assert not busy.is_stable
    assert busy.requests.outcome.tolist() == [Outcome.DONE] * 500
    assert simulated(one_cluster(), requests_at([5.0])).is_stable, "one request is no backlog"
    slightly = simulated(one_cluster(), requests_at(np.arange(20_000) / 1.05), telemetry_s=10.0)
    assert not slightly.is_stable


def test_a_hopeless_run_is_cut_off() -> None:
    result = simulated(one_cluster(), requests_at(np.arange(100) * 0.1, 1_000_000))
    assert not result.is_stable
    assert set(result.requests.outcome.tolist()) == {Outcome.DONE, Outcome.PENDING}
    assert np.isnan(result.requests.ttft_s[result.requests.outcome == Outcome.PENDING]).all()


@pytest.mark.parametrize(
    ("requests", "what"),
    [
        ([Request(1, 0.0, 10, 1, b"")], "without holes"),
        ([Request(0, 1.0, 10, 1, b""), Request(1, 0.5, 10, 1, b"")], "sort the workload"),
        ([Request(0, 1.0, 10, 1, b"", after=0)], "not before it"),
    ],
)
def test_a_workload_with_holes_is_refused(requests: list[Request], what: str) -> None:
    with pytest.raises(SimulationError, match=what):
        simulated(one_cluster(), requests)


def test_a_policy_that_lies_is_found_out() -> None:
    apart = Deployment((Cluster("a", profile_of(), 1, 1), Cluster("b", profile_of(), 1, 1)))
    with pytest.raises(SimulationError, match="there is no link"):
        simulated(apart, requests_at([0.0]), Fixed("a", "b"))


@pytest.mark.parametrize(
    "fault",
    [
        LinkFault("near", "nowhere", 0.0, 1.0, 0.5),
        LinkFault("far", "near", 2.0, 1.0, 0.5),
        LinkFault("far", "near", 0.0, 1.0, 1.5),
        NodeFault("far", "prefill", 0, 0.0, 1.0),
    ],
)
def test_faults_of_what_is_not_there_are_refused(fault: LinkFault | NodeFault) -> None:
    with pytest.raises(SimulationError):
        simulated(two_clusters(), requests_at([0.0]), faults=(fault,))


def test_prices_of_the_router_are_sampled() -> None:
    scenario = read_scenario("paper-adaptive")
    arrivals = Arrivals("poisson", 3.2)
    workload = replace(scenario.workload, arrivals=arrivals)
    samples = simulate(replace(scenario, workload=workload, duration_s=120.0)).samples
    assert {"prefill_price[pd]", "prefill_price[prfaas]", "decode_price[pd]", "link_price[prfaas, pd]"} <= set(
        samples.policy
    )
    prices = samples.policy["prefill_price[pd]"]
    assert prices[-1] > prices[0] >= 0.0, "it becomes dearer as load sets in"
