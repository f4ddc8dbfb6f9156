"""Holding a resume point in place while it is read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.pool.path import RecordName
from kvstore.pool.search import attention_grid, covering

if TYPE_CHECKING:
    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.node import Entry, PrefixNode
    from kvstore.pool.path import HandOver, NodePath
    from kvstore.pool.pool import Pool
    from kvstore.pool.search import Needs
    from kvstore.pool.transaction import HeldRecord
    from kvstore.spec import ChunkGrid


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
    def is_released(self) -> bool:
        return self._is_released

    def release(self) -> None:
        """Let the records go. Idempotent."""
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self._pool.release(self)


def collect_held(
    index: PrefixIndex, path: NodePath, needs: Needs, grid: ChunkGrid | None
) -> tuple[list[tuple[RecordName, Entry]] | None, list[PrefixNode]]:
    """Every record of a resume point and the path's nodes; None if one record is not there."""
    nodes: list[PrefixNode] = []
    entries: list[tuple[RecordName, Entry]] = []
    for number in range(len(path)):
        node = index.get(path.key(number))
        if node is None:
            return None, []
        nodes.append(node)
        digest = attention_grid(grid, path.end_tokens(number))
        if not _collect(entries, number, node.attention, needs.attention, digest):
            return None, []
    if not nodes:
        return None, []
    digest = None if grid is None else grid.digest_at(path.tokens)
    if not _collect(entries, len(nodes) - 1, nodes[-1].states, needs.states, digest):
        return None, []
    entries.sort(key=lambda item: (item[0].group, item[0].span, item[0].node, item[0].units))
    return entries, nodes


def _collect(
    entries: list[tuple[RecordName, Entry]],
    number: int,
    records: dict[tuple[int, int], list[Entry]],
    needs: tuple[tuple[int, int, frozenset[int]], ...],
    digest: bytes | None,
) -> bool:
    for group, spans, units in needs:
        chosen = covering(records, group, spans, units, digest)
        if chosen is None:
            return False
        entries.extend((RecordName(number, group, entry.layout.span.index, entry.units), entry) for entry in chosen)
    return True
