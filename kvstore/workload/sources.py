"""The requests of a workload: traces and generators, with the arrivals that a scenario asks for."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import SimulationError, TraceError
from kvstore.limits import PROMPT_TOKENS_MAX
from kvstore.workload.arrivals import begin_times, check_arrivals
from kvstore.workload.generators import branching_sessions, lognormal_sessions, multiturn_sessions
from kvstore.workload.request import Request
from kvstore.workload.traces import bundled, read_agentic, read_mooncake

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.scenario import Arrivals, Workload
    from kvstore.workload.session import Session

_GENERATORS = {
    "lognormal": lognormal_sessions,
    "multiturn": multiturn_sessions,
    "branching": branching_sessions,
}
_PILOT_SESSIONS = 512
"""Sessions from which a generator's mean of calls is taken, so that sessions begin at a rate that gives the calls'."""

_PILOT_CALLS = 1 << 17
"""No further session is drawn behind so many calls, which say as much."""

_NO_KEYS = 2 * PROMPT_TOKENS_MAX
"""Tokens of a block that no prompt fills, for those who only count."""


def requests_of(workload: Workload, *, block_tokens: int, seed: int) -> Iterator[Request]:
    """The requests of a workload, one by one as they are asked for; equal arguments give equal requests.

    Those without `after` come in the order of `arrival_s`; one with `after` comes later than the one that it names.
    Contents and times are drawn independently: other arrivals bring the same prompts.

    Args:
        block_tokens: tokens of a block that `keys` name.

    Raises:
        SimulationError: a setting, a rate or a size is missing or out of its limits.
        TraceError: a trace cannot be read; may also come while requests are taken.
    """
    if block_tokens < 1:
        raise SimulationError(f"block_tokens={block_tokens} must be at least 1")
    if workload.requests_max < 1:
        raise SimulationError(f"requests_max={workload.requests_max} must be at least 1")
    check_arrivals(workload.arrivals)
    content_seed, arrival_seed, pilot_seed = np.random.SeedSequence(seed).spawn(3)
    arrival_rng = np.random.default_rng(arrival_seed)
    if workload.kind in _GENERATORS:
        if workload.path is not None:
            raise SimulationError(
                f"a workload {workload.kind!r} is generated; leave its path out, or name a trace's kind"
            )
        timed = _generated(workload, block_tokens, content_seed, pilot_seed, arrival_rng)
    elif workload.kind in ("mooncake", "agentic"):
        if workload.settings:
            raise SimulationError(
                f"a trace has no settings, and there is {workload.settings[0][0]!r}; its arrivals and requests_max can "
                "be chosen"
            )
        path = bundled(workload.kind) if workload.path is None else Path(workload.path)
        read = _mooncake if workload.kind == "mooncake" else _agentic
        timed = read(path, workload, block_tokens, arrival_rng)
    else:
        raise SimulationError(
            f"a workload {workload.kind!r} is unknown; use mooncake, agentic, {', '.join(_GENERATORS)}"
        )
    return islice(_numbered(timed), workload.requests_max)


def _generated(
    workload: Workload,
    block_tokens: int,
    content_seed: np.random.SeedSequence,
    pilot_seed: np.random.SeedSequence,
    arrival_rng: np.random.Generator,
) -> Iterator[tuple[float, Session]]:
    rate_per_s = workload.arrivals.rate_per_s
    if rate_per_s is None:
        raise SimulationError(f"a workload {workload.kind!r} has no times of its own; give its arrivals a rate_per_s")
    make = _GENERATORS[workload.kind]
    pilot = make(workload.settings, _NO_KEYS, np.random.default_rng(pilot_seed))
    calls_mean = 1.0 if workload.kind == "lognormal" else _calls_mean(pilot)
    sessions = make(workload.settings, block_tokens, np.random.default_rng(content_seed))
    return zip(begin_times(workload.arrivals, rate_per_s / calls_mean, arrival_rng), sessions, strict=False)


def _calls_mean(sessions: Iterator[Session]) -> float:
    """Calls of a session, of the first few."""
    count = calls = 0
    for session in islice(sessions, _PILOT_SESSIONS):
        count += 1
        calls += len(session)
        if calls >= _PILOT_CALLS:
            break
    return calls / count


def _mooncake(
    path: Path, workload: Workload, block_tokens: int, arrival_rng: np.random.Generator
) -> Iterator[tuple[float, Session]]:
    arrivals = workload.arrivals
    calls = read_mooncake(path, block_tokens)
    if arrivals.rate_per_s is not None and arrivals.kind != "trace":
        times = begin_times(arrivals, arrivals.rate_per_s, arrival_rng)
        return ((at_s, (each.call,)) for at_s, each in zip(times, calls, strict=False))
    scale = 1.0 if arrivals.rate_per_s is None else _own_rate(path, workload) / arrivals.rate_per_s
    return ((each.at_s * scale, (each.call,)) for each in calls)


def _own_rate(path: Path, workload: Workload) -> float:
    """Requests per second of those of a trace that are taken."""
    requests, last_s = 0, 0.0
    for each in islice(read_mooncake(path, _NO_KEYS), workload.requests_max):
        requests, last_s = requests + 1, each.at_s
    if last_s <= 0:
        raise TraceError(f"{path}: all {requests} requests come at once, which no rate scales; use poisson arrivals")
    return (requests - 1) / last_s


def _agentic(
    path: Path, workload: Workload, block_tokens: int, arrival_rng: np.random.Generator
) -> Iterator[tuple[float, Session]]:
    sessions = read_agentic(path, block_tokens)
    arrivals: Arrivals = workload.arrivals
    if arrivals.rate_per_s is None:
        return ((0.0, session) for session in sessions)
    calls = [len(session) for session in read_agentic(path, _NO_KEYS)]
    rate_per_s = arrivals.rate_per_s * len(calls) / sum(calls)
    return zip(begin_times(arrivals, rate_per_s, arrival_rng), sessions, strict=False)


def _numbered(timed: Iterator[tuple[float, Session]]) -> Iterator[Request]:
    """Requests in order, from sessions in the order of their beginnings."""
    waiting: list[tuple[float, int, int, Session]] = []
    number = 0
    for order, (begin_s, session) in enumerate(timed):
        while waiting and waiting[0][0] <= begin_s:
            requests = _following(number, waiting)
            number += len(requests)
            yield from requests
        for place, call in enumerate(session):
            if call.after is None:
                heappush(waiting, (begin_s + call.wait_s, order, place, session))
    while waiting:
        requests = _following(number, waiting)
        number += len(requests)
        yield from requests


def _following(number: int, waiting: list[tuple[float, int, int, Session]]) -> list[Request]:
    """The first call that waits for time alone, and all of its session that wait for it, in turn."""
    at_s, _, first, session = heappop(waiting)
    numbers: dict[int, int] = {}
    requests: list[Request] = []
    for place in range(first, len(session)):
        call = session[place]
        if place == first:
            arrival_s, after = at_s, None
        elif call.after in numbers:
            arrival_s, after = call.wait_s, numbers[call.after]
        else:
            continue
        numbers[place] = number + len(requests)
        requests.append(
            Request(numbers[place], arrival_s, call.prompt_tokens, call.output_tokens, call.keys, call.end_keys, after)
        )
    return requests
