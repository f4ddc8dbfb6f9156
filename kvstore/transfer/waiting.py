"""The line of offers that wait for space or for a place among a node's transfers."""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from kvstore.transfer.snapshots import TransferState
from kvstore.transfer.status import IncomingStatus

if TYPE_CHECKING:
    from kvstore.clock import Deadline
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.offer import Offer


@dataclass(eq=False)
class Waiting:
    """An offer in the line.

    Attributes:
        transfer, offer, peer_address: what it is.
        deadline: when it is answered whatever there is.
        arrival: counts offers.
        cancelled: why it is given up, once it is.
        is_ousted: it was the last one of a full line, and a more urgent one came.
    """

    transfer: TransferId
    offer: Offer
    peer_address: str
    deadline: Deadline
    arrival: int
    began_s: float = field(default_factory=time.monotonic)
    cancelled: str | None = None
    is_ousted: bool = False
    tried_at: int = -1

    @property
    def place(self) -> tuple[int, int]:
        """Smaller ones go first: by priority, then by arrival."""
        return self.offer.priority, self.arrival

    def status(self) -> IncomingStatus:
        return IncomingStatus(
            transfer=self.transfer,
            peer_address=self.peer_address,
            tokens=self.offer.path.tokens,
            state=TransferState.WAITING_FOR_SPACE,
            offered_bytes=self.offer.total_bytes,
            expected_bytes=self.offer.total_bytes,
            received_bytes=0,
            priority=self.offer.priority,
            age_s=time.monotonic() - self.began_s,
            remaining_s=self.deadline.remaining_s(),
            is_attached=True,
        )


class WaitingLine:
    """Who may try to reserve next: one at a time, the most urgent first, then who came first.

    Each tries once for each change of the space. An offer that does not fit lets later ones of its own priority
    try, and no less urgent ones, until its deadline; what has waited until its own deadline tries a last time
    whoever else waits, so that nothing starves. The caller guards all of it by one lock.
    """

    def __init__(self, waiting_max: int) -> None:
        self._waiting_max = waiting_max
        self._line: list[Waiting] = []
        self._arrivals = count(1)
        self._changes = 0
        self._changed_s = time.monotonic()
        self._trying: Waiting | None = None

    def __len__(self) -> int:
        return len(self._line)

    def find(self, transfer: TransferId) -> Waiting | None:
        return next((waiting for waiting in self._line if waiting.transfer == transfer), None)

    def count_of_peer(self, epoch: int) -> int:
        """Offers that wait, of one peer."""
        return sum(waiting.transfer.epoch == epoch for waiting in self._line)

    def statuses(self) -> list[IncomingStatus]:
        """What waits, in the order of its turns."""
        return [waiting.status() for waiting in self._line]

    def join(self, transfer: TransferId, offer: Offer, peer_address: str, deadline: Deadline) -> Waiting | None:
        """A place in the line; None if it is full of offers that are as urgent or more."""
        waiting = Waiting(transfer, offer, peer_address, deadline, next(self._arrivals))
        insort(self._line, waiting, key=lambda other: other.place)
        if len(self._line) > self._waiting_max:
            last = self._line[-1] if self._line[-1] is not self._trying else self._line[-2]
            self._line.remove(last)
            if last is waiting:
                return None
            last.is_ousted = True
        return waiting

    def leave(self, waiting: Waiting) -> None:
        """It has what it waited for, or gives up."""
        self.end_try(waiting)
        if waiting in self._line:
            self._line.remove(waiting)

    def note_change(self) -> None:
        """There may be more space, or a place."""
        self._changes += 1
        self._changed_s = time.monotonic()

    def note_time(self, look_s: float) -> None:
        """Everybody may try anew if nothing was heard of for so long."""
        if time.monotonic() >= self._changed_s + look_s:
            self.note_change()

    def begin_try(self, waiting: Waiting) -> bool:
        """Whether it is this one's turn; `end_try` must follow then."""
        if self._trying is not None:
            return False
        if not waiting.deadline.has_passed:
            untried = next((other for other in self._line if other.tried_at != self._changes), None)
            if untried is not waiting or waiting.offer.priority != self._line[0].offer.priority:
                return False
        waiting.tried_at = self._changes
        self._trying = waiting
        return True

    def end_try(self, waiting: Waiting) -> None:
        if self._trying is waiting:
            self._trying = None
