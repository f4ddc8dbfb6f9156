"""Element types of cache tensors, including those that NumPy and Arrow do not have."""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

from kvstore.errors import SpecError


class DType(enum.Enum):
    """Logical element type. `storage` is the NumPy type whose bytes carry it.

    bfloat16 and float8 have no NumPy or Arrow type: they travel as unsigned integers of the same
    width, and the logical name stays beside them.
    """

    FLOAT64 = ("float64", 8, "<f8")
    FLOAT32 = ("float32", 4, "<f4")
    FLOAT16 = ("float16", 2, "<f2")
    BFLOAT16 = ("bfloat16", 2, "<u2")
    FLOAT8_E4M3FN = ("float8_e4m3fn", 1, "u1")
    FLOAT8_E5M2 = ("float8_e5m2", 1, "u1")
    INT64 = ("int64", 8, "<i8")
    INT32 = ("int32", 4, "<i4")
    INT16 = ("int16", 2, "<i2")
    INT8 = ("int8", 1, "i1")
    UINT8 = ("uint8", 1, "u1")

    itemsize: int
    storage: np.dtype[Any]
    is_native: bool

    def __new__(cls, label: str, itemsize: int, storage: str) -> DType:
        member = object.__new__(cls)
        member._value_ = label
        member.itemsize = itemsize
        member.storage = np.dtype(storage)
        member.is_native = member.storage.name == label
        return member

    @property
    def label(self) -> str:
        """The name, as NumPy and torch write it."""
        return str(self._value_)

    @classmethod
    def parse(cls, dtype: Any) -> DType:
        """The type of a name, a NumPy dtype or a torch dtype (`torch.bfloat16`).

        Raises:
            SpecError: there is no such type here.
        """
        if isinstance(dtype, cls):
            return dtype
        if isinstance(dtype, str) or type(dtype).__module__ == "torch":
            label = str(dtype).removeprefix("torch.")
        else:
            # np.dtype(None) would be float64.
            try:
                label = np.dtype(dtype).name if dtype is not None else "None"
            except TypeError:
                label = repr(dtype)
        for member in cls:
            if member.label == label:
                return member
        known = ", ".join(member.label for member in cls)
        raise SpecError(f"element type {label!r} is not supported; supported are: {known}")
