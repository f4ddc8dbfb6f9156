"""A deployment, its traffic and what happens to it: the values and the TOML file that `plan` and `simulate` take."""

from kvstore.scenario.reading import read_scenario, scenario_names, scenario_of, scenario_table
from kvstore.scenario.scenario import Arrivals, LinkFault, NodeFault, PolicyChoice, Scenario, Workload

__all__ = [
    "Arrivals",
    "LinkFault",
    "NodeFault",
    "PolicyChoice",
    "Scenario",
    "Workload",
    "read_scenario",
    "scenario_names",
    "scenario_of",
    "scenario_table",
]
