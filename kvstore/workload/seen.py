"""What an unbounded cache that all clusters share would have."""

from __future__ import annotations

from kvstore.keys import KEY_BYTES
from kvstore.limits import SIMULATED_KEYS_MAX


class SeenKeys:
    """Keys of blocks that came before. Not thread-safe.

    Beyond `SIMULATED_KEYS_MAX`, some 250 MB, no more are remembered: what it says of later prompts is a lower bound.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def blocks(self, keys: bytes) -> int:
        """How many blocks from the beginning came before."""
        seen = self._seen
        # Whoever had a block had all before it, so the first that is new is found by bisection.
        low, high = 0, len(keys) // KEY_BYTES
        while low < high:
            middle = (low + high) // 2
            if keys[middle * KEY_BYTES : (middle + 1) * KEY_BYTES] in seen:
                low = middle + 1
            else:
                high = middle
        return low

    def add(self, keys: bytes) -> None:
        """From here on these have come."""
        if len(self._seen) < SIMULATED_KEYS_MAX:
            self._seen.update([keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)])
