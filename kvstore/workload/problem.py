"""What the planner is asked about a scenario."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.workload.traffic import traffic_of

if TYPE_CHECKING:
    from kvstore.scenario import Scenario
    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.plan import Traffic


@dataclass(frozen=True)
class PlanningProblem:
    """A deployment and what comes to it.

    Attributes:
        deployment: with what cross traffic leaves of the links.
        is_cached: whether the traffic's lengths are those that an unlimited common cache would not have.
    """

    deployment: Deployment
    traffic: Traffic
    is_cached: bool


def problem_of(scenario: Scenario) -> PlanningProblem:
    """Of this scenario.

    Raises:
        SimulationError: a setting of the workload is missing or out of its limits, or there is no request.
        TraceError: a trace cannot be read.
    """
    taken = {(source, target): share for source, target, share in scenario.cross_traffic}
    links = tuple(
        replace(link, bytes_per_s=link.bytes_per_s * (1 - taken.get((link.source, link.target), 0.0)))
        for link in scenario.deployment.links
    )
    deployment = replace(scenario.deployment, links=links)
    is_cached = any(each.cache.dram_bytes + each.cache.ssd_bytes > 0 for each in deployment.clusters)
    traffic = traffic_of(scenario.workload, block_tokens=scenario.block_tokens, seed=scenario.seed, is_cached=is_cached)
    return PlanningProblem(deployment, traffic, is_cached)
