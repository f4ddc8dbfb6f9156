"""The connector's half in a worker: carries the scheduler's orders out, and reports."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.loading import Loader
from kvstore.adapters.vllm.metadata import StepOrders, WorkerReport
from kvstore.adapters.vllm.prompts import KnownPrompts
from kvstore.adapters.vllm.registering import EnginePages
from kvstore.adapters.vllm.saving import Saver
from kvstore.adapters.vllm.stores import StoreAccess
from kvstore.errors import KVStoreError, OwnerGoneError, SpecError, WriteError

if TYPE_CHECKING:
    from kvstore.adapters.paged import PagedMapping
    from kvstore.store import Store

logger = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 10.0
"""How long the end of a worker waits for what still copies into pages."""

_NOTHING = StepOrders()


class Worker:
    """One worker of the engine: `kvstore.adapters.vllm.metadata.WorkerHalf`.

    The engine's thread calls. Nothing here raises because of the store: an engine goes on without it.

    Args:
        mapping: of the worker's cache groups.
        page_count: pages that the engine's tables may name, `KVCacheConfig.num_blocks`.
        again_s: how often a store that has gone is looked for.
    """

    def __init__(
        self, mapping: PagedMapping, *, page_count: int, again_s: float, access: StoreAccess | None = None
    ) -> None:
        self._mapping = mapping
        self._page_count = page_count
        self._access = access or StoreAccess(mapping.spec, again_s=again_s)
        self._prompts = KnownPrompts()
        self._pages: EnginePages | None = None
        self._loader: Loader | None = None
        self._saver: Saver | None = None
        self._orders = _NOTHING
        self._socket = ""
        self._began_s = 0.0
        self._report = WorkerReport()

    def register(self, tensors: dict[str, Any]) -> None:
        """The engine's cache tensors by layer name; see vLLM's `register_kv_caches`.

        Raises:
            SpecError: they lie otherwise than the engine's configuration says.
        """
        self._pages = EnginePages(self._mapping, tensors, self._page_count)
        self._loader = Loader(self._pages, self._access.failed)
        self._saver = Saver(self._pages, self._prompts.prefix, self._access.failed)

    def take_orders(self, orders: StepOrders) -> None:
        """From `bind_connector_metadata`, before the forward."""
        self._orders = orders
        if orders.socket and (orders.socket != self._socket or self._access.is_gone):
            self._socket = orders.socket
            self._access.get(orders.socket)  # which attaches at the first step, and looks for a store that has gone
        if orders.is_empty:
            return
        self._began_s = time.monotonic()
        for new in orders.prompts:
            self._prompts.add(new)
        for more in orders.more_tokens:
            try:
                self._prompts.extend(more)
            except WriteError as error:
                self._failure(error)
        for request_id in orders.ended:
            if self._loader is not None:
                self._loader.cancel(request_id)
            self._prompts.forget(request_id)

    def begin_loads(self) -> None:
        """From `start_load_kv`."""
        loads = self._orders.loads
        if not loads:
            return
        loader = self._needs(self._loader)
        store = self._store()
        for order in loads:
            if store is None:
                loader.refuse(
                    order, OwnerGoneError(f"there is no store at {self._orders.socket!r}: {self._access.why_not}")
                )
                continue
            request_id, tokens = order.request_id, order.tokens + 1

            def prompt(store: Store, request_id: str = request_id, tokens: int = tokens) -> Any:
                return self._prompts.prefix(request_id, tokens, store)

            loader.begin(order, prompt, store)

    def wait_for_layer(self, layer_name: str) -> None:
        """From `wait_for_layer_load`: no load is waited for within a forward pass."""

    def save_layer(self, layer_name: str) -> None:
        """From `save_kv_layer`: everything is put by `end_step`."""

    def end_step(self) -> None:
        """From `wait_for_save`: carry out the save orders; when it returns, the engine may overwrite its pages."""
        orders, self._orders = self._orders, _NOTHING
        # vLLM comes here also while an error of the forward pass is on its way up: its pages hold nobody's cache.
        if not orders.saves or sys.exc_info()[0] is not None:
            return
        saver = self._needs(self._saver)
        saver.save(orders.saves, self._store(orders.socket), time.monotonic() - self._began_s)
        self._report.saved_steps.add(orders.step)
        for end in saver.take_ended():
            counters = self._report.counters
            counters.saves += 1
            counters.save_s += end.seconds
            if end.error is not None:
                counters.saves_failed += 1
                self._failure(end.error)
                continue
            counters.saved_tokens += end.saved_tokens
            counters.saved_bytes += end.size_bytes
            request_id = end.order.request_id
            self._report.committed[request_id] = max(end.tokens, self._report.committed.get(request_id, 0))

    def finished_loads(self) -> tuple[set[str], set[str]]:
        """Requests whose load has ended since the last call: all of them, and those of them that failed."""
        finished: set[str] = set()
        failed: set[str] = set()
        for end in self._loader.take_ended() if self._loader is not None else ():
            order, counters = end.order, self._report.counters
            finished.add(order.request_id)
            counters.loads += 1
            counters.load_s += end.seconds
            self._report.loads_done[order.request_id, order.attempt] = 0 if end.error else order.tokens
            if end.error is not None:
                failed.add(order.request_id)
                counters.loads_failed += 1
                self._failure(end.error)
            else:
                counters.loaded_tokens += order.tokens - order.start
                counters.loaded_bytes += end.size_bytes
        return finished, failed

    def load_errors(self) -> set[int]:
        """Pages that a load of this step's forward left unfilled: there is none, loads run beside the steps."""
        return set()

    def report(self) -> WorkerReport | None:
        """What was done since the last report; None if nothing."""
        self._report.is_store_gone = self._access.is_gone
        if self._report.is_empty:
            return None
        report, self._report = self._report, WorkerReport()
        return report

    def close(self) -> None:
        """End loads, detach from the store."""
        if self._loader is not None and not self._loader.close(CLOSE_DEADLINE_S):
            logger.warning("a load still copied after %g s; its thread ends with the process", CLOSE_DEADLINE_S)
        self._access.close()

    def _store(self, socket: str | None = None) -> Store | None:
        return self._access.get(self._orders.socket if socket is None else socket)

    def _failure(self, error: BaseException) -> None:
        name = type(error).__name__
        self._report.failures[name] = self._report.failures.get(name, 0) + 1
        log = logger.debug if isinstance(error, KVStoreError) else logger.warning
        log("%s: %s", name, error)

    def _needs(self, part: Any) -> Any:
        if part is None:
            raise SpecError("the engine has registered no cache tensors; its orders cannot be carried out")
        return part
