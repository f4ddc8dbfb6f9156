"""The pool: one tier, one index, one policy, under one lock.

Decisions are made under the lock; bytes move outside of it, in slots that are pinned.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import (
    LeaseGoneError,
    PoolFullError,
    QuarantineFullError,
    RecordTooLargeError,
    StoreClosedError,
    WriteError,
)
from kvstore.limits import QUARANTINE_FRACTION_MAX
from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.hold import Hold, collect_held
from kvstore.pool.index import ENTRY_BYTES, NODE_BYTES, PrefixIndex
from kvstore.pool.lru import LRUPolicy
from kvstore.pool.match import Candidate, Match, Missing
from kvstore.pool.search import Query, attention_grid, needs_of, search
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.transaction import HeldRecord, Transaction, TransactionRecord
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import UNKNOWN_GRID, ReuseRule
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvstore.abc import CheckpointPolicy, EvictionPolicy, Slot, Tier
    from kvstore.pool.node import Entry, PrefixNode
    from kvstore.pool.path import HandOver, NodePath, RecordName
    from kvstore.pool.prompt import Prompt
    from kvstore.record import RecordLayout
    from kvstore.spec import ChunkGrid, ModelSpec, Shard


@dataclass(frozen=True)
class _Reservation:
    name: RecordName
    header: RecordHeader


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
        self._index = PrefixIndex(spec, eviction or LRUPolicy())
        self._checkpoints = checkpoints or LadderCheckpoints()
        self._listeners: list[Callable[[], None]] = []
        self._reserved_bytes = 0
        self._statistics = PoolStatistics()
        self.is_closed = False

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
        candidates = tuple(
            Candidate(path.tokens, path, self._bytes_by_group(path, shard), self._tier.name)
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

    def _bytes_by_group(self, path: NodePath, shard: Shard) -> dict[str, int]:
        spec = self.spec
        sizes = {}
        for group in spec.groups:
            tokens = path.tokens if group.rule is ReuseRule.ATTENTION else group.valid_tokens(1, path.tokens)
            per_layer = 0
            for tensor in group.tensors:
                rows = sum(len(shard.units_of(segment)) * segment.unit_rows for segment in tensor.segments)
                per_layer += rows * tensor.row_bytes * (tokens if tensor.has_tokens else 1)
            sizes[group.name] = per_layer * len(group.layers)
        return sizes

    def hold(self, path: NodePath, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Hold:
        """Keep every record of a resume point in place until the hold is released.

        Raises:
            LeaseGoneError: a record is not there any more; nothing is held.
        """
        with self._lock:
            self._check_open()
            entries, nodes = collect_held(self._index, path, needs_of(self.spec, shard), grid)
            if entries is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            self._hold_nodes(nodes, +1)
            for _, entry in entries:
                self._tier.pin(entry.slot)
            self._index.touch(nodes)
            records = tuple(
                HeldRecord(name, entry.layout, self._tier.view(entry.slot), entry.header, entry.slot)
                for name, entry in entries
            )
            handover = nodes[-1].handover if nodes else None
            return Hold(self, path, records, nodes, handover)

    def _hold_nodes(self, nodes: Sequence[PrefixNode], change: int) -> None:
        for node in nodes:
            node.attention_holds += change
        if nodes:
            nodes[-1].state_holds += change

    def release(self, hold: Hold) -> None:
        """End a hold; for `Hold` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._hold_nodes(hold.nodes, -1)
            for record in hold.records:
                self._tier.unpin(record.slot)
            last = hold.nodes[-1] if hold.nodes else None
            if last is not None and last.is_transient and last.handover is None and not last.state_holds:
                self._drop(last)
        self._notify()

    def take_handover(self, path: NodePath) -> HandOver | None:
        """The hand-over waiting at the end of a path, once: whoever takes it decodes."""
        with self._lock:
            self._check_open()
            node = self._index.get(path.key(len(path) - 1))
            if node is None or node.handover is None:
                return None
            handover, node.handover = node.handover, None
            return handover

    # Writing

    def missing(self, path: NodePath, names: Iterable[RecordName], grid: ChunkGrid | None = None) -> list[RecordName]:
        """Those of the named records that are not committed."""
        with self._lock:
            return [name for name in names if self._find(path, name, self._grid_of(path, name, grid)) is None]

    def begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        *,
        salt: bytes,
        grid: ChunkGrid | None = None,
        grid_digests: dict[RecordName, bytes] | None = None,
        resume_nodes: Iterable[int] = (),
        inherited: Sequence[HeldRecord] = (),
        is_transient: bool = False,
    ) -> Transaction:
        """Reserve what is missing of the named records, evicting if need be, or change nothing.

        Args:
            names: the records that the writer will provide.
            salt: for accounting; the path's keys already cover it.
            grid: chunk boundaries that the writer computes with.
            grid_digests: their digests by record, instead of `grid`, where only those are known (a receiver).
            resume_nodes: nodes of the path that become resume points.
            inherited: records of a resume point that the caller holds and continues from.
            is_transient: the path's tail is for a hand-over only and goes with it.

        Raises:
            PoolFullError: not enough can be evicted. QuarantineFullError: too many dropped writers still
            have bytes moving. WriteError: attention records would not be contiguous from the root.
        """
        with self._lock:
            self._check_open()
            self._check_quarantine()
            reservations: list[_Reservation] = []
            held: list[tuple[RecordName, Entry]] = []
            for name in names:
                digest = self._grid_of(path, name, grid) if grid_digests is None else grid_digests[name]
                entry = self._find(path, name, digest)
                if entry is not None:
                    held.append((name, entry))
                else:
                    reservations.append(_Reservation(name, self._header(path, name, digest)))
            self._check_contiguous(path, {name for name, _ in held} | {item.name for item in reservations})
            nodes = self._index.ensure_path(path, salt)
            resume = frozenset(resume_nodes)
            self._rely(nodes, resume, +1)
            try:
                slots = self._allocate([item.name for item in reservations])
            except BaseException:
                self._rely(nodes, resume, -1)
                self._index.release_path(nodes)
                raise
            records = tuple(
                TransactionRecord(item.name, self._layout(item.name), self._tier.view(slot), item.header, slot)
                for item, slot in zip(reservations, slots, strict=True)
            )
            for record in records:
                self._tier.pin(record.slot)
                self._reserved_bytes += record.slot.size_bytes
                _clear_padding(record)
            held_records = tuple(inherited) + tuple(
                HeldRecord(name, entry.layout, self._tier.view(entry.slot), entry.header, entry.slot)
                for name, entry in held
            )
            for held_record in held_records:
                self._tier.pin(held_record.slot)
            return Transaction(self, path, nodes, records, held_records, resume, is_transient=is_transient)

    def _rely(self, nodes: Sequence[PrefixNode], resume_nodes: frozenset[int], change: int) -> None:
        for number, node in enumerate(nodes):
            node.attention_holds += change
            node.state_holds += change
            if number in resume_nodes:
                node.pending += change

    def _layout(self, name: RecordName) -> RecordLayout:
        return record_layout(self.spec, name.group, name.span, name.units)

    def _grid_of(self, path: NodePath, name: RecordName, grid: ChunkGrid | None) -> bytes:
        """Digest of the chunk boundaries on which a record of this name depends."""
        if grid is None:
            return UNKNOWN_GRID
        end_tokens = path.end_tokens(name.node)
        if self.spec.groups[name.group].rule is ReuseRule.ATTENTION:
            return attention_grid(grid, end_tokens) or UNKNOWN_GRID
        return grid.digest_at(end_tokens)

    def _find(self, path: NodePath, name: RecordName, digest: bytes) -> Entry | None:
        return self._index.find(path, name, None if digest == UNKNOWN_GRID else digest)

    def _header(self, path: NodePath, name: RecordName, digest: bytes) -> RecordHeader:
        end_tokens = path.end_tokens(name.node)
        return RecordHeader(
            key=path.key(name.node),
            parent=path.parent(name.node),
            end_tokens=end_tokens,
            valid_tokens=self.spec.groups[name.group].valid_tokens(self.spec.block_tokens, end_tokens),
            grid=digest,
        )

    def _check_contiguous(self, path: NodePath, named: set[RecordName]) -> None:
        for name in named:
            if name.node == 0 or self.spec.groups[name.group].rule is not ReuseRule.ATTENTION:
                continue
            above = type(name)(name.node - 1, name.group, name.span, name.units)
            if above not in named and self._index.find(path, above, None) is None:
                raise WriteError(
                    f"attention up to {path.end_tokens(name.node)} tokens cannot be written: the block before it is "
                    "neither stored nor part of this write; write from the resume point that was matched"
                )

    def _check_quarantine(self) -> None:
        limit = int(self._tier.capacity_bytes * QUARANTINE_FRACTION_MAX)
        if self._tier.quarantined_bytes > limit:
            raise QuarantineFullError(
                f"{self._tier.quarantined_bytes} bytes wait for dropped writers, the limit is {limit}; "
                "wait until their copies have ended"
            )

    def _allocate(self, names: Sequence[RecordName]) -> list[Slot]:
        sizes = [self._layout(name).slot_bytes for name in names]
        self._make_room(sum(sizes) + len(sizes) * ENTRY_BYTES)
        slots: list[Slot] = []
        for size in sizes:
            slot = self._tier.allocate(size)
            if slot is None:
                for taken in slots:
                    self._tier.free(taken)
                raise PoolFullError(f"the {self._tier.name} tier has no slot of {size} bytes left; try again later")
            slots.append(slot)
        return slots

    def _free_bytes(self) -> int:
        return self._tier.capacity_bytes - self._tier.used_bytes - self._index.memory_bytes

    def _make_room(self, needed_bytes: int) -> None:
        """Evict until `needed_bytes` are free, or change nothing."""
        lacking = needed_bytes - self._free_bytes()
        if lacking <= 0:
            return
        victims: dict[tuple[bytes, bool], PrefixNode] = {}
        freed = 0
        for item in self._index.ranked():
            if freed >= lacking:
                break
            if (item.key, item.is_state) in victims:
                continue
            for node, is_state in self._index.closure(item):
                if (node.key, is_state) not in victims:
                    victims[node.key, is_state] = node
                    freed += self._evictable_bytes(node, is_state=is_state)
        if freed < lacking:
            ghosts = min(self._index.ghost_count, -(-(lacking - freed) // NODE_BYTES))
            if freed + ghosts * NODE_BYTES < lacking:
                raise PoolFullError(
                    f"{needed_bytes} bytes are needed and {self._free_bytes()} are free; {freed} more may be evicted of "
                    f"{self._tier.capacity_bytes}, the rest is leased or being written; retry later, or open the "
                    "store with more memory"
                )
            self._index.drop_ghosts(ghosts)
        for (_, is_state), node in victims.items():
            self._evict(node, is_state=is_state)

    @staticmethod
    def _evictable_bytes(node: PrefixNode, *, is_state: bool) -> int:
        records = node.states if is_state else node.attention
        return sum(entry.slot.size_bytes + ENTRY_BYTES for entries in records.values() for entry in entries)

    def _evict(self, node: PrefixNode, *, is_state: bool) -> None:
        for entry in self._index.remove(node, is_state=is_state):
            self._tier.free(entry.slot)
            self._statistics.evicted_records += 1
            self._statistics.evicted_bytes += entry.slot.size_bytes

    def _commit(self, transaction: Transaction, ready: list[int], *, is_final: bool, handover: HandOver | None) -> None:
        """For `Transaction.commit`: make sealed records visible, in one step."""
        with self._lock:
            self._check_open()
            changed: dict[tuple[bytes, bool], PrefixNode] = {}
            # Attention before the states that are reached through it.
            order = sorted(ready, key=lambda number: self._reach_order(transaction.records[number].name))
            for index in order:
                record = transaction.records[index]
                self._reserved_bytes -= record.slot.size_bytes
                node = transaction.nodes[record.name.node]
                is_there = self._find(transaction.path, record.name, record.header.grid) is not None
                if is_there or not self._is_reachable(node, record.name):
                    self._tier.free(record.slot)
                    continue
                self._index.add(node, record.name.group, record.name.span, transaction.entry(index))
                is_state = self.spec.groups[record.name.group].rule is ReuseRule.STATE
                changed[node.key, is_state] = node
            # Deepest first, so that the policy never ranks an ancestor before what depends on it.
            for (_, is_state), node in reversed(changed.items()):
                self._index.refresh_evictable(node, is_state=is_state)
            if is_final:
                self._leave(transaction, handover)
            self._statistics.commits += 1

    def _reach_order(self, name: RecordName) -> tuple[int, bool]:
        return name.node, self.spec.groups[name.group].rule is ReuseRule.STATE

    def _is_reachable(self, node: PrefixNode, name: RecordName) -> bool:
        """Whether the attention that a record builds on is still there; a damaged block may have taken it."""
        is_state = self.spec.groups[name.group].rule is ReuseRule.STATE
        if is_state:
            return bool(node.attention) or not self.spec.attention_groups
        return node.parent is None or bool(node.parent.attention.get((name.group, name.span)))

    def _leave(self, transaction: Transaction, handover: HandOver | None = None) -> None:
        last = transaction.nodes[-1]
        if handover is not None:
            last.handover = handover
            last.is_transient = transaction.is_transient and last.is_tail
        self._rely(transaction.nodes, transaction.resume_nodes, -1)
        self._index.release_path(transaction.nodes)

    def _abandon(self, transaction: Transaction, uncommitted: list[TransactionRecord]) -> None:
        """For `Transaction.abort`."""
        with self._lock:
            if self.is_closed:
                return
            for record in uncommitted:
                self._reserved_bytes -= record.slot.size_bytes
                self._tier.free(record.slot)
            self._leave(transaction)
            self._statistics.aborts += 1

    def _unpin(self, slots: Sequence[Slot]) -> None:
        with self._lock:
            if not self.is_closed:
                for slot in slots:
                    self._tier.unpin(slot)

    # Removing

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        """Drop a node's states, or its attention with everything below it; bytes freed.

        Returns 0 when the node is unknown or something of it is held.
        """
        with self._lock:
            node = self._index.get(key)
            if node is None:
                return 0
            closure = self._index.closure(node.evictable(is_state=states_only))
            freed = sum(self._evictable_bytes(member, is_state=is_state) for member, is_state in closure)
            for member, is_state in closure:
                self._evict(member, is_state=is_state)
            return freed

    def condemn(self, key: bytes, *, is_state: bool) -> None:
        """A record of this node is damaged: forget it and all that only it made reachable, held or not.

        Who holds the bytes keeps them; nobody else finds them again.
        """
        with self._lock:
            node = self._index.get(key)
            if node is None:
                return
            self._statistics.damaged_records += 1
            if not is_state:
                for member in (*node.below(), node):
                    self._drop(member)
            else:
                self._evict(node, is_state=True)
        self._notify()

    def _drop(self, node: PrefixNode) -> None:
        self._evict(node, is_state=True)
        self._evict(node, is_state=False)

    # The pool itself

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each commit, abort and release, outside the lock. It must not block."""
        with self._lock:
            self._listeners.append(listener)

    def _notify(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def statistics(self) -> PoolStatistics:
        """Counters and the budget as they are now."""
        with self._lock:
            return self._statistics.snapshot(
                capacity_bytes=self._tier.capacity_bytes,
                committed_bytes=self._index.committed_bytes,
                reserved_bytes=self._reserved_bytes,
                quarantined_bytes=self._tier.quarantined_bytes,
                index_bytes=self._index.memory_bytes,
                bytes_by_salt=self._index.bytes_by_salt,
                nodes=len(self._index),
                ghosts=self._index.ghost_count,
            )

    def check(self) -> None:
        """Assert every invariant, the budget included; for tests (it walks the whole index)."""
        with self._lock:
            self._index.check()
            accounted = self._index.committed_bytes + self._reserved_bytes + self._tier.quarantined_bytes
            assert accounted == self._tier.used_bytes, (accounted, self._tier.used_bytes)

    def close(self) -> None:
        """Release the tier. Leases and writers that are still open end with `StoreClosedError`."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            self._tier.close()
        self._notify()

    def _check_open(self) -> None:
        if self.is_closed:
            raise StoreClosedError("the store is closed; open it again")


def _clear_padding(record: TransactionRecord) -> None:
    """Zero a partially filled record: its padding is stored, sent and checksummed."""
    layout = record.layout
    if layout.capacity_tokens and record.header.valid_tokens < layout.capacity_tokens:
        record.memory[layout.header_bytes : layout.record_bytes] = bytes(layout.body_bytes)
