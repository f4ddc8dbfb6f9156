"""One transfer, from the receiver's side: what is missing, what has arrived, when it may be committed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import ProtocolError
from kvstore.limits import TRANSFER_DEADLINE_MAX_S
from kvstore.record.array_view import address_of
from kvstore.transfer.messages import WANT_RANGE, Commit, Committed
from kvstore.transfer.pieces import id_ranges

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.pool import Transaction
    from kvstore.record import RecordLayout
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.messages import Exposure, Rows
    from kvstore.transfer.offer import Offer, OfferedRecord

    Ids = npt.NDArray[np.int64]


@dataclass(eq=False)
class Target:
    """A reserved record that pieces arrive in.

    Attributes:
        index: its number in the transaction.
        layout, memory, address: where its pieces go.
        end_tokens: length of the prefix at whose end it lies.
        missing: pieces that are neither there nor arriving, `[pieces]`.
        missing_count: how many.
        cost_us: what its SEAL said; None before.
        is_sealed: it is complete and framed.
    """

    index: int
    layout: RecordLayout
    memory: memoryview
    address: int
    end_tokens: int
    missing: npt.NDArray[np.bool_] = field(init=False)
    missing_count: int = field(init=False)
    cost_us: int | None = None
    is_sealed: bool = False

    def __post_init__(self) -> None:
        self.missing = np.ones(len(self.layout.pieces), bool)
        self.missing_count = len(self.missing)


@dataclass(frozen=True)
class Arriving:
    """Pieces of one target in one DATA frame."""

    record: int
    target: Target
    ids: Ids
    checksums: npt.NDArray[np.uint32]


class IncomingTransfer:
    """State of one transfer at its receiver. One session at a time works on it, under its own thread.

    Attributes:
        offer: what the sender announced.
        record_count: records that were offered.
        generation: of the present attachment; 0 while there is none.
        deadline: when it is given up for good.
        detached_s: since when no session is attached; None while one is.
    """

    def __init__(
        self, transfer: TransferId, offer: Offer, offered: tuple[OfferedRecord, ...], transaction: Transaction
    ) -> None:
        self.transfer = transfer
        self.offer = offer
        self.transaction = transaction
        self.generation = 0
        self.began_s = time.monotonic()
        self.deadline = Deadline(self.began_s + min(offer.total_deadline_ms / 1000, TRANSFER_DEADLINE_MAX_S))
        self.detached_s: float | None = self.began_s
        self.received_bytes = 0
        self.received_pieces = 0
        self.damaged_pieces = 0
        self.commit: Commit | None = None
        self.record_count = len(offered)
        numbers = {record.name: number for number, record in enumerate(offered)}
        self._targets = {
            numbers[record.name]: Target(
                index, record.layout, record.memory, address_of(record.memory), record.header.end_tokens
            )
            for index, record in enumerate(transaction.records)
        }
        self._again: set[tuple[int, int]] = set()

    @property
    def has_all(self) -> bool:
        """Whether nothing had to be reserved: every record was here already."""
        return not self._targets

    @property
    def largest_piece_bytes(self) -> int:
        return max((int(target.layout.piece_sizes.max()) for target in self._targets.values()), default=0)

    def missing_ranges(self) -> Rows:
        """What WANT names: the pieces that are not here."""
        return _ranges((record, np.flatnonzero(target.missing)) for record, target in sorted(self._targets.items()))

    # Pieces

    def arriving(self, rows: Rows, body_bytes: int | None) -> list[Arriving]:
        """Check a piece table against what is wanted, and take its pieces off the missing ones.

        Args:
            rows: the table.
            body_bytes: bytes that the frame carries; None if the pieces are exposed.

        Raises:
            ProtocolError: a piece that was not wanted, or of another size. Nothing is taken then.
        """
        records = rows["record"].astype(np.int64)
        if body_bytes is not None and int(rows["size_bytes"].sum(dtype=np.int64)) != body_bytes:
            raise ProtocolError(f"a DATA frame carries {body_bytes} bytes, its table says otherwise")
        arriving: list[Arriving] = []
        edges = [0, *(np.flatnonzero(np.diff(records)) + 1).tolist(), len(rows)]
        try:
            for start, stop in pairwise(edges):
                arriving.append(self._take(int(records[start]), rows[start:stop]))
        except ProtocolError:
            self.lost(arriving)
            raise
        return arriving

    def _take(self, record: int, rows: Rows) -> Arriving:
        target = self._targets.get(record)
        if target is None:
            raise ProtocolError(f"a DATA frame has pieces of record {record}, which was not wanted")
        ids = rows["piece"].astype(np.int64)
        if int(ids.max()) >= len(target.missing):
            raise ProtocolError(f"a DATA frame has piece {int(ids.max())} of record {record}, which has fewer")
        if not target.missing[ids].all() or len(np.unique(ids)) != len(ids):
            raise ProtocolError(f"a DATA frame has pieces of record {record} that had arrived before")
        if (rows["size_bytes"] != target.layout.piece_sizes[ids]).any():
            raise ProtocolError(f"a DATA frame has pieces of record {record} of another size than the spec says")
        target.missing[ids] = False
        target.missing_count -= len(ids)
        return Arriving(record, target, ids, rows["crc32c"].copy())

    def lost(self, arriving: Iterable[Arriving]) -> None:
        """These pieces did not arrive after all."""
        for part in arriving:
            part.target.missing[part.ids] = True
            part.target.missing_count += len(part.ids)

    def arrived(self, arriving: list[Arriving], computed: list[npt.NDArray[np.uint32]]) -> Rows | None:
        """Keep the pieces whose checksums hold; the ranges of the others, to be wanted again, or None.

        Raises:
            WriteError, StoreClosedError: the transaction has ended.
        """
        damaged: list[tuple[int, Ids]] = []
        for part, checksums in zip(arriving, computed, strict=True):
            good = checksums == part.checksums
            ids = part.ids
            if not good.all():
                bad = ids[~good]
                self.lost([Arriving(part.record, part.target, bad, part.checksums[~good])])
                self._again.update((part.record, piece) for piece in bad.tolist())
                self.damaged_pieces += len(bad)
                damaged.append((part.record, np.sort(bad)))
                ids = ids[good]
            layout = part.target.layout
            layout.checksums(part.target.memory)[ids] = part.checksums[good]
            self.received_pieces += len(ids)
            self.received_bytes += int(layout.piece_sizes[ids].sum())
            self._seal_if_complete(part.target)
        return _ranges(damaged) if damaged else None

    # Seals and the commit

    def seal(self, record: int, cost_us: int) -> None:
        """SEAL: the sender has sent every piece of a record.

        Raises:
            ProtocolError: no such record was offered.
        """
        if record >= self.record_count:
            raise ProtocolError(f"SEAL names record {record} of {self.record_count}")
        target = self._targets.get(record)
        if target is not None and not target.is_sealed:
            target.cost_us = cost_us
            self._seal_if_complete(target)

    def _seal_if_complete(self, target: Target) -> None:
        if target.missing_count == 0 and target.cost_us is not None and not target.is_sealed:
            self.transaction.seal(target.index, target.cost_us)
            target.is_sealed = True

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
        for record, target in self._targets.items():
            if target.is_sealed or target.end_tokens > commit.upto_tokens:
                continue
            missing = np.flatnonzero(target.missing).tolist()
            if not missing or any((record, piece) not in self._again for piece in missing):
                raise ProtocolError(f"COMMIT covers record {record}, which was not sent completely")
            return None
        return commit

    def committed(self) -> Committed:
        """The answer to the commit."""
        elapsed_us = round((time.monotonic() - self.began_s) * 1e6)
        return Committed(False, self.received_bytes, self.received_pieces, elapsed_us)


@dataclass
class Attached:
    """What one session knows of the transfer that it is attached to.

    Attributes:
        incoming: the transfer.
        generation: the attachment's number.
        window_bytes: piece bytes that may be in flight.
        granted_bytes: granted so far.
        consumed_bytes: received so far, damaged ones included.
        exposures: descriptor and size of each exposed record.
    """

    incoming: IncomingTransfer
    generation: int
    window_bytes: int
    granted_bytes: int
    consumed_bytes: int = 0
    exposures: dict[int, Exposure] = field(default_factory=dict)


def _ranges(parts: Iterable[tuple[int, Ids]]) -> Rows:
    rows = [(record, first, count) for record, ids in parts for first, count in id_ranges(ids)]
    return np.array(rows, WANT_RANGE) if rows else np.empty(0, WANT_RANGE)
