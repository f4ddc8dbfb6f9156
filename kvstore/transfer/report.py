"""What a transfer was like, and who may watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.transfer.frames import TransferId


@dataclass(frozen=True)
class TransferReport:
    """The result of a transfer that was committed. Times are of the sender's monotonic clock.

    Attributes:
        transfer: its id.
        peer_address: where it went.
        tokens: length of the prefix that is now there.
        bytes_by_group: piece bytes that were sent, by group name.
        pieces: pieces sent, those that were asked for again included.
        pieces_skipped: pieces that the receiver had already.
        pieces_again: pieces that arrived damaged and were sent again.
        reconnects: connections beyond the first.
        is_one_sided: the receiver got the bytes from exposed memory.
        is_native: native code sent the pieces, without the interpreter's lock.
        started_s: `send` was called.
        first_byte_s, last_byte_s: the first and the last DATA frame left; None if none was needed.
        producer_finished_s: every piece was there and committed on this side.
        committed_s: the receiver's COMMITTED arrived.
    """

    transfer: TransferId
    peer_address: str
    tokens: int
    bytes_by_group: Mapping[str, int]
    pieces: int
    pieces_skipped: int
    pieces_again: int
    reconnects: int
    is_one_sided: bool
    is_native: bool
    started_s: float
    first_byte_s: float | None
    last_byte_s: float | None
    producer_finished_s: float
    committed_s: float

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_group.values())

    @property
    def seconds(self) -> float:
        """From the call of `send` to the acknowledged commit."""
        return self.committed_s - self.started_s

    @property
    def exposed_s(self) -> float:
        """What the transfer added after the producer had finished."""
        return self.committed_s - max(self.producer_finished_s, self.started_s)


class TransferObserver:
    """Watches pieces pass; override what is of interest.

    Called from transfer threads, once per frame and layer: it must be quick and must not raise.
    """

    def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        """Bytes of a layer were handed to the transport between two monotonic times."""

    def piece_received(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
        """Bytes of a layer arrived and were verified between two monotonic times."""
