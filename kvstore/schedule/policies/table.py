"""Routing policies by name, with their settings by name."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvstore.errors import PlanError
from kvstore.schedule.policies.adaptive import AdaptiveRouting
from kvstore.schedule.policies.baselines import LeastLoadedRouting, LocalRouting, NaiveRouting, RandomRouting
from kvstore.schedule.policies.mode import Band
from kvstore.schedule.policies.threshold import ThresholdRouting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Deployment, Slo
    from kvstore.schedule.policies.policy import RoutingPolicy

_BAND = tuple(each.name for each in fields(Band))
ROUTING_SETTINGS: Mapping[str, tuple[str, ...]] = {
    "adaptive": ("memory_s", "price_scale", "by_elasticity"),
    "threshold": ("threshold_tokens", *_BAND),
    "local": (),
    "naive": (),
    "least-loaded": (),
    "random": (),
}
"""Names of policies, and the settings that each takes."""


def routing_policy(
    choice_name: str, settings: Mapping[str, float], deployment: Deployment, slo: Slo
) -> RoutingPolicy[Any]:
    """The policy of a name.

    Args:
        settings: those in `ROUTING_SETTINGS`; `threshold_tokens` is required, the others have defaults.

    Raises:
        PlanError: the name or a setting is unknown, missing, or out of its limits; the message names what there is.
        DeploymentError: the deployment lacks what the policy needs.
    """
    known = ROUTING_SETTINGS.get(choice_name)
    if known is None:
        raise PlanError(f"there is no routing policy {choice_name!r}; there are {', '.join(ROUTING_SETTINGS)}")
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise PlanError(
            f"the routing policy {choice_name!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}"
        )
    match choice_name:
        case "adaptive":
            numbers = {name: value for name, value in settings.items() if name != "by_elasticity"}
            return AdaptiveRouting(slo, **numbers, by_elasticity=bool(settings.get("by_elasticity", 0.0)))
        case "threshold":
            if "threshold_tokens" not in settings:
                raise PlanError("the routing policy 'threshold' needs threshold_tokens; `kvstore plan` computes it")
            band = Band(**{name: value for name, value in settings.items() if name in _BAND})
            return ThresholdRouting(deployment, settings["threshold_tokens"], band)
        case "local":
            return LocalRouting()
        case "naive":
            return NaiveRouting(deployment)
        case "least-loaded":
            return LeastLoadedRouting()
        case _:
            return RandomRouting()
