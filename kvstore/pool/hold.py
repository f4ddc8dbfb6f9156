"""Holding a resume point in place while it is read."""

from __future__ import annotations

import logging
import math
import threading
from functools import cached_property
from typing import TYPE_CHECKING

from kvstore.errors import LeaseError, LeaseGoneError, StoreClosedError
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.seam import BaseHold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvstore._native import HeldRows
    from kvstore.pool.held import HeldRecord, PlacedRows
    from kvstore.pool.path import HandOver, NodePath
    from kvstore.pool.pool import Pool


LOG = logging.getLogger("kvstore.pool")


class Hold(BaseHold):
    """Records that are neither evicted nor reused before `release`. Any thread.

    Attributes:
        path: the resume point's nodes.
        salt: whose prefix it is.
        handover: what waits there for a decode process.
        placed: its records as arrays, in the order of `records`.
    """

    def __init__(
        self,
        pool: Pool,
        path: NodePath,
        salt: bytes,
        held: HeldRows,
        placed: PlacedRows,
        handover: HandOver | None,
        losses: int,
    ) -> None:
        self.path = path
        self.salt = salt
        self.handover = handover
        self.placed = placed
        self.held = held
        self.losses = losses
        """How often records had gone that might be held when these were last known to be there."""
        self.ends_s = math.inf
        """When it has been held for too long, by the pool's clock."""
        self._pool = pool
        self._has_expired = False
        self._lock = threading.Lock()
        self._is_released = False

    @cached_property
    def records(self) -> tuple[HeldRecord, ...]:
        """The records one by one, by group, span and node: the order in which a model needs them."""
        return self.placed.held()

    @cached_property
    def arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        return RecordArrays.of_rows(self.placed.rows), self.placed.addresses

    @property
    def _is_due(self) -> bool:
        return self.ends_s != math.inf and self._pool.now_s() >= self.ends_s

    @property
    def pool(self) -> Pool:
        return self._pool

    def check(self) -> None:
        """Raise unless the records are still held.

        Raises:
            StoreClosedError: the pool is closed. LeaseError: the hold was released.
            LeaseGoneError: it was held for too long.
        """
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed, and its leases with it; open it again")
        if self._is_due:
            self.expire()
        if self._has_expired:
            raise expired_lease(self._pool, self.path)
        if self._is_released:
            raise LeaseError("the lease was released; its views are no longer valid. Read the match again")

    def release(self) -> None:
        self._end()

    def expire(self) -> None:
        """It was held for longer than the store bears."""
        if self._end(is_expired=True):
            self._pool.expired(leases=1)
            LOG.warning("a lease of %d tokens was held for too long and has expired", self.path.tokens)

    def _end(self, *, is_expired: bool = False) -> bool:
        if self._pool.is_closed:
            return False
        with self._lock:
            if self._is_released:
                return False
            self._has_expired = is_expired
            self._is_released = True
        self._pool.release(self)
        return True

    def release_later(self) -> None:
        if not self._is_released:
            self._pool.settle_later(self.release)


def expired_lease(pool: Pool, path: NodePath) -> LeaseGoneError:
    """What who holds a lease for too long is told."""
    return LeaseGoneError(
        f"the lease of {path.tokens} tokens expired: it was held for longer than the "
        f"{pool.limits.lease_max_s:g} s that the store was opened with (StoreLimits.lease_max_s), and "
        "the records may have been reused; match again"
    )
