"""Links of the simulator: fair, bounded by everything that bounds them, and no byte appears or disappears."""

from __future__ import annotations

import math
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SimulationError
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.link_rate import loss_limited_bytes_per_s
from kvstore.simulate.events import Events
from kvstore.simulate.links import Links
from kvstore.simulate.shares import Demand, fair_shares

PROFILE = Profile("one", "test", PolynomialCurve((1.0,)), KvSize(1.0, 0.0), PolynomialCurve((1.0,)), 1, 1, 1000)


def links_of(*links: Link, events: Events, egress: dict[str, float] | None = None, **more: float) -> Links:
    names = {name for link in links for name in (link.source, link.target)}
    clusters = tuple(
        Cluster(name, PROFILE, 1, 1, (egress or {}).get(name), more.get(f"into_{name}")) for name in sorted(names)
    )
    return Links(Deployment(clusters, links), events)


def run(links: Links, events: Events, sent: list[tuple[float, str, str, float]]) -> dict[int, float]:
    """When each of (time, source, target, bytes) arrives."""
    arrived: dict[int, float] = {}

    def done(number: int) -> None:
        arrived[number] = events.now_s

    for number, (at_s, source, target, amount_bytes) in enumerate(sent):
        events.at(
            at_s,
            lambda which: links.send(which[1], which[2], which[3], done, which[0]),
            (number, source, target, amount_bytes),
        )
    events.run(inf)
    return arrived


def test_events_come_in_order_and_ties_as_they_were_asked_for() -> None:
    events, seen = Events(), []
    for name, at_s in (("c", 2.0), ("a", 1.0), ("b", 1.0)):
        events.at(at_s, seen.append, name)
    events.watch(5.0, seen.append, "nobody waits for it")
    events.run(inf)
    assert seen == ["a", "b", "c"]
    assert events.now_s == 2.0


def test_one_transfer_takes_its_bytes_and_a_round_trip() -> None:
    events = Events()
    links = links_of(Link("a", "b", 100.0, 0.5), events=events)
    assert run(links, events, [(1.0, "a", "b", 200.0)]) == {0: pytest.approx(3.5)}


def test_two_transfers_share_and_the_second_speeds_up() -> None:
    events = Events()
    links = links_of(Link("a", "b", 100.0), events=events)
    # Both get 50 until the short one is through at 2 s; the long one has 200 left then.
    arrived = run(links, events, [(0.0, "a", "b", 300.0), (0.0, "a", "b", 100.0)])
    assert arrived == {1: pytest.approx(2.0), 0: pytest.approx(4.0)}


def test_an_egress_limit_is_shared_over_links() -> None:
    events = Events()
    links = links_of(Link("a", "b", 100.0), Link("a", "c", 30.0), events=events, egress={"a": 80.0})
    # To c 30 at most; to b the rest, 50; alone, 80.
    arrived = run(links, events, [(0.0, "a", "b", 130.0), (0.0, "a", "c", 30.0)])
    assert arrived == {1: pytest.approx(1.0), 0: pytest.approx(2.0)}


def test_an_ingress_limit_joins_links_from_two_clusters() -> None:
    events = Events()
    links = links_of(Link("a", "c", 100.0), Link("b", "c", 100.0), events=events, into_c=100.0)
    arrived = run(links, events, [(0.0, "a", "c", 100.0), (0.0, "b", "c", 50.0)])
    assert arrived == {1: pytest.approx(1.0), 0: pytest.approx(1.5)}


def test_what_is_being_made_leaves_as_fast_as_it_is_made() -> None:
    events, arrived = Events(), []
    links = links_of(Link("a", "b", 100.0), events=events)
    flow = links.produce("a", "b", 100.0, 50.0, arrived.append, "made")
    run_free = run(links, events, [(0.0, "a", "b", 50.0)])
    assert run_free == {0: pytest.approx(1.0)}
    events.at(2.0, links.produced, flow)
    events.run(inf)
    assert arrived == ["made"]
    assert events.now_s == pytest.approx(2.0)


def test_what_a_slow_link_left_behind_goes_on_when_all_is_made() -> None:
    events, arrived = Events(), []
    links = links_of(Link("a", "b", 10.0), events=events)
    flow = links.produce("a", "b", 100.0, 50.0, arrived.append, "made")
    events.at(2.0, links.produced, flow)
    events.run(inf)
    assert arrived == ["made"]
    assert events.now_s == pytest.approx(10.0)


def test_what_is_still_to_be_made_is_coming_and_not_queued() -> None:
    events = Events()
    links = links_of(Link("a", "b", 100.0), Link("a", "c", 100.0), events=events)
    arrived: list[int] = []
    links.produce("a", "b", 1000.0, 50.0, arrived.append, 0)  # the link is faster than prefill
    links.produce("a", "c", 1000.0, 200.0, arrived.append, 1)  # and slower than this one
    seen: list[tuple[float, float]] = []

    def look(_: object) -> None:
        now_s = events.now_s
        seen.append((links.lines["a", "b"].queued_bytes(now_s), links.lines["a", "c"].queued_bytes(now_s)))
        assert links.lines["a", "b"].coming_bytes(now_s) == 1000.0 - 50.0 * now_s

    for at_s in (0.0, 2.0, 5.0, 8.0):
        events.at(at_s, look, None)
    events.run(9.0)
    assert seen == [(0.0, 0.0), (0.0, 200.0), (0.0, 500.0), (0.0, 200.0)]


def test_an_outage_stops_transfers_and_they_go_on_behind_it() -> None:
    events = Events()
    links = links_of(Link("a", "b", 100.0), events=events)
    events.at(0.5, lambda _: links.set_share("a", "b", 0.0))
    events.at(9.5, lambda _: links.set_share("a", "b", 0.5))
    assert run(links, events, [(0.0, "a", "b", 100.0)]) == {0: pytest.approx(10.5)}


def test_cross_traffic_and_loss_take_their_part() -> None:
    lossy = Link("a", "b", 1e9, 0.1, 1e-4)
    line = links_of(lossy, events=Events()).lines["a", "b"]
    assert line.bytes_per_s == loss_limited_bytes_per_s(lossy) < 1e9
    deployment = Deployment((Cluster("a", PROFILE, 1, 0), Cluster("b", PROFILE, 1, 1)), (Link("a", "b", 100.0),))
    assert Links(deployment, Events(), [("a", "b", 0.25)]).lines["a", "b"].bytes_per_s == 75.0
    with pytest.raises(SimulationError, match="'b' to 'a'"):
        Links(deployment, Events(), [("b", "a", 0.25)])


amounts = st.floats(1.0, 1e6)


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.lists(amounts, max_size=4), st.booleans(), st.booleans()),
        min_size=1,
        max_size=5,
    ),
    st.lists(amounts, min_size=7, max_size=7),
)
def test_shares_are_max_min_fair(flows: list[tuple[int, list[float], bool, bool]], capacities: list[float]) -> None:
    """Nothing exceeds its cap or a limit, and whoever is below the cap passes a full limit where nobody has more."""
    demands = [
        Demand(free, sorted(capped), (at, *([5] if first else []), *([6] if second else [])))
        for at, (free, capped, first, second) in enumerate(flows)
    ]
    shares = fair_shares(demands, capacities)
    rates = [[share.free] * demand.free + list(share.capped) for demand, share in zip(demands, shares, strict=True)]
    used = [sum(sum(rates[at]) for at, demand in enumerate(demands) if limit in demand.limits) for limit in range(7)]
    highest = [
        max((rate for at, demand in enumerate(demands) if limit in demand.limits for rate in rates[at]), default=0.0)
        for limit in range(7)
    ]
    for limit in range(7):
        assert used[limit] <= capacities[limit] * (1 + 1e-9)
    for demand, mine in zip(demands, rates, strict=True):
        for rate, cap in zip(mine, [inf] * demand.free + list(demand.capped), strict=True):
            assert rate <= cap
            if rate < cap:
                assert any(
                    math.isclose(used[limit], capacities[limit]) and rate >= highest[limit] * (1 - 1e-9)
                    for limit in demand.limits
                )


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.sampled_from(["ab", "ac", "bc"]), st.floats(0.5, 1e9)), min_size=1, max_size=30
    ),
    st.lists(st.tuples(st.floats(0, 20), st.sampled_from([0.0, 0.1, 1.0])), max_size=4),
)
def test_bytes_in_are_bytes_out(sent: list[tuple[float, str, float]], shares: list[tuple[float, float]]) -> None:
    events = Events()
    links = links_of(
        Link("a", "b", 1e6),
        Link("a", "c", 3e5, 0.1),
        Link("b", "c", 2e8),
        events=events,
        egress={"a": 1.1e6},
        into_c=1e8,
    )
    for at_s, share in shares:
        events.at(at_s, lambda value: links.set_share("a", "b", value), share)
    events.at(30.0, lambda _: links.set_share("a", "b", 1.0))
    arrived = run(links, events, [(at_s, pair[0], pair[1], amount) for at_s, pair, amount in sent])
    assert sorted(arrived) == list(range(len(sent)))
    for number, (at_s, pair, amount) in enumerate(sent):
        assert arrived[number] >= at_s + amount / links.lines[pair[0], pair[1]].link.bytes_per_s - 1e-6
    for (source, target), line in links.lines.items():
        total = sum(amount for _, pair, amount in sent if pair == source + target)
        assert line.delivered(events.now_s) == pytest.approx(total, rel=1e-6, abs=1e-2)
        assert line.accepted_bytes == pytest.approx(total)
        assert line.queued_bytes(events.now_s) == pytest.approx(0, abs=1e-2)
