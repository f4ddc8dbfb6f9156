"""A pool with other tiers beside its memory: what lies in one of them is found, and loaded when it is read."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, LeaseGoneError, PoolError, ShelfRefusedError, UnavailableError
from kvstore.limits import KEEP_CLOSE_DEADLINE_S, KEEP_PINNED_FRACTION_MAX, LOAD_DEADLINE_S, SHELVES_MAX
from kvstore.placement.joining import joined_tiers
from kvstore.placement.keeper import Keeper, KeepStatistics, Wanted
from kvstore.placement.layered import LayeredHold
from kvstore.placement.loads import Loads, LoadStatistics
from kvstore.pool.explain import TierLookup
from kvstore.pool.index import LASTING_US
from kvstore.pool.pool import Pool
from kvstore.pool.rows import GROUP, NODE
from kvstore.pool.search import Query, answer
from kvstore.pool.statistics import PoolStatistics
from kvstore.spec.grid import UNKNOWN_GRID
from kvstore.spec.shard import WHOLE, Shard
from kvstore.tiers.ssd.memory import keep_for_ever

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

    from kvstore.abc import CheckpointPolicy, EvictionPolicy, Slot, Tier
    from kvstore.events import Changes, Tell
    from kvstore.placement.load import Load
    from kvstore.placement.shelf import Shelf, ShelfStatistics
    from kvstore.pool import BaseHold, Hold, NodePath, Prompt, StoreLimits
    from kvstore.pool.flat import FlatHold, FlatWrite
    from kvstore.pool.match import Match
    from kvstore.pool.path import RecordPlace
    from kvstore.pool.rows import Rows
    from kvstore.pool.transaction import PreparedCommit, Transaction
    from kvstore.spec import ChunkGrid, ModelSpec


@dataclass
class TieredStatistics(PoolStatistics):
    """Of a pool with further tiers. What is inherited is of the pool's own tier.

    Attributes:
        shelves: of each further tier.
        loading: what was loaded from them.
        keeping: what was kept in them.
    """

    shelves: tuple[ShelfStatistics, ...] = ()
    loading: LoadStatistics = field(default_factory=LoadStatistics)
    keeping: KeepStatistics = field(default_factory=KeepStatistics)


class TieredPool(Pool):
    """A pool whose resume points may also lie on shelves. Any thread may call any method.

    What is committed, and what is read from the pool's own memory, is kept on the shelves behind the caller's back.
    Who holds what only a shelf has loads it: into reserved slots, verified and committed like a transfer that arrives.

    Args:
        spec, tier, eviction, checkpoints: as `Pool`.
        shelves: the other tiers, the fastest first; the pool closes them.
        close_deadline_s: how long `close` waits for what was committed to be kept.

    Raises:
        PoolError: more than `SHELVES_MAX` shelves. RecordTooLargeError: as `Pool`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tier: Tier,
        shelves: Sequence[Shelf],
        *,
        eviction: EvictionPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        close_deadline_s: float = KEEP_CLOSE_DEADLINE_S,
    ) -> None:
        if len(shelves) > SHELVES_MAX:
            raise PoolError(f"{len(shelves)} tiers beside the memory are over the limit of {SHELVES_MAX}")
        super().__init__(spec, tier, eviction=eviction, checkpoints=checkpoints, limits=limits, clock=clock)
        self.shelves = tuple(shelves)
        self._are_durable = (False, *(shelf.is_durable for shelf in shelves))
        self._close_deadline_s = close_deadline_s
        self._close_lock = threading.Lock()
        self._keeper = Keeper(
            self._hold_to_keep,
            self.ends_of,
            self.shelves,
            int(tier.capacity_bytes * KEEP_PINNED_FRACTION_MAX),
        )
        self.subscribe_expired(self._drop_ended)
        self._loads = Loads(self)

    # Reading

    def match(
        self,
        prompt: Prompt,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        cap_tokens: int | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        self._expire_shelves()
        own = super().match(prompt, shard=shard, grid=grid, cap_tokens=cap_tokens, accept_coverage=accept_coverage)
        exact = prompt.exact
        cap = len(prompt) - 1 if cap_tokens is None else min(cap_tokens, len(prompt))
        query = Query(self.spec, exact, exact.path, cap, shard, grid)
        matches = [own]
        for shelf in self.shelves:
            matches.append(answer(query, shelf.find(query), shelf.name, self._suggest(len(prompt))))
        found = joined_tiers(
            matches,
            self._are_durable,
            self._loads.seconds_per_byte,
            may_be_sparse=accept_coverage or exact is not prompt,
        )
        if found.tokens and not own.tokens:
            with self._lock:
                self._statistics.hits += 1
        return found

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
        layered: bool = False,
        deadline: Deadline | None = None,
    ) -> BaseHold:
        try:
            return self.hold_now(path, shard=shard, grid=grid, grids=grids)
        except LeaseGoneError as error:
            gone = error
        deadline = deadline or Deadline.after(LOAD_DEADLINE_S)
        with closing(self.begin_loads(path, shard=shard, grid=grid, grids=grids)) as loads:
            for load in loads:
                try:
                    return self._held(load, deadline, layered, shard, grid, grids)
                except LeaseGoneError as error:
                    gone = error
        raise gone

    @property
    def may_load(self) -> bool:
        return bool(self.shelves)

    def hold_now(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        hold = self.hold_here(path, shard=shard, grid=grid, grids=grids)
        if path.is_exact:
            self._keeper.offer(Wanted(path, shard, grid, grids))
        return hold

    def _held(
        self,
        load: Load,
        deadline: Deadline,
        layered: bool,
        shard: Shard,
        grid: ChunkGrid | None,
        grids: Mapping[RecordPlace, bytes] | None,
    ) -> BaseHold:
        with ExitStack() as undoing:
            pinned = load.pinned()
            if pinned is not None:
                # What was loaded must not be evicted before it is held.
                undoing.callback(pinned.close)
                if layered:
                    hold = LayeredHold(
                        self, load, pinned, lambda: self.hold_here(load.path, shard=shard, grid=grid, grids=grids)
                    )
                    undoing.pop_all()
                    self.limit_hold(hold)
                    return hold
            try:
                load.wait(None, deadline)
            except DeadlineError:
                load.go_on()
                raise
            return self.hold_here(load.path, shard=shard, grid=grid, grids=grids)

    def stored(self, paths: Sequence[NodePath]) -> list[bool]:
        found = super().stored(paths)
        for shelf in self.shelves if not all(found) else ():
            found = [
                is_there or shelf.stored_tokens(path) == path.tokens
                for is_there, path in zip(found, paths, strict=True)
            ]
        return found

    def hold_flat(self, paths: Sequence[NodePath]) -> FlatHold | None:
        hold = super().hold_flat(paths)
        if hold is not None:
            for path, places in zip(paths, hold.places, strict=True):
                if places is not None:
                    self._keeper.offer(Wanted(path, WHOLE, None, None))
        return hold

    def begin_loads(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Generator[Load]:
        """Loads of a resume point, one for each shelf that has it, begun or joined when it is asked for.

        A load is wanted for as long as this iterator stands at it.

        Raises:
            PoolFullError: there is no room for it in the pool's own tier. PoolError: too many loads are under way.
            LeaseGoneError: what it continues from has gone.
        """
        key = (path.key(len(path) - 1), shard, grid, None if grids is None else frozenset(grids.items()))
        for shelf in self.shelves:
            load = self._loads.begin(
                (shelf.name, *key),
                shelf,
                lambda shelf=shelf: shelf.hold(path, shard=shard, grid=grid, grids=grids),  # type: ignore[misc]
            )
            if load is not None:
                try:
                    yield load
                finally:
                    load.leave()

    def check_current(self, hold: BaseHold) -> None:
        super().check_current(hold.own if isinstance(hold, LayeredHold) and hold.own is not None else hold)

    # Writing

    def _commit(self, commits: Sequence[PreparedCommit]) -> None:
        super()._commit(commits)
        for commit in commits:
            self._offer(commit)

    def commit_flat(self, write: FlatWrite) -> None:
        super().commit_flat(write)
        for path in write.paths:
            self._keeper.offer(Wanted(path, WHOLE, grids=None), is_committed=True, may_live_longer=self._has_ends)

    def _offer(self, commit: PreparedCommit) -> None:
        """Have the shelves keep the resume points that a commit has made, the shortest first."""
        transaction = commit.transaction
        path, rows = transaction.path, transaction.placed.rows
        if not path.is_exact:
            self._keeper.refuse("sparse")
            return
        ready = commit.ready.astype(np.int64)
        committed = set(_resume_nodes(self.spec, rows, ready))
        nodes = set(committed)
        if commit.is_final:
            held = transaction.placed_held.rows
            nodes.update(_resume_nodes(self.spec, held, np.arange(len(held))))
        is_leaving = commit.is_final and transaction.is_transient and path.tail_key is not None
        if is_leaving:
            # The tail goes with the hand-over; what leads to it stays.
            self._keeper.refuse("transient")
            nodes.discard(len(path) - 1)
            if not self.spec.state_groups and len(path) > 1:
                nodes.add(len(path) - 2)
        if commit.is_final and nodes:
            committed.add(max(nodes))
        # What was loaded from a shelf was read, and not committed by anybody.
        is_new = transaction.ends_of is None
        shard = _shard_of(self.spec, rows)
        grids = _known_grids(transaction)
        for node in sorted(nodes):
            # What was computed with other chunk boundaries is another variant, and kept beside this one.
            of_node = {place: digest for place, digest in grids.items() if place[0] <= node} or None
            wanted = Wanted(path.prefix(node + 1), shard, grids=of_node)
            self._keeper.offer(wanted, is_committed=is_new and node in committed, may_live_longer=self._has_ends)

    def _hold_to_keep(self, wanted: Wanted) -> Hold:
        """All of it; or one worker's share, where nobody stores the others' here."""
        try:
            hold = self.hold_here(wanted.path, grid=wanted.grid, grids=wanted.grids)
        except LeaseGoneError:
            if wanted.shard == WHOLE:
                raise
            hold = self.hold_here(wanted.path, shard=wanted.shard, grid=wanted.grid, grids=wanted.grids)
        # Shelves read it until they are done; the longest lease is that of who asks for one.
        self.exempt(hold)
        hold.check()
        return hold

    def flush(self, deadline_s: float) -> None:
        """Wait until everything that was committed before is durable, and until when it is wanted.

        Hand-overs' tails and what a sparse prefill wrote are not kept by design, and not waited for.

        Raises:
            DeadlineError: it is not yet. ShelfRefusedError: something was not kept; the message counts why.
            UnavailableError: no tier of this pool is durable. StoreClosedError: closed.
        """
        self._check_open()
        if not any(self._are_durable):
            raise UnavailableError("nothing here outlives a crash; open the store with ssd=")
        self._settle()
        deadline = Deadline.after(deadline_s)
        refusal: ShelfRefusedError | None = None
        try:
            self._keeper.flush(deadline)
        except ShelfRefusedError as error:
            refusal = error
        for shelf in self.shelves:
            try:
                shelf.write_ends(deadline)
            except ShelfRefusedError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    # Time to live

    def _settle(self) -> None:
        super()._settle()
        self._expire_shelves()

    def _expire_shelves(self) -> None:
        """Have the other tiers forget what has ended."""
        now_us = self._lifetimes.moment_us(0.0)
        for shelf in self.shelves:
            if shelf.next_end_us <= now_us:
                shelf.expire(now_us)

    def _drop_ended(self, expired: Sequence[tuple[bytes, bool]]) -> None:
        for shelf in self.shelves:
            for key, is_state in expired:
                shelf.drop_ended(key, is_state=is_state)

    @property
    def _has_ends(self) -> bool:
        """Whether anything here does not last."""
        with self._lock:
            if self._index.native.life_bytes:
                return True
        return any(shelf.next_end_us != LASTING_US for shelf in self.shelves)

    def expire(self, path: NodePath, ttl_s: float | None, *, after_tokens: int | None = None) -> int:
        with self._keeper.changing_ends():
            return super().expire(path, ttl_s, after_tokens=after_tokens)

    def _set_end(self, path: NodePath, ends_at_us: int, after_tokens: int) -> int:
        # With the lock, so that what is loaded meanwhile is committed before or after, but not in between.
        native = self._index.native
        meant = max(native.stored_tokens(path.packed), *(shelf.stored_tokens(path) for shelf in self.shelves), 0)
        if meant:
            native.set_end(path.packed, ends_at_us, after_tokens, meant)
            self._keeper.note_ends()
            for shelf in self.shelves:
                shelf.set_end(path, ends_at_us, after_tokens=after_tokens, meant_tokens=meant)
        return meant

    # Removing

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        """As `Pool.evict`, in every tier. What is just being kept in another tier is held, and stays: see `flush`."""
        freed_bytes = super().evict(key, states_only=states_only)
        for shelf in self.shelves:
            freed_bytes += shelf.evict(key, states_only=states_only)
        return freed_bytes

    def evict_here(self, key: bytes, *, states_only: bool = False) -> int:
        """As `Pool.evict`, in the pool's own tier only."""
        return super().evict(key, states_only=states_only)

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        """As `Pool.condemn`; with a slot only the record that lies there, in the pool's own tier."""
        super().condemn(key, is_state=is_state, slot=slot)
        if slot is None:
            for shelf in self.shelves:
                shelf.condemn(key, is_state=is_state)

    # The pool itself

    def lookups(self) -> Sequence[TierLookup]:
        rates = self._loads.seconds_per_byte
        others = (TierLookup(each.name, each.find, each.is_durable, rates.get(each.name)) for each in self.shelves)
        return [*super().lookups(), *others]

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        return [*super().watch(tell), *(each for shelf in self.shelves for each in shelf.watch(tell))]

    def statistics(self) -> TieredStatistics:
        own = super().statistics()
        return TieredStatistics(
            **vars(own),
            shelves=tuple(shelf.statistics() for shelf in self.shelves),
            loading=self._loads.statistics(),
            keeping=self._keeper.statistics(),
        )

    def check(self) -> None:
        super().check()
        for shelf in self.shelves:
            shelf.check()

    def close(self) -> None:
        """Wait a while for what was committed to be kept, end what moves, close the shelves, release the tier.

        Raises:
            DeadlineError: something that moves does not end. All is closed; who moves keeps the memory that it uses.
        """
        with self._close_lock:
            if self.is_closed:
                return
            self._loads.close(self._close_deadline_s)
            self._keeper.stop(self._close_deadline_s)
            stuck: DeadlineError | None = None
            for shelf in self.shelves:
                try:
                    shelf.close()
                except DeadlineError as error:
                    stuck = error
            if stuck is None:
                # No byte moves any more, but what has come may still be looked at where it lies.
                self._loads.join()
            else:
                # Who hangs there has addresses in it, and may yet come back.
                keep_for_ever(getattr(self._tier, "memory", None))
            self._keeper.join(self._close_deadline_s)
            super().close()
            if stuck is not None:
                raise stuck

    def close_in_child(self) -> None:
        super().close_in_child()
        self._close_lock = threading.Lock()
        self._loads.close_in_child()
        self._keeper.close_in_child()
        for shelf in self.shelves:
            shelf.close_in_child()


def _resume_nodes(spec: ModelSpec, rows: Rows, numbers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[int]:
    """Nodes at which these records may complete a resume point: those with states, or the last one without any."""
    table = rows.table[numbers]
    if not len(table):
        return []
    if not spec.state_groups:
        return [int(table[:, NODE].max())]
    has_state = np.isin(table[:, GROUP].astype(np.int64), np.array(spec.state_groups))
    nodes: list[int] = np.unique(table[has_state, NODE]).astype(np.int64).tolist()
    return nodes


def _known_grids(transaction: Transaction) -> dict[RecordPlace, bytes]:
    """Chunk grid digests of what a transaction provides or builds on, where they are known."""
    known = (*transaction.placed.rows.digests, *transaction.placed_held.rows.digests)
    if all(digest == UNKNOWN_GRID for digest in known):
        return {}
    return {place: digest for place, digest in transaction.grids().items() if digest != UNKNOWN_GRID}


def _shard_of(spec: ModelSpec, rows: Rows) -> Shard:
    """Whose share was written: that of the tensor-parallel position which records of split groups name."""
    shard = WHOLE
    for group, _, start, stop in rows.record_names.classes[0]:
        count = spec.groups[group].unit_count // (stop - start)
        if count > shard.count:
            shard = Shard(start // (stop - start), count)
    return shard
