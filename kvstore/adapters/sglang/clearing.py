"""Removing all objects of one tenant from a store."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvstore.events import Stored
from kvstore.keys import root_key

if TYPE_CHECKING:
    from kvstore.clock import Deadline
    from kvstore.store import Store

_POLL_S = 0.02


def remove_all(store: Store, salt: bytes, deadline: Deadline) -> bool:
    """Evict what the store has under one salt, in every tier; whether nothing of it was left by the deadline.

    What is read or written meanwhile stays until it has ended, and what others put there meanwhile may stay.

    Raises:
        AttachError: another process owns the store: only that one knows all that is in it.
    """
    root = root_key(store.spec.fingerprint, salt=salt)
    while True:
        keys = _first_blocks(store, root, salt)
        for key in keys:
            store.pool.evict(key)
        if not keys:
            return True
        if deadline.has_passed:
            return False
        time.sleep(min(_POLL_S, deadline.remaining_s()))


def _first_blocks(store: Store, root: bytes, salt: bytes) -> set[bytes]:
    """Keys of the first blocks of all prompts under a root."""
    with store.events(1, kinds=[Stored], contents=True) as stream:
        contents = [event for event in stream.contents if event.salt == salt]
        return {block.key for event in contents for block in event.blocks if block.parent == root}
