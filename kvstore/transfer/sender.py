"""The sending side of a node."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.abc import TransportOptions
from kvstore.errors import StoreClosedError, TransferError
from kvstore.limits import TRANSFER_DEADLINE_MAX_S, TRANSFER_PRIORITY_DEFAULT, TRANSFER_PRIORITY_MAX
from kvstore.pool import HandOver
from kvstore.registry import transport_for
from kvstore.transfer.connector import Dialer
from kvstore.transfer.egress import Egress
from kvstore.transfer.frames import TransferId
from kvstore.transfer.idle_links import IdleLinks
from kvstore.transfer.outgoing_transfer import OutgoingTransfer
from kvstore.transfer.settings import TransferSettings, new_boot_epoch
from kvstore.transfer.source import LeaseSource, WriterSource, check_source
from kvstore.transfer.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc import Transport
    from kvstore.handle import Handle
    from kvstore.pool import BaseHold
    from kvstore.store.lease import Lease
    from kvstore.store.writer import Writer
    from kvstore.transfer.report import TransferObserver, TransferReport
    from kvstore.transfer.snapshots import OutgoingSnapshot
    from kvstore.transfer.source import Source
    from kvstore.transfer.telemetry import LinkSnapshot

CLOSE_DEADLINE_S = 10.0
"""How long `close` waits for transfers that it has cancelled; their own waits are shorter by default."""


@dataclass
class SenderStatistics:
    """Counters of one sender; they only grow.

    Attributes:
        committed, failed: transfers by how they ended; cancelled ones have failed.
        sent_bytes: piece bytes of committed transfers.
        sent_s: seconds of committed transfers, each from `send` to the acknowledged commit.
        exposed_s: seconds that they added after their producers had finished.
    """

    committed: int = 0
    failed: int = 0
    sent_bytes: int = 0
    sent_s: float = 0.0
    exposed_s: float = 0.0


class Sender:
    """Begins transfers to other nodes. Any thread may call.

    Each transfer has two threads while it runs, and one more for each further connection. A connection stays open
    for a moment after its transfer, and serves the next one to the same address with the same options.

    Args:
        settings: deadlines and limits.
        boot_epoch: this run of the node; by default a new random one.
        egress: shared with other senders and endpoints of this node.
    """

    def __init__(
        self,
        *,
        settings: TransferSettings | None = None,
        boot_epoch: int | None = None,
        egress: Egress | None = None,
    ) -> None:
        self.settings = settings or TransferSettings()
        self.egress = egress or Egress()
        self.boot_epoch = boot_epoch or new_boot_epoch()
        self._lock = threading.Lock()
        self._begun_count = 0
        self._transfers: set[OutgoingTransfer] = set()
        self._statistics = SenderStatistics()
        self._idle = IdleLinks()
        self._workers = Workers()
        self._is_closed = False

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Sender({len(self._transfers)} transfers)"

    @property
    def transfer_count(self) -> int:
        """Transfers that are being sent now."""
        with self._lock:
            return len(self._transfers)

    def statistics(self) -> SenderStatistics:
        """What has been sent so far."""
        with self._lock:
            return SenderStatistics(**vars(self._statistics))

    def send(
        self,
        source: Source,
        address: str,
        *,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
        resume: tuple[int, int] | None = None,
        find_transport: Callable[[str], Transport] = transport_for,
    ) -> Handle[TransferReport]:
        """Move a resume point to the node that listens at `address`. Returns at once.

        Args:
            source: what to send; the transfer closes it, also when this raises.
            address: where the receiver listens, `tcp://host:port`.
            transport: pacing and congestion control of the connection.
            total_deadline_s: when to give up, at most an hour; by default from the bytes and the least rate.
            priority: 0 (first) to 255: whose turn it is among this sender's transfers, and at a receiver whose
                turn it is to get space. Above the default it is background, and sends little at a time.
            observer: told of each layer's bytes as they leave.
            resume: takes up a transfer of this sender that failed with `PeerGoneError`, whose `transfer` this is: all
                else must be as it was then. What has arrived does not cross again while the receiver keeps it (its
                resume window); when it has given it up, the handle fails with `TransferAbortedError`, and the same
                is sent anew without an id.
            find_transport: looks the transport up; for tests.

        Returns:
            A handle whose result is the report. It fails with `TransferFullError` (no room there;
            `TransferTooLargeError` if there never will be),
            `PeerMismatchError`, `PeerGoneError` (dead, or silent for the no-progress deadline),
            `TransferAbortedError` (either side gave up) or another `TransferError`. `cancel` aborts.

        Raises:
            TransferError: nothing to send, too many transfers at once, a priority or total deadline beyond its
                limit, an option of another type, a transfer to resume that is running or not this sender's, or the
                system has no thread for it. StoreClosedError: closed.
            WriteError: what writes the source has ended.
            AddressError, UnavailableError: no transport for this address.
        """
        try:
            check_source(source)
            check_options(transport, priority, total_deadline_s)
            options = transport or TransportOptions()
            connector = Dialer(
                find_transport(address), address, options, source.spec, self.boot_epoch, self.settings, self._idle
            )
            transfer = OutgoingTransfer(
                self._next_id() if resume is None else self._own_id(resume),
                source,
                source.spec,
                connector,
                options,
                self.settings,
                total_deadline_s=total_deadline_s,
                priority=priority,
                workers=self._workers,
                traffic=self.egress.traffic,
                observer=observer,
                link=self.egress.links.link(address),
                on_end=self._ended,
                is_resumed=resume is not None,
            )
            with self._lock:
                self._check_open()
                limit = self.settings.transfers_per_node_max
                if len(self._transfers) >= limit:
                    raise TransferError(f"{limit} transfers are being sent already, the most; wait for one to end")
                if any(other.transfer == transfer.transfer for other in self._transfers):
                    raise TransferError(f"transfer {transfer.transfer} is still running; wait for it to end")
                self._transfers.add(transfer)
            try:
                source.start(transfer)
                with self._lock:
                    # A `close` between the two locks has cancelled it, and does not wait for what has not begun.
                    self._check_open()
                    transfer.start()
            except BaseException:
                self._ended(transfer)
                raise
        except BaseException:
            source.close()
            raise
        return transfer.handle

    def _next_id(self) -> TransferId:
        with self._lock:
            self._begun_count += 1
            return TransferId(self.boot_epoch, self._begun_count)

    def _own_id(self, resume: tuple[int, int]) -> TransferId:
        if not (isinstance(resume, tuple) and [type(part) for part in resume] == [int, int]):
            raise TransferError(f"resume={resume!r} is no transfer id; pass `PeerGoneError.transfer`, or None")
        transfer = TransferId(*resume)
        if transfer.epoch != self.boot_epoch or not 0 < transfer.counter <= self._begun_count:
            raise TransferError(
                f"transfer {transfer} cannot be resumed: another sender began it, or an earlier run; send it anew"
            )
        return transfer

    def links(self) -> tuple[LinkSnapshot, ...]:
        """How the links to this sender's peers are doing, the one used last at the end: values for a scheduler."""
        return self.egress.links.snapshot()

    def transfers(self) -> tuple[OutgoingSnapshot, ...]:
        """What is being sent now, oldest first."""
        with self._lock:
            running = sorted(self._transfers, key=lambda transfer: transfer.transfer)
        return tuple(transfer.snapshot() for transfer in running)

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError("this sender was closed; open the store again")

    def _ended(self, transfer: OutgoingTransfer) -> None:
        with self._lock:
            if transfer not in self._transfers:
                return
            self._transfers.remove(transfer)
            report = transfer.report
            if report is None:
                self._statistics.failed += 1
                return
            self._statistics.committed += 1
            self._statistics.sent_bytes += report.total_bytes
            self._statistics.sent_s += report.seconds
            self._statistics.exposed_s += report.exposed_s

    def close(self) -> None:
        """Cancel what is running, wait until its threads have ended, and close every connection. Idempotent."""
        with self._lock:
            self._is_closed = True
            running = list(self._transfers)
        for transfer in running:
            transfer.cancel("the store is closing")
        for transfer in running:
            transfer.join(CLOSE_DEADLINE_S)
        self._idle.close()
        self._workers.close()


def check_options(
    transport: TransportOptions | None,
    priority: int,
    total_deadline_s: float | None,
    *,
    deadline_name: str = "total_deadline_s",
) -> None:
    """Raises `TransferError` for a value that an offer cannot carry, or of another type."""
    if not isinstance(transport, TransportOptions | None):
        raise TransferError(f"transport={transport!r} is no kvstore.TransportOptions; pass one, or None")
    if transport is not None and not isinstance(transport.local_addresses, tuple):
        raise TransferError(f"local_addresses={transport.local_addresses!r} is no tuple of addresses; pass one")
    if not isinstance(priority, int) or not 0 <= priority <= TRANSFER_PRIORITY_MAX:
        raise TransferError(
            f"priority={priority!r} is no whole number from 0 (first) to {TRANSFER_PRIORITY_MAX} (last); give one"
        )
    if total_deadline_s is None:
        return
    if not isinstance(total_deadline_s, int | float) or not total_deadline_s > 0:
        raise TransferError(f"{deadline_name}={total_deadline_s!r} is no positive number of seconds; give one")
    if total_deadline_s > TRANSFER_DEADLINE_MAX_S:
        raise TransferError(
            f"{deadline_name}={total_deadline_s} is more than receivers keep a transfer for, "
            f"{TRANSFER_DEADLINE_MAX_S:g} s; give less, or send less at once"
        )


def send_lease(
    lease: Lease | BaseHold,
    address: str,
    *,
    handover: HandOver | None = None,
    transport: TransportOptions | None = None,
    total_deadline_s: float | None = None,
    priority: int = TRANSFER_PRIORITY_DEFAULT,
    observer: TransferObserver | None = None,
    resume: tuple[int, int] | None = None,
    sender: Sender | None = None,
    find_transport: Callable[[str], Transport] = transport_for,
) -> Handle[TransferReport]:
    """Send a resume point that this node has; results, errors and further arguments are those of `Sender.send`.

    Args:
        lease: taken over: the transfer releases it, also when this raises.
        address: where the receiver listens.
        handover: makes it a hand-over: the receiver's process decodes on.
        sender: whose transfer it is; by default one of the process.
    """
    try:
        if not isinstance(handover, HandOver | None):
            raise TransferError(f"handover={handover!r} is no kvstore.HandOver; pass one, or None")
        source = LeaseSource(lease, handover)
    except BaseException:
        lease.release()
        raise
    return (sender or process_sender()).send(
        source,
        address,
        transport=transport,
        total_deadline_s=total_deadline_s,
        priority=priority,
        observer=observer,
        resume=resume,
        find_transport=find_transport,
    )


def send_writer(
    writer: Writer,
    address: str,
    *,
    is_transient: bool = False,
    transport: TransportOptions | None = None,
    total_deadline_s: float | None = None,
    priority: int = TRANSFER_PRIORITY_DEFAULT,
    observer: TransferObserver | None = None,
    sender: Sender | None = None,
    find_transport: Callable[[str], Transport] = transport_for,
) -> Handle[TransferReport]:
    """Send a prompt's cache while it is written; it is committed there after it was committed here.

    Further arguments are those of `Sender.send`.

    Args:
        writer: still open; its pieces leave as they become whole.
        address: where the receiver listens.
        is_transient: at the receiver the prompt's tail disappears once its hand-over was claimed.
        sender: whose transfer it is; by default one of the process.

    Raises:
        WriteError: the writer has ended. Otherwise as `Sender.send`.
    """
    source = WriterSource(writer, is_transient=is_transient)
    return (sender or process_sender()).send(
        source,
        address,
        transport=transport,
        total_deadline_s=total_deadline_s,
        priority=priority,
        observer=observer,
        find_transport=find_transport,
    )


_process_sender: tuple[int, Sender] | None = None
_process_lock = threading.Lock()


def process_sender() -> Sender:
    """The sender of this process, for callers that have none of their own."""
    global _process_sender
    with _process_lock:
        # A forked child has neither the parent's threads nor its connections.
        if _process_sender is None or _process_sender[0] != os.getpid():
            _process_sender = (os.getpid(), Sender())
        return _process_sender[1]
