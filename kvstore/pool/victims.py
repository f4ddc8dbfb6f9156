"""Between the index and an eviction policy: what changed goes to the policy, whom it ranks first comes back."""

from __future__ import annotations

from itertools import groupby, islice
from typing import TYPE_CHECKING

from kvstore.abc import Evictable
from kvstore.errors import PoolError
from kvstore.limits import VICTIMS_AHEAD, VICTIMS_AHEAD_MIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore._native import PrefixIndex
    from kvstore.abc import EvictionPolicy

ITEM_BYTES = 450
"""Python memory of one evictable and of a policy's own note of it (estimated)."""

INSERT, ACCESS, REMOVE = range(3)


class PolicyFeed:
    """Tells a policy of every change in one step per call, and pushes its victims ahead of need.

    It is told when records have appeared or gone already. So what it raises must not end the pool's call half way: the
    policy is not asked again, and the next eviction says so.
    """

    def __init__(self, native: PrefixIndex, policy: EvictionPolicy) -> None:
        self._native = native
        self._policy = policy
        self._items: dict[int, Evictable] = {}
        self._failure: Exception | None = None

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
                self._tell(self._policy.insert_all, list(inserted.values()))
            elif kind == ACCESS:
                self._tell(self._policy.access_all, [self._items[event[1]] for event in events])
            else:
                self._tell(self._policy.remove_all, [self._items.pop(event[1]) for event in events])

    def _tell(self, change: Callable[[Sequence[Evictable]], None], items: Sequence[Evictable]) -> None:
        if self._failure is None:
            try:
                change(items)
            except Exception as error:
                self._failure = error

    def refill(self) -> None:
        """Push victims if few are left."""
        if self._native.pushed_count < VICTIMS_AHEAD_MIN < len(self._items):
            next(self._pushes(), None)

    def choose(self, target_bytes: int) -> int:
        """As `PrefixIndex.choose`: from what was pushed, then from the policy until it is exhausted.

        Raises:
            PoolError: what was pushed does not suffice, and the policy has failed, now or before.
        """
        chosen_bytes = self._native.choose(target_bytes)
        if chosen_bytes >= target_bytes:
            return chosen_bytes
        for _ in self._pushes():
            chosen_bytes = self._native.choose(target_bytes)
            if chosen_bytes >= target_bytes:
                return chosen_bytes
        self._check_works()
        return chosen_bytes

    def choose_in(self, salt: bytes, target_bytes: int) -> int:
        """As `PrefixIndex.choose_in`: what the policy ranks, looked through for one salt; nothing is pushed.

        Raises:
            PoolError: there is not enough, and the policy has failed, now or before.
        """
        chosen_bytes = 0
        for keys, are_states in self._batches():
            chosen_bytes = self._native.choose_named_in(salt, keys, are_states, target_bytes)
            if chosen_bytes >= target_bytes:
                return chosen_bytes
        self._check_works()
        return chosen_bytes

    def _check_works(self) -> None:
        if self._failure is not None:
            raise PoolError(
                f"not enough can be evicted: the eviction policy {type(self._policy).__name__} failed with "
                f"{type(self._failure).__name__}: {self._failure}; open the store again with a policy that works"
            ) from self._failure

    def _pushes(self) -> Iterator[None]:
        """Push what the policy ranks first, then what comes next, until it is exhausted or fails."""
        for keys, are_states in self._batches():
            self._native.push_victims(keys, are_states)
            yield

    def _batches(self) -> Iterator[tuple[bytes, bytes]]:
        """What the policy ranks, the first first: keys, and whether each is a state; until it is exhausted or fails."""
        if self._failure is None:
            try:
                ranked = iter(self._policy.ranked())
                while batch := list(islice(ranked, VICTIMS_AHEAD)):
                    yield b"".join(item.key for item in batch), bytes(item.is_state for item in batch)
            except Exception as error:
                self._failure = error

    def check(self) -> None:
        """Assert that the policy, unless it has failed, knows exactly what is there; for tests."""
        if self._failure is not None:
            return
        ranked = list(self._policy.ranked())
        assert len(ranked) == len(self._items)
        assert set(ranked) == set(self._items.values()), "the policy lost or invented an item"
