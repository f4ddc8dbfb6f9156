"""The arena's memory in an attached process."""

from __future__ import annotations

import mmap

from kvstore.limits import MIB

_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h, Linux 5.14
PREPARED_BYTES = 4 * MIB
"""Prepared in one go: a millisecond or two, during which this process's other threads wait."""


class Mapping:
    """The whole arena, mapped once, readable and writable. Views keep it mapped.

    The memory is there already, since the owner allocated all of it; but the kernel enters a page into this process's
    tables when it is first touched, which costs more than copying it. `prepare_some` does that ahead of need.

    Attributes:
        memory: all of it.
    """

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._map = mmap.mmap(descriptor, size_bytes)
        self._size_bytes = size_bytes
        self._prepared_bytes = 0
        self.memory = memoryview(self._map)

    def prepare_some(self) -> bool:
        """Prepare the next few pages; False when there is nothing left to do, or an older kernel cannot."""
        if self._prepared_bytes >= self._size_bytes:
            return False
        count = min(PREPARED_BYTES, self._size_bytes - self._prepared_bytes)
        try:
            self._map.madvise(_MADV_POPULATE_WRITE, self._prepared_bytes, count)
        except OSError:
            self._prepared_bytes = self._size_bytes
            return False
        self._prepared_bytes += count
        return True
