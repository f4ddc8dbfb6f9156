"""Writing: reserve, fill, seal, commit, or give everything back."""

from __future__ import annotations

import logging
import math
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import addresses_of
from kvstore.abc import SlotRows
from kvstore.errors import LeaseGoneError, RecordError, StoreClosedError, WriteError
from kvstore.pool.arrays import RecordArrays
from kvstore.pool.seam import BaseTransaction, incomplete
from kvstore.record import Record, seal_records, seal_rows
from kvstore.record.seal import COST_US_MAX
from kvstore.spec import UNKNOWN_GRID
from kvstore.spec.coverage import span_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    from kvstore._native import WriteSet
    from kvstore.errors import JointCommitError
    from kvstore.pool.held import HeldRecord, PlacedRows, TransactionRecord
    from kvstore.pool.joint import JointCommits, Party
    from kvstore.pool.path import HandOver, NodePath, RecordPlace
    from kvstore.pool.seam import CommitEnd, JointName
    from kvstore.pool.writes import PoolWrites
    from kvstore.record import RecordLayout

LOG = logging.getLogger("kvstore.pool")

_serials = count()


def frame_reserved(records: Sequence[TransactionRecord], costs_us: Mapping[int, int]) -> None:
    """Write the framing of those records that are named with their costs; all pieces and checksums are in place."""
    by_layout: dict[RecordLayout, list[int]] = {}
    for number in costs_us:
        by_layout.setdefault(records[number].layout, []).append(number)
    for layout, members in by_layout.items():
        chosen = [records[number] for number in members]
        addresses = addresses_of([record.memory for record in chosen])
        seal_records(layout, addresses, [record.header for record in chosen], [costs_us[number] for number in members])


class Transaction(BaseTransaction):
    """Reserved records on one path, invisible until committed. Made by `Pool.begin`; any thread.

    While it lives, and while bytes still move in its slots, the committed records on its path are not evicted, and
    all slots are pinned.

    Attributes:
        path: the nodes that are written.
        writes: the reservation in the index.
        placed: what was missing and is now reserved, as arrays.
        placed_held: the requested records that were there already, as arrays.
        inherited: those of the resume point that is continued which the path passes through.
        basis: all records of the resume point that is continued: what is computed from them is only as good as they.
        salt: whose prefix it is.
        is_transient: the path's tail is for a hand-over only.
        damages: how often damage had been found when the basis was last known to be good.
    """

    def __init__(
        self,
        pool: PoolWrites,
        path: NodePath,
        writes: WriteSet,
        placed: PlacedRows,
        placed_held: PlacedRows,
        inherited: tuple[HeldRecord, ...],
        basis: tuple[HeldRecord, ...],
        salt: bytes,
        damages: int,
        *,
        is_transient: bool,
    ) -> None:
        self.path = path
        self.writes = writes
        self.placed = placed
        self.placed_held = placed_held
        self.inherited = inherited
        self.basis = basis
        self.salt = salt
        self.damages = damages
        self.is_transient = is_transient
        self.ttl_s: float | None = None
        """How long what it commits lives after that; None for as long as there is room."""
        self.ends_of: Callable[[NodePath], npt.NDArray[np.uint64]] | None = None
        """Until when what it commits is wanted where it comes from, which is then asked instead of `ttl_s`."""
        self.ends_s = math.inf
        """When it has been open for too long, by the pool's clock."""
        self._serial = next(_serials)
        self._pool = pool
        self._lock = threading.Lock()
        self._costs_us = np.zeros(len(placed.rows), np.uint64)
        self._is_sealed = np.zeros(len(placed.rows), np.bool_)
        self._is_committed = np.zeros(len(placed.rows), np.bool_)
        self._movers = 0
        self._end_reason: str | None = None
        self._unpinned = False
        self._given_back: set[int] = set()
        self._party: tuple[Party, JointCommits] | None = None

    def become(self, party: Party, joints: JointCommits) -> None:
        """For `Pool.begin`: this is a party of a joint commit."""
        party.transaction = self
        self._party = (party, joints)

    @property
    def joint(self) -> JointName | None:
        return self._party[0].name if self._party is not None else None

    @property
    def joint_failure(self) -> JointCommitError | None:
        """Why the joint commit that this is a party of has failed, if it has."""
        return self._party[0].failure if self._party is not None else None

    def __del__(self) -> None:
        if getattr(self, "_end_reason", "it was never begun") is None:
            self._pool.settle_later(partial(self.abort, "it was dropped without a commit"))

    @cached_property
    def records(self) -> tuple[TransactionRecord, ...]:
        """What was missing and is now reserved, one by one."""
        return self.placed.reserved()

    @cached_property
    def reserved_arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        return RecordArrays.of_rows(self.placed.rows), self.placed.addresses

    @cached_property
    def held(self) -> tuple[HeldRecord, ...]:
        return (*self.inherited, *self.placed_held.held())

    def grids(self) -> dict[RecordPlace, bytes]:
        """Chunk grid digests of all records that this transaction provides or builds on; see `merge_grids`."""
        return merge_grids([self])

    def grid_places(self) -> Iterator[tuple[RecordPlace, bytes]]:
        """Where each record that this transaction provides or builds on belongs, and its chunk grid digest."""
        for record in self.inherited:
            yield (record.name.node, record.name.group, record.name.span), record.header.grid
        yield from self.placed_held.rows.places()
        for index, (place, digest) in enumerate(self.placed.rows.places()):
            # What was given back of a writer that knows no grid is there on whatever grid the faster writer had.
            if index not in self._given_back or digest != UNKNOWN_GRID:
                yield place, digest

    @property
    def is_open(self) -> bool:
        return self._end_reason is None

    @contextmanager
    def moving(self) -> Iterator[None]:
        self.expire_if_due()
        self._check_open()
        with self._lock:
            self._check_open()
            self._movers += 1
        try:
            yield
        finally:
            with self._lock:
                self._movers -= 1
            self._unpin_when_still()

    def seal(self, index: int, cost_us: int = 0) -> None:
        self.seal_all([index], [cost_us])

    def seal_all(self, indices: Sequence[int], costs_us: Sequence[int]) -> None:
        self._check_open()
        with self._lock:
            self._check_open()
            chosen = np.asarray(indices, np.int64)
            costs = np.asarray(costs_us, np.uint64)
            is_new = ~self._is_sealed[chosen]
            chosen = chosen[is_new]
            self._costs_us[chosen] = costs[is_new]
            self._frame(chosen)
            self._is_sealed[chosen] = True

    def _frame(self, indices: npt.NDArray[np.int64]) -> None:
        """Write the framing of reserved records, with the costs that are known of them."""
        layouts, classes = self.placed.rows.classes
        digests, numbers = self.placed.rows.framing
        for number in np.unique(classes[indices]).tolist():
            members = indices[classes[indices] == number]
            fields = numbers[members]
            fields[:, 2] = np.minimum(self._costs_us[members], np.uint64(COST_US_MAX))
            seal_rows(layouts[number], self.placed.addresses[members], digests[members].data, fields)

    def is_sealed(self, index: int) -> bool:
        return bool(self._is_sealed[index])

    def accept_seal(self, index: int, cost_us: int, *, verify: bool = False) -> None:
        """Another process has filled and framed a record: take it as sealed if it is the one that was reserved.

        Args:
            verify: recompute the checksum of every piece too.

        Raises:
            WriteError: the framing is not this reservation's, a checksum does not hold, or the transaction has ended.
        """
        self._check_open()
        record = self.records[index]
        framed = Record(record.layout, record.memory)
        try:
            found = framed.verify() if verify else framed.header()
        except RecordError as error:
            raise WriteError(f"a record that is to be committed is not what was reserved: {error}") from error
        if found != replace(record.header, cost_us=cost_us):
            raise WriteError(
                f"a record that is to be committed is framed as {found.end_tokens} tokens of prefix "
                f"{found.key.hex()[:16]}, costing {found.cost_us} us; reserved were {record.header.end_tokens} of "
                f"{record.header.key.hex()[:16]}, announced {cost_us} us"
            )
        if record.layout.is_sparse:
            mask = span_mask(record.layout.spec, self.path.masks[record.name.node], record.name.group, record.name.span)
            if framed.coverage != mask:
                raise WriteError("a record that is to be committed covers other tokens than were reserved")
        with self._lock:
            self._check_open()
            if not self._is_sealed[index]:
                self._costs_us[index] = cost_us
                self._is_sealed[index] = True

    def commit(self, upto_tokens: int | None = None, handover: HandOver | None = None) -> None:
        """Make everything up to a length visible at once, or nothing. Without a length, everything.

        A record that another writer has committed meanwhile is given back; the prefix is there.

        Args:
            upto_tokens: commit the records that end at or before this length and go on writing.
            handover: what a decode process picks up at the path's end; only with the whole path.

        Raises:
            WriteError: a record within the range is not sealed, the hand-over is too large, or the transaction has
            ended. StoreClosedError: the store was closed. LeaseGoneError: what this write continues from was found
            damaged since; everything was given back.
        """
        self._check_open()
        if self._party is not None:
            raise WriteError("this writer is a party of a joint commit, which commits whole prompts: commit_jointly")
        commit_together(self._pool, [(self, upto_tokens, handover)])

    def commit_jointly(self, handover: HandOver | None, ended: CommitEnd) -> None:
        if self._party is None:
            raise WriteError("this writer is no party of a joint commit; name one with joint= when it begins")
        party, joints = self._party
        self.expire_if_due()
        try:
            with self._lock:
                self._prepare(None, handover)
        except WriteError:
            if party.failure is None:
                raise  # else it is over for all parties, and `offer` says why
        joints.offer(party, handover, ended)

    def given_back(self, indices: Sequence[int]) -> None:
        """For the pool: other writers' records took the places of these."""
        self._given_back.update(indices)

    def _prepare(self, upto_tokens: int | None, handover: HandOver | None) -> PreparedCommit:
        """What a commit would make visible. Under this transaction's lock."""
        self._check_open()
        is_final = upto_tokens is None or upto_tokens >= self.path.tokens
        wanted = ~self._is_committed
        if upto_tokens is not None:
            wanted &= self.placed.rows.end_tokens <= upto_tokens
        unsealed = np.flatnonzero(wanted & ~self._is_sealed)
        if unsealed.size:
            raise incomplete(self.records[int(unsealed[0])])
        if handover is not None and not is_final:
            raise WriteError("a hand-over goes with the commit of the whole prompt, not of a part of it")
        ready = np.flatnonzero(wanted).astype(np.uint64)
        nodes = len(self.path)
        if upto_tokens is not None and not is_final:
            nodes = min(nodes, max(0, upto_tokens) // self.path.block_tokens)
        is_still = is_final and not self._movers
        return PreparedCommit(self, ready, self._costs_us[wanted], is_final, is_still, nodes, handover)

    def _finish(self, prepared: PreparedCommit) -> None:
        """It was committed. Under this transaction's lock."""
        self._is_committed[prepared.ready] = True
        if prepared.is_final:
            self._end_reason = "it was committed"
            self._unpinned |= prepared.is_still

    def abort(self, reason: str) -> None:
        if self._pool.is_closed:
            return
        with self._lock:
            if self._end_reason is not None:
                return
            self._end_reason = f"it was aborted: {reason}"
            self._unpinned = not self._movers
            uncommitted = self.placed.slots.taken(np.flatnonzero(~self._is_committed))
            self._pool._abandon(self, uncommitted, is_still=self._unpinned)
        self._pool._notify()
        if self._party is not None:
            party, joints = self._party
            joints.fail(party, reason)

    def expire(self) -> None:
        """It has been open for longer than the store bears."""
        if self._end_reason is not None or self._pool.is_closed:
            return
        reason = (
            f"it was open for longer than the {self._pool.limits.writer_max_s:g} s that the store was opened with "
            "(StoreLimits.writer_max_s)"
        )
        self._pool.expired(writers=1)
        LOG.warning("a writer of %d tokens was aborted: %s", self.path.tokens, reason)
        self.abort(reason)
        if self.on_expiry is not None:
            self.on_expiry(reason)

    def expire_if_due(self) -> None:
        if self.ends_s != math.inf and self._pool.now_s() >= self.ends_s:
            self.expire()

    @property
    def slots(self) -> SlotRows:
        """Every slot that is pinned until this transaction has ended and nothing moves any more."""
        held = (record.slot for records in (self.inherited, self.basis) for record in records)
        return SlotRows.join([self.placed.slots, self.placed_held.slots, held])

    def _unpin_when_still(self) -> None:
        with self._lock:
            if self._end_reason is None or self._movers or self._unpinned:
                return
            self._unpinned = True
        self._pool._let_go(self)

    def _check_open(self) -> None:
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed; open it again and write anew")
        if self._end_reason is not None:
            raise WriteError(f"this writer has ended: {self._end_reason}")


@dataclass(frozen=True)
class PreparedCommit:
    """A commit that nothing but the pool stands in the way of.

    Attributes:
        ready: numbers of the records that become visible.
        costs_us: what each saves.
        is_final: the transaction ends with it.
        is_still: and nothing moves in its slots any more: what is given back of them needs no quarantine.
        committed_nodes: how many nodes of the path, from the root, are written then.
        handover: what waits at the path's end from then on.
    """

    transaction: Transaction
    ready: npt.NDArray[np.uint64]
    costs_us: npt.NDArray[np.uint64]
    is_final: bool
    is_still: bool
    committed_nodes: int
    handover: HandOver | None


def commit_together(pool: PoolWrites, commits: Sequence[tuple[Transaction, int | None, HandOver | None]]) -> None:
    """As `Transaction.commit` for several transactions of one pool: all become visible in one step, or none.

    Args:
        commits: transactions, each once, with the length up to which and the hand-over with which it is committed.

    Raises:
        WriteError: as `Transaction.commit`, for any of them; or a transaction is named twice or of another pool.
        Nothing was committed, and all stay open. StoreClosedError: the store was closed. LeaseGoneError: what one of
        them continues from was found damaged; all of them were given back.
    """
    transactions = [transaction for transaction, _, _ in commits]
    if len(set(map(id, transactions))) != len(transactions) or any(each._pool is not pool for each in transactions):
        raise WriteError("a joint commit names each transaction once, all of one pool")
    for transaction in transactions:
        transaction.expire_if_due()
        transaction._check_open()
    try:
        with ExitStack() as locks:
            for transaction in sorted(transactions, key=lambda each: each._serial):
                locks.enter_context(transaction._lock)
            prepared = [transaction._prepare(upto, handover) for transaction, upto, handover in commits]
            pool._commit(prepared)
            for each in prepared:
                each.transaction._finish(each)
    except LeaseGoneError as error:
        for transaction in transactions:
            transaction.abort(str(error))
        raise
    for each in prepared:
        if each.is_final:
            each.transaction._unpin_when_still()
    pool._notify()


def merge_grids(transactions: Sequence[Transaction]) -> dict[RecordPlace, bytes]:
    """Chunk grid digests of all records that transactions of one path provide or build on.

    Where workers wrote their shares on different grids, a writer that knows none takes them together; such a place
    has no digest.
    """
    digests: dict[RecordPlace, bytes] = {}
    mixed: set[RecordPlace] = set()
    for transaction in transactions:
        for place, digest in transaction.grid_places():
            if digests.setdefault(place, digest) != digest:
                mixed.add(place)
    return {place: digest for place, digest in digests.items() if place not in mixed}
