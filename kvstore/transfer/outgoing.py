"""What is left to send of a transfer, and the DATA frames that it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import Departures, crc32c
from kvstore.transfer.frames import FLAG_REMOTE, PIECE_ROW_BYTES, FrameHeader, Kind
from kvstore.transfer.messages import PIECE_ROW, SEAL_ROW, WANT_RANGE
from kvstore.transfer.pieces import contiguous_runs, piece_layout, split_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.messages import Rows
    from kvstore.transfer.source import Costs, Source

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
    """Which pieces are whole, which the receiver wants, and which seals are due. Any thread.

    Attributes:
        source: what is sent; its memory stays in place as long as frames are taken.
        departures: the state itself, which native code takes its frames from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        table = source.table
        layouts = [piece_layout(layout) for layout in table.layouts]
        self.departures = Departures(layouts, table.layout_numbers.astype(np.uint32), source.addresses)

    def resume(self) -> None:
        """Take it that another run of this transfer was asked for anything, so that every record is sealed anew.

        Call before the receiver's answer is taken over.
        """
        table = self.source.table
        every = np.zeros(len(table.layout_numbers), WANT_RANGE)
        every["record"] = np.arange(len(every))
        every["count"] = table.by_layout(len(layout.pieces) for layout in table.layouts)
        self.want(every, granted_bytes=0, is_again=False)

    # What the source reports

    def pieces_whole(self, record: int, pieces: Ids) -> None:
        """Pieces may be sent from now on."""
        self.departures.pieces_whole(record, np.ascontiguousarray(pieces, np.uint32))

    def record_sealed(self, record: int, cost_us: int) -> None:
        """All pieces of a record are whole."""
        self.departures.record_sealed(record, cost_us)

    def records_complete(self, first: int, costs_us: Costs) -> None:
        """Records `first` and on are whole and sealed, at these costs."""
        self.departures.records_complete(first, np.ascontiguousarray(costs_us, np.uint64))

    # What the receiver says

    def want(self, ranges: Rows, *, granted_bytes: int, is_again: bool) -> int:
        """Take over what the receiver lacks: in all, or (`is_again`) in addition; the number of pieces.

        Raises:
            ProtocolError: a record or piece that was not offered.
        """
        pieces = self.departures.want(np.ascontiguousarray(ranges), is_again)
        self.grant(granted_bytes)
        return pieces

    def grant(self, granted_bytes: int) -> None:
        """Piece bytes that may be sent since the last `want` that was not `is_again`; only grows."""
        self.departures.grant(granted_bytes)

    # What goes out

    @property
    def has_left(self) -> bool:
        """Whether wanted pieces or seals have not been sent, ready or not."""
        return self.departures.has_left

    def next_frame(self, transfer: TransferId, generation: int, bytes_max: int, *, is_remote: bool) -> DataFrame | None:
        """The next frame: at most `bytes_max` of pieces unless one is larger, and never above the credit.

        With `is_remote` the pieces of sealed records are named only. A record that is still being written is not
        for the peer to read, since its slot holds what was there before: its pieces are carried by the frame.
        """
        table, body_bytes, names_only = self.departures.take(bytes_max, is_remote)
        if not table:
            return None
        parts = split_rows(np.frombuffer(table, PIECE_ROW))
        header = FrameHeader(
            Kind.DATA,
            transfer,
            generation,
            len(table) + (0 if names_only else body_bytes),
            len(table) // PIECE_ROW_BYTES,
            crc32c(table),
            FLAG_REMOTE if names_only else 0,
        )
        payload = [memoryview(table)]
        if not names_only:
            payload.extend(self._views(parts))
        return DataFrame(header, payload, parts, body_bytes)

    def _views(self, parts: list[tuple[int, Ids]]) -> Iterator[memoryview]:
        for record, ids in parts:
            source = self.source.records[record]
            for start, stop in contiguous_runs(source.layout, ids):
                yield source.memory[start:stop]

    def sent(self, frame: DataFrame) -> None:
        """A frame has left."""
        self.departures.sent(frame.payload[0])

    def unsent(self, frame: DataFrame) -> None:
        """A frame did not leave."""
        self.departures.unsent(frame.payload[0])

    def next_seals(self, count_max: int) -> Rows:
        """Rows of SEAL, of records whose wanted pieces have all been sent."""
        return np.frombuffer(self.departures.next_seals(count_max), SEAL_ROW)

    def bytes_of(self, ranges: Rows) -> int:
        """Bytes of pieces that the receiver has named, all of which were offered."""
        table = self.source.table
        total = 0
        for number, layout in enumerate(table.layouts):
            chosen = ranges[table.layout_numbers[ranges["record"]] == number]
            ends = np.concatenate(([0], np.cumsum(layout.piece_sizes)))
            first = chosen["first"].astype(np.int64)
            total += int((ends[first + chosen["count"]] - ends[first]).sum())
        return total

    # What has gone out

    @property
    def pieces_sent(self) -> int:
        return self.departures.pieces_sent

    def bytes_by_group(self) -> dict[str, int]:
        """Piece bytes that were sent, by the name of the record's group; groups without any are left out."""
        table = self.source.table
        sent = np.frombuffer(self.departures.bytes_sent_by_record(), np.uint64)
        totals: dict[str, int] = {}
        for number, layout in enumerate(table.layouts):
            if size_bytes := int(sent[table.layout_numbers == number].sum()):
                totals[layout.group.name] = totals.get(layout.group.name, 0) + size_bytes
        return totals
