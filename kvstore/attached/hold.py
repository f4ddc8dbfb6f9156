"""A resume point that the owner keeps in place for this process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.errors import LeaseError, LeaseGoneError, StoreClosedError
from kvstore.pool import BaseHold, HeldRecord

if TYPE_CHECKING:
    from kvstore.attached.finding import Held
    from kvstore.attached.pool import AttachedPool
    from kvstore.pool import NodePath


class AttachedHold(BaseHold):
    """As `kvstore.pool.Hold`, with an end: it expires when this process is silent for too long, or holds one too long.

    `check` after copying says whether what was copied was still held.
    """

    def __init__(self, pool: AttachedPool, path: NodePath, held: Held, records: tuple[HeldRecord, ...]) -> None:
        self.path = path
        self._records = records
        self.handover = held.handover
        self.number = held.number
        self.salt = held.salt
        self._term = held.term
        self._pool = pool
        self._lock = threading.Lock()
        self._is_released = False

    @property
    def records(self) -> tuple[HeldRecord, ...]:
        return self._records

    @property
    def pool(self) -> AttachedPool:
        return self._pool

    def check(self) -> None:
        self._pool.check_open()
        if self._is_released:
            raise LeaseError("the lease was released; its views are no longer valid. Read the match again")
        if self._pool.term != self._term:
            self._pool.check_open()  # closing the pool ends the term as well, and is the better reason
            raise LeaseGoneError(
                f"the lease of {self.path.tokens} tokens expired: this process was silent for more than "
                f"{self._pool.silence_s:g} s, or held a lease for longer than its owner bears; the owner has reused "
                "the records. Match again"
            )

    def release(self) -> None:
        if self._pool.is_closed:
            return
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        try:
            self._pool.let_go(self.number, is_current=self._pool.term == self._term)
        except StoreClosedError:
            return  # with the owner went what it held for this process

    def release_later(self) -> None:
        if not self._is_released:
            self._pool.settle_later(self.release)
