"""One transfer, from the receiver's side: what is missing, what has arrived, when it may be committed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import Arrivals
from kvstore.clock import Deadline
from kvstore.errors import ProtocolError
from kvstore.limits import TRANSFER_DEADLINE_MAX_S
from kvstore.record.array_view import address_of
from kvstore.transfer.messages import PIECE_ROW, WANT_RANGE, Commit, Committed
from kvstore.transfer.pieces import id_ranges, piece_layout, pieces_bytes, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.pool import BaseTransaction, RecordArrays
    from kvstore.record import RecordLayout
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.messages import Exposure, Rows
    from kvstore.transfer.offer import Offer

    Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Target:
    """A reserved record that pieces arrive in.

    Attributes:
        layout, memory, address: where its pieces go.
    """

    layout: RecordLayout
    memory: memoryview
    address: int


@dataclass(frozen=True)
class Arriving:
    """Pieces of one target in one DATA frame."""

    record: int
    target: Target
    ids: Ids


class IncomingTransfer:
    """State of one transfer at its receiver. One session at a time is attached, and works under its own thread.

    Attributes:
        offer: what the sender announced.
        record_count: records that were offered.
        arrivals: which pieces are wanted, on the way and here, and the credit; native code works on it, too.
        generation: of the present attachment; 0 while there is none.
        deadline: when it is given up for good.
        detached_s: since when no session is attached; None while one is.
        peer_address: of the connection that brought or resumed it last.
        is_joined: further connections have carried pieces of this attachment, so that COMMIT may overtake some.
    """

    def __init__(self, transfer: TransferId, offer: Offer, offered: RecordArrays, transaction: BaseTransaction) -> None:
        self.transfer = transfer
        self.offer = offer
        self.transaction = transaction
        self.generation = 0
        self.began_s = time.monotonic()
        self.deadline = Deadline(self.began_s + min(offer.total_deadline_ms / 1000, TRANSFER_DEADLINE_MAX_S))
        self.detached_s: float | None = self.began_s
        self.commit: Commit | None = None
        self.peer_address = ""
        self.is_joined = False
        self.record_count = len(offered)
        self._reserved, addresses = transaction.reserved_arrays
        self._numbers = offered.names.positions_of(self._reserved.names)
        """Of the reserved records in the offer."""
        self._index = np.full(self.record_count, -1, np.int64)
        """Number of each offered record in the transaction; -1 for what was here already."""
        self._index[self._numbers] = np.arange(len(self._reserved))
        self._costs_us = np.zeros(self.record_count, np.uint64)
        self._is_sealed = np.zeros(self.record_count, np.bool_)
        self.arrivals = Arrivals(self.record_count)
        for number, layout in enumerate(self._reserved.layouts):
            members = np.flatnonzero(self._reserved.layout_numbers == number)
            self.arrivals.add_records(
                self._numbers[members].astype(np.uint32), piece_layout(layout), addresses[members]
            )

    @property
    def largest_piece_bytes(self) -> int:
        return max((int(layout.piece_sizes.max()) for layout in self._reserved.layouts), default=0)

    @property
    def expected_bytes(self) -> int:
        """Piece bytes that were lacking when the transfer began."""
        return int(self._reserved.by_layout(pieces_bytes(layout) for layout in self._reserved.layouts).sum())

    @property
    def missing_bytes(self) -> int:
        """Piece bytes that are still to come."""
        return self.expected_bytes - self.received_bytes

    @property
    def received_bytes(self) -> int:
        """Piece bytes that arrived undamaged."""
        return self.arrivals.counts()[0]

    @property
    def damaged_pieces(self) -> int:
        return self.arrivals.counts()[2]

    def missing_ranges(self) -> Rows:
        """What WANT names: the pieces that are not here."""
        return np.frombuffer(self.arrivals.missing_ranges(), WANT_RANGE)

    # Pieces

    def arriving(self, rows: Rows) -> list[Arriving]:
        """Claimed rows by the record that they belong to, in their order."""
        return [Arriving(record, self._target(record), ids) for record, ids in split_rows(rows)]

    def _target(self, record: int) -> Target:
        reserved = self.transaction.records[int(self._index[record])]
        return Target(reserved.layout, reserved.memory, address_of(reserved.memory))

    def arrived(self, rows: Rows, computed: npt.NDArray[np.uint32]) -> Rows | None:
        """Keep the claimed pieces whose checksums hold; the ranges of the others, to be wanted again, or None.

        Raises:
            WriteError, StoreClosedError: the transaction has ended.
        """
        return self.settled(*self.arrivals.settle(rows, np.ascontiguousarray(computed, np.uint32)))

    def settled(self, damaged: bytes, completed: list[int]) -> Rows | None:
        """Seal the records that a frame has completed; the ranges of what arrived damaged, or None. Raises as above."""
        self._seal(np.array(completed, np.int64))
        if not damaged:
            return None
        return _ranges((record, np.sort(ids)) for record, ids in split_rows(np.frombuffer(damaged, PIECE_ROW)))

    # Seals and the commit

    def seal(self, rows: Rows) -> None:
        """SEAL: the sender has sent every piece of these records.

        Raises:
            ProtocolError: a record that was not offered.
            WriteError, StoreClosedError: the transaction has ended.
        """
        records = np.ascontiguousarray(rows["record"])
        if len(records) and records.max() >= self.record_count:
            raise ProtocolError(f"SEAL names record {records.max()} of {self.record_count}")
        rows = rows[~self._is_sealed[records]]
        records = np.ascontiguousarray(rows["record"])
        self._costs_us[records] = rows["cost_us"]
        self._seal(np.array(self.arrivals.note_seals(records), np.int64))

    def _seal(self, records: Ids) -> None:
        if len(records):
            self.transaction.seal_all(self._index[records].tolist(), self._costs_us[records].tolist())
            self._is_sealed[records] = True

    def committable(self) -> Commit | None:
        """The COMMIT that was asked for, once everything that it covers is here.

        Raises:
            ProtocolError: it covers pieces that were neither sent nor asked for again.
        """
        commit = self.commit
        if commit is None:
            return None
        if self.offer.path.node_at(commit.upto_tokens) is None:
            raise ProtocolError(f"COMMIT names {commit.upto_tokens} tokens, which is no end of a prefix node")
        is_covered = self._reserved.end_tokens <= commit.upto_tokens
        unsealed = self._numbers[is_covered & ~self._is_sealed[self._numbers]]
        if len(unsealed):
            record = int(unsealed[0])
            pieces, unasked, is_seal_known = self.arrivals.pending(record)
            if not pieces and is_seal_known:
                return None  # A further connection has brought the last piece, and its thread is about to say so.
            if not pieces or (unasked and not self.is_joined):
                raise ProtocolError(f"COMMIT covers record {record}, which was not sent completely")
            return None
        return commit

    def committed(self) -> Committed:
        """The answer to the commit."""
        elapsed_us = round((time.monotonic() - self.began_s) * 1e6)
        received_bytes, received_pieces, _ = self.arrivals.counts()
        return Committed(False, received_bytes, received_pieces, elapsed_us)


@dataclass
class Attached:
    """What one session knows of the transfer that it is attached to.

    Attributes:
        incoming: the transfer.
        generation: the attachment's number.
        exposures: descriptor and size of each exposed record.
    """

    incoming: IncomingTransfer
    generation: int
    exposures: dict[int, Exposure] = field(default_factory=dict)


def _ranges(parts: Iterable[tuple[int, Ids]]) -> Rows:
    rows = [(record, first, count) for record, ids in parts for first, count in id_ranges(ids)]
    return np.array(rows, WANT_RANGE) if rows else np.empty(0, WANT_RANGE)
