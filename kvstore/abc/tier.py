"""A place where records lie: DRAM, SSD, GPU memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, overload

import numpy as np

from kvstore._native import addresses_of
from kvstore.errors import StaleSlotError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt


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


class SlotRows(Sequence[Slot]):
    """Slots as an array; a `Slot` is made only when it is looked at, since a prompt has thousands.

    Attributes:
        table: index, generation and size of each, `[n, 3]`.
    """

    def __init__(self, table: npt.NDArray[np.uint64]) -> None:
        self.table = np.ascontiguousarray(table, np.uint64)

    @classmethod
    def of(cls, slots: Iterable[Slot]) -> SlotRows:
        """Any slots, in their order. Raises `TypeError` for what is none."""
        if isinstance(slots, SlotRows):
            return slots
        slots = list(slots)
        if any(not isinstance(slot, tuple) or len(slot) != 3 for slot in slots):
            raise TypeError("a slot is a tuple of index, generation and size in bytes")
        return cls(np.fromiter(chain.from_iterable(slots), np.uint64).reshape(-1, 3))

    @classmethod
    def join(cls, parts: Iterable[Iterable[Slot]]) -> SlotRows:
        """The slots of all parts, in their order."""
        return cls(np.concatenate([np.empty((0, 3), np.uint64), *(cls.of(part).table for part in parts)]))

    def taken(self, numbers: Iterable[int]) -> SlotRows:
        """Those of these numbers."""
        return SlotRows(self.table[np.fromiter(numbers, np.int64)])

    @property
    def size_bytes(self) -> int:
        """Of all of them."""
        return int(self.table[:, 2].sum())

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> Slot: ...
    @overload
    def __getitem__(self, index: slice) -> SlotRows: ...
    def __getitem__(self, index: int | slice) -> Slot | SlotRows:
        if isinstance(index, slice):
            return SlotRows(self.table[index])
        return Slot(*self.table[index].tolist())

    def __iter__(self) -> Iterator[Slot]:
        return map(Slot._make, self.table.tolist())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # like a list


class SlotViews(Sequence[memoryview]):
    """Memory of slots that lie in one mapping; a view is made only when it is looked at, since a prompt has thousands.

    Args:
        memory: the mapping.
        begins: where in it each slot begins, `[n]`.
        sizes_bytes: of each slot, `[n]`.
    """

    def __init__(self, memory: memoryview, begins: npt.NDArray[np.uint64], sizes_bytes: npt.NDArray[np.uint64]) -> None:
        self._memory = memory
        self._begins = begins
        self._sizes_bytes = sizes_bytes

    def __len__(self) -> int:
        return len(self._sizes_bytes)

    @overload
    def __getitem__(self, index: int) -> memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> SlotViews: ...
    def __getitem__(self, index: int | slice) -> memoryview | SlotViews:
        if isinstance(index, slice):
            return SlotViews(self._memory, self._begins[index], self._sizes_bytes[index])
        begin = int(self._begins[index])
        return self._memory[begin : begin + int(self._sizes_bytes[index])]

    @property
    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of each slot's first byte, `[n]`."""
        return self._begins + addresses_of([self._memory])


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

    def views(self, slots: Iterable[Slot]) -> Sequence[memoryview]:
        """`view` of each of these pinned slots; raises as it does."""
        return [self.view(slot) for slot in slots]

    def allocate_all(self, sizes_bytes: Sequence[int]) -> Sequence[Slot] | None:
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
