"""The pool: one tier, one index, one policy, under one lock.

Decisions are made under the lock; bytes move outside of it, in slots that are pinned.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc import SlotRows
from kvstore.errors import (
    LeaseGoneError,
    PinLimitError,
    RecordTooLargeError,
    StaleSlotError,
    StoreClosedError,
    WriteError,
)
from kvstore.events import RemovedWhy
from kvstore.limits import GHOSTS_MAX, HANDOVERS_PER_PROMPT_MAX, SPARSE_NODES_BYTES_MAX
from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.explain import TierLookup, explain
from kvstore.pool.held import PlacedRows
from kvstore.pool.hold import Hold
from kvstore.pool.index import LASTING_US, NODE_BYTES, RECORD_BYTES, PrefixIndex, needs_of
from kvstore.pool.joint import JointCommits
from kvstore.pool.lifetimes import US_PER_S, Lifetimes
from kvstore.pool.pins import Pin, PinBudget
from kvstore.pool.plan import clear_padding, name_table, place_table
from kvstore.pool.room import Room
from kvstore.pool.rows import RecordNames, Rows
from kvstore.pool.seam import BaseHold, BasePool
from kvstore.pool.search import Query, answer, joined, search
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.store_limits import StoreLimits
from kvstore.pool.transaction import Transaction, commit_together, merge_grids
from kvstore.record import record_layout
from kvstore.spec import ReuseRule
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    import numpy.typing as npt

    from kvstore._native import Finding, HeldRows, WriteSet
    from kvstore.abc import CheckpointPolicy, EvictionPolicy, Slot, Tier
    from kvstore.clock import Deadline
    from kvstore.events import Changes, Tell
    from kvstore.pool.explanation import Explanation
    from kvstore.pool.held import HeldRecord
    from kvstore.pool.match import Match
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.seam import JointName
    from kvstore.pool.transaction import PreparedCommit
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


GHOST_FRACTION_MAX = 1 / 32
"""Share of the capacity that ghosts may take, and as much again for hints of sparse nodes: they must not crowd out
the records that they are hints about."""


class Pool(BasePool):
    """Records of one model spec in one tier. Any thread may call any method.

    Args:
        spec: the model.
        tier: where records lie; the pool closes it.
        eviction: ranks what may go; least recently used by default.
        checkpoints: suggests where to take states.
        limits: quotas and the like; none by default.
        clock: seconds, by which records, pins, leases and writers end.

    Attributes:
        limits: as given.
    """

    is_closed = False

    def __init__(
        self,
        spec: ModelSpec,
        tier: Tier,
        *,
        eviction: EvictionPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
        limits: StoreLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        largest = max(
            record_layout(spec, group, span, spec.groups[group].all_units).slot_bytes
            for group in range(len(spec.groups))
            for span in range(len(spec.spans[group]))
        )
        if largest + 2 * NODE_BYTES + RECORD_BYTES > tier.capacity_bytes:
            raise RecordTooLargeError(
                f"the {tier.name} tier of {tier.capacity_bytes} bytes is too small for one record of this spec "
                f"({largest} bytes); open the store with more memory, or use smaller blocks"
            )
        if not tier.supports_views:
            raise NotImplementedError(f"tier {tier.name!r} has no views; a pool needs them to gather into records")
        self.spec = spec
        self._tier = tier
        self._lock = threading.RLock()
        ghosts_max = min(GHOSTS_MAX, int(tier.capacity_bytes * GHOST_FRACTION_MAX) // NODE_BYTES)
        sparse_bytes_max = min(SPARSE_NODES_BYTES_MAX, int(tier.capacity_bytes * GHOST_FRACTION_MAX))
        self.limits = limits or StoreLimits()
        has_quotas = self.limits.has_quotas
        self._index = PrefixIndex(spec, eviction, ghosts_max, sparse_bytes_max, has_quotas=has_quotas)
        self._checkpoints = checkpoints or LadderCheckpoints()
        self._listeners: list[Callable[[], None]] = []
        self._settling = threading.local()
        self._dropped: deque[Callable[[], None]] = deque()
        self._statistics = PoolStatistics()
        self._room = Room(tier, self._index, self._statistics, self.limits)
        self._damages = 0
        self._losses = 0
        """How often something may have gone that was held: damage, and what had ended."""
        self._joints = JointCommits(self.commit_together)
        self._lifetimes = Lifetimes(self.limits, self._index, clock)
        self._pins = PinBudget(self.limits, tier.capacity_bytes)
        self._expiry_listeners: list[Callable[[Sequence[tuple[bytes, bool]]], None]] = []

    def now_s(self) -> float:
        """The clock by which things end."""
        return self._lifetimes.clock()

    def settle_later(self, end: Callable[[], None]) -> None:
        """Run `end` in the next call that begins here. For finalizers: they may run anywhere, also inside a lock."""
        self._dropped.append(end)

    def _settle(self) -> None:
        """End what was dropped without being ended, and what has ended by itself. Not under the lock."""
        if getattr(self._settling, "is_running", False):
            return  # ending something notifies listeners, and these call the pool again
        self._settling.is_running = True
        try:
            while self._dropped:
                try:
                    end = self._dropped.popleft()
                except IndexError:  # another thread was faster
                    break
                end()
            if self._lifetimes.is_due:
                self._end_due()
        finally:
            self._settling.is_running = False

    def _end_due(self) -> None:
        with self._lock:
            if self.is_closed:
                return
            freed = self._index.expire(int(self.now_s() * US_PER_S))
            expired = self._index.native.take_expired()
            for key, is_state in expired:
                self._index.remember_gone(key, RemovedWhy.EXPIRED, is_state=is_state)
            self._room.freed(freed)
            self._statistics.expired_records += len(freed)
            self._losses += len(freed)
            due = self._lifetimes.take_due()
            self._lifetimes.look()
        for hold in due.holds:
            hold.expire()
        for transaction in due.transactions:
            transaction.expire()
        for pin in due.pins:
            pin.close()
        if expired:
            for listener in tuple(self._expiry_listeners):
                listener(expired)
            self._notify()

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
        if self._dropped or self._lifetimes.is_due:
            self._settle()
        cap = len(prompt) - 1 if cap_tokens is None else min(cap_tokens, len(prompt))
        exact = prompt.exact
        gone = self._index.gone
        queries = [Query(self.spec, exact, exact.path, cap, shard, grid, gone=gone)]
        if exact is not prompt:
            queries.append(Query(self.spec, prompt, prompt.path, cap, shard, grid, gone=gone))
        with self._lock:
            self._check_open()
            native, sparse = self._index.native, self._index.sparse
            if accept_coverage:
                paths = [exact.path, *sparse.variants(exact, self._index.is_stored)]
                queries = [Query(self.spec, exact, path, cap, shard, grid, sparse, gone=gone) for path in paths]
            findings = [search(native, query) for query in queries]
            self._statistics.matches += 1
            self._statistics.hits += any(found.tokens > 0 for found in findings)

        suggest = self._suggest(len(prompt))
        if len(queries) == 1 and not accept_coverage:
            return answer(queries[0], findings[0], self._tier.name, suggest)
        with self._lock:  # the coverages of tails are looked up when the answers are made
            return joined([answer(*each, self._tier.name, suggest) for each in zip(queries, findings, strict=True)])

    def _suggest(self, prompt_tokens: int) -> Callable[[int, Sequence[int]], tuple[int, ...]]:
        """Checkpoints for a prompt, from a resume point's length and known branch points."""

        def suggest(resume_tokens: int, branch_points: Sequence[int]) -> tuple[int, ...]:
            with self._lock:
                return self._checkpoints.suggest(prompt_tokens, resume_tokens, branch_points, self.spec.block_tokens)

        return suggest

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
        return self.hold_now(path, shard=shard, grid=grid, grids=grids)

    @property
    def may_load(self) -> bool:
        """Whether `hold` may have to wait for what lies elsewhere."""
        return False

    def hold_now(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        """As `hold`, without loading anything: `LeaseGoneError` unless all of it lies in this pool's own tier."""
        return self.hold_here(path, shard=shard, grid=grid, grids=grids)

    def hold_here(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        """As `hold_now`, which this pool does for itself: nobody else has asked for it."""
        self._settle()
        if grid is not None and grids is None and self.spec.state_groups:
            grid.digest_at(path.tokens)  # states exist at boundaries only
        with self._lock:
            self._check_open()
            held = self._index.native.collect(
                path.packed,
                needs_of(self.spec, shard),
                None if grid is None else grid.packed,
                None if grids is None else place_table(grids),
            )
            if held is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            return self._make_hold(path, held)

    def _make_hold(self, path: NodePath, held: HeldRows) -> Hold:
        rows = Rows(self.spec, path, *held.rows())
        slots = rows.slots()
        with ExitStack() as undoing:
            self._room.pin_all(slots)
            undoing.callback(self._room.unpin_all, slots)
            self._index.hold(held)
            undoing.callback(lambda: self._room.freed(self._index.release(held)))
            waiting = self._index.handovers(held.last_node)
            handover = waiting[0][0] if waiting else None
            placed = PlacedRows(rows, slots, self._views(slots))
            hold = Hold(self, path, self._index.native.salt(held.last_node), held, placed, handover, self._losses)
            undoing.pop_all()
        self._lifetimes.add_hold(hold)
        return hold

    def _views(self, slots: Sequence[Slot]) -> Sequence[memoryview]:
        return self._tier.views(slots)

    def check_current(self, hold: BaseHold) -> None:
        if not isinstance(hold, Hold):
            raise LeaseGoneError("the lease is of another store")
        with self._lock:
            self._check_open()
            if hold.losses == self._losses:
                return
            try:
                self._views(hold.placed.slots)
            except StaleSlotError as error:
                raise LeaseGoneError(
                    f"the resume point of {hold.path.tokens} tokens was found damaged since it was leased, or its time "
                    "to live was over; match again"
                ) from error
            hold.losses = self._losses

    def release(self, hold: Hold) -> None:
        """End a hold; for `Hold` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._lifetimes.remove_hold(hold)
            self._room.unpin_all(hold.placed.slots)
            self._room.freed(self._index.release(hold.held))
        self._notify()

    def exempt(self, hold: Hold) -> None:
        """A hold that somebody else ends when it lasts for too long."""
        with self._lock:
            self._lifetimes.remove_hold(hold)
            hold.ends_s = math.inf

    def expired(self, *, leases: int = 0, writers: int = 0) -> None:
        """Count what was held for too long; for who ended it."""
        with self._lock:
            self._statistics.expired_leases += leases
            self._statistics.expired_writers += writers

    def pin(
        self, path: NodePath, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None, ttl_s: float | None = None
    ) -> Pin:
        self._settle()
        with self._lock:
            self._check_open()
            held = self._index.native.collect(
                path.packed, needs_of(self.spec, shard), None if grid is None else grid.packed
            )
            if held is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            salt = self._index.native.salt(held.last_node)
            slots = Rows(self.spec, path, *held.rows()).slots()
            try:
                self._pins.check(salt, slots)
            except PinLimitError:
                self._statistics.pin_refusals += 1
                raise
            self._index.hold(held)
            pin = Pin(self, path, salt, held, slots, self._lifetimes.in_s(ttl_s))
            self._pins.add(salt, slots)
            self._lifetimes.add_pin(pin)
            return pin

    def unpin(self, pin: Pin) -> None:
        """End a pin; for `Pin` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._lifetimes.remove_pin(pin)
            self._pins.remove(pin.salt, pin.slots)
            self._room.freed(self._index.release(pin.held))
        self._notify()

    def expire(self, path: NodePath, ttl_s: float | None, *, after_tokens: int | None = None) -> int:
        self._settle()
        with self._lock:
            self._check_open()
            ends_at_us = self._lifetimes.moment_us(ttl_s)
            native = self._index.native
            if after_tokens is None:
                tokens = native.set_end(path.packed, ends_at_us)
            else:
                tokens = native.set_end(path.packed, ends_at_us, after_tokens)
            self._lifetimes.look()
        self._settle()  # what has ended at once makes room at once
        return tokens

    def ends_s(self, path: NodePath) -> npt.NDArray[np.float64]:
        """How long the attention and the states of each node of a path will live, in seconds, `[nodes, 2]`.

        Infinite for what lasts, and 0 for what is not there. Other tiers that take records over keep them as long.
        """
        with self._lock:
            self._check_open()
            ends_us = self._index.native.ends_of(path.packed)
        left: npt.NDArray[np.float64] = np.maximum(ends_us / US_PER_S - self.now_s(), 0.0)
        left[ends_us == LASTING_US] = math.inf
        left[ends_us == 0] = 0.0
        return left

    def subscribe_expired(self, listener: Callable[[Sequence[tuple[bytes, bool]]], None]) -> None:
        """Call `listener` with what has ended by itself, outside the lock. It must not block.

        For other tiers, which drop the same. It gets keys of prefix nodes, and of each whether its states ended, or its
        attention with all that hangs on it.
        """
        with self._lock:
            self._expiry_listeners.append(listener)

    def accept_handover(self, path: NodePath) -> tuple[HandOver, Mapping[RecordPlace, bytes], Hold] | None:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            waiting = self._index.handovers(node) if node is not None else []
            if node is None or not waiting:
                return None
            places = place_table(waiting[0][1])
            held = self._index.native.collect(path.packed, needs_of(self.spec, WHOLE), None, places)
            if held is None:
                return None
            hold = self._make_hold(path, held)  # which may fail, and then the hand-over still waits
            taken = self._index.take_handover(node)
            assert taken is not None
            return (*taken, hold)

    def _end_of(self, path: NodePath) -> int | None:
        return self._index.native.find(path.key(len(path) - 1))

    def return_handover(self, path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            if node is not None and self._index.native.holds_records(node):
                self._index.add_handover(node, handover, grids)

    def take_handover(self, path: NodePath) -> HandOver | None:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            taken = self._index.take_handover(node) if node is not None else None
            return taken[0] if taken is not None else None

    # Writing

    def missing(self, path: NodePath, names: Iterable[RecordName], grid: ChunkGrid | None = None) -> list[RecordName]:
        self._settle()
        named = RecordNames.of(names)
        table = name_table(self.spec, path, named, grid, None)
        with self._lock:
            self._check_open()
            return [named[number] for number in self._index.native.missing(path.packed, *table)]

    def begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        *,
        salt: bytes,
        grid: ChunkGrid | None = None,
        grid_digests: Mapping[RecordName, bytes] | None = None,
        resume_nodes: Iterable[int] = (),
        basis: Sequence[HeldRecord] = (),
        is_transient: bool = False,
        joint: JointName | None = None,
        ttl_s: float | None = None,
    ) -> Transaction:
        self._settle()
        party = self._joints.join(joint) if joint is not None else None
        try:
            transaction = self._begin(path, names, salt, grid, grid_digests, resume_nodes, basis, is_transient)
        except BaseException:
            if party is not None:
                self._joints.leave(party)
            raise
        transaction.ttl_s = ttl_s
        if party is not None:
            transaction.become(party, self._joints)
            self._joints.begun(party)
        return transaction

    def _begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        salt: bytes,
        grid: ChunkGrid | None,
        grid_digests: Mapping[RecordName, bytes] | None,
        resume_nodes: Iterable[int],
        basis: Sequence[HeldRecord],
        is_transient: bool,
    ) -> Transaction:
        if not len(path):
            raise WriteError("a prompt without tokens has nothing to store")
        named = RecordNames.of(names)
        table, digests = name_table(self.spec, path, named, grid, grid_digests)
        with self._lock:
            self._check_open()
            writes = self._index.native.plan(path.packed, table, digests)
            self._check_plan(path, writes)
            rows = Rows(self.spec, path, *writes.missing())
            held_rows = Rows(self.spec, path, *writes.held())
            sizes = rows.slot_sizes
            self._room.check(sizes, writes.new_nodes, salt)
            first = int(named.table[:, 0].min()) if len(named) else 0
            inherited = tuple(
                record
                for record in basis
                if record.name.node < first and self.spec.groups[record.name.group].rule is ReuseRule.ATTENTION
            )
            held_slots = held_rows.slots()
            pinned = SlotRows.join([held_slots, (record.slot for records in (inherited, basis) for record in records)])
            with ExitStack() as undoing:
                self._room.pin_all(pinned)
                undoing.callback(self._room.unpin_all, pinned)
                self._index.native.enter(
                    writes, path.packed, salt, self._basis_tail(path, basis), sorted(set(resume_nodes))
                )
                undoing.callback(self._index.native.undo, writes)
                # A root that is there has its salt, whatever is said here.
                salt = self._index.native.salt(writes.last_node)
                slots = self._room.reserve(sizes, salt)
                undoing.callback(self._room.give_back_all, slots, salt)
                undoing.callback(self._room.unpin_all, slots)
                writes.set_slots(slots.table)
                placed = PlacedRows(rows, slots, self._views(slots))
                layouts, classes = rows.classes
                for row in rows.padded():
                    clear_padding(layouts[classes[row]], placed.memories[row])
                for row, mask in rows.covered():
                    clear_padding(layouts[classes[row]], placed.memories[row])
                    layouts[classes[row]].coverage(placed.memories[row])[:] = mask
                placed_held = PlacedRows(held_rows, held_slots, self._views(held_slots))
                transaction = Transaction(
                    self,
                    path,
                    writes,
                    placed,
                    placed_held,
                    inherited,
                    tuple(basis),
                    salt,
                    self._damages,
                    is_transient=is_transient,
                )
                undoing.pop_all()
            self._lifetimes.add_writer(transaction)
            return transaction

    @staticmethod
    def _check_plan(path: NodePath, writes: WriteSet) -> None:
        if writes.is_wrong_path:
            raise WriteError("a prefix key of this path names another prefix; compute the keys as docs/keys.md says")
        if writes.gap_node is not None:
            raise WriteError(
                f"attention up to {path.end_tokens(writes.gap_node)} tokens cannot be written: the block before it is "
                "neither stored nor part of this write; write from the resume point that was matched"
            )

    def _basis_tail(self, path: NodePath, basis: Sequence[HeldRecord]) -> list[int]:
        """The tail that a write continues from, which its own path does not pass through; at most one node.

        The caller may end its lease once it has restored, and what the write builds on must not be evicted then.
        """
        keys = {record.header.key for record in basis} - {path.tail_key}
        nodes = (self._index.native.find(key) for key in keys)
        return [node for node in nodes if node is not None and self._index.native.is_tail(node)]

    def commit_together(self, commits: Sequence[tuple[Transaction, int | None, HandOver | None]]) -> None:
        """Several transactions become visible in one step, or none; see `kvstore.pool.commit_together`.

        Raises:
            WriteError, StoreClosedError, LeaseGoneError: as `Transaction.commit`.
        """
        commit_together(self, commits)

    def _commit(self, commits: Sequence[PreparedCommit]) -> None:
        """For `commit_together`: make sealed records visible, in one step. All is checked before anything changes."""
        with self._lock:
            self._check_open()
            for commit in commits:
                self._check_basis(commit.transaction)
            self._check_handovers(commits)
            native = self._index.native
            was_empty = [not native.holds_records(commit.transaction.writes.last_node) for commit in commits]
            for commit in commits:
                self._apply(commit)
            for commit, is_new in zip(commits, was_empty, strict=True):
                if commit.is_final:
                    self._finish(commit, commits, is_new=is_new)
            for commit in commits:
                if commit.is_final:
                    native.leave(commit.transaction.writes)
                    if commit.is_still:
                        self._room.freed(self._index.let_go(commit.transaction.writes))
                    self._lifetimes.remove_writer(commit.transaction)
            self._statistics.commits += len(commits)
            self._lifetimes.look()
            self._index.look_ahead()

    def _apply(self, commit: PreparedCommit) -> None:
        transaction = commit.transaction
        if commit.is_still:
            self._room.unpin_all(transaction.slots)
        slots = transaction.placed.slots
        given_back = self._index.commit(
            transaction.writes,
            commit.ready,
            commit.costs_us,
            ends_at_us=self._lifetimes.moment_us(transaction.ttl_s),
            committed_nodes=commit.committed_nodes,
        )
        transaction.given_back(given_back)
        if transaction.path.sparse:
            committed = transaction.placed.rows.end_tokens[commit.ready.astype(np.int64)]
            upto = transaction.path.tokens if commit.is_final else int(committed.max(initial=0))
            self._index.sparse.add(transaction.path, upto)
        self._index.forget_gone(transaction.path.node_keys)
        kept_slots = slots.taken(set(commit.ready.tolist()).difference(given_back))
        self._statistics.stored_records += len(kept_slots)
        self._statistics.stored_bytes += kept_slots.size_bytes
        self._room.keep_all(kept_slots, transaction.salt)
        self._room.give_back_all(slots.taken(given_back), transaction.salt)

    def _check_handovers(self, commits: Sequence[PreparedCommit]) -> None:
        added: dict[int, int] = {}
        for commit in commits:
            if commit.handover is None:
                continue
            node = commit.transaction.writes.last_node
            added[node] = added.get(node, len(self._index.handovers(node))) + 1
            if added[node] > HANDOVERS_PER_PROMPT_MAX:
                raise WriteError(
                    f"{HANDOVERS_PER_PROMPT_MAX} hand-overs of this prompt wait to be taken, which is the limit; take "
                    "them, or commit without one"
                )

    def _check_basis(self, transaction: Transaction) -> None:
        """What was computed from records that were found damaged must not become visible."""
        if transaction.damages == self._damages:
            return  # only damage takes records from under who holds them
        try:
            self._views([record.slot for record in transaction.basis])
        except StaleSlotError as error:
            raise LeaseGoneError(
                "the resume point that this write continues from was found damaged since; nothing more of it was "
                "committed. Match again and compute anew"
            ) from error
        transaction.damages = self._damages

    def _finish(self, commit: PreparedCommit, commits: Sequence[PreparedCommit], *, is_new: bool) -> None:
        """The whole path is there: whether its tail stays, and what waits at its end."""
        native, last = self._index.native, commit.transaction.writes.last_node
        if not commit.transaction.is_transient or not native.is_tail(last):
            # Somebody stores this tail for good, whatever brought it here first.
            native.set_transient(last, False)
        elif is_new:
            native.set_transient(last, any(each.handover is not None for each in commits))
        if commit.handover is not None and native.holds_records(last):
            same = [each.transaction for each in commits if each.transaction.writes.last_node == last]
            self._index.add_handover(last, commit.handover, merge_grids(same))

    def _abandon(self, transaction: Transaction, uncommitted: SlotRows, *, is_still: bool) -> None:
        """For `Transaction.abort`.

        Args:
            is_still: nothing moves in its slots any more: what is given back of them needs no quarantine.
        """
        with self._lock:
            if self.is_closed:
                return
            if is_still:
                self._room.unpin_all(transaction.slots)
            self._room.give_back_all(uncommitted, transaction.salt)
            self._index.native.leave(transaction.writes)
            if is_still:
                self._room.freed(self._index.let_go(transaction.writes))
            self._statistics.aborts += 1
            self._lifetimes.remove_writer(transaction)
            self._lifetimes.look()

    def _let_go(self, transaction: Transaction) -> None:
        """For a transaction that has ended, once its bytes have come to rest.

        Until now its nodes were held: evicting what is still being sent would free nothing.
        """
        with self._lock:
            if not self.is_closed:
                self._room.unpin_all(transaction.slots)
                self._room.freed(self._index.let_go(transaction.writes))

    # Removing

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._index.native.find(key)
            if node is None:
                return 0
            freed = self._index.evict(node, states_only=states_only)
            freed_bytes = self._room.freed(freed) + len(freed) * RECORD_BYTES
        self._notify()
        return freed_bytes

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._lock:
            self._check_open()
            node = self._index.native.find(key)
            if node is None:
                return
            if slot is not None and not self._index.native.has_slot(
                node, is_state, slot.index, slot.generation, slot.size_bytes
            ):
                return
            self._statistics.damaged_records += 1
            self._damages += 1
            self._index.remember_gone(key, RemovedWhy.DAMAGED, is_state=is_state)
            self._losses += 1
            self._room.freed(self._index.condemn(node, is_state=is_state))
        self._notify()

    # The pool itself

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change that may let others go on, outside the lock. It must not block."""
        with self._lock:
            self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def lookups(self) -> Sequence[TierLookup]:
        """How to look into each tier, the fastest first."""
        return [TierLookup(self._tier.name, self._find, seconds_per_byte=0.0, gone=self._index.gone)]

    def _find(self, query: Query) -> Finding:
        with self._lock:
            self._check_open()
            return search(self._index.native, query)

    def explain(self, prompt: Prompt, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Explanation:
        self._settle()
        with self._lock:
            self._check_open()
        return explain(self.spec, prompt, shard, grid, self.lookups())

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        with self._lock:
            self._check_open()
            return self._index.watch(self._tier.name, tell)

    def statistics(self) -> PoolStatistics:
        self._settle()
        with self._lock:
            return self._statistics.snapshot(
                capacity_bytes=self._tier.capacity_bytes,
                committed_bytes=self._index.native.committed_bytes,
                reserved_bytes=self._room.reserved_bytes,
                quarantined_bytes=self._tier.quarantined_bytes,
                index_bytes=self._index.memory_bytes,
                bytes_by_salt=self._index.native.bytes_by_salt,
                nodes=len(self._index.native),
                ghosts=self._index.native.ghost_count,
                pins=self._pins.count,
                pinned_bytes=self._pins.size_bytes,
            )

    def check(self) -> None:
        self._settle()
        with self._lock:
            self._index.check()
            accounted = self._index.native.committed_bytes + self._room.reserved_bytes + self._tier.quarantined_bytes
            assert accounted == self._tier.used_bytes, (accounted, self._tier.used_bytes)
            self._room.quotas.check_reserved(self._room.reserved_bytes)
            # A hand-over's payload, and the hint of a sparse node, are made room for by the next write.
            assert self.is_closed or self._room.free_bytes + self._index.hint_bytes >= 0, "the budget is exceeded"

    def close(self) -> None:
        """Release the tier. Leases and writers that are still open end with `StoreClosedError`."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._index.tell_closed()
            self._tier.close()
            self._index = PrefixIndex(self.spec)
            self._room = Room(self._tier, self._index, self._statistics, self.limits)
        self._joints.close(StoreClosedError("the store was closed while a joint commit waited for its parties"))
        self._notify()

    def close_in_child(self) -> None:
        self.is_closed = True
        self._lock = threading.RLock()
        self._joints = JointCommits(self.commit_together)

    def _check_open(self) -> None:
        if self.is_closed:
            raise StoreClosedError("the store is closed; open it again")
