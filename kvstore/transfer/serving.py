"""The answering side of remote match and fetch: what this node has of a prompt, and sending it to who asked."""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, LeaseGoneError, PoolError, StoreClosedError, TransferError
from kvstore.limits import TRANSFER_DEADLINE_MAX_S
from kvstore.transfer.callback import CallbackConnector, JoinCall
from kvstore.transfer.frames import TransferId
from kvstore.transfer.inbox import OfferRefusedError
from kvstore.transfer.messages import AbortCode
from kvstore.transfer.outgoing_transfer import OutgoingTransfer
from kvstore.transfer.query import Candidates, RemoteCandidate
from kvstore.transfer.source import LeaseSource, check_source
from kvstore.transfer.workers import Workers

if TYPE_CHECKING:
    from kvstore.abc import TransportOptions
    from kvstore.pool import BaseHold, BasePool, Candidate, Prompt
    from kvstore.spec import ChunkGrid, Shard
    from kvstore.transfer.egress import Egress
    from kvstore.transfer.inbox import Inbox
    from kvstore.transfer.query import Fetch, Query

LOG = logging.getLogger("kvstore.transfer")

LOAD_WAIT_FRACTION = 0.4
"""Share of the time without any byte that a peer bears, for which a fetch waits for what is being loaded."""


@dataclass(frozen=True, eq=False)
class Question:
    """One question of a requester, kept until its connection asks another one.

    Attributes:
        identity: the requester's name for it; its FETCH carries the same.
        prompt: with the keys that this node computed.
        shard, grid: what is asked for.
        candidates_max: the most candidates of an answer.
    """

    identity: TransferId
    prompt: Prompt
    shard: Shard
    grid: ChunkGrid | None
    candidates_max: int


@dataclass
class ServingStatistics:
    """Counters of one endpoint; they only grow.

    Attributes:
        queries, hits: questions, and those that were no miss.
        fetches: transfers that were begun because they were asked for.
        served, failed: how they ended.
        sent_bytes: piece bytes of those that were committed.
    """

    queries: int = 0
    hits: int = 0
    fetches: int = 0
    served: int = 0
    failed: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Served:
    """A transfer that is being served.

    Attributes:
        transfer: holds the lease.
        connector: gets the requester's connections.
    """

    transfer: OutgoingTransfer
    connector: CallbackConnector


class Serving:
    """What an endpoint's sessions share to answer questions. Any thread.

    A lease is held only while a fetch is served. Such a transfer counts in the node's and the peer's limits like one
    that arrives here, and ends when the requester does not call back after a break.

    Args:
        pool: what is asked about.
        inbox: the node's settings and limits, and its boot epoch, which names the transfers that are begun here.
        options: of the listener: its pace bounds the frames.
        egress: shared with whatever else leaves this node.
    """

    def __init__(self, pool: BasePool, inbox: Inbox, options: TransportOptions, egress: Egress) -> None:
        self._pool = pool
        self._inbox = inbox
        self._options = options
        self._egress = egress
        self._workers = Workers()
        self._lock = threading.Lock()
        self._counter = count(1)
        self._served: dict[TransferId, Served] = {}
        self._statistics = ServingStatistics()
        self._is_closed = False

    def statistics(self) -> ServingStatistics:
        """A copy of the counters."""
        with self._lock:
            return ServingStatistics(**vars(self._statistics))

    @property
    def active_count(self) -> int:
        """Transfers that are being served now; each holds a lease."""
        with self._lock:
            return len(self._served)

    def understand(self, identity: TransferId, query: Query) -> Question:
        """Compute the keys of a question.

        Raises:
            SpecError: the model cannot be split so. TokenError: the prompt is none.
        """
        for group in self._pool.spec.groups:
            group.units_read_by(query.shard)
        return Question(identity, query.prompt(self._pool.spec), query.shard, query.grid, query.candidates_max)

    def candidates(self, question: Question) -> Candidates:
        """What is there now.

        Raises:
            StoreClosedError: the pool is closed.
        """
        found = self._pool.match(question.prompt, shard=question.shard, grid=question.grid)
        candidates = found.candidates[: question.candidates_max]
        with self._lock:
            self._statistics.queries += 1
            self._statistics.hits += bool(candidates)
        # Records in a pool with views lie in memory, and can leave at once.
        listed = tuple(RemoteCandidate(each.tokens, each.tier, each.size_bytes) for each in candidates)
        return Candidates(listed, found.pending_tokens)

    def resume(self, identity: TransferId) -> Served | None:
        """The transfer that a question has led to already."""
        with self._lock:
            return self._served.get(identity)

    def begin(self, question: Question, fetch: Fetch, address: str) -> Served:
        """Hold a resume point and begin to send it, over the connections that the requester opens.

        Raises:
            LeaseGoneError: it is not there, or not any more.
            OfferRefusedError: a limit, or the requester asks for what cannot be sent.
            StoreClosedError: closing.
        """
        with ExitStack() as undo:
            self._inbox.take_place(question.identity)
            undo.callback(self._inbox.give_place, question.identity)
            hold = self._hold(question, fetch.tokens)
            undo.callback(hold.release)
            served = self._send(hold, question, fetch, address)
            undo.pop_all()
            return served

    def _hold(self, question: Question, tokens: int) -> BaseHold:
        """What lies in another tier is loaded first, no longer than the requester bears silence; it asks again then."""
        candidate = self._candidate(question, tokens)
        wait_s = self._inbox.settings.progress_deadline_s * LOAD_WAIT_FRACTION
        try:
            return self._pool.hold(
                candidate.path, shard=question.shard, grid=question.grid, deadline=Deadline.after(wait_s)
            )
        except DeadlineError as error:
            raise OfferRefusedError(AbortCode.UNKNOWN_TRANSFER, str(error)) from error
        except PoolError as error:
            raise OfferRefusedError(AbortCode.LIMIT, str(error)) from error

    def _candidate(self, question: Question, tokens: int) -> Candidate:
        found = self._pool.match(question.prompt, shard=question.shard, grid=question.grid)
        for candidate in found.candidates:
            if candidate.tokens == tokens:
                return candidate
        raise LeaseGoneError(f"no resume point of {tokens} tokens is here any more")

    def _send(self, hold: BaseHold, question: Question, fetch: Fetch, address: str) -> Served:
        own = self._inbox.settings
        settings = replace(own, connections=min(fetch.connections, own.connections or fetch.connections))
        source = LeaseSource(hold)
        connector = CallbackConnector(address, settings.progress_deadline_s)
        try:
            check_source(source)
            transfer = OutgoingTransfer(
                TransferId(self._inbox.boot_epoch, next(self._counter)),
                source,
                self._pool.spec,
                connector,
                self._options,
                settings,
                total_deadline_s=min(fetch.total_deadline_ms / 1000, TRANSFER_DEADLINE_MAX_S),
                priority=fetch.priority,
                observer=None,
                workers=self._workers,
                traffic=self._egress.traffic,
                link=self._egress.links.link(_host_of(address)),
                on_end=lambda ended: self._ended(question.identity, ended),
            )
        except TransferError as error:
            raise OfferRefusedError(AbortCode.INVALID, str(error)) from error
        served = Served(transfer, connector)
        with self._lock:
            if self._is_closed:
                raise StoreClosedError("the node is closing")
            self._served[question.identity] = served
            self._statistics.fetches += 1
        try:
            source.start(transfer)
            with self._lock:
                # A `close` between the two locks has cancelled it, and does not wait for what has not begun.
                if self._is_closed:
                    raise StoreClosedError("the node is closing")
                transfer.start()
        except BaseException as error:
            with self._lock:
                self._served.pop(question.identity, None)
            connector.close()
            if isinstance(error, TransferError):
                raise OfferRefusedError(AbortCode.LIMIT, str(error)) from error
            raise
        return served

    def _ended(self, identity: TransferId, transfer: OutgoingTransfer) -> None:
        report = transfer.report
        with self._lock:
            served = self._served.pop(identity, None)
            if served is None:
                return
            self._statistics.served += report is not None
            self._statistics.failed += report is None
            self._statistics.sent_bytes += 0 if report is None else report.total_bytes
        served.connector.close()
        _log_end(transfer)
        self._inbox.give_place(identity)

    def admit(
        self, peer_epoch: int, transfer: TransferId, generation: int, deadline: Deadline
    ) -> tuple[CallbackConnector, JoinCall] | None:
        """A place for a further connection of a transfer that is being served, or None.

        The node's transfers and their generations are easily guessed; whose they are, only the requester's epoch says.
        """
        with self._lock:
            served = next(
                (
                    each
                    for question, each in self._served.items()
                    if question.epoch == peer_epoch and each.transfer.transfer == transfer
                ),
                None,
            )
        if served is None:
            return None
        call = served.connector.admit(generation, deadline)
        return None if call is None else (served.connector, call)

    def close(self) -> None:
        """Give up what is being served. Idempotent; the transfers' threads end soon."""
        with self._lock:
            self._is_closed = True
            running = list(self._served.values())
        for served in running:
            served.transfer.cancel("the node is closing", AbortCode.CLOSING)
            served.connector.stop_waiting()
        for served in running:
            served.transfer.join(self._inbox.settings.progress_deadline_s)
            served.connector.close()
        self._workers.close()


def _log_end(transfer: OutgoingTransfer) -> None:
    """One line for each fetch that ends."""
    if not LOG.isEnabledFor(logging.INFO):
        return
    report, peer = transfer.report, transfer.address
    fields: dict[str, object] = {"transfer": str(transfer.transfer), "peer": peer}
    if report is not None:
        outcome = "served"
        fields |= {"bytes": report.total_bytes, "seconds": round(report.committed_s - report.started_s, 6)}
    else:
        outcome = "failed"
        fields |= {"error": type(transfer.error).__name__, "reason": str(transfer.error)}
    LOG.info(
        "fetch %s by %s %s", transfer.transfer, peer, outcome, extra={"fields": {"event": f"fetch_{outcome}", **fields}}
    )


def _host_of(address: str) -> str:
    """A requester without its port, which another connection of it does not have."""
    host, _, port = address.rpartition(":")
    return host if port.isdecimal() else address
