"""The format of agentic coding sessions: a JSON file per session, block ids of its own, sub-agents nested."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from kvstore.errors import TraceError
from kvstore.limits import (
    SESSION_CALLS_MAX,
    TRACE_DEPTH_MAX,
    TRACE_SESSION_BYTES_MAX,
    TRACE_SESSIONS_MAX,
)
from kvstore.workload.block_keys import KeySpace, keys_of_ids
from kvstore.workload.session import Call, Session, SessionKeys
from kvstore.workload.traces.chain import IdChain
from kvstore.workload.traces.fields import (
    as_object,
    ids_of,
    number_of,
    object_of,
    open_trace,
    read_some,
    tokens_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

SUFFIXES = (".json", ".json.gz")
_ROUNDING_S = 1.0
"""Times of these traces are rounded to a second in places, so that a call may seem to begin before another's end."""


@dataclass(frozen=True)
class _Timed:
    """A call with the times of the trace, in seconds since the session's first call."""

    begin_s: float
    end_s: float
    prompt_tokens: int
    output_tokens: int
    ids: NDArray[np.uint64]


def files_of(path: Path) -> list[Path]:
    """The sessions of a trace, by name.

    Args:
        path: a folder with a file per session, or one such file.

    Raises:
        TraceError: there is none, or there are too many.
    """
    if path.is_file():
        return [path]
    try:
        files = sorted(each for each in path.iterdir() if each.name.endswith(SUFFIXES))
    except OSError as error:
        raise TraceError(f"the trace {path} cannot be opened: {error.strerror or error}") from error
    if not files:
        raise TraceError(f"{path}: there is no session in it; their names end in {' or '.join(SUFFIXES)}")
    if len(files) > TRACE_SESSIONS_MAX:
        raise TraceError(f"{path}: {len(files)} sessions, and {TRACE_SESSIONS_MAX} are the most; give a part of them")
    return files


def read_agentic(path: Path, block_tokens: int) -> Iterator[Session]:
    """The sessions of a trace, one by one as they are asked for.

    Args:
        path: a folder with a file per session, or one such file; packed by gzip if a name ends in .gz.

    Raises:
        TraceError: file and request, and what is wrong there.
        SimulationError: a session has too many keys for memory; choose larger blocks.
    """
    for scope, file in enumerate(files_of(path)):
        yield _session(file, scope, block_tokens)


def _session(path: Path, scope: int, block_tokens: int) -> Session:
    with open_trace(path) as file:
        text = read_some(file, TRACE_SESSION_BYTES_MAX + 1, str(path))
    if len(text) > TRACE_SESSION_BYTES_MAX:
        raise TraceError(f"{path}: more than {TRACE_SESSION_BYTES_MAX} bytes; this is no session")
    fields = object_of(text, str(path))
    if fields.get("hash_id_scope") != "local":
        raise TraceError(f"{path}: 'hash_id_scope' must be 'local', not {fields.get('hash_id_scope')!r}")
    id_tokens = tokens_of(fields, "block_size", str(path), 1)
    timed: list[_Timed] = []
    _collect(fields, str(path), id_tokens, 0.0, 0, IdChain(), timed)
    if not timed:
        raise TraceError(f"{path}: there is no request in it")
    timed.sort(key=lambda each: each.begin_s)
    first_s = timed[0].begin_s
    calls = []
    known = SessionKeys()
    for each, after in zip(timed, _waits(timed), strict=True):
        wait_s = each.begin_s - first_s if after is None else max(each.begin_s - timed[after].end_s, 0.0)
        keys = keys_of_ids(KeySpace.AGENTIC, scope, each.ids, id_tokens, each.prompt_tokens, block_tokens)
        calls.append(known.add(Call(each.prompt_tokens, each.output_tokens, keys, b"", after, wait_s)))
    return tuple(calls)


def _collect(
    fields: Mapping[str, object],
    where: str,
    id_tokens: int,
    origin_s: float,
    depth: int,
    chain: IdChain,
    timed: list[_Timed],
) -> None:
    """Append the calls of an agent and of those that it has called."""
    if depth > TRACE_DEPTH_MAX:
        raise TraceError(f"{where}: agents are nested deeper than {TRACE_DEPTH_MAX}")
    requests = fields.get("requests")
    if not isinstance(requests, list):
        raise TraceError(f"{where}: 'requests' must be a list")
    last_s = 0.0
    for number, value in enumerate(requests, 1):
        place = f"{where}, request {number}"
        entry = as_object(value, place)
        at_s = number_of(entry, "t", place)
        if at_s < last_s:
            raise TraceError(f"{place}: t={at_s:g} comes after {last_s:g}; sort the requests by time")
        last_s = at_s
        if entry.get("type") == "subagent":
            _collect(entry, place, id_tokens, origin_s + at_s, depth + 1, chain, timed)
            continue
        timed.append(_timed(entry, place, id_tokens, origin_s + at_s, chain))
        if len(timed) > SESSION_CALLS_MAX:
            raise TraceError(f"{place}: a session has at most {SESSION_CALLS_MAX} calls")


def _timed(entry: Mapping[str, object], place: str, id_tokens: int, begin_s: float, chain: IdChain) -> _Timed:
    prompt_tokens = tokens_of(entry, "in", place, 1)
    output_tokens = tokens_of(entry, "out", place, 0)
    ids = ids_of(entry, "hash_ids", place)
    whole = prompt_tokens // id_tokens
    if not whole <= len(ids) <= whole + 1:
        raise TraceError(
            f"{place}: {prompt_tokens} tokens have {whole} whole blocks of {id_tokens}, and there are {len(ids)} "
            "hash_ids; the prompt has a hole"
        )
    chain.check(ids, place)
    spent_s = number_of(entry, "api_time", place, number_of(entry, "ttft", place, 0.0))
    return _Timed(begin_s, begin_s + spent_s, prompt_tokens, max(output_tokens, 1), ids)


def _waits(timed: Sequence[_Timed]) -> Iterator[int | None]:
    """Of each call, the one that ended last before it began: what it waited for, as far as a trace tells."""
    running: list[tuple[float, int]] = []
    last: int | None = None
    for number, call in enumerate(timed):
        while running and running[0][0] <= call.begin_s + _ROUNDING_S:
            last = heappop(running)[1]
        yield last
        heappush(running, (call.end_s, number))
