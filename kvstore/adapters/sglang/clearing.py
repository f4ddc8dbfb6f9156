"""Removing all objects of one tenant from a store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvstore.keys import root_key

if TYPE_CHECKING:
    from kvstore.clock import Deadline
    from kvstore.store import Store

_POLL_S = 0.02


def remove_all(store: Store, salt: bytes, deadline: Deadline) -> bool:
    """Evict what the store has under one salt, in every tier; whether nothing of it was left by the deadline.

    What is read or written meanwhile stays until it has ended, and what others put there meanwhile may stay.

    Raises:
        OwnerGoneError: another process owns the store, and has gone.
    """
    root = root_key(store.spec.fingerprint, salt=salt)
    left = store.pool.evict_root(root)
    while left:
        if deadline.has_passed:
            return False
        before = left
        left = store.pool.evict_root(root)
        if left >= before:
            time.sleep(min(_POLL_S, deadline.remaining_s()))
    return True
