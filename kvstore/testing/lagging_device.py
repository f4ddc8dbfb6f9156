"""A device that does nothing until it is told to: what is done too early, or reused too soon, shows.

Its memory is host memory, its streams are queues. A stream's queue moves on when a mark behind it is waited for, or by
`LaggingDevice.drain`; nothing moves by itself. Needs torch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from kvstore.errors import DeadlineError, DeviceError
from kvstore.tiers.gpu.device import Device, Mark, Pinning, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.clock import Deadline


class LaggingMark(Mark):
    """A point in the queue of a stream."""

    def __init__(self, stream: LaggingStream, position: int) -> None:
        self.stream = stream
        self.position = position

    def is_done(self) -> bool:
        device = self.stream.device
        with device.lock:
            if device.failure is not None:
                raise DeviceError(device.failure)
            if self.stream.done < self.position and not device.is_held:
                device.run_until(self)
            return self.stream.done >= self.position

    def wait(self, deadline: Deadline, what: str) -> None:
        # A look at it is what makes it move, unless the device is held.
        while not self.is_done():
            if deadline.has_passed:
                raise DeadlineError(f"the device has not finished {what} by the deadline; it goes on")
            time.sleep(1e-4)


class LaggingStream(Stream):
    """A queue of work.

    Attributes:
        is_held: it does not move; others do.
    """

    def __init__(self, device: LaggingDevice) -> None:
        self.device = device
        self.queue: deque[Callable[[], None] | LaggingMark] = deque()
        self.is_held = False
        self.asked = 0
        self.done = 0

    def ask(self, work: Callable[[], None]) -> None:
        with self.device.lock:
            if self.device.failure is not None:
                raise DeviceError(self.device.failure)
            self.queue.append(work)
            self.asked += 1

    def mark(self) -> LaggingMark:
        with self.device.lock:
            return LaggingMark(self, self.asked)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, LaggingMark)
        with self.device.lock:
            self.queue.append(mark)
            self.asked += 1

    def uses(self, tensor: Any) -> None:
        """Nothing: what is queued holds the tensor."""


class LaggingDevice(Device):
    """Host memory that is called a device's.

    Attributes:
        is_held: nothing moves, not even when it is waited for; only `drain` moves it.
        lock: held while work is done.
        failure: once set, everything fails by it.

    Args:
        may_pin: whether host memory can be page-locked.
        capacity_bytes: more memory is refused.
    """

    name = "lagging"
    needs_pinning = True

    def __init__(self, *, may_pin: bool = True, capacity_bytes: int = 1 << 30) -> None:
        self.lock = threading.RLock()
        self.streams: list[LaggingStream] = []
        self.is_held = False
        self.failure: str | None = None
        self.pinned: list[memoryview] = []
        self._may_pin = may_pin
        self._left_bytes = capacity_bytes
        self._own: set[int] = set()
        self._kept: list[Any] = []
        self._default = self.stream()

    def drain(self) -> None:
        """Do all work that was asked for."""
        with self.lock:
            while any(self._step(stream) for stream in self.streams):
                continue

    @property
    def waiting(self) -> int:
        """Pieces of work that were asked for and not done."""
        with self.lock:
            return sum(len(stream.queue) for stream in self.streams)

    def _step(self, stream: LaggingStream) -> bool:
        if not stream.queue or stream.is_held:
            return False
        head = stream.queue[0]
        if isinstance(head, LaggingMark):
            if head.stream.done < head.position:
                return False
        else:
            head()
        stream.queue.popleft()
        stream.done += 1
        return True

    def run_until(self, mark: LaggingMark) -> None:
        """What a mark stands behind, and nothing else, up to a stream that is held. The lock is held."""
        while mark.stream.done < mark.position and not mark.stream.is_held:
            head = mark.stream.queue[0]
            if isinstance(head, LaggingMark):
                self.run_until(head)
            if not self._step(mark.stream):
                return

    def tensor(self, host: Any) -> Any:
        """A copy of a host tensor that counts as this device's, at once."""
        own = host.clone()
        self._own.add(own.untyped_storage().data_ptr())
        self._kept.append(own)
        return own

    def holds(self, tensor: Any) -> bool:
        return hasattr(tensor, "data_ptr") and tensor.untyped_storage().data_ptr() in self._own

    def empty(self, size_bytes: int) -> Any:
        import torch

        if size_bytes > self._left_bytes:
            raise DeviceError(f"taking {size_bytes} bytes of the device failed: {self._left_bytes} are left")
        return self.tensor(torch.full((size_bytes,), 0xDD, dtype=torch.uint8))

    def staging(self, size_bytes: int) -> Any:
        import torch

        return torch.full((size_bytes,), 0xEE, dtype=torch.uint8)

    def pin(self, memory: memoryview) -> Pinning:
        if not self._may_pin:
            return Pinning(False, "this device was told to refuse")
        self.pinned.append(memory)
        return Pinning(True, "")

    def unpin(self, memory: memoryview) -> None:
        self.pinned.remove(memory)

    def stream(self) -> LaggingStream:
        stream = LaggingStream(self)
        with self.lock:
            self.streams.append(stream)
        return stream

    def stream_of(self, given: Any) -> LaggingStream:
        if given is None:
            return self._default
        if not isinstance(given, LaggingStream):
            raise DeviceError(f"{given!r} is no stream of this device")
        return given
