"""What is asked of a device: memory, streams, and marks in them. The seam that tests put a slower device behind."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import DeadlineError
from kvstore.limits import DEVICE_POLL_MAX_S, DEVICE_POLL_MIN_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.clock import Deadline


class Mark(ABC):
    """A point in a stream. Any thread."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether everything before it has ended. Does not wait.

        Raises:
            DeviceError: the device failed; nothing that was asked of it moves any longer.
        """

    def wait(self, deadline: Deadline, what: str) -> None:
        """Block until it is done.

        Args:
            what: is waited for, for messages.

        Raises:
            DeadlineError: it is not done by then; what was asked of the device goes on. DeviceError: as `is_done`.
        """
        pause_s = DEVICE_POLL_MIN_S
        while not self.is_done():
            if deadline.has_passed:
                raise DeadlineError(f"the device has not finished {what} by the deadline; it goes on")
            time.sleep(min(pause_s, max(DEVICE_POLL_MIN_S, deadline.remaining_s())))
            pause_s = min(2 * pause_s, DEVICE_POLL_MAX_S)


class Stream(ABC):
    """Work of a device that is done in order. Any thread; what two threads ask for is done in either order."""

    def run(self, work: Callable[[], None]) -> None:
        """Do what `work` asks of the device behind everything that this stream was asked before.

        `work` may be called at once, with the device's work following later, or be called later itself. So it must own
        what it needs, and return nothing. It moves bytes, so nothing of it is noted for gradients, and tensors that
        require them, or were made in torch's inference mode, may be read and written.

        Raises:
            DeviceError: the device refuses.
        """

        def moved() -> None:
            import torch

            with torch.inference_mode():
                work()

        self.ask(moved)

    @abstractmethod
    def ask(self, work: Callable[[], None]) -> None:
        """For `run`: as it says, in torch's mode as it is."""

    @abstractmethod
    def mark(self) -> Mark:
        """A mark behind everything that this stream was asked so far."""

    @abstractmethod
    def wait(self, mark: Mark) -> None:
        """What this stream is asked from here on begins after a mark of another one. Does not block."""

    @abstractmethod
    def uses(self, tensor: Any) -> None:
        """Memory of this tensor, which another stream allocated, must not be reused before this stream is done."""


@dataclass(frozen=True)
class Pinning:
    """Whether host memory is page-locked for a device, so that copies run beside the host.

    Attributes:
        is_pinned: else copies go through staging buffers, or, on `cpu`, need none.
        why_not: a sentence; empty if it is.
    """

    is_pinned: bool
    why_not: str


class Device(ABC):
    """One device. Any thread.

    Attributes:
        name: `cuda:0`, `cpu`.
        needs_pinning: copies run beside the host only from and to page-locked memory.
    """

    name: str
    needs_pinning: bool

    @abstractmethod
    def holds(self, tensor: Any) -> bool:
        """Whether a tensor lies in this device's memory."""

    @abstractmethod
    def empty(self, size_bytes: int) -> Any:
        """Memory of the device: a uint8 tensor, its content undefined.

        Raises:
            DeviceError: it has not that much.
        """

    @abstractmethod
    def staging(self, size_bytes: int) -> Any:
        """Page-locked host memory, where the device can use it: a uint8 tensor on the host.

        Raises:
            DeviceError: it cannot be had.
        """

    @abstractmethod
    def pin(self, memory: memoryview) -> Pinning:
        """Page-lock memory that is there already; where that fails, the reason is given."""

    @abstractmethod
    def unpin(self, memory: memoryview) -> None:
        """End a `pin` that succeeded. Nothing may move there any longer."""

    @abstractmethod
    def stream(self) -> Stream:
        """A stream of our own."""

    @abstractmethod
    def stream_of(self, given: Any) -> Stream:
        """A caller's stream; None is the one that is current in this thread.

        Raises:
            DeviceError: it is no stream of this device.
        """


def host_bytes(address: int, size_bytes: int) -> Any:
    """Host memory as a uint8 tensor, without a copy. The caller keeps it alive."""
    import ctypes

    import torch

    return torch.frombuffer((ctypes.c_uint8 * size_bytes).from_address(address), dtype=torch.uint8)


def never_free(thing: object) -> None:
    """Keep something, and all that it holds, for as long as the process, its very end included.

    In a forked child: torch asks the device about memory that several streams used before it lets it go, and the device
    is the parent's.
    """
    import ctypes

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
