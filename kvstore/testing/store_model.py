"""What a store must hold, as plain dictionaries: the model that the state machine compares it with.

It knows the rules of docs/architecture.md, and nothing of slots, nodes or policies. A prefix is the tuple of
its ids; an attention record is named by the prefix at whose end it lies, a state by the prefix it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.record import record_layout
from kvstore.spec import ReuseRule, UnitRange

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvstore.spec import ChunkGrid, ModelSpec, Shard

Ids = tuple[int, ...]
Prefix = tuple[bytes, Ids]
"""Salt and ids."""
Bounds = tuple[int, ...] | None
"""Chunk boundaries on which a record depends; None if nobody named them."""


@dataclass(frozen=True)
class Copy:
    """One record at a prefix."""

    group: int
    bounds: Bounds
    units: UnitRange


def prefixes(salt: bytes, ids: Ids, block_tokens: int) -> list[Prefix]:
    """The prefixes of a prompt that can have records: whole blocks, then the tail."""
    ends = list(range(block_tokens, len(ids) + 1, block_tokens))
    if len(ids) % block_tokens:
        ends.append(len(ids))
    return [(salt, ids[:end]) for end in ends]


def bounds_of(grid: ChunkGrid | None, end: int, rule: ReuseRule) -> Bounds:
    """The chunk boundaries that a record ending at `end` depends on."""
    if grid is None:
        return None
    if rule is ReuseRule.STATE:
        assert end in grid.boundaries
        return tuple(boundary for boundary in grid.boundaries if boundary <= end)
    closing = next((boundary for boundary in grid.boundaries if boundary >= end), None)
    return None if closing is None else tuple(boundary for boundary in grid.boundaries if boundary <= closing)


@dataclass
class StoreModel:
    """Committed records, by prefix."""

    spec: ModelSpec
    records: dict[Prefix, list[Copy]] = field(default_factory=dict)

    def copies(self, prefix: Prefix, rule: ReuseRule) -> list[Copy]:
        return [copy for copy in self.records.get(prefix, ()) if self.spec.groups[copy.group].rule is rule]

    def covers(self, prefix: Prefix, group: int, units: Iterable[int], bounds: Bounds) -> bool:
        """Whether a group's units are there, under these boundaries or, for None, under any."""
        held = {
            unit
            for copy in self.records.get(prefix, ())
            if copy.group == group and (bounds is None or copy.bounds == bounds)
            for unit in range(copy.units.start, copy.units.stop)
        }
        return held.issuperset(units)

    def find(self, prefix: Prefix, copy: Copy) -> bool:
        """Whether a writer of this record has nothing to write."""
        return self.covers(prefix, copy.group, range(copy.units.start, copy.units.stop), copy.bounds)

    def add(self, prefix: Prefix, copy: Copy) -> None:
        self.records.setdefault(prefix, []).append(copy)

    def resume_points(self, salt: bytes, ids: Ids, cap: int, shard: Shard, grid: ChunkGrid | None) -> list[int]:
        """Every length up to `cap` at which all groups can be restored, deepest first, by trying each."""
        return [end for end in range(cap, 0, -1) if self._is_resume_point(salt, ids[:end], shard, grid)]

    def _is_resume_point(self, salt: bytes, ids: Ids, shard: Shard, grid: ChunkGrid | None) -> bool:
        if grid is not None and len(ids) not in grid.boundaries:
            return False
        path = prefixes(salt, ids, self.spec.block_tokens)
        for index, group in enumerate(self.spec.groups):
            units = group.units_read_by(shard)
            for prefix in path if group.rule is ReuseRule.ATTENTION else path[-1:]:
                bounds = bounds_of(grid, len(prefix[1]), group.rule)
                if grid is not None and bounds is None:
                    return False
                if not self.covers(prefix, index, units, bounds):
                    return False
        return True

    def below(self, prefix: Prefix) -> list[Prefix]:
        """This prefix and those that continue it."""
        salt, ids = prefix
        return [
            other
            for other in self.records
            if other[0] == salt and other[1][: len(ids)] == ids and self._is_on_path(prefix, other)
        ]

    def _is_on_path(self, prefix: Prefix, other: Prefix) -> bool:
        return other == prefix or len(prefix[1]) % self.spec.block_tokens == 0

    def drop(self, prefix: Prefix, rule: ReuseRule) -> None:
        """Forget a prefix's states, or its attention with everything below it."""
        if rule is ReuseRule.ATTENTION:
            for gone in self.below(prefix):
                del self.records[gone]
        elif prefix in self.records:
            kept = self.copies(prefix, ReuseRule.ATTENTION)
            if kept:
                self.records[prefix] = kept
            else:
                del self.records[prefix]

    def slot_bytes(self) -> int:
        """Bytes that the records take in a tier."""
        return sum(
            record_layout(self.spec, copy.group, span.index, copy.units).slot_bytes
            for copies in self.records.values()
            for copy in copies
            for span in self.spec.spans[copy.group]
        )

    def items(self) -> Iterator[tuple[Prefix, Copy]]:
        for prefix, copies in self.records.items():
            for copy in copies:
                yield prefix, copy
