"""What a transfer was like, and who may watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.transfer.frames import TransferId


@dataclass(frozen=True)
class PathReport:
    """How a transfer used its path, and why so.

    Attributes:
        connections: the most that were open at once.
        congestion_control: names of the algorithms that its connections used; () where the transport cannot tell.
        why: what was chosen, and what for.
        round_trip_s: smallest round-trip time; None where the transport cannot tell.
        retransmitted_share: bytes sent again lately, of all sent to this peer; None where the transport cannot tell.
        limits: what held it back besides the network, each with the remedy.
    """

    connections: int = 1
    congestion_control: tuple[str, ...] = ()
    why: str = ""
    round_trip_s: float | None = None
    retransmitted_share: float | None = None
    limits: tuple[str, ...] = ()


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
        path: connections and congestion control, and why these.
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
    path: PathReport = PathReport()

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_by_group.values())

    @property
    def seconds(self) -> float:
        """From the call of `send` to the acknowledged commit."""
        return self.committed_s - self.started_s

    @property
    def sent_bytes_per_s(self) -> float | None:
        """How fast the bytes left, from the first to the last; None if that took no time."""
        if self.first_byte_s is None or self.last_byte_s is None or self.last_byte_s <= self.first_byte_s:
            return None
        return self.total_bytes / (self.last_byte_s - self.first_byte_s)

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
