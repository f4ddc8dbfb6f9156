"""The process that owns a pool lets others on the host use it."""

from __future__ import annotations

import os
import secrets
import select
import threading
from typing import TYPE_CHECKING

from kvstore.attached.peer import peer_of
from kvstore.attached.session import Session, refuse
from kvstore.attached.socket_path import ListeningSocket
from kvstore.errors import AttachError
from kvstore.limits import ATTACHED_PROCESSES_MAX, ATTACHED_SILENCE_S

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable

    from kvstore.attached.requests import Arena
    from kvstore.attached.session import SessionState
    from kvstore.pool import Pool

JOIN_DEADLINE_S = 10.0
RETRY_S = 0.1


class Owner:
    """Serves a pool over a Unix socket. Any thread may call; close it before the pool.

    Args:
        pool: what is served.
        arena: the pool's tier, whose memory is mapped by the attached processes.
        path: of the socket.
        allow_uids: users that may attach besides this process's own and root. They can read and write the arena.
        silence_s: a process that is silent for longer loses its leases and writers.
        verify: recompute the checksum of every piece that another process wrote before it is committed.

    Attributes:
        boot_epoch: random number of this run, never 0.

    Raises:
        AttachError: another owner serves the path, or it cannot be used.
    """

    def __init__(
        self,
        pool: Pool,
        arena: Arena,
        path: str,
        *,
        allow_uids: Iterable[int] = (),
        silence_s: float = ATTACHED_SILENCE_S,
        verify: bool = False,
    ) -> None:
        self.boot_epoch = secrets.randbelow((1 << 64) - 1) + 1
        self.silence_s = silence_s
        self.verify = verify
        self._pool = pool
        self._arena = arena
        self._uids = frozenset((os.geteuid(), 0, *allow_uids))
        self._lock = threading.Lock()
        self._sessions: set[Session] = set()
        self._is_closed = False
        self._listening = ListeningSocket(path, is_open_to_all=bool(self._uids - {os.geteuid(), 0}))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._accept, name="kvstore-owner", daemon=True)
        pool.subscribe(self._changed)
        self._thread.start()

    @property
    def path(self) -> str:
        """Where processes attach."""
        return self._listening.path

    def processes(self) -> list[SessionState]:
        """The attached processes, and those that are gone but may still write."""
        with self._lock:
            return [session.state for session in self._sessions]

    def _changed(self) -> None:
        with self._lock:
            sessions = tuple(self._sessions)
        for session in sessions:
            session.changed()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._listening.socket.fileno(), select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._is_closed:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._wake in ready:
                os.eventfd_read(self._wake)
                continue
            try:
                connection, _ = self._listening.socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError:
                # No descriptors are left, say. Whoever waits goes on waiting until there are some.
                select.select([self._wake], [], [], RETRY_S)
                continue
            self._welcome(connection)

    def _welcome(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            peer = peer_of(connection)
            if peer.uid not in self._uids:
                raise AttachError(
                    f"user {peer.uid} may not attach to the pool of user {os.geteuid()}; the owner names others with "
                    "allow_uids="
                )
            with self._lock:
                if len(self._sessions) >= ATTACHED_PROCESSES_MAX:
                    raise AttachError(f"{ATTACHED_PROCESSES_MAX} processes are attached, which is the limit; end some")
            session = Session(self, self._pool, self._arena, connection, peer)
        except AttachError as error:
            refuse(connection, error)
            return
        except OSError as error:
            refuse(
                connection, AttachError(f"the owner cannot take another process: {error.strerror}; raise its limits")
            )
            return
        with self._lock:
            self._sessions.add(session)
        try:
            session.start()
        except RuntimeError as error:
            self.ended(session)
            refuse(connection, AttachError(f"the owner cannot take another process: {error}; raise its limits"))
            session.close_unstarted()

    def ended(self, session: Session) -> None:
        """For `Session`."""
        with self._lock:
            self._sessions.discard(session)

    def close(self) -> None:
        """Part from every process, and give the path free. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._pool.unsubscribe(self._changed)
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(JOIN_DEADLINE_S)
        with self._lock:
            sessions = tuple(self._sessions)
        for session in sessions:
            session.close()
        for session in sessions:
            session.join(JOIN_DEADLINE_S)
        self._listening.close()
        os.close(self._wake)

    def close_in_child(self) -> None:
        """After a fork: the parent goes on with the socket, the lock and the processes."""
        self._is_closed = True
        self._lock = threading.Lock()
        self._listening.close_in_child()
        os.close(self._wake)
        for session in self._sessions:
            session.close_in_child()
        self._sessions = set()
