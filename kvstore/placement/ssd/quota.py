"""What each salt may take of the SSD tier: its own records make room for what it writes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import ShelfRefusedError
from kvstore.pool.index import RECORD_BYTES
from kvstore.pool.store_limits import shown_salt

if TYPE_CHECKING:
    from kvstore.placement.ssd.keeping import Keeping
    from kvstore.placement.ssd.stock import Stock


class QuotaShare:
    """What one batch adds to what its salts have. With the stock's lock."""

    def __init__(self, stock: Stock) -> None:
        self._stock = stock
        self._adding: Counter[bytes] = Counter()
        self._seen: set[tuple[object, ...]] = set()

    def add(self, keeping: Keeping) -> None:
        """Have room for a resume point that has begun, by dropping what its salt used longest ago.

        Raises:
            ShelfRefusedError: not enough of that may go. Nothing was changed.
        """
        quota_bytes = self._stock.limits.quota_of(keeping.salt)
        if quota_bytes is None:
            return
        names = keeping.names(np.arange(len(keeping.missing)))
        sizes = [size for name, size in zip(names, keeping.missing.slot_sizes, strict=True) if name not in self._seen]
        needed_bytes = sum(sizes) + len(sizes) * RECORD_BYTES
        native = self._stock.index.native
        held_bytes = native.share_of(keeping.salt) + self._adding[keeping.salt]
        over_bytes = held_bytes + needed_bytes - quota_bytes
        if sizes and over_bytes > 0:
            chosen_bytes = self._stock.index.choose_in(keeping.salt, over_bytes)
            if chosen_bytes < over_bytes:
                native.drop_choice()
                raise ShelfRefusedError(
                    "quota",
                    f"{needed_bytes} bytes are needed and {shown_salt(keeping.salt)} has {held_bytes} of its quota of "
                    f"{quota_bytes} in the SSD tier, of which {chosen_bytes} may be dropped; write shorter prompts, "
                    "or give it more (kvstore.StoreLimits)",
                )
            freed = self._stock.index.evict_chosen()
            self._stock.evicted_records += len(freed)
            self._stock.freed(freed)
        self._adding[keeping.salt] += needed_bytes
        self._seen.update(names)
