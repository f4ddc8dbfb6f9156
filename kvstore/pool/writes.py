"""How records come into a pool: reserved, filled, committed in one step, or given back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc import SlotRows
from kvstore.errors import (
    LeaseGoneError,
    StaleSlotError,
    WriteError,
)
from kvstore.limits import HANDOVERS_PER_PROMPT_MAX
from kvstore.pool.core import PoolCore
from kvstore.pool.held import PlacedRows
from kvstore.pool.plan import clear_padding, name_table
from kvstore.pool.rows import RecordNames, Rows
from kvstore.pool.transaction import Transaction, commit_together, merge_grids
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvstore._native import WriteSet
    from kvstore.pool.held import HeldRecord
    from kvstore.pool.path import HandOver, NodePath, RecordName
    from kvstore.pool.seam import JointName
    from kvstore.pool.transaction import PreparedCommit
    from kvstore.spec import ChunkGrid


class PoolWrites(PoolCore):
    """The writing side of a pool; see `Pool`. Any thread may call any method."""

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
        transaction.ttl_s = self.limits.ttl_s if ttl_s is None else ttl_s
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
            ends_at_us=self._lifetimes.moment_us(transaction.ttl_s) if transaction.ends_of is None else 0,
            committed_nodes=commit.committed_nodes if transaction.ends_of is None else 0,
        )
        if transaction.ends_of is not None:
            ends = transaction.ends_of(transaction.path)
            self._index.native.prolong(b"".join(transaction.path.node_keys), ends)
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
