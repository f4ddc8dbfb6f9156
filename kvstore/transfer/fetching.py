"""One fetch, from the side that asks: its question, its connections, its end."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    KVStoreError,
    PeerGoneError,
    PeerMismatchError,
    PoolError,
    ProtocolError,
    StoreClosedError,
    TransferAbortedError,
    TransferError,
    TransferFullError,
    TransferTooLargeError,
    TransportError,
)
from kvstore.handle import Handle, Progress
from kvstore.transfer.asking import Asking, QuestionGoneError, refusal
from kvstore.transfer.attachment import ChecksumTransferError
from kvstore.transfer.fetch_session import FetchSession
from kvstore.transfer.flights import Flight
from kvstore.transfer.inbox import OfferRefusedError
from kvstore.transfer.messages import Abort, AbortCode, Committed
from kvstore.transfer.outgoing_transfer import BACKOFF_S, PROTOCOL_FAULTS_MAX
from kvstore.transfer.query import Candidates, Fetch, Query
from kvstore.transfer.remote import FetchReport
from kvstore.transfer.snapshots import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.pool import BasePool, Prompt
    from kvstore.spec import ChunkGrid, Shard
    from kvstore.transfer.connector import Connector, GreetedLink
    from kvstore.transfer.flights import Flights
    from kvstore.transfer.frames import FrameHeader, TransferId
    from kvstore.transfer.inbox import Inbox
    from kvstore.transfer.query import RemoteCandidate
    from kvstore.transfer.report import TransferObserver

_OfferFrame: TypeAlias = "tuple[FrameHeader, memoryview]"

LOG = logging.getLogger("kvstore.transfer")
CONNECTIONS_DEFAULT = 2
"""Over how many connections a fetch comes: a second one keeps a second core busy at each end."""
CHOICES_MAX = 64
"""How often a candidate may have gone when it is fetched before the fetch is given up."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a fetch is to bring.

    Attributes:
        prompt: whose prefix.
        shard, grid: whose share, and the chunk boundaries to insist on.
        tokens_max: nothing deeper than this.
        priority: 0 (first) to 255.
        total_deadline_s: when to give up; None for the default, from the bytes.
    """

    prompt: Prompt
    shard: Shard
    grid: ChunkGrid | None
    tokens_max: int
    priority: int
    total_deadline_s: float | None


@dataclass(frozen=True, eq=False)
class Means:
    """What the fetches of one store share.

    Attributes:
        pool: where the prefixes go.
        inbox: the transfers that arrive for them.
        flights: which prefixes are on their way.
        next_question: makes the name of a question.
        committed: told of what has arrived.
    """

    pool: BasePool
    inbox: Inbox
    flights: Flights
    next_question: Callable[[], TransferId]
    committed: Callable[[FetchReport], None]


class Fetching:
    """Asks a node and receives from it until the prefix is committed here. Its own thread runs it.

    Args:
        means: of the store.
        wanted: what it is to bring.
        connector: how the node is reached.
        observer: told of each layer's bytes as they arrive.
        on_end: called when nothing of it runs any more.
    """

    def __init__(
        self,
        means: Means,
        wanted: Wanted,
        connector: Connector,
        observer: TransferObserver | None,
        on_end: Callable[[Fetching], None],
    ) -> None:
        self._means = means
        self._wanted = wanted
        self._connector = connector
        self._observer = observer
        self._on_end = on_end
        self.address = connector.address
        self.handle: Handle[FetchReport] = Handle(f"a fetch from {self.address}", self.cancel, self._progress)
        self.started_s = time.monotonic()
        settings = means.inbox.settings
        self._settings = settings
        self._deadline = Deadline.after(wanted.total_deadline_s or settings.total_deadline_s(0, is_complete=True))
        self._packed = Query.of(wanted.prompt, wanted.shard, wanted.grid).pack()
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._cancelled: str | None = None
        self._greeted: GreetedLink | None = None
        self._session: FetchSession | None = None
        # The present question, what was chosen of its answer, and what that led to.
        self._question = means.next_question()
        self._flight: Flight | None = None
        self._transfer: TransferId | None = None
        self._heard_s: float | None = None
        self._reconnects = 0
        self._shared_tokens = 0
        self._connections = settings.connections or CONNECTIONS_DEFAULT
        self._done: FetchReport | None = None
        self._thread = threading.Thread(target=self._run, name=f"kvstore-fetch-{self._question.counter}", daemon=True)

    def start(self) -> None:
        """Raises `TransferError` if the system has no thread for it; nothing runs then."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise TransferError(
                f"no thread can be started for a fetch from {self.address}: {error}; fetch less at once, or raise the "
                "limit on threads"
            ) from error

    def join(self, deadline_s: float) -> None:
        """Wait until its thread has ended; at once if that never began."""
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(deadline_s)

    def cancel(self, reason: str) -> None:
        """Give the fetch up; it then ends with `TransferAbortedError`. Any thread."""
        with self._lock:
            self._cancelled = self._cancelled or reason
            self._is_over.set()
            session, greeted = self._session, self._greeted
        self._means.flights.wake()
        if session is not None:
            session.call_off(reason)
        elif greeted is not None:
            greeted.link.close()

    def _progress(self) -> Progress:
        with self._lock:
            done, session = self._done, self._session
        if done is not None:
            return Progress(done.received_bytes, done.received_bytes, TransferState.COMMITTING)
        incoming = None if session is None else session.incoming
        if incoming is None:
            return Progress(0, 0, TransferState.CONNECTING)
        return Progress(incoming.received_bytes, incoming.expected_bytes, TransferState.MOVING)

    # The thread

    def _run(self) -> None:
        report: FetchReport | None = None
        error: BaseException | None = None
        try:
            report = self._fetch()
        except BaseException as raised:
            error = raised
        self._forget(error)
        try:
            self._on_end(self)
        except Exception:
            LOG.exception("a fetch from %s has ended, and then something failed", self.address)
        if report is not None:
            self.handle.resolve(report)  # unless it said so when it was committed
        elif error is not None:
            self.handle.fail(error)

    def _fetch(self) -> FetchReport:
        faults = 0
        while True:
            self._check()
            try:
                found = self._attempt()
                if isinstance(found, Flight):
                    found = self._share(found)
                if found is not None:
                    return found
                continue
            except QuestionGoneError:
                self._forget(None)
            except PeerMismatchError:
                raise
            except ProtocolError:
                faults += 1
                if faults > PROTOCOL_FAULTS_MAX:
                    raise
            except (PeerGoneError, DeadlineError, TransportError) as error:
                self._check()
                self._check_alive(error)
            self._is_over.wait(BACKOFF_S[min(self._reconnects, len(BACKOFF_S) - 1)])
            self._reconnects += 1

    def _check(self) -> None:
        """Raises `TransferAbortedError` if the fetch is to be given up."""
        if self._cancelled is not None:
            raise TransferAbortedError(f"the fetch from {self.address} was given up: {self._cancelled}")
        if self._deadline.has_passed:
            raise TransferAbortedError(f"the fetch from {self.address} did not end within its total deadline")

    def _check_alive(self, error: KVStoreError) -> None:
        """Raises what ended the connection if the node cannot be reached any more."""
        if self._heard_s is None:
            raise error
        if time.monotonic() + BACKOFF_S[0] >= self._heard_s + self._settings.progress_deadline_s:
            raise PeerGoneError(
                f"the fetch from {self.address} failed: nothing was heard of the node for "
                f"{self._settings.progress_deadline_s:g} s; last error: {error}"
            ) from error

    def _attempt(self) -> FetchReport | Flight | None:
        """One connection. A flight of another fetch is to be waited for; None: the question is to be asked again.

        Raises:
            PeerGoneError, DeadlineError, TransportError, ProtocolError, QuestionGoneError: this connection is over, the
            fetch may go on. Any other error: it may not.
        """
        if self._flight is None and self._local_tokens() >= self._wanted.tokens_max:
            return self._report()
        greeted = self._connect()
        try:
            if self._transfer is not None and greeted.theirs.boot_epoch != self._transfer.epoch:
                raise QuestionGoneError(f"{self.address} has restarted")
            asking = Asking(greeted, self.address, self._question)
            answer = self._ask(asking) if self._flight is None else self._ask_again(asking, self._flight)
            if isinstance(answer, tuple) and self._flight is not None:
                return self._receive(greeted, answer, self._flight)
            return None if isinstance(answer, tuple) else answer
        finally:
            with self._lock:
                self._greeted = None
            self._heard_s = max(self._heard_s or 0.0, greeted.link.last_received_s)
            greeted.link.close()

    def _connect(self) -> GreetedLink:
        deadline = Deadline.after(self._settings.connect_deadline_s).earlier(self._deadline)
        greeted = self._connector.connect(deadline)
        with self._lock:
            self._greeted = greeted
            is_over = self._is_over.is_set()
        if is_over:
            greeted.link.close()
            self._check()
        return greeted

    # Questions

    def _ask(self, asking: Asking) -> FetchReport | Flight | _OfferFrame:
        """Ask and choose: the offer that answers, another fetch's flight, or a report that nothing is to be had."""
        tokens = len(self._wanted.prompt)
        candidates = asking.query(self._packed, tokens, self._deadline)
        for _ in range(CHOICES_MAX):
            chosen = self._choose(candidates)
            if chosen is None:
                return self._report()
            if self._wanted.total_deadline_s is None:
                total_s = self._settings.total_deadline_s(chosen.size_bytes, is_complete=True)
                self._deadline = Deadline(self.started_s + total_s)
            path = self._wanted.prompt.prefix(chosen.tokens)
            flight = Flight(path, self._wanted.shard, self._wanted.grid, self.address)
            other = self._means.flights.begin(flight)
            if other is not None:
                return other
            self._flight = flight
            answer = asking.fetch(self._message(flight), tokens, self._deadline)
            if not isinstance(answer, Candidates):
                return answer
            self._land(None)
            candidates = answer
        raise TransferError(
            f"{self.address} evicted what it had answered {CHOICES_MAX} times before it could be fetched; its memory "
            "is too small for what is written there"
        )

    def _ask_again(self, asking: Asking, flight: Flight) -> _OfferFrame:
        """After a break: have the node go on with what it was sending."""
        answer = asking.fetch(self._message(flight), len(self._wanted.prompt), self._deadline)
        if isinstance(answer, Candidates):
            raise QuestionGoneError(f"{self.address} has begun the question anew")
        return answer

    def _choose(self, candidates: Candidates) -> RemoteCandidate | None:
        """The deepest one that is asked for and deeper than what is here."""
        local = self._local_tokens()
        for candidate in candidates.candidates:
            if local < candidate.tokens <= self._wanted.tokens_max:
                return candidate
        return None

    def _message(self, flight: Flight) -> Fetch:
        remaining_ms = max(1, round(self._deadline.remaining_s() * 1000))
        return Fetch(flight.path.tokens, remaining_ms, self._wanted.priority, self._connections)

    def _local_tokens(self) -> int:
        wanted = self._wanted
        return self._means.pool.match(wanted.prompt, shard=wanted.shard, grid=wanted.grid).tokens

    def _share(self, flight: Flight) -> FetchReport | None:
        """Wait for another fetch that brings what is wanted, or a part of it; None if something is left to fetch.

        Raises:
            KVStoreError: it failed in a way that this one would, too.
        """
        self._means.flights.wait(flight, self._deadline, self._is_over)
        self._check()
        if flight.error is not None and flight.address == self.address:
            raise type(flight.error)(f"another fetch of the same prefix failed: {flight.error}") from flight.error
        self._shared_tokens = flight.path.tokens if flight.error is None else 0
        return None

    # The transfer

    def _receive(self, greeted: GreetedLink, offer: _OfferFrame, flight: Flight) -> FetchReport:
        means = self._means
        transfer = offer[0].transfer
        ended = means.inbox.outcomes.get(transfer)
        if isinstance(ended, Committed):
            raise ProtocolError(f"{self.address} offers transfer {transfer} again, which was committed here before")
        if ended is not None:
            # While nobody was connected: another fetch needed the space, or it took too long.
            raise QuestionGoneError(f"this side has given transfer {transfer} up: {ended.reason}")
        self._transfer = transfer

        def committed() -> None:
            outcome = means.inbox.outcomes.get(transfer)
            if isinstance(outcome, Committed):
                self._committed(outcome, flight)

        session = FetchSession(
            means.inbox,
            greeted,
            self._connector,
            flight.path,
            self._wanted.prompt.salt,
            offer,
            self._observer,
            # An observer has seen every piece before the fetch has ended.
            committed if self._observer is None else lambda: None,
            connections=self._connections,
            deadline=self._deadline,
        )
        with self._lock:
            self._session = session
            is_over = self._is_over.is_set()
        if is_over:
            session.call_off(self._cancelled or "")
        session.run()
        with self._lock:
            self._session = None
        if session.has_lost_track:
            self._connections = 1
        if session.refusal is not None:
            self._check()
            raise self._unwelcome(session.refusal, flight)
        committed()
        if self._done is not None:
            return self._done
        self._check()
        if session.told is not None:
            raise refusal(self.address, session.told)
        outcome = means.inbox.outcomes.get(transfer)
        if isinstance(outcome, Abort):
            raise self._given_up(outcome)
        raise PeerGoneError(f"the connection to {self.address} ended before transfer {transfer} had")

    def _committed(self, committed: Committed, flight: Flight) -> None:
        """It is here: who waits need not wait for the connection's end."""
        if self._done is None:
            self._done = self._report(committed, flight)
            self._means.committed(self._done)
            self._land(None)
            self.handle.resolve(self._done)

    def _unwelcome(self, error: KVStoreError, flight: Flight) -> KVStoreError:
        """Why this side cannot take what it asked for."""
        what = f"the prefix of {flight.path.tokens} tokens that {self.address} has"
        if isinstance(error, PoolError):
            kind = TransferFullError if error.retryable else TransferTooLargeError
            return kind(f"this store has no room for {what}: {error}; give it more memory, or fetch less")
        if isinstance(error, OfferRefusedError) and error.code is AbortCode.STALE_GENERATION:
            return PeerGoneError(f"the last connection for {what} is still at work: {error}")
        if isinstance(error, StoreClosedError):
            return error
        return TransferError(f"{what} could not be taken up: {error}")

    def _given_up(self, abort: Abort) -> KVStoreError:
        """Why this side did not go on with what it had taken up."""
        message = f"the fetch from {self.address} was given up here ({abort.code.name}): {abort.reason}"
        if abort.code is AbortCode.CHECKSUM:
            return ChecksumTransferError(message)
        if abort.code is AbortCode.INVALID:
            return ProtocolError(message)
        return TransferAbortedError(message)

    def _report(self, committed: Committed | None = None, flight: Flight | None = None) -> FetchReport:
        now = time.monotonic()
        report = FetchReport(
            address=self.address,
            tokens=self._shared_tokens if flight is None else flight.path.tokens,
            local_tokens=self._local_tokens(),
            started_s=self.started_s,
            ended_s=now,
            reconnects=self._reconnects,
            is_shared=flight is None and self._shared_tokens > 0,
        )
        if committed is None:
            return report
        return replace(
            report,
            transfer=self._transfer,
            received_bytes=committed.received_bytes,
            received_pieces=committed.received_pieces,
            transfer_s=committed.elapsed_us / 1e6,
        )

    # Ends

    def _forget(self, error: BaseException | None) -> None:
        """Give back what is held for the present question, and make another one."""
        if self._transfer is not None:
            self._means.inbox.give_up(self._transfer, Abort(AbortCode.CANCELLED, "the fetch has ended"))
        is_own = self._cancelled is not None or self._deadline.has_passed or isinstance(error, StoreClosedError)
        self._land(error if isinstance(error, KVStoreError) and not is_own else None)
        self._transfer = None
        self._question = self._means.next_question()

    def _land(self, error: KVStoreError | None) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            self._means.flights.end(flight, error)
