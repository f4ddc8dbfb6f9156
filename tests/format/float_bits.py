"""bfloat16 and float8 as bits, from their definitions: NumPy has neither."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt


def bfloat16_values(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@cache
def float8_table(exponent_bits: int) -> npt.NDArray[np.float32]:
    """The value of each of the 256 float8 numbers: E4M3FN (no infinity) or E5M2 (as IEEE 754)."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    table = np.zeros(256, np.float32)
    for bits in range(256):
        exponent = (bits >> mantissa_bits) & (2**exponent_bits - 1)
        mantissa = bits & (2**mantissa_bits - 1)
        if exponent_bits == 5 and exponent == 31:
            value = float("nan") if mantissa else float("inf")
        elif exponent_bits == 4 and bits & 0x7F == 0x7F:
            value = float("nan")
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        table[bits] = -value if bits & 0x80 else value
    return table


def values_of(storage: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """The numbers that stored elements stand for."""
    if dtype == "bfloat16":
        return bfloat16_values(storage)
    if dtype.startswith("float8"):
        values: npt.NDArray[np.float32] = float8_table(4 if "e4m3" in dtype else 5)[storage]
        return values
    return storage


def storage_of(values: Any, dtype: str) -> npt.NDArray[Any]:
    """The stored elements of numbers; each must be exact in `dtype`."""
    exact = np.array(values, np.float64)
    if dtype == "bfloat16":
        stored: npt.NDArray[Any] = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif dtype.startswith("float8"):
        table = float8_table(4 if "e4m3" in dtype else 5)
        # Compared as bits, so that -0.0 is not 0.0.
        known = {bits: index for index, bits in enumerate(table.view(np.uint32).tolist())}
        wanted = exact.astype(np.float32).view(np.uint32).ravel().tolist()
        stored = np.array([known[bits] for bits in wanted], np.uint8).reshape(exact.shape)
    else:
        stored = exact.astype(np.dtype(dtype).newbyteorder("<"))
    if values_of(stored, dtype).astype(np.float64).tobytes() != exact.tobytes():
        raise ValueError(f"a value is not exact in {dtype}")
    return stored
