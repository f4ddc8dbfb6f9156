"""The tier's space: reserving slots, and evicting enough for them or nothing at all. The pool holds its lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import LeaseGoneError, PoolFullError, QuarantineFullError, StaleSlotError, WriteTooLargeError
from kvstore.limits import QUARANTINE_FRACTION_MAX
from kvstore.pool.index import ENTRY_BYTES, NODE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.abc import Slot, Tier
    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.node import PrefixNode
    from kvstore.pool.statistics import PoolStatistics


class Room:
    """What is used of a tier, and by what. Everything counts: slots, index, and what is only reserved.

    Attributes:
        reserved_bytes: slots of records that are being written.
    """

    def __init__(self, tier: Tier, index: PrefixIndex, statistics: PoolStatistics) -> None:
        self._tier = tier
        self._index = index
        self._statistics = statistics
        self._reserved_records = 0
        self.reserved_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that can be reserved without evicting anything."""
        index_bytes = self._index.memory_bytes + self._reserved_records * ENTRY_BYTES
        return self._tier.capacity_bytes - self._tier.used_bytes - index_bytes

    def check(self, sizes: Sequence[int], new_nodes: int) -> None:
        """Refuse what could not be reserved whatever is evicted, before anything is made for it.

        Raises:
            WriteTooLargeError: it is more than the tier holds. QuarantineFullError: dropped writers hold too much.
        """
        limit = int(self._tier.capacity_bytes * QUARANTINE_FRACTION_MAX)
        if self._tier.quarantined_bytes > limit:
            raise QuarantineFullError(
                f"{self._tier.quarantined_bytes} bytes wait for dropped writers, the limit is {limit}; "
                "wait until their copies have ended"
            )
        needed_bytes = sum(sizes) + len(sizes) * ENTRY_BYTES + new_nodes * NODE_BYTES
        if needed_bytes > self._tier.capacity_bytes or not self._tier.fits_when_empty(sizes):
            raise WriteTooLargeError(
                f"{needed_bytes} bytes are needed and the {self._tier.name} tier has {self._tier.capacity_bytes}, in "
                "slabs of one record class each; "
                "write a shorter prompt or fewer checkpoints, or open the store with more memory"
            )

    def reserve(self, sizes: Sequence[int]) -> list[Slot]:
        """Pinned slots of these sizes; whatever has to be evicted for them is.

        Raises:
            PoolFullError: not enough may be evicted. Nothing was changed.
        """
        self._make_room(sizes)
        slots = self._tier.allocate_all(sizes)
        if slots is None:
            raise PoolFullError(f"the {self._tier.name} tier has no {len(sizes)} slots left; try again later")
        self._tier.pin_all(slots)
        for slot in slots:
            self._count_reserved(slot, +1)
        return slots

    def keep(self, slot: Slot) -> None:
        """A reserved slot holds a committed record now."""
        self._count_reserved(slot, -1)

    def give_back(self, slot: Slot) -> None:
        """A reserved slot is not needed; while it is pinned it stays in quarantine."""
        self._count_reserved(slot, -1)
        self._tier.free(slot)

    def _count_reserved(self, slot: Slot, change: int) -> None:
        self.reserved_bytes += change * slot.size_bytes
        self._reserved_records += change

    def pin_all(self, slots: Iterable[Slot]) -> None:
        """Pin slots that somebody holds, all or none.

        Raises:
            LeaseGoneError: one of them has been freed.
        """
        try:
            self._tier.pin_all(slots)
        except StaleSlotError as error:
            raise LeaseGoneError(f"the resume point to continue from is not held any more: {error}") from error

    def unpin_all(self, slots: Iterable[Slot]) -> None:
        self._tier.unpin_all(slots)

    def _make_room(self, sizes: Sequence[int]) -> None:
        """Evict until slots of these sizes can be had, or change nothing."""
        needed_bytes = sum(sizes) + len(sizes) * ENTRY_BYTES
        lacking = needed_bytes - self.free_bytes
        victims = self._victims(sizes, lacking)
        if victims is None:
            raise PoolFullError(
                f"{needed_bytes} bytes are needed and {self.free_bytes} are free; what may be evicted of "
                f"{self._tier.capacity_bytes} is not enough, the rest is leased or being written; retry later, or open "
                "the store with more memory"
            )
        for node, is_state in victims:
            self.evict(node, is_state=is_state)

    def _victims(self, sizes: Sequence[int], lacking: int) -> list[tuple[PrefixNode, bool]] | None:
        """The first in the policy's order that suffice, in bytes and in slots; None when all do not."""
        if lacking <= 0 and self._tier.would_fit(sizes):
            return []
        chosen: dict[tuple[bytes, bool], tuple[PrefixNode, bool]] = {}
        steps = [(0, 0)]
        """How many are chosen, and the bytes that they free, after each step of the order."""
        tried = 0
        for item in self._index.ranked():
            if (item.key, item.is_state) in chosen:
                continue
            freed = steps[-1][1]
            for node, is_state in self._index.closure(item):
                if (node.key, is_state) not in chosen:
                    chosen[node.key, is_state] = node, is_state
                    freed += evictable_bytes(node, is_state=is_state)
            steps.append((len(chosen), freed))
            # Twice as many before each further look, so that looking stays cheap; what is too many is found below.
            if freed >= lacking and len(chosen) >= max(1, 2 * tried):
                tried = len(chosen)
                if self._tier.would_fit(sizes, _slots_of(chosen.values())):
                    break
        victims = list(chosen.values())
        freed = steps[-1][1]
        if freed < lacking:
            ghosts = -(-(lacking - freed) // NODE_BYTES)
            if ghosts > self._index.ghost_count:
                return None
            if not self._tier.would_fit(sizes, _slots_of(victims)) or self._index.drop_ghosts(ghosts) < ghosts:
                return None
            return victims
        low = next(step for step, (_, bytes_) in enumerate(steps) if bytes_ >= lacking)
        high = len(steps) - 1
        if not self._tier.would_fit(sizes, _slots_of(victims)):
            return None
        while low < high:
            middle = (low + high) // 2
            if self._tier.would_fit(sizes, _slots_of(victims[: steps[middle][0]])):
                high = middle
            else:
                low = middle + 1
        return victims[: steps[high][0]]

    def evict(self, node: PrefixNode, *, is_state: bool) -> None:
        """Drop a node's states or its attention. Below attention nothing may be left."""
        for entry in self._index.remove(node, is_state=is_state):
            self._tier.free(entry.slot)
            self._statistics.evicted_records += 1
            self._statistics.evicted_bytes += entry.slot.size_bytes


def _slots_of(victims: Iterable[tuple[PrefixNode, bool]]) -> list[Slot]:
    """What evicting these would free."""
    return [
        entry.slot
        for node, is_state in victims
        for entries in (node.states if is_state else node.attention).values()
        for entry in entries
    ]


def evictable_bytes(node: PrefixNode, *, is_state: bool) -> int:
    """What evicting a node's states or its attention frees."""
    records = node.states if is_state else node.attention
    return sum(entry.slot.size_bytes + ENTRY_BYTES for entries in records.values() for entry in entries)
