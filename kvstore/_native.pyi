"""The parts of kvstore that touch every byte: checksums and strided copies."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

def crc32c(data: Buffer | NDArray[Any], value: int = 0) -> int:
    """CRC32C (RFC 3720) of a C-contiguous buffer, continued from `value`.

    `crc32c(b, crc32c(a))` is the checksum of a followed by b. Any thread may call; the GIL is released for large
    buffers.

    Raises:
        TypeError: `data` has no buffer, or `value` is not an unsigned 32-bit integer.
        BufferError: the buffer is not contiguous.
    """

def crc32c_many(addresses: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """CRC32C of each range of memory, shape [n]; any thread may call, the GIL is released.

    `addresses` (absolute) and `sizes` (bytes) are contiguous and of shape [n]. The caller keeps the memory alive and
    has checked that each range lies inside it.

    Raises:
        TypeError: not arrays of uint64.
        ValueError: the shapes differ or are not [n], or a range is null or wraps around.
    """

def copy_rows(plan: NDArray[np.uint64]) -> None:
    """Copies rows of bytes by a contiguous plan of shape [n, 6]; any thread may call, the GIL is released.

    Columns: destination, source, rows, row_bytes, destination_stride, source_stride. Addresses are absolute, strides
    are bytes; row i goes from source + i * source_stride to destination + i * destination_stride. An entry whose
    strides both equal row_bytes is one copy. The whole plan is checked before a byte moves. The caller keeps the
    memory alive and has checked that each region lies inside it.

    Raises:
        TypeError: not an array of uint64.
        ValueError: the shape is not [n, 6], or an entry has a null address, a stride smaller than its row, a region
            past the end of the address space, or overlapping source and destination.
    """

def cpu_features() -> dict[str, str | bool]:
    """What this CPU offers, which code paths are in use and, where there is one, why not a better one.

    `crc32c` is `sse42` or `portable`, `crc32c_why_not_better` is empty for the best one; the environment variable
    `KVSTORE_CRC32C` forces a path, and the import fails where this CPU cannot run it.
    """
