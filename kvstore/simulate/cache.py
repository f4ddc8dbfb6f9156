"""The prefix cache of one simulated cluster: DRAM and SSD, each with an index of the pool's own."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from kvstore.keys import KEY_BYTES
from kvstore.pool import LadderCheckpoints
from kvstore.schedule.policies.snapshot import NOTHING_CACHED, CachedPrefix
from kvstore.simulate.result import CacheCounts
from kvstore.simulate.tier import CountedTier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.abc import CheckpointPolicy
    from kvstore.pool.path import PackedPath
    from kvstore.schedule.deployment import Cluster
    from kvstore.workload.request import Request

_SALTS_KNOWN_MAX = 1 << 16


class ClusterCache:
    """What one cluster keeps of prompts; not thread-safe.

    As in a store with tiers, each tier's set is contiguous from the root by itself, what is stored goes to memory and
    is kept on SSD behind it, what is read from SSD comes to memory, and each tier evicts what was used longest ago.
    States are stored where the checkpoint policy says. A workload names whole blocks only, so a state of a length
    within a block counts as one at the block's beginning.

    Args:
        checkpoints: where states are worth storing; the pool's default unless given.

    Raises:
        SimulationError: a block is too large.
    """

    def __init__(self, cluster: Cluster, block_tokens: int, *, checkpoints: CheckpointPolicy | None = None) -> None:
        self._cluster = cluster
        self._kv = cluster.profile.kv
        self._block_tokens = block_tokens
        self._checkpoints = checkpoints or LadderCheckpoints()
        size = cluster.cache
        self._dram = CountedTier("dram", size.dram_bytes, self._kv, block_tokens) if size.dram_bytes > 0 else None
        self._ssd = CountedTier("ssd", size.ssd_bytes, self._kv, block_tokens) if size.ssd_bytes > 0 else None
        self._tiers = tuple(tier for tier in (self._dram, self._ssd) if tier is not None)
        self._roots: dict[bytes, bytes] = {}

    def find(self, request: Request) -> CachedPrefix:
        """The deepest resume point of a prompt in any tier; of equal ones that of the fastest tier.

        It stays only until something else is stored: who lets time pass asks again. Counts nothing.
        """
        if not self._tiers or len(request.keys) < KEY_BYTES:
            return NOTHING_CACHED
        cap_tokens = request.prompt_tokens - 1
        path = self._path(request.keys, request.salt)
        resume_tokens = attention_tokens = dram_tokens = 0
        tier = ""
        if self._dram is not None:
            found = self._dram.match(path, cap_tokens)
            resume_tokens = found.tokens
            if self._dram.has_attention:
                attention_tokens = dram_tokens = found.attention_tokens
            tier = "dram"
        if self._ssd is not None and resume_tokens < cap_tokens // self._block_tokens * self._block_tokens:
            found = self._ssd.match(path, cap_tokens)
            if self._ssd.has_attention:
                attention_tokens = max(attention_tokens, found.attention_tokens)
            if found.tokens > resume_tokens:
                resume_tokens, tier = found.tokens, "ssd"
        if not resume_tokens:
            return CachedPrefix(0, attention_tokens) if attention_tokens else NOTHING_CACHED
        load_s = 0.0
        if tier == "ssd":
            lacking_tokens = resume_tokens - min(dram_tokens, resume_tokens)
            load_bytes = self._kv.resume_bytes(resume_tokens) + self._kv.token_bytes * lacking_tokens
            load_s = load_bytes / self._cluster.cache.ssd_read_bytes_per_s
        return CachedPrefix(resume_tokens, max(attention_tokens, resume_tokens), load_s, tier)

    def used(self, request: Request, prefix: CachedPrefix) -> None:
        """Prefill begins from what was found here, also if that is nothing: counters and recency.

        Tokens that memory has are not asked of SSD. What came from SSD is in memory afterwards, if there is room.
        """
        asked_tokens = request.prompt_tokens
        for tier in self._tiers:
            tier.asked_tokens += asked_tokens
            if tier.name == prefix.tier:
                tier.hit_tokens += prefix.resume_tokens
                asked_tokens -= prefix.resume_tokens
        if not prefix.resume_tokens:
            return
        blocks = prefix.resume_tokens // self._block_tokens
        path = self._path(request.keys[: blocks * KEY_BYTES], request.salt)
        for tier in self._tiers:
            tier.touch(path)
        if prefix.tier == "ssd" and self._dram is not None:
            self._dram.write(path, request.salt, (blocks,))

    def store(self, request: Request, *, keys: bytes, tokens: int, resume_tokens: int) -> None:
        """Keep the cache of a text: attention blocks of all its keys, states where the checkpoint policy says.

        Where not all of it fits, nothing is kept, and counted as refused.

        Args:
            keys: of the text's whole blocks, 32 bytes each: the request's own, or those with its output.
            tokens: of the text.
            resume_tokens: states are known after this length only: where prefill began, or just before the end for who
                was handed a cache over. The state at the end is always known.
        """
        blocks = min(tokens // self._block_tokens, len(keys) // KEY_BYTES)
        if not blocks or not self._tiers:
            return
        path = self._path(keys[: blocks * KEY_BYTES], request.salt)
        branch_points = self._tiers[0].match(path, blocks * self._block_tokens).branch_points
        state_blocks = self._checkpoint_blocks(blocks, resume_tokens, branch_points)
        for tier in self._tiers:
            if not tier.write(path, request.salt, state_blocks):
                tier.refused_tokens += tokens
                # What memory had no room for was never there to be kept elsewhere.
                break

    def counts(self) -> tuple[CacheCounts, ...]:
        """What each tier that there is did so far."""
        return tuple(
            CacheCounts(
                cluster=self._cluster.name,
                tier=tier.name,
                capacity_bytes=tier.capacity_bytes,
                used_bytes=tier.used_bytes,
                asked_tokens=tier.asked_tokens,
                hit_tokens=tier.hit_tokens,
                evicted_bytes=tier.evicted_bytes,
                refused_tokens=tier.refused_tokens,
            )
            for tier in self._tiers
        )

    def check(self) -> None:
        """Assert every invariant of the tiers; for tests."""
        for tier in self._tiers:
            tier.check()

    def _checkpoint_blocks(self, blocks: int, resume_tokens: int, branch_points: Sequence[int]) -> tuple[int, ...]:
        """Where states are stored, in blocks."""
        block, end_tokens = self._block_tokens, blocks * self._block_tokens
        after_tokens = min(resume_tokens, end_tokens - 1)
        lengths = self._checkpoints.suggest(end_tokens, after_tokens, branch_points, block)
        return tuple(length // block for length in lengths)

    def _path(self, keys: bytes, salt: bytes) -> PackedPath:
        root = self._roots.get(salt)
        if root is None:
            if len(self._roots) >= _SALTS_KNOWN_MAX:
                self._roots.clear()
            root = self._roots[salt] = sha256(b"simulated root" + salt).digest()
        return root, self._block_tokens, keys, None, b""
