"""What became of each request: rows that are written as requests end."""

from __future__ import annotations

from array import array
from math import nan
from typing import TYPE_CHECKING

import numpy as np

from kvstore.simulate.result import PARTS, Outcome, RequestTable

if TYPE_CHECKING:
    from kvstore.simulate.job import Job
    from kvstore.workload.request import Request

_ROWS_ADDED = 1 << 14
_FLOATS = ("arrival_s", "ttft_s", "tpot_s", "finished_s", "prefix_bytes", "handover_bytes")
_COUNTS = ("prompt_tokens", "output_tokens", "cached_tokens", "possible_tokens")


class Recording:
    """A row per request, by its number in the workload. Not thread-safe.

    Attributes:
        outcome: of each row; rows of requests that never arrived have no arrival and are left out of the table.
    """

    def __init__(self) -> None:
        self._floats = {name: array("d") for name in _FLOATS}
        self._counts = {name: array("q") for name in _COUNTS}
        self._parts = array("d")
        self._tier = array("b")
        self._prefill = array("h")
        self._decode = array("h")
        self.outcome = array("b")

    def begin(self, request: Request) -> None:
        """The workload has this request."""
        while len(self.outcome) <= request.number:
            self._grow()
        self._counts["prompt_tokens"][request.number] = request.prompt_tokens
        self._counts["output_tokens"][request.number] = request.output_tokens

    def arrived(self, number: int, now_s: float, possible_tokens: int) -> None:
        self._floats["arrival_s"][number] = now_s
        self._counts["possible_tokens"][number] = possible_tokens

    def turned_away(self, number: int, now_s: float) -> None:
        self.outcome[number] = Outcome.REJECTED
        self._floats["finished_s"][number] = now_s

    def first_token(self, job: Job) -> None:
        """The time to first token is complete."""
        number = job.request.number
        self._floats["ttft_s"][number] = job.first_s - job.arrival_s
        at = number * len(PARTS)
        self._parts[at : at + len(PARTS)] = array("d", job.parts)

    def ended(self, job: Job, outcome: Outcome, now_s: float, tier: int) -> None:
        """Nothing more will happen to it; for a request that is cut off, what came to pass until now."""
        number = job.request.number
        self.outcome[number] = outcome
        self._counts["cached_tokens"][number] = job.resume_tokens
        self._tier[number] = tier
        self._prefill[number] = job.prefill.number
        self._decode[number] = job.decode.number
        self._floats["prefix_bytes"][number] = job.prefix_bytes
        self._floats["handover_bytes"][number] = job.handover_bytes
        if outcome is not Outcome.PENDING:
            self._floats["finished_s"][number] = now_s
        if outcome is Outcome.DONE and job.request.output_tokens > 1:
            self._floats["tpot_s"][number] = (now_s - job.first_s) / (job.request.output_tokens - 1)

    def table(self) -> RequestTable:
        """The rows of requests that arrived."""
        came = ~np.isnan(np.array(self._floats["arrival_s"]))
        floats = {name: np.array(values, np.float64)[came] for name, values in self._floats.items()}
        counts = {name: np.array(values, np.int64)[came] for name, values in self._counts.items()}
        return RequestTable(
            **floats,
            **counts,
            tier=np.array(self._tier, np.int8)[came],
            prefill=np.array(self._prefill, np.int16)[came],
            decode=np.array(self._decode, np.int16)[came],
            outcome=np.array(self.outcome, np.int8)[came],
            parts=np.array(self._parts, np.float64).reshape(-1, len(PARTS))[came],
        )

    def _grow(self) -> None:
        for floats in self._floats.values():
            floats.extend(array("d", [nan]) * _ROWS_ADDED)
        self._parts.extend(array("d", [nan]) * (_ROWS_ADDED * len(PARTS)))
        for counts in self._counts.values():
            counts.extend(array("q", [0]) * _ROWS_ADDED)
        for numbers in (self._prefill, self._decode):
            numbers.extend(array("h", [-1]) * _ROWS_ADDED)
        self._tier.extend(array("b", [-1]) * _ROWS_ADDED)
        self.outcome.extend(array("b", [Outcome.PENDING]) * _ROWS_ADDED)
