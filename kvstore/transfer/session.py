"""One connection at its receiving end."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import StopFlag
from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    KVStoreError,
    PeerGoneError,
    PoolError,
    ProtocolError,
    StoreClosedError,
    WriteError,
)
from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX, TRANSFER_DEADLINE_MAX_S
from kvstore.transfer.arrival import get_pieces, receive_pieces
from kvstore.transfer.connector import GreetedLink
from kvstore.transfer.frames import FLAG_REMOTE, MATCH_KINDS, NO_TRANSFER, Kind, parse_header
from kvstore.transfer.greeting import (
    check_hello,
    check_may_offer,
    make_hello,
    may_join,
    may_match,
    may_rejoin,
    uses_get,
)
from kvstore.transfer.guest import LEND_SLACK_S, Guest, Joining
from kvstore.transfer.inbox import OfferRefusedError
from kvstore.transfer.incoming import Attached, IncomingTransfer
from kvstore.transfer.joined import Joined
from kvstore.transfer.messages import (
    Abort,
    AbortCode,
    Commit,
    Committed,
    Credit,
    Expose,
    Hello,
    Lost,
    Seal,
    Want,
    WantStatus,
    parse_piece_table,
)
from kvstore.transfer.native import Arrival, Received, receive
from kvstore.transfer.offer import Offer
from kvstore.transfer.pieces import observe_layers
from kvstore.transfer.settings import KEEPALIVE_FRACTION

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.transfer.frames import FrameHeader, TransferId
    from kvstore.transfer.inbox import Inbox
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.messages import Rows
    from kvstore.transfer.report import TransferObserver
    from kvstore.transfer.serving import Serving

LOG = logging.getLogger("kvstore.transfer")
DRAIN_DEADLINE_S = 1.0
"""How long a session that has sent ABORT reads on, so that closing does not destroy what the peer has not read."""
SCRATCH_BYTES = 64 << 10


class Session:
    """Serves one connection until it ends. `run` belongs to the session's own thread.

    Args:
        inbox: what arrives at this node.
        link: the connection.
        serving: answers questions; None for a node that answers none.
    """

    def __init__(self, inbox: Inbox, link: FrameLink, serving: Serving | None = None) -> None:
        self._inbox = inbox
        self._settings = inbox.settings
        self._observer: TransferObserver | None = inbox.observer
        self._link = link
        self._serving = serving
        self._guest = None if serving is None else Guest(serving, link)
        self._lent: Joining | None = None
        self._greeted: GreetedLink | None = None
        self._peer: Hello | None = None
        self._is_one_sided = False
        self._attached: Attached | None = None
        self._offered: TransferId | None = None
        """What is being taken up, or refused."""
        self._is_over = threading.Event()
        self._stop = StopFlag()
        self._joined: Joined | None = None
        self._joining: list[Session] = []
        self._joined_count = 0
        self._may_rejoin = False
        self._lock = threading.RLock()
        """Held while something is done for the transfer, which further connections do, too."""
        self._drain_until: Deadline | None = None
        self._unread_bytes = 0
        self.ended = threading.Event()
        """Set once the session will not touch its transfer again."""

    def __repr__(self) -> str:
        attached = self._attached
        return f"Session({self._link.peer_address}, {attached.incoming.transfer if attached else 'no transfer'})"

    def run(self) -> None:
        """Serve the peer; every error ends the connection, and none leaves this method."""
        try:
            self._begin()
            while self._joined is not None:
                hello = self._joined.serve(self._link, self._stop, is_observed=self._observer is not None)
                if hello is None:
                    return
                self._greet(hello)
            if self._lent is not None and self._greeted is not None:
                self._lent.lend(self._greeted, TRANSFER_DEADLINE_MAX_S + LEND_SLACK_S)
                return
            while not self._is_over.is_set():
                header = self._next_header()
                if header is None:
                    continue
                if self._drain_until is None:
                    self._unread_bytes = 0
                    self._serve(header)
                elif header.kind is Kind.ABORTED:
                    break
                else:
                    self._discard(header.payload_bytes)
        except (PeerGoneError, DeadlineError) as error:
            LOG.debug("connection from %s ended: %s", self._link.peer_address, error)
        except KVStoreError as error:
            # Nothing that follows on this connection can be trusted. The transfer may be resumed over another.
            self._inbox.refused(self._link.peer_address, error)
        except Exception:
            # A fault of this node, not of the peer, which sees a broken connection.
            LOG.exception("the connection from %s ended by an error that nobody expected", self._link.peer_address)
        finally:
            self.close()
            if self._lent is not None:
                self._lent.withdraw()
            if self._joined is not None:
                self._joined.primary.dismiss(self, self._joined)
            self._end_joining(is_waiting=True)
            self._detach()
            self.ended.set()

    @property
    def frames_arrived(self) -> int:
        """DATA frames that have arrived whole, of all attachments."""
        return 0 if self._link.native is None else self._link.native.frames_arrived

    @property
    def may_rejoin(self) -> bool:
        """Whether this further connection may serve another attachment after its own."""
        return self._may_rejoin

    @property
    def progress_deadline_s(self) -> float:
        """The longest silence that both sides bear."""
        return self._link.progress_deadline_s

    @property
    def peer_address(self) -> str:
        return self._link.peer_address

    def settle(self, deadline: Deadline) -> None:
        """Wait until what is being done for a transfer has been done, its answer to the peer included. Any thread."""
        if self._lock.acquire(timeout=deadline.remaining_s()):
            self._lock.release()

    def close(self) -> None:
        """End the connection; `run` then returns soon. Any thread."""
        self._is_over.set()
        self._link.close()

    def abort(self, reason: str) -> None:
        """Tell the peer that this node gives its transfer up, then end the connection. Any thread."""
        transfer = self._offered  # looked at first: once it is none, what was taken up is attached
        attached = self._attached
        if attached is not None:
            transfer = attached.incoming.transfer
        if transfer is None:
            self.close()
            return
        self._drain()
        self._send_quietly(Kind.ABORT, transfer, Abort(AbortCode.CLOSING, reason).pack())

    def cancel(self, transfer: TransferId, abort: Abort) -> bool:
        """Give up the transfer that is attached here. False if it is another one, or none any more. Any thread."""
        if not self._lock.acquire(timeout=self._link.progress_deadline_s):
            self.close()  # In the middle of a frame that hardly comes.
            return False
        try:
            attached = self._attached
            if attached is None or attached.incoming.transfer != transfer:
                return False
            self._part()
        finally:
            self._lock.release()
        self._say_given_up(attached, abort)
        return True

    # Greeting

    def _begin(self) -> None:
        """Agree with the peer on what is spoken here."""
        self._greet(self._link.receive_header(Deadline.after(self._settings.connect_deadline_s)))

    def _greet(self, header: FrameHeader) -> None:
        """Answer the first frame, or the HELLO with which a further connection begins to serve another attachment."""
        if header.kind is not Kind.HELLO:
            raise ProtocolError(f"the first frame is {header.kind.name} instead of HELLO")
        theirs = Hello.parse(self._link.receive_payload(header))
        can_join = self._link.native is not None
        ours = make_hello(
            self._inbox.spec, self._inbox.boot_epoch, self._settings, self._link.connection, can_join=can_join
        )
        self._may_rejoin = may_rejoin(ours, theirs)
        self._joined = None
        number = 0
        if header.transfer != NO_TRANSFER and may_join(ours, theirs):
            number = self._place(header, theirs)
        # The answer goes out even if they do not match: the other side names both values, too.
        self._link.send(Kind.HELLO, header.transfer, number, ours.pack())
        check_hello(ours, theirs, self._link.peer_address)
        self._peer = theirs
        self._greeted = GreetedLink(self._link, ours, theirs)
        self._link.progress_deadline_s = min(self._settings.progress_deadline_s, theirs.progress_deadline_ms / 1000)
        self._is_one_sided = uses_get(ours, theirs)

    def _place(self, header: FrameHeader, theirs: Hello) -> int:
        """The number of a further connection within its attachment; 0 if it is not taken."""
        if header.transfer.epoch == theirs.boot_epoch:
            self._joined = self._inbox.join(self, header.transfer, header.generation)
            return 0 if self._joined is None else self._joined.number
        if self._serving is not None and header.transfer.epoch == self._inbox.boot_epoch:
            self._lent = Joining.admit(self._serving, header, theirs.boot_epoch)
        return 0 if self._lent is None else self._lent.number

    # Further connections. They belong to the session of the first one, until its attachment ends.

    def admit(
        self, session: Session, transfer: TransferId, generation: int, number: int | None = None
    ) -> Joined | None:
        """Another connection wants to carry pieces of the transfer that is attached here. From its own thread.

        Args:
            number: of the connection, where the sender has given it one.
        """
        with self._lock:
            attached, control = self._attached, self._link.native
            if (
                control is None
                or attached is None
                or (attached.incoming.transfer, attached.generation) != (transfer, generation)
                or self._is_over.is_set()
                or len(self._joining) + 1 >= CONNECTIONS_PER_TRANSFER_MAX
            ):
                return None
            self._joined_count += 1
            self._joining.append(session)
            attached.incoming.is_joined = True
            taken = self._joined_count if number is None else number
            return Joined(self, control, attached, taken, session.frames_arrived)

    def is_attached(self, attached: Attached) -> bool:
        """Whether an attachment is still at work here. Any thread."""
        return self._attached is attached and self._drain_until is None

    def follow_up(self, received: Received, attached: Attached, start_s: float) -> None:
        """Do for the transfer what a further connection came back with. From its thread."""
        with self._lock:
            if self.is_attached(attached):
                self._guard(attached, lambda: self._received(received, attached, start_s))
            else:
                # The pieces were the last ones, and the first connection's thread was faster with the rest.
                self._observe(received.rows, attached, start_s)

    def dismiss(self, session: Session, joined: Joined) -> None:
        """A further connection has ended; the sender is told what of it has arrived. From its thread."""
        with self._lock:
            if session in self._joining:
                self._joining.remove(session)
            if not self.is_attached(joined.attached) or self._is_over.is_set():
                return
            lost = Lost(joined.number, session.frames_arrived - joined.frames_before)
            transfer, generation = joined.attached.incoming.transfer, joined.attached.generation
            try:
                self._link.send(Kind.LOST, transfer, generation, lost.pack())
            except (PeerGoneError, OSError) as error:
                LOG.debug("%s did not hear of a lost connection: %s", self._link.peer_address, error)

    def _end_joining(self, *, is_waiting: bool) -> None:
        """End what has joined this session; one attachment's further connections never outlive it."""
        with self._lock:
            joining = list(self._joining)
        for session in joining:
            session.close()
        if is_waiting:
            deadline = Deadline.after(self._link.progress_deadline_s)
            for session in joining:
                session.ended.wait(deadline.remaining_s())

    def _release_joining(self) -> None:
        """The attachment was committed: what had joined it may join another one, where the peer can do that."""
        with self._lock:
            self._joining = [session for session in self._joining if not session.may_rejoin]
        self._end_joining(is_waiting=False)

    def _next_deadline(self) -> Deadline:
        if self._drain_until is not None:
            return self._drain_until
        silence = Deadline(self._link.last_received_s + self._link.progress_deadline_s)
        return silence if self._attached is None else silence.earlier(self._attached.incoming.deadline)

    # Frames

    def _next_header(self) -> FrameHeader | None:
        """The next frame that Python has to look at; None if native code has taken care of some."""
        attached, stream = self._attached, self._link.native
        if attached is None or stream is None or self._drain_until is not None:
            return self._link.receive_header(self._next_deadline())
        # Waiting happens here and not below, where a transaction that ends would have to wait for it.
        if not stream.wait_readable(self._next_deadline().at_s):
            raise DeadlineError(f"{self._link.peer_address} was silent for {self._link.progress_deadline_s:g} s")
        start_s = time.monotonic()
        is_observed = self._observer is not None
        try:
            received = receive(
                stream, stream, attached.incoming, attached.generation, self._stop, is_observed=is_observed
            )
        except (WriteError, StoreClosedError) as error:
            self._give_up(AbortCode.CLOSING, str(error))
            return None
        if received.event is Arrival.CONTROL:
            return parse_header(received.header)
        self._guard(attached, lambda: self._received(received, attached, start_s))
        self._discard(received.unread_bytes)
        return None

    def _received(self, received: Received, attached: Attached, start_s: float) -> None:
        """Follow up on what native code came back with."""
        if received.event is Arrival.REFUSED:
            raise ProtocolError(received.reason)
        if received.event is Arrival.OVERDUE:
            attached.incoming.deadline.check("the transfer's end")
        elif received.event is Arrival.PROGRESS:
            damaged = attached.incoming.settled(*received.settled)
            self._observe(received.rows, attached, start_s)
            if damaged is not None:
                self._want_again(attached, damaged)

    def _guard(self, attached: Attached, work: Callable[[], None]) -> None:
        """Do something for a transfer, commit if that was what it waited for, or give it up by name."""
        try:
            with self._lock:
                work()
                self._commit_when_complete(attached)
        except (WriteError, StoreClosedError) as error:
            # The transaction ended under the transfer: the store is closing, or a deadline has passed.
            self._give_up(AbortCode.CLOSING, str(error))
        except ProtocolError as error:
            self._inbox.refused(self._link.peer_address, error)
            self._give_up(AbortCode.INVALID, str(error))
        except DeadlineError:
            self._give_up(AbortCode.DEADLINE, "its total deadline passed")

    def _serve(self, header: FrameHeader) -> None:
        kind = header.kind
        assert self._peer is not None
        if kind is Kind.PING:
            self._link.receive_payload(header)
            self._link.send(Kind.PONG, header.transfer, header.generation)
            return
        if kind in MATCH_KINDS and (refusal := self._unanswerable(kind)) is not None:
            self._link.receive_payload(header)
            self._link.send(Kind.ABORT, header.transfer, payload=Abort(AbortCode.UNSUPPORTED, refusal).pack())
            return
        if header.transfer.epoch != self._peer.boot_epoch:
            raise ProtocolError(f"{kind.name} names transfer {header.transfer}, which another node began")
        if kind is Kind.OFFER:
            self._offered = header.transfer
            self._offer(header, self._link.receive_payload(header))
            self._offered = None
        elif kind in MATCH_KINDS:
            self._asked(header, self._link.receive_payload(header))
        elif kind is Kind.ABORT:
            self._aborted_by_peer(header, Abort.parse(self._link.receive_payload(header)))
        elif kind is Kind.ABORTED:
            self._link.receive_payload(header)
            self.close()
        elif kind is Kind.COMMIT and self._attached is None:
            self._link.receive_payload(header)
            self._answer_outcome(header.transfer)
        elif kind in (Kind.EXPOSE, Kind.DATA, Kind.SEAL, Kind.COMMIT):
            attached = self._check_attached(header)
            if attached is not None:
                self._work(header, attached)
        else:
            raise ProtocolError(f"{kind.name} is not what a sender sends")

    # Questions

    def _unanswerable(self, kind: Kind) -> str | None:
        """Why this node says nothing to such a frame; None if it does."""
        assert self._greeted is not None
        if kind is Kind.CANDIDATES or not may_match(self._greeted.ours, self._greeted.theirs):
            return f"{kind.name} is not supported here: HELLO did not offer it, or it is an answer"
        if self._guest is None:
            return (
                "this node does not answer queries: what it holds may be read only where it listens with serves=True "
                "(Store.listen, Endpoint; `serves` of kvstore serve)"
            )
        return None

    def _asked(self, header: FrameHeader, payload: memoryview) -> None:
        assert self._guest is not None
        assert self._greeted is not None
        if self._attached is not None:
            raise ProtocolError(f"{header.kind.name} in the middle of a transfer")
        if header.kind is Kind.QUERY:
            self._guest.query(header.transfer, payload)
        elif self._guest.fetch(header.transfer, payload, self._greeted):
            self.close()

    def _check_attached(self, header: FrameHeader) -> Attached | None:
        """The attachment that a frame is meant for; refused frames end the connection unread."""
        attached = self._attached
        if attached is None or header.transfer != attached.incoming.transfer:
            code, reason = AbortCode.UNKNOWN_TRANSFER, f"{header.kind.name} for a transfer that was not offered here"
        elif header.generation != attached.generation or attached.incoming.generation != attached.generation:
            code = AbortCode.STALE_GENERATION
            now = attached.incoming.generation
            reason = f"{header.kind.name} is of generation {header.generation}, the transfer is at {now}"
        else:
            return attached
        self._refuse(header.transfer, code, reason)
        self._discard(header.payload_bytes)
        return None

    def _work(self, header: FrameHeader, attached: Attached) -> None:
        incoming = attached.incoming
        payload = self._link.receive_payload(header)
        self._unread_bytes = header.body_bytes if header.kind is Kind.DATA else 0

        def work() -> None:
            incoming.deadline.check("the transfer's end")
            if header.kind is Kind.DATA:
                self._data(header, payload, attached)
            elif header.kind is Kind.EXPOSE:
                self._expose(Expose.parse(payload), attached)
            elif header.kind is Kind.SEAL:
                incoming.seal(Seal.parse(payload).rows)
            else:
                incoming.commit = Commit.parse(payload)

        self._guard(attached, work)
        self._discard(self._unread_bytes)

    # The offer

    def _offer(self, header: FrameHeader, payload: memoryview) -> None:
        if self._attached is not None:
            raise ProtocolError("a second OFFER on one connection, before its transfer has ended")
        if self._answer_outcome(header.transfer, is_offer=True):
            return
        try:
            offer = Offer.parse(payload)
            check_may_offer(offer, self._peer)
            incoming = self._attach(header.transfer, offer)
        except PoolError as error:
            if not error.retryable:
                self._refuse(header.transfer, AbortCode.TOO_LARGE, str(error))
                return
            full = Want(WantStatus.FULL, reason=str(error))
            self._link.send(Kind.WANT, header.transfer, payload=full.pack())
            return
        except StoreClosedError as error:
            self._refuse(header.transfer, AbortCode.CLOSING, str(error))
            return
        except OfferRefusedError as error:
            self._refuse(header.transfer, error.code, str(error))
            return
        except (ProtocolError, WriteError) as error:
            self._inbox.refused(self._link.peer_address, error)
            self._refuse(header.transfer, AbortCode.INVALID, str(error))
            return
        window = max(self._settings.credit_bytes, incoming.largest_piece_bytes)
        incoming.is_joined = False
        self._joined_count = 0
        incoming.arrivals.attach(*incoming.transfer, incoming.generation, window)
        self._attached = Attached(incoming, incoming.generation)
        ranges = incoming.missing_ranges()
        # Without anything to want, a resumed transfer is told so, too: only seals and COMMIT are left.
        want = Want(WantStatus.PIECES if len(ranges) else WantStatus.HAVE_ALL, window, ranges)
        self._link.send(Kind.WANT, header.transfer, incoming.generation, want.pack())

    def _attach(self, transfer: TransferId, offer: Offer) -> IncomingTransfer:
        """Take an offer up; raises as `Inbox.attach`."""
        return self._inbox.attach(self, transfer, offer)

    def _answer_outcome(self, transfer: TransferId, *, is_offer: bool = False) -> bool:
        """Answer from memory if the transfer has ended; False if an offer is to be looked at."""
        outcome = self._inbox.outcomes.get(transfer)
        if isinstance(outcome, Committed):
            known = Committed(True, outcome.received_bytes, outcome.received_pieces, outcome.elapsed_us)
            self._link.send(Kind.COMMITTED, transfer, payload=known.pack())
        elif outcome is not None:
            self._link.send(Kind.ABORT, transfer, payload=outcome.pack())
        elif is_offer:
            return False
        else:
            self._refuse(transfer, AbortCode.UNKNOWN_TRANSFER, "COMMIT for a transfer that is not known here")
        return True

    # Pieces

    def _expose(self, expose: Expose, attached: Attached) -> None:
        if not self._is_one_sided:
            raise ProtocolError("EXPOSE on a connection without one-sided reads")
        for exposure in expose.exposures:
            if exposure.record >= attached.incoming.record_count:
                raise ProtocolError(f"EXPOSE names record {exposure.record} of {attached.incoming.record_count}")
            attached.exposures[exposure.record] = exposure

    def _data(self, header: FrameHeader, table: memoryview, attached: Attached) -> None:
        incoming = attached.incoming
        is_remote = bool(header.flags & FLAG_REMOTE)
        if is_remote and not self._is_one_sided:
            raise ProtocolError("a DATA frame names exposed pieces on a connection without one-sided reads")
        rows = parse_piece_table(table, header.piece_count)
        incoming.arrivals.claim(rows, None if is_remote else header.body_bytes)
        arriving = incoming.arriving(rows)
        start_s = time.monotonic()
        consumed_bytes = 0
        is_whole = False

        def consumed(size_bytes: int) -> None:
            nonlocal consumed_bytes
            consumed_bytes += size_bytes
            self._credit(attached, size_bytes)

        try:
            with incoming.transaction.moving():
                if is_remote:
                    computed = get_pieces(arriving, attached.exposures, self._link, consumed)
                else:
                    computed = receive_pieces(arriving, self._link, consumed)
                is_whole = True
                self._unread_bytes = 0
                damaged = incoming.arrived(rows, np.concatenate(computed))
        finally:
            if not is_whole:
                incoming.arrivals.lose(rows, consumed_bytes)
        self._observe(rows, attached, start_s)
        if damaged is not None:
            self._want_again(attached, damaged)

    def _credit(self, attached: Attached, size_bytes: int) -> None:
        """Grant more as bytes are consumed: each quarter of the window, and as a sign of life."""
        arrivals = attached.incoming.arrivals
        quiet_s = time.monotonic() - self._link.last_sent_s
        granted = arrivals.consume(size_bytes, quiet_s >= self._link.progress_deadline_s * KEEPALIVE_FRACTION)
        if granted is not None:
            payload = Credit(granted, arrivals.consumed_bytes).pack()
            self._link.send(Kind.CREDIT, attached.incoming.transfer, attached.generation, payload)

    def _want_again(self, attached: Attached, ranges: Rows) -> None:
        incoming = attached.incoming
        count = int(ranges["count"].sum())
        self._inbox.damaged(self._link.peer_address, count)
        if incoming.damaged_pieces > self._settings.damaged_pieces_max:
            reason = (
                f"{incoming.damaged_pieces} pieces arrived with a checksum that does not hold, the limit is "
                f"{self._settings.damaged_pieces_max}; look at the sender's memory and at the network"
            )
            self._give_up(AbortCode.CHECKSUM, reason)
            return
        want = Want(WantStatus.AGAIN, incoming.arrivals.grant_window(), ranges)
        self._link.send(Kind.WANT, incoming.transfer, attached.generation, want.pack())

    def _observe(self, rows: Rows, attached: Attached, start_s: float) -> None:
        observer = self._observer
        if observer is not None:
            end_s = time.monotonic()
            for part in attached.incoming.arriving(rows):
                observe_layers(observer.piece_received, part.target.layout, part.ids, start_s, end_s)

    # Ending

    def _commit_when_complete(self, attached: Attached) -> None:
        incoming = attached.incoming
        if self._attached is None:
            return
        commit = incoming.committable()
        if commit is None:
            return
        answer = self._inbox.commit(incoming, commit)
        self._attached = None
        self._release_joining()
        self._link.send(Kind.COMMITTED, incoming.transfer, attached.generation, answer.pack())

    def _aborted_by_peer(self, header: FrameHeader, abort: Abort) -> None:
        if self._attached is not None and header.transfer == self._attached.incoming.transfer:
            with self._lock:
                self._attached = None
            self._end_joining(is_waiting=False)
        self._inbox.give_up(header.transfer, Abort(abort.code, f"the sender gave up: {abort.reason}"))
        self._link.send(Kind.ABORTED, header.transfer, header.generation)

    def _give_up(self, code: AbortCode, reason: str) -> None:
        """End the transfer from this side, and say so."""
        with self._lock:
            attached = self._attached
            if attached is None:
                return
            self._part()
        self._say_given_up(attached, Abort(code, reason))

    def _part(self) -> None:
        """Nothing more is done here for the transfer, whichever thread comes next. Call with the lock held."""
        self._drain()
        self._attached = None

    def _say_given_up(self, attached: Attached, abort: Abort) -> None:
        self._end_joining(is_waiting=False)
        self._inbox.give_up(attached.incoming.transfer, abort)
        self._send_quietly(Kind.ABORT, attached.incoming.transfer, abort.pack())

    def _refuse(self, transfer: TransferId, code: AbortCode, reason: str) -> None:
        """Say why this connection ends; a transfer that it was attached to stays, to be resumed."""
        if self._drain_until is not None:
            return  # Another thread has just said why.
        self._drain()
        self._send_quietly(Kind.ABORT, transfer, Abort(code, reason).pack())

    def _drain(self) -> None:
        """From now on only wait for the peer to acknowledge and close, discarding what was under way."""
        self._stop.set()
        self._drain_until = Deadline.after(DRAIN_DEADLINE_S)

    def _discard(self, size_bytes: int) -> None:
        scratch = memoryview(bytearray(min(size_bytes, SCRATCH_BYTES)))
        while size_bytes:
            part = scratch[: min(size_bytes, SCRATCH_BYTES)]
            self._link.receive_into([part])
            size_bytes -= part.nbytes

    def _send_quietly(self, kind: Kind, transfer: TransferId, payload: bytes) -> None:
        try:
            self._link.send(kind, transfer, payload=payload)
        except (PeerGoneError, OSError) as error:
            LOG.debug("%s did not hear of %s: %s", self._link.peer_address, kind.name, error)

    def _detach(self) -> None:
        attached, self._attached = self._attached, None
        if attached is not None:
            self._inbox.detach(attached.incoming, attached.generation)
