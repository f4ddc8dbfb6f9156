"""Routing by estimated time to first token plus what a request makes others wait, priced from what is observed.

A second of work delays whoever comes before the queue is empty again. With a share b of the time in which nothing is
idle those are about b / (1 - b) requests (M/M/1: the number in the system), so that is the price of a second. While
there is room prices are near 0, and the router takes the earliest first token. As load grows, what counts is who needs
least of what is scarce: a threshold between long and short prompts comes out of it where the profiles differ by length,
and nobody sets it. Prices lag behind, and a lagging price that grows without bound makes load swing from one cluster to
another; they stop at b = 0.8. Beyond, the queues themselves, which are in the estimate without a lag, keep the balance.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, isfinite
from typing import TYPE_CHECKING, TypeVar

from kvstore.errors import PlanError
from kvstore.schedule.policies.explain import decide
from kvstore.schedule.policies.policy import Decision, RoutingPolicy
from kvstore.schedule.policies.search import FREE, Prices, Rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Slo
    from kvstore.schedule.policies.search import LinkName
    from kvstore.schedule.policies.snapshot import ClusterState, RoutingRequest, Snapshot

_RULES = Rules(prefixes="fastest")
_BUSY_SHARE_MAX = 0.8

NameT = TypeVar("NameT")


@dataclass(frozen=True, slots=True)
class AdaptiveMemory:
    """What the adaptive router has seen.

    Attributes:
        at_s: of the last observation; None before the first.
        prefill, decode: by cluster, the share of time in which no instance, or no place, was idle.
        link: by link, the share of what it could carry that was used.
        prices: that follow from these.
    """

    at_s: float | None = None
    prefill: Mapping[str, float] = field(default_factory=dict)
    decode: Mapping[str, float] = field(default_factory=dict)
    link: Mapping[LinkName, float] = field(default_factory=dict)
    prices: Prices = FREE


class AdaptiveRouting(RoutingPolicy[AdaptiveMemory]):
    """The route with the least sum of its own and others' seconds.

    Args:
        slo: batches slower than its time per output token make places in them dearer.
        memory_s: time constant of what is remembered.
        price_scale: of others' seconds against one's own; 0 takes the earliest first token whatever it costs.

    Raises:
        PlanError: a number is out of its limits.
    """

    name = "adaptive"

    def __init__(self, slo: Slo, memory_s: float = 60.0, price_scale: float = 1.0) -> None:
        if not (isfinite(memory_s) and memory_s > 0):
            raise PlanError(f"memory_s={memory_s} must be finite and positive")
        if not (isfinite(price_scale) and price_scale >= 0):
            raise PlanError(f"price_scale={price_scale} must be finite and not negative")
        self._slo = slo
        self._memory_s = memory_s
        self._price_scale = price_scale

    def begin(self) -> AdaptiveMemory:
        return AdaptiveMemory()

    def observe(self, memory: AdaptiveMemory, snapshot: Snapshot) -> AdaptiveMemory:
        passed_s = 0.0 if memory.at_s is None else max(snapshot.now_s - memory.at_s, 0.0)
        weight = 1 - exp(-passed_s / self._memory_s)
        clusters = snapshot.clusters
        prefill = _smoothed(
            memory.prefill,
            {name: float(each.prefill_wait_s > 0) for name, each in clusters.items() if each.prefill_instances > 0},
            weight,
        )
        decode = _smoothed(
            memory.decode,
            {name: float(_is_full(each)) for name, each in clusters.items() if each.decode_instances > 0},
            weight,
        )
        link = _smoothed(
            memory.link, {name: min(each.used_share, 1.0) for name, each in snapshot.links.items()}, weight
        )
        prices = Prices(
            {name: self._price(share) for name, share in prefill.items()},
            {name: self._price(share) for name, share in link.items()},
            {name: self._price(share) + self._late_share(clusters[name]) for name, share in decode.items()},
        )
        return AdaptiveMemory(snapshot.now_s, prefill, decode, link, prices)

    def numbers(self, memory: AdaptiveMemory) -> Mapping[str, float]:
        prices = memory.prices
        found = {f"prefill_price[{name}]": value for name, value in prices.prefill.items()}
        found |= {f"decode_price[{name}]": value for name, value in prices.decode.items()}
        return found | {f"link_price[{source}, {target}]": value for (source, target), value in prices.link.items()}

    def route(self, memory: AdaptiveMemory, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        return decide(
            self.name, _CHOICES, snapshot, request, memory.prices, lambda: tuple(self.numbers(memory).items())
        )

    def _price(self, busy_share: float) -> float:
        return self._price_scale * busy_share / (1 - min(busy_share, _BUSY_SHARE_MAX))

    def _late_share(self, state: ClusterState) -> float:
        """What a batch's requests are late, as a share of the time that they hold their places."""
        return max(state.tpot_s / self._slo.tpot_s - 1, 0.0)


_CHOICES = (("least seconds until the first token and of others' waiting", _RULES),)


def _is_full(state: ClusterState) -> bool:
    places = state.decode_instances * state.cluster.profile.decode_batch_max
    return state.decode_running + state.decode_waiting >= places


def _smoothed(before: Mapping[NameT, float], values: Mapping[NameT, float], weight: float) -> dict[NameT, float]:
    """Moved towards the values; what is new begins at 0, what is gone is forgotten."""
    found = {}
    for name, value in values.items():
        old = before.get(name, 0.0)
        found[name] = old + weight * (value - old)
    return found
