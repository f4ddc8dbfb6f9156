"""The memory of a baseline: all records of all batches, with gaps as between ours."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from kvstore.bench.load import GAP_BYTES

if TYPE_CHECKING:
    from kvstore.bench.load import Load

_FILL_BYTES = 16 << 20


class Buffers:
    """Host memory that has been touched; `records[batch]` lists (offset, bytes) of its records."""

    def __init__(self, load: Load) -> None:
        self.array = np.zeros(load.buffer_bytes, np.uint8)
        self.array.fill(0)  # every page is there before anything is timed
        self.records: list[list[tuple[int, int]]] = []
        offset = 0
        for _ in range(load.batches):
            batch = []
            for size_bytes in load.record_bytes:
                batch.append((offset, size_bytes))
                offset += GAP_BYTES + -(-size_bytes // GAP_BYTES) * GAP_BYTES
            self.records.append(batch)

    @property
    def address(self) -> int:
        return int(self.array.ctypes.data)

    def fill(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        for start in range(0, self.array.size, _FILL_BYTES):
            part = self.array[start : start + _FILL_BYTES]
            part[:] = np.frombuffer(generator.bytes(part.size), np.uint8)

    def clear(self) -> None:
        self.array.fill(0)

    def digest(self) -> str:
        """Of the records, without the gaps."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.records:
            for offset, size_bytes in batch:
                digest.update(self.array[offset : offset + size_bytes].data)
        return digest.hexdigest()
