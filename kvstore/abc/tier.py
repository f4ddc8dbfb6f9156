"""A place where records lie: DRAM, SSD, GPU memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from kvstore.errors import StaleSlotError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Slot(NamedTuple):
    """A descriptor of reserved space. It dies with its generation: every free makes it stale.

    Where its bytes lie may change while it is not pinned; the descriptor does not. A tuple, because a prompt has
    thousands and native code reads them.

    Attributes:
        index: the tier's own number for the space.
        generation: grows each time the space is freed.
        size_bytes: the space's size, a multiple of `RECORD_ALIGN_BYTES`.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a slot
    generation: int
    size_bytes: int


class Tier(ABC):
    """Fixed-capacity space for records, in slots.

    Any thread may call any method. Implementations count every byte they hold for a slot, free or
    not yet free, against `capacity_bytes`. A pool needs a tier with views.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """`dram`, `ssd`, `gpu` ...: what matches and metrics call this tier."""

    @property
    @abstractmethod
    def capacity_bytes(self) -> int:
        """The most bytes that slots may take together."""

    @property
    @abstractmethod
    def used_bytes(self) -> int:
        """Bytes of live slots, quarantined ones included."""

    @property
    @abstractmethod
    def quarantined_bytes(self) -> int:
        """Bytes of slots that were freed while pinned: no longer valid, not yet reusable."""

    @property
    def supports_views(self) -> bool:
        """Whether `view` gives the slot's own memory."""
        return False

    @abstractmethod
    def allocate(self, size_bytes: int) -> Slot | None:
        """Space for one record, its content undefined, or None when there is none: the caller evicts.

        Raises:
            ValueError: the size is no positive multiple of `RECORD_ALIGN_BYTES`; the message says "multiple".
            RecordTooLargeError: the record could never fit; the message names the capacity.
        """

    @abstractmethod
    def free(self, slot: Slot) -> None:
        """Give a slot back. A pinned one is quarantined and returns with its last `unpin`.

        Raises:
            StaleSlotError: the slot has been freed before.
        """

    @abstractmethod
    def pin(self, slot: Slot) -> None:
        """Bytes are about to move in or out: the space must not be reused until `unpin`.

        Raises:
            StaleSlotError: the slot has been freed.
        """

    @abstractmethod
    def unpin(self, slot: Slot) -> None:
        """End one `pin`. Valid also for a slot that was freed meanwhile: the last one ends its quarantine.

        Raises:
            StaleSlotError: the slot is not pinned.
        """

    @abstractmethod
    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        """Copy `data` into the slot. Sizes and `offset` count bytes, whatever the buffer's items are.

        Raises:
            StaleSlotError: the slot has been freed.
            ValueError: the range, also an empty one, lies outside the slot (the message says "outside"); nothing was
                copied.
        """

    @abstractmethod
    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        """Copy from the slot into `into`; raises as `write` does."""

    def view(self, slot: Slot) -> memoryview:
        """The slot's own memory, writable, of format "B". It stays the slot's only while the slot is pinned.

        Raises:
            StaleSlotError: the slot has been freed.
            NotImplementedError: `supports_views` is False.
        """
        raise NotImplementedError(f"tier {self.name!r} has no views; use read and write")

    # In bulk: what a prompt needs, in one call. Overridden where one call is cheaper than many.

    def views(self, slots: Iterable[Slot]) -> list[memoryview]:
        """`view` of each of these pinned slots; raises as it does."""
        return [self.view(slot) for slot in slots]

    def allocate_all(self, sizes_bytes: Sequence[int]) -> list[Slot] | None:
        """Space for several records, in order, or None and nothing taken.

        Raises:
            ValueError, RecordTooLargeError: as `allocate`, for one of them; nothing was taken.
        """
        slots: list[Slot] = []
        try:
            for size_bytes in sizes_bytes:
                slot = self.allocate(size_bytes)
                if slot is None:
                    break
                slots.append(slot)
        except BaseException:
            self.free_all(slots)
            raise
        if len(slots) == len(sizes_bytes):
            return slots
        self.free_all(slots)
        return None

    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        """Whether `allocate_all` would succeed if `freeing`, live and unpinned, were freed first. Changes nothing.

        It must be exact in both directions: a pool evicts until it says yes, and then allocates. This one is for tiers
        that cannot fragment.
        """
        freed_bytes = sum(slot.size_bytes for slot in freeing)
        return self.used_bytes - freed_bytes + sum(sizes_bytes) <= self.capacity_bytes

    def fits_when_empty(self, sizes_bytes: Sequence[int]) -> bool:
        """Whether `allocate_all` would succeed if the tier held nothing: what it can never hold, no eviction helps."""
        return sum(sizes_bytes) <= self.capacity_bytes

    def free_all(self, slots: Iterable[Slot]) -> None:
        """`free` each; raises as it does, with those before freed and those behind not."""
        for slot in slots:
            self.free(slot)

    def pin_all(self, slots: Iterable[Slot]) -> None:
        """`pin` each, all or none.

        Raises:
            StaleSlotError: one of them has been freed; none is pinned.
        """
        pinned: list[Slot] = []
        try:
            for slot in slots:
                self.pin(slot)
                pinned.append(slot)
        except StaleSlotError:
            self.unpin_all(pinned)
            raise

    def unpin_all(self, slots: Iterable[Slot]) -> None:
        """`unpin` each; raises as it does."""
        for slot in slots:
            self.unpin(slot)

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent."""
