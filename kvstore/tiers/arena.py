"""Host memory that several processes can map: one arena, divided into slabs and slots by native code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import Arena
from kvstore.abc import SlotRows, SlotViews, Tier
from kvstore.errors import ArenaError, RecordTooLargeError, StoreClosedError
from kvstore.limits import (
    ARENA_NAME_CHARACTERS_MAX,
    MEMORY_SPARE_FRACTION,
    RECORD_ALIGN_BYTES,
    RECORD_BYTES_MAX,
    RECORD_HEADER_BYTES_MAX,
)
from kvstore.tiers.available_memory import available_memory, free_huge_page_bytes
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvstore.abc import Slot

SHARED_MEMORY_DIRECTORY = "/dev/shm"


@dataclass(frozen=True)
class HugePages:
    """Whether huge pages back an arena, and why not."""

    in_use: bool
    why_not: str


@dataclass(frozen=True)
class ClassUsage:
    """What one record class, that is one slot size, has of an arena."""

    slot_bytes: int
    slabs: int
    live_slots: int
    quarantined_slots: int
    free_places: int


@dataclass(frozen=True)
class ArenaStatistics:
    """How an arena is divided and used.

    Attributes:
        relocated_bytes: moved so far to free slabs for other classes.
        empty_slabs: those of no class.
    """

    used_bytes: int
    quarantined_bytes: int
    relocated_bytes: int
    slab_bytes: int
    slabs: int
    empty_slabs: int
    classes: tuple[ClassUsage, ...]


class ArenaTier(Tier):
    """Slots in one shared mapping, which exists in full from the start. Any thread may call any method.

    The mapping is divided into slabs; each serves one slot size while it holds anything. When one size needs space
    that others have free in parts, unpinned slots move together; so a view or location is good while its slot is
    pinned. A forked child must not use it: there everything is closed.

    Args:
        capacity_bytes: the most that slots take together.
        name: what other processes of the host find it by, as `kvstore-<name>` in /dev/shm; the name belongs to this
            process while it lives. Without a name the memory is a memfd, which has no size limit of its own, and
            others get the descriptor.
        largest_slot_bytes: the largest slot that can be had; slabs are at least that large.
        slot_sizes_bytes: sizes that are expected; slabs are cut so that little is left over.
        directory: where named memory lies.

    Raises:
        ArenaError: there is too little memory, or another process has the name.
        ValueError: the name has other characters than letters, digits, `.`, `_` and `-`, or the capacity is negative.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        name: str | None = None,
        largest_slot_bytes: int = RECORD_BYTES_MAX + RECORD_HEADER_BYTES_MAX,
        slot_sizes_bytes: Sequence[int] = (),
        directory: str = SHARED_MEMORY_DIRECTORY,
    ) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"an arena has at least 0 bytes, got {capacity_bytes}")
        if name is not None and not re.fullmatch(rf"[A-Za-z0-9._-]{{1,{ARENA_NAME_CHARACTERS_MAX}}}", name):
            raise ValueError(
                f"an arena's name is 1 to {ARENA_NAME_CHARACTERS_MAX} letters, digits, '.', '_' and '-', got {name!r}"
            )
        _check_available(capacity_bytes, may_be_huge=name is None)
        self._capacity_bytes = capacity_bytes
        self._largest_slot_bytes = min(largest_slot_bytes, capacity_bytes)
        self._arena = Arena(capacity_bytes, self._largest_slot_bytes, list(slot_sizes_bytes), directory, name or "")
        self._memory: memoryview | None = self._arena.memory()
        self.kind = "memfd" if name is None else "shm"
        """`memfd` or `shm`."""
        self.path = self._arena.path
        """Of named memory; empty for a memfd."""
        self.huge_pages = HugePages(*self._arena.huge_pages)
        """Whether huge pages are in use, and why not."""

    @property
    def name(self) -> str:
        return "dram"

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._arena.used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return self._arena.quarantined_bytes

    @property
    def supports_views(self) -> bool:
        return True

    @property
    def descriptor(self) -> int:
        """The descriptor of the memory, for other processes to map. It stays open until `close`.

        Raises:
            StoreClosedError: the tier is closed, or was made by the process that forked this one.
        """
        return self._arena.descriptor

    @property
    def memory(self) -> memoryview:
        """The whole mapping; locations count from its beginning.

        Raises:
            StoreClosedError: the tier is closed.
        """
        memory = self._memory
        if memory is None:
            raise StoreClosedError("the DRAM tier is closed")
        return memory

    def location(self, slot: Slot) -> int:
        """Where a pinned slot lies, in bytes from the mapping's beginning.

        Raises:
            StaleSlotError: the slot has been freed, or is not pinned.
        """
        return self._arena.location(slot, must_be_pinned=True)

    def locations(self, slots: Iterable[Slot]) -> NDArray[np.uint64]:
        """`location` of each, shape [n]; raises as it does."""
        return self._arena.locations(SlotRows.of(slots).table)

    def statistics(self) -> ArenaStatistics:
        """How the arena is divided and used at this moment."""
        found: dict[str, Any] = self._arena.statistics()
        classes = tuple(ClassUsage(*each) for each in found.pop("classes"))
        return ArenaStatistics(classes=classes, **found)

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests."""
        self._arena.check()

    # Slots

    def allocate(self, size_bytes: int) -> Slot | None:
        slots = self.allocate_all((size_bytes,))
        return None if slots is None else slots[0]

    def allocate_all(self, sizes_bytes: Sequence[int]) -> SlotRows | None:
        self._check_sizes(sizes_bytes)
        slots = self._arena.allocate(list(sizes_bytes))
        return None if slots is None else SlotRows(np.frombuffer(slots, np.uint64).reshape(-1, 3))

    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        self._check_sizes(sizes_bytes)
        return self._arena.would_fit(list(sizes_bytes), SlotRows.of(freeing).table)

    def fits_when_empty(self, sizes_bytes: Sequence[int]) -> bool:
        self._check_sizes(sizes_bytes)
        return self._arena.fits_when_empty(list(sizes_bytes))

    def free(self, slot: Slot) -> None:
        self._arena.free(SlotRows.of([slot]).table)

    def free_all(self, slots: Iterable[Slot]) -> None:
        self._arena.free(SlotRows.of(slots).table)

    def pin(self, slot: Slot) -> None:
        self._arena.pin(SlotRows.of([slot]).table)

    def pin_all(self, slots: Iterable[Slot]) -> None:
        self._arena.pin(SlotRows.of(slots).table)

    def unpin(self, slot: Slot) -> None:
        self._arena.unpin(SlotRows.of([slot]).table)

    def unpin_all(self, slots: Iterable[Slot]) -> None:
        self._arena.unpin(SlotRows.of(slots).table)

    def _check_sizes(self, sizes_bytes: Sequence[int]) -> None:
        for size_bytes in set(sizes_bytes):  # A prompt has thousands of records, and few sizes.
            if size_bytes <= 0 or size_bytes % RECORD_ALIGN_BYTES:
                raise ValueError(f"slot sizes are positive multiples of {RECORD_ALIGN_BYTES}, got {size_bytes}")
        largest = max(sizes_bytes, default=0)
        if largest > max(self._arena.slab_bytes, self._largest_slot_bytes):
            raise RecordTooLargeError(
                f"one record of {largest} bytes does not fit into the DRAM tier of {self._capacity_bytes} bytes, whose "
                f"largest slot has {self._arena.slab_bytes}; open the store with more dram="
            )

    # Bytes

    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        self._arena.write(slot, data, offset)

    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        self._arena.read(slot, into, offset)

    def view(self, slot: Slot) -> memoryview:
        begin = self._arena.location(slot, must_be_pinned=False)
        return self.memory[begin : begin + slot.size_bytes]

    def views(self, slots: Iterable[Slot]) -> SlotViews:
        table = SlotRows.of(slots).table
        return SlotViews(self.memory, self._arena.locations(table), table[:, 2])

    def close(self) -> None:
        # Views that a caller still holds keep the mapping; nothing is unmapped under them.
        self._arena.close()
        self._memory = None


def _check_available(capacity_bytes: int, *, may_be_huge: bool) -> None:
    available = available_memory()
    if available is None or (may_be_huge and capacity_bytes + RECORD_ALIGN_BYTES <= free_huge_page_bytes()):
        return
    usable = int(available.bytes * (1 - MEMORY_SPARE_FRACTION))
    if capacity_bytes > usable:
        raise ArenaError(
            f"an arena of {format_bytes(capacity_bytes)} is allocated in full at open, and {format_bytes(usable)} may "
            f"be taken of what is available; {available.limited_by} sets this limit. Open the store with less memory"
        )
