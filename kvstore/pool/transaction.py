"""Writing: reserve, fill, seal, commit, or give everything back."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kvstore._native import addresses_of
from kvstore.errors import LeaseGoneError, StoreClosedError, WriteError
from kvstore.pool.node import Entry
from kvstore.record import seal_records
from kvstore.spec import UNKNOWN_GRID

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.abc import Slot
    from kvstore.pool.node import PrefixNode
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
    from kvstore.pool.pool import Pool
    from kvstore.record import RecordHeader, RecordLayout


@dataclass(frozen=True)
class HeldRecord:
    """A committed record that stays where it is while a lease or a transaction holds it.

    Attributes:
        name: its node in the path, group, span and units.
        layout: where its pieces lie.
        memory: the record's bytes, from its header on. Read only.
        header: its metadata.
        slot: where it lies.
    """

    name: RecordName
    layout: RecordLayout
    memory: memoryview
    header: RecordHeader
    slot: Slot


@dataclass(frozen=True)
class TransactionRecord:
    """A record that is being written.

    Attributes:
        name: its node in the path, group, span and units.
        layout: where its pieces go.
        memory: the reserved slot, writable.
        header: its metadata, all but the cost.
        slot: the reservation.
    """

    name: RecordName
    layout: RecordLayout
    memory: memoryview
    header: RecordHeader
    slot: Slot


class Transaction:
    """Reserved records on one path, invisible until committed. Made by `Pool.begin`; any thread.

    While it lives, and while bytes still move in its slots, the committed records on its path are not evicted, and
    all slots are pinned.
    """

    def __init__(
        self,
        pool: Pool,
        path: NodePath,
        nodes: list[PrefixNode],
        records: tuple[TransactionRecord, ...],
        held: tuple[HeldRecord, ...],
        basis: tuple[HeldRecord, ...],
        basis_tail: tuple[PrefixNode, ...],
        resume_nodes: frozenset[int],
        *,
        is_transient: bool,
    ) -> None:
        self.path = path
        self.records = records
        """What was missing and is now reserved."""
        self.held = held
        """The requested records that were there already, and those of the resume point that is continued."""
        self.basis = basis
        """All records of the resume point that is continued: what is computed from them is only as good as they are."""
        self.basis_tail = basis_tail
        self.resume_nodes = resume_nodes
        self.is_transient = is_transient
        self.nodes = nodes
        self._pool = pool
        self._lock = threading.Lock()
        self._costs_us: dict[int, int] = {}
        self._committed: set[int] = set()
        self._movers = 0
        self._end_reason: str | None = None
        self._unpinned = False
        self._given_back: set[int] = set()

    def __del__(self) -> None:
        if getattr(self, "_end_reason", "it was never begun") is None:
            self._pool.settle_later(partial(self.abort, "it was dropped without a commit"))

    def grids(self) -> dict[RecordPlace, bytes]:
        """Chunk grid digests of all records that this transaction provides or builds on.

        Where workers wrote their shares on different grids, a writer that knows none takes them together; such a
        place has no digest.
        """
        digests: dict[RecordPlace, bytes] = {}
        mixed: set[RecordPlace] = set()
        # What was given back of a writer that knows no grid is there on whatever grid the faster writer had.
        kept = [
            record
            for index, record in enumerate(self.records)
            if index not in self._given_back or record.header.grid != UNKNOWN_GRID
        ]
        provided: tuple[HeldRecord | TransactionRecord, ...] = (*self.held, *kept)
        for record in provided:
            place = (record.name.node, record.name.group, record.name.span)
            if digests.setdefault(place, record.header.grid) != record.header.grid:
                mixed.add(place)
        return {place: digest for place, digest in digests.items() if place not in mixed}

    @property
    def is_open(self) -> bool:
        return self._end_reason is None

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Bytes are about to land in, or leave from, the slots.

        If the transaction ends meanwhile, its slots are quarantined until this block is left.

        Raises:
            StoreClosedError, WriteError: the transaction has ended.
        """
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
        """Every piece and checksum of a record is in place: write its framing. Idempotent.

        Raises:
            StoreClosedError, WriteError: the transaction has ended.
        """
        self.seal_all([index], [cost_us])

    def seal_all(self, indices: Sequence[int], costs_us: Sequence[int]) -> None:
        """As `seal`, for many records at once."""
        self._check_open()
        with self._lock:
            self._check_open()
            costs = {i: cost for i, cost in zip(indices, costs_us, strict=True) if i not in self._costs_us}
            by_layout: dict[RecordLayout, list[int]] = {}
            for i in costs:
                by_layout.setdefault(self.records[i].layout, []).append(i)
            for layout, members in by_layout.items():
                records = [self.records[i] for i in members]
                addresses = addresses_of([record.memory for record in records])
                seal_records(layout, addresses, [record.header for record in records], [costs[i] for i in members])
            self._costs_us.update(costs)

    def is_sealed(self, index: int) -> bool:
        return index in self._costs_us

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
        try:
            is_final = self._commit(upto_tokens, handover)
        except LeaseGoneError as error:
            self.abort(str(error))
            raise
        if is_final:
            self._unpin_when_still()
        self._pool._notify()

    def _commit(self, upto_tokens: int | None, handover: HandOver | None) -> bool:
        with self._lock:
            self._check_open()
            ready = self._committable(upto_tokens)
            is_final = upto_tokens is None or upto_tokens >= self.path.tokens
            if handover is not None and not is_final:
                raise WriteError("a hand-over goes with the commit of the whole prompt, not of a part of it")
            is_still = is_final and not self._movers
            self._pool._commit(self, ready, is_final=is_final, is_still=is_still, handover=handover)
            self._committed.update(ready)
            if is_final:
                self._end_reason = "it was committed"
                self._unpinned |= is_still
        return is_final

    def given_back(self, index: int) -> None:
        """For the pool: another writer's record took this one's place."""
        self._given_back.add(index)

    def _committable(self, upto_tokens: int | None) -> list[int]:
        ready = []
        for index, record in enumerate(self.records):
            if index in self._committed or (upto_tokens is not None and record.header.end_tokens > upto_tokens):
                continue
            if index not in self._costs_us:
                group = record.layout.group.name
                raise WriteError(
                    f"the record of group {group!r}, layers {record.layout.span.layers[0]} to "
                    f"{record.layout.span.layers[-1]}, at {record.header.end_tokens} tokens is not complete; "
                    "put every layer and state before commit, or commit a shorter part"
                )
            ready.append(index)
        return ready

    def abort(self, reason: str) -> None:
        """Give back what was not committed. Idempotent, and without effect after a commit."""
        if self._pool.is_closed:
            return
        with self._lock:
            if self._end_reason is not None:
                return
            self._end_reason = f"it was aborted: {reason}"
            uncommitted = [record for index, record in enumerate(self.records) if index not in self._committed]
            self._unpinned = not self._movers
            self._pool._abandon(self, uncommitted, is_still=self._unpinned)
        self._pool._notify()

    @property
    def slots(self) -> list[Slot]:
        """Every slot that is pinned until this transaction has ended and nothing moves any more."""
        return [record.slot for records in (self.records, self.held, self.basis) for record in records]

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

    def entry(self, index: int) -> Entry:
        """The index entry of a sealed record."""
        record = self.records[index]
        return Entry(record.layout, replace(record.header, cost_us=self._costs_us[index]), record.slot)
