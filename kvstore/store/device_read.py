"""From a lease's records into tensors of a device: out of the device's own memory where they lie there."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import LeaseError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.tiers.gpu.gather import ByteRuns, gather_resident, stage_in
from kvstore.tiers.gpu.staging import mark_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.placement.gpu.slab_hold import SlabHold
    from kvstore.record.array_view import ArrayView
    from kvstore.store.devices import DeviceLane
    from kvstore.store.lease import LayerView, Lease, _Column
    from kvstore.tiers.gpu.device import Stream

Asked = tuple[int, int, "ArrayView"]
"""Group, tensor, and the destination as if it were contiguous and began at 0; its owner is the tensor itself."""


class DeviceReads:
    """What one lease copies to devices. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._residents: dict[DeviceLane, _Resident | None] = {}
        self._is_over = False

    def copy(self, layer: LayerView, lane: DeviceLane, stream: Any, asked: Sequence[Asked]) -> int:
        """Copy tensors of a layer, without waiting for the device; the bytes."""
        callers = lane.device.stream_of(stream)
        with layer._lease._device_use.asking():
            resident = self._resident(layer._lease, lane)
            try:
                if resident is not None:
                    size_bytes = self._gather(layer, resident, callers, asked)
                    lane.account(read_bytes=size_bytes, resident_bytes=size_bytes)
                else:
                    size_bytes = self._stage(layer, lane, callers, asked)
                    lane.account(read_bytes=size_bytes)
            finally:
                # What was asked of the device reads on, also where the next thing could not be asked.
                mark = mark_of(callers)
                if mark is not None:
                    layer._lease._device_use.add(lane, mark)
        return size_bytes

    @staticmethod
    def _gather(layer: LayerView, resident: _Resident, callers: Stream, asked: Sequence[Asked]) -> int:
        size_bytes = 0
        for group, index, view in asked:
            runs = ByteRuns.of_plan(layer._plan(group, index, view, resident.offsets))
            gather_resident(resident.hold.memory, runs, view.owner, callers)
            size_bytes += runs.size_bytes
        return size_bytes

    @staticmethod
    def _stage(layer: LayerView, lane: DeviceLane, callers: Stream, asked: Sequence[Asked]) -> int:
        deadline = Deadline.after(DEVICE_COPY_DEADLINE_S)
        # The caller may have asked for something that still uses the destination, or for what fills it first.
        lane.reads.stream.wait(callers.mark())
        size_bytes = 0
        try:
            for group, index, view in asked:
                runs = ByteRuns.of_plan(layer._plan(group, index, view))
                lane.reads.stream.uses(view.owner)
                stage_in(lane.reads.ring, runs, view.owner, lane.reads.stream, deadline)
                size_bytes += runs.size_bytes
        finally:
            mark = mark_of(lane.reads.stream)
            if mark is not None:
                callers.wait(mark)
        return size_bytes

    def _resident(self, lease: Lease, lane: DeviceLane) -> _Resident | None:
        """The lease's very records in the device's memory; None if one of them is not there."""
        if lane.shelf is None:
            return None
        with self._lock:
            if self._is_over:
                raise LeaseError("the lease was released; read the match again")
            if lane not in self._residents:
                hold = lane.shelf.hold(
                    lease.path,
                    shard=lease.shard,
                    grids={
                        (held.name.node, held.name.group, held.name.span): held.header.grid for held in lease.records
                    },
                )
                resident = None if hold is None else _Resident(hold)
                if resident is not None and not resident.has_all(lease):
                    resident.hold.release()
                    resident = None
                self._residents[lane] = resident
            return self._residents[lane]

    def take_holds(self) -> list[SlabHold]:
        """For the lease's end: what has to be let go with it."""
        with self._lock:
            self._is_over = True
            residents, self._residents = self._residents, {}
        return [resident.hold for resident in residents.values() if resident is not None]


class _Resident:
    """Where records of a resume point lie on a device."""

    def __init__(self, hold: SlabHold) -> None:
        self.hold = hold
        self._offsets = {tuple(name): offset for name, offset in self._named(hold)}

    @staticmethod
    def _named(hold: SlabHold) -> list[tuple[list[int], int]]:
        return list(zip(hold.rows.record_names.table.tolist(), hold.locations.tolist(), strict=True))

    def has_all(self, lease: Lease) -> bool:
        """Whether each of the lease's records is there, not another one that holds the same tokens."""
        return all(_key(held.name) in self._offsets for held in lease.records)

    def offsets(self, column: _Column) -> npt.NDArray[np.uint64]:
        """Of the records of a column, in their order."""
        return np.array([self._offsets[_key(held.name)] for held in column.records], np.uint64)


def _key(name: Any) -> tuple[int, ...]:
    return name.node, name.group, name.span, name.units.start, name.units.stop
