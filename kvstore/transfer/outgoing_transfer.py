"""One transfer, from the sender's side: its state, its thread, its reconnects."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from kvstore._native import StopFlag, TrafficFlow
from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    KVStoreError,
    PeerGoneError,
    ProtocolError,
    TransferAbortedError,
    TransferError,
    TransportError,
)
from kvstore.handle import Handle, Progress
from kvstore.limits import TRANSFER_PRIORITY_DEFAULT
from kvstore.transfer.attachment import Attachment
from kvstore.transfer.messages import Abort, AbortCode, Committed
from kvstore.transfer.offer import Offer, OfferFlag, offer_rows
from kvstore.transfer.outgoing import Outgoing
from kvstore.transfer.path_watch import PathWatch
from kvstore.transfer.pieces import observe_layers
from kvstore.transfer.report import TransferReport
from kvstore.transfer.snapshots import OutgoingSnapshot, TransferState
from kvstore.transfer.tracing import NoSpan, begin_span

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore._native import Traffic
    from kvstore.abc import TransportOptions
    from kvstore.pool import HandOver
    from kvstore.spec import ModelSpec
    from kvstore.transfer.connector import Connector
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.report import TransferObserver
    from kvstore.transfer.settings import TransferSettings
    from kvstore.transfer.source import Costs, Ids, Source
    from kvstore.transfer.telemetry import Link
    from kvstore.transfer.tracing import TransferSpan
    from kvstore.transfer.workers import Task, Workers

LOG = logging.getLogger("kvstore.transfer")
BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Pauses before reconnecting; the last one repeats."""
PROTOCOL_FAULTS_MAX = 3
"""Connections of one transfer that may end with a damaged frame before the transfer does."""


class OutgoingTransfer:
    """Sends one source until the receiver has committed it, over as many connections as that takes.

    Its own thread runs it. Others report through the source's listener methods, `cancel` and `join`.
    Everything below `changed` is guarded by it.
    """

    def __init__(
        self,
        transfer: TransferId,
        source: Source,
        spec: ModelSpec,
        connector: Connector,
        options: TransportOptions,
        settings: TransferSettings,
        *,
        total_deadline_s: float | None,
        priority: int,
        workers: Workers,
        traffic: Traffic,
        observer: TransferObserver | None,
        link: Link,
        on_end: Callable[[OutgoingTransfer], None],
        is_resumed: bool = False,
    ) -> None:
        self.transfer = transfer
        self.source = source
        self.spec = spec
        self.connector = connector
        self.address = address = connector.address
        self.options = options
        self.settings = settings
        self.observer = observer
        self.path = PathWatch(link, options, settings, connector.route_count)
        self.handle: Handle[TransferReport] = Handle(f"transfer {transfer} to {address}", self.cancel, self._progress)
        if total_deadline_s is None:
            total_deadline_s = settings.total_deadline_s(source.total_bytes, is_complete=source.is_complete)
        self.started_s = time.monotonic()
        self.deadline = Deadline(self.started_s + total_deadline_s)
        self._total_deadline_s = total_deadline_s
        self._on_end = on_end
        rows, grids = offer_rows(source.table)
        flags = OfferFlag.HANDOVER if source.is_transient else OfferFlag(0)
        flags |= OfferFlag.SPARSE if source.path.sparse else OfferFlag(0)
        self.offer = Offer(
            path=source.path,
            salt=source.salt,
            resume_tokens=source.resume_tokens,
            grids=grids,
            records=rows,
            total_bytes=source.total_bytes,
            total_deadline_ms=max(1, round(total_deadline_s * 1000)),
            priority=priority,
            flags=flags | (OfferFlag.COMPLETE if source.is_complete else OfferFlag(0)),
        )
        self.offer_payload = self.offer.pack()

        self.changed = threading.Condition()
        self.change_count = 0
        self.stop = StopFlag()
        """Set to have native code return to where everything below is looked at."""
        self.outgoing = Outgoing(source)
        if is_resumed:
            self.outgoing.resume()
        is_paced = options.pacing_bytes_per_s is not None
        self.flow = TrafficFlow(traffic, priority, priority > TRANSFER_PRIORITY_DEFAULT, is_paced, address)
        self.state = TransferState.CONNECTING
        self.handover: HandOver | None = None
        self.producer_finished_s: float | None = None
        self.failure: str | None = None
        self.cancelled: str | None = None
        self._cancel_code = AbortCode.CANCELLED
        self.report: TransferReport | None = None
        self.error: BaseException | None = None
        """Set once it has been committed."""
        self._pieces_again = 0
        self._pieces_wanted: int | None = None
        self._first_byte_s: float | None = None
        self._last_byte_s: float | None = None
        self._is_one_sided = False
        self.is_native = False
        self._span: TransferSpan = NoSpan()
        self.workers = workers
        self._task: Task | None = None

    def start(self) -> None:
        """Raises `TransferError` if the system has no thread for it; nothing runs then."""
        self._span = begin_span(self.transfer, self.address, self.source.total_bytes, self.source.path.tokens)
        try:
            self._task = self.workers.run(self._run, f"kvstore-send-{self.transfer.counter}")
        except RuntimeError as error:
            self._span.failed(error)
            raise TransferError(
                f"no thread can be started for transfer {self.transfer}: {error}; send fewer at once, or raise the "
                "limit on threads"
            ) from error

    def join(self, deadline_s: float) -> None:
        """Wait until its thread has ended; at once if that never began."""
        if self._task is not None:
            self._task.wait(deadline_s)

    def cancel(self, reason: str, code: AbortCode = AbortCode.CANCELLED) -> None:
        """Give the transfer up; it then ends with `TransferAbortedError`. The code tells the receiver what to do."""
        with self.changed:
            if self.cancelled is None:
                self.cancelled, self._cancel_code = reason, code
            self.stop.set()
            self.notify()

    def snapshot(self) -> OutgoingSnapshot:
        """What it is doing, and how far it has come. Any thread."""
        with self.changed:
            total_bytes = self.offer.total_bytes
            is_answered = self._pieces_wanted is not None
            return OutgoingSnapshot(
                transfer=self.transfer,
                peer_address=self.address,
                priority=self.offer.priority,
                state=self.state,
                sent_bytes=total_bytes - self.outgoing.departures.left_bytes if is_answered else 0,
                total_bytes=total_bytes,
                began_s=self.started_s,
                prompt_tokens=self.source.path.tokens,
            )

    def _progress(self) -> Progress:
        snapshot = self.snapshot()
        return Progress(snapshot.sent_bytes, snapshot.total_bytes, snapshot.state)

    def notify(self) -> None:
        """Something has changed. Call with `changed` held."""
        self.change_count += 1
        self.changed.notify_all()

    # Reports of the source, from any thread

    def pieces_whole(self, record: int, pieces: Ids) -> None:
        with self.changed:
            self.outgoing.pieces_whole(record, pieces)
            self.notify()

    def record_sealed(self, record: int, cost_us: int) -> None:
        with self.changed:
            self.outgoing.record_sealed(record, cost_us)
            self.notify()

    def records_complete(self, first: int, costs_us: Costs) -> None:
        with self.changed:
            self.outgoing.records_complete(first, costs_us)
            self.notify()

    def finished(self, handover: HandOver | None) -> None:
        with self.changed:
            if self.producer_finished_s is None:
                self.producer_finished_s = time.monotonic()
                self.handover = handover
            self.notify()

    def failed(self, reason: str) -> None:
        with self.changed:
            if self.producer_finished_s is None:
                self.failure = self.failure or reason
            self.notify()

    def check_source(self) -> bool:
        """Whether what was sent until now was what was offered; otherwise the transfer is given up."""
        try:
            self.source.check()
        except KVStoreError as error:
            with self.changed:
                self.failure = self.failure or str(error)
                self.notify()
            return False
        return True

    # Reports of an attachment, in this transfer's thread

    def wanted(self, pieces: int, *, is_again: bool, is_one_sided: bool) -> None:
        """The receiver has said how many pieces it lacks."""
        self._is_one_sided = is_one_sided
        if is_again:
            self._pieces_again += pieces
        elif self._pieces_wanted is None:
            self._pieces_wanted = pieces

    def sent(self, first_s: float, last_s: float) -> None:
        """DATA frames have left, the first and the last of them at these times. Any thread."""
        with self.changed:
            self._first_byte_s = min(self._first_byte_s or first_s, first_s)
            self._last_byte_s = max(self._last_byte_s or last_s, last_s)

    def observe(self, parts: list[tuple[int, Ids]], start_s: float, end_s: float) -> None:
        """Tell the observer of a frame's pieces. Any thread."""
        if self.observer is not None:
            for record, ids in parts:
                layout = self.source.table.layout(record)
                observe_layers(self.observer.piece_sent, layout, ids, start_s, end_s)

    # The thread

    def _run(self) -> None:
        try:
            self.report = report = self._send()
        except BaseException as error:
            if isinstance(error, PeerGoneError):
                error.transfer = self.transfer
            self.error = error
            self.path.end(None)
            self._end()
            self._span.failed(error)
            self.handle.fail(error)
        else:
            self.path.end(report)
            self._end()
            self._span.committed(report)
            self.handle.resolve(report)

    def _end(self) -> None:
        """Memory and place are given back before the handle says so, which it does whatever becomes of this."""
        for give_back in (self.source.close, lambda: self._on_end(self)):
            try:
                give_back()
            except Exception:
                # How the transfer went is decided; this is a fault of something that follows the pool's changes.
                LOG.exception("transfer %s to %s has ended, and then something failed", self.transfer, self.address)

    def _send(self) -> TransferReport:
        faults = 0
        connections = 0
        alive_s: float | None = None
        may_reuse = True
        while True:
            self.state = TransferState.CONNECTING
            attachment = Attachment(self, may_reuse=may_reuse)
            may_reuse = False
            try:
                committed = attachment.run()
                return self._report(committed, connections)
            except ProtocolError:
                faults += 1
                if faults > PROTOCOL_FAULTS_MAX:
                    raise
            except (PeerGoneError, DeadlineError, TransportError) as error:
                if attachment.may_have_been_dead:
                    continue  # An earlier transfer left the connection; the peer may well be there.
                if attachment.heard_s is None and alive_s is None:
                    raise
                last_s = max(attachment.heard_s or 0.0, alive_s or 0.0)
                if time.monotonic() + BACKOFF_S[0] >= last_s + self.settings.progress_deadline_s:
                    raise PeerGoneError(
                        f"transfer {self.transfer} to {self.address} failed: nothing was heard of the peer for "
                        f"{self.settings.progress_deadline_s:g} s; last error: {error}"
                    ) from error
            finally:
                attachment.close()
            if attachment.heard_s is not None:
                alive_s = max(alive_s or 0.0, attachment.heard_s)
            self._pause(BACKOFF_S[min(connections, len(BACKOFF_S) - 1)])
            connections += 1

    def _pause(self, seconds: float) -> None:
        """Wait before the next connection, unless the transfer is over by then."""
        with self.changed:
            self.changed.wait_for(self.must_end, seconds)
            ending = self.ending()
        if ending is not None:
            # The receiver keeps its reservation for a while; it is told when it can be reached at once.
            Attachment(self, may_reuse=False).deliver_abort(ending)
            raise self.aborted(ending)

    def must_end(self) -> bool:
        """Whether the transfer is to be given up. Call with `changed` held."""
        return self.cancelled is not None or self.failure is not None or self.deadline.has_passed

    def ending(self) -> Abort | None:
        """Why it is to be given up, or None. Call with `changed` held."""
        if self.cancelled is not None:
            return Abort(self._cancel_code, self.cancelled)
        if self.failure is not None:
            return Abort(AbortCode.SOURCE, f"the records to send are not there any more: {self.failure}")
        if self.deadline.has_passed:
            return Abort(
                AbortCode.DEADLINE, f"it did not end within its total deadline of {self._total_deadline_s:g} s"
            )
        return None

    def aborted(self, abort: Abort) -> KVStoreError:
        """The error that this side's own abort ends with."""
        return TransferAbortedError(f"transfer {self.transfer} to {self.address} was given up: {abort.reason}")

    def _report(self, committed: Committed, reconnects: int) -> TransferReport:
        now = time.monotonic()
        offered = int(self.source.table.by_layout(len(layout.pieces) for layout in self.source.table.layouts).sum())
        wanted = self._pieces_wanted or 0
        names = [group.name for group in self.spec.groups]
        if self.producer_finished_s is None:
            raise TransferError(f"{self.address} has committed transfer {self.transfer}, which this side never did")
        return TransferReport(
            transfer=self.transfer,
            peer_address=self.address,
            tokens=self.source.path.tokens,
            bytes_by_group={**dict.fromkeys(names, 0), **self.outgoing.bytes_by_group()},
            pieces=self.outgoing.pieces_sent,
            pieces_skipped=offered - wanted,
            pieces_again=self._pieces_again,
            reconnects=reconnects,
            is_one_sided=self._is_one_sided,
            is_native=self.is_native,
            started_s=self.started_s,
            first_byte_s=self._first_byte_s,
            last_byte_s=self._last_byte_s,
            producer_finished_s=self.producer_finished_s,
            committed_s=now,
            path=self.path.report(),
        )
