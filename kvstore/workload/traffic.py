"""What a planner needs to know of a workload: lengths that must be prefilled, and output tokens."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from kvstore.errors import SimulationError
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.plan import Traffic
from kvstore.workload.generators.lognormal import LOGNORMAL
from kvstore.workload.generators.settings import prompt_lengths, settings_of
from kvstore.workload.seen import SeenKeys
from kvstore.workload.sources import requests_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.scenario import Workload
    from kvstore.workload.request import Request

TRAFFIC_REQUESTS = 20_000
"""Requests whose lengths stand for those of a workload."""


def traffic_of(workload: Workload, *, block_tokens: int, seed: int, is_cached: bool) -> Traffic:
    """The traffic of a workload: a log-normal as the distribution that it is, others by their first requests.

    Args:
        is_cached: count only what an unlimited common cache would not have, as if every block were a resume point: the
            least that must be prefilled. Else whole prompts.

    Raises:
        SimulationError: a setting is missing or out of its limits, or there is no request.
        TraceError: a trace cannot be read.
    """
    if workload.kind == "lognormal":
        values = settings_of("lognormal", LOGNORMAL, workload.settings)
        if not (is_cached and values["shared_tokens"]):
            return Traffic(prompt_lengths("lognormal", values), values["output_tokens"])
    requests = requests_of(workload, block_tokens=block_tokens, seed=seed)
    return traffic_of_requests(islice(requests, TRAFFIC_REQUESTS), block_tokens=block_tokens, is_cached=is_cached)


def traffic_of_requests(requests: Iterable[Request], *, block_tokens: int, is_cached: bool) -> Traffic:
    """The traffic of these requests, each with the same weight.

    Blocks count as cached as long as `SeenKeys` remembers them; what is new to a full memory counts as whole.

    Raises:
        SimulationError: there is no request.
    """
    seen = SeenKeys()
    lengths: list[int] = []
    output_tokens = 0
    for request in requests:
        present_tokens = seen.blocks(request.keys) * block_tokens if is_cached else 0
        lengths.append(request.prompt_tokens - min(present_tokens, request.prompt_tokens - 1))
        output_tokens += request.output_tokens
        if is_cached:
            seen.add(request.end_keys or request.keys)
    if not lengths:
        raise SimulationError("the workload has no request; there is nothing to plan for")
    return Traffic(PointMasses(lengths), output_tokens / len(lengths))
