"""Reserved records that this process fills and the owner commits."""

from __future__ import annotations

import threading
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING

from kvstore.attached.frames import Kind
from kvstore.attached.messages import pack_number
from kvstore.attached.writing import AbortRequest, CommitRequest
from kvstore.errors import KVStoreError, LeaseGoneError, StoreClosedError, WriteError
from kvstore.pool import BaseTransaction
from kvstore.pool.seam import incomplete
from kvstore.pool.transaction import frame_reserved

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.attached.pool import AttachedPool
    from kvstore.attached.writing import Begun
    from kvstore.pool import HandOver, HeldRecord, JointName, NodePath, TransactionRecord
    from kvstore.pool.seam import CommitEnd


class AttachedTransaction(BaseTransaction):
    """As `kvstore.pool.Transaction`. Bytes and framing are written here, into shared memory; one message commits.

    The owner keeps the slots in quarantine after the end until it is told that nothing moves in them any more, or
    until this process is known to be gone.
    """

    def __init__(
        self,
        pool: AttachedPool,
        path: NodePath,
        begun: Begun,
        records: tuple[TransactionRecord, ...],
        held: tuple[HeldRecord, ...],
        joint: JointName | None,
    ) -> None:
        self.path = path
        self._records = records
        self._held = held
        self.number = begun.number
        self._joint = joint
        self._pool = pool
        self.term = begun.term
        self._changed = threading.Condition()
        self._costs_us: dict[int, int] = {}
        self._told: set[int] = set()
        self._movers = 0
        self._is_committing = False
        self._is_still = False
        self._end_reason: str | None = None

    def __del__(self) -> None:
        if getattr(self, "_end_reason", "it was never begun") is None:
            self._pool.settle_later(partial(self.abort, "it was dropped without a commit"))

    @property
    def records(self) -> tuple[TransactionRecord, ...]:
        return self._records

    @property
    def held(self) -> tuple[HeldRecord, ...]:
        return self._held

    @property
    def joint(self) -> JointName | None:
        return self._joint

    @property
    def is_open(self) -> bool:
        return self._end_reason is None

    @contextmanager
    def moving(self) -> Iterator[None]:
        self._pool.check_open()  # not under the lock, which a fork may have left taken
        with self._changed:
            if self._is_committing:
                # The commit promised that nothing moves; whether it ends this writer is known soon.
                self._changed.wait_for(lambda: not self._is_committing, self._pool.deadline_s)
            self._check_open()
            if self._is_committing:
                raise WriteError("this writer is being committed; put everything before that")
            self._movers += 1
        try:
            yield
        finally:
            with self._changed:
                self._movers -= 1
                self._changed.notify_all()
            self._tell_still()

    def seal(self, index: int, cost_us: int = 0) -> None:
        self.seal_all([index], [cost_us])

    def seal_all(self, indices: Sequence[int], costs_us: Sequence[int]) -> None:
        self._pool.check_open()
        with self._changed:
            self._check_open()
            costs = {i: cost for i, cost in zip(indices, costs_us, strict=True) if i not in self._costs_us}
            frame_reserved(self.records, costs)
            self._costs_us.update(costs)

    def is_sealed(self, index: int) -> bool:
        return index in self._costs_us

    def commit(self, upto_tokens: int | None = None, handover: HandOver | None = None) -> None:
        if self._joint is not None:
            raise WriteError("this writer is a party of a joint commit, which commits whole prompts: commit_jointly")
        request, is_final = self._begin_commit(upto_tokens, handover)
        try:
            self._pool.request(Kind.COMMIT, request.pack())
        except BaseException as error:
            self._end_commit(request, error, is_final=is_final)
            raise
        self._end_commit(request, None, is_final=is_final)

    def commit_jointly(self, handover: HandOver | None, ended: CommitEnd) -> None:
        if self._joint is None:
            raise WriteError("this writer is no party of a joint commit; name one with joint= when it begins")
        request, _ = self._begin_commit(None, handover)

        def end(answer: memoryview | None, error: KVStoreError | None) -> None:
            del answer
            self._end_commit(request, error, is_final=True)
            ended(error)

        try:
            self._pool.ask(Kind.COMMIT, request.pack(), end)
        except BaseException as error:
            self._end_commit(request, error, is_final=True)
            raise

    def _begin_commit(self, upto_tokens: int | None, handover: HandOver | None) -> tuple[CommitRequest, bool]:
        is_final = upto_tokens is None or upto_tokens >= self.path.tokens
        if handover is not None and not is_final:
            raise WriteError("a hand-over goes with the commit of the whole prompt, not of a part of it")
        self._pool.check_open()
        with self._changed:
            self._check_open()
            if self._is_committing:
                raise WriteError("this writer is being committed already")
            self._check_complete(upto_tokens)
            seals = tuple((index, cost) for index, cost in self._costs_us.items() if index not in self._told)
            is_still = is_final and not self._movers
            self._is_committing = is_final
            upto = None if is_final else upto_tokens
            return CommitRequest(self.number, upto, is_still, handover, seals), is_final

    def _check_complete(self, upto_tokens: int | None) -> None:
        for index, record in enumerate(self.records):
            if index not in self._costs_us and (upto_tokens is None or record.header.end_tokens <= upto_tokens):
                raise incomplete(record)

    def _end_commit(self, request: CommitRequest, error: BaseException | None, *, is_final: bool) -> None:
        is_refused = error is not None and self._joint is None and not isinstance(error, LeaseGoneError)
        with self._changed:
            self._is_committing = False
            self._changed.notify_all()
            if error is None:
                self._told.update(index for index, _ in request.seals)
            if (error is None and is_final) or (error is not None and not is_refused):
                # A writer whose basis was damaged, or whose joint commit failed, has ended at the owner too.
                self._is_still = self._is_still or request.is_still
                if error is None or self._end_reason is None:
                    self._end_reason = "it was committed" if error is None else f"it was aborted: {error}"
        if not self.is_open:
            if not self._is_still:
                self._pool.soon(self._tell_still)  # this may be the connection's reader, which must not send
            self._pool.forget(self.number)

    def abort(self, reason: str) -> None:
        if self._pool.is_closed:
            return
        with self._changed:
            if self._end_reason is not None:
                return
            self._end_reason = f"it was aborted: {reason}"
            is_still = not self._movers
            self._is_still = self._is_still or is_still
        with suppress(StoreClosedError):  # with the owner went what it had reserved
            self._pool.post(Kind.ABORT, AbortRequest(self.number, is_still, reason).pack())
        self._pool.forget(self.number)

    def expire(self, reason: str) -> None:
        """The owner gave this writer up."""
        with self._changed:
            if self._end_reason is None:
                self._end_reason = f"it was aborted: {reason}"
        self._pool.soon(self._tell_still)

    def come_to_rest(self, deadline_s: float) -> bool:
        """Wait until nothing moves any more, with the pool closed: nothing begins either."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._movers, deadline_s)

    def _tell_still(self) -> None:
        with self._changed:
            if self._end_reason is None or self._movers or self._is_still:
                return
            self._is_still = True
        with suppress(StoreClosedError):
            self._pool.post(Kind.STILL, pack_number(self.number))

    def _check_open(self) -> None:
        self._pool.check_open()
        if self._end_reason is None and self._pool.term != self.term:
            self._pool.check_open()
            self._end_reason = f"it was aborted: {self._pool.silence_reason}"
        if self._end_reason is not None:
            raise WriteError(f"this writer has ended: {self._end_reason}")
