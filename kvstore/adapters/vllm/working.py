"""The connector's half in a worker: carries the scheduler's orders out, and reports."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.layered_loading import LayeredLoader
from kvstore.adapters.vllm.loading import LoadEnd, Loader
from kvstore.adapters.vllm.metadata import StepOrders, WorkerReport
from kvstore.adapters.vllm.prompts import KnownPrompts
from kvstore.adapters.vllm.registering import EnginePages
from kvstore.adapters.vllm.saving import Saver
from kvstore.adapters.vllm.stores import StoreAccess
from kvstore.errors import KVStoreError, OwnerGoneError, SpecError, WriteError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.adapters.paged import PagedMapping
    from kvstore.adapters.vllm.metadata import LoadOrder, SaveOrder
    from kvstore.pool import Prompt
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
        saves_by_layer: put each layer behind its forward, beside that of the next ones.
        socket: where the store will be, if that is known: it is attached to while the engine still starts.
    """

    def __init__(
        self,
        mapping: PagedMapping,
        *,
        page_count: int,
        again_s: float,
        saves_by_layer: bool = False,
        socket: str = "",
        access: StoreAccess | None = None,
    ) -> None:
        self._mapping = mapping
        self._page_count = page_count
        self._saves_by_layer = saves_by_layer
        self._access = access or StoreAccess(mapping.spec, again_s=again_s)
        self._access.begin(socket)
        self._prompts = KnownPrompts()
        self._pages: EnginePages | None = None
        self._loader: Loader | None = None
        self._layered: LayeredLoader | None = None
        self._saver: Saver | None = None
        self._unfilled: set[int] = set()
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
        self._end_layered()
        if self._saver is not None:
            self._saver.abort("its step did not end")
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
        if self._saves_by_layer and orders.saves:
            store = self._store()
            if store is not None:
                self._needs(self._saver).begin(orders.saves, store)

    def begin_loads(self) -> None:
        """From `start_load_kv`."""
        loads = self._orders.loads
        if not loads:
            return
        store = self._store()
        layered = [order for order in loads if order.is_layered]
        if layered:
            self._begin_layered(layered, store)
        loader = self._needs(self._loader)
        for order in loads:
            if order.is_layered:
                continue
            if store is None:
                loader.refuse(order, self._no_store())
            else:
                loader.begin(order, self._prompt_of(order), store)

    def _begin_layered(self, orders: Sequence[LoadOrder], store: Store | None) -> None:
        if self._layered is None:
            self._layered = LayeredLoader(self._needs(self._pages), self._access.failed)
        if store is not None:
            self._layered.begin([(order, self._prompt_of(order)) for order in orders], store)
            return
        for order in orders:
            self._layered.refuse(order, self._no_store())

    def _prompt_of(self, order: LoadOrder) -> Callable[[Store], Prompt]:
        request_id, tokens = order.request_id, order.tokens + 1
        return lambda store: self._prompts.prefix(request_id, tokens, store)

    def _no_store(self) -> OwnerGoneError:
        return OwnerGoneError(f"there is no store at {self._orders.socket!r}: {self._access.why_not}")

    def wait_for_layer(self, layer_name: str) -> None:
        """From `wait_for_layer_load`: what a layered load of this step brings to the layer is there, or has failed."""
        if self._layered is not None:
            self._layered.wait_for(layer_name)

    def save_layer(self, layer_name: str) -> None:
        """From `save_kv_layer`: the layer's forward has been asked for. What has no such call is put by `end_step`."""
        if self._saves_by_layer and self._saver is not None:
            self._saver.put_layer(layer_name)

    def end_step(self) -> None:
        """From `wait_for_save`: carry out the save orders; when it returns, the engine may overwrite its pages."""
        orders, self._orders = self._orders, _NOTHING
        self._end_layered()
        # vLLM comes here also while an error of the forward pass is on its way up: its pages hold nobody's cache.
        if sys.exc_info()[0] is not None:
            if self._saver is not None:
                self._saver.abort("the forward failed")
            return
        if not orders.saves:
            return
        saver = self._needs(self._saver)
        took_s = time.monotonic() - self._began_s
        saver.save(orders.saves, self._store(orders.socket), took_s, refused=self._computed_from_nothing(orders.saves))
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
            finished.add(end.order.request_id)
            if end.error is not None:
                failed.add(end.order.request_id)
            self._count_load(end)
        return finished, failed

    def load_errors(self) -> set[int]:
        """Pages that layered loads of this step's forward left unfilled: what it computed from them is nothing."""
        unfilled, self._unfilled = self._unfilled, set()
        return unfilled

    def _end_layered(self) -> None:
        for end in self._layered.end() if self._layered is not None else ():
            self._count_load(end)
            if end.error is not None:
                self._unfilled |= self._needs(self._pages).pages_filled(end.order)

    def _computed_from_nothing(self, orders: Sequence[SaveOrder]) -> set[str]:
        """Requests that began this step behind pages that were not filled; they may be others than was loaded for."""
        if not self._unfilled:
            return set()
        (page_tokens,) = {group.page_tokens for group in self._mapping.groups}
        return {
            order.request_id
            for order in orders
            for table in order.tables
            if not self._unfilled.isdisjoint(table[: -(-order.start // page_tokens)])
        }

    def _count_load(self, end: LoadEnd) -> None:
        order, counters = end.order, self._report.counters
        counters.loads += 1
        counters.load_s += end.seconds
        self._report.loads_done[order.request_id, order.attempt] = 0 if end.error else order.tokens
        if end.error is not None:
            counters.loads_failed += 1
            self._failure(end.error)
        else:
            counters.loaded_tokens += order.tokens - order.start
            counters.loaded_bytes += end.size_bytes

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
        if self._layered is not None and not self._layered.close(CLOSE_DEADLINE_S):
            logger.warning("a step's load still copied after %g s; its thread ends with it", CLOSE_DEADLINE_S)
        if self._saver is not None and not self._saver.close(CLOSE_DEADLINE_S):
            logger.warning("a save still copied after %g s; its thread ends with the process", CLOSE_DEADLINE_S)
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
