"""The owner's end for one attached process: its requests, what it holds, and what becomes of that when it goes."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvstore.attached.faults import pack_error
from kvstore.attached.frames import FROM_OWNER, HEADER_BYTES, FrameBuffer, Kind, frame
from kvstore.attached.messages import HELLO_BYTES, Hello, Welcome, pack_expired
from kvstore.attached.peer import Peer, has_ended, watch_process
from kvstore.attached.requests import Requests
from kvstore.attached.term import TermPage
from kvstore.errors import AttachError, AttachProtocolError, KVStoreError, SpecError
from kvstore.limits import ATTACH_DEADLINE_S, MIB

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.attached.frames import FrameHeader
    from kvstore.attached.requests import Arena
    from kvstore.pool import Pool

LOG = logging.getLogger("kvstore.attached")

RECEIVE_BYTES = 1 << 18
OUTGOING_BYTES_MAX = 1 * MIB
"""Answers that wait to be read; beyond, no more requests are taken."""

HELLO_FRAME_BYTES = HEADER_BYTES + HELLO_BYTES


class SessionHost(Protocol):
    """The owner, as a session sees it."""

    boot_epoch: int
    silence_s: float
    verify: bool

    def ended(self, session: Session) -> None:
        """Nothing is left of a session."""


@dataclass(frozen=True)
class SessionState:
    """What one attached process has.

    Attributes:
        pid: of the process.
        leases, writers: open ones; a writer that has ended counts until nothing can write in its slots any more.
        is_connected: whether it can still ask for anything.
    """

    pid: int
    leases: int
    writers: int
    is_connected: bool


class Session:
    """One attached process; a thread of its own does everything for it.

    When the connection ends, leases end too, and writers are aborted. Their slots stay in quarantine until the process
    says that nothing moves in them any more, or is known to be gone: until then it has the memory mapped.
    """

    def __init__(self, host: SessionHost, pool: Pool, arena: Arena, connection: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self._host = host
        self._pool = pool
        self._arena = arena
        self._socket = connection
        with ExitStack() as undo:
            self._pidfd = watch_process(connection, peer)
            undo.callback(os.close, self._pidfd)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            undo.callback(os.close, self._wake)
            self._page = TermPage()
            undo.pop_all()
        self._lock = threading.Lock()
        self._requests = Requests(pool, arena, self._page, verify=host.verify, later=self.later)
        self._frames = FrameBuffer()
        self._outgoing = bytearray()
        self._later: deque[Callable[[], None]] = deque()
        self._has_frames = False
        self._is_greeted = False
        self._is_connected = True
        self._is_closing = False
        self._has_changed = False
        self._heard_s = self._connected_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"kvstore-owner-{peer.pid}", daemon=True)

    def start(self) -> None:
        """Raises `RuntimeError` if the system has no thread for it; then it is for `close_unstarted` to clean up."""
        self._thread.start()

    def close_unstarted(self) -> None:
        self._close_descriptors()

    @property
    def state(self) -> SessionState:
        return SessionState(self.peer.pid, self._requests.lease_count, self._requests.writer_count, self._is_connected)

    # From other threads

    def later(self, action: Callable[[], None]) -> None:
        """Run something in this session's thread."""
        self._later.append(action)
        self._wake_up()

    def changed(self) -> None:
        """The pool has changed; the process is told, if it wants to know."""
        if self._requests.is_watching and not self._has_changed:
            self._has_changed = True
            self._wake_up()

    def _wake_up(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """The pool is about to close. Does not wait; see `join`."""
        self._is_closing = True
        self._wake_up()

    def join(self, deadline_s: float) -> None:
        """Wait for the end."""
        if threading.current_thread() is not self._thread:
            self._thread.join(deadline_s)

    def close_in_child(self) -> None:
        """After a fork: the parent goes on with these."""
        self._socket.close()
        for descriptor in (self._pidfd, self._wake, self._page.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._pidfd = self._wake = self._page.descriptor = -1

    # The thread

    def _run(self) -> None:
        try:
            while self._is_connected and not self._is_closing:
                self._step()
            self._disconnect("the owner is closing" if self._is_closing else "the connection ended")
            while self._requests.writer_count and not self._is_closing and not has_ended(self._pidfd):
                # It lives and has the memory mapped: what it was writing stays untouched.
                self._poll({self._pidfd: select.POLLIN, self._wake: select.POLLIN}, None)
            self._requests.let_go()
        finally:
            self._close_descriptors()
            self._host.ended(self)

    def _step(self) -> None:
        events = 0 if len(self._outgoing) > OUTGOING_BYTES_MAX else select.POLLIN
        if self._outgoing:
            events |= select.POLLOUT
        watched = {self._wake: select.POLLIN, self._pidfd: select.POLLIN, self._socket.fileno(): events}
        left_s = [left for left in (self._silence_left_s(), self._requests.lease_left_s) if left is not None]
        ready = self._poll(watched, min(left_s, default=None))
        while self._later:
            self._later.popleft()()
        if self._requests.lease_left_s == 0.0:
            self._end_leases()
        if not self._is_greeted and self._silence_left_s() == 0.0:
            self._is_connected = False
            return
        found = ready.get(self._socket.fileno(), 0)
        # What was said before the end counts: a process that takes its leave is not one that died.
        if found & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._receive()
        elif self._pidfd in ready:
            self._is_connected = False
        elif self._silence_left_s() == 0.0:
            self._expire()
        self._flush()
        while self._has_frames and self._is_connected and len(self._outgoing) <= OUTGOING_BYTES_MAX:
            self._handle_frames()
            self._flush()
        if self._has_changed and not self._outgoing:
            # Only now: to a process that does not read, one notice says as much as many.
            self._has_changed = False
            if self._requests.is_watching:
                self._say(Kind.CHANGED, 0, b"")
                self._flush()

    def _poll(self, watched: dict[int, int], timeout_s: float | None) -> dict[int, int]:
        poll = select.poll()
        for descriptor, events in watched.items():
            poll.register(descriptor, events)
        ready = dict(poll.poll(None if timeout_s is None else timeout_s * 1000 + 1))
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def _silence_left_s(self) -> float | None:
        """Until the process has been silent for too long; None while that does not matter."""
        if not self._is_greeted:
            # However much it says: whoever drips bytes must not keep a place for ever.
            return max(0.0, self._connected_s + ATTACH_DEADLINE_S - time.monotonic())
        if self._requests.has_something:
            return max(0.0, self._heard_s + self._host.silence_s - time.monotonic())
        return None

    def _expire(self) -> None:
        reason = f"process {self.peer.pid} was silent for more than {self._host.silence_s:g} s: it was stopped"
        self._say(Kind.EXPIRED, 0, pack_expired(self._requests.end_term(reason), reason))

    def _end_leases(self) -> None:
        """A lease was held for too long. A term is all that a process sees of its end, so all that it has ends."""
        reason = (
            f"process {self.peer.pid} held a lease for longer than the {self._pool.limits.lease_max_s:g} s that the "
            "store was opened with (StoreLimits.lease_max_s)"
        )
        LOG.warning("%s; its leases and writers have ended", reason)
        self._pool.expired(leases=self._requests.lease_count)
        self._say(Kind.EXPIRED, 0, pack_expired(self._requests.end_term(reason), reason))

    def _receive(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._is_connected = False
            return
        self._heard_s = time.monotonic()
        self._frames.feed(data)
        self._handle_frames()

    def _handle_frames(self) -> None:
        """Do what has arrived, as far as there is room for the answers."""
        self._has_frames = False
        try:
            while self._is_connected and (found := self._frames.next()) is not None:
                self._handle(*found)
                if len(self._outgoing) > OUTGOING_BYTES_MAX:
                    self._has_frames = True
                    return
            if not self._is_greeted and self._frames.waiting_bytes > HELLO_FRAME_BYTES:
                raise AttachProtocolError("a process says HELLO first, which is shorter than this")
        except AttachProtocolError as error:
            self._part(error)

    def _handle(self, header: FrameHeader, message: memoryview) -> None:
        if header.kind in FROM_OWNER:
            raise AttachProtocolError(f"{header.kind.name} is for the owner to say")
        if not self._is_greeted:
            self._greet(header, message)
            return
        if header.kind is Kind.BYE:
            # It has promised that nothing moves in its slots any more.
            self._disconnect("the process detached")
            self._requests.let_go()
            return

        def answer(reply: bytes | None, error: BaseException | None) -> None:
            if header.request:
                if error is not None:
                    self._say(Kind.ERROR, header.request, pack_error(error))
                else:
                    self._say(header.kind, header.request, reply or b"")

        try:
            self._requests.handle(header.kind, message, answer)
        except AttachProtocolError:
            raise
        except Exception as error:  # a fault of ours is told to who asked, and ends nobody else's session
            answer(None, error)

    def _greet(self, header: FrameHeader, message: memoryview) -> None:
        if header.kind is not Kind.HELLO:
            raise AttachProtocolError(f"a process says HELLO first, not {header.kind.name}")
        hello = Hello.parse(message)
        spec = self._pool.spec
        if hello.fingerprint not in (bytes(32), spec.fingerprint):
            error = SpecError(
                f"the owner serves the spec with fingerprint {spec.fingerprint.hex()}, the process wants "
                f"{hello.fingerprint.hex()}; attach with the owner's spec"
            )
            self._part(error, header.request)
            return
        arena = self._arena
        silence_ms = max(1, round(self._host.silence_s * 1000))
        arena_bytes = os.fstat(arena.descriptor).st_size
        welcome = Welcome(self._host.boot_epoch, os.getpid(), silence_ms, arena_bytes, arena.name, spec)
        data = frame(Kind.HELLO, header.request, welcome.pack())
        try:
            sent = socket.send_fds(self._socket, [data], [arena.descriptor, self._page.descriptor])
        except OSError:
            self._is_connected = False
            return
        self._outgoing += data[sent:]
        self._is_greeted = True

    def _say(self, kind: Kind, request: int, message: bytes) -> None:
        if self._is_connected:
            self._outgoing += frame(kind, request, message)

    def _flush(self) -> None:
        while self._outgoing and self._is_connected:
            try:
                sent = self._socket.send(self._outgoing, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self._is_connected = False
                return
            del self._outgoing[:sent]

    def _part(self, error: KVStoreError, request: int = 0) -> None:
        """Say why, and end the connection."""
        self._say(Kind.ERROR, request, pack_error(error))
        self._flush()
        self._is_connected = False

    def _disconnect(self, reason: str) -> None:
        self._is_connected = False
        self._requests.end_term(reason, is_last=True)
        self._requests.is_watching = False
        self._outgoing.clear()
        self._socket.close()

    def _close_descriptors(self) -> None:
        with self._lock:
            for descriptor in (self._pidfd, self._wake):
                os.close(descriptor)
            self._wake = -1
        self._socket.close()
        self._page.close()


def refuse(connection: socket.socket, error: AttachError) -> None:
    """Say why a process may not attach, and close the connection."""
    with ExitStack() as last:
        last.callback(connection.close)
        try:
            connection.send(frame(Kind.ERROR, 1, pack_error(error)), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return  # it did not wait for the answer
