"""Tiers against the kit, and the kit against tiers: each defect below must fail the case named beside it."""

from __future__ import annotations

import mmap
import os
import shutil
import threading
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import Slot, Tier
from kvstore.errors import RecordTooLargeError, StaleSlotError
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.testing.tier import TierConformance
from kvstore.tiers import ArenaTier
from kvstore.tiers.arena import SHARED_MEMORY_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


class TestArena(TierConformance):
    """In a memfd, looked at through a mapping of its own."""

    largest_bytes = 8 * RECORD_ALIGN_BYTES

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        with closing(ArenaTier(self.capacity_bytes, largest_slot_bytes=self.largest_bytes)) as tier:
            yield tier
            if tier.used_bytes:  # not closed by the case
                tier.check()

    def peek(self, tier: Tier, slot: Slot) -> bytes:
        assert isinstance(tier, ArenaTier)
        tier.pin(slot)
        begin = tier.location(slot)
        with mmap.mmap(tier.descriptor, len(tier.memory), mmap.MAP_SHARED, mmap.PROT_READ) as mapping:
            content = mapping[begin : begin + slot.size_bytes]
        tier.unpin(slot)
        return content


class TestNamedArena(TestArena):
    """In /dev/shm."""

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        if not os.path.isdir(SHARED_MEMORY_DIRECTORY):
            pytest.skip(f"there is no {SHARED_MEMORY_DIRECTORY}")
        if shutil.disk_usage(SHARED_MEMORY_DIRECTORY).free < 2 * self.capacity_bytes:
            pytest.skip(f"{SHARED_MEMORY_DIRECTORY} has no room")
        name = f"test-{os.getpid()}"
        with closing(ArenaTier(self.capacity_bytes, name=name, largest_slot_bytes=self.largest_bytes)) as tier:
            yield tier
        assert not os.path.exists(f"{SHARED_MEMORY_DIRECTORY}/kvstore-{name}")


class DictTier(Tier):
    """Records as byte strings in a dictionary: the seam as an outsider would implement it, without views."""

    def __init__(self, capacity_bytes: int) -> None:
        self.contents: dict[int, bytearray] = {}
        self._capacity_bytes = capacity_bytes
        self._pins: dict[int, int] = {}
        self._quarantined: dict[int, int] = {}
        self._next = 0
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        return "dict"

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return sum(len(content) for content in self.contents.values()) + self.quarantined_bytes

    @property
    def quarantined_bytes(self) -> int:
        return sum(self._quarantined.values())

    def allocate(self, size_bytes: int) -> Slot | None:
        if size_bytes > self._capacity_bytes:
            raise RecordTooLargeError(f"{size_bytes} bytes are more than {self._capacity_bytes}")
        if size_bytes <= 0 or size_bytes % RECORD_ALIGN_BYTES:
            raise ValueError(f"{size_bytes} is not a positive multiple of {RECORD_ALIGN_BYTES}")
        with self._lock:
            if self.used_bytes + size_bytes > self._capacity_bytes:
                return None
            self._next += 1
            self.contents[self._next] = bytearray(size_bytes)
            return Slot(self._next, 0, size_bytes)

    def free(self, slot: Slot) -> None:
        with self._lock:
            content = self.contents.pop(slot.index, None)
            if content is None:
                raise StaleSlotError(f"slot {slot.index} has been freed")
            if self._pins.get(slot.index):
                self._quarantined[slot.index] = len(content)

    def pin(self, slot: Slot) -> None:
        with self._lock:
            self._content(slot)
            self._pins[slot.index] = self._pins.get(slot.index, 0) + 1

    def unpin(self, slot: Slot) -> None:
        with self._lock:
            if not self._pins.get(slot.index):
                raise StaleSlotError(f"slot {slot.index} is not pinned")
            self._pins[slot.index] -= 1
            if not self._pins[slot.index]:
                self._quarantined.pop(slot.index, None)

    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        with self._lock:
            content = self._content(slot)
            self._check_range(slot, offset, data.nbytes)
            content[offset : offset + data.nbytes] = data.cast("B")

    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        with self._lock:
            content = self._content(slot)
            self._check_range(slot, offset, into.nbytes)
            into.cast("B")[:] = content[offset : offset + into.nbytes]

    def close(self) -> None:
        with self._lock:
            self.contents.clear()

    def _content(self, slot: Slot) -> bytearray:
        if slot.index not in self.contents:
            raise StaleSlotError(f"slot {slot.index} has been freed")
        return self.contents[slot.index]

    def _check_range(self, slot: Slot, offset: int, size_bytes: int) -> None:
        if offset < 0 or offset + size_bytes > slot.size_bytes:
            raise ValueError(f"bytes {offset} to {offset + size_bytes} are outside the slot")


class TestDict(TierConformance):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        with closing(DictTier(self.capacity_bytes)) as tier:
            yield tier

    def peek(self, tier: Tier, slot: Slot) -> bytes:
        assert isinstance(tier, DictTier)
        return bytes(tier.contents[slot.index])


class IgnoresPins(DictTier):
    def pin(self, slot: Slot) -> None:
        with self._lock:
            self._content(slot)

    def unpin(self, slot: Slot) -> None:
        pass


class ForgetsGenerations(DictTier):
    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes)
        self._unused: list[int] = []

    def allocate(self, size_bytes: int) -> Slot | None:
        slot = super().allocate(size_bytes)
        if slot is None or not self._unused:
            return slot
        index = self._unused.pop()
        self.contents[index] = self.contents.pop(slot.index)
        return Slot(index, 0, size_bytes)

    def free(self, slot: Slot) -> None:
        super().free(slot)
        self._unused.append(slot.index)


class KeepsAPart(DictTier):
    def allocate_all(self, sizes_bytes: Sequence[int]) -> list[Slot] | None:
        slots = [slot for size in sizes_bytes if (slot := self.allocate(size)) is not None]
        return slots if len(slots) == len(sizes_bytes) else None


class PinsAPart(DictTier):
    def pin_all(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.pin(slot)


class Promises(DictTier):
    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        return True


class FreesToSee(DictTier):
    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        slots = self.allocate_all(sizes_bytes)
        return slots is not None


class WritesPastTheEnd(DictTier):
    def _check_range(self, slot: Slot, offset: int, size_bytes: int) -> None:
        if offset < 0:
            raise ValueError("a negative offset lies outside")


class CountsItems(DictTier):
    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        super().write(slot, data.cast("B")[: len(data)], offset)


class LeaksOnFree(DictTier):
    def free(self, slot: Slot) -> None:
        super().free(slot)
        self._quarantined[slot.index] = slot.size_bytes


class EvictsByItself(DictTier):
    def allocate(self, size_bytes: int) -> Slot | None:
        slot = super().allocate(size_bytes)
        if slot is None and self.contents:
            self.contents.pop(next(iter(self.contents)))
            slot = super().allocate(size_bytes)
        return slot


class SharesSlots(DictTier):
    def allocate(self, size_bytes: int) -> Slot | None:
        slot = super().allocate(size_bytes)
        if slot is not None and slot.index > 2 and len(self.contents[slot.index - 1]) == size_bytes:
            self.contents[slot.index] = self.contents[slot.index - 1]
        return slot


@pytest.mark.parametrize(
    ("broken", "case"),
    [
        (IgnoresPins, TierConformance.test_a_pinned_slot_is_quarantined),
        (ForgetsGenerations, TierConformance.test_a_freed_slot_is_stale_for_ever),
        (CountsItems, TierConformance.test_buffers_of_wider_items_count_in_bytes),
        (LeaksOnFree, TierConformance.test_every_byte_is_counted),
        (EvictsByItself, TierConformance.test_full_is_none_and_changes_nothing),
        (SharesSlots, TierConformance.test_slots_do_not_overlap),
        (KeepsAPart, TierConformance.test_all_or_none),
        (PinsAPart, TierConformance.test_a_stale_slot_among_many_pins_none),
        (Promises, partial(TierConformance.test_would_fit_tells_what_happens, seed=0)),
        (FreesToSee, partial(TierConformance.test_would_fit_tells_what_happens, seed=0)),
    ],
)
def test_the_kit_notices(broken: Callable[[int], Tier], case: Callable[[TierConformance, Tier], None]) -> None:
    kit = TierConformance()
    case(kit, DictTier(kit.capacity_bytes))
    with pytest.raises((AssertionError, StaleSlotError, pytest.fail.Exception)):
        case(kit, broken(kit.capacity_bytes))


def test_the_kit_notices_writes_past_the_end() -> None:
    kit = TierConformance()
    kit.test_ranges_outside_the_slot(DictTier(kit.capacity_bytes), RECORD_ALIGN_BYTES, 1)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        kit.test_ranges_outside_the_slot(WritesPastTheEnd(kit.capacity_bytes), RECORD_ALIGN_BYTES, 1)
