"""The transfers that a node is receiving: who may begin, resume, commit, and what becomes of the rest."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import PoolError, StoreClosedError, TransferError
from kvstore.limits import OFFERS_WAITING_MAX
from kvstore.pool import RecordDigests
from kvstore.transfer.incoming import IncomingTransfer
from kvstore.transfer.messages import Abort, AbortCode, Committed
from kvstore.transfer.offer import OfferFlag, check_offer
from kvstore.transfer.outcomes import Outcomes
from kvstore.transfer.status import IncomingStatus
from kvstore.transfer.waiting import WaitingLine

if TYPE_CHECKING:
    from kvstore.pool import BasePool, BaseTransaction, RecordArrays
    from kvstore.spec import ModelSpec
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.joined import Joined
    from kvstore.transfer.messages import Commit
    from kvstore.transfer.offer import Offer
    from kvstore.transfer.report import TransferObserver
    from kvstore.transfer.session import Session
    from kvstore.transfer.settings import TransferSettings
    from kvstore.transfer.waiting import Waiting


LOOK_S = 0.1
LOOK_LAST_S = 0.005
"""An offer that waits looks again this often; at its deadline another one may be about to end its try."""


REFUSED_PAUSE_S = 10.0
"""Of peers that are refused, one in so many seconds is logged; the others are counted."""

LOG = logging.getLogger("kvstore.transfer")


class OfferRefusedError(TransferError):
    """An offer is not taken up; `code` goes into the ABORT that answers it."""

    def __init__(self, code: AbortCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def _line_is_full() -> OfferRefusedError:
    reason = f"{OFFERS_WAITING_MAX} offers wait here that are as urgent or more, the most; retry later"
    return OfferRefusedError(AbortCode.LIMIT, reason)


@dataclass
class InboxStatistics:
    """Counters of one endpoint; they only grow.

    Attributes:
        committed, aborted: transfers by how they ended.
        resumed: attachments beyond a transfer's first.
        full: offers that were answered FULL.
        damaged_pieces: pieces that arrived with a checksum that did not hold.
        refused: connections and offers that broke the protocol or did not match.
        received_bytes: piece bytes of committed transfers.
        received_s: seconds of committed transfers, each from its first offer to its commit.
    """

    committed: int = 0
    aborted: int = 0
    resumed: int = 0
    full: int = 0
    damaged_pieces: int = 0
    refused: int = 0
    received_bytes: int = 0
    received_s: float = 0.0


@dataclass(eq=False)
class _Entry:
    incoming: IncomingTransfer
    session: Session | None

    @property
    def is_detached(self) -> bool:
        """Whether nobody works on it: its session said so, or has ended without a word."""
        return self.incoming.detached_s is not None or (self.session is not None and self.session.ended.is_set())


class Inbox:
    """State shared by an endpoint's sessions. Any thread.

    A transfer whose connection broke keeps its reservation for the resume window, so that a reconnecting
    sender finds it; it is given up earlier when another offer needs the space.

    Raises:
        TransferError: the system has no thread for it.
    """

    def __init__(
        self, pool: BasePool, settings: TransferSettings, boot_epoch: int, observer: TransferObserver | None
    ) -> None:
        self.spec: ModelSpec = pool.spec
        self.settings = settings
        self.boot_epoch = boot_epoch
        self.observer = observer
        self.outcomes = Outcomes()
        self.last_error: tuple[str, Exception] | None = None
        self._pool = pool
        self._changed = threading.Condition()
        self._entries: dict[TransferId, _Entry] = {}
        self._line = WaitingLine(OFFERS_WAITING_MAX)
        self._places: set[TransferId] = set()
        """Questions of peers that this node sends an answer to."""
        self._generations = count(1)
        self._statistics = InboxStatistics()
        self._refused_told_s: float | None = None
        self._is_draining = False
        self._is_closed = False
        self._janitor = threading.Thread(target=self._expire, name="kvstore-transfer-janitor", daemon=True)
        pool.subscribe(self._space_changed)
        try:
            self._janitor.start()
        except RuntimeError as error:
            pool.unsubscribe(self._space_changed)
            raise TransferError(
                f"no thread can be started to receive transfers: {error}; raise the limit on threads"
            ) from error

    def statistics(self) -> InboxStatistics:
        """A copy of the counters."""
        with self._changed:
            return InboxStatistics(**vars(self._statistics))

    def transfers(self) -> tuple[IncomingStatus, ...]:
        """What arrives, oldest first, then what waits for space, in the order of its turns."""
        with self._changed:
            entries = [(entry.incoming, not entry.is_detached) for entry in self._entries.values()]
            waiting = self._line.statuses()
        return (*(IncomingStatus.of(incoming, is_attached=attached) for incoming, attached in entries), *waiting)

    @property
    def active_count(self) -> int:
        """Transfers that hold a reservation now."""
        with self._changed:
            return len(self._entries)

    def refused(self, peer_address: str, error: Exception) -> None:
        """A peer broke the protocol or does not match. One that goes on trying fills no log."""
        now = time.monotonic()
        with self._changed:
            self._statistics.refused += 1
            refused = self._statistics.refused
            self.last_error = (peer_address, error)
            is_told = self._refused_told_s is not None and now - self._refused_told_s < REFUSED_PAUSE_S
            if not is_told:
                self._refused_told_s = now
        if not is_told:
            fields = {"event": "peer_refused", "peer": peer_address, "reason": str(error), "refused": refused}
            LOG.warning("%s was refused", peer_address, extra={"fields": fields})

    def damaged(self, peer_address: str, pieces: int) -> None:
        """Pieces from a peer arrived damaged."""
        with self._changed:
            self._statistics.damaged_pieces += pieces

    def _space_changed(self) -> None:
        with self._changed:
            self._space_freed()

    def _space_freed(self) -> None:
        """Call with the lock held."""
        self._line.note_change()
        self._changed.notify_all()

    # Offers

    def attach(self, session: Session, transfer: TransferId, offer: Offer) -> IncomingTransfer:
        """Reserve space for what an offer brings, or take a transfer up again that a connection lost.

        Raises:
            PoolError: there is no room; the answer is FULL if it is retryable, and final if not.
            OfferRefusedError: limits, or the transfer cannot be resumed.
            ProtocolError, WriteError: the offer does not fit the spec or the store.
            StoreClosedError: closing.
        """
        with self._changed:
            self._check_open()
            entry = self._entries.get(transfer)
            if entry is None:
                self._check_taking()
            waiting = None if entry is not None else self._queue(session, transfer, offer)
        if entry is not None:
            return self._resume(entry, session, offer)
        assert waiting is not None
        try:
            offered = check_offer(offer, self.spec)
            transaction = self._reserve(waiting, offered)
            try:
                incoming = IncomingTransfer(transfer, offer, offered, transaction)
            except BaseException:
                transaction.abort("the transfer could not be begun")
                raise
            with self._changed:
                if self._is_closed or waiting.cancelled is not None:
                    transaction.abort(waiting.cancelled or "the node is closing")
                    self._check_waiting(waiting)
                incoming.generation = next(self._generations)
                incoming.detached_s = None
                incoming.peer_address = session.peer_address
                self._entries[transfer] = _Entry(incoming, session)
                self._line.leave(waiting)
                return incoming
        finally:
            with self._changed:
                self._line.leave(waiting)
                # The janitor takes note of its deadline, and the next one in the line of its turn.
                self._changed.notify_all()

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError("the node is closing")

    def _check_taking(self) -> None:
        if self._is_draining:
            raise OfferRefusedError(AbortCode.CLOSING, "the node is draining and takes nothing new")

    def _queue(self, session: Session, transfer: TransferId, offer: Offer) -> Waiting:
        """A place in the line of offers. Call with the lock held."""
        if self._line.find(transfer) is not None:
            raise OfferRefusedError(AbortCode.STALE_GENERATION, "an earlier connection's offer is still waiting")
        self._check_peer_limit(transfer)
        # The sender hears nothing meanwhile, and must not take that for a dead peer.
        deadline = Deadline.after(min(self.settings.queue_deadline_s, session.progress_deadline_s / 2))
        waiting = self._line.join(transfer, offer, session.peer_address, deadline)
        if waiting is None:
            raise _line_is_full()
        self._changed.notify_all()  # Somebody may have lost the last place.
        return waiting

    def _check_waiting(self, waiting: Waiting) -> None:
        """Raise what ends an offer's wait from outside. Call with the lock held."""
        self._check_open()
        if waiting.cancelled is not None:
            raise OfferRefusedError(AbortCode.CANCELLED, waiting.cancelled)
        if waiting.is_ousted:
            raise _line_is_full()

    def _check_peer_limit(self, transfer: TransferId) -> None:
        limit = self.settings.transfers_per_peer_max
        active = sum(other.epoch == transfer.epoch for other in (*self._entries, *self._places))
        if active + self._line.count_of_peer(transfer.epoch) >= limit:
            raise OfferRefusedError(
                AbortCode.LIMIT, f"{limit} transfers of this peer are under way, the most; retry later"
            )

    def take_place(self, question: TransferId) -> None:
        """Count a transfer that a peer asks for like one that it sends.

        Raises:
            OfferRefusedError: one more would be too many, or it has one already. StoreClosedError: closing.
        """
        with self._changed:
            self._check_open()
            self._check_taking()
            if question in self._places:
                # Ending one of two would end the other one's connections.
                raise OfferRefusedError(AbortCode.STALE_GENERATION, "an earlier FETCH of this question is at work")
            self._check_peer_limit(question)
            limit = self.settings.transfers_per_node_max
            if len(self._entries) + len(self._places) >= limit:
                raise OfferRefusedError(
                    AbortCode.LIMIT, f"{limit} transfers are under way at this node, the most; retry later"
                )
            self._places.add(question)

    def give_place(self, question: TransferId) -> None:
        """Such a transfer has ended."""
        with self._changed:
            self._places.discard(question)
            self._changed.notify_all()

    def _resume(self, entry: _Entry, session: Session, offer: Offer) -> IncomingTransfer:
        incoming = entry.incoming
        if offer.pack() != incoming.offer.pack():
            raise OfferRefusedError(AbortCode.INVALID, "the transfer is known here with another offer")
        previous = entry.session
        if previous is not None:
            previous.close()
            if not previous.ended.wait(self.settings.progress_deadline_s):
                raise OfferRefusedError(AbortCode.STALE_GENERATION, "an earlier connection is still at work")
        with self._changed:
            if self._entries.get(incoming.transfer) is not entry or entry.session not in (None, previous):
                raise OfferRefusedError(AbortCode.STALE_GENERATION, "the transfer ended, or was taken up, meanwhile")
            entry.session = session
            incoming.generation = next(self._generations)
            incoming.detached_s = None
            incoming.peer_address = session.peer_address
            self._statistics.resumed += 1
            return incoming

    def _reserve(self, waiting: Waiting, offered: RecordArrays) -> BaseTransaction:
        """Space for everything that is missing, waiting a little for it, in the order of the line."""
        offer = waiting.offer
        path = offer.path
        resume_nodes = [node for tokens in offer.resume_tokens if (node := path.node_at(tokens)) is not None]
        while True:
            self._wait_turn(waiting)
            try:
                return self._pool.begin(
                    path,
                    offered.names,
                    salt=offer.salt,
                    grid_digests=RecordDigests(offered.names, offered.digest_numbers, offered.digests),
                    resume_nodes=resume_nodes,
                    is_transient=OfferFlag.HANDOVER in offer.flags,
                )
            except PoolError as error:
                if not error.retryable or (waiting.deadline.has_passed and not self._has_detached()):
                    with self._changed:
                        self._statistics.full += 1
                    raise
            finally:
                with self._changed:
                    self._line.end_try(waiting)
                    self._changed.notify_all()
            self._give_up_detached()

    def _wait_turn(self, waiting: Waiting) -> None:
        """Until this offer may try to reserve; its own deadline is its last turn."""
        limit = self.settings.transfers_per_node_max
        with self._changed:
            while True:
                self._check_waiting(waiting)
                if len(self._entries) + len(self._places) < limit:
                    if self._line.begin_try(waiting):
                        return
                elif waiting.deadline.has_passed:
                    reason = f"{limit} transfers are under way at this node, the most; retry later"
                    raise OfferRefusedError(AbortCode.LIMIT, reason)
                # Space that appears without a word from the pool is found by another look, at most this much later.
                self._changed.wait(min(LOOK_S, max(waiting.deadline.remaining_s(), LOOK_LAST_S)))
                self._line.note_time(LOOK_S)

    def _has_detached(self) -> bool:
        with self._changed:
            return any(entry.incoming.detached_s is not None for entry in self._entries.values())

    def _give_up_detached(self) -> bool:
        """Make room by giving up the transfer that has been without a connection the longest."""
        with self._changed:
            detached = [
                (entry.incoming.detached_s, transfer)
                for transfer, entry in self._entries.items()
                if entry.incoming.detached_s is not None
            ]
        if not detached:
            return False
        reason = "its connection broke and another transfer needed the space"
        return self.give_up(min(detached)[1], Abort(AbortCode.CLOSING, reason), only_detached=True)

    def join(self, session: Session, transfer: TransferId, generation: int) -> Joined | None:
        """Let a further connection carry pieces of an attached transfer; None if there is no such attachment."""
        with self._changed:
            entry = self._entries.get(transfer)
            primary = entry.session if entry is not None else None
        return None if primary is None else primary.admit(session, transfer, generation)

    # Ends

    def commit(self, incoming: IncomingTransfer, commit: Commit) -> Committed:
        """Make a complete transfer visible, and remember that.

        Raises:
            WriteError, StoreClosedError: the transaction has ended, or the hand-over does not fit.
        """
        is_whole = commit.upto_tokens == incoming.offer.path.tokens
        incoming.transaction.commit(None if is_whole else commit.upto_tokens, commit.handover)
        if not is_whole:
            incoming.transaction.abort(f"the sender committed {commit.upto_tokens} tokens only")
        answer = incoming.committed()
        self.outcomes.record(incoming.transfer, answer, incoming.deadline)
        with self._changed:
            self._entries.pop(incoming.transfer, None)
            self._statistics.committed += 1
            self._statistics.received_bytes += incoming.received_bytes
            self._statistics.received_s += answer.elapsed_us / 1e6
            self._space_freed()
        _log_end(incoming, "committed")
        return answer

    def give_up(self, transfer: TransferId, abort: Abort, *, only_detached: bool = False) -> bool:
        """Free what a transfer holds and remember why. False if there was nothing to free."""
        with self._changed:
            entry = self._entries.get(transfer)
            if entry is not None and only_detached and not entry.is_detached:
                return False
            waiting = self._line.find(transfer)
            if waiting is not None:
                waiting.cancelled = waiting.cancelled or abort.reason
                self._changed.notify_all()
            if entry is not None:
                del self._entries[transfer]
                self._statistics.aborted += 1
        deadline = entry.incoming.deadline if entry is not None else Deadline.after(0.0)
        self.outcomes.record(transfer, abort, deadline)
        if entry is None:
            return False
        entry.incoming.transaction.abort(abort.reason)
        with self._changed:
            self._space_freed()
        _log_end(entry.incoming, "aborted", code=abort.code.name.lower(), reason=abort.reason)
        return True

    def cancel(self, transfer: TransferId, reason: str) -> bool:
        """Give up a transfer that arrives, or whose offer waits. False if there is none, or it has just ended."""
        abort = Abort(AbortCode.CANCELLED, reason)
        deadline = Deadline.after(self.settings.progress_deadline_s)
        while True:
            with self._changed:
                waiting = self._line.find(transfer)
                if waiting is not None:
                    waiting.cancelled = waiting.cancelled or reason
                    self.outcomes.record(transfer, abort, Deadline.after(waiting.offer.total_deadline_ms / 1000))
                    self._changed.notify_all()
                    return True
                entry = self._entries.get(transfer)
                session = entry.session if entry is not None else None
            if entry is None:
                return False
            if session is not None and session.cancel(transfer, abort):
                return True
            if self.give_up(transfer, abort, only_detached=True):
                return True
            # It is between a connection and the next, or about to be committed.
            with self._changed:
                if self._entries.get(transfer) is not entry:
                    return False
                self._changed.wait(LOOK_LAST_S)
            if deadline.has_passed:
                return False

    def detach(self, incoming: IncomingTransfer, generation: int) -> None:
        """A session has lost its connection; the transfer waits to be resumed."""
        with self._changed:
            entry = self._entries.get(incoming.transfer)
            if entry is not None and entry.incoming is incoming and incoming.generation == generation:
                entry.session = None
                incoming.detached_s = time.monotonic()
                self._changed.notify_all()

    def _expire(self) -> None:
        """The janitor: gives up what nobody resumed in time. Sleeps until the next of these times."""
        while True:
            with self._changed:
                if self._is_closed:
                    return
                now = time.monotonic()
                expired, nearest_s = self._expired(now)
                if not expired:
                    self._changed.wait(None if nearest_s is None else nearest_s - now)
                    continue
            for transfer, abort in expired:
                self.give_up(transfer, abort, only_detached=True)

    def _expired(self, now: float) -> tuple[list[tuple[TransferId, Abort]], float | None]:
        """What is to be given up, and when to look again. Call with the lock held.

        A frame of its own: what it has looked at, a janitor that sleeps must not keep alive.
        """
        expired: list[tuple[TransferId, Abort]] = []
        nearest_s: float | None = None
        for transfer, entry in self._entries.items():
            detached_s = entry.incoming.detached_s
            until_s = entry.incoming.deadline.at_s
            if detached_s is not None:
                until_s = min(until_s, detached_s + self.settings.resume_window_s)
            elif until_s <= now and not entry.is_detached:
                # Its session holds the deadline, too, and is about to end; seen to anyhow.
                until_s = now + self.settings.progress_deadline_s
            if until_s > now:
                nearest_s = until_s if nearest_s is None else min(nearest_s, until_s)
            elif entry.incoming.deadline.has_passed:
                expired.append((transfer, Abort(AbortCode.DEADLINE, "its total deadline passed")))
            else:
                reason = f"its connection broke and none replaced it within {self.settings.resume_window_s:g} s"
                expired.append((transfer, Abort(AbortCode.DEADLINE, reason)))
        return expired, nearest_s

    def drain(self, deadline: Deadline) -> bool:
        """Refuse new transfers and wait for those that run, detached ones included. False if some run at the deadline.

        What is refused from here on stays refused; it may be called again, to wait longer.
        """
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(
                lambda: not (self._entries or len(self._line) or self._places), deadline.remaining_s()
            )

    def stop_taking(self) -> None:
        """Whatever is offered from here on, or still waits, is refused: the node is closing."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Give everything up and end the janitor. The sessions have ended by now, or soon will."""
        self.stop_taking()
        with self._changed:
            transfers = list(self._entries)
        for transfer in transfers:
            self.give_up(transfer, Abort(AbortCode.CLOSING, "the node is closing"))
        self._pool.unsubscribe(self._space_changed)
        self._janitor.join()


def _log_end(incoming: IncomingTransfer, outcome: str, **details: str) -> None:
    """One line for each transfer that ends."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    fields = {
        "event": f"transfer_{outcome}",
        "transfer": str(incoming.transfer),
        "peer": incoming.peer_address,
        "bytes": incoming.received_bytes,
        "seconds": round(time.monotonic() - incoming.began_s, 6),
        **details,
    }
    LOG.info("transfer %s from %s %s", incoming.transfer, incoming.peer_address, outcome, extra={"fields": fields})
