"""Between host memory and a device: a bounded ring of page-locked buffers, and whole records through it or past it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import copy_rows
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, DeviceError
from kvstore.limits import (
    DEVICE_POLL_MAX_S,
    DEVICE_WINDOW_BYTES,
    DEVICE_WINDOWS_MAX,
    STAGING_BUFFER_BYTES,
    STAGING_BUFFERS,
)
from kvstore.record.threads import copy_threads
from kvstore.tiers.gpu.device import host_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvstore.tiers.gpu.device import Device, Mark, Stream


class StagingBuffer:
    """Page-locked host memory of a ring.

    Attributes:
        tensor: uint8, on the host.
        address: of its first byte.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.address = int(tensor.data_ptr())


class StagingRing:
    """A few buffers that are taken, used by host and device, and given back with the mark of their last use.

    Any thread. They are made when they are first needed.
    """

    def __init__(
        self, device: Device, buffer_bytes: int = STAGING_BUFFER_BYTES, buffers_max: int = STAGING_BUFFERS
    ) -> None:
        self.buffer_bytes = buffer_bytes
        self._device = device
        self._left = buffers_max
        self._returned: deque[tuple[StagingBuffer, Mark | None]] = deque()
        self._changed = threading.Condition()

    def take(self, deadline: Deadline) -> StagingBuffer:
        """A buffer that nothing uses any more.

        Raises:
            DeadlineError: all are in use until then. DeviceError: the device failed.
        """
        while True:
            with self._changed:
                for number, (buffer, mark) in enumerate(self._returned):
                    if mark is None or mark.is_done():
                        del self._returned[number]
                        return buffer
                if self._left:
                    self._left -= 1
                    break
                if deadline.has_passed:
                    raise DeadlineError(
                        "every staging buffer between host and device is in use until the deadline; the device is "
                        "busy or hangs"
                    )
                # Buffers that only wait for the device give no notice.
                self._changed.wait(DEVICE_POLL_MAX_S)
        try:
            return StagingBuffer(self._device.staging(self.buffer_bytes))
        except BaseException:
            with self._changed:
                self._left += 1
            raise

    def give(self, buffer: StagingBuffer, mark: Mark | None = None) -> None:
        """Give a buffer back, which the device uses up to a mark."""
        with self._changed:
            self._returned.append((buffer, mark))
            self._changed.notify_all()


@dataclass(frozen=True)
class RecordCopies:
    """Records that lie on a device and in host memory, in the order in which they are needed. Arrays of shape [n].

    Attributes:
        offsets: of each in the device's memory.
        addresses: of each in host memory.
        sizes: bytes of each.
    """

    offsets: npt.NDArray[np.int64]
    addresses: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    def windows(self, window_bytes: int) -> Iterator[RecordCopies]:
        """Parts of at most so many bytes, one record at least."""
        ends = np.cumsum(self.sizes)
        first = 0
        while first < len(ends):
            before = int(ends[first - 1]) if first else 0
            stop = max(first + 1, int(np.searchsorted(ends, before + window_bytes, side="right")))
            yield RecordCopies(self.offsets[first:stop], self.addresses[first:stop], self.sizes[first:stop])
            first = stop

    def runs(self) -> list[tuple[int, int, int]]:
        """(offset, address, bytes) with those joined that follow one another in both memories."""
        if not len(self.sizes):
            return []
        order = np.argsort(self.offsets)
        offsets, addresses, sizes = self.offsets[order], self.addresses[order], self.sizes[order]
        is_first = np.ones(len(order), np.bool_)
        is_first[1:] = (offsets[1:] != offsets[:-1] + sizes[:-1]) | (addresses[1:] != addresses[:-1] + sizes[:-1])
        firsts = np.flatnonzero(is_first)
        totals = np.add.reduceat(sizes, firsts)
        return list(zip(offsets[firsts].tolist(), addresses[firsts].tolist(), totals.tolist(), strict=True))

    def pieces(self, piece_bytes: int) -> RecordCopies:
        """Records larger than this cut into several."""
        if not len(self.sizes) or int(self.sizes.max()) <= piece_bytes:
            return self
        counts = -(-self.sizes // piece_bytes)
        numbers = np.repeat(np.arange(len(counts)), counts)
        begins = (np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)) * piece_bytes
        sizes = np.minimum(piece_bytes, self.sizes[numbers] - begins)
        return RecordCopies(self.offsets[numbers] + begins, self.addresses[numbers] + begins, sizes)


class RecordMover:
    """Copies whole records between host memory and the memory of a device tier, a bounded number of bytes at a time.

    One thread moves with it at a time. Three ways: straight, where the host memory is page-locked (`arena`) or the
    device needs no such; else through the ring.

    Args:
        memory: the device's, a uint8 tensor.
        arena: host memory that is page-locked, if any is.
    """

    def __init__(self, device: Device, memory: Any, ring: StagingRing, arena: memoryview | None) -> None:
        self._memory = memory
        self._ring = ring
        self._stream = device.stream()
        self._is_all_straight = not device.needs_pinning
        self._arena = (0, 0)
        if arena is not None:
            array = np.frombuffer(arena, np.uint8)
            begin = int(array.__array_interface__["data"][0])
            self._arena = (begin, begin + array.nbytes)

    def is_straight(self, copies: RecordCopies) -> bool:
        """Whether these need no staging."""
        if self._is_all_straight or not len(copies.sizes):
            return True
        begin, end = self._arena
        return bool(copies.addresses.min() >= begin and (copies.addresses + copies.sizes).max() <= end)

    def copy_in(self, copies: RecordCopies, is_cancelled: Callable[[], bool]) -> bool:
        """Host to device; blocks until all of it is there, however long. False if it was cancelled: nothing moves then.

        Raises:
            DeviceError: the device failed.
        """
        return self._move(copies, is_cancelled, None, is_in=True)

    def copy_out(self, copies: RecordCopies, is_cancelled: Callable[[], bool], landed: Callable[[int], None]) -> bool:
        """Device to host, as `copy_in`.

        Args:
            landed: told how many, counted from the first, are there.
        """
        return self._move(copies, is_cancelled, landed, is_in=False)

    def _move(
        self,
        copies: RecordCopies,
        is_cancelled: Callable[[], bool],
        landed: Callable[[int], None] | None,
        *,
        is_in: bool,
    ) -> bool:
        straight = self.is_straight(copies)
        window_bytes = DEVICE_WINDOW_BYTES if straight else self._ring.buffer_bytes
        under_way: deque[tuple[int, Mark, Callable[[], None]]] = deque()
        step = self._straight if straight else self._staged
        ends = np.cumsum(copies.sizes)
        cut = copies if straight else copies.pieces(self._ring.buffer_bytes)
        begun = 0
        try:
            for part in cut.windows(window_bytes):
                if is_cancelled():
                    break
                if len(under_way) >= DEVICE_WINDOWS_MAX or (not straight and len(under_way) >= STAGING_BUFFERS // 2):
                    self._end_oldest(under_way, landed)
                begun += int(part.sizes.sum())
                mark, then = step(part, is_in=is_in)
                under_way.append((int(np.searchsorted(ends, begun, side="right")), mark, then))
        except BaseException:
            # What was begun, of the part that failed too, still uses the caller's memory. A device that has failed
            # moves nothing any longer.
            with suppress(DeviceError):
                wait_for(self._stream.mark())
            raise
        while under_way:
            self._end_oldest(under_way, landed)
        return begun == (int(ends[-1]) if len(ends) else 0)

    @staticmethod
    def _end_oldest(
        under_way: deque[tuple[int, Mark, Callable[[], None]]], landed: Callable[[int], None] | None
    ) -> None:
        count, mark, then = under_way[0]
        wait_for(mark)
        under_way.popleft()
        then()
        if landed is not None:
            landed(count)

    def _straight(self, part: RecordCopies, *, is_in: bool) -> tuple[Mark, Callable[[], None]]:
        runs = part.runs()
        memory = self._memory

        def work() -> None:
            for offset, address, size in runs:
                on_device, on_host = memory[offset : offset + size], host_bytes(address, size)
                if is_in:
                    on_device.copy_(on_host, non_blocking=True)
                else:
                    on_host.copy_(on_device, non_blocking=True)

        self._stream.run(work)
        return self._stream.mark(), lambda: None

    def _staged(self, part: RecordCopies, *, is_in: bool) -> tuple[Mark, Callable[[], None]]:
        buffer = self._ring.take(Deadline(float("inf")))
        try:
            begins = np.cumsum(part.sizes) - part.sizes
            staged = RecordCopies(part.offsets, begins, part.sizes)
            runs = staged.runs()
            memory = self._memory
            if is_in:
                copy_bytes(begins + buffer.address, part.addresses, part.sizes)

            def work() -> None:
                for offset, begin, size in runs:
                    on_device, on_host = memory[offset : offset + size], buffer.tensor[begin : begin + size]
                    if is_in:
                        on_device.copy_(on_host, non_blocking=True)
                    else:
                        on_host.copy_(on_device, non_blocking=True)

            self._stream.run(work)
            mark = self._stream.mark()
        except BaseException:
            self._ring.give(buffer, mark_of(self._stream))
            raise

        def then() -> None:
            if not is_in:
                copy_bytes(part.addresses, begins + buffer.address, part.sizes)
            self._ring.give(buffer)

        return mark, then


def mark_of(stream: Stream) -> Mark | None:
    """A mark behind what a stream was asked; None of a device that has failed, where nothing moves any longer."""
    try:
        return stream.mark()
    except DeviceError:
        return None


def wait_for(mark: Mark) -> None:
    """Block until a mark is done, however long: what it stands for uses memory that only this can free."""
    while True:
        try:
            mark.wait(Deadline.after(1.0), "a copy")
        except DeadlineError:
            continue
        return


def copy_bytes(
    destinations: npt.NDArray[np.int64], sources: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> None:
    """Copy runs of bytes between host addresses, in one native call."""
    plan = np.empty((len(sizes), 6), np.uint64)
    plan[:, 0], plan[:, 1] = destinations, sources
    plan[:, 2] = 1
    plan[:, 3] = plan[:, 4] = plan[:, 5] = sizes
    copy_rows(plan, threads=copy_threads(int(sizes.sum())))
