"""Where a node listens: it receives transfers and, if told so, answers what it holds."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, PeerGoneError, TransferError
from kvstore.registry import transport_for
from kvstore.transfer.attachment import ABORT_DEADLINE_S
from kvstore.transfer.egress import Egress
from kvstore.transfer.inbox import Inbox
from kvstore.transfer.link import FrameLink
from kvstore.transfer.serving import Serving, ServingStatistics
from kvstore.transfer.session import LOG, Session
from kvstore.transfer.settings import TransferSettings, new_boot_epoch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc import Connection, Transport
    from kvstore.pool import BasePool
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.inbox import InboxStatistics
    from kvstore.transfer.report import TransferObserver
    from kvstore.transfer.status import IncomingStatus

ACCEPT_DEADLINE_S = 3600.0
"""One wait for a connection; it goes on afterwards, and `close` ends it at once."""
ACCEPT_PAUSE_S = 0.05
"""After an error of the listener itself, such as too many open files."""


class Endpoint:
    """Receives transfers into a pool, and serves it if told so. Any thread may call; a context manager.

    One thread accepts, one serves each connection, one gives up what nobody resumed; all are daemons and
    sleep while nothing happens. Committed resume points appear in the pool like local ones.

    Args:
        pool: where records go; the endpoint does not close it.
        address: where to listen; port 0 lets the system choose.
        transport: pacing and congestion control of the connections.
        settings: deadlines and limits.
        observer: told of each layer's bytes as they arrive.
        serves: let peers ask what the pool holds, and fetch it: another right than sending to it.
        egress: shared with the senders of this node, so that priorities hold among all that leaves it.
        boot_epoch: this run of the node; by default a new random one.
        find_transport: looks the transport up; for tests.

    Raises:
        AddressError: malformed, in use, or of no installed transport.
        UnavailableError: the transport does not work here.
        TransferError: an option has another type, or the system has no thread for it.
    """

    def __init__(
        self,
        pool: BasePool,
        address: str,
        *,
        transport: TransportOptions | None = None,
        settings: TransferSettings | None = None,
        observer: TransferObserver | None = None,
        serves: bool = False,
        egress: Egress | None = None,
        boot_epoch: int | None = None,
        find_transport: Callable[[str], Transport] = transport_for,
    ) -> None:
        if not isinstance(transport, TransportOptions | None):
            raise TransferError(f"transport={transport!r} is no kvstore.TransportOptions; pass one, or None")
        if not isinstance(settings, TransferSettings | None):
            raise TransferError(f"settings={settings!r} is no kvstore.transfer.TransferSettings; pass one, or None")
        self.settings = settings or TransferSettings()
        options = transport or TransportOptions()
        self._lock = threading.Lock()
        self._sessions: dict[Session, threading.Thread] = {}
        self._is_closed = False
        self._accepting = threading.Thread(target=self._accept, name="kvstore-accept", daemon=True)
        with ExitStack() as undo:
            self._listener = find_transport(address).listen(address, options)
            undo.callback(self._listener.close)
            self._inbox = Inbox(pool, self.settings, boot_epoch or new_boot_epoch(), observer)
            undo.callback(self._inbox.close)
            self._serving = Serving(pool, self._inbox, options, egress or Egress()) if serves else None
            try:
                self._accepting.start()
            except RuntimeError as error:
                raise TransferError(
                    f"no thread can be started to listen at {address}: {error}; raise the limit on threads"
                ) from error
            undo.pop_all()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"Endpoint({self.address}, {state}, {self._inbox.active_count} transfers)"

    @property
    def address(self) -> str:
        """Where peers connect, with the real port."""
        return self._listener.address

    @property
    def last_error(self) -> tuple[str, Exception] | None:
        """The last peer that was refused, and why: a mismatch, a broken protocol."""
        return self._inbox.last_error

    @property
    def connection_count(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._sessions)

    @property
    def transfer_count(self) -> int:
        """Transfers that hold a reservation now, with or without a connection."""
        return self._inbox.active_count

    def transfers(self) -> tuple[IncomingStatus, ...]:
        """What is being received, or waits for space, or for its sender to come back; oldest first."""
        return self._inbox.transfers()

    def cancel(self, transfer: TransferId, reason: str = "cancelled at the receiver") -> bool:
        """Give up a transfer that arrives here; what it held is free again.

        Its sender's handle fails with `TransferAbortedError`, which names the reason. The same transfer is refused
        from then on; what it was to bring may come by another one.

        Returns:
            False if there is no such transfer: it is unknown here, or has just been committed or given up.
        """
        return self._inbox.cancel(transfer, reason)

    @property
    def served_count(self) -> int:
        """Transfers that peers fetch from here now; each holds a lease."""
        return 0 if self._serving is None else self._serving.active_count

    def statistics(self) -> InboxStatistics:
        """What has been received and refused so far."""
        return self._inbox.statistics()

    def drain(self, deadline_s: float) -> bool:
        """Take nothing new, and wait for what is being received, at most `deadline_s`.

        New transfers are refused by name, so that their senders go elsewhere; connections are accepted all the same,
        since a transfer whose connection breaks may still be resumed. Follow it with `close`; until then, call it again
        to wait longer.

        Returns:
            Whether every transfer has ended, and its sender has been told how. `close` gives up the rest.
        """
        if not self._inbox.drain(Deadline.after(deadline_s)):
            return False
        with self._lock:
            sessions = list(self._sessions)
        telling = Deadline.after(ABORT_DEADLINE_S)
        for session in sessions:
            session.settle(telling)
        return True

    def serving_statistics(self) -> ServingStatistics:
        """What has been asked and fetched so far."""
        return ServingStatistics() if self._serving is None else self._serving.statistics()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection = self._listener.accept(Deadline.after(ACCEPT_DEADLINE_S))
            except DeadlineError:
                continue
            except PeerGoneError:
                return
            except (KVStoreError, OSError) as error:
                # Whatever became of one connection, the node goes on listening.
                LOG.warning("%s could not accept a connection: %s", self.address, error)
                time.sleep(ACCEPT_PAUSE_S)
                continue
            number += 1
            self._serve(connection, number)

    def _serve(self, connection: Connection, number: int) -> None:
        try:
            link = FrameLink(connection, self.settings.progress_deadline_s)
            session = Session(self._inbox, link, self._serving)
        except (KVStoreError, OSError) as error:
            LOG.warning("%s closed a connection from %s: %s", self.address, connection.peer_address, error)
            connection.close()
            return
        thread = threading.Thread(target=self._run, args=(session,), name=f"kvstore-receive-{number}", daemon=True)
        with self._lock:
            is_refused = self._is_closed or len(self._sessions) >= self.settings.connections_per_node_max
            if not is_refused:
                self._sessions[session] = thread
        if is_refused:
            LOG.warning("%s closed a connection from %s: too many are open", self.address, connection.peer_address)
            connection.close()
            return
        try:
            thread.start()
        except RuntimeError as error:
            LOG.warning("%s closed a connection from %s: %s", self.address, connection.peer_address, error)
            with self._lock:
                del self._sessions[session]
            connection.close()

    def _run(self, session: Session) -> None:
        try:
            session.run()
        finally:
            with self._lock:
                self._sessions.pop(session, None)

    def close(self) -> None:
        """Abort what is being received, end every connection and thread, free the address. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            sessions = dict(self._sessions)
        self._listener.close()
        self._accepting.join()
        if self._serving is not None:
            self._serving.close()
        self._inbox.stop_taking()
        for session in sessions:
            session.abort("the node is closing")
        deadline = Deadline.after(ABORT_DEADLINE_S)
        for session in sessions:
            session.ended.wait(deadline.remaining_s())
        for session, thread in sessions.items():
            session.close()
            if thread.is_alive():
                thread.join(self.settings.progress_deadline_s)
        self._inbox.close()
