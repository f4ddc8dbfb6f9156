"""Seeded sessions of calls that nobody has recorded: independent prompts, conversations, agents that branch."""

from kvstore.workload.generators.branching import BRANCHING, branching_sessions
from kvstore.workload.generators.lognormal import LOGNORMAL, lognormal_sessions
from kvstore.workload.generators.multiturn import MULTITURN, multiturn_sessions

__all__ = [
    "BRANCHING",
    "LOGNORMAL",
    "MULTITURN",
    "branching_sessions",
    "lognormal_sessions",
    "multiturn_sessions",
]
