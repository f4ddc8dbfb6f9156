"""Routing by estimated time to first token plus what a request makes others wait, priced from what is observed.

A second of work delays whoever comes before the queue is empty again. With a share b of the time in which nothing is
idle those are about b / (1 - b) requests (M/M/1: the number in the system), so that is the price of a second. While
there is room prices are near 0, and the router takes the earliest first token. As load grows, what counts is who needs
least of what is scarce: a threshold between long and short prompts comes out of it where the profiles differ by length,
and nobody sets it. Prices lag behind, and a lagging price that grows without bound makes load swing from one cluster to
another; they stop at b = 0.8. Beyond, the queues themselves, which are in the estimate without a lag, keep the balance.

Links and places in batches are priced by `kvstore.schedule.policies.coefficients`, which may price prefill too: by the
elasticity of its latency, up to the same bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import exp, isfinite
from typing import TYPE_CHECKING

from kvstore.errors import PlanError
from kvstore.schedule.policies.coefficients import PricingMemory, PricingPolicy
from kvstore.schedule.policies.explain import decide
from kvstore.schedule.policies.policy import Decision, RoutingPolicy
from kvstore.schedule.policies.search import FREE, Prices, Rules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Slo
    from kvstore.schedule.policies.snapshot import ClusterState, RoutingRequest, Snapshot

_CHOICES = (("least seconds until the first token and of others' waiting", Rules(prefixes="fastest")),)
_BUSY_SHARE_MAX = 0.8
_PRICE_MAX = 4.0
"""Of a second of anything: the price at that share."""


@dataclass(frozen=True, slots=True)
class AdaptiveMemory:
    """What the adaptive router has seen.

    Attributes:
        busy_shares: by cluster, of the time, with no idle prefill instance.
        pricing: what the coefficients follow from.
        prices: that follow from both.
    """

    busy_shares: Mapping[str, float] = field(default_factory=dict)
    pricing: PricingMemory = field(default_factory=PricingMemory)
    prices: Prices = FREE


class AdaptiveRouting(RoutingPolicy[AdaptiveMemory]):
    """The route with the least sum of its own and others' seconds.

    Args:
        slo: batches slower than its time per output token make places in them dearer.
        memory_s: time constant of what is remembered.
        price_scale: of others' seconds against one's own; 0 takes the earliest first token whatever it costs.
        by_elasticity: whether prefill is priced by how its latency answers to load, as the knee's detector measures
            it, rather than by its busy share.

    Raises:
        PlanError: a number is out of its limits.
    """

    name = "adaptive"

    def __init__(
        self, slo: Slo, memory_s: float = 60.0, price_scale: float = 1.0, *, by_elasticity: bool = False
    ) -> None:
        if not (isfinite(memory_s) and memory_s > 0):
            raise PlanError(f"memory_s={memory_s} must be finite and positive")
        if not (isfinite(price_scale) and price_scale >= 0):
            raise PlanError(f"price_scale={price_scale} must be finite and not negative")
        self._slo = slo
        self._memory_s = memory_s
        self._price_scale = price_scale
        self._by_elasticity = by_elasticity
        self._pricing = PricingPolicy(smoothing_s=memory_s)

    def begin(self) -> AdaptiveMemory:
        return AdaptiveMemory(pricing=self._pricing.begin())

    def observe(self, memory: AdaptiveMemory, snapshot: Snapshot) -> AdaptiveMemory:
        before_s = memory.pricing.observed_s
        fresh = 0.0 if before_s is None else 1 - exp(-max(snapshot.now_s - before_s, 0.0) / self._memory_s)
        shares = {}
        for name, state in snapshot.clusters.items():
            if state.prefill_instances > 0:
                share = memory.busy_shares.get(name, 0.0)
                shares[name] = share + fresh * (float(state.prefill_wait_s > 0) - share)
        pricing = self._pricing.observe(memory.pricing, snapshot)
        found, scale = pricing.coefficients, self._price_scale
        if self._by_elasticity:
            prefill = {name: scale * min(found.pressure[name].elasticity, _PRICE_MAX) for name in shares}
        else:
            prefill = {name: scale * _price(min(share, _BUSY_SHARE_MAX)) for name, share in shares.items()}
        prices = Prices(
            prefill,
            {between: scale * min(price, _PRICE_MAX) for between, price in found.link.items()},
            {
                name: scale * min(price + self._late_share(snapshot.clusters[name]), _PRICE_MAX)
                for name, price in found.decode.items()
            },
        )
        return AdaptiveMemory(shares, pricing, prices)

    def numbers(self, memory: AdaptiveMemory) -> Mapping[str, float]:
        prices = memory.prices
        found = {f"prefill_price[{name}]": value for name, value in prices.prefill.items()}
        found |= {f"decode_price[{name}]": value for name, value in prices.decode.items()}
        found |= {
            f"beyond_knee[{name}]": float(each.regime == "beyond")
            for name, each in memory.pricing.coefficients.pressure.items()
        }
        return found | {f"link_price[{source}, {target}]": value for (source, target), value in prices.link.items()}

    def route(self, memory: AdaptiveMemory, snapshot: Snapshot, request: RoutingRequest) -> Decision:
        return decide(
            self.name, _CHOICES, snapshot, request, memory.prices, lambda: tuple(self.numbers(memory).items())
        )

    def _late_share(self, state: ClusterState) -> float:
        """What a batch's requests are late, as a share of the time that they hold their places."""
        return max(state.tpot_s / self._slo.tpot_s - 1, 0.0)


def _price(busy_share: float) -> float:
    return busy_share / (1 - busy_share)
