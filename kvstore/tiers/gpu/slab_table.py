"""Which slot lies where in one piece of memory: slabs, each for one slot size while it holds anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvstore.abc import Slot
from kvstore.errors import StaleSlotError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Move(NamedTuple):
    """A slot that lies elsewhere from here on; offsets in bytes."""

    source: int
    destination: int
    size_bytes: int


@dataclass
class _Slab:
    number: int
    slot_bytes: int
    free: list[int]
    taken: dict[int, int] = field(default_factory=dict)
    """Numbers of the slots that lie here, by place."""
    pinned: int = 0


@dataclass
class _Entry:
    generation: int
    slot_bytes: int = 0
    slab: _Slab | None = None
    place: int = 0
    pins: int = 0
    is_freed: bool = True


class SlabTable:
    """Slots and generations, without the bytes. Not thread-safe.

    When one size needs space that others have free in parts, unpinned slots are moved together: `allocate` says which,
    and the caller moves their bytes.

    Args:
        slabs: how many there are.
        slab_bytes: of each.
    """

    def __init__(self, slabs: int, slab_bytes: int) -> None:
        self.slab_bytes = slab_bytes
        self._slab_count = slabs
        self._empty = list(range(slabs - 1, -1, -1))
        self._classes: dict[int, dict[int, _Slab]] = {}
        self._entries: list[_Entry] = []
        self._unused: list[int] = []
        self.used_bytes = 0
        self.quarantined_bytes = 0

    def would_fit(self, sizes_bytes: Sequence[int], freeing: Iterable[Slot] = ()) -> bool:
        """Whether `allocate` would succeed once `freeing`, live and unpinned, were freed."""
        change: dict[int, int] = {}
        for size in sizes_bytes:
            change[size] = change.get(size, 0) + 1
        for slot in freeing:
            self._entry(slot)
            change[slot.size_bytes] = change.get(slot.size_bytes, 0) - 1
        return self._needed_slabs(change) <= self._slab_count

    def fits_when_empty(self, sizes_bytes: Sequence[int]) -> bool:
        """Whether `allocate` would succeed if nothing were there."""
        counts = {size: sizes_bytes.count(size) for size in set(sizes_bytes)}
        return sum(-(-count // (self.slab_bytes // size)) for size, count in counts.items()) <= self._slab_count

    def _needed_slabs(self, change: dict[int, int]) -> int:
        """Slabs that all sizes need at least, with so many slots more of each: a slab with a pinned slot stays."""
        needed = 0
        for size in {*self._classes, *change}:
            slabs = self._classes.get(size, {}).values()
            slots = sum(len(slab.taken) for slab in slabs) + change.get(size, 0)
            pinned = sum(slab.pinned > 0 for slab in slabs)
            needed += max(pinned, -(-slots // (self.slab_bytes // size)))
        return needed

    def allocate(self, sizes_bytes: Sequence[int]) -> tuple[list[Slot], list[Move]] | None:
        """A slot for each size, or None and nothing changed; and what has to be moved first, in order."""
        if not self.would_fit(sizes_bytes):
            return None
        moves: list[Move] = []
        slots = [self._take(size, moves) for size in sizes_bytes]
        return slots, moves

    def _take(self, size: int, moves: list[Move]) -> Slot:
        slabs = self._classes.setdefault(size, {})
        slab = next((slab for slab in slabs.values() if slab.free), None)
        if slab is None:
            if not self._empty:
                self._vacate(moves)
            number = self._empty.pop()
            slab = slabs[number] = _Slab(number, size, list(range(self.slab_bytes // size - 1, -1, -1)))
        place = slab.free.pop()
        index = self._unused.pop() if self._unused else len(self._entries)
        if index == len(self._entries):
            self._entries.append(_Entry(0))
        entry = self._entries[index]
        entry.generation += 1
        entry.slot_bytes, entry.slab, entry.place, entry.is_freed = size, slab, place, False
        slab.taken[place] = index
        if not slab.free:  # full ones are looked at last
            slabs[slab.number] = slabs.pop(slab.number)
        self.used_bytes += size
        return Slot(index, entry.generation, size)

    def _vacate(self, moves: list[Move]) -> None:
        """Empty one slab whose slots have room in others of their size. There is one, since the sizes fit."""
        slab = min(
            (
                slab
                for slabs in self._classes.values()
                for slab in slabs.values()
                if not slab.pinned
                and len(slab.taken) <= sum(len(other.free) for other in slabs.values() if other is not slab)
            ),
            key=lambda slab: len(slab.taken) * slab.slot_bytes,
        )
        others = [each for each in self._classes[slab.slot_bytes].values() if each is not slab and each.free]
        for place, index in slab.taken.items():
            target = others[-1]
            entry = self._entries[index]
            source = self._offset(entry)
            entry.slab, entry.place = target, target.free.pop()
            target.taken[entry.place] = index
            moves.append(Move(source, self._offset(entry), slab.slot_bytes))
            if not target.free:
                others.pop()
            assert place not in slab.free
        self._return(slab)

    def _return(self, slab: _Slab) -> None:
        del self._classes[slab.slot_bytes][slab.number]
        if not self._classes[slab.slot_bytes]:
            del self._classes[slab.slot_bytes]
        self._empty.append(slab.number)

    def offset(self, slot: Slot) -> int:
        """Where a live slot lies, in bytes from the beginning.

        Raises:
            StaleSlotError: it has been freed.
        """
        return self._offset(self._entry(slot))

    def _offset(self, entry: _Entry) -> int:
        assert entry.slab is not None
        return entry.slab.number * self.slab_bytes + entry.place * entry.slot_bytes

    def _entry(self, slot: Slot) -> _Entry:
        entry = self._entries[slot.index] if 0 <= slot.index < len(self._entries) else None
        if entry is None or entry.generation != slot.generation or entry.is_freed:
            raise StaleSlotError(f"slot {slot.index} of generation {slot.generation} has been freed; match again")
        return entry

    def free(self, slot: Slot) -> None:
        """Raises `StaleSlotError` if it has been freed before."""
        entry = self._entry(slot)
        entry.is_freed = True
        if entry.pins:
            self.quarantined_bytes += entry.slot_bytes
        else:
            self._give_back(slot.index, entry)

    def _give_back(self, index: int, entry: _Entry) -> None:
        slab = entry.slab
        assert slab is not None
        del slab.taken[entry.place]
        slab.free.append(entry.place)
        self.used_bytes -= entry.slot_bytes
        entry.slab = None
        self._unused.append(index)
        if not slab.taken:
            self._return(slab)
        else:  # those with room are looked at first
            slabs = self._classes[slab.slot_bytes]
            if len(slab.free) == 1 and len(slabs) > 1:
                self._classes[slab.slot_bytes] = {slab.number: slab, **slabs}

    def pin(self, slot: Slot) -> None:
        """Raises `StaleSlotError` if it has been freed."""
        entry = self._entry(slot)
        assert entry.slab is not None
        entry.slab.pinned += not entry.pins
        entry.pins += 1

    def unpin(self, slot: Slot) -> None:
        """Raises `StaleSlotError` if it is not pinned."""
        entry = self._entries[slot.index] if 0 <= slot.index < len(self._entries) else None
        if entry is None or entry.generation != slot.generation or not entry.pins:
            raise StaleSlotError(f"slot {slot.index} of generation {slot.generation} is not pinned")
        assert entry.slab is not None
        entry.pins -= 1
        if not entry.pins:
            entry.slab.pinned -= 1
            if entry.is_freed:
                self.quarantined_bytes -= entry.slot_bytes
                self._give_back(slot.index, entry)

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests."""
        seen: set[int] = set(self._empty)
        used = 0
        for size, slabs in self._classes.items():
            assert slabs, "a size without slabs"
            for number, slab in slabs.items():
                assert number == slab.number
                assert number not in seen
                assert slab.taken
                seen.add(number)
                assert sorted([*slab.free, *slab.taken]) == list(range(self.slab_bytes // size))
                entries = [self._entries[index] for index in slab.taken.values()]
                assert all(entry.slab is slab and entry.slot_bytes == size for entry in entries)
                assert slab.pinned == sum(entry.pins > 0 for entry in entries)
                used += size * len(entries)
        assert seen == set(range(self._slab_count))
        assert used == self.used_bytes
