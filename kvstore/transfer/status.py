"""What a node is receiving now, as values for people and monitors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.transfer.snapshots import TransferState

if TYPE_CHECKING:
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.incoming import IncomingTransfer


@dataclass(frozen=True)
class IncomingStatus:
    """One transfer at its receiver, at one moment.

    Attributes:
        transfer: its id.
        peer_address: of the connection that brought or resumed it last.
        tokens: length of the prefix that was offered.
        state: what it is doing.
        offered_bytes: piece bytes of the offer, those that were here already included.
        expected_bytes: of the pieces that this node lacked; all that were offered, before that is known.
        received_bytes: piece bytes that have arrived undamaged.
        priority: the sender's; 0 goes first.
        age_s: since the first offer.
        remaining_s: until its total deadline, or until an offer that waits is answered.
        is_attached: whether a connection carries it; otherwise it waits to be resumed.
    """

    transfer: TransferId
    peer_address: str
    tokens: int
    state: TransferState
    offered_bytes: int
    expected_bytes: int
    received_bytes: int
    priority: int
    age_s: float
    remaining_s: float
    is_attached: bool

    @classmethod
    def of(cls, incoming: IncomingTransfer, *, is_attached: bool) -> IncomingStatus:
        offer = incoming.offer
        state = TransferState.MOVING if incoming.commit is None else TransferState.COMMITTING
        return cls(
            transfer=incoming.transfer,
            peer_address=incoming.peer_address,
            tokens=offer.path.tokens,
            state=state if is_attached else TransferState.DETACHED,
            offered_bytes=offer.total_bytes,
            expected_bytes=incoming.expected_bytes,
            received_bytes=incoming.received_bytes,
            priority=offer.priority,
            age_s=time.monotonic() - incoming.began_s,
            remaining_s=incoming.deadline.remaining_s(),
            is_attached=is_attached,
        )
