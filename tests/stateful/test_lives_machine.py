"""Time to live over memory and a durable shelf, with restarts: what is found is just what somebody still wants."""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvstore.placement.ssd import open_ssd
from kvstore.placement.tiered import TieredPool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.specs import check_lease, dense, hybrid, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from kvstore.placement.shelf import Shelf
    from kvstore.spec import ModelSpec

B = 4
STEP_S = 30.0
Ids = tuple[int, ...]


def blocks(*numbers: int) -> Ids:
    return tuple(1000 * number + at for number in numbers for at in range(B))


PROMPTS: tuple[Ids, ...] = (
    blocks(1),
    blocks(1, 2),
    blocks(1, 2, 3),
    blocks(1, 2, 4, 5),
    blocks(1, 6),
    (*blocks(1, 2), 9001, 9002),
    blocks(7, 8),
)
TTLS = (None, 2.0, 5.0, 20.0)


class LivesMachine(RuleBasedStateMachine):
    """Prompts are written, ended and lost from memory while time passes and the process is replaced."""

    spec: ClassVar[ModelSpec]
    is_ssd: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.closing = ExitStack()
        self.now_s = 100.0
        self.down_s = 0.0
        self.wall_s = 1_770_000_000.0
        self.medium = ShelfMedium()
        self.directory = self.closing.enter_context(tempfile.TemporaryDirectory()) if self.is_ssd else ""
        self.ends: dict[Ids, float] = {}
        """Until when each prompt is wanted, by `wall_s`."""
        self.states: dict[Ids, float] = {}
        """Until when the states at its end are."""
        self._open()

    def _make_shelf(self) -> Shelf:
        if not self.is_ssd:
            return MemoryShelf(self.spec, capacity_bytes=4 << 20, name="shelf", medium=self.medium)
        place = Path(self.directory) / "tier"
        return open_ssd(self.spec, f"{place}:32MiB", clock=lambda: self.now_s, now=lambda: self.wall_s)

    def _open(self) -> None:
        sizes = {"slot_sizes_bytes": slot_sizes_bytes(self.spec)}
        tier = ArenaTier(4 << 20, largest_slot_bytes=largest_slot_bytes(self.spec), **sizes)
        self.pool = TieredPool(self.spec, tier, [self._make_shelf()], clock=lambda: self.now_s)
        self.store = Store(self.pool)

    # What is expected

    def _stored(self, ids: Ids) -> int:
        """The length of the deepest prefix of a prompt of which somebody wants something."""
        alive = [ids_ for ends in (self.ends, self.states) for ids_, end in ends.items() if end > self.wall_s]
        return max((self._shared(prompt, ids) for prompt in alive), default=0)

    def _found(self, ids: Ids) -> int:
        """The length of its deepest resume point."""
        if not self.spec.state_groups:
            return self._stored(ids)
        alive = [prompt for prompt, end in self.states.items() if end > self.wall_s]
        return max((len(prompt) for prompt in alive if ids[: len(prompt)] == prompt), default=0)

    @staticmethod
    def _shared(prompt: Ids, ids: Ids) -> int:
        if ids[: len(prompt)] == prompt:
            return len(prompt)
        count = next((at for at, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(ids))
        return min(count, len(ids)) // B * B

    # Rules

    @rule(ids=st.sampled_from(PROMPTS), ttl_s=st.sampled_from(TTLS))
    def write(self, ids: Ids, ttl_s: float | None) -> None:
        with self.store.write(ids, ttl_s=ttl_s) as writer:
            put_all(writer)
            writer.commit()
        self.store.flush(STEP_S)
        end = math.inf if ttl_s is None else self.wall_s + ttl_s
        self.ends[ids] = max(self.ends.get(ids, 0.0), end)
        if self.spec.state_groups:
            self.states[ids] = max(self.states.get(ids, 0.0), end)

    @rule(ids=st.sampled_from(PROMPTS), ttl_s=st.sampled_from((0.0, None, 5.0)), is_all=st.booleans())
    def expire(self, ids: Ids, ttl_s: float | None, is_all: bool) -> None:
        deepest = self._stored(ids)
        assert self.store.expire(ids, ttl_s, after_tokens=0 if is_all else None) == deepest
        end = math.inf if ttl_s is None else self.wall_s + ttl_s
        if deepest:
            for ends in (self.ends, self.states):
                for prompt in [prompt for prompt, until in ends.items() if until <= self.wall_s]:
                    del ends[prompt]
            self.ends.setdefault(ids[:deepest], end)
            for ends in (self.ends, self.states):
                for prompt in ends:
                    if len(prompt) == deepest or is_all:
                        ends[prompt] = end if ids[: min(len(prompt), deepest)] == prompt else ends[prompt]

    @rule(seconds=st.sampled_from((1.0, 2.0, 5.0, 30.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.wall_s += seconds

    @rule(ids=st.sampled_from(PROMPTS), node=st.integers(0, 3))
    def memory_loses(self, ids: Ids, node: int) -> None:
        path = self.store.prompt(ids).path
        self.pool.evict_here(path.key(min(node, len(path) - 1)))

    @rule(ids=st.sampled_from(PROMPTS))
    def read(self, ids: Ids) -> None:
        """What is read comes into memory, and ends when it did."""
        match = self.store.match([*ids, 1])
        assert match.tokens == self._found(ids)
        if match:
            with self.store.read(match) as lease:
                check_lease(lease, self.store.prompt(ids[: match.tokens]))

    @rule(seconds=st.sampled_from((0.0, 1.0, 4.0)), boots=st.booleans())
    def restart(self, seconds: float, boots: bool) -> None:
        self.store.close()
        self.wall_s += seconds
        self.now_s += seconds
        if boots and self.is_ssd:
            self.now_s = 3.0  # the pool's clock begins anew with the machine
        self._open()

    # Always

    @invariant()
    def what_is_wanted_is_found_and_nothing_else(self) -> None:
        for ids in PROMPTS:
            assert self.store.match([*ids, 1]).tokens == self._found(ids), ids
        self.pool.check()

    def teardown(self) -> None:
        self.store.close()
        self.closing.close()


def _case(name: str, spec: ModelSpec, *, is_ssd: bool, examples: int) -> type:
    machine = type(name, (LivesMachine,), {"spec": spec, "is_ssd": is_ssd})
    case: type = machine.TestCase
    case.settings = settings(  # type: ignore[attr-defined]
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    return pytest.mark.timeout(300)(case)


TestDenseOnAShelf = _case("DenseOnAShelf", dense(B), is_ssd=False, examples=12)
TestHybridOnAShelf = _case("HybridOnAShelf", hybrid(B), is_ssd=False, examples=12)
TestDenseOnSsd = _case("DenseOnSsd", dense(B), is_ssd=True, examples=6)
TestHybridOnSsd = _case("HybridOnSsd", hybrid(B), is_ssd=True, examples=6)
