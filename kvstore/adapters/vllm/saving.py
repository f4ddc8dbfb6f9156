"""Saves at the end of a step: a writer per request, which does not outlive the step.

What the pages hold is put right behind the forward pass, before the next one can overwrite states, or the engine can
give pages to another request. So nothing is left open when a request is aborted or preempted.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.adapters.vllm.metadata import SaveOrder
    from kvstore.adapters.vllm.registering import EnginePages
    from kvstore.handle import Handle
    from kvstore.pool import Prompt
    from kvstore.store import Store, Writer

logger = logging.getLogger(__name__)

SAVE_DEADLINE_S = 10.0
"""How long the saves of a step may keep the engine, all of them together."""

JOINT_DEADLINE_S = 2.0
"""How long ranks wait for one another. They run in step; one that does not come has lost the store, or failed."""


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


@dataclass(frozen=True)
class _Committing:
    """A save whose commit waits for the other ranks. The writer lives as long as this does."""

    order: SaveOrder
    writer: Writer
    handle: Handle[None]
    tokens: int
    size_bytes: int
    began_s: float


class Saver:
    """Carries a step's save orders out. The engine's thread.

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
        deadline_s: float = SAVE_DEADLINE_S,
        joint_deadline_s: float = JOINT_DEADLINE_S,
    ) -> None:
        self._pages = pages
        self._prompt = prompt
        self._failed = failed
        self._deadline_s = deadline_s
        self._joint_deadline_s = joint_deadline_s
        self._ended: list[SaveEnd] = []

    def save(self, orders: Sequence[SaveOrder], store: Store | None, step_s: float) -> None:
        """Put and commit all of them; what fails is a miss later on, and never an error of the engine.

        Args:
            step_s: how long the step took, to say what the tokens cost.
        """
        deadline = Deadline.after(self._deadline_s)
        computed = sum(order.stop - order.start for order in orders)
        committing: deque[_Committing] = deque()
        for order in orders:
            began_s = time.monotonic()
            if store is None:
                self._ended.append(SaveEnd(order, 0, DeadlineError("there is no store"), 0, 0, 0.0))
                continue
            try:
                cost_s = step_s * (order.stop - order.start) / max(1, computed)
                committing.append(self._put(order, store, cost_s, deadline, began_s))
            except Exception as error:
                self._end_failed(order, store, error, began_s)
        if store is not None:
            self._settle(committing, store)

    def _put(self, order: SaveOrder, store: Store, cost_s: float, deadline: Deadline, began_s: float) -> _Committing:
        end = max(order.resume_at)
        if deadline.has_passed:
            raise DeadlineError(f"{self._deadline_s:g} s were spent on the saves of this step")
        prompt = self._prompt(order.request_id, end, store)
        shard = self._pages.shard
        joint = order.joint if shard.count > 1 else None
        with ExitStack() as undoing:
            writer = store.write(prompt, resume_at=order.resume_at, shard=shard, joint=joint)
            undoing.enter_context(writer)
            tokens, size_bytes = _lacking_tokens(writer), writer.size_bytes
            if size_bytes:
                self._pages.save(writer, order, cost_s=cost_s, deadline=deadline)
            handle = writer.commit_async()
            undoing.pop_all()
        return _Committing(order, writer, handle, tokens, size_bytes, began_s)

    def _settle(self, committing: deque[_Committing], store: Store) -> None:
        deadline = Deadline.after(self._joint_deadline_s)
        while committing:
            save = committing.popleft()
            try:
                try:
                    save.handle.result(deadline.remaining_s())
                except DeadlineError:
                    save.handle.cancel(f"the other ranks did not come within {self._joint_deadline_s:g} s")
                    save.handle.result(self._joint_deadline_s)
            except Exception as error:
                self._end_failed(save.order, store, error, save.began_s)
                continue
            seconds = time.monotonic() - save.began_s
            tokens = max(save.order.resume_at)
            self._ended.append(SaveEnd(save.order, tokens, None, save.tokens, save.size_bytes, seconds))

    def _end_failed(self, order: SaveOrder, store: Store, error: Exception, began_s: float) -> None:
        self._failed(store, error)
        if not isinstance(error, KVStoreError):
            logger.error("saving request %s failed", order.request_id, exc_info=error)
        self._ended.append(SaveEnd(order, 0, error, 0, 0, time.monotonic() - began_s))

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
