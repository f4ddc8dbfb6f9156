"""The Mooncake format: a JSON line per request, block ids of one scope."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import TraceError
from kvstore.limits import TRACE_LINE_BYTES_MAX, TRACE_REQUESTS_MAX
from kvstore.workload.block_keys import KeySpace, keys_of_ids
from kvstore.workload.session import Call
from kvstore.workload.traces.chain import IdChain
from kvstore.workload.traces.fields import ids_of, lines_of, number_of, object_of, tokens_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ID_TOKENS = 512
"""Tokens that an id stands for."""


class TimedCall(NamedTuple):
    """A request, and when it came, in seconds since the trace's first."""

    at_s: float
    call: Call


def read_mooncake(path: Path, block_tokens: int) -> Iterator[TimedCall]:
    """The requests of a trace, one by one as they are asked for.

    Args:
        path: of a file of JSON lines, packed by gzip if its name ends in .gz.

    Raises:
        TraceError: file and line, and what is wrong there.
    """
    chain = IdChain()
    first_ms = last_ms = -1.0
    for number, (where, line) in enumerate(lines_of(path, TRACE_LINE_BYTES_MAX)):
        if number >= TRACE_REQUESTS_MAX:
            raise TraceError(f"{where}: a trace has at most {TRACE_REQUESTS_MAX} requests; cut it")
        fields = object_of(line, where)
        at_ms = number_of(fields, "timestamp", where)
        if at_ms < last_ms:
            raise TraceError(f"{where}: timestamp {at_ms:g} comes after {last_ms:g}; sort the trace by time")
        first_ms, last_ms = (at_ms if number == 0 else first_ms), at_ms
        prompt_tokens = tokens_of(fields, "input_length", where, 1)
        output_tokens = tokens_of(fields, "output_length", where, 0)
        ids = ids_of(fields, "hash_ids", where)
        expected = -(-prompt_tokens // ID_TOKENS)
        if len(ids) != expected:
            raise TraceError(
                f"{where}: {prompt_tokens} tokens have {expected} blocks of {ID_TOKENS}, and there are {len(ids)} "
                "hash_ids; the prompt has a hole"
            )
        chain.check(ids, where)
        keys = keys_of_ids(KeySpace.MOONCAKE, 0, ids, ID_TOKENS, prompt_tokens, block_tokens)
        yield TimedCall((at_ms - first_ms) / 1000, Call(prompt_tokens, max(output_tokens, 1), keys))
