"""The router's search against the plainest possible one, and cases worked by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.limits import ROUTING_SOURCES_MAX, ROUTING_STALE_S
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster
from kvstore.schedule.policies.search import FREE, Prices, Rules, best_route
from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, LinkState, RoutingRequest, Snapshot
from kvstore.schedule.prefill_service import PrefillServiceModel, ServiceKind
from kvstore.testing.routing import SETTINGS, deployments, requests, snapshots

if TYPE_CHECKING:
    from collections.abc import Iterator

PROFILE = Profile(
    "plain", "test", PolynomialCurve((0.0, 1e-4)), KvSize(1e6, 1e3), PolynomialCurve((0.02,)), 10, 8, 1 << 17
)


def state(name: str, prefill: int, decode: int, *, wait_s: float = 0.0, running: int = 0) -> ClusterState:
    return ClusterState(Cluster(name, PROFILE, prefill, decode), prefill, 0, wait_s, decode, running, 0, 0.02)


def link(source: str, target: str, *, rate: float = 1e8, queued_bytes: float = 0.0) -> LinkState:
    """Half of what is before others is still to be made."""
    return LinkState(source, target, rate, queued_bytes / 2, 0.0, 0.01, coming_bytes=queued_bytes / 2)


def snapshot(*clusters: ClusterState, links: tuple[LinkState, ...] = ()) -> Snapshot:
    return Snapshot(
        0.0, {each.cluster.name: each for each in clusters}, {(each.source, each.target): each for each in links}
    )


def scores(
    snapshot: Snapshot, request: RoutingRequest, rules: Rules, prices: Prices, stale_s: float
) -> Iterator[float]:
    """Every route's score, spelt out; prefixes of the fastest kind or of their own cluster."""
    usable = {
        name: each
        for name, each in snapshot.clusters.items()
        if each.age_s <= stale_s and (request.allowed is None or name in request.allowed)
    }
    links = {
        between: each
        for between, each in snapshot.links.items()
        if each.bytes_per_s > 0 and each.age_s <= stale_s and set(between) <= set(usable)
    }
    cached = {name: request.cached.get(name, CachedPrefix()) for name in usable}
    n = request.prompt_tokens
    depths = {
        name: each.resume_tokens
        for name, each in cached.items()
        if 0 < each.resume_tokens < n and usable[name].prefill_instances + usable[name].decode_instances > 0
    }
    sources = sorted((name for name in request.cached if name in depths), key=lambda name: -depths[name])
    for p, at in usable.items():
        if at.prefill_instances == 0 or (rules.prefill is not None and p not in rules.prefill):
            continue
        profile = at.cluster.profile
        beginnings = [(0, 0.0, 0.0)]
        if p in depths:
            own = (depths[p], cached[p].load_s, 0.0)
            beginnings = [own] if rules.prefixes == "own" else [*beginnings, own]
        if rules.prefixes == "fastest":
            for source in sources[:ROUTING_SOURCES_MAX]:
                between = (source, p)
                if between in links and between not in rules.not_over and depths[source] > depths.get(p, 0):
                    way = links[between]
                    crossing = profile.kv.missing_bytes(depths[source], cached[p].attention_tokens)
                    moving_s = way.round_trip_s + (way.queued_bytes + way.coming_bytes + crossing) / way.bytes_per_s
                    price = prices.link.get(between, 0.0) * crossing / way.bytes_per_s
                    beginnings.append((depths[source], cached[source].load_s + moving_s, price))
        for resume, before_s, begin_price in beginnings:
            begin_s = max(at.prefill_wait_s, before_s)
            prefill_s = snapshot.prefill_service.service(profile, n, resume).prefill_s
            for d, to in usable.items():
                if to.decode_instances == 0 or (p != d and (rules.is_local or (p, d) not in links)):
                    continue
                ready_s, price = begin_s + prefill_s, begin_price + prices.prefill.get(p, 0.0) * prefill_s
                if p != d:
                    way = links[p, d]
                    link_s = profile.kv.missing_bytes(n, cached[d].attention_tokens) / way.bytes_per_s
                    sent_s = max(begin_s, (way.queued_bytes + way.coming_bytes) / way.bytes_per_s) + link_s
                    if snapshot.prefill_service.kind == "chunked":
                        ready_s += profile.kv.resume_bytes(n) / way.bytes_per_s
                    ready_s = max(ready_s, sent_s) + way.round_trip_s
                    price += prices.link.get((p, d), 0.0) * link_s
                batch_max = to.cluster.profile.decode_batch_max
                places = to.decode_instances * batch_max
                held_s = request.output_tokens * to.cluster.profile.decode_step(batch_max)
                wait_s = max(to.decode_running + to.decode_waiting + to.decode_coming + 1 - places, 0) * held_s / places
                yield max(ready_s, wait_s) + price + prices.decode.get(d, 0.0) * held_s


@SETTINGS
@given(st.data())
def test_finds_what_trying_everything_finds(data: st.DataObject) -> None:
    deployment = data.draw(deployments())
    now, request = data.draw(snapshots(deployment)), data.draw(requests(deployment))
    now = replace(now, prefill_service=PrefillServiceModel(data.draw(st.sampled_from(get_args(ServiceKind)))))
    names = [each.name for each in deployment.clusters]
    pairs = [(each.source, each.target) for each in deployment.links]
    price = st.sampled_from([0.0, 0.1, 3.0])
    prices = Prices(
        {name: data.draw(price) for name in names},
        {between: data.draw(price) for between in pairs},
        {name: data.draw(price) for name in names},
    )
    rules = Rules(
        data.draw(st.none() | st.frozensets(st.sampled_from(names))),
        data.draw(st.booleans()),
        data.draw(st.sampled_from(["own", "fastest"])),
        data.draw(st.frozensets(st.sampled_from(pairs))),
    )
    stale_s = data.draw(st.sampled_from([ROUTING_STALE_S, inf]))
    every = list(scores(now, request, rules, prices, stale_s))
    brief = best_route(now, request, rules, prices, stale_s=stale_s)
    assert best_route(now, request, rules, prices, [], stale_s) == brief, "looking at everything finds the same"
    assert (brief is None) == (not every)
    if brief is not None:
        assert brief.score == pytest.approx(min(every))
        assert brief.score == pytest.approx(brief.route().estimate.ttft_s + brief.price)


def test_layers_leave_while_later_ones_compute() -> None:
    now = snapshot(state("a", 1, 0), state("b", 0, 1), links=(link("a", "b"),))
    best = best_route(now, RoutingRequest(10_000, 100, {}), Rules())
    assert best is not None
    assert best.prefill_s == pytest.approx(1.0)
    assert best.handover_bytes == 11e6  # 0.11 s of the link, within the 1 s of prefill
    assert best.transfer_s == pytest.approx(0.01)
    slow = replace(now, links={("a", "b"): link("a", "b", rate=5e6)})
    best = best_route(slow, RoutingRequest(10_000, 100, {}), Rules())
    assert best is not None
    assert best.transfer_s == pytest.approx(2.2 - 1.0 + 0.01)


def test_only_missing_attention_and_whole_states_cross() -> None:
    now = snapshot(state("a", 1, 0), state("b", 0, 1), links=(link("a", "b"), link("b", "a")))
    request = RoutingRequest(10_000, 100, {"b": CachedPrefix(4000, 6000)})
    best = best_route(now, request, Rules(prefixes="fastest"))
    assert best is not None
    assert (best.resume_tokens, best.prefix_from) == (4000, "b")
    assert best.prefix_bytes == 1e6 + 4000 * 1e3
    assert best.handover_bytes == 1e6 + 4000 * 1e3


def test_computes_again_where_that_is_faster_than_loading_or_moving() -> None:
    alone = snapshot(state("a", 1, 1))
    for load_s, resumed in ((0.1, 4000), (0.5, 0)):
        request = RoutingRequest(10_000, 100, {"a": CachedPrefix(4000, 4000, load_s, "ssd")})
        best = best_route(alone, request, Rules(prefixes="fastest"))
        assert best is not None
        assert best.resume_tokens == resumed
    for rate, source in ((1e9, "b"), (1e6, None)):
        joined = snapshot(state("a", 1, 1), state("b", 0, 1), links=(link("b", "a", rate=rate),))
        best = best_route(
            joined, RoutingRequest(10_000, 100, {"b": CachedPrefix(4000, 4000)}), Rules(prefixes="fastest")
        )
        assert best is not None
        assert best.prefix_from == source


def test_a_prefix_of_the_whole_prompt_is_no_place_to_begin() -> None:
    best = best_route(snapshot(state("a", 1, 1)), RoutingRequest(512, 10, {"a": CachedPrefix(512, 512)}), Rules())
    assert best is not None
    assert best.resume_tokens == 0


def test_a_price_turns_a_request_away_from_what_is_scarce() -> None:
    now = snapshot(state("a", 1, 1), state("b", 1, 1, wait_s=0.5))
    request = RoutingRequest(10_000, 10, {})
    free, priced = best_route(now, request, Rules(), FREE), best_route(now, request, Rules(), Prices({"a": 1.0}))
    assert free is not None
    assert priced is not None
    assert (free.prefill, priced.prefill) == ("a", "b")
