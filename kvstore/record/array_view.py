"""Address, shape and strides of whatever array a caller has: torch, NumPy, or anything with DLPack."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import WriteError

if TYPE_CHECKING:
    from kvstore.errors import KVStoreError
    from kvstore.spec import DType


@dataclass(frozen=True)
class ArrayView:
    """Host memory of an array. `owner` keeps it alive.

    Attributes:
        address: of the first element.
        shape: elements per axis.
        strides: bytes per axis.
        dtype: logical element type.
        is_writable: whether it may be copied into.
        owner: the array.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    is_writable: bool
    owner: Any

    @property
    def is_contiguous(self) -> bool:
        """Whether all axes lie in order and without gaps, those of one element included."""
        return self.strides == _contiguous_strides(self.shape, self.dtype.itemsize)

    def is_contiguous_from(self, axis: int) -> bool:
        """Whether the axes from this one on lie in order and without gaps, as a copy of rows needs them."""
        expected = self.dtype.itemsize
        for size, stride in zip(reversed(self.shape[axis:]), reversed(self.strides[axis:]), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


@lru_cache(maxsize=1024)
def _contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape)))


def address_of(memory: memoryview) -> int:
    """Address of the first byte of a buffer."""
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def view_array(array: Any, dtype: DType, what: str, error: type[KVStoreError] = WriteError) -> ArrayView:
    """Look at an array without copying it.

    Args:
        array: a torch tensor on the CPU, a NumPy array, or an object with `__dlpack__`.
        dtype: the type that it must have. NumPy has no bfloat16 or float8; there unsigned integers of the
            same width are taken.
        what: names the array in errors.
        error: which error is raised.

    Raises:
        `error`: another type, or memory that the host cannot address.
    """
    if hasattr(array, "data_ptr"):
        return _view_torch(array, dtype, what, error)
    if not isinstance(array, np.ndarray):
        try:
            # Only what shares its memory: a copy made here would swallow what is written into it.
            array = np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(memoryview(array))
        except (BufferError, RuntimeError, TypeError, ValueError) as cause:
            found = type(array).__name__
            raise error(
                f"{what} is of type {found}, no array in host memory that can be viewed ({cause}); pass a NumPy array, "
                "a torch tensor on the CPU, or an object with __dlpack__"
            ) from cause
    # ml_dtypes and the libraries that use it give NumPy a bfloat16 and float8 of their own.
    is_other_name = not dtype.is_native and array.dtype.name == dtype.label
    if array.dtype != dtype.storage and not is_other_name:
        raise error(
            f"{what} has type {array.dtype.name if array.dtype.isnative else array.dtype.str}, "
            f"the spec says {dtype.label}"
            + ("" if dtype.is_native else f" (in NumPy: {dtype.storage.name})")
            + "; convert it, or correct the spec"
        )
    return ArrayView(array.ctypes.data, array.shape, array.strides, dtype, array.flags.writeable, array)


def _view_torch(tensor: Any, dtype: DType, what: str, error: type[KVStoreError]) -> ArrayView:
    if tensor.device.type != "cpu":
        raise error(f"{what} is on device {tensor.device}; copy it to the host first, as the adapters do")
    found = str(tensor.dtype).removeprefix("torch.")
    if found != dtype.label:
        raise error(f"{what} has type {found}, the spec says {dtype.label}; convert it, or correct the spec")
    if str(tensor.layout) != "torch.strided" or tensor.is_neg():
        raise error(f"{what} is sparse or lazily negated; pass a plain tensor, such as .to_dense().resolve_neg()")
    size = tensor.element_size()
    strides = tuple(step * size for step in tensor.stride())
    return ArrayView(tensor.data_ptr(), tuple(tensor.shape), strides, dtype, True, tensor)
