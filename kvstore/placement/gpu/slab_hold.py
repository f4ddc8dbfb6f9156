"""A resume point in device memory: held, and on its way into host memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import DeadlineError, DeviceError
from kvstore.placement.shelf import ShelfHold, ShelfLoad
from kvstore.pool.rows import SLOT_BYTES
from kvstore.tiers.gpu.staging import RecordCopies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    import numpy.typing as npt

    from kvstore._native import HeldRows
    from kvstore.abc import SlotRows
    from kvstore.clock import Deadline
    from kvstore.placement.gpu.slab_shelf import SlabShelf
    from kvstore.pool.path import NodePath
    from kvstore.pool.rows import Rows


class SlabHold(ShelfHold):
    """Records that stay where they are on the device until released.

    Attributes:
        path, salt, rows: as `ShelfHold`.
        slots: of each row.
        locations: where each begins in the device's memory, `[n]`.
        held: what the index holds.
    """

    def __init__(
        self,
        shelf: SlabShelf,
        path: NodePath,
        salt: bytes,
        rows: Rows,
        slots: SlotRows,
        locations: npt.NDArray[np.int64],
        held: HeldRows,
    ) -> None:
        self.path = path
        self.salt = salt
        self.rows = rows
        self.slots = slots
        self.locations = locations
        self.held = held
        self._shelf = shelf
        self._lock = threading.Lock()
        self._loads: list[SlabLoad] = []
        self._is_released = False

    @property
    def memory(self) -> Any:
        """The device's memory that `locations` count in, a uint8 tensor."""
        return self._shelf.memory

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> SlabLoad:
        chosen = np.asarray(numbers, np.int64)
        sizes = self.rows.table[chosen, SLOT_BYTES].astype(np.int64)
        copies = RecordCopies(self.locations[chosen], np.asarray(addresses).astype(np.int64), sizes)
        load = SlabLoad(len(chosen))
        with self._lock:
            if self._is_released:
                raise ValueError("the hold was released; its records may have gone")
            self._loads = [each for each in self._loads if not each.has_ended]
            self._loads.append(load)
        self._shelf.begin_load(copies, load)
        return load

    def release(self) -> None:
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
            loads, self._loads = self._loads, []
        for load in loads:
            load.cancel()
        self._shelf.let_go(self)


class SlabLoad(ShelfLoad):
    """Records on their way from the device.

    Args:
        count: of them.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._changed = threading.Condition()
        self._arrived = 0
        self._has_ended = False
        self._is_cancelled = False

    def wait(self, count: int, deadline: Deadline) -> Sequence[int]:
        with self._changed:
            while self._arrived < count and not self._has_ended:
                if deadline.has_passed:
                    raise DeadlineError(
                        f"{self._arrived} of {self._count} records have come from the device by the deadline; "
                        f"{count} were waited for"
                    )
                self._changed.wait(min(deadline.remaining_s(), 1.0))
            # In order: what has not arrived at the end has failed.
            return range(self._arrived, max(self._arrived, count))

    def cancel(self) -> None:
        with self._changed:
            self._is_cancelled = True
            while not self._has_ended:
                self._changed.wait()

    @property
    def has_ended(self) -> bool:
        """Whether nothing moves any longer."""
        return self._has_ended

    @property
    def is_cancelled(self) -> bool:
        """For whoever moves the records."""
        return self._is_cancelled

    def landed(self, count: int) -> None:
        """For whoever moves the records: so many, counted from the first, are there."""
        with self._changed:
            self._arrived = count
            self._changed.notify_all()

    def end(self) -> None:
        """For whoever moves the records: nothing moves any longer."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def run(self, move: Callable[[], bool]) -> DeviceError | None:
        """Move the records, whatever happens come to an end; the error of a device that failed."""
        try:
            if not self._is_cancelled:
                move()
        except DeviceError as error:
            return error
        finally:
            self.end()
        return None
