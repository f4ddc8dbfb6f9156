"""Least recently used first."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvstore.abc import Evictable, EvictionPolicy

if TYPE_CHECKING:
    from collections.abc import Iterator


class LRUPolicy(EvictionPolicy):
    """Evicts what was used longest ago.

    The pool reports a hit from its deepest node to the root, so an ancestor is never older than what
    depends on it, and leaves go first.
    """

    def __init__(self) -> None:
        self._items: OrderedDict[tuple[bytes, bool], Evictable] = OrderedDict()

    def insert(self, item: Evictable) -> None:
        self._items[item.key, item.is_state] = item

    def access(self, item: Evictable) -> None:
        self._items.move_to_end((item.key, item.is_state))

    def remove(self, item: Evictable) -> None:
        del self._items[item.key, item.is_state]

    def ranked(self) -> Iterator[Evictable]:
        return iter(self._items.values())
