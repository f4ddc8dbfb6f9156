"""One tier of a simulated cache: the pool's own native index over memory that is only counted."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import Needs, PrefixIndex
from kvstore.errors import SimulationError
from kvstore.limits import PROMPT_TOKENS_MAX, SIMULATED_RECORDS_MAX
from kvstore.pool.index import ghosts_max_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore._native import Finding
    from kvstore.pool.path import PackedPath
    from kvstore.profile import KvSize

RECORD_BYTES_END = 1 << 32
"""The index counts a record's bytes in 32 bits."""
_NO_IDS = np.empty(0, np.uint32)


class CountedTier:
    """Records of prompts in one tier, least recently used first out; not thread-safe.

    An attention block is one record, and so are the states at one length. Its capacity holds records alone: index and
    headers, which are below a thousandth of them, are not counted.

    Attributes:
        used_bytes, evicted_bytes: that lie here, that were evicted.
        asked_tokens, hit_tokens, refused_tokens: counted by the cache that this is a tier of.

    Raises:
        SimulationError: a record would be too large for the index.
    """

    def __init__(self, name: str, capacity_bytes: float, kv: KvSize, block_tokens: int) -> None:
        self.name = name
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.evicted_bytes = 0
        self.asked_tokens = 0
        self.hit_tokens = 0
        self.refused_tokens = 0
        self.has_attention = kv.token_bytes > 0
        self.has_states = kv.resume_bytes(block_tokens) > 0
        self._kv = kv
        self._block_tokens = block_tokens
        self._block_bytes = ceil(kv.token_bytes * block_tokens)
        largest_bytes = max(self._block_bytes, ceil(kv.resume_bytes(PROMPT_TOKENS_MAX)))
        if largest_bytes >= RECORD_BYTES_END:
            raise SimulationError(
                f"a block of {block_tokens} tokens, or the states at one length, takes {largest_bytes} bytes; the "
                f"index counts less than {RECORD_BYTES_END}: choose smaller blocks"
            )
        groups = [(0, False, 1, [0])] * self.has_attention
        groups += [(len(groups), True, 1, [0])] * self.has_states
        self._needs = Needs(groups)
        are_states = [is_state for _, is_state, _, _ in groups]
        self._index = PrefixIndex(are_states, ghosts_max_of(int(capacity_bytes)), True)

    def match(self, path: PackedPath, cap_tokens: int) -> Finding:
        """How much of a path is here; the pool's match."""
        return self._index.match(path, _NO_IDS, cap_tokens, self._needs, None, 1, ())

    def touch(self, path: PackedPath) -> None:
        """A resume point at the end of this path was read."""
        self._index.touch_path(path)

    def write(self, path: PackedPath, salt: bytes, state_blocks: Sequence[int]) -> bool:
        """Enter a path's attention, and states at some of its lengths, evicting what was used longest ago.

        Args:
            path: whole blocks, one at least.
            state_blocks: lengths that states are stored at, in blocks from 1, ascending.

        Returns:
            False, and nothing has changed, if there is no room for all of it.

        Raises:
            SimulationError: the path contradicts what is here, or there are too many records.
        """
        states: Sequence[tuple[int, int]] = ()
        if self.has_states:
            resume_bytes, block_tokens = self._kv.resume_bytes, self._block_tokens
            states = [(block, ceil(resume_bytes(block * block_tokens))) for block in state_blocks]
        outcome, written_bytes, evicted_bytes = self._index.write_counted(
            path, salt, self._needs, self._block_bytes, states, self.capacity_bytes, SIMULATED_RECORDS_MAX
        )
        if outcome == "wrong path":
            raise SimulationError(
                "a prefix key of this workload names two prefixes; keys cover everything before them, and the salt"
            )
        if outcome == "too many":
            raise SimulationError(
                f"a simulated cache of {self.capacity_bytes:g} bytes {self.name} would hold more than "
                f"{SIMULATED_RECORDS_MAX} blocks; choose larger blocks or a smaller cache"
            )
        self.used_bytes += written_bytes - evicted_bytes
        self.evicted_bytes += evicted_bytes
        return outcome == "written"

    def check(self) -> None:
        """Assert every invariant; for tests (it walks the whole index)."""
        wrong = self._index.check()
        assert not wrong, wrong
        assert self._index.committed_bytes == self.used_bytes <= self.capacity_bytes
