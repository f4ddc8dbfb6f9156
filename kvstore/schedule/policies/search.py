"""The best of all routes that a request may take: what is possible, how long it takes, and what it costs others.

Every routing policy looks here, and differs in what it permits (`Rules`) and in what it charges (`Prices`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from operator import itemgetter
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from kvstore.limits import ROUTING_SOURCES_MAX, ROUTING_STALE_S
from kvstore.schedule.policies.policy import Estimate, Route

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.profile import Profile
    from kvstore.schedule.policies.snapshot import CachedPrefix, ClusterState, RoutingRequest, Snapshot
    from kvstore.schedule.prefill_service import PrefillServiceModel

LinkName: TypeAlias = tuple[str, str]
"""Source and target."""
Prefixes: TypeAlias = Literal["own", "deepest", "fastest"]
"""Which cached prefix a route begins at: what the prefilling cluster has; the deepest that any cluster has and can
send; whichever is fastest, none at all included (computing may be faster than loading)."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a policy permits.

    Attributes:
        prefill: clusters that may prefill; None for all.
        is_local: whether a request decodes where it was prefilled.
        not_over: links that prefixes are not moved over.
    """

    prefill: frozenset[str] | None = None
    is_local: bool = False
    prefixes: Prefixes = "own"
    not_over: frozenset[LinkName] = frozenset()


@dataclass(frozen=True, slots=True)
class Prices:
    """Seconds that others are made to wait for each second that a request takes of something; a missing one is free.

    Attributes:
        prefill: by cluster, for a second of one instance.
        link: by link, for a second of all it carries.
        decode: by cluster, for a second of one place in a batch.
    """

    prefill: Mapping[str, float] = field(default_factory=dict)
    link: Mapping[LinkName, float] = field(default_factory=dict)
    decode: Mapping[str, float] = field(default_factory=dict)


FREE = Prices()


class Candidate(NamedTuple):
    """A route in the form that is cheap to make.

    Attributes:
        score: seconds until the first token, and what others wait because of it.
        price: the second of these two.
    """

    score: float
    price: float
    prefill: str
    decode: str
    resume_tokens: int
    prefix_from: str | None
    prefix_bytes: float
    handover_bytes: float
    load_s: float
    prefix_s: float
    queue_s: float
    prefill_s: float
    transfer_s: float
    decode_wait_s: float

    def route(self) -> Route:
        return Route(*self[2:8], Estimate(*self[8:]))


def best_route(
    snapshot: Snapshot,
    request: RoutingRequest,
    rules: Rules,
    prices: Prices = FREE,
    considered: list[Candidate] | None = None,
    stale_s: float = ROUTING_STALE_S,
) -> Candidate | None:
    """The candidate with the lowest score; None where there is no way at all.

    Args:
        considered: takes every candidate; without it, those that cannot win are not looked at.
        stale_s: clusters and links that nothing was heard of for longer are left out.
    """
    tokens, cached = request.prompt_tokens, request.cached
    permitted, prefill_prices = rules.prefill, prices.prefill
    decoders = _decoders(snapshot, request, prices, stale_s)
    sources = _sources(snapshot, request, stale_s) if rules.prefixes != "own" else []
    allowed = request.allowed
    if not decoders:
        return None
    deepest_tokens = sources[0][0] if sources else 0
    first_place_s = min(each[1] for each in decoders)
    least_place_price = min(each[2] for each in decoders)
    costs: dict[int, _PromptCost] = {}
    heads = []
    for name, state in snapshot.clusters.items():
        if (
            state.prefill_instances > 0
            and state.age_s <= stale_s
            and (allowed is None or name in allowed)
            and (permitted is None or name in permitted)
        ):
            profile = state.cluster.profile
            cost = costs.get(id(profile))
            if cost is None:
                cost = costs[id(profile)] = _PromptCost(profile, tokens, snapshot.prefill_service)
            own = cached.get(name)
            own_tokens = own.resume_tokens if own is not None and own.resume_tokens < tokens else 0
            # Nobody computes less than what is missing behind the deepest prefix.
            least_s = cost.least_s(own_tokens if own_tokens > deepest_tokens else deepest_tokens)
            prefill_price = prefill_prices.get(name, 0.0)
            least_score = state.prefill_wait_s + least_s
            if least_score < first_place_s:
                least_score = first_place_s
            least_price = least_s * prefill_price + least_place_price
            heads.append((least_score + least_price, name, state, cost, prefill_price, least_s + least_price))
    heads.sort(key=itemgetter(0))
    is_brief = considered is None
    best: Candidate | None = None
    best_score = inf
    for least_score, name, state, cost, prefill_price, behind_prefix in heads:
        if least_score >= best_score and is_brief:
            break
        wait_s = state.prefill_wait_s
        limit_s = best_score - behind_prefix if is_brief else inf
        options = []
        for beginning in _beginnings(name, snapshot, request, rules, prices, sources, stale_s, limit_s):
            # Its place in the queue is kept while its prefix comes.
            begin_s = beginning[2] + beginning[3]
            if begin_s < wait_s:
                begin_s = wait_s
            prefill_s = cost.prefill_s(beginning[0])
            price = beginning[5] + prefill_price * prefill_s
            ready_s = begin_s + prefill_s
            least_score = (ready_s if ready_s > first_place_s else first_place_s) + price + least_place_price
            options.append((least_score, begin_s, prefill_s, price, beginning))
        options.sort(key=itemgetter(0))
        targets: list[_Target] | None = None
        for least_score, begin_s, prefill_s, price, beginning in options:
            if least_score >= best_score and is_brief:
                break
            if targets is None:
                targets = _targets(name, snapshot, request, rules, prices, decoders, stale_s, cost)
            ready_s = begin_s + prefill_s
            for least, place_s, target_price, target, handover_bytes, link_s, drained_s, held_s, way_s in targets:
                all_price = price + target_price
                if (least + price >= best_score or ready_s + way_s + all_price >= best_score) and is_brief:
                    continue
                # Layers leave while later ones compute: sending begins with prefill, and ends no earlier.
                sent_s = (begin_s if begin_s > drained_s else drained_s) + link_s
                held_s += ready_s
                end_s = (held_s if held_s > sent_s else sent_s) + way_s
                first_s = end_s if end_s > place_s else place_s
                score = first_s + all_price
                if score < best_score or not is_brief:
                    resume_tokens, source, load_s, prefix_s, prefix_bytes, _ = beginning
                    candidate = Candidate(
                        score,
                        all_price,
                        name,
                        target,
                        resume_tokens,
                        source,
                        prefix_bytes,
                        handover_bytes,
                        load_s,
                        prefix_s,
                        max(begin_s - load_s - prefix_s, 0.0),
                        prefill_s,
                        end_s - ready_s,
                        first_s - end_s,
                    )
                    if considered is not None:
                        considered.append(candidate)
                    if score < best_score:
                        best, best_score = candidate, score
    return best


def reachable_tokens(name: str, snapshot: Snapshot, request: RoutingRequest, rules: Rules) -> int:
    """The deepest length that prefill in this cluster can begin at; 0 where it does not prefill at all."""
    state = snapshot.clusters.get(name)
    if state is None or state.prefill_instances <= 0 or (request.allowed is not None and name not in request.allowed):
        return 0
    sources = _sources(snapshot, request, ROUTING_STALE_S) if rules.prefixes != "own" else []
    return max(each[0] for each in _beginnings(name, snapshot, request, rules, FREE, sources, ROUTING_STALE_S, inf))


class _PromptCost:
    """What this prompt costs under one profile.

    Attributes:
        held_bytes: that are final only when prefill ends.
    """

    __slots__ = ("_known_s", "_profile", "_service", "_tokens", "held_bytes", "state_bytes", "token_bytes")

    def __init__(self, profile: Profile, tokens: int, service: PrefillServiceModel) -> None:
        self._profile = profile
        self._tokens = tokens
        # Nothing else decodes on an instance that prefills, so groups of layers take as long as the whole.
        self._service = service if service.kind == "chunked" else None
        self._known_s: dict[int, float] = {}
        self.state_bytes = profile.kv.resume_bytes(tokens)
        self.token_bytes = profile.kv.token_bytes
        self.held_bytes = self.state_bytes if self._service is not None else 0.0

    def least_s(self, resume_tokens: int) -> float:
        """In one piece; cutting it makes nothing faster."""
        if self._service is not None:
            return self._profile.prefill_s(self._tokens, resume_tokens)
        return self.prefill_s(resume_tokens)

    def prefill_s(self, resume_tokens: int) -> float:
        known_s = self._known_s.get(resume_tokens)
        if known_s is None:
            if self._service is None:
                known_s = self._profile.prefill_s(self._tokens, resume_tokens)
            else:
                known_s = self._service.service(self._profile, self._tokens, resume_tokens).prefill_s
            self._known_s[resume_tokens] = known_s
        return known_s


def _decoders(
    snapshot: Snapshot, request: RoutingRequest, prices: Prices, stale_s: float
) -> list[tuple[float, float, float, str, int]]:
    """Least score, seconds until a place is free, its price, name, attention that is there; the best first.

    As many requests as fit are at their places for `output_tokens` steps of a full batch each, so that places come
    free at an even pace.
    """
    found = []
    allowed, cached = request.allowed, request.cached
    for name, state in snapshot.clusters.items():
        if state.decode_instances <= 0 or state.age_s > stale_s or not (allowed is None or name in allowed):
            continue
        profile = state.cluster.profile
        places = state.decode_instances * profile.decode_batch_max
        before = state.decode_running + state.decode_waiting + state.decode_coming + 1 - places
        price = prices.decode.get(name, 0.0)
        place_s = place_price = 0.0
        if before > 0 or price > 0:
            held_s = request.output_tokens * profile.decode_step(profile.decode_batch_max)
            place_price = price * held_s
            if before > 0:
                place_s = before * held_s / places
        prefix = cached.get(name)
        found.append((place_s + place_price, place_s, place_price, name, prefix.attention_tokens if prefix else 0))
    found.sort(key=itemgetter(0))
    return found


_Target: TypeAlias = tuple[float, float, float, str, float, float, float, float, float]
"""Least score, seconds until a place is free, price of link and place, name, bytes of the hand-over, seconds of the
link for them, until it is free, and for those of them that prefill holds back to its end, and a round trip."""


def _targets(
    name: str,
    snapshot: Snapshot,
    request: RoutingRequest,
    rules: Rules,
    prices: Prices,
    decoders: list[tuple[float, float, float, str, int]],
    stale_s: float,
    cost: _PromptCost,
) -> list[_Target]:
    """Where a prompt that is prefilled in a cluster can be decoded, the best first."""
    links, tokens, found = snapshot.links, request.prompt_tokens, []
    for least, place_s, place_price, target, attention_tokens in decoders:
        if target == name:
            found.append((least, place_s, place_price, target, 0.0, 0.0, 0.0, 0.0, 0.0))
        elif not rules.is_local:
            between = (name, target)
            link = links.get(between)
            if link is None or link.bytes_per_s <= 0 or link.age_s > stale_s:
                continue
            handover_bytes = cost.state_bytes
            if attention_tokens < tokens:
                handover_bytes += cost.token_bytes * (tokens - attention_tokens)
            link_s = handover_bytes / link.bytes_per_s
            price = place_price + prices.link.get(between, 0.0) * link_s
            drained_s = (link.queued_bytes + link.coming_bytes) / link.bytes_per_s
            held_s = cost.held_bytes / link.bytes_per_s
            found.append(
                (place_s + price, place_s, price, target, handover_bytes, link_s, drained_s, held_s, link.round_trip_s)
            )
    return found


def _sources(snapshot: Snapshot, request: RoutingRequest, stale_s: float) -> list[tuple[int, str, CachedPrefix]]:
    """Clusters that a prefix could be moved from, the deepest first."""
    tokens, allowed, clusters = request.prompt_tokens, request.allowed, snapshot.clusters
    found = []
    for name, prefix in request.cached.items():
        if 0 < prefix.resume_tokens < tokens and (allowed is None or name in allowed):
            state = clusters.get(name)
            if state is not None and _works(state) and state.age_s <= stale_s:
                found.append((prefix.resume_tokens, name, prefix))
    found.sort(key=itemgetter(0), reverse=True)
    return found[:ROUTING_SOURCES_MAX]


def _works(state: ClusterState) -> bool:
    """Whether anything of the cluster does; its cache is taken to be gone with the last instance."""
    return state.prefill_instances > 0 or state.decode_instances > 0


_Beginning: TypeAlias = tuple[int, str | None, float, float, float, float]
"""Resume tokens, moved from, seconds of loading and of moving, bytes that move, and their price."""
_FROM_NOTHING: _Beginning = (0, None, 0.0, 0.0, 0.0, 0.0)


def _beginnings(
    name: str,
    snapshot: Snapshot,
    request: RoutingRequest,
    rules: Rules,
    prices: Prices,
    sources: list[tuple[int, str, CachedPrefix]],
    stale_s: float,
    limit_s: float,
) -> list[_Beginning]:
    """Where prefill in a cluster can begin; what takes `limit_s` to bring there may be left out."""
    own = request.cached.get(name)
    found: list[_Beginning] = []
    own_tokens = own_attention = 0
    if own is not None:
        own_attention = own.attention_tokens
        if 0 < own.resume_tokens < request.prompt_tokens:  # one token at least is left to compute
            own_tokens = own.resume_tokens
            found.append((own_tokens, None, own.load_s, 0.0, 0.0, 0.0))
    for tokens, source, prefix in sources:
        if tokens <= own_tokens:
            break
        link = snapshot.links.get((source, name))
        if link is None or link.bytes_per_s <= 0 or link.age_s > stale_s or (source, name) in rules.not_over:
            continue
        size = snapshot.clusters[source].cluster.profile.kv
        prefix_bytes = size.missing_bytes(tokens, own_attention)
        link_s = prefix_bytes / link.bytes_per_s
        prefix_s = link.round_trip_s + (link.queued_bytes + link.coming_bytes) / link.bytes_per_s + link_s
        if prefix_s >= limit_s and rules.prefixes == "fastest":
            continue
        price = prices.link.get((source, name), 0.0) * link_s
        moved = (tokens, source, prefix.load_s, prefix_s, prefix_bytes, price)
        if rules.prefixes == "deepest":
            return [moved]
        found.append(moved)
    if rules.prefixes == "fastest" or not found:
        found.append(_FROM_NOTHING)
    return found
