"""Device memory for records: one tensor, divided into slabs and slots."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.abc import Slot, SlotRows, Tier
from kvstore.clock import Deadline
from kvstore.errors import RecordTooLargeError, StaleSlotError, StoreClosedError
from kvstore.limits import DEVICE_COPY_DEADLINE_S, DEVICE_SLAB_BYTES_MIN, RECORD_ALIGN_BYTES
from kvstore.tiers.gpu.slab_table import SlabTable
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvstore.tiers.gpu.device import Device

SLAB_RECORDS = 8
"""Records of the largest size in a slab, where the capacity allows for many such slabs."""
SLABS_MIN = 32
"""Fewer slabs are too coarse to be shared by several sizes."""


class DeviceTier(Tier):
    """Slots in one tensor of a device. Any thread may call any method; there are no host views.

    `location` of a slot is good while it is pinned: when one size needs space that others have free in parts, unpinned
    slots move together on the device.

    Args:
        device: whose memory.
        capacity_bytes: taken in full from the start.
        largest_slot_bytes: the largest slot that can be had; slabs are at least that large.

    Raises:
        DeviceError: the device has not that much memory.
        RecordTooLargeError: the capacity has no room for one such slot.
    """

    def __init__(self, device: Device, capacity_bytes: int, *, largest_slot_bytes: int) -> None:
        if largest_slot_bytes > capacity_bytes:
            raise RecordTooLargeError(
                f"the gpu tier of {format_bytes(capacity_bytes)} is too small for one record of "
                f"{largest_slot_bytes} bytes; open the store with more gpu="
            )
        self.device = device
        self._capacity_bytes = capacity_bytes
        slab_bytes = _slab_bytes(capacity_bytes, largest_slot_bytes)
        self._largest_slot_bytes = slab_bytes
        self._lock = threading.RLock()
        self._table = SlabTable(capacity_bytes // slab_bytes, slab_bytes)
        self._memory: Any = device.empty(capacity_bytes)
        self._stream = device.stream()
        # An allocator gives memory that the stream of this thread may still be using, and others fill it.
        device.stream_of(None).mark().wait(Deadline.after(DEVICE_COPY_DEADLINE_S), "what was asked before")
        self.relocated_bytes = 0
        """Moved so far to free slabs for other sizes."""

    @property
    def name(self) -> str:
        return "gpu"

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._table.used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return self._table.quarantined_bytes

    @property
    def memory(self) -> Any:
        """All of it, a uint8 tensor; locations count from its beginning.

        Raises:
            StoreClosedError: the tier is closed.
        """
        memory = self._memory
        if memory is None:
            raise StoreClosedError("the gpu tier is closed")
        return memory

    def locations(self, slots: Iterable[Slot]) -> NDArray[np.int64]:
        """Where pinned slots lie, in bytes from the beginning of the memory, `[n]`.

        Raises:
            StaleSlotError: one of them has been freed.
        """
        with self._lock:
            return np.fromiter((self._table.offset(slot) for slot in SlotRows.of(slots)), np.int64)

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests."""
        with self._lock:
            self._table.check()

    # Slots

    def allocate(self, size_bytes: int) -> Slot | None:
        slots = self.allocate_all((size_bytes,))
        return None if slots is None else slots[0]

    def allocate_all(self, sizes_bytes: Sequence[int]) -> Sequence[Slot] | None:
        self._check_sizes(sizes_bytes)
        with self._lock:
            memory = self.memory
            found = self._table.allocate(sizes_bytes)
            if found is None:
                return None
            slots, moves = found
            if moves:

                def relocate() -> None:
                    for source, destination, size in moves:
                        memory[destination : destination + size].copy_(memory[source : source + size])

                self._stream.run(relocate)
                # Another stream may copy into what was left at once. A device moves gigabytes in milliseconds.
                self._stream.mark().wait(Deadline.after(DEVICE_COPY_DEADLINE_S), "moving records together")
                self.relocated_bytes += sum(move.size_bytes for move in moves)
            return slots

    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        self._check_sizes(sizes_bytes)
        with self._lock:
            return self._table.would_fit(sizes_bytes, freeing)

    def fits_when_empty(self, sizes_bytes: Sequence[int]) -> bool:
        self._check_sizes(sizes_bytes)
        return self._table.fits_when_empty(sizes_bytes)

    def free(self, slot: Slot) -> None:
        with self._lock:
            self._check_open()
            self._table.free(slot)

    def pin(self, slot: Slot) -> None:
        with self._lock:
            self._check_open()
            self._table.pin(slot)

    def unpin(self, slot: Slot) -> None:
        with self._lock:
            self._check_open()
            self._table.unpin(slot)

    def _check_open(self) -> None:
        if self._memory is None:
            raise StaleSlotError("the gpu tier was closed, and all of its slots were freed")

    def _check_sizes(self, sizes_bytes: Sequence[int]) -> None:
        for size_bytes in set(sizes_bytes):
            if size_bytes <= 0 or size_bytes % RECORD_ALIGN_BYTES:
                raise ValueError(f"slot sizes are positive multiples of {RECORD_ALIGN_BYTES}, got {size_bytes}")
        largest = max(sizes_bytes, default=0)
        if largest > self._largest_slot_bytes:
            raise RecordTooLargeError(
                f"one record of {largest} bytes does not fit into the gpu tier of {self._capacity_bytes} bytes, whose "
                f"largest slot has {self._largest_slot_bytes}; open the store with more gpu="
            )

    # Bytes

    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        import torch

        source = data.cast("B")
        part = self._pinned_range(slot, offset, source.nbytes)
        try:
            if source.nbytes:
                host = torch.frombuffer(bytearray(source), dtype=torch.uint8)
                self._move(lambda: part.copy_(host), "writing a slot")
        finally:
            self.unpin(slot)

    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        import torch

        target = into.cast("B")
        part = self._pinned_range(slot, offset, target.nbytes)
        try:
            if target.nbytes:
                host = torch.frombuffer(target, dtype=torch.uint8)
                self._move(lambda: host.copy_(part), "reading a slot")
        finally:
            self.unpin(slot)

    def _pinned_range(self, slot: Slot, offset: int, size_bytes: int) -> Any:
        with self._lock:
            self._check_open()
            begin = self._table.offset(slot) + offset
            if offset < 0 or offset + size_bytes > slot.size_bytes:
                raise ValueError(
                    f"bytes {offset} to {offset + size_bytes} are outside the slot of {slot.size_bytes} bytes"
                )
            self._table.pin(slot)
            return self.memory[begin : begin + size_bytes]

    def _move(self, copy: Any, what: str) -> None:
        self._stream.run(copy)
        self._stream.mark().wait(Deadline.after(DEVICE_COPY_DEADLINE_S), what)

    def close(self) -> None:
        with self._lock:
            self._memory = None
            self._table = SlabTable(0, self._table.slab_bytes)


def _slab_bytes(capacity_bytes: int, largest_slot_bytes: int) -> int:
    """Slabs of several of the largest records, if there are then enough of them; else of one."""
    several = max(SLAB_RECORDS * largest_slot_bytes, DEVICE_SLAB_BYTES_MIN)
    return several if capacity_bytes // several >= SLABS_MIN else largest_slot_bytes
