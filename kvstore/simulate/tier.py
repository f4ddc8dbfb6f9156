"""One tier of a simulated cache: the pool's own native index over memory that is only counted."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import Needs, PrefixIndex
from kvstore.errors import SimulationError
from kvstore.keys import KEY_BYTES
from kvstore.limits import PROMPT_TOKENS_MAX, SIMULATED_RECORDS_MAX
from kvstore.pool.index import ghosts_max_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvstore._native import Finding
    from kvstore.pool.path import PackedPath
    from kvstore.profile import KvSize

RECORD_BYTES_END = 1 << 32
"""The index counts a record's bytes in 32 bits."""
_UNKNOWN_GRID = bytes(KEY_BYTES)
_NO_IDS = np.empty(0, np.uint32)
_ROWS_MIN = 256


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
        self._state_group = len(groups) - 1
        self._needs = Needs(groups)
        are_states = [is_state for _, is_state, _, _ in groups]
        self._index = PrefixIndex(are_states, ghosts_max_of(int(capacity_bytes)), True)
        self._grow(_ROWS_MIN)

    def _grow(self, rows: int) -> None:
        """Tables for writes of so many records, cut to size by each."""
        self._blocks = np.zeros((rows, 6), np.uint64)
        self._blocks[:, 0] = np.arange(rows)
        self._blocks[:, 4] = 1
        self._block_slots = np.zeros((rows, 3), np.uint64)
        self._block_slots[:, 2] = self._block_bytes
        self._ready = np.arange(rows, dtype=np.uint64)
        self._costs = np.zeros(rows, np.uint64)

    def match(self, path: PackedPath, cap_tokens: int) -> Finding:
        """How much of a path is here; the pool's match."""
        return self._index.match(path, _NO_IDS, cap_tokens, self._needs, None, 1, ())

    def touch(self, path: PackedPath) -> None:
        """A resume point at the end of this path was read."""
        self._index.touch_path(path)

    def write(self, path: PackedPath, salt: bytes, present_blocks: int, state_blocks: Sequence[int]) -> bool:
        """Enter a path's attention, and states at some of its lengths, evicting what was used longest ago.

        Args:
            path: whole blocks.
            present_blocks: of its attention that is here, as `match` has said; nothing has changed since.
            state_blocks: lengths that states are stored at, in blocks from 1, ascending.

        Returns:
            False, and nothing has changed, if there is no room for all of it.

        Raises:
            SimulationError: the path contradicts what is here, or there are too many records.
        """
        blocks = len(path[2]) // KEY_BYTES
        if blocks + len(state_blocks) > len(self._ready):
            self._grow(2 * (blocks + len(state_blocks)))
        names = self._blocks[present_blocks if self.has_attention else blocks : blocks]
        if state_blocks and self.has_states:
            states = np.array([(block - 1, self._state_group, 0, 0, 1, 0) for block in state_blocks], np.uint64)
            names = np.concatenate((names, states)) if len(names) else states
        if not len(names):
            return True
        writes = self._index.plan(path, names, _UNKNOWN_GRID)
        if writes.is_wrong_path or writes.gap_node is not None:
            raise SimulationError(
                "a prefix key of this workload names two prefixes; keys cover everything before them, and the salt"
            )
        missing = writes.missing()[0]
        if not len(missing):
            return True
        if self._index.record_count + len(missing) > SIMULATED_RECORDS_MAX:
            raise SimulationError(
                f"a simulated cache of {self.capacity_bytes:g} bytes {self.name} would hold more than "
                f"{SIMULATED_RECORDS_MAX} blocks; choose larger blocks or a smaller cache"
            )
        slots, needed_bytes = self._slots(missing, len(state_blocks) if len(missing) == len(names) else None)
        if needed_bytes > self.capacity_bytes:
            return False
        self._index.enter(writes, path, salt, (), ())
        if not self._make_room(needed_bytes):
            self._index.undo(writes)
            return False
        writes.set_slots(slots)
        self._index.commit(writes, self._ready[: len(missing)], self._costs[: len(missing)])
        self._index.leave(writes)
        self._index.let_go(writes)
        self.used_bytes += needed_bytes
        return True

    def _slots(self, missing: NDArray[np.uint64], states: int | None) -> tuple[NDArray[np.uint64], int]:
        """Slots for records in the order in which they were named, attention first; their bytes.

        Args:
            states: how many of them are states, if that is known.
        """
        count = len(missing)
        if states is None or not self.has_states:
            states = int(np.count_nonzero(missing[:, 1] == self._state_group)) if self.has_states else 0
        if not states:
            return self._block_slots[:count], count * self._block_bytes
        slots = self._block_slots[:count].copy()
        nodes = missing[count - states :, 0].tolist()
        sizes = [ceil(self._kv.resume_bytes((node + 1) * self._block_tokens)) for node in nodes]
        slots[count - states :, 2] = sizes
        return slots, (count - states) * self._block_bytes + sum(sizes)

    def _make_room(self, needed_bytes: int) -> bool:
        """Evict until so many bytes are free; whether that was possible. Nothing goes if it was not."""
        index = self._index
        lacking_bytes = self.used_bytes + needed_bytes - self.capacity_bytes
        if lacking_bytes <= 0:
            return True
        target_bytes = ceil(lacking_bytes)
        while True:
            chosen_bytes = index.choose(target_bytes)
            # What is chosen counts with its memory in the index, which is not counted here.
            freed_bytes = int(index.chosen_slots(index.chosen_count)[:, 2].sum())
            if freed_bytes >= lacking_bytes:
                break
            if chosen_bytes < target_bytes:
                index.drop_choice()
                return False
            target_bytes = chosen_bytes + ceil(lacking_bytes) - freed_bytes
        index.evict_chosen()
        self.used_bytes -= freed_bytes
        self.evicted_bytes += freed_bytes
        return True

    def check(self) -> None:
        """Assert every invariant; for tests (it walks the whole index)."""
        wrong = self._index.check()
        assert not wrong, wrong
        assert self._index.committed_bytes == self.used_bytes <= self.capacity_bytes
