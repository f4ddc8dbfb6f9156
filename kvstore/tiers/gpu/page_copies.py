"""Copies between pages and host memory, part by part: while one part is gathered, another is used on the host."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.limits import DEVICE_COPY_DEADLINE_S, PAGE_COPIES_MAX, PAGE_STAGING_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore.tiers.gpu.device import Device, Mark, Stream

    HostBytes = npt.NDArray[np.uint8]

PART_ALIGN_BYTES = 64


@dataclass(frozen=True)
class CopyPart:
    """What is moved at once.

    Attributes:
        size_bytes: of packed memory.
        move: packs pages into, or unpacks them from, memory of the device: asked of the stream that is current.
        use: takes what was packed, or gives what is to be unpacked, in host memory that is its own until it returns.
    """

    size_bytes: int
    move: Callable[[Any], None]
    use: Callable[[HostBytes], None]


class _Buffer:
    """A part's memory on the device and on the host; one and the same where the device is the host."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._packed: Any = None
        self._host: Any = None
        self.mark: Mark | None = None

    def part(self, size_bytes: int) -> tuple[Any, Any]:
        """Memory for a part: of the device, and of the host. Nothing may be under way in it."""
        size_bytes = -(-size_bytes // PART_ALIGN_BYTES) * PART_ALIGN_BYTES
        if self._packed is None or len(self._packed) < size_bytes:
            self._packed = self._host = None
            self._packed = self._device.empty(size_bytes)
            self._host = self._device.staging(size_bytes) if self._device.needs_pinning else self._packed
            # The allocator gives memory that the stream of this thread may still be using, and would give it to that
            # stream again while this one still uses it.
            self._stream.wait(self._device.stream_of(None).mark())
            self._stream.uses(self._packed)
        return self._packed[:size_bytes], self._host[:size_bytes]


class _Lane:
    """A stream with two buffers."""

    def __init__(self, device: Device) -> None:
        self.stream: Stream = device.stream()
        self.buffers = (_Buffer(device, self.stream), _Buffer(device, self.stream))

    def settle(self, deadline: Deadline) -> None:
        """Wait until nothing is under way."""
        for buffer in self.buffers:
            if buffer.mark is not None:
                buffer.mark.wait(deadline, "a copy between pages and host memory")
                buffer.mark = None


class PageCopier:
    """Copies of one device, at most `PAGE_COPIES_MAX` at once. Any thread.

    Args:
        staging_bytes: the largest part that callers should make.
    """

    def __init__(self, device: Device, staging_bytes: int = PAGE_STAGING_BYTES) -> None:
        self.device = device
        self.staging_bytes = staging_bytes
        self._free = threading.Condition()
        self._idle: list[_Lane] = []
        self._left = PAGE_COPIES_MAX

    @contextmanager
    def _lane(self, deadline: Deadline) -> Iterator[_Lane]:
        with self._free:
            if not self._free.wait_for(lambda: self._idle or self._left, deadline.remaining_s()):
                raise DeadlineError(
                    f"{PAGE_COPIES_MAX} copies between pages and host memory were still under way at the deadline; "
                    "try again"
                )
            if not self._idle:
                self._left -= 1
            lane = self._idle.pop() if self._idle else None
        try:
            lane = lane or _Lane(self.device)
            lane.settle(deadline)
            yield lane
        finally:
            with self._free:
                if lane is None:
                    self._left += 1
                else:
                    self._idle.append(lane)
                self._free.notify()

    def out_of_pages(self, parts: Iterable[CopyPart], after: Sequence[Mark], deadline: Deadline) -> None:
        """Pack each part, bring it to the host, and have it used there, in order. Blocks.

        When this ends, also by an error, nothing reads pages any longer; unless the device did not finish by
        `DEVICE_COPY_DEADLINE_S`.

        Args:
            after: what has filled the pages.

        Raises:
            DeadlineError: it took too long; parts were used in order, up to some. DeviceError: the device failed.
        """
        with self._lane(deadline) as lane:
            for mark in after:
                lane.stream.wait(mark)
            under_way: deque[tuple[CopyPart, _Buffer, Any]] = deque()
            try:
                for number, part in enumerate(parts):
                    if len(under_way) == len(lane.buffers):
                        _use(*under_way.popleft(), deadline)
                    buffer = lane.buffers[number % len(lane.buffers)]
                    packed, host = buffer.part(part.size_bytes)
                    lane.stream.run(lambda part=part, packed=packed: part.move(packed))  # type: ignore[misc]
                    if host is not packed:
                        lane.stream.run(lambda host=host, packed=packed: _copy(host, packed))  # type: ignore[misc]
                    buffer.mark = lane.stream.mark()
                    under_way.append((part, buffer, host))
                while under_way:
                    _use(*under_way.popleft(), deadline)
            except BaseException:
                lane.settle(Deadline.after(DEVICE_COPY_DEADLINE_S))
                raise

    def into_pages(self, parts: Iterable[CopyPart], after: Sequence[Mark], deadline: Deadline) -> Mark:
        """Have each part made on the host, bring it to the device, and unpack it, in order.

        Returns:
            A mark behind everything: what reads the pages begins after it.

        Raises:
            DeadlineError: it took too long. DeviceError: the device failed. Some pages may have been written.
        """
        with self._lane(deadline) as lane:
            for mark in after:
                lane.stream.wait(mark)
            try:
                for number, part in enumerate(parts):
                    buffer = lane.buffers[number % len(lane.buffers)]
                    if buffer.mark is not None:
                        buffer.mark.wait(deadline, "a copy into pages")
                        buffer.mark = None
                    packed, host = buffer.part(part.size_bytes)
                    part.use(host.numpy())
                    if host is not packed:
                        lane.stream.run(lambda host=host, packed=packed: _copy(packed, host))  # type: ignore[misc]
                    lane.stream.run(lambda part=part, packed=packed: part.move(packed))  # type: ignore[misc]
                    buffer.mark = lane.stream.mark()
            except BaseException:
                lane.settle(Deadline.after(DEVICE_COPY_DEADLINE_S))
                raise
            return lane.stream.mark()


def _copy(destination: Any, source: Any) -> None:
    destination.copy_(source, non_blocking=True)


def _use(part: CopyPart, buffer: _Buffer, host: Any, deadline: Deadline) -> None:
    assert buffer.mark is not None
    buffer.mark.wait(deadline, "a copy out of pages")
    buffer.mark = None
    part.use(host.numpy()[: part.size_bytes])
