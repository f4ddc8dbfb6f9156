"""What transfers are under way, as values."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.transfer.frames import TransferId


class TransferState(enum.StrEnum):
    """What a transfer is doing; at both sides."""

    CONNECTING = "connecting"
    """The sender reaches for its receiver, for the first time or again."""
    WAITING_FOR_SPACE = "waiting for space"
    """The receiver has the offer and has not answered."""
    MOVING = "moving"
    """Pieces cross, or wait to be computed."""
    DETACHED = "detached"
    """At the receiver: the connection has broken, and nobody has resumed it."""
    COMMITTING = "committing"
    """Everything was sent; the last of it is verified."""


@dataclass(frozen=True)
class OutgoingSnapshot:
    """A transfer that this node sends.

    Attributes:
        transfer: its id.
        peer_address: where it goes.
        priority: 0 (first) to 255.
        state: what it is doing.
        sent_bytes: piece bytes that need not be sent any more: handed to the transport, or there already.
        total_bytes: of all pieces that were offered.
        began_s: when `send` was called, by the monotonic clock.
        prompt_tokens: length of the prefix.
    """

    transfer: TransferId
    peer_address: str
    priority: int
    state: TransferState
    sent_bytes: int
    total_bytes: int
    began_s: float
    prompt_tokens: int
