"""The pool: one tier, one index, one policy, under one lock.

Decisions are made under the lock; bytes move outside of it, in slots that are pinned.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from typing import TYPE_CHECKING

from kvstore.errors import LeaseGoneError, RecordTooLargeError, StaleSlotError, StoreClosedError, WriteError
from kvstore.limits import GHOSTS_MAX, HANDOVERS_PER_PROMPT_MAX
from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.hold import Hold, collect_held
from kvstore.pool.index import ENTRY_BYTES, NODE_BYTES, PrefixIndex, units_within
from kvstore.pool.lru import LRUPolicy
from kvstore.pool.match import Candidate, Match, Missing
from kvstore.pool.plan import clear_padding, find_records, grid_digest, plan_write
from kvstore.pool.room import Room, evictable_bytes
from kvstore.pool.search import Query, needs_of, search
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.transaction import HeldRecord, Transaction, TransactionRecord
from kvstore.record import record_layout
from kvstore.spec import ReuseRule
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvstore.abc import CheckpointPolicy, EvictionPolicy, Slot, Tier
    from kvstore.pool.node import Entry, PrefixNode
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
    from kvstore.pool.prompt import Prompt
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


GHOST_FRACTION_MAX = 1 / 32
"""Share of the capacity that ghosts may take: they must not crowd out the records that they are hints about."""


class Pool:
    """Records of one model spec in one tier. Any thread may call any method.

    Args:
        spec: the model.
        tier: where records lie; the pool closes it.
        eviction: ranks what may go; least recently used by default.
        checkpoints: suggests where to take states.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tier: Tier,
        *,
        eviction: EvictionPolicy | None = None,
        checkpoints: CheckpointPolicy | None = None,
    ) -> None:
        largest = max(
            record_layout(spec, group, span, spec.groups[group].all_units).slot_bytes
            for group in range(len(spec.groups))
            for span in range(len(spec.spans[group]))
        )
        if largest + NODE_BYTES + ENTRY_BYTES > tier.capacity_bytes:
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
        self._index = PrefixIndex(spec, eviction or LRUPolicy(), ghosts_max)
        self._checkpoints = checkpoints or LadderCheckpoints()
        self._listeners: list[Callable[[], None]] = []
        self._settling = threading.local()
        self._dropped: deque[Callable[[], None]] = deque()
        self._statistics = PoolStatistics()
        self._room = Room(tier, self._index, self._statistics)
        self.is_closed = False

    def settle_later(self, end: Callable[[], None]) -> None:
        """Run `end` in the next call that begins here. For finalizers: they may run anywhere, also inside a lock."""
        self._dropped.append(end)

    def _settle(self) -> None:
        """End what was dropped without being ended. Not under the lock."""
        if getattr(self._settling, "is_running", False):
            return  # ending something notifies listeners, and these call the pool again
        self._settling.is_running = True
        try:
            while self._dropped:
                try:
                    end = self._dropped.popleft()
                except IndexError:  # another thread was faster
                    return
                end()
        finally:
            self._settling.is_running = False

    # Reading

    def match(
        self,
        prompt: Prompt,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        cap_tokens: int | None = None,
    ) -> Match:
        """The deepest resume point of a prompt, the other candidates, and why nothing deeper serves.

        Args:
            cap_tokens: deepest length allowed; by default one token less than the prompt has.

        Raises:
            StoreClosedError: the pool is closed.
        """
        self._settle()
        cap = len(prompt) - 1 if cap_tokens is None else min(cap_tokens, len(prompt))
        query = Query(prompt, cap, needs_of(self.spec, shard), grid)
        with self._lock:
            self._check_open()
            found = search(self._index, query)
            self._statistics.matches += 1
            self._statistics.hits += bool(found.candidates)
            suggested = self._checkpoints.suggest(
                len(prompt),
                found.candidates[0].tokens if found.candidates else 0,
                found.branch_points,
                self.spec.block_tokens,
            )
        if grid is not None:
            suggested = _on_grid(suggested, found.candidates[0].tokens if found.candidates else 0, prompt, grid)
        candidates = tuple(
            Candidate(path.tokens, path, self.spec.bytes_by_group(path.tokens, shard), self._tier.name)
            for path in found.candidates
        )
        return Match(
            tokens=candidates[0].tokens if candidates else 0,
            candidates=candidates,
            missing=Missing(cap, found.attention_tokens, found.reasons),
            pending_tokens=found.pending_tokens,
            suggested=suggested,
            shard=shard,
            grid=grid,
        )

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        """Keep every record of a resume point in place until the hold is released.

        Args:
            grid: the chunk boundaries that the records must have been computed with.
            grids: their digests by record, instead of `grid`, where only those are known (a hand-over).

        Raises:
            LeaseGoneError: a record is not there any more; nothing is held.
        """

        def digest_of(node: int, group: int, span: int) -> bytes | None:
            if grids is not None:
                return grids.get((node, group, span))
            if grid is None:
                return None
            return grid_digest(self.spec, path, node, group, grid)

        self._settle()
        with self._lock:
            self._check_open()
            entries, nodes = collect_held(self._index, path, needs_of(self.spec, shard), digest_of)
            if entries is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            return self._make_hold(path, entries, nodes)

    def _make_hold(self, path: NodePath, entries: Sequence[tuple[RecordName, Entry]], nodes: list[PrefixNode]) -> Hold:
        self._hold_nodes(nodes, +1)
        self._room.pin_all(entry.slot for _, entry in entries)
        self._index.touch(nodes)
        records = tuple(self._held(name, entry) for name, entry in entries)
        return Hold(self, path, records, nodes, nodes[-1].handover)

    def _held(self, name: RecordName, entry: Entry) -> HeldRecord:
        return HeldRecord(name, entry.layout, self._tier.view(entry.slot), entry.header, entry.slot)

    def _hold_nodes(self, nodes: Sequence[PrefixNode], change: int) -> None:
        for node in nodes:
            node.attention_holds += change
        if nodes:
            nodes[-1].state_holds += change

    def check_current(self, hold: Hold) -> None:
        """Raise unless the records of a hold are still what the index would give out.

        Damage takes records from under a hold: who holds the bytes may look at them, but nothing must be built on
        them and written back with new checksums.

        Raises:
            LeaseGoneError: a record was found damaged since.
        """
        with self._lock:
            self._check_open()
            for record in hold.records:
                try:
                    self._tier.view(record.slot)
                except StaleSlotError as error:
                    raise LeaseGoneError(
                        f"the resume point of {hold.path.tokens} tokens was found damaged since it was leased; "
                        "match again"
                    ) from error

    def release(self, hold: Hold) -> None:
        """End a hold; for `Hold` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._hold_nodes(hold.nodes, -1)
            self._room.unpin_all(record.slot for record in hold.records)
            if hold.nodes:
                self._drop_if_over(hold.nodes[-1])
        self._notify()

    def accept_handover(self, path: NodePath) -> tuple[HandOver, Mapping[RecordPlace, bytes], Hold] | None:
        """Take the hand-over that waits at the end of a path and hold its records, in one step; None without one."""
        self._settle()
        with self._lock:
            self._check_open()
            node = self._index.get(path.key(len(path) - 1))
            if node is None or not node.handovers:
                return None
            grids = node.handovers[0][1]
            entries, nodes = collect_held(
                self._index, path, needs_of(self.spec, WHOLE), lambda *place: grids.get(place)
            )
            taken = self._index.take_handover(node) if entries is not None else None
            if entries is None or taken is None:
                return None
            return (*taken, self._make_hold(path, entries, nodes))

    def return_handover(self, path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        """Put back what was accepted and is not wanted; without effect if its records have gone."""
        with self._lock:
            self._check_open()
            node = self._index.get(path.key(len(path) - 1))
            if node is not None and (node.attention or node.states):
                self._index.add_handover(node, handover, grids)

    def take_handover(self, path: NodePath) -> HandOver | None:
        """The hand-over that waits at the end of a path, once, without holding anything."""
        self._settle()
        with self._lock:
            self._check_open()
            node = self._index.get(path.key(len(path) - 1))
            taken = self._index.take_handover(node) if node is not None else None
            return taken[0] if taken is not None else None

    # Writing

    def missing(self, path: NodePath, names: Iterable[RecordName], grid: ChunkGrid | None = None) -> list[RecordName]:
        """Those of the named records that are not committed."""
        with self._lock:
            self._check_open()
            return [name for name in names if not self._is_there(path, name, self._digest(path, name, grid))]

    def _digest(self, path: NodePath, name: RecordName, grid: ChunkGrid | None) -> bytes:
        return grid_digest(self.spec, path, name.node, name.group, grid)

    def _is_there(self, path: NodePath, name: RecordName, digest: bytes) -> bool:
        return find_records(self._index, path, name, digest) is not None

    def begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        *,
        salt: bytes,
        grid: ChunkGrid | None = None,
        grid_digests: dict[RecordName, bytes] | None = None,
        resume_nodes: Iterable[int] = (),
        basis: Sequence[HeldRecord] = (),
        is_transient: bool = False,
    ) -> Transaction:
        """Reserve what is missing of the named records, evicting if need be, or change nothing.

        Args:
            names: the records that the writer will provide.
            salt: for accounting; the path's keys already cover it.
            grid: chunk boundaries that the writer computes with.
            grid_digests: their digests by record, instead of `grid`, where only those are known (a receiver).
            resume_nodes: nodes of the path that become resume points.
            basis: all records of a resume point that the caller holds and continues from.
            is_transient: the path's tail is for a hand-over only and goes with it.

        Raises:
            PoolFullError: not enough can be evicted. QuarantineFullError: too many dropped writers still
            have bytes moving. WriteError: attention records would not be contiguous from the root.
            LeaseGoneError: a record of `basis` is not held any more.
        """
        self._settle()
        with self._lock:
            self._check_open()
            plan = plan_write(
                self._index,
                path,
                names,
                lambda name: grid_digests[name] if grid_digests else self._digest(path, name, grid),
            )
            sizes = plan.slot_sizes
            made = self._index.count_missing(path)
            self._room.check(sizes, made)
            first = min((name.node for name in names), default=0)
            inherited = tuple(
                record
                for record in basis
                if record.name.node < first and self.spec.groups[record.name.group].rule is ReuseRule.ATTENTION
            )
            held = (*inherited, *(self._held(name, entry) for name, entry in plan.held))
            self._room.pin_all(record.slot for record in (*held, *basis))
            nodes = self._index.ensure_path(path, salt)
            resume = frozenset(resume_nodes)
            basis_tail = self._basis_tail(path, basis)
            self._rely((*nodes, *basis_tail), resume, +1)
            try:
                slots = self._room.reserve(sizes)
            except BaseException:
                self._rely((*nodes, *basis_tail), resume, -1)
                self._index.release_path(nodes, made=made)
                self._room.unpin_all(record.slot for record in (*held, *basis))
                raise
            records = tuple(
                TransactionRecord(item.name, item.layout, self._tier.view(slot), item.header, slot)
                for item, slot in zip(plan.reservations, slots, strict=True)
            )
            for record in records:
                clear_padding(record.layout, record.memory, record.header.valid_tokens)
            return Transaction(
                self, path, nodes, records, held, tuple(basis), basis_tail, resume, is_transient=is_transient
            )

    def _basis_tail(self, path: NodePath, basis: Sequence[HeldRecord]) -> tuple[PrefixNode, ...]:
        """The tail that a write continues from, which its own path does not pass through; at most one node.

        The caller may end its lease once it has restored, and what the write builds on must not be evicted then.
        """
        tails = {
            node.key: node
            for record in basis
            if (node := self._index.get(record.header.key)) is not None and node.is_tail and node.key != path.tail_key
        }
        return tuple(tails.values())

    def _rely(self, nodes: Sequence[PrefixNode], resume_nodes: frozenset[int], change: int) -> None:
        for number in resume_nodes:
            nodes[number].pending += change
        for node in nodes:
            node.attention_holds += change
            node.state_holds += change

    def _commit(
        self,
        transaction: Transaction,
        ready: list[int],
        *,
        is_final: bool,
        is_still: bool,
        handover: HandOver | None,
    ) -> None:
        """For `Transaction.commit`: make sealed records visible, in one step.

        Args:
            is_still: nothing moves in its slots any more: what is given back of them needs no quarantine.
        """
        with self._lock:
            self._check_open()
            self._check_basis(transaction)
            if handover is not None and len(transaction.nodes[-1].handovers) >= HANDOVERS_PER_PROMPT_MAX:
                raise WriteError(
                    f"{HANDOVERS_PER_PROMPT_MAX} hand-overs of this prompt wait to be taken, which is the limit; take "
                    "them, or commit without one"
                )
            if is_still:
                self._room.unpin_all(transaction.slots)
            changed: dict[tuple[bytes, bool], PrefixNode] = {}
            was_empty = not (transaction.nodes[-1].attention or transaction.nodes[-1].states)
            # Ancestors first: a block is reachable only through the one before it.
            for index in sorted(ready, key=lambda number: transaction.records[number].name.node):
                record = transaction.records[index]
                node = transaction.nodes[record.name.node]
                is_there = self._is_there(transaction.path, record.name, record.header.grid)
                if is_there or not self._is_reachable(node, record.name):
                    self._room.give_back(record.slot)
                    transaction.given_back(index)
                    continue
                self._room.keep(record.slot)
                self._index.add(node, record.name.group, record.name.span, transaction.entry(index))
                is_state = self.spec.groups[record.name.group].rule is ReuseRule.STATE
                changed[node.key, is_state] = node
            for (_, is_state), node in changed.items():
                self._index.refresh_evictable(node, is_state=is_state)
            # From the deepest up: the policy must never rank an ancestor, committed earlier, before what depends on it.
            deepest = max((record.name.node for record in (transaction.records[i] for i in ready)), default=-1)
            self._index.touch(transaction.nodes[: deepest + 1])
            if is_final:
                self._finish(transaction, handover, is_new=was_empty)
                self._leave(transaction, is_still=is_still)
            self._statistics.commits += 1

    def _check_basis(self, transaction: Transaction) -> None:
        """What was computed from records that were found damaged must not become visible."""
        for record in transaction.basis:
            try:
                self._tier.view(record.slot)
            except StaleSlotError as error:
                raise LeaseGoneError(
                    "the resume point that this write continues from was found damaged since; nothing more of it was "
                    "committed. Match again and compute anew"
                ) from error

    def _is_reachable(self, node: PrefixNode, name: RecordName) -> bool:
        """Whether the attention that a block builds on is still there; a damaged block may have taken it.

        States need not wait for it: another worker of the same prompt may bring the attention later.
        """
        if self.spec.groups[name.group].rule is ReuseRule.STATE or node.parent is None:
            return True
        above = [entry.units for entry in node.parent.attention.get((name.group, name.span), ())]
        return units_within(name.units, above)

    def _finish(self, transaction: Transaction, handover: HandOver | None, *, is_new: bool) -> None:
        """The whole path is there: whether its tail stays, and what waits at its end."""
        last = transaction.nodes[-1]
        if not transaction.is_transient or not last.is_tail:
            # Somebody stores this tail for good, whatever brought it here first.
            last.is_transient = False
        elif is_new:
            last.is_transient = handover is not None
        if handover is not None and (last.attention or last.states):
            self._index.add_handover(last, handover, transaction.grids())

    def _leave(self, transaction: Transaction, *, is_still: bool) -> None:
        for number in transaction.resume_nodes:
            transaction.nodes[number].pending -= 1
        self._index.release_path(transaction.nodes)
        if is_still:
            self._stop_relying(transaction)

    def _stop_relying(self, transaction: Transaction) -> None:
        """The nodes of a transaction may be evicted again, and so may the tail that it continued from."""
        self._rely((*transaction.nodes, *transaction.basis_tail), frozenset(), -1)
        for node in transaction.basis_tail:
            self._drop_if_over(node)

    def _abandon(self, transaction: Transaction, uncommitted: list[TransactionRecord], *, is_still: bool) -> None:
        """For `Transaction.abort`; `is_still` as for `_commit`."""
        with self._lock:
            if self.is_closed:
                return
            if is_still:
                self._room.unpin_all(transaction.slots)
            for record in uncommitted:
                self._room.give_back(record.slot)
            self._leave(transaction, is_still=is_still)
            self._statistics.aborts += 1

    def _let_go(self, transaction: Transaction) -> None:
        """For a transaction that has ended, once its bytes have come to rest.

        Until now its nodes were held: evicting what is still being sent would free nothing.
        """
        with self._lock:
            if not self.is_closed:
                self._stop_relying(transaction)
                self._room.unpin_all(transaction.slots)

    # Removing

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        """Drop a node's states, or its attention with everything below it; bytes freed.

        Returns 0 when the node is unknown or something of it is held.
        """
        self._settle()
        with self._lock:
            self._check_open()
            node = self._index.get(key)
            if node is None:
                return 0
            closure = self._index.closure(node.evictable(is_state=states_only))
            freed = sum(evictable_bytes(member, is_state=is_state) for member, is_state in closure)
            for member, is_state in closure:
                self._room.evict(member, is_state=is_state)
        self._notify()
        return freed

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        """A record of this node is damaged: forget it and all that only it made reachable, held or not.

        Who holds the bytes keeps them; nobody else finds them again.

        Args:
            slot: where the damaged record lies; if it has left the index meanwhile, nothing happens.
        """
        with self._lock:
            self._check_open()
            node = self._index.get(key)
            if node is None:
                return
            records = node.states if is_state else node.attention
            if slot is not None and all(entry.slot != slot for entries in records.values() for entry in entries):
                return
            self._statistics.damaged_records += 1
            if not is_state:
                for member in (*node.below(), node):
                    self._drop(member)
            else:
                self._room.evict(node, is_state=True)
        self._notify()

    def _drop_if_over(self, node: PrefixNode) -> None:
        """A tail that came for a hand-over goes once that was taken and nobody reads it or builds on it."""
        if node.is_transient and node.handover is None and not node.attention_holds:
            self._drop(node)

    def _drop(self, node: PrefixNode) -> None:
        self._room.evict(node, is_state=True)
        self._room.evict(node, is_state=False)

    # The pool itself

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change that may let others go on, outside the lock. It must not block."""
        with self._lock:
            self._listeners.append(listener)

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        """End a subscription; without effect if there is none."""
        with self._lock:
            self._listeners = [known for known in self._listeners if known != listener]

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def statistics(self) -> PoolStatistics:
        """Counters and the budget as they are now."""
        self._settle()
        with self._lock:
            return self._statistics.snapshot(
                capacity_bytes=self._tier.capacity_bytes,
                committed_bytes=self._index.committed_bytes,
                reserved_bytes=self._room.reserved_bytes,
                quarantined_bytes=self._tier.quarantined_bytes,
                index_bytes=self._index.memory_bytes,
                bytes_by_salt=self._index.bytes_by_salt,
                nodes=len(self._index),
                ghosts=self._index.ghost_count,
            )

    def check(self) -> None:
        """Assert every invariant, the budget included; for tests (it walks the whole index)."""
        self._settle()
        with self._lock:
            self._index.check()
            accounted = self._index.committed_bytes + self._room.reserved_bytes + self._tier.quarantined_bytes
            assert accounted == self._tier.used_bytes, (accounted, self._tier.used_bytes)
            # A hand-over's payload is made room for by the next write.
            assert self.is_closed or self._room.free_bytes + self._index.payload_bytes >= 0, "the budget is exceeded"

    def close(self) -> None:
        """Release the tier. Leases and writers that are still open end with `StoreClosedError`."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._tier.close()
            self._index = PrefixIndex(self.spec, LRUPolicy())
            self._room = Room(self._tier, self._index, self._statistics)
        self._notify()

    def close_in_child(self) -> None:
        """After a fork, in the child: threads do not survive it, and their locks stay as they were."""
        self.is_closed = True
        self._lock = threading.RLock()

    def _check_open(self) -> None:
        if self.is_closed:
            raise StoreClosedError("the store is closed; open it again")


def _on_grid(lengths: Sequence[int], resume_tokens: int, prompt: Prompt, grid: ChunkGrid) -> tuple[int, ...]:
    """Checkpoints moved back to chunk boundaries, since a state exists only between chunks."""
    block = prompt.path.block_tokens
    possible = [
        boundary
        for boundary in grid.boundaries
        if resume_tokens < boundary <= len(prompt) and (boundary % block == 0 or boundary == len(prompt))
    ]
    positions = {bisect_right(possible, length) for length in lengths}
    return tuple(possible[position - 1] for position in sorted(positions) if position)
