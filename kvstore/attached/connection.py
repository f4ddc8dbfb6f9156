"""The process's end of the socket: many requests in flight, each answered within a deadline, or the owner is gone."""

from __future__ import annotations

import os
import select
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from kvstore.attached.faults import parse_error
from kvstore.attached.frames import FrameBuffer, Kind, frame
from kvstore.attached.messages import Hello, Welcome, parse_empty, parse_expired
from kvstore.attached.peer import has_ended, peer_of, watch_process
from kvstore.clock import Deadline
from kvstore.errors import AttachError, AttachProtocolError, KVStoreError, OwnerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable

RECEIVE_BYTES = 1 << 18
_DESCRIPTORS = 2
"""What comes with the welcome: the arena and the term page."""


class ConnectionListener(Protocol):
    """Who uses a connection. Called by its reader thread; must neither block nor send."""

    def changed(self) -> None:
        """The owner's pool has changed."""

    def expired(self, term: int, reason: str) -> None:
        """What was held before this term is gone."""

    def gone(self) -> None:
        """The owner is gone."""


class Connection:
    """Any thread may call. Closed by `close`, or by the first thing that goes wrong.

    A thread reads what comes unasked, and answers for whoever waits. A request that finds nobody else reading reads its
    own answer instead: waking two threads would take longer than the answer itself.

    Args:
        path: the owner's socket.
        fingerprint: of the spec that is expected; None for any.
        deadline_s: for connecting and the welcome.

    Attributes:
        welcome: what the owner said.
        descriptors: the arena's and the term page's; the caller closes them.

    Raises:
        AttachError: nobody listens there, or the owner refuses this process. OwnerGoneError: it does not answer.
        SpecError: it serves another spec.
    """

    def __init__(self, path: str, fingerprint: bytes | None, deadline_s: float) -> None:
        self._path = path
        self._gone: OwnerGoneError | None = None
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._read_lock = threading.Lock()
        """Who has it reads from the socket."""
        self._pending: dict[int, Callable[[memoryview | None, KVStoreError | None], None]] = {}
        self._last_request = 0
        self._listener: ConnectionListener | None = None
        self._frames = FrameBuffer()
        self.descriptors: tuple[int, ...] = ()
        self.welcome: Welcome | None = None
        self._socket = _connect(path, deadline_s)
        self._pidfd = self._wake = -1
        self._reader_epoll: select.epoll | None = None
        try:
            self._pidfd = watch_process(self._socket, peer_of(self._socket))
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self.welcome = self._greet(fingerprint, Deadline.after(deadline_s))
            self._reader_epoll, self._request_poll = self._watch()
        except BaseException:
            self._close_descriptors()
            descriptors: tuple[int, ...] = self.descriptors
            for received in descriptors:
                os.close(received)
            raise
        self._reader = threading.Thread(target=self._read, name="kvstore-attached-reader", daemon=True)

    def _greet(self, fingerprint: bytes | None, deadline: Deadline) -> Welcome:
        hello = Hello(os.getpid()) if fingerprint is None else Hello(os.getpid(), fingerprint)
        with suppress(OwnerGoneError):  # one that refuses may have closed by now; what it said can still be read
            self._send(frame(Kind.HELLO, 1, hello.pack()), deadline)
        while (found := self._frames.next()) is None:
            if not _wait(self._socket.fileno(), select.POLLIN, deadline):
                raise OwnerGoneError(f"the owner at {self._path} did not answer in time; it is stopped, or overloaded")
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self._socket, RECEIVE_BYTES, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise OwnerGoneError(f"the owner at {self._path} went away: {error.strerror}") from error
            self.descriptors = (*self.descriptors, *descriptors)
            if not data:
                raise OwnerGoneError(f"the owner at {self._path} closed the connection without a word")
            self._frames.feed(data)
        header, message = found
        if header.kind is Kind.ERROR:
            raise parse_error(message)
        count = len(self.descriptors)
        if header.kind is not Kind.HELLO or count != _DESCRIPTORS:
            raise AttachProtocolError(f"the owner answered with {header.kind.name} and {count} descriptors")
        return Welcome.parse(message)

    def start(self, listener: ConnectionListener) -> None:
        """Begin to read. Once, before anything else."""
        self._listener = listener
        self._reader.start()

    @property
    def gone(self) -> OwnerGoneError | None:
        """Why the connection ended; None while it lives."""
        return self._gone

    # Requests

    def request(self, kind: Kind, message: bytes, deadline_s: float) -> memoryview:
        """Ask and wait for the answer.

        Raises:
            OwnerGoneError: no answer within `deadline_s`; the connection is closed. Else what the owner raised.
        """
        deadline = Deadline.after(deadline_s)
        answered = threading.Event()
        outcome: list[memoryview | KVStoreError] = []

        def end(answer: memoryview | None, error: KVStoreError | None) -> None:
            outcome.append(answer if answer is not None else error or AttachProtocolError("no answer"))
            answered.set()

        self.ask(kind, message, end, deadline)
        if self._read_lock.acquire(blocking=False):
            self._read_until(answered, deadline)
        if not answered.wait(deadline.remaining_s()):
            self.lose(f"it did not answer {kind.name} within {deadline_s:g} s: it is stopped, or overloaded")
            answered.wait()  # losing the connection ends every request
        found = outcome.pop()
        if not isinstance(found, KVStoreError):
            return found
        try:
            raise found
        finally:
            # Its traceback has this frame, and those of the callers with what they hold of the arena.
            del found

    def ask(
        self,
        kind: Kind,
        message: bytes,
        end: Callable[[memoryview | None, KVStoreError | None], None],
        deadline: Deadline,
    ) -> None:
        """Ask, and call `end` once with the answer or an error, from the reader's or any other thread.

        Raises:
            OwnerGoneError: the owner was gone before, or did not take the request by the deadline.
        """
        with self._lock:
            self._check()
            self._last_request += 1
            number = self._last_request
            self._pending[number] = end
        try:
            self._send(frame(kind, number, message), deadline)
        except BaseException:
            with self._lock:
                self._pending.pop(number, None)
            raise

    def post(self, kind: Kind, message: bytes, deadline_s: float) -> None:
        """Say something that is not answered.

        Raises:
            OwnerGoneError: as `ask`.
        """
        self._check()
        self._send(frame(kind, 0, message), Deadline.after(deadline_s))

    def _check(self) -> None:
        if self._gone is not None:
            raise OwnerGoneError(str(self._gone))

    def _send(self, data: bytes, deadline: Deadline) -> None:
        left = memoryview(data)
        if not self._send_lock.acquire(timeout=deadline.remaining_s()):
            raise self.lose("it takes no requests: it is stopped, or overloaded")
        try:
            while left:
                try:
                    left = left[self._socket.send(left, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
                except BlockingIOError:
                    if not _wait(self._socket.fileno(), select.POLLOUT, deadline):
                        raise self.lose("it takes no requests: it is stopped, or overloaded") from None
                except OSError as error:
                    raise self.lose(f"the connection broke: {error.strerror}") from None
        except KeyboardInterrupt:
            if len(left) < len(data):
                self.lose("a request to it was interrupted in the middle")
            raise
        finally:
            self._send_lock.release()

    # Reading: the reader thread, or a request for itself

    def _watch(self) -> tuple[select.epoll, select.poll]:
        """What the reader waits with, from which a request takes the socket, and what requests wait with."""
        epoll, poll = select.epoll(), select.poll()
        for descriptor in (self._socket.fileno(), self._pidfd, self._wake):
            epoll.register(descriptor, select.EPOLLIN)
            poll.register(descriptor, select.POLLIN)
        return epoll, poll

    def _read(self) -> None:
        try:
            while self._gone is None:
                assert self._reader_epoll is not None
                ready = {descriptor for descriptor, _ in self._reader_epoll.poll()}
                if not self._read_lock.acquire(blocking=False):
                    continue  # a request has just begun to read, or is about to leave it to this thread
                try:
                    self._take(ready)
                finally:
                    self._read_lock.release()
        except OSError as error:
            self.lose(f"the connection broke: {error.strerror}")
        finally:
            with self._read_lock:
                self._close_descriptors()

    def _read_until(self, answered: threading.Event, deadline: Deadline) -> None:
        """Read in a request's own thread until it is answered, or its time is over. With the read lock, which ends."""
        try:
            if self._gone is not None or self._reader_epoll is None:
                return
            self._reader_epoll.modify(self._socket.fileno(), 0)
            try:
                while not answered.is_set() and self._gone is None and not deadline.has_passed:
                    self._take({descriptor for descriptor, _ in self._request_poll.poll(deadline.remaining_s() * 1000)})
            finally:
                # Before the lock is free, or the next request that takes the socket would not keep it.
                self._reader_epoll.modify(self._socket.fileno(), select.EPOLLIN)
        finally:
            self._read_lock.release()

    def _take(self, ready: set[int]) -> None:
        """Act on what is ready, with the read lock."""
        try:
            if self._socket.fileno() in ready:
                self._receive()
            elif self._pidfd in ready:
                self.lose("it died")
        except AttachProtocolError as error:
            self.lose(f"it broke the protocol: {error}")
        except OSError as error:
            self.lose(f"the connection broke: {error.strerror}")
        except Exception as error:  # a fault of ours must not leave requests without an end
            self.lose(f"its answers cannot be read: {error!r}")

    def _receive(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        if not data:
            self.lose("it died" if has_ended(self._pidfd) else "it closed the pool, or parted from this process")
            return
        self._frames.feed(data)
        while (found := self._frames.next()) is not None:
            header, message = found
            assert self._listener is not None
            if header.kind is Kind.CHANGED:
                parse_empty(message, "CHANGED")
                self._listener.changed()
            elif header.kind is Kind.EXPIRED:
                self._listener.expired(*parse_expired(message))
            else:
                with self._lock:
                    end = self._pending.pop(header.request, None)
                if end is None:
                    raise AttachProtocolError(
                        f"{header.kind.name} answers request {header.request}, which was not asked"
                    )
                if header.kind is Kind.ERROR:
                    end(None, parse_error(message))
                else:
                    end(message, None)

    # The end

    def lose(self, why: str) -> OwnerGoneError:
        """The owner is gone: end every request. The first reason counts."""
        epoch = f"{self.welcome.boot_epoch:016x}" if self.welcome is not None else "unknown"
        with self._lock:
            first = self._gone is None
            if self._gone is None:
                self._gone = OwnerGoneError(
                    f"the owner at {self._path} (epoch {epoch}) is gone: {why}. What its arena held is void; "
                    "attach again"
                )
            gone = self._gone
            pending, self._pending = self._pending, {}
        for end in pending.values():
            end(None, OwnerGoneError(str(gone)))
        if first and self._listener is not None:
            self._listener.gone()
            self._wake_reader()
        return OwnerGoneError(str(gone))  # whoever raises it gets one of its own: what is raised keeps frames alive

    def _wake_reader(self) -> None:
        with self._lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def close(self, deadline_s: float) -> None:
        """End the connection and its thread."""
        self.lose("this process detached")
        if threading.current_thread() is not self._reader:
            self._reader.join(deadline_s)

    def close_in_child(self) -> None:
        """After a fork: the parent goes on with the socket; this process lets go of its copy."""
        self._gone = OwnerGoneError("the store belongs to the process that forked this one; attach again here")
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._pending = {}
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        with self._send_lock, self._lock:
            self._socket.close()
            if self._reader_epoll is not None:
                self._reader_epoll.close()
                self._reader_epoll = None
            for descriptor in (self._pidfd, self._wake):
                if descriptor >= 0:
                    os.close(descriptor)
            self._pidfd = self._wake = -1


def _connect(path: str, deadline_s: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(max(deadline_s, 0.001))
        connection.connect(path)
        connection.setblocking(False)
    except TimeoutError as error:
        connection.close()
        raise OwnerGoneError(f"the owner at {path} takes no connections; it is stopped, or overloaded") from error
    except PermissionError as error:
        connection.close()
        raise AttachError(
            f"user {os.geteuid()} may not reach {path}: {error.strerror}; the owner names other users than its own "
            "with allow_uids= (a node: attach.allow_uids), and the path's folders must let them through"
        ) from error
    except OSError as error:
        connection.close()
        raise AttachError(
            f"no owner can be reached at {path}: {error.strerror or error}; open the pool there first, with "
            "kvstore.open(spec, socket=...)"
        ) from error
    return connection


def _wait(descriptor: int, event: int, deadline: Deadline) -> bool:
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(deadline.remaining_s() * 1000))
