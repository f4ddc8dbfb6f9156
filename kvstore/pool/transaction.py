"""Writing: reserve, fill, seal, commit, or give everything back."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvstore.errors import StoreClosedError, WriteError
from kvstore.limits import HANDOVER_PAYLOAD_BYTES_MAX
from kvstore.pool.node import Entry
from kvstore.record import Record, RecordHeader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Slot
    from kvstore.pool.node import PrefixNode
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
    from kvstore.pool.pool import Pool
    from kvstore.record import RecordLayout


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

    While it lives, the committed records on its path are not evicted, and all its slots are pinned.
    """

    def __init__(
        self,
        pool: Pool,
        path: NodePath,
        nodes: list[PrefixNode],
        records: tuple[TransactionRecord, ...],
        held: tuple[HeldRecord, ...],
        resume_nodes: frozenset[int],
        *,
        is_transient: bool,
    ) -> None:
        self.path = path
        self.records = records
        """What was missing and is now reserved."""
        self.held = held
        """The requested records that were there already, and those of the resume point that is continued."""
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

    def __del__(self) -> None:
        if getattr(self, "_end_reason", "it was never begun") is None:
            self._pool.settle_later(partial(self.abort, "it was dropped without a commit"))

    def grids(self) -> dict[RecordPlace, bytes]:
        """Chunk grid digests of all records that this transaction provides or builds on."""
        named = [(held.name, held.header.grid) for held in self.held]
        named += [(record.name, record.header.grid) for record in self.records]
        return {(name.node, name.group, name.span): grid for name, grid in named}

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
        self._check_open()
        record = self.records[index]
        with self._lock:
            self._check_open()
            if index in self._costs_us:
                return
            header = record.header
            sealed = RecordHeader(
                header.key, header.parent, header.end_tokens, header.valid_tokens, header.grid, cost_us
            )
            Record(record.layout, record.memory).seal(sealed)
            self._costs_us[index] = cost_us

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
            ended. StoreClosedError: the store was closed.
        """
        self._check_open()
        if handover is not None and len(handover.payload) > HANDOVER_PAYLOAD_BYTES_MAX:
            raise WriteError(
                f"a hand-over's payload of {len(handover.payload)} bytes is over the limit of "
                f"{HANDOVER_PAYLOAD_BYTES_MAX}; send less with it"
            )
        with self._lock:
            self._check_open()
            ready = self._committable(upto_tokens)
            is_final = upto_tokens is None or upto_tokens >= self.path.tokens
            if handover is not None and not is_final:
                raise WriteError("a hand-over goes with the commit of the whole prompt, not of a part of it")
            self._pool._commit(self, ready, is_final=is_final, handover=handover)
            self._committed.update(ready)
            if is_final:
                self._end_reason = "it was committed"
        if is_final:
            self._unpin_when_still()
        self._pool._notify()

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
            self._pool._abandon(self, uncommitted)
        self._unpin_when_still()
        self._pool._notify()

    def _unpin_when_still(self) -> None:
        with self._lock:
            if self._movers or self._end_reason is None or self._unpinned:
                return
            self._unpinned = True
        self._pool._unpin([*(record.slot for record in self.records), *(record.slot for record in self.held)])

    def _check_open(self) -> None:
        if self._pool.is_closed:
            raise StoreClosedError("the store was closed; open it again and write anew")
        if self._end_reason is not None:
            raise WriteError(f"this writer has ended: {self._end_reason}")

    def entry(self, index: int) -> Entry:
        """The index entry of a sealed record."""
        record = self.records[index]
        header = record.header
        return Entry(
            record.layout,
            RecordHeader(
                header.key,
                header.parent,
                header.end_tokens,
                header.valid_tokens,
                header.grid,
                self._costs_us[index],
            ),
            record.slot,
        )
