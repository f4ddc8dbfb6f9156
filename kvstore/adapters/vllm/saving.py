"""Saves of a step: a writer per request, which does not outlive the step.

What the pages hold is put right behind the forward pass, before the next one can overwrite states, or the engine can
give pages to another request; or, layer by layer, while the forward goes on. So nothing is left open when a request is
aborted or preempted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.background import Background
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, LoadFailedError
from kvstore.limits import VLLM_JOINT_DEADLINE_S, VLLM_SAVE_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kvstore.adapters.vllm.metadata import SaveOrder
    from kvstore.adapters.vllm.registering import EnginePages
    from kvstore.handle import Handle
    from kvstore.pool import Prompt
    from kvstore.store import Store, Writer
    from kvstore.tiers.gpu.device import Mark

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveEnd:
    """How a save ended.

    Attributes:
        tokens: length that is a resume point of the store; 0 if it failed.
        error: why it failed; None if it did not.
        saved_tokens, size_bytes: what the store lacked.
        seconds: what it kept the engine for.
    """

    order: SaveOrder
    tokens: int
    error: BaseException | None
    saved_tokens: int
    size_bytes: int
    seconds: float


class _Save:
    """A save whose writer is open. It lives as long as its step.

    Attributes:
        tokens, size_bytes: what the store lacked.
        put: the engine's names of the layers that were put already.
        error: why it fails; None as long as it does not.
        seconds: what it has kept the engine for.
    """

    def __init__(self, order: SaveOrder, store: Store, writer: Writer) -> None:
        self.order = order
        self.store = store
        self.writer = writer
        self.tokens, self.size_bytes = _lacking_tokens(writer), writer.size_bytes
        self.put: set[str] = set()
        self.error: Exception | None = None
        self.seconds = 0.0
        self.handle: Handle[None] | None = None


class Saver:
    """Carries a step's save orders out. The engine's thread.

    All at once behind the forward: `save`. Or layer by layer within it: `begin`, `put_layer` behind each layer's
    forward, and `save` puts what is left, such as states, which no layer tells of.

    Args:
        pages: the engine's pages.
        prompt: makes the first tokens of a request a prompt of a store.
        failed: told of a store that failed.
    """

    def __init__(
        self,
        pages: EnginePages,
        prompt: Callable[[str, int, Store], Prompt],
        failed: Callable[[Store, BaseException], None],
        *,
        deadline_s: float = VLLM_SAVE_DEADLINE_S,
        joint_deadline_s: float = VLLM_JOINT_DEADLINE_S,
    ) -> None:
        self._pages = pages
        self._names = frozenset(pages.names)
        self._prompt = prompt
        self._failed = failed
        self._deadline_s = deadline_s
        self._joint_deadline_s = joint_deadline_s
        self._ended: list[SaveEnd] = []
        # Saves that began in this step, by request: None for one that has failed already.
        self._begun: dict[str, _Save | None] = {}
        self._layers = Background("kvstore-save-layers")
        self._stream: Any = None
        self._has_stream = False
        self._costed_at_s = 0.0
        self._costed_s = 0.0

    # Layer by layer

    def begin(self, orders: Sequence[SaveOrder], store: Store) -> None:
        """A step begins: open the writers whose layers `put_layer` puts."""
        for order in orders:
            began_s = time.monotonic()
            try:
                save = self._open(order, store)
            except Exception as error:
                self._begun[order.request_id] = None
                self._end_failed(order, store, error, time.monotonic() - began_s)
            else:
                self._begun[order.request_id] = save
                save.seconds = time.monotonic() - began_s
        self._costed_at_s, self._costed_s = time.monotonic(), 0.0

    def put_layer(self, name: str) -> None:
        """The forward of a layer has been asked for: put what it leaves, behind it, without waiting.

        Args:
            name: the engine's, of the layer.
        """
        if not self._begun or name not in self._names:
            return
        now_s = time.monotonic()
        step_s = now_s - self._costed_at_s
        self._costed_s += step_s
        saves = [save for save in self._begun.values() if save is not None and save.size_bytes]
        if saves:
            for save in saves:
                save.put.add(name)
            self._layers.do(partial(self._put_layer, saves, name, self._pages.marks(), step_s))
        self._costed_at_s = time.monotonic()
        for save in saves:
            save.seconds += (self._costed_at_s - now_s) / len(saves)

    def _put_layer(self, saves: Sequence[_Save], name: str, after: Sequence[Mark], step_s: float) -> None:
        """In the thread."""
        if not self._has_stream:
            self._stream, self._has_stream = self._pages.stream(), True
        computed = sum(save.order.stop - save.order.start for save in saves)
        for save in saves:
            if save.error is not None:
                continue
            try:
                cost_s = step_s * (save.order.stop - save.order.start) / max(1, computed)
                deadline = Deadline.after(self._deadline_s)
                self._pages.save(
                    save.writer,
                    save.order,
                    cost_s=cost_s,
                    deadline=deadline,
                    names=(name,),
                    stream=self._stream,
                    after=after,
                )
            except Exception as error:
                save.error = error

    def abort(self, reason: str) -> None:
        """Give up what `begin` has begun: its step failed."""
        if not self._begun:
            return
        begun, self._begun = self._begun, {}
        self._layers.drop()
        for save in begun.values():
            if save is not None:
                save.writer.abort(reason)
        self._layers.wait(Deadline.after(self._deadline_s))

    def close(self, deadline_s: float) -> bool:
        """Give up what has begun; False if something still copied at the deadline."""
        self.abort("the worker ends")
        return self._layers.close(deadline_s)

    # Behind the forward

    def save(
        self, orders: Sequence[SaveOrder], store: Store | None, step_s: float, *, refused: Collection[str] = ()
    ) -> None:
        """Put and commit all of them; what fails is a miss later on, and never an error of the engine.

        Args:
            step_s: how long the step took, to say what the tokens cost.
            refused: requests whose tokens must not be saved: they were computed from pages that hold nothing.
        """
        deadline = Deadline.after(self._deadline_s)
        computed = sum(order.stop - order.start for order in orders)
        committing: deque[_Save] = deque()
        begun, self._begun = self._begun, {}
        if begun:
            step_s = max(0.0, step_s - self._costed_s)
            self._wait_for_layers(begun, deadline)
        for order in orders:
            began_s = time.monotonic()
            save, cost_s = None, step_s * (order.stop - order.start) / max(1, computed)
            try:
                if order.request_id in begun:
                    save = begun.pop(order.request_id)
                    if save is None:
                        continue
                elif store is None:
                    raise DeadlineError("there is no store")
                if order.request_id in refused:
                    raise LoadFailedError(f"what request {order.request_id} was computed from could not be loaded")
                if save is None:
                    assert store is not None
                    save = self._open(order, store)
                self._put_rest(save, cost_s, deadline)
                save.handle = save.writer.commit_async()
            except Exception as error:
                seconds = time.monotonic() - began_s
                if save is not None:
                    seconds += save.seconds
                    save.writer.abort(f"{type(error).__name__}: {error}")
                self._end_failed(order, save.store if save is not None else store, error, seconds)
                continue
            save.seconds += time.monotonic() - began_s
            committing.append(save)
        for left in begun.values():
            if left is not None:
                left.writer.abort("its step does not save it")
        self._settle(committing)

    def _wait_for_layers(self, begun: dict[str, _Save | None], deadline: Deadline) -> None:
        began_s = time.monotonic()
        if not self._layers.wait(deadline):
            self._layers.drop()
            for save in begun.values():
                if save is not None and save.error is None:
                    save.error = DeadlineError(f"the layers of a step were not put within {self._deadline_s:g} s")
        waited_s = time.monotonic() - began_s
        for save in begun.values():
            if save is not None:
                save.seconds += waited_s / len(begun)

    def _open(self, order: SaveOrder, store: Store) -> _Save:
        prompt = self._prompt(order.request_id, max(order.resume_at), store)
        shard = self._pages.shard
        joint = order.joint if shard.count > 1 else None
        return _Save(order, store, store.write(prompt, resume_at=order.resume_at, shard=shard, joint=joint))

    def _put_rest(self, save: _Save, cost_s: float, deadline: Deadline) -> None:
        """Put what `put_layer` has not."""
        if save.error is not None:
            raise save.error
        if deadline.has_passed:
            raise DeadlineError(f"{self._deadline_s:g} s were spent on the saves of this step")
        names = self._names - save.put if save.put else None
        if save.size_bytes and names != frozenset():
            self._pages.save(save.writer, save.order, cost_s=cost_s, deadline=deadline, names=names)

    def _settle(self, committing: deque[_Save]) -> None:
        """Wait for commits, which wait for the other ranks."""
        deadline = Deadline.after(self._joint_deadline_s)
        while committing:
            save = committing.popleft()
            assert save.handle is not None
            began_s = time.monotonic()
            try:
                try:
                    save.handle.result(deadline.remaining_s())
                except DeadlineError:
                    save.handle.cancel(f"the other ranks did not come within {self._joint_deadline_s:g} s")
                    save.handle.result(self._joint_deadline_s)
            except Exception as error:
                self._end_failed(save.order, save.store, error, save.seconds + time.monotonic() - began_s)
                continue
            seconds = save.seconds + time.monotonic() - began_s
            tokens = max(save.order.resume_at)
            self._ended.append(SaveEnd(save.order, tokens, None, save.tokens, save.size_bytes, seconds))

    def _end_failed(self, order: SaveOrder, store: Store | None, error: Exception, seconds: float) -> None:
        if store is not None:
            self._failed(store, error)
        if not isinstance(error, KVStoreError):
            logger.error("saving request %s failed", order.request_id, exc_info=error)
        self._ended.append(SaveEnd(order, 0, error, 0, 0, seconds))

    def take_ended(self) -> list[SaveEnd]:
        """Saves that have ended since the last call."""
        if not self._ended:
            return []
        ended, self._ended = self._ended, []
        return ended


def _lacking_tokens(writer: Writer) -> int:
    """How many tokens at the end of the prompt the store has not all of."""
    stop = len(writer.prompt)
    firsts = [writer.first_reserved(group, 0, stop) for group in writer.spec.attention_groups]
    return stop - min(firsts, default=stop)
