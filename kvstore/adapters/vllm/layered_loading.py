"""Loads within a step: each layer is waited for where its forward begins, while the next ones are still being copied.

Only for models of one cache group of full attention. States are taken over before a step's loads begin, so what is
loaded then comes too late. And vLLM recovers from a load that failed within a step by page ids, which it can tell apart
where there is one group, and by computing again from the first of these pages on, for which a window lacks the pages
before.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.background import Background
from kvstore.adapters.vllm.loading import LoadEnd, read_resume_point
from kvstore.clock import Deadline
from kvstore.errors import ConfigError, KVStoreError, LoadFailedError
from kvstore.limits import DEVICE_COPY_DEADLINE_S, VLLM_LAYERED_LOAD_DEADLINE_S
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.adapters.paged import EngineGroup
    from kvstore.adapters.vllm.metadata import LoadOrder
    from kvstore.adapters.vllm.registering import EnginePages
    from kvstore.pool import Prompt
    from kvstore.store import Lease, Store
    from kvstore.tiers.gpu.device import Mark

    Prompts = Callable[[Store], Prompt]

logger = logging.getLogger(__name__)


def check_may_be_layered(groups: Sequence[EngineGroup], table_count: int) -> None:
    """Whether loads of these cache groups may be waited for within a step.

    Args:
        table_count: tables of pages that the engine has for a request.

    Raises:
        ConfigError: they must not.
    """
    others = [group for group in groups if group.rule is not ReuseRule.ATTENTION]
    if others:
        what = "states" if any(group.is_state for group in others) else "sliding windows"
        raise ConfigError(
            f"load = 'layered', and the model has {what} (layer {others[0].names[0]!r}): vLLM would compute with what "
            "is not there. Leave it out: loads then run beside the steps"
        )
    if table_count != 1:
        raise ConfigError(
            f"load = 'layered', and the model has {table_count} cache groups: vLLM cannot tell whose page a load left "
            "unfilled. Leave it out: loads then run beside the steps"
        )


class _Load:
    """One order of a step.

    Attributes:
        ready: behind these marks the layers lie in their pages, by the engine's names.
        waited: layers whose forward began behind their load.
        is_over: the thread does nothing for it any more.
    """

    def __init__(self, order: LoadOrder, prompt: Prompts) -> None:
        self.order = order
        self.prompt = prompt
        self.began_s = time.monotonic()
        self.ready: dict[str, Mark] = {}
        self.waited: set[str] = set()
        self.is_over = False
        self.error: BaseException | None = None
        self.size_bytes = 0
        self.seconds = 0.0


class LayeredLoader:
    """Carries the load orders of one step out at a time. The engine's thread calls.

    Args:
        pages: the engine's pages.
        failed: told of a store that failed, by the thread that noticed.
        deadline_s: how long the loads of a step may take.

    Raises:
        ConfigError: as `check_may_be_layered`.
    """

    def __init__(
        self,
        pages: EnginePages,
        failed: Callable[[Store, BaseException], None],
        *,
        deadline_s: float = VLLM_LAYERED_LOAD_DEADLINE_S,
    ) -> None:
        check_may_be_layered(pages.groups, pages.table_count)
        self._pages = pages
        self._names = frozenset(pages.names)
        self._failed = failed
        self._deadline_s = deadline_s
        self._deadline = Deadline.after(deadline_s)
        self._changed = threading.Condition()
        self._loads: list[_Load] = []
        self._ended: list[LoadEnd] = []
        self._thread = Background("kvstore-load-layers")
        self._stream: Any = None
        self._has_stream = False

    def begin(self, orders: Sequence[tuple[LoadOrder, Prompts]], store: Store) -> None:
        """Before the forward: load behind everything that the engine's current stream has been asked.

        Args:
            orders: each with what makes the prompt up to one token past its length, for a store.
        """
        for order, _ in orders:
            # What the forward writes behind the last token must not be zeroed afterwards.
            self._pages.clear_rests(order)
        loads = [_Load(order, prompt) for order, prompt in orders]
        self._loads = loads
        self._deadline = Deadline.after(self._deadline_s)
        self._thread.do(partial(self._run, loads, store, self._pages.marks(), self._deadline))

    def refuse(self, order: LoadOrder, error: BaseException) -> None:
        """An order that cannot begin: it has failed."""
        self._ended.append(LoadEnd(order, error, 0, 0.0))

    def wait_for(self, name: str) -> None:
        """The forward of a layer is next: what it reads is there, or the step's loads have failed.

        Args:
            name: the engine's, of the layer.
        """
        if not self._loads or name not in self._names:
            return
        for load in self._loads:
            with self._changed:
                self._changed.wait_for(
                    lambda load=load: name in load.ready or load.is_over,  # type: ignore[misc]
                    self._deadline.remaining_s(),
                )
                mark = load.ready.get(name)
            if mark is not None:
                self._pages.wait_in_forward(mark)
                load.waited.add(name)

    def end(self) -> list[LoadEnd]:
        """Behind the forward: how the loads have ended. Nothing moves into pages any longer."""
        if self._loads:
            while not self._thread.wait(Deadline.after(DEVICE_COPY_DEADLINE_S)):
                logger.warning("the loads of a step still copy after %g s", DEVICE_COPY_DEADLINE_S)
            loads, self._loads = self._loads, []
            self._ended += [self._end_of(load) for load in loads]
        ended, self._ended = self._ended, []
        return ended

    def _end_of(self, load: _Load) -> LoadEnd:
        error = load.error
        missed = self._names - load.waited
        if error is None and missed:
            error = LoadFailedError(
                f"the forward of layer {min(missed)!r} did not wait for its load: it was late, or vLLM did not ask"
            )
        return LoadEnd(load.order, error, load.size_bytes, load.seconds)

    def close(self, deadline_s: float) -> bool:
        """False if something still copied at the deadline."""
        return self._thread.close(deadline_s)

    # In the thread

    def _run(self, loads: Sequence[_Load], store: Store, after: Sequence[Mark], deadline: Deadline) -> None:
        leases: dict[_Load, Lease] = {}
        try:
            if not self._has_stream:
                self._stream, self._has_stream = self._pages.stream(), True
            for load in loads:
                with self._failing(load, store):
                    tokens = load.order.tokens
                    lease = read_resume_point(store, load.prompt(store), tokens, self._pages.shard, deadline)
                    leases[load], load.size_bytes = lease, lease.size_bytes
            for name in self._pages.names:
                for load, lease in leases.items():
                    if load.error is None:
                        with self._failing(load, store):
                            mark = self._pages.load_layer(lease, load.order, name, self._stream, after, deadline)
                            with self._changed:
                                load.ready[name] = mark
                                self._changed.notify_all()
            for load in leases:
                if load.error is None:
                    with self._failing(load, store):
                        load.ready[self._pages.names[-1]].wait(deadline, f"loading {load.order.tokens} tokens")
        finally:
            for lease in leases.values():
                lease.release()
            with self._changed:
                for load in loads:
                    load.is_over = True
                    load.seconds = time.monotonic() - load.began_s
                self._changed.notify_all()

    @contextmanager
    def _failing(self, load: _Load, store: Store) -> Iterator[None]:
        """What goes wrong with one load ends this load alone."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, KVStoreError):
                tokens, request_id = load.order.tokens, load.order.request_id
                logger.exception("loading %d tokens for request %s failed", tokens, request_id)
            self._failed(store, error)
            self._pages.settle(self._stream)
            with self._changed:
                load.error = error
                load.is_over = True
                self._changed.notify_all()
