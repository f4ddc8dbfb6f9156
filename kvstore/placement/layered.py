"""Holding a resume point that is still being loaded."""

from __future__ import annotations

import logging
import math
import threading
from functools import cached_property
from typing import TYPE_CHECKING

from kvstore.errors import LeaseError, StoreClosedError
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.hold import expired_lease
from kvstore.pool.seam import BaseHold

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    import numpy as np
    import numpy.typing as npt

    from kvstore.clock import Deadline
    from kvstore.placement.load import Load
    from kvstore.pool import BasePool, HeldRecord, Hold
    from kvstore.pool.held import PlacedRows
    from kvstore.pool.pool import Pool

LOG = logging.getLogger("kvstore.placement")


class LayeredHold(BaseHold):
    """Records of which some are still on their way; `wait_for` says when a layer's are there. Any thread.

    It keeps the slots of the load's transaction pinned, before and after its commit.

    Attributes:
        placed: its records as arrays, loaded or not.

    Args:
        pinned: what `Load.pinned` gave.
        hold_here: holds the same records once they are committed.
    """

    def __init__(self, pool: Pool, load: Load, pinned: ExitStack, hold_here: Callable[[], Hold]) -> None:
        self.path = load.path
        self.salt = load.salt
        self.handover = None
        self._pool = pool
        self._load = load
        self._lock = threading.Lock()
        self._is_released = False
        self.ends_s = math.inf
        """When it has been held for too long, by the pool's clock."""
        self._has_expired = False
        self._pinned = pinned
        self._hold_here = hold_here
        self._own: Hold | None = None
        self.placed: PlacedRows = load.placed()

    @property
    def records(self) -> tuple[HeldRecord, ...]:
        return self._records if self._own is None else self._own.records

    @cached_property
    def _records(self) -> tuple[HeldRecord, ...]:
        return self.placed.held()

    @property
    def arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        if self._own is not None:
            return self._own.arrays
        return RecordArrays.of_rows(self.placed.rows), self.placed.addresses

    @property
    def own(self) -> Hold | None:
        """An ordinary hold on the same records, once all of them have come."""
        return self._own

    @property
    def pool(self) -> BasePool:
        return self._pool

    def check(self) -> None:
        """As `BaseHold.check`; `LoadFailedError` when the load has failed."""
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed, and its leases with it; open it again")
        if self.ends_s != math.inf and self._pool.now_s() >= self.ends_s:
            self.expire()
        if self._has_expired:
            raise expired_lease(self._pool, self.path)
        if self._is_released:
            raise LeaseError("the lease was released; its views are no longer valid. Read the match again")
        if (error := self._load.error) is not None:
            raise type(error)(str(error)) from error

    def wait_for(self, layer: int | None, deadline: Deadline) -> None:
        self.check()
        self._load.wait(layer, deadline)
        if layer is None:
            self._take_hold()
        self.check()

    def _take_hold(self) -> None:
        """What was loaded is committed: other writers may build on it now."""
        if self._own is not None or self._is_released:
            return
        own = self._hold_here()  # not under the lock: it ends what is due, which may be this one
        self._pool.exempt(own)
        with self._lock:
            if self._own is None and not self._is_released:
                self._own = own
                return
        own.release()

    def release(self) -> None:
        self._end()

    def expire(self) -> None:
        """It was held for longer than the store bears."""
        if self._end(is_expired=True):
            self._pool.expired(leases=1)
            LOG.warning("a lease of %d tokens was held for too long and has expired", self.path.tokens)

    def _end(self, *, is_expired: bool = False) -> bool:
        with self._lock:
            if self._is_released:
                return False
            self._has_expired = is_expired
            self._is_released = True
            own = self._own
        self._pool.no_longer_held(self)
        if own is not None:
            own.release()
        self._pinned.close()
        return True

    def release_later(self) -> None:
        if not self._is_released:
            self._pool.settle_later(self.release)
