"""Calls of the native data path: what its loops come back with, by name."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvstore._native import receive_pieces
from kvstore.transfer.messages import PIECE_ROW

if TYPE_CHECKING:
    from kvstore._native import StopFlag, Stream
    from kvstore.transfer.incoming import IncomingTransfer
    from kvstore.transfer.messages import Rows

LINGER_S = 0.02
"""How long native code waits for the next frame. Slots of a transfer that ends meanwhile stay quarantined as long."""
SEND_S = 0.05
"""How long native code goes on sending before Python looks for a dead peer, a cancel or anything else."""


class Arrival(enum.IntEnum):
    """Why `receive_pieces` came back. The numbers are those of `csrc/net/receive_pieces.h`."""

    IDLE = 0
    STOPPED = 1
    CONTROL = 2
    """A frame that is not DATA of this attachment: its header was received, its payload was not."""
    PROGRESS = 3
    """Pieces arrived damaged, records became complete, or each frame is to be seen."""
    REFUSED = 4
    OVERDUE = 5


class Received(NamedTuple):
    """What happened on a connection.

    Attributes:
        event: why there is something to tell.
        header: 64 bytes, with CONTROL.
        reason: which rule was broken, with REFUSED.
        unread_bytes: of the frame, with REFUSED and OVERDUE.
        settled: damaged rows, and records that became complete, with PROGRESS.
        rows: the pieces of the frame, with PROGRESS where that was asked for.
    """

    event: Arrival
    header: bytes
    reason: str
    unread_bytes: int
    settled: tuple[bytes, list[int]]
    rows: Rows


def receive(
    stream: Stream,
    control: Stream,
    incoming: IncomingTransfer,
    generation: int,
    stop: StopFlag,
    *,
    is_observed: bool,
) -> Received:
    """Receive pieces into their records until there is something to tell; CREDIT leaves on `control`.

    Raises:
        StoreClosedError, WriteError: the transaction has ended; nothing was received.
        PeerGoneError, ProtocolError, PeerMismatchError, TransportError: the stream is over.
    """
    with incoming.transaction.moving():
        event, header, reason, unread_bytes, settled, rows = receive_pieces(
            stream,
            control,
            incoming.arrivals,
            incoming.transfer.epoch,
            incoming.transfer.counter,
            generation,
            incoming.deadline.at_s,
            LINGER_S,
            is_observed,
            stop,
        )
    return Received(Arrival(event), header, reason, unread_bytes, settled, np.frombuffer(rows, PIECE_ROW))
