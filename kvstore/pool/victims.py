"""Between the index and an eviction policy: what changed goes to the policy, whom it ranks first comes back."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING

from kvstore.abc import Evictable
from kvstore.limits import VICTIMS_AHEAD, VICTIMS_AHEAD_MIN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore._native import PrefixIndex
    from kvstore.abc import EvictionPolicy

ITEM_BYTES = 450
"""Python memory of one evictable and of a policy's own note of it (estimated)."""

INSERT, ACCESS, REMOVE = range(3)


class PolicyFeed:
    """Tells a policy of every change in one step per call, and pushes its victims ahead of need."""

    def __init__(self, native: PrefixIndex, policy: EvictionPolicy) -> None:
        self._native = native
        self._policy = policy
        self._items: dict[int, Evictable] = {}

    @property
    def memory_bytes(self) -> int:
        return len(self._items) * ITEM_BYTES

    def settle(self) -> None:
        """Tell the policy what has changed."""
        for kind, events in groupby(self._native.take_events(), key=lambda event: event[0]):
            if kind == INSERT:
                inserted = {
                    handle: Evictable(key, is_state, size_bytes, end_tokens)
                    for _, handle, key, is_state, size_bytes, end_tokens in events
                }
                self._items.update(inserted)
                self._policy.insert_all(list(inserted.values()))
            elif kind == ACCESS:
                self._policy.access_all([self._items[event[1]] for event in events])
            else:
                self._policy.remove_all([self._items.pop(event[1]) for event in events])

    def refill(self) -> None:
        """Push victims if few are left."""
        if self._native.pushed_count < VICTIMS_AHEAD_MIN < len(self._items):
            self._push(islice(self._policy.ranked(), VICTIMS_AHEAD))

    def choose(self, target_bytes: int) -> int:
        """As `PrefixIndex.choose`: from what was pushed, then from the policy until it is exhausted."""
        chosen_bytes = self._native.choose(target_bytes)
        if chosen_bytes >= target_bytes:
            return chosen_bytes
        ranked = iter(self._policy.ranked())
        while chosen_bytes < target_bytes and (batch := list(islice(ranked, VICTIMS_AHEAD))):
            self._push(batch)
            chosen_bytes = self._native.choose(target_bytes)
        return chosen_bytes

    def _push(self, items: Iterable[Evictable]) -> None:
        batch = list(items)
        self._native.push_victims(b"".join(item.key for item in batch), bytes(item.is_state for item in batch))

    def check(self) -> None:
        """Assert that the policy knows exactly what is there; for tests."""
        ranked = list(self._policy.ranked())
        assert len(ranked) == len(self._items)
        assert set(ranked) == set(self._items.values()), "the policy lost or invented an item"
