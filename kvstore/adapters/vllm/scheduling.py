"""The connector's half in the scheduler: finds what is cached, orders loads and saves, and holds leases meanwhile.

One thread calls: the scheduler's. Requests and scheduler outputs are vLLM's, or look like them.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvstore.adapters.paged import NotCached, RequestIdentity
from kvstore.adapters.vllm.handover import Source, Target, answer, read_params
from kvstore.adapters.vllm.metadata import Counters, LoadOrder, MoreTokens, NewPrompt, SaveOrder, StepOrders
from kvstore.adapters.vllm.partial_pages import PartialPages
from kvstore.adapters.vllm.pushing import Push, Pushes
from kvstore.adapters.vllm.requests import Identities, known_tokens
from kvstore.adapters.vllm.resetting import LATE_STEPS, Resetting
from kvstore.adapters.vllm.unfilled import UnfilledPages
from kvstore.errors import ConfigError, KVStoreError
from kvstore.pool import Prompt
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.adapters.paged import CheckpointPolicy
    from kvstore.adapters.vllm.metadata import Tables, WorkerReport
    from kvstore.adapters.vllm.opening import SchedulerStore
    from kvstore.adapters.vllm.search import Found, Search, Searches
    from kvstore.spec import ModelSpec

logger = logging.getLogger(__name__)

MISS_KEPT_S = 1.0
"""A request that waits for pages is asked about in every step; after this long, what it missed may be there."""


@dataclass
class SchedulerCounters:
    """What the scheduler's half counts; they only grow.

    Attributes:
        queries: requests that were looked for; a request that was preempted once more.
        hits, hit_tokens: those of which something was loaded, and how much of it the engine did not have.
        not_cached: requests without an identity, by reason.
        failures: what went wrong, by the name of the error's class; each was a miss, or was not saved or not sent.
        workers: of the workers.
    """

    queries: int = 0
    hits: int = 0
    hit_tokens: int = 0
    not_cached: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    workers: Counters = field(default_factory=Counters)

    def flat(self, *failures: Counter[str]) -> dict[str, float]:
        """All of it by name.

        Args:
            failures: those that others count.
        """
        every = sum(failures, self.failures)
        return {
            "queries": self.queries,
            "hits": self.hits,
            "hit_tokens": self.hit_tokens,
            "not_cached": self.not_cached.total(),
            **{f"failures:{name}": count for name, count in every.items()},
            **vars(self.workers),
        }


@dataclass
class _Tracked:
    """A request that has not finished."""

    request: Any
    identity: RequestIdentity | NotCached
    source: Source | None = None
    target: Target | None = None
    search: Search | None = None
    start: int = 0
    attempt: int = 0
    has_load_failed: bool = False
    told: int = 0
    saved: int = 0


@dataclass(frozen=True)
class _Loading:
    """A load that a worker has not reported; lives on after its request."""

    attempt: int
    found: Found


class Scheduling:
    """See `kvstore.adapters.vllm.connector` for which of vLLM's hooks calls what.

    Args:
        spec: the model.
        store: the scheduler's.
        policy: at which lengths resume points are kept.
        may_load, may_save: what this instance's role and settings allow.
        peers: instances that hand-overs may go to and come from.
        saves_decoded: save what is decoded, too.
        partial_pages: of the engine's groups.
        loads_by_layer: loads go with the step that computes on from them, layer by layer.

    Raises:
        ConfigError: loads by layer, and a group of the model has states or a window.
    """

    def __init__(
        self,
        spec: ModelSpec,
        store: SchedulerStore,
        searches: Searches,
        policy: CheckpointPolicy,
        *,
        may_load: bool = True,
        may_save: bool = True,
        peers: tuple[str, ...] = (),
        saves_decoded: bool = False,
        partial_pages: PartialPages | None = None,
        loads_by_layer: bool = False,
    ) -> None:
        if loads_by_layer and any(group.rule is not ReuseRule.ATTENTION for group in spec.groups):
            raise ConfigError(
                "load = 'layered', and the model has states or windows: vLLM would compute with what is not there. "
                "Leave it out: loads then run beside the steps"
            )
        self._loads_by_layer = loads_by_layer
        self.unfilled_pages = UnfilledPages(policy.alignment_tokens)
        self._spec = spec
        self._partial_pages = partial_pages or PartialPages()
        self._store = store
        self._searches = searches
        self._policy = policy
        self._may_load = may_load
        self._may_save = may_save
        self._peers = peers
        self._saves_decoded = saves_decoded
        self._decoded_alignment = math.lcm(policy.alignment_tokens, spec.block_tokens)
        self._pushes = Pushes(store)
        self._resetting = Resetting(store)
        self._identities = Identities()
        self._tracked: dict[str, _Tracked] = {}
        self._loading: dict[str, _Loading] = {}
        self._loads: list[LoadOrder] = []
        self._ended: list[str] = []
        self._pushed: dict[str, Push] = {}
        self._pushed_until: dict[str, int] = {}
        self._step = 0
        # Instances that share a store may name their requests alike.
        self._name = secrets.token_hex(4)
        self.counters = SchedulerCounters()
        self._counted: dict[str, float] = {}

    # What the scheduler asks

    def add(self, request: Any) -> None:
        """A request has come."""
        self._of(request)

    def match(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens more than `computed_tokens` can be loaded, and whether beside the steps.

        None as long as they are being made ready. Asked again in every step until the request has its pages.
        """
        tracked = self._of(request)
        if self._partial_pages.hide():
            return None, False  # The engine's own hit may be with such a page: it looks again.
        if not self._may_load or request.skip_reading_prefix_cache or tracked.has_load_failed:
            return 0, False
        if isinstance(tracked.identity, NotCached) or self._resetting.is_waiting:
            return 0, False
        search = tracked.search
        if search is not None and search.is_stale(MISS_KEPT_S):
            search = None
        if search is None:
            if tracked.search is None:
                self.counters.queries += 1
            tracked.search = search = self._searches.begin(self._prompt(tracked), tracked.source)
        found = search.poll()
        if found is None:
            return None, False
        tracked.source = None  # It was fetched, or cannot be.
        tracked.start = computed_tokens
        more = found.tokens - computed_tokens
        return (more, not self._loads_by_layer) if more > 0 else (0, False)

    def allocated(self, request: Any, tables: Sequence[Sequence[int]], external_tokens: int) -> None:
        """The request has pages; those after `match`'s answer are to be filled if `external_tokens` says so."""
        tracked = self._of(request)
        search, tracked.search = tracked.search, None
        if not external_tokens:
            # What was loaded has its hashes by now, and gets no others.
            self._partial_pages.hide()
            self._partial_pages.forget(request.request_id)
        if search is None:
            return
        if not external_tokens:
            # Nothing, or another connector's: what was found is not needed.
            search.drop()
            return
        found = search.take()
        tracked.attempt += 1
        self._loading[request.request_id] = _Loading(tracked.attempt, found)
        self.counters.hits += 1
        self.counters.hit_tokens += external_tokens
        self._partial_pages.loading(request.request_id, tables, tracked.start, tracked.start + external_tokens)
        self._loads.append(
            LoadOrder(
                request_id=request.request_id,
                tokens=tracked.start + external_tokens,
                start=tracked.start,
                tables=_frozen(tables),
                attempt=tracked.attempt,
                is_layered=self._loads_by_layer,
            )
        )

    def orders(self, output: Any) -> StepOrders:
        """What the workers do beside a step; `output` is vLLM's `SchedulerOutput`."""
        self._step += 1
        self._partial_pages.hide()
        self._forget_pushed()
        saves = tuple(self._saves(output)) if self._may_save and self._store.get() is not None else ()
        self._resetting.ordered(self._step, saves=bool(saves))
        loads, self._loads = tuple(self._loads), []
        if self._loads_by_layer:
            block_state = output.kv_connector_block_state
            computed = output.num_scheduled_tokens if loads else ()
            self.unfilled_pages.step(loads, {name: block_state.get_block_ids(name) for name in computed})
        ended, self._ended = tuple(self._ended), []
        prompts, more_tokens = self._news(
            {order.request_id: order.stop for order in saves},
            {order.request_id: order.tokens + 1 for order in loads},
        )
        return StepOrders(
            step=self._step,
            socket=self._store.socket if self._store.get() is not None else "",
            prompts=prompts,
            more_tokens=more_tokens,
            loads=loads,
            saves=saves,
            preempted=tuple(output.preempted_req_ids or ()),
            ended=ended,
        )

    def reported(self, finished_loads: Iterable[str], failed_loads: Iterable[str], report: WorkerReport | None) -> None:
        """What the workers have done."""
        failed = set(failed_loads)
        for request_id in finished_loads:
            self._load_ended(request_id, has_failed=request_id in failed)
        if report is None:
            return
        self._resetting.saved(report.saved_steps)
        for (request_id, attempt), tokens in report.loads_done.items() if self._loads_by_layer else ():
            # vLLM names no request of these; it has read of the pages that were left unfilled.
            loading = self._loading.get(request_id)
            if loading is not None and loading.attempt == attempt:
                if not tokens:
                    self.unfilled_pages.failed(request_id, attempt)
                self._load_ended(request_id, has_failed=not tokens)
        self.counters.workers.add(report.counters)
        self.counters.failures.update(report.failures)
        for request_id, tokens in report.committed.items():
            push = self._pushed.get(request_id)
            if push is not None:
                self._pushes.committed(push, tokens)

    def _load_ended(self, request_id: str, *, has_failed: bool) -> None:
        loading = self._loading.pop(request_id, None)
        if loading is not None:
            loading.found.release()
        tracked = self._tracked.get(request_id)
        if tracked is not None and has_failed:
            # It is computed now. What could not be loaded once is not asked for again.
            tracked.has_load_failed = True
            self._partial_pages.forget(request_id)

    def finish(self, request: Any) -> dict[str, Any] | None:
        """A request has ended, well or not. What is answered travels with its output.

        Its pages need not be kept: what is saved of it was saved in its steps.
        """
        self._partial_pages.hide()
        self._partial_pages.forget(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is None:
            return None
        if tracked.search is not None:
            tracked.search.drop()
        if tracked.told:
            self._ended.append(request.request_id)
        if request.request_id in self._pushed:
            # What its last steps have committed is reported after this.
            self._pushed_until[request.request_id] = self._step + LATE_STEPS
        return self._answer(tracked)

    def reset(self) -> bool:
        """Forget everything that is kept: weights have changed, say. False if that is not possible here, or now."""
        for tracked in self._tracked.values():
            if tracked.search is not None:
                tracked.search.drop()
                tracked.search = None
        return self._resetting.reset(self._step)

    def take_counters(self) -> dict[str, float]:
        """What was counted since the last call, by name; empty if nothing was."""
        now = self.counters.flat(self._searches.failures, self._pushes.failures)
        counted = {name: value - self._counted.get(name, 0) for name, value in now.items()}
        self._counted = now
        return {name: value for name, value in counted.items() if value}

    def close(self) -> None:
        """End everything: searches, leases, the store."""
        for tracked in self._tracked.values():
            if tracked.search is not None:
                tracked.search.drop()
        for loading in self._loading.values():
            loading.found.release()
        self._tracked.clear()
        self._loading.clear()
        self._pushes.close()
        self._searches.close()
        self._store.close()

    # One request

    def _of(self, request: Any) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = _Tracked(request, self._identities.of(request))
            if isinstance(tracked.identity, NotCached):
                self.counters.not_cached[tracked.identity.reason] += 1
            else:
                self._read_params(tracked, tracked.identity)
        return tracked

    def _read_params(self, tracked: _Tracked, identity: RequestIdentity) -> None:
        try:
            asked = read_params(tracked.request.kv_transfer_params, self._peers)
        except KVStoreError as error:
            logger.warning("request %s: %s", tracked.request.request_id, error)
            self.counters.failures[type(error).__name__] += 1
            return
        if isinstance(asked, Source):
            tracked.source = asked
        elif isinstance(asked, Target):
            tracked.target = asked
            if asked.send_to:
                ids = known_tokens(tracked.request, tracked.request.num_prompt_tokens)
                self._pushed[tracked.request.request_id] = Push(ids, identity, asked.send_to)

    def _prompt(self, tracked: _Tracked) -> Prompt:
        identity = tracked.identity
        assert isinstance(identity, RequestIdentity)
        ids = known_tokens(tracked.request, tracked.request.num_tokens)
        return Prompt.of(self._spec, ids, salt=identity.salt, adapter=identity.adapter, extras=identity.extras)

    def _answer(self, tracked: _Tracked) -> dict[str, Any] | None:
        request = tracked.request
        if tracked.target is None or request.num_computed_tokens < request.num_prompt_tokens:
            return None
        if not self._store.address:
            logger.warning(
                "request %s was prefilled for another instance, which cannot fetch it: this one has no address; set "
                "listen or address in kv_connector_extra_config",
                request.request_id,
            )
            return None
        return answer(self._store.address, request.num_prompt_tokens, is_pushed=bool(tracked.target.send_to))

    # Orders

    def _saves(self, output: Any) -> Iterable[SaveOrder]:
        for request_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(request_id)
            if tracked is None or isinstance(tracked.identity, NotCached):
                continue
            start, stop, resume_at = self._step_of(tracked, scheduled)
            if not resume_at:
                continue
            tracked.saved = stop
            yield SaveOrder(
                request_id=request_id,
                start=start,
                stop=stop,
                tables=_frozen(output.kv_connector_block_state.get_block_ids(request_id)),
                resume_at=resume_at,
                joint=f"{self._name}:{self._step}:{request_id}",
            )

    def _forget_pushed(self) -> None:
        for request_id in [each for each, step in self._pushed_until.items() if step < self._step]:
            del self._pushed[request_id], self._pushed_until[request_id]

    def _step_of(self, tracked: _Tracked, scheduled: int) -> tuple[int, int, tuple[int, ...]]:
        """What is saved of a step: from, to, and where resume points lie; none of these if nothing is."""
        request = tracked.request
        prompt_tokens = request.num_prompt_tokens
        start = request.num_computed_tokens
        # What is sampled may be known later than it is computed with.
        stop = min(start + scheduled, request.num_tokens)
        if start < prompt_tokens:
            # After a preemption what was decoded before is computed with the prompt.
            return start, stop, self._policy.lengths(start, stop, request.num_tokens)
        if self._saves_decoded:
            # States of whole pages stay where they are while the next page is filled, so this may come a step late.
            stop = stop // self._decoded_alignment * self._decoded_alignment
            if stop > max(tracked.saved, prompt_tokens):
                return max(tracked.saved, prompt_tokens), stop, (stop,)
        return start, start, ()

    def _news(
        self, saved: dict[str, int], loaded: dict[str, int]
    ) -> tuple[tuple[NewPrompt, ...], tuple[MoreTokens, ...]]:
        """What the workers must know of requests for their orders, as far as they do not."""
        prompts, more_tokens = [], []
        for request_id in {**saved, **loaded}:
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            identity, tokens = tracked.identity, tracked.request.num_tokens
            assert isinstance(identity, RequestIdentity)
            if not tracked.told:
                ids = known_tokens(tracked.request, tokens)
                prompts.append(NewPrompt(request_id, ids, identity.salt, identity.adapter, identity.extras))
            elif tracked.told < max(saved.get(request_id, 0), loaded.get(request_id, 0)):
                ids = known_tokens(tracked.request, tokens)[tracked.told :]
                more_tokens.append(MoreTokens(request_id, tracked.told, ids))
            else:
                continue
            tracked.told = tokens
        return tuple(prompts), tuple(more_tokens)


def _frozen(tables: Sequence[Sequence[int]]) -> Tables:
    return tuple(tuple(table) for table in tables)
