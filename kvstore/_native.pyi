"""The parts of kvstore that touch every byte or every record: arena, checksums and strided copies."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

__version__: str

class Arena:
    """Slots in shared memory, for `kvstore.tiers.ArenaTier`, which documents what they mean. Any thread may call.

    A slot is a tuple (index, generation, size in bytes). The GIL is released while bytes move or memory is cleared.

    Raises:
        ArenaError: there is too little memory, or another process owns the name.
    """

    def __init__(
        self,
        capacity_bytes: int,
        largest_slot_bytes: int,
        slot_sizes_bytes: list[int],
        directory: str,
        name: str,
    ) -> None: ...
    def allocate(self, sizes_bytes: list[int]) -> list[tuple[int, int, int]] | None:
        """A slot for each size, or None and nothing taken."""

    def would_fit(self, sizes_bytes: list[int], freeing: list[Any]) -> bool:
        """Whether `allocate` would succeed if these live slots were freed first."""

    def fits_when_empty(self, sizes_bytes: list[int]) -> bool:
        """Whether `allocate` would succeed if nothing were allocated."""

    def free(self, slots: list[Any]) -> None:
        """Frees in order, up to the first that is stale: StaleSlotError."""

    def pin(self, slots: list[Any]) -> None:
        """Pins all or, with StaleSlotError, none."""

    def unpin(self, slots: list[Any]) -> None:
        """Ends one pin of each, up to the first that has none: StaleSlotError."""

    def location(self, slot: tuple[int, int, int], must_be_pinned: bool) -> int:
        """Offset of a live slot in the mapping."""

    def locations(self, slots: list[Any]) -> NDArray[np.uint64]:
        """Offsets of pinned slots, shape [n]."""

    def write(self, slot: tuple[int, int, int], data: Buffer, offset: int) -> None:
        """Copies into a live slot; ValueError when the range lies outside."""

    def read(self, slot: tuple[int, int, int], into: Buffer, offset: int) -> None:
        """Copies out of a live slot; ValueError when the range lies outside."""

    def memory(self) -> memoryview:
        """The whole mapping, which its views keep alive also after `close`."""

    def statistics(self) -> dict[str, Any]:
        """Counters, and per class: slot bytes, slabs, live and quarantined slots, free places."""

    def check(self) -> None:
        """Raises when the tables disagree with each other."""

    def close(self) -> None:
        """Gives up name and descriptor; every slot becomes stale. Idempotent."""

    @property
    def used_bytes(self) -> int: ...
    @property
    def quarantined_bytes(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def huge_pages(self) -> tuple[bool, str]: ...

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
