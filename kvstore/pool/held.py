"""Records with their memory: committed ones that somebody holds, and reserved ones that are being written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from kvstore._native import addresses_of
from kvstore.abc import SlotRows, SlotViews

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc import Slot
    from kvstore.pool.path import RecordName
    from kvstore.pool.rows import Rows
    from kvstore.record import RecordHeader, RecordLayout


@dataclass(frozen=True)
class HeldRecord:
    """A committed record that stays where it is while a lease or a transaction holds it.

    Attributes:
        name: its node in the path, group, span and units.
        layout: where its pieces lie.
        memory: the record's bytes, from its header on. Read only.
        header: its metadata.
        slot: where it lies.
    """

    name: RecordName
    layout: RecordLayout
    memory: memoryview
    header: RecordHeader
    slot: Slot


@dataclass(frozen=True)
class TransactionRecord:
    """A record that is being written.

    Attributes:
        name: its node in the path, group, span and units.
        layout: where its pieces go.
        memory: the reserved slot, writable.
        header: its metadata, all but the cost.
        slot: the reservation.
    """

    name: RecordName
    layout: RecordLayout
    memory: memoryview
    header: RecordHeader
    slot: Slot


@dataclass(frozen=True)
class PlacedRows:
    """Records as arrays, and where they lie while their slots are pinned.

    Attributes:
        rows: what they are.
        slots, memories: where they are, in the same order.
    """

    rows: Rows
    slots: SlotRows
    memories: Sequence[memoryview]

    @cached_property
    def addresses(self) -> npt.NDArray[np.uint64]:
        """Of each record's first byte, `[n]`."""
        return addresses_of_memories(self.memories)

    def held(self) -> tuple[HeldRecord, ...]:
        """The records one by one, as committed ones."""
        rows = self.rows
        return tuple(map(HeldRecord, rows.names(), rows.layouts(), self.memories, rows.headers(), self.slots))

    def reserved(self) -> tuple[TransactionRecord, ...]:
        """The records one by one, as reserved ones."""
        rows = self.rows
        return tuple(map(TransactionRecord, rows.names(), rows.layouts(), self.memories, rows.headers(), self.slots))


def addresses_of_memories(memories: Sequence[memoryview]) -> npt.NDArray[np.uint64]:
    """Of each one's first byte, `[n]`."""
    return memories.addresses if isinstance(memories, SlotViews) else addresses_of(memories)
