"""What the connector's two halves tell each other: the scheduler's orders for a step, the workers' reports of one.

Plain values that can be pickled, since the workers may be other processes. Neither vLLM nor torch is needed here:
`connector.py` wraps them into vLLM's metadata classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.keys import ExtraInput

Tables = tuple[tuple[int, ...], ...]
"""Page ids of one request, for each of the engine's cache groups in the engine's order; see `NULL_PAGE`."""

NULL_PAGE = 0
"""vLLM's null block: the request has no page in this column, or gave it up."""


@dataclass(frozen=True)
class NewPrompt:
    """What a request is, told to the workers once, before or with its first order.

    A step that fails is logged by vLLM with all that it was given; what users have said, and salts, do not show.

    Attributes:
        token_ids: uint32, `[tokens]`: the prompt, and what was decoded already if the worker has to know it.
        salt, adapter, extras: what its cache is kept under; see `kvstore.Store.prompt`.
    """

    request_id: str
    token_ids: npt.NDArray[Any] = field(repr=False)
    salt: bytes = field(default=b"", repr=False)
    adapter: str = ""
    extras: tuple[ExtraInput, ...] = ()


@dataclass(frozen=True)
class MoreTokens:
    """Token ids that follow those that the workers know of a request: decoded since.

    Attributes:
        start: how many ids the workers have; those from here on are `token_ids` (uint32).
    """

    request_id: str
    start: int
    token_ids: npt.NDArray[Any] = field(repr=False)


@dataclass(frozen=True)
class LoadOrder:
    """Load a request's cache of tokens `[start, tokens)` and the states at `tokens`, beside the engine's steps.

    The scheduler holds a lease on the resume point until the workers have reported the end of the load for the
    request, also if the request ends before. The worker reports each order exactly once, also one that failed.

    Attributes:
        tokens: the resume point's length n.
        start: what the engine has in its own pages already, in tokens; 0 where a group has states only.
        tables: the request's pages as allocated for this load.
        attempt: counts the loads of this request.
        is_layered: load it within the step that it comes with, which computes on from there: each layer before its
            forward. Not for models with states. Its end is told by `WorkerReport.loads_done` alone.
    """

    request_id: str
    tokens: int
    start: int
    tables: Tables
    attempt: int
    is_layered: bool = False


@dataclass(frozen=True)
class SaveOrder:
    """Save what a step leaves of a request: right after its forward pass, before the next.

    Attributes:
        start: tokens that were computed before the step.
        stop: tokens that are computed after it, at most what the workers know the ids of.
        tables: the request's pages in this step.
        resume_at: lengths in `(start, stop]` at which a resume point is committed; states exist only at `stop`, unless
            the pages keep them elsewhere. Never empty: a step that leaves no resume point has no order.
        joint: names the commit that all tensor-parallel ranks make together; never used twice.
    """

    request_id: str
    start: int
    stop: int
    tables: Tables
    resume_at: tuple[int, ...]
    joint: str


@dataclass(frozen=True)
class StepOrders:
    """Everything that the workers do beside one step of the engine.

    Attributes:
        step: number of the step, from 1.
        socket: where a worker that is not the owner's process attaches. Empty as long as there is no store to attach
            to: then there are no save orders.
        prompts, more_tokens: to be known before the orders.
        loads: begin in `begin_loads`, end in the background. They come also with an empty `socket` (the store went
            between match and order): such a load fails.
        saves: done by the end of `wait_for_save`.
        preempted: they gave up their pages. They keep their prompt. (No load runs for them: vLLM preempts only what
            computes.)
        ended: requests that are forgotten: prompt and all. A load that still runs for one may stop early, and is
            reported.
    """

    step: int = 0
    socket: str = ""
    prompts: tuple[NewPrompt, ...] = ()
    more_tokens: tuple[MoreTokens, ...] = ()
    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    preempted: tuple[str, ...] = ()
    ended: tuple[str, ...] = ()

    def anon_repr(self) -> str:
        """What vLLM logs of it when a step fails, instead of each member: no prompts and no salts."""
        return repr(self)

    @property
    def is_empty(self) -> bool:
        return not (self.prompts or self.more_tokens or self.loads or self.saves or self.preempted or self.ended)


@dataclass
class Counters:
    """What a worker did since its last report.

    Tensor-parallel ranks do the same work, so of theirs the largest counts, not the sum.
    """

    loads: int = 0
    loads_failed: int = 0
    loaded_tokens: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0
    saves: int = 0
    saves_failed: int = 0
    saved_tokens: int = 0
    saved_bytes: int = 0
    save_s: float = 0.0

    def add(self, other: Counters) -> None:
        """Of the same rank, later."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def join(self, other: Counters) -> None:
        """Of another rank, at the same time."""
        for each in fields(self):
            setattr(self, each.name, max(getattr(self, each.name), getattr(other, each.name)))

    @property
    def is_empty(self) -> bool:
        return not any(getattr(self, each.name) for each in fields(self))


@dataclass
class WorkerReport:
    """What one rank reports after a step; those of all ranks are joined on the way to the scheduler.

    Attributes:
        committed: longest length committed by save orders, by request.
        loads_done: `(request, attempt) -> tokens` of load orders that ended: 0 for one that failed.
        failures: how often what went wrong, by a short name of the error's class.
        saved_steps: numbers of steps whose save orders have ended, well or not.
        is_store_gone: the owner of the store does not answer (any more): orders are not carried out. The scheduler
            gives none until it has a store again.
    """

    committed: dict[str, int] = field(default_factory=dict)
    loads_done: dict[tuple[str, int], int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    saved_steps: set[int] = field(default_factory=set)
    is_store_gone: bool = False

    @property
    def is_empty(self) -> bool:
        return not (
            self.committed
            or self.loads_done
            or self.failures
            or self.saved_steps
            or self.is_store_gone
            or not self.counters.is_empty
        )

    def join(self, other: WorkerReport) -> WorkerReport:
        """With another rank's of the same step. What counts is what all of them have done."""
        joined = WorkerReport(is_store_gone=self.is_store_gone or other.is_store_gone)
        joined.committed = {
            request: min(tokens, other.committed[request])
            for request, tokens in self.committed.items()
            if request in other.committed
        }
        joined.loads_done = dict(self.loads_done)
        for load, tokens in other.loads_done.items():
            joined.loads_done[load] = min(tokens, joined.loads_done.get(load, tokens))
        for failure in {*self.failures, *other.failures}:
            joined.failures[failure] = max(self.failures.get(failure, 0), other.failures.get(failure, 0))
        joined.saved_steps = self.saved_steps & other.saved_steps
        joined.counters.add(self.counters)
        joined.counters.join(other.counters)
        return joined


class WorkerHalf(Protocol):
    """What `connector.py` calls in a worker, from the engine's thread."""

    def register(self, tensors: dict[str, Any]) -> None:
        """The engine's cache tensors by layer name; see vLLM's `register_kv_caches`."""

    def take_orders(self, orders: StepOrders) -> None:
        """From `bind_connector_metadata`, before the forward: know the orders.

        Called once for each step, also for one without a forward.
        """

    def begin_loads(self) -> None:
        """From `start_load_kv`: after the forward was launched, unless the step has layered loads."""

    def wait_for_layer(self, layer_name: str) -> None:
        """From `wait_for_layer_load`."""

    def save_layer(self, layer_name: str) -> None:
        """From `save_kv_layer`."""

    def end_step(self) -> None:
        """From `wait_for_save`: carry out the save orders; return when the engine may overwrite its pages."""

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose load has ended since the last call: all of them, and those of them that failed.

        Each load order is named exactly once, also one whose request has ended meanwhile: until then the engine keeps
        its pages. After a failure the engine takes nothing of the load for computed. (vLLM maps single pages to
        requests only where there is one cache group; `failed_recving` is right for all.)
        """

    def load_errors(self) -> set[int]:
        """Page ids that a layered load of this step's forward left unfilled, since the last call."""

    def report(self) -> WorkerReport | None:
        """What was done since the last report; None if nothing."""

    def close(self) -> None:
        """End loads and writers, detach from the store."""


def joined(reports: Iterable[WorkerReport]) -> WorkerReport:
    """One report of all ranks'."""
    result: WorkerReport | None = None
    for report in reports:
        result = report if result is None else result.join(report)
    return result if result is not None else WorkerReport()
