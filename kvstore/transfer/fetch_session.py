"""The receiving end of a transfer that this side asked for, over connections that it opened."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import KVStoreError, PeerGoneError, ProtocolError
from kvstore.transfer.messages import Abort, AbortCode
from kvstore.transfer.offer import Offer, OfferFlag
from kvstore.transfer.session import Session
from kvstore.transfer.settings import JOIN_BYTES_MIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.pool import NodePath
    from kvstore.transfer.connector import Connector, GreetedLink, JoinedLink
    from kvstore.transfer.frames import FrameHeader, TransferId
    from kvstore.transfer.inbox import Inbox
    from kvstore.transfer.incoming import Attached, IncomingTransfer
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.report import TransferObserver

LOG = logging.getLogger("kvstore.transfer")


class FetchSession(Session):
    """Takes up the offer that answered FETCH, and no other one.

    Args:
        inbox: where transfers arrive.
        greeted: the connection.
        connector: opens further ones.
        path, salt: what was asked for.
        offer: the frame that answered.
        observer: told of each layer's bytes as they arrive.
        committed: called when the prefix is here, from any thread of the session; pieces may still be observed then.
        connections: over how many connections it may come.
        deadline: of the fetch; what the node says in its offer counts only if that is earlier.

    Attributes:
        refusal: why this side did not take the offer up.
        told: why the node gave the transfer up.
        incoming: what arrives, once it was taken up.
        has_lost_track: a further connection ended before the node had told its number.
    """

    def __init__(
        self,
        inbox: Inbox,
        greeted: GreetedLink,
        connector: Connector,
        path: NodePath,
        salt: bytes,
        offer: tuple[FrameHeader, memoryview],
        observer: TransferObserver | None,
        committed: Callable[[], None],
        *,
        connections: int,
        deadline: Deadline,
    ) -> None:
        super().__init__(inbox, greeted.link)
        self._committed = committed
        self.refusal: KVStoreError | None = None
        self.told: Abort | None = None
        self.incoming: IncomingTransfer | None = None
        self._greeted = greeted
        self._connector = connector
        self._path = path
        self._salt = salt
        self._first = offer
        self._observer = observer
        self._connections = connections
        self._deadline = deadline
        self.has_lost_track = False
        self._joiners: list[_Joiner] = []
        self._cancelled: str | None = None

    @property
    def transfer(self) -> TransferId:
        """The node's name for the transfer."""
        return self._first[0].transfer

    def call_off(self, reason: str) -> None:
        """Give the transfer up, and tell the node. Any thread."""
        self._cancelled = reason
        self._inbox.give_up(self.transfer, Abort(AbortCode.CANCELLED, reason))
        # Whoever is at work on pieces holds the lock, and finds the transaction ended with the next of them.
        if self._lock.acquire(blocking=False):
            try:
                self._give_up(AbortCode.CANCELLED, reason)
            finally:
                self._lock.release()

    def close(self) -> None:
        super().close()
        for joiner in self._joiners:
            joiner.close()

    def _begin(self) -> None:
        assert self._greeted is not None
        self._peer = self._greeted.theirs
        self._is_one_sided = self._greeted.is_one_sided
        header, payload = self._first
        if header.transfer.epoch != self._peer.boot_epoch:
            raise ProtocolError(f"OFFER names transfer {header.transfer}, which another node began")
        self._offer(header, payload)
        if self._cancelled is not None:
            self._give_up(AbortCode.CANCELLED, self._cancelled)  # It came before there was anything to give up.
        if self._attached is not None:
            self._branch_out(self._attached)

    def _attach(self, transfer: TransferId, offer: Offer) -> IncomingTransfer:
        try:
            self._check_asked(offer)
            self.incoming = incoming = super()._attach(transfer, offer)
            incoming.deadline = incoming.deadline.earlier(self._deadline)
            return incoming
        except KVStoreError as error:
            self.refusal = error
            raise

    def _check_asked(self, offer: Offer) -> None:
        """A node that is asked for one prefix may bring nothing else."""
        if offer.path != self._path or offer.salt != self._salt:
            raise ProtocolError("OFFER is of another prefix than FETCH asked for")
        if offer.resume_tokens != (self._path.tokens,) or offer.flags != OfferFlag.COMPLETE:
            raise ProtocolError("OFFER after FETCH is of one resume point that is complete, and no hand-over")

    def _branch_out(self, attached: Attached) -> None:
        """Open further connections if that pays; the node sends over them what it has not sent over this one."""
        assert self._greeted is not None
        if not self._greeted.may_join or attached.incoming.missing_bytes < JOIN_BYTES_MIN:
            return
        # From here on the node may send over connections that this side is about to take up, and then COMMIT.
        attached.incoming.is_joined = True
        for _ in range(self._connections - 1):
            joiner = _Joiner(self._inbox, self, self._connector, attached, self._observer)
            self._joiners.append(joiner)
            joiner.start()

    def lose_track(self, attached: Attached) -> None:
        """A further connection ended, and nobody here knows its number, so LOST cannot name what was on it.

        The node may have sent something over it. Only another attachment says what is missing.
        """
        if self.is_attached(attached) and not self._is_over.is_set():
            self.has_lost_track = True
            self.close()

    def _aborted_by_peer(self, header: FrameHeader, abort: Abort) -> None:
        if header.transfer == self.transfer:
            self.told = abort
        super()._aborted_by_peer(header, abort)

    def _commit_when_complete(self, attached: Attached) -> None:
        was_attached = self._attached is not None
        super()._commit_when_complete(attached)
        if was_attached and self._attached is None:
            self._drain()  # The node closes the connection now; one that does not is not waited for.
            self._committed()


class _Joiner:
    """Opens one further connection and receives over it, in a thread that ends with the attachment."""

    def __init__(
        self,
        inbox: Inbox,
        primary: FetchSession,
        connector: Connector,
        attached: Attached,
        observer: TransferObserver | None,
    ) -> None:
        self._inbox = inbox
        self._primary = primary
        self._connector = connector
        self._attached = attached
        self._observer = observer
        self._lock = threading.Lock()
        self._link: FrameLink | None = None
        self._is_closed = False
        name = f"kvstore-fetch-{attached.incoming.transfer.counter}-branch"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Without a thread for it, the first connection brings all."""
        try:
            self._thread.start()
        except RuntimeError as error:
            LOG.warning("transfer %s goes on over one connection: %s", self._attached.incoming.transfer, error)

    def close(self) -> None:
        """End the connection and with it the thread, soon. Idempotent."""
        with self._lock:
            self._is_closed = True
            link = self._link
        if link is not None:
            link.close()

    def _opened(self, link: FrameLink) -> None:
        with self._lock:
            self._link = link
            if self._is_closed:
                raise PeerGoneError("the attachment that a connection was for has ended")

    def _run(self) -> None:
        incoming = self._attached.incoming
        deadline = Deadline.after(self._inbox.settings.connect_deadline_s).earlier(incoming.deadline)
        try:
            joined = self._connector.join(
                incoming.transfer, self._attached.generation, self._primary.progress_deadline_s, deadline, self._opened
            )
            if joined is not None:
                _JoinedSession(self._inbox, self._primary, self._attached, joined, self._observer).run()
        except KVStoreError as error:
            LOG.debug("a further connection of transfer %s ended: %s", incoming.transfer, error)
            if self._link is not None:
                self._primary.lose_track(self._attached)
        finally:
            self.close()


class _JoinedSession(Session):
    """Receives over one further connection."""

    def __init__(
        self,
        inbox: Inbox,
        primary: FetchSession,
        attached: Attached,
        joined: JoinedLink,
        observer: TransferObserver | None,
    ) -> None:
        super().__init__(inbox, joined.greeted.link)
        self._primary = primary
        self._to = attached
        self._number = joined.number
        self._observer = observer

    def _begin(self) -> None:
        incoming = self._to.incoming
        self._joined = self._primary.admit(self, incoming.transfer, self._to.generation, self._number)
        if self._joined is None:
            raise PeerGoneError("the attachment that a connection was for has ended")
