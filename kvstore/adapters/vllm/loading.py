"""Loads that run beside the engine's steps: out of the store into pages that the engine has set aside for a request.

States must not be loaded in any other way: a step's states are prepared before `start_load_kv`, and what is loaded then
comes too late. The engine keeps the pages of a load until it is told that it has ended, also those of a request that
was aborted meanwhile; so every load ends exactly once, whatever becomes of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, LeaseGoneError
from kvstore.limits import VLLM_LOAD_DEADLINE_S, VLLM_LOAD_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.adapters.vllm.metadata import LoadOrder
    from kvstore.adapters.vllm.registering import EnginePages
    from kvstore.pool import Prompt
    from kvstore.spec import Shard
    from kvstore.store import Lease, Store
    from kvstore.tiers.gpu.device import Mark

logger = logging.getLogger(__name__)


class LoadCancelledError(KVStoreError):
    """The request was aborted or preempted before its load began."""


@dataclass(frozen=True)
class LoadEnd:
    """How a load ended.

    Attributes:
        error: why it failed; None if the pages hold all that was ordered. Else part of them may have been written.
        size_bytes, seconds: of the records, and how long it took from the order on.
    """

    order: LoadOrder
    error: BaseException | None
    size_bytes: int
    seconds: float


class _Load:
    """A load that waits or runs."""

    def __init__(
        self,
        order: LoadOrder,
        prompt: Callable[[Store], Prompt],
        store: Store,
        after: Sequence[Mark],
        deadline: Deadline,
    ) -> None:
        self.order = order
        self.prompt = prompt
        self.store = store
        self.after = after
        self.deadline = deadline
        self.began_s = time.monotonic()
        self.is_cancelled = False


class Loader:
    """Carries load orders out, in order, on threads of its own. The engine's thread calls; nothing here blocks it.

    Args:
        pages: the engine's pages.
        failed: told of a store that failed, by the thread that noticed.
        deadline_s: how long a load may take from its order on.
    """

    def __init__(
        self,
        pages: EnginePages,
        failed: Callable[[Store, BaseException], None],
        *,
        deadline_s: float = VLLM_LOAD_DEADLINE_S,
    ) -> None:
        self._pages = pages
        self._failed = failed
        self._deadline_s = deadline_s
        self._changed = threading.Condition()
        self._waiting: deque[_Load] = deque()
        self._running: set[_Load] = set()
        self._ended: list[LoadEnd] = []
        self._threads: list[threading.Thread] = []
        self._into_pages = threading.Lock()
        self._is_closed = False

    @property
    def under_way(self) -> int:
        """Loads that have not ended."""
        return len(self._waiting) + len(self._running)

    def begin(self, order: LoadOrder, prompt: Callable[[Store], Prompt], store: Store) -> None:
        """Load behind everything that the engine's current stream has been asked: it may still use the pages.

        Args:
            prompt: makes the prompt up to one token past the order's length, for a store; called once, by a thread.
        """
        load = _Load(order, prompt, store, self._pages.marks(), Deadline.after(self._deadline_s))
        with self._changed:
            self._waiting.append(load)
            idle = len(self._threads) - len(self._running)
            if idle < len(self._waiting) and len(self._threads) < VLLM_LOAD_THREADS:
                name = f"kvstore-load-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            self._changed.notify()

    def refuse(self, order: LoadOrder, error: BaseException) -> None:
        """An order that cannot begin: it has failed."""
        with self._changed:
            self._ended.append(LoadEnd(order, error, 0, 0.0))

    def cancel(self, request_id: str) -> None:
        """What waits for a request need not run. What copies goes on to its end."""
        with self._changed:
            for load in (*self._waiting, *self._running):
                if load.order.request_id == request_id:
                    load.is_cancelled = True

    def take_ended(self) -> list[LoadEnd]:
        """Loads that have ended since the last call."""
        if not self._ended:
            return []
        with self._changed:
            ended, self._ended = self._ended, []
        return ended

    def wait(self, deadline_s: float) -> bool:
        """Block until nothing is under way; False if it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._running, deadline_s)

    def close(self, deadline_s: float) -> bool:
        """End what waits; wait for what copies. False if that takes longer."""
        with self._changed:
            self._is_closed = True
            for load in (*self._waiting, *self._running):
                load.is_cancelled = True
            self._changed.notify_all()
            threads = tuple(self._threads)
        deadline = Deadline.after(deadline_s)
        for thread in threads:
            thread.join(deadline.remaining_s())
        return not any(thread.is_alive() for thread in threads)

    # In the threads

    def _run(self) -> None:
        stream = self._pages.stream()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                load = self._waiting.popleft()
                self._running.add(load)
            end = self._carry_out(load, stream)
            with self._changed:
                self._ended.append(end)
                self._running.discard(load)
                self._changed.notify_all()

    def _carry_out(self, load: _Load, stream: Any) -> LoadEnd:
        order = load.order
        size_bytes, error = 0, None
        try:
            if load.is_cancelled:
                raise LoadCancelledError(f"request {order.request_id} ended before its load began")
            if load.deadline.has_passed:
                raise DeadlineError(f"the load of request {order.request_id} could not begin before its deadline")
            prompt = load.prompt(load.store)
            with read_resume_point(load.store, prompt, order.tokens, self._pages.shard, load.deadline) as lease:
                size_bytes = lease.size_bytes
                with self._into_pages:
                    self._pages.load(lease, order, stream, load.after, load.deadline)
        except Exception as caught:
            # Not KVStoreError alone: an engine that is never told of a load's end keeps the request for ever.
            error = caught
            self._failed(load.store, caught)
            if not isinstance(caught, KVStoreError):
                logger.exception("loading %d tokens for request %s failed", order.tokens, order.request_id)
        return LoadEnd(order, error, size_bytes, time.monotonic() - load.began_s)


def read_resume_point(store: Store, prompt: Prompt, tokens: int, shard: Shard, deadline: Deadline) -> Lease:
    """A lease on exactly the resume point that was ordered, whose layers may still be on their way.

    Args:
        prompt: of at least one token more.

    Raises:
        LeaseGoneError: it is gone, or damaged; a shorter one would not do. Otherwise as `Store.read`.
    """
    match = store.match(prompt, shard=shard)
    if match.tokens != tokens:
        raise LeaseGoneError(f"the resume point of {tokens} tokens is gone; {match.tokens} tokens are there")
    lease = store.read(match, layered=True, deadline_s=deadline.remaining_s())
    if lease.tokens != tokens:
        lease.release()
        raise LeaseGoneError(f"the resume point of {tokens} tokens was damaged or evicted")
    return lease
