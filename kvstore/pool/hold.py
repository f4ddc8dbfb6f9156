"""Holding a resume point in place while it is read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.errors import LeaseError, StoreClosedError
from kvstore.pool.path import RecordName
from kvstore.pool.search import covering_span

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.node import Entry, PrefixNode
    from kvstore.pool.path import HandOver, NodePath
    from kvstore.pool.pool import Pool
    from kvstore.pool.search import Needs
    from kvstore.pool.transaction import HeldRecord


class Hold:
    """Records that are neither evicted nor reused before `release`. Any thread.

    Attributes:
        path: the resume point's nodes.
        records: by group, span and node, the order in which a model needs them.
        handover: what waits there for a decode process.
    """

    def __init__(
        self,
        pool: Pool,
        path: NodePath,
        records: tuple[HeldRecord, ...],
        nodes: list[PrefixNode],
        handover: HandOver | None,
    ) -> None:
        self.path = path
        self.records = records
        self.handover = handover
        self.nodes = nodes
        self._pool = pool
        self._lock = threading.Lock()
        self._is_released = False

    @property
    def salt(self) -> bytes:
        """Whose prefix it is."""
        return self.nodes[0].root.salt

    @property
    def is_released(self) -> bool:
        return self._is_released

    @property
    def pool(self) -> Pool:
        """The pool that the records lie in."""
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
        """Let the records go. Idempotent."""
        if self._pool.is_closed:
            return
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self._pool.release(self)

    def release_later(self) -> None:
        """As `release`, for finalizers: no lock is taken here, and the pool acts in its next call."""
        if not self._is_released:
            self._pool.settle_later(self.release)


def collect_held(
    index: PrefixIndex, path: NodePath, needs: Needs, digest_of: Callable[[int, int, int], bytes | None]
) -> tuple[list[tuple[RecordName, Entry]] | None, list[PrefixNode]]:
    """Every record of a resume point and the path's nodes; None if one record is not there.

    Args:
        digest_of: chunk grid digest that the record of a (node, group, span) must carry; None takes any.
    """
    nodes: list[PrefixNode] = []
    entries: list[tuple[RecordName, Entry]] = []
    for number in range(len(path)):
        node = index.get(path.key(number))
        if (
            node is None
            or node.end_tokens != path.end_tokens(number)
            or not _collect(entries, number, node.attention, needs.attention, digest_of)
        ):
            return None, []
        nodes.append(node)
    if not nodes or not _collect(entries, len(nodes) - 1, nodes[-1].states, needs.states, digest_of):
        return None, []
    entries.sort(key=lambda item: (item[0].group, item[0].span, item[0].node, item[0].units))
    return entries, nodes


def _collect(
    entries: list[tuple[RecordName, Entry]],
    number: int,
    records: dict[tuple[int, int], list[Entry]],
    needs: tuple[tuple[int, int, frozenset[int]], ...],
    digest_of: Callable[[int, int, int], bytes | None],
) -> bool:
    for group, spans, units in needs:
        for span in range(spans):
            chosen = covering_span(records, group, span, units, digest_of(number, group, span))
            if chosen is None:
                return False
            entries.extend((RecordName(number, group, span, entry.units), entry) for entry in chosen)
    return True
