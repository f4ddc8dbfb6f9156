"""Host memory of one process, handed out in page-aligned slots."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass, field

from kvstore.abc import Slot, Tier
from kvstore.errors import RecordTooLargeError, StaleSlotError, StoreClosedError
from kvstore.limits import RECORD_ALIGN_BYTES


@dataclass
class _Space:
    """One slot's memory. It keeps its size for life; only its generation changes."""

    memory: mmap.mmap
    generation: int = 0
    pins: int = 0
    is_free: bool = False
    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = memoryview(self.memory)


class DramTier(Tier):
    """Anonymous memory, mapped slot by slot and reused by size.

    Free slots of one size are kept for the next record of that size, and unmapped when another size needs
    their bytes; so no mix of record classes can fragment the tier, and `used_bytes` is exact.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._spaces: dict[int, _Space] = {}
        self._free: dict[int, list[int]] = {}
        self._next_index = 0
        self._used_bytes = 0
        self._quarantined_bytes = 0
        self._idle_bytes = 0
        self._is_closed = False

    @property
    def name(self) -> str:
        return "dram"

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return self._quarantined_bytes

    @property
    def supports_views(self) -> bool:
        return True

    def allocate(self, size_bytes: int) -> Slot | None:
        if size_bytes > self._capacity_bytes:
            raise RecordTooLargeError(
                f"one record of {size_bytes} bytes does not fit into the DRAM tier of {self._capacity_bytes} bytes; "
                "open the store with more dram="
            )
        if size_bytes <= 0 or size_bytes % RECORD_ALIGN_BYTES:
            raise ValueError(f"slot sizes are positive multiples of {RECORD_ALIGN_BYTES}, got {size_bytes}")
        with self._lock:
            if self._is_closed:
                raise StoreClosedError("the DRAM tier is closed")
            if self._used_bytes + size_bytes > self._capacity_bytes:
                return None
            index = self._take(size_bytes)
            if index is None:
                return None
            self._used_bytes += size_bytes
            space = self._spaces[index]
            space.is_free = False
            return Slot(index, space.generation, size_bytes)

    def _take(self, size_bytes: int) -> int | None:
        idle = self._free.get(size_bytes)
        if idle:
            self._idle_bytes -= size_bytes
            return idle.pop()
        excess = self._used_bytes + self._idle_bytes + size_bytes - self._capacity_bytes
        for other_bytes, indices in self._free.items():
            while excess > 0 and indices:
                del self._spaces[indices.pop()]
                self._idle_bytes -= other_bytes
                excess -= other_bytes
        try:
            memory = mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:  # the machine has less memory, or fewer mappings, than the capacity
            return None
        index = self._next_index
        self._next_index += 1
        self._spaces[index] = _Space(memory)
        return index

    def free(self, slot: Slot) -> None:
        with self._lock:
            space = self._live(slot)
            space.generation += 1
            space.is_free = True
            if space.pins:
                self._quarantined_bytes += slot.size_bytes
            else:
                self._reclaim(slot)

    def _reclaim(self, slot: Slot) -> None:
        self._used_bytes -= slot.size_bytes
        self._idle_bytes += slot.size_bytes
        self._free.setdefault(slot.size_bytes, []).append(slot.index)

    def pin(self, slot: Slot) -> None:
        with self._lock:
            self._live(slot).pins += 1

    def unpin(self, slot: Slot) -> None:
        with self._lock:
            space = self._spaces.get(slot.index)
            if space is None or space.pins == 0:
                raise StaleSlotError(f"slot {slot.index} is not pinned")
            space.pins -= 1
            if space.pins == 0 and space.is_free:
                self._quarantined_bytes -= slot.size_bytes
                self._reclaim(slot)

    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        with self._lock:
            view = self._live(slot).view
            self._check_range(slot, offset, data.nbytes)
            view[offset : offset + data.nbytes] = data.cast("B")

    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        with self._lock:
            view = self._live(slot).view
            self._check_range(slot, offset, into.nbytes)
            into.cast("B")[:] = view[offset : offset + into.nbytes]

    def view(self, slot: Slot) -> memoryview:
        with self._lock:
            return self._live(slot).view

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            # Views that a caller still holds keep their own mapping alive; nothing is unmapped under them.
            self._spaces.clear()
            self._free.clear()
            self._used_bytes = self._quarantined_bytes = self._idle_bytes = 0

    def _live(self, slot: Slot) -> _Space:
        space = self._spaces.get(slot.index)
        if space is None or space.is_free or space.generation != slot.generation:
            found = "unmapped" if space is None else f"at generation {space.generation}"
            raise StaleSlotError(
                f"slot {slot.index} of generation {slot.generation} has been freed (it is {found}); match again"
            )
        return space

    @staticmethod
    def _check_range(slot: Slot, offset: int, size_bytes: int) -> None:
        if offset < 0 or offset + size_bytes > slot.size_bytes:
            raise ValueError(f"bytes {offset} to {offset + size_bytes} lie outside a slot of {slot.size_bytes} bytes")
