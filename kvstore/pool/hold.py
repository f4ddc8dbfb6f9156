"""Holding a resume point in place while it is read."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING

from kvstore.errors import LeaseError, StoreClosedError
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.seam import BaseHold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from kvstore._native import HeldRows
    from kvstore.pool.held import HeldRecord, PlacedRows
    from kvstore.pool.path import HandOver, NodePath
    from kvstore.pool.pool import Pool


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
        damages: int,
    ) -> None:
        self.path = path
        self.salt = salt
        self.handover = handover
        self.placed = placed
        self.held = held
        self.damages = damages
        """How often damage had been found when the records were last known to be good."""
        self._pool = pool
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
    def is_released(self) -> bool:
        return self._is_released

    @property
    def pool(self) -> Pool:
        return self._pool

    def check(self) -> None:
        """Raise unless the records are still held.

        Raises:
            StoreClosedError: the pool is closed. LeaseError: the hold was released.
        """
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed, and its leases with it; open it again")
        if self._is_released:
            raise LeaseError("the lease was released; its views are no longer valid. Read the match again")

    def release(self) -> None:
        if self._pool.is_closed:
            return
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self._pool.release(self)

    def release_later(self) -> None:
        if not self._is_released:
            self._pool.settle_later(self.release)
