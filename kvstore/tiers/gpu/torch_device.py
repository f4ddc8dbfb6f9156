"""Devices through torch: CUDA, and `cpu`, where everything has happened when a call returns."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import DeviceError, UnavailableError
from kvstore.tiers.gpu.device import Device, Mark, Pinning, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

HOST_REGISTER_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every CUDA context of the process."""

LEGACY_STREAM = 0
"""The default stream as a cudaStream_t. torch.cuda.ExternalStream(0) would be some stream of torch's own."""


def upload(array: npt.NDArray[Any], device: Any) -> Any:
    """A small array of the host as a tensor of a torch device, for what the current stream is asked next.

    To a GPU it goes through page-locked memory, which torch keeps until it was copied: from any other, this thread
    would wait until the stream had done all that it was asked before. The array may be changed when this returns.
    """
    import torch

    host = torch.from_numpy(array)
    if device.type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.clone()


def open_device(name: str) -> Device:
    """The device of this name: `cuda`, `cuda:1`, `cpu`.

    Raises:
        UnavailableError: torch is not installed, or there is no such device.
    """
    try:
        import torch
    except ImportError as error:
        raise UnavailableError("device memory is used through torch: pip install 'kvstore[torch]'") from error
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnavailableError(f"{name!r} is no device; pass 'cuda', 'cuda:1' or 'cpu'") from error
    if device.type == "cpu":
        return HostDevice()
    if device.type != "cuda":
        raise UnavailableError(f"devices of type {device.type!r} are not supported; pass 'cuda', 'cuda:1' or 'cpu'")
    if not torch.cuda.is_available():
        raise UnavailableError(
            f"there is no device {name!r}: torch {torch.__version__} finds no CUDA; pass device='cpu' to try the tier"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise UnavailableError(f"there is no device {name!r}: torch finds {count} CUDA devices")
    return CudaDevice(index)


@contextmanager
def _device_errors(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of a device, and of its memory, are of this class
        if isinstance(error, DeviceError):
            raise
        raise DeviceError(f"{what} failed: {error}") from error


class _Done(Mark):
    def is_done(self) -> bool:
        return True


class _HostStream(Stream):
    def ask(self, work: Callable[[], None]) -> None:
        with _device_errors("work on the host"):
            work()

    def mark(self) -> Mark:
        return _Done()

    def wait(self, mark: Mark) -> None:
        pass  # what the mark stands behind had happened before the mark was made

    def uses(self, tensor: Any) -> None:
        pass  # nothing is used any longer when `run` returns


class HostDevice(Device):
    """The host as a device of its own: the same calls, without a GPU."""

    name = "cpu"
    needs_pinning = False

    def holds(self, tensor: Any) -> bool:
        return hasattr(tensor, "data_ptr") and tensor.device.type == "cpu"

    def empty(self, size_bytes: int) -> Any:
        import torch

        with _device_errors(f"taking {size_bytes} bytes of host memory"):
            return torch.empty(size_bytes, dtype=torch.uint8)

    def staging(self, size_bytes: int) -> Any:
        return self.empty(size_bytes)

    def pin(self, memory: memoryview) -> Pinning:
        return Pinning(False, "the device is the host")

    def unpin(self, memory: memoryview) -> None:
        pass  # nothing was pinned

    def stream(self) -> Stream:
        return _HostStream()

    def stream_of(self, given: Any) -> Stream:
        if given is not None:
            raise DeviceError(f"the device 'cpu' has no streams, got {given!r}; leave stream= out")
        return _HostStream()


class _CudaMark(Mark):
    def __init__(self, event: Any) -> None:
        self.event = event

    def is_done(self) -> bool:
        with _device_errors("work on the device"):
            return bool(self.event.query())


class _CudaStream(Stream):
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def ask(self, work: Callable[[], None]) -> None:
        import torch

        # The context also makes the stream's device the current one, in this thread alone.
        with _device_errors("work on the device"), torch.cuda.stream(self._stream):
            work()

    def mark(self) -> Mark:
        import torch

        cuda: Any = torch.cuda  # partly without types
        event = cuda.Event()
        with _device_errors("an event on the device"):
            event.record(self._stream)
        return _CudaMark(event)

    def wait(self, mark: Mark) -> None:
        if not isinstance(mark, _CudaMark):
            raise DeviceError(f"a CUDA stream cannot wait for {type(mark).__name__}")
        with _device_errors("an event on the device"):
            self._stream.wait_event(mark.event)

    def uses(self, tensor: Any) -> None:
        with _device_errors("memory shared between streams"):
            tensor.record_stream(self._stream)


class CudaDevice(Device):
    """One CUDA device.

    Args:
        index: its number among those that the process sees.
    """

    needs_pinning = True

    def __init__(self, index: int) -> None:
        import torch

        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)

    def holds(self, tensor: Any) -> bool:
        return hasattr(tensor, "data_ptr") and tensor.device == self._device

    def empty(self, size_bytes: int) -> Any:
        import torch

        with _device_errors(f"taking {size_bytes} bytes of device {self.name}"):
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def staging(self, size_bytes: int) -> Any:
        import torch

        with _device_errors(f"page-locking {size_bytes} bytes"):
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def pin(self, memory: memoryview) -> Pinning:
        import torch

        address, size_bytes = _extent(memory)
        cuda: Any = torch.cuda
        with torch.cuda.device(self._device):
            code = int(cuda.cudart().cudaHostRegister(address, size_bytes, HOST_REGISTER_PORTABLE))
            if not code:
                return Pinning(True, "")
            # CUDA keeps the code of a failed call, and torch would blame the next kernel for it: one that matters to
            # nobody takes it.
            with suppress(RuntimeError):
                torch.empty(1, device=self._device).fill_(0)
        return Pinning(False, f"cudaHostRegister of {size_bytes} bytes failed with CUDA error {code}")

    def unpin(self, memory: memoryview) -> None:
        import torch

        address, _ = _extent(memory)
        cuda: Any = torch.cuda
        with torch.cuda.device(self._device):
            code = int(cuda.cudart().cudaHostUnregister(address))
        if code:
            raise DeviceError(f"cudaHostUnregister failed with CUDA error {code}")

    def stream(self) -> Stream:
        import torch

        cuda: Any = torch.cuda
        with _device_errors(f"a stream of {self.name}"):
            return _CudaStream(cuda.Stream(device=self._device))

    def stream_of(self, given: Any) -> Stream:
        import torch

        if given is None:
            return _CudaStream(torch.cuda.current_stream(self._device))
        if isinstance(given, int) and not isinstance(given, bool):
            if given == LEGACY_STREAM:
                return _CudaStream(torch.cuda.default_stream(self._device))
            cuda: Any = torch.cuda
            given = cuda.ExternalStream(given, device=self._device)
        if not isinstance(given, torch.cuda.Stream) or given.device != self._device:
            raise DeviceError(
                f"{given!r} is no stream of {self.name}; pass a torch.cuda.Stream of it or a cudaStream_t as a number"
            )
        return _CudaStream(given)


def _extent(memory: memoryview) -> tuple[int, int]:
    array = np.frombuffer(memory, np.uint8)
    return int(array.__array_interface__["data"][0]), array.nbytes
