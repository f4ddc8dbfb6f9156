"""What an unbounded cache that all clusters share would have."""

from __future__ import annotations

from bisect import bisect_left

KEY_BYTES = 32
SEEN_KEYS_MAX = 4_000_000


class SeenKeys:
    """Keys of blocks that came before. Not thread-safe.

    Half the digest tells keys apart. Beyond `SEEN_KEYS_MAX` no more are remembered, some 300 MB: what it says of later
    prompts is a lower bound.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def blocks(self, keys: bytes) -> int:
        """How many blocks from the beginning came before."""
        numbers = _numbers(keys)
        # Whoever had a block had all before it, so the first that is new is found by bisection.
        return bisect_left(numbers, True, key=lambda number: number not in self._seen)

    def add(self, keys: bytes) -> None:
        """From here on these have come."""
        if len(self._seen) < SEEN_KEYS_MAX:
            self._seen.update(_numbers(keys))


def _numbers(keys: bytes) -> list[int]:
    return memoryview(keys).cast("Q")[:: KEY_BYTES // 8].tolist()
