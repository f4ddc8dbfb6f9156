"""A simulated cluster's cache beside a real store with as much room: the same prompts, the same answers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from kvstore.abc import SlotRows
from kvstore.keys import KEY_BYTES
from kvstore.placement.ssd import open_ssd
from kvstore.placement.tiered import TieredPool
from kvstore.pool import Pool
from kvstore.pool.index import ghosts_max_of
from kvstore.profile import KvSize, PolynomialCurve, Profile
from kvstore.record import largest_slot_bytes, record_layout, slot_sizes_bytes
from kvstore.schedule.deployment import CacheSize, Cluster
from kvstore.simulate import tier
from kvstore.simulate.cache import ClusterCache
from kvstore.spec import ReuseRule
from kvstore.store import Store
from kvstore.testing.specs import dense, hybrid, pure_state, put_all
from kvstore.tiers import ArenaTier
from kvstore.workload.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kvstore.abc import Slot
    from kvstore.spec import ModelSpec

BLOCK = 16
ARENA_BYTES = 16 << 20
TURN_BLOCKS_MAX, TEXT_BLOCKS_MAX = 24, 60
SPECS: dict[str, Callable[[int], ModelSpec]] = {"hybrid": hybrid, "dense": dense, "states only": pure_state}


class CountedArena(ArenaTier):
    """Memory that is full when so many bytes of slots are in use, wherever they lie."""

    room_bytes = 0

    def would_fit(self, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        needed_bytes = self.used_bytes - SlotRows.of(freeing).size_bytes + sum(sizes_bytes)
        return needed_bytes <= self.room_bytes and super().would_fit(sizes_bytes, freeing)


def kv_size(spec: ModelSpec) -> KvSize:
    """What the records of a real model take, so that the simulation counts the same."""
    state_bytes = block_bytes = 0
    for number, group in enumerate(spec.groups):
        for span in range(len(spec.spans[number])):
            slot_bytes = record_layout(spec, number, span, group.all_units).slot_bytes
            if group.rule is ReuseRule.ATTENTION:
                block_bytes += slot_bytes
            else:
                state_bytes += slot_bytes
    return KvSize(float(state_bytes), block_bytes / BLOCK)


class Both:
    """A real store and a simulated cache, of one model and one size of memory."""

    def __init__(self, spec: ModelSpec, room: float, directory: Path | None) -> None:
        """Memory has room for the attention of so many of the longest texts, for two states of each, and for 8 more."""
        kv = kv_size(spec)
        dram_bytes = round(room * TEXT_BLOCKS_MAX * BLOCK * kv.token_bytes + (8 + 2 * room) * kv.state_bytes)
        curve = PolynomialCurve((0.1, 0.1), 1000.0)
        profile = Profile("p", "made up", curve, kv, curve, 8, 1, 1 << 20)
        size = CacheSize(dram_bytes, 0.0 if directory is None else 1e12)
        with pytest.MonkeyPatch.context() as patched:
            # As many ghosts as the real index has, whose memory is larger than what it may fill.
            patched.setattr(tier, "ghosts_max_of", lambda _: ghosts_max_of(ARENA_BYTES))
            self.simulated = ClusterCache(Cluster("here", profile, 1, 1, cache=size), BLOCK)
        arena = CountedArena(
            ARENA_BYTES, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=slot_sizes_bytes(spec)
        )
        arena.room_bytes = dram_bytes
        shelves = [] if directory is None else [open_ssd(spec, f"{directory}:64MiB")]
        self._has_ssd = bool(shelves)
        self.real = Store(TieredPool(spec, arena, shelves) if shelves else Pool(spec, arena))
        self._undo = ExitStack()
        self._undo.callback(arena.close)
        self._undo.callback(self.real.close)

    def __enter__(self) -> Both:
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def serve(self, blocks: list[int]) -> None:
        """Read what is there, and keep the prompt: with the states that a match suggests."""
        ids, request = tokens_of(blocks), request_of(blocks)
        found = self.simulated.find(request)
        self.simulated.used(request, found)
        self.simulated.store(
            request, keys=request.keys, tokens=request.prompt_tokens, resume_tokens=found.resume_tokens
        )
        match = self.real.match([*ids, 0])
        if match:
            self.real.read(match).release()
        suggested = [length for length in self.real.match(ids).suggested if length > match.tokens]
        with self.real.write(ids, resume_at=suggested) as writer:
            put_all(writer)
            writer.commit()
        if self._has_ssd:
            self.real.flush(deadline_s=30)  # what waits to be kept is pinned in memory

    def check(self, blocks: list[int]) -> None:
        found, match = self.simulated.find(request_of(blocks)), self.real.match([*tokens_of(blocks), 0])
        assert (found.resume_tokens, found.tier) == (match.tokens, match.tier or "")


def tokens_of(blocks: list[int]) -> list[int]:
    return [token for block in blocks for token in [block] * BLOCK]


def request_of(blocks: list[int]) -> Request:
    chain, keys = 0, b""
    for block in blocks:
        chain = hash((chain, block)) & (1 << 63) - 1
        keys += chain.to_bytes(KEY_BYTES, "little")
    return Request(0, 0.0, len(blocks) * BLOCK + 1, 8, keys)


def conversations(rng: np.random.Generator, turns: int) -> Iterator[list[int]]:
    """Prompts, in blocks: most go on from one of the last, or from a part of it."""
    texts: list[list[int]] = []
    for _ in range(turns):
        earlier = texts[int(rng.integers(max(0, len(texts) - 8), len(texts)))] if texts and rng.random() < 0.8 else []
        cut = len(earlier) if rng.random() < 0.6 else int(rng.integers(0, len(earlier) + 1))
        added = rng.integers(0, 1 << 20, int(rng.integers(1, TURN_BLOCKS_MAX))).tolist()
        texts.append([*earlier[:cut], *added][:TEXT_BLOCKS_MAX])
        yield texts[-1]


@pytest.mark.parametrize("has_ssd", [False, True], ids=["memory", "memory and SSD"])
@pytest.mark.parametrize("kind", SPECS)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1), room=st.floats(1.2, 3))
def test_it_keeps_and_finds_what_a_store_does(
    kind: str, has_ssd: bool, seed: int, room: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Resume points and tiers are equal for all prompts at all times, hence what went for lack of room was, too."""
    texts: list[list[int]] = []
    with Both(SPECS[kind](BLOCK), room, tmp_path_factory.mktemp("ssd") if has_ssd else None) as both:
        for blocks in conversations(np.random.default_rng(seed), 24):
            both.serve(blocks)
            texts.append(blocks)
            for text in texts:
                both.check(text)
        both.simulated.check()
        counts = both.simulated.counts()
        assert counts[0].evicted_bytes > 0
        assert not counts[0].refused_tokens
