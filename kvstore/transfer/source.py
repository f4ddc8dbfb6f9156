"""What a sender reads from: a resume point that is there, or one that is being written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvstore._native import addresses_of
from kvstore.errors import TransferError, WriteError
from kvstore.pool import RecordArrays
from kvstore.spec import ReuseRule
from kvstore.transfer.pieces import pieces_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.pool import BaseHold, HandOver, HeldRecord, NodePath, RecordName, TransactionRecord
    from kvstore.record import RecordHeader, RecordLayout
    from kvstore.spec import ModelSpec
    from kvstore.store.lease import Lease
    from kvstore.store.writer import Writer

    Ids = npt.NDArray[np.int64]
    Checksums = npt.NDArray[np.uint32]
    Costs = npt.NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class SourceRecord:
    """One record to send.

    Attributes:
        name: its node in the path, group, span and units.
        layout: where its pieces lie.
        memory: the record, from its header on; pieces that were reported whole may be read.
        header: its metadata; the cost only if `is_complete`.
        checksums: of its pieces, `[pieces]`; valid for pieces that were reported whole.
        is_complete: it was committed before the transfer began.
    """

    name: RecordName
    layout: RecordLayout
    memory: memoryview
    header: RecordHeader
    checksums: Checksums
    is_complete: bool


class SourceListener(Protocol):
    """Who sends. Called from any thread, also inside `Source.start`; must not block."""

    def pieces_whole(self, record: int, pieces: Ids) -> None:
        """Pieces of a record may be sent."""

    def record_sealed(self, record: int, cost_us: int) -> None:
        """Every piece of a record has been reported."""

    def records_complete(self, first: int, costs_us: Costs) -> None:
        """Records `first` and on may be sent as a whole; nothing more is said of them."""

    def finished(self, handover: HandOver | None) -> None:
        """Everything is committed on this side; with the hand-over, if it is one."""

    def failed(self, reason: str) -> None:
        """There will be nothing to commit."""


class Source(ABC):
    """Records of one path, whole or becoming so, that stay in place until `close`.

    Attributes:
        path: the prefix nodes.
        salt: whose prefix it is.
        resume_tokens: lengths at which states are among the records, ascending.
        is_transient: the path's tail exists for a hand-over only.
        table: the records, in the order in which they should be sent.
        addresses: where each of them lies, `[n]`.
    """

    path: NodePath
    salt: bytes
    resume_tokens: tuple[int, ...]
    is_transient: bool
    table: RecordArrays
    addresses: npt.NDArray[np.uint64]

    @property
    @abstractmethod
    def records(self) -> tuple[SourceRecord, ...]:
        """The records one by one."""

    @property
    @abstractmethod
    def is_complete(self) -> bool:
        """Whether every record was committed before the transfer began."""

    @property
    def spec(self) -> ModelSpec:
        """The model that the records are of."""
        return self.table.layouts[0].spec

    @property
    def total_bytes(self) -> int:
        return int(self.table.by_layout(pieces_bytes(layout) for layout in self.table.layouts).sum())

    @abstractmethod
    def start(self, listener: SourceListener) -> None:
        """Report what is whole, and from here on what becomes so. Called once, by whoever calls `send`.

        Raises:
            WriteError: the records' writer has ended.
        """

    def check(self) -> None:
        """Raise unless all that was read of the memory until now was the records'. Asked before the commit is sent.

        Raises:
            LeaseError, StoreClosedError: the records were not kept in place until now.
        """
        return

    @abstractmethod
    def close(self) -> None:
        """The memory is not read any more. Idempotent."""


class LeaseSource(Source):
    """A resume point that this node has. Takes the lease over and releases it at the end.

    Args:
        lease: a lease of the store, or a hold of the pool.
        handover: makes the transfer a hand-over.
    """

    def __init__(self, lease: Lease | BaseHold, handover: HandOver | None = None) -> None:
        self._lease = lease
        self._handover = handover
        self.path = lease.path
        self.salt = lease.salt
        self.resume_tokens = (lease.path.tokens,)
        self.is_transient = handover is not None and bool(lease.path.tail_ids)
        arrays, addresses = lease.arrays
        self._order = _model_order(arrays)
        self.table = arrays.taken(self._order)
        self.addresses = addresses[self._order]

    @cached_property
    def records(self) -> tuple[SourceRecord, ...]:
        held = self._lease.records
        return tuple(_source_record(held[number], is_complete=True) for number in self._order.tolist())

    @property
    def is_complete(self) -> bool:
        return True

    def start(self, listener: SourceListener) -> None:
        listener.records_complete(0, self.table.costs_us)
        listener.finished(self._handover)

    def check(self) -> None:
        # An attached process's lease can end under it, and what is reused has checksums that hold.
        self._lease.check()

    def close(self) -> None:
        self._lease.release()


class WriterSource(Source):
    """A prompt's cache while it is written: pieces are sent as they become whole.

    What the writer commits in parts stays on this node; the transfer commits once, with the whole path.

    Args:
        writer: still open.
        is_transient: the prompt's tail is for the hand-over only.

    Raises:
        WriteError: the writer has ended.
    """

    def __init__(self, writer: Writer, *, is_transient: bool = False) -> None:
        transaction = writer.transaction
        self._writer = writer
        self._held = ExitStack()
        # The slots stay pinned until `close`, also when records are evicted right after the commit.
        self._held.enter_context(transaction.moving())
        self.path = transaction.path
        self.salt = writer.prompt.salt
        self.resume_tokens = tuple(writer.resume_at)
        self.is_transient = is_transient and bool(self.path.tail_ids)
        first = [record.layout.span.layers[0] for record in transaction.held]
        held = sorted(zip(first, transaction.held, strict=True), key=lambda each: (each[0], each[1].name))
        written = transaction.records
        self._records = (
            *(_source_record(record, is_complete=True) for _, record in held),
            *(_source_record(record, is_complete=False) for record in written),
        )
        self._first_written = len(held)
        self.table = RecordArrays.of((record.name, record.layout, record.header) for record in self._records)
        self.addresses = addresses_of([record.memory for record in self._records])

    @property
    def records(self) -> tuple[SourceRecord, ...]:
        return self._records

    @property
    def is_complete(self) -> bool:
        return self._first_written == len(self._records)

    def start(self, listener: SourceListener) -> None:
        listener.records_complete(0, self.table.costs_us[: self._first_written])
        events = _WriterEvents(self._first_written, self.path.tokens, listener)
        self._writer.subscribe(events)
        if not self._writer.transaction.is_open and not events.has_ended:
            # It ended after this source was made and before it was subscribed to: how, nobody says any more.
            raise WriteError("the writer ended before its transfer began; send what it committed by its match")

    def close(self) -> None:
        self._held.close()


class _WriterEvents:
    """A writer's events, with its record numbers turned into those of the offer."""

    def __init__(self, first_written: int, end_tokens: int, listener: SourceListener) -> None:
        self._first_written = first_written
        self._end_tokens = end_tokens
        self._listener = listener
        self.has_ended = False

    def pieces_whole(self, record: int, pieces: Ids) -> None:
        self._listener.pieces_whole(self._first_written + record, pieces)

    def record_sealed(self, record: int, cost_us: int) -> None:
        self._listener.record_sealed(self._first_written + record, cost_us)

    def committed(self, upto_tokens: int, handover: HandOver | None) -> None:
        if upto_tokens >= self._end_tokens:
            self.has_ended = True
            self._listener.finished(handover)

    def aborted(self, reason: str) -> None:
        self.has_ended = True
        self._listener.failed(reason)


def _source_record(record: HeldRecord | TransactionRecord, *, is_complete: bool) -> SourceRecord:
    checksums = record.layout.checksums(record.memory)
    return SourceRecord(record.name, record.layout, record.memory, record.header, checksums, is_complete)


def _model_order(arrays: RecordArrays) -> npt.NDArray[np.int64]:
    """By first layer, then by position in the prompt: what a model needs first goes first."""
    first_layers = arrays.by_layout(layout.span.layers[0] for layout in arrays.layouts)
    return np.lexsort((*reversed(arrays.names.table.T), first_layers))


def check_source(source: Source) -> None:
    """A transfer has at least one record, and states only at its resume points.

    Raises:
        TransferError: there is nothing to send.
    """
    table = source.table
    if not len(source.path) or not len(table):
        raise TransferError("there is nothing to send: the prefix has no tokens or no records; send a hit")
    is_state = table.by_layout(layout.group.rule is ReuseRule.STATE for layout in table.layouts) != 0
    strays = table.end_tokens[is_state & ~np.isin(table.end_tokens, source.resume_tokens)]
    if len(strays):
        raise TransferError(f"a state at {strays[0]} tokens is to be sent, which is no resume point")
