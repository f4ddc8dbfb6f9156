"""From a scenario to its result."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from kvstore.errors import SimulationError
from kvstore.schedule.policies.admit import AdmissionPolicy
from kvstore.schedule.policies.convert import ConversionPolicy
from kvstore.schedule.policies.table import routing_policy
from kvstore.simulate.cache import ClusterCache
from kvstore.simulate.engine import Simulation
from kvstore.workload.sources import requests_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.scenario import Scenario
    from kvstore.schedule.planning.plan import Plan
    from kvstore.schedule.policies.policy import RoutingPolicy
    from kvstore.simulate.result import SimulationResult

ADMISSION_SETTINGS = ("slack",)
CONVERSION_SETTINGS = tuple(each.name for each in fields(ConversionPolicy) if each.name != "deployment")


def simulate(scenario: Scenario, *, progress: Callable[[float], None] | None = None) -> SimulationResult:
    """Simulate a scenario. Equal scenarios give equal results, but for `wall_s`.

    Settings of the scenario's policy that begin with `admission` or `conversion` are not the router's: `admission = 1`
    turns requests away that would miss the limits (`admission_slack`), `conversion = 1`
    converts instances of clusters that are `convertible` and, with the policy `threshold`, moves its threshold
    (`conversion_window_s`, `conversion_review_s`, `conversion_headroom`, `conversion_band`).

    Args:
        progress: told the time of the simulation now and then.

    Raises:
        SimulationError: the workload, a fault, cross traffic or a setting is not one.
        PlanError: the policy or one of its settings is unknown or out of its limits.
        DeploymentError: the deployment lacks what the policy needs.
        TraceError: a trace cannot be read.
    """
    settings = dict(scenario.policy.settings)
    admission = _switched(settings, "admission", ADMISSION_SETTINGS)
    conversion = _switched(settings, "conversion", CONVERSION_SETTINGS)

    def retuned(plan: Plan) -> RoutingPolicy[Any] | None:
        if scenario.policy.name != "threshold" or len(plan.thresholds) != 1:
            return None
        tuned = {**settings, "threshold_tokens": plan.thresholds[0]}
        return routing_policy(scenario.policy.name, tuned, scenario.deployment, scenario.slo)

    caches = {
        cluster.name: ClusterCache(cluster, scenario.block_tokens)
        for cluster in scenario.deployment.clusters
        if cluster.cache.dram_bytes > 0 or cluster.cache.ssd_bytes > 0
    }
    return Simulation(
        scenario,
        requests_of(scenario.workload, block_tokens=scenario.block_tokens, seed=scenario.seed),
        routing_policy(scenario.policy.name, settings, scenario.deployment, scenario.slo),
        caches,
        admission=None if admission is None else AdmissionPolicy(scenario.slo, "predicted", **admission),
        conversion=None if conversion is None else ConversionPolicy(scenario.deployment, **conversion),
        retuned=retuned,
        progress=progress,
    ).run()


def _switched(settings: dict[str, float], switch: str, names: tuple[str, ...]) -> dict[str, float] | None:
    """Take the settings of one part out; None where it is switched off."""
    found = {key: settings.pop(key) for key in list(settings) if key == switch or key.startswith(f"{switch}_")}
    is_on = found.pop(switch, 0.0)
    known = {f"{switch}_{name}": name for name in names}
    unknown = sorted(set(found) - set(known))
    if unknown or is_on not in (0.0, 1.0):
        raise SimulationError(
            f"the policy's setting {unknown[0] if unknown else f'{switch} = {is_on:g}'} is none; there are {switch} "
            f"(0 or 1), {', '.join(known)}"
        )
    if found and not is_on:
        raise SimulationError(f"the policy has a setting {min(found)}, and {switch} is off; add {switch} = 1")
    return {known[key]: value for key, value in found.items()} if is_on else None
