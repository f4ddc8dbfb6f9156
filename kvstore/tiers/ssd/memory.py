"""Memory that direct I/O takes."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import numpy.typing as npt

from kvstore.limits import FILE_ALIGN_BYTES


def aligned(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, `[size_bytes rounded up to FILE_ALIGN_BYTES]`, that begin at a multiple of it."""
    return np.frombuffer(mmap.mmap(-1, max(1, padded(size_bytes))), np.uint8)


def padded(size_bytes: int) -> int:
    """Rounded up to `FILE_ALIGN_BYTES`."""
    return -(-size_bytes // FILE_ALIGN_BYTES) * FILE_ALIGN_BYTES


def keep_for_ever(what: object) -> None:
    """Something that a device may still move bytes of stays until this process ends, whoever else lets go of it."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(what))
