"""What is left to send of a transfer, and the DATA frames that it makes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c
from kvstore.errors import ProtocolError
from kvstore.limits import FRAME_PIECES_MAX
from kvstore.transfer.frames import FLAG_REMOTE, PIECE_ROW_BYTES, FrameHeader, Kind
from kvstore.transfer.messages import PIECE_ROW
from kvstore.transfer.pieces import contiguous_runs

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.messages import Rows
    from kvstore.transfer.source import SourceRecord

    Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DataFrame:
    """A DATA frame that is ready to leave.

    Attributes:
        header: its header.
        payload: the piece table, then views of the pieces unless they are exposed.
        parts: (record, piece ids) of what it carries.
        body_bytes: bytes of the pieces, exposed ones included.
    """

    header: FrameHeader
    payload: list[memoryview]
    parts: list[tuple[int, Ids]]
    body_bytes: int


class Outgoing:
    """Which pieces are whole, which the receiver wants, and which seals are due. Not thread-safe."""

    def __init__(self, records: tuple[SourceRecord, ...]) -> None:
        self.records = records
        self._whole = [np.zeros(len(record.layout.pieces), bool) for record in records]
        self._wanted = [np.zeros(len(record.layout.pieces), bool) for record in records]
        self._wanted_left = [0] * len(records)
        self._costs_us: dict[int, int] = {}
        self._unsealed: set[int] = set()
        self._due: set[int] = set()
        self._was_wanted: set[int] = set()
        self._ready: deque[int] = deque()
        self._is_ready = [False] * len(records)
        self._left = 0

    # What the source reports

    def pieces_whole(self, record: int, pieces: Ids) -> None:
        """Pieces may be sent from now on."""
        self._whole[record][pieces] = True
        self._enqueue(record)

    def record_sealed(self, record: int, cost_us: int) -> None:
        """All pieces of a record are whole."""
        self._costs_us[record] = cost_us
        self._check_due(record)

    # What the receiver says

    def want(self, ranges: Rows, *, is_again: bool) -> int:
        """Take over what the receiver lacks: in all, or (`is_again`) in addition; the number of pieces.

        Raises:
            ProtocolError: a record or piece that was not offered.
        """
        if not is_again:
            self._left = 0
            self._unsealed.clear()
            self._due.clear()
            self._wanted_left = [0] * len(self.records)
            for wanted in self._wanted:
                wanted[:] = False
        before = self._left
        touched: set[int] = set()
        for record, first, count in ranges.tolist():
            if record >= len(self.records) or not count or first + count > len(self._wanted[record]):
                raise ProtocolError(f"WANT names pieces {first} to {first + count} of record {record}, never offered")
            wanted = self._wanted[record][first : first + count]
            added = count - int(wanted.sum())
            self._left += added
            self._wanted_left[record] += added
            wanted[:] = True
            touched.add(record)
        self._was_wanted |= touched
        if not is_again:
            # A receiver may have all pieces of a record and yet have lost its SEAL with the connection.
            self._unsealed = set(self._was_wanted)
            for record in self._unsealed:
                self._check_due(record)
        for record in sorted(touched):
            self._enqueue(record)
        return self._left - before

    def _check_due(self, record: int) -> None:
        if record in self._unsealed and record in self._costs_us and not self._wanted_left[record]:
            self._due.add(record)

    def _enqueue(self, record: int) -> None:
        if not self._is_ready[record]:
            self._is_ready[record] = True
            self._ready.append(record)

    # What goes out

    @property
    def has_left(self) -> bool:
        """Whether wanted pieces or seals have not been sent, ready or not."""
        return self._left > 0 or bool(self._unsealed)

    def next_frame(
        self, transfer: TransferId, generation: int, bytes_max: int, credit_bytes: int, *, is_remote: bool
    ) -> DataFrame | None:
        """The next frame: at most `bytes_max` of pieces unless one is larger, and never above the credit.

        With `is_remote` the pieces of sealed records are named only. A record that is still being written is not
        for the peer to read, since its slot holds what was there before: its pieces are carried by the frame.
        """
        parts: list[tuple[int, Ids]] = []
        pieces = body_bytes = 0
        names_only = False
        room = min(bytes_max, credit_bytes)
        while self._ready and pieces < FRAME_PIECES_MAX:
            record = self._ready[0]
            is_exposable = is_remote and record in self._costs_us
            if parts and is_exposable != names_only:
                break
            names_only = is_exposable
            ids = np.flatnonzero(self._whole[record] & self._wanted[record])
            sizes = np.cumsum(self.records[record].layout.piece_sizes[ids])
            fitting = int(np.searchsorted(sizes, room - body_bytes, "right"))
            if not pieces and not fitting and len(ids) and int(sizes[0]) <= credit_bytes:
                fitting = 1
            fitting = min(fitting, FRAME_PIECES_MAX - pieces)
            if fitting:
                taken = ids[:fitting]
                self._wanted[record][taken] = False
                self._wanted_left[record] -= fitting
                self._check_due(record)
                parts.append((record, taken))
                pieces += fitting
                body_bytes += int(sizes[fitting - 1])
            if fitting < len(ids):
                break
            self._ready.popleft()
            self._is_ready[record] = False
        if not pieces:
            return None
        self._left -= pieces
        return self._frame(transfer, generation, parts, pieces, body_bytes, is_remote=names_only)

    def _frame(
        self,
        transfer: TransferId,
        generation: int,
        parts: list[tuple[int, Ids]],
        pieces: int,
        body_bytes: int,
        *,
        is_remote: bool,
    ) -> DataFrame:
        rows = np.empty(pieces, PIECE_ROW)
        start = 0
        for record, ids in parts:
            source = self.records[record]
            part = rows[start : start + len(ids)]
            part["record"] = record
            part["piece"] = ids
            part["size_bytes"] = source.layout.piece_sizes[ids]
            part["crc32c"] = source.checksums[ids]
            start += len(ids)
        table = rows.tobytes()
        carried = 0 if is_remote else body_bytes
        header = FrameHeader(
            Kind.DATA,
            transfer,
            generation,
            pieces * PIECE_ROW_BYTES + carried,
            pieces,
            crc32c(table),
            FLAG_REMOTE if is_remote else 0,
        )
        payload = [memoryview(table)]
        if not is_remote:
            payload.extend(self._views(parts))
        return DataFrame(header, payload, parts, body_bytes)

    def _views(self, parts: list[tuple[int, Ids]]) -> Iterator[memoryview]:
        for record, ids in parts:
            source = self.records[record]
            for start, stop in contiguous_runs(source.layout, ids):
                yield source.memory[start:stop]

    def next_seals(self, count_max: int) -> list[tuple[int, int]]:
        """(record, cost_us) of records whose wanted pieces have all been sent."""
        due = sorted(self._due)[:count_max]
        self._due.difference_update(due)
        self._unsealed.difference_update(due)
        return [(record, self._costs_us[record]) for record in due]
