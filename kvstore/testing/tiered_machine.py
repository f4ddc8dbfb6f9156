"""A Hypothesis state machine over a pool and a shelf: whatever happens to either, what is read is right.

    TestRoomy = TieredMachine.for_spec(hybrid(4), dram_bytes=1 << 20, shelf_bytes=16 << 20).TestCase

Writers, readers at once and layer by layer, evictions on both sides, damage and unreadable records on the shelf, loads
that stop half-way, abandoned leases, and reopening after everything but the shelf's medium is gone. All cache contents
check themselves (`kvstore.testing.specs`). The model knows which resume points were ever written, and which are on the
shelf for certain: no other is ever found, and these always are.

What is in memory, and with it what a rule can do, depends on how fast other threads are. What is drawn never does
(`kvstore.testing.choices`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore.clock import Deadline
from kvstore.errors import LeaseGoneError, LoadFailedError, PoolFullError, QuarantineFullError, ShelfRefusedError
from kvstore.placement.tiered import TieredPool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store import Store
from kvstore.testing.choices import CHOICE, chosen
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.specs import check_lease, put_all
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from kvstore.pool import Match
    from kvstore.spec import ModelSpec
    from kvstore.store import Lease

Ids = tuple[int, ...]
Point = tuple[bytes, Ids]
"""Salt and ids of a resume point."""
LEASES_MAX = 3
STEP_S = 30.0
"""How long another thread may take for what it is about to do."""
SALTS = (b"", b"", b"other")
DAMAGED_BYTES = (0, 100, 4100)
"""Within the header, or just behind it: of every record."""


@dataclass(frozen=True)
class Drawn:
    """A new prompt, or one that shares its beginning with an earlier one.

    Attributes:
        is_written: the earlier one is a resume point that was written, and its salt counts; else any prompt is meant.
        base: which one.
        kept: how much of it is shared; None for all.
        more: ids that follow.
    """

    salt: bytes
    is_written: bool
    base: int
    kept: int | None
    more: Ids


DRAWN = st.builds(
    Drawn,
    salt=st.sampled_from(SALTS),
    is_written=st.booleans(),
    base=CHOICE,
    kept=st.none() | CHOICE,
    more=st.lists(st.integers(0, 1), max_size=9).map(tuple),
)
RESUME_AT = st.sets(CHOICE, min_size=1, max_size=3)


@dataclass
class LiveLease:
    lease: Lease
    salt: bytes
    ids: Ids


class TieredMachine(RuleBasedStateMachine):
    """One store on a pool and a shelf; use `for_spec` to say of which spec and sizes."""

    spec: ClassVar[ModelSpec]
    dram_bytes: ClassVar[int]
    shelf_bytes: ClassVar[int]
    is_roomy: ClassVar[bool]

    @classmethod
    def for_spec(
        cls, spec: ModelSpec, *, dram_bytes: int, shelf_bytes: int, is_roomy: bool = True
    ) -> type[TieredMachine]:
        """A machine for a spec.

        Args:
            is_roomy: the shelf holds all that a run writes: then what was flushed must be found.
        """
        members = {"spec": spec, "dram_bytes": dram_bytes, "shelf_bytes": shelf_bytes, "is_roomy": is_roomy}
        return type(f"{cls.__name__}_{spec.model}_{dram_bytes}_{shelf_bytes}", (cls,), members)

    def __init__(self) -> None:
        super().__init__()
        self.medium = ShelfMedium()
        self.written: set[Point] = set()
        self.unflushed: set[Point] = set()
        self.kept: set[Point] = set()
        self.prompts: list[Ids] = [(0,)]
        self.leases: list[LiveLease] = []
        self._open()

    def _open(self) -> None:
        self.shelf = MemoryShelf(self.spec, capacity_bytes=self.shelf_bytes, medium=self.medium)
        arena = ArenaTier(
            self.dram_bytes,
            largest_slot_bytes=largest_slot_bytes(self.spec),
            slot_sizes_bytes=slot_sizes_bytes(self.spec),
        )
        self.pool = TieredPool(self.spec, arena, [self.shelf], close_deadline_s=STEP_S)
        self.store = Store(self.pool)

    # What a rule works on

    def _point(self, drawn: Drawn) -> Point:
        salt = drawn.salt
        if drawn.is_written and self.written:
            salt, base = chosen(sorted(self.written), drawn.base)
        else:
            base = chosen(self.prompts, drawn.base)
        kept = len(base) if drawn.kept is None else drawn.kept % (len(base) + 1)
        ids = (*base[:kept], *drawn.more) or (1,)
        if ids not in self.prompts:
            self.prompts.append(ids)
        return salt, ids

    def _key(self, point: Point) -> bytes:
        path = self.store.prompt(point[1], salt=point[0]).path
        return path.key(len(path) - 1)

    def _match(self, salt: bytes, ids: Ids) -> Match:
        found = self.store.match((*ids, 0), salt=salt)
        for each in found.candidates:
            assert self._was_written((salt, (*ids, 0)[: each.tokens])), "a resume point was found that nobody wrote"
        if self.is_roomy:
            lengths = {each.tokens for each in found.candidates}
            for point in self.kept:
                if point[0] == salt and (*ids, 0)[: len(point[1])] == point[1] and len(point[1]) <= len(ids):
                    assert len(point[1]) in lengths, "what was flushed is not found"
        return found

    def _was_written(self, point: Point) -> bool:
        if point in self.written:
            return True
        # Without states every block that was written is a resume point.
        salt, ids = point
        is_block = not self.spec.state_groups and len(ids) % self.spec.block_tokens == 0
        return is_block and any(each[0] == salt and each[1][: len(ids)] == ids for each in self.written)

    def _lose(self, point: Point, *, is_state: bool) -> None:
        """A node's states, or its attention with all below, may not be on the shelf any more."""
        salt, ids = point
        whole = len(ids) % self.spec.block_tokens == 0
        self.kept = {
            each
            for each in self.kept
            if each[0] != salt or not (each == point or (not is_state and whole and each[1][: len(ids)] == ids))
        }

    def _lose_below(self, match: Match, salt: bytes, ids: Ids) -> None:
        """Records of these candidates may have been found bad."""
        longest = (*ids, 0)[: match.tokens]
        block = self.spec.block_tokens
        self.kept = {
            each for each in self.kept if each[0] != salt or each[1][: min(block, len(longest))] != longest[:block]
        }

    # Writing

    @initialize(drawn=DRAWN, at=RESUME_AT)
    def write_first(self, drawn: Drawn, at: set[int]) -> None:
        """An empty store shows little."""
        self._write(drawn, at)

    @rule(drawn=DRAWN, at=RESUME_AT)
    def write(self, drawn: Drawn, at: set[int]) -> None:
        self._write(drawn, at)

    def _write(self, drawn: Drawn, at: set[int]) -> None:
        salt, ids = self._point(drawn)
        block = self.spec.block_tokens
        possible = [end for end in range(1, len(ids) + 1) if end % block == 0 or end == len(ids)]
        lengths = sorted({chosen(possible, each) for each in at})
        try:
            writer = self.store.write(ids, salt=salt, resume_at=lengths)
        except (PoolFullError, QuarantineFullError):
            return
        with writer:
            put_all(writer)
            writer.commit()
        points = {(salt, ids[:end]) for end in lengths}
        if not self.spec.state_groups and len(ids) not in lengths:
            points.add((salt, ids[: len(ids) // block * block]))
        self.written |= points
        self.unflushed |= points

    @rule(which=CHOICE, more=st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple))
    def continue_from_a_lease(self, which: int, more: Ids) -> None:
        if not self.leases:
            return
        live = chosen(self.leases, which)
        ids = (*live.ids, *more)
        self.shelf.loads.open()
        try:
            writer = self.store.write(ids, salt=live.salt, resume=live.lease)
        except (PoolFullError, QuarantineFullError, LeaseGoneError):
            return
        with writer:
            put_all(writer, start=len(live.ids))
            try:
                writer.commit()
            except LeaseGoneError:
                return
        self.prompts.append(ids)
        self.written.add((live.salt, ids))
        self.unflushed.add((live.salt, ids))

    @rule()
    def flush(self) -> None:
        try:
            self.store.flush(STEP_S)
        except ShelfRefusedError as error:
            if self.is_roomy and error.reason != "evicted":
                raise
        else:
            self.kept |= self.unflushed
        self.unflushed.clear()

    # Reading

    @rule(drawn=DRAWN, at=CHOICE, layered=st.booleans(), verify=st.booleans())
    def read(self, drawn: Drawn, at: int, layered: bool, verify: bool) -> None:
        salt, ids = self._point(drawn)
        found = self._match(salt, ids)
        if not found:
            return
        if len(self.leases) == LEASES_MAX:
            self.leases.pop(0).lease.release()
        self.shelf.loads.open()
        tokens = chosen(found.candidates, at).tokens
        live = self._read(found.at(tokens), salt, ids, layered=layered, verify=verify)
        if live is not None:
            self.leases.append(live)

    def _read(self, found: Match, salt: bytes, ids: Ids, *, layered: bool, verify: bool) -> LiveLease | None:
        before = self.pool.statistics().loading.failed
        lease: Lease | None = None
        try:
            lease = self.store.read(found, layered=layered, verify=verify, deadline_s=STEP_S)
            check_lease(lease, self.store.prompt(ids[: lease.tokens], salt=salt))
            lease.wait()
        except (LoadFailedError, PoolFullError, QuarantineFullError) as error:
            if lease is not None:
                lease.release()
            if isinstance(error, LoadFailedError) and not self.shelf.statistics().damaged_records:
                raise
            lease = None
        if self.pool.statistics().loading.failed > before:
            self._lose_below(found, salt, ids)
        return None if lease is None else LiveLease(lease, salt, ids[: lease.tokens])

    @rule(drawn=DRAWN, after=st.integers(0, 6), is_dropped=st.booleans())
    def abandon(self, drawn: Drawn, after: int, is_dropped: bool) -> None:
        """A layered read that ends half-way, whether or not it had to load."""
        salt, ids = self._point(drawn)
        found = self._match(salt, ids)
        if not found:
            return
        self.shelf.loads.close(after=after)
        try:
            lease = self.store.read(found, layered=True, deadline_s=STEP_S)
        except (PoolFullError, QuarantineFullError, LoadFailedError):
            self.shelf.loads.open()
            self._lose_below(found, salt, ids)
            return
        if is_dropped:
            lease.__del__()
            self.store.match((9,))  # finalizers act in the next call
        lease.release()
        self._settle_loads()
        self.shelf.loads.open()
        if self.shelf.bad_rows:
            self._lose_below(found, salt, ids)

    def _settle_loads(self) -> None:
        for load in tuple(self.pool._loads._running.values()):
            load.wait_for_end(STEP_S)
        assert self.pool.statistics().loading.running == 0

    @rule()
    def read_again(self) -> None:
        for live in self.leases:
            check_lease(live.lease, self.store.prompt(live.ids, salt=live.salt))

    @rule(which=CHOICE)
    def release(self, which: int) -> None:
        if self.leases:
            self.leases.pop(which % len(self.leases)).lease.release()

    # Losing

    @rule(which=CHOICE, states_only=st.booleans())
    def evict_from_memory(self, which: int, states_only: bool) -> None:
        if self.written:
            point = chosen(sorted(self.written), which)
            self.pool.evict_here(self._key(point), states_only=states_only)

    @rule(which=CHOICE, states_only=st.booleans())
    def evict_from_the_shelf(self, which: int, states_only: bool) -> None:
        if not self.written:
            return
        point = chosen(sorted(self.written), which)
        with suppress(ShelfRefusedError):
            self.pool._keeper.flush(Deadline.after(STEP_S))
        self.unflushed.clear()
        self.shelf.evict(self._key(point), states_only=states_only)
        self._lose(point, is_state=states_only)

    @rule(which=CHOICE, is_state=st.booleans(), at=st.sampled_from(DAMAGED_BYTES))
    def damage(self, which: int, is_state: bool, at: int) -> None:
        """It is found when somebody reads it from there, and not before."""
        if self.written:
            point = chosen(sorted(self.written), which)
            self.shelf.damage(self._key(point), is_state=is_state, at=at)

    @rule(rows=st.sets(st.integers(0, 12), max_size=2))
    def make_rows_unreadable(self, rows: set[int]) -> None:
        self.shelf.bad_rows.clear()
        self.shelf.bad_rows.update(rows)

    @rule()
    def reopen(self) -> None:
        for live in self.leases:
            live.lease.release()
        self.leases.clear()
        self.flush()
        self.store.close()
        self._open()
        assert not self.pool.statistics().committed_bytes

    # Always

    @invariant()
    def everything_adds_up(self) -> None:
        self.pool.check()
        found = self.pool.statistics()
        assert found.loading.running == 0
        assert found.reserved_bytes == 0
        if not self.leases and not found.keeping.waiting and not found.keeping.pinned_bytes:
            assert found.quarantined_bytes == 0

    def teardown(self) -> None:
        for live in self.leases:
            live.lease.release()
        self.shelf.loads.open()
        self.store.close()
