"""Accepting TCP connections."""

from __future__ import annotations

import errno
import select
import socket
import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from kvstore.abc import Connection, Listener, TransportOptions
from kvstore.errors import AddressError, DeadlineError, PeerGoneError, TransportError, UnavailableError
from transports.tcp.address import Endpoint, format_address
from transports.tcp.connection import TcpConnection
from transports.tcp.socket_options import may_choose_congestion_control, prepare_socket

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.clock import Deadline

BACKLOG = 128
"""Connections that the kernel completes before `accept` takes them."""
POLL_S_MAX = 60.0
CLOSE_S_MAX = 1.0

_GONE_BEFORE_ACCEPT = {errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
"""`accept(2)`: errors of a new connection that say nothing about the listener."""


class TcpListener(Listener):
    """Listening sockets that do not block: several threads may wait in `poll` with deadlines of their own."""

    def __init__(self, sockets: Sequence[socket.socket], options: TransportOptions) -> None:
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._options = options
        addresses = [format_address(sock.getsockname()) for sock in sockets]
        self._address = ",".join([addresses[0], *(address.removeprefix("tcp://") for address in addresses[1:])])
        self._idle = threading.Condition()
        self._calls_running = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"TcpListener({self._address}, {'closed' if self._is_closed else 'open'})"

    @property
    def address(self) -> str:
        return self._address

    def accept(self, deadline: Deadline) -> Connection:
        with self._idle:
            self._check_open()
            self._calls_running += 1
        try:
            return self._accept(deadline)
        finally:
            with self._idle:
                self._calls_running -= 1
                if self._is_closed and self._calls_running == 0:
                    self._close_sockets()
                    self._idle.notify_all()

    def close(self) -> None:
        with self._idle:
            if self._is_closed:
                return
            self._is_closed = True
            # On Linux this wakes every `poll` on a listening socket.
            for sock in self._sockets.values():
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            if self._calls_running == 0:
                self._close_sockets()
            else:
                # The address is free only when the last waiting thread has let go of the socket.
                self._idle.wait_for(lambda: self._calls_running == 0, CLOSE_S_MAX)

    def _close_sockets(self) -> None:
        for sock in self._sockets.values():
            sock.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise PeerGoneError(f"the listener on {self._address} was closed")

    def _accept(self, deadline: Deadline) -> Connection:
        poller = select.poll()
        for number in self._sockets:
            poller.register(number, select.POLLIN)
        while True:
            remaining_s = deadline.remaining_s()
            ready = poller.poll(min(remaining_s, POLL_S_MAX) * 1000)
            self._check_open()
            for number, _ in ready:
                accepted = self._accept_ready(self._sockets[number])
                if accepted is not None:
                    return accepted
            if not ready and remaining_s == 0.0:
                raise DeadlineError(f"nobody connected to {self._address} in time; the listener goes on")

    def _accept_ready(self, listening: socket.socket) -> Connection | None:
        try:
            sock, peer = listening.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            self._check_open()
            if error.errno in _GONE_BEFORE_ACCEPT:
                return None
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise TransportError(
                    f"no descriptor is left to accept a connection on {self._address}; raise `ulimit -n`"
                ) from error
            raise TransportError(f"accepting on {self._address} failed: {error.strerror}") from error
        try:
            prepare_socket(sock, self._options)
        except BaseException:
            sock.close()
            raise
        return TcpConnection(sock, format_address(peer), may_choose=may_choose_congestion_control(self._options))


def open_listener(endpoints: Sequence[tuple[str, Endpoint]], options: TransportOptions) -> TcpListener:
    """Listen on endpoints, all or none; the address of each is for messages.

    Raises:
        AddressError: an address is in use, not one of this machine's, or not permitted.
        UnavailableError: this machine cannot do what the options ask for.
    """
    with ExitStack() as opened:
        sockets = [opened.enter_context(_open_socket(address, endpoint, options)) for address, endpoint in endpoints]
        listener = TcpListener(sockets, options)
        opened.pop_all()
        return listener


def _open_socket(address: str, endpoint: Endpoint, options: TransportOptions) -> socket.socket:
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    except OSError as error:
        raise UnavailableError(f"{address} needs {endpoint.family.name}, which this machine lacks") from error
    try:
        # A restart must not wait for the last connections' TIME_WAIT. A live listener is refused all the same.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if endpoint.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        prepare_socket(sock, options)
        try:
            sock.bind(endpoint.socket_address)
            sock.listen(BACKLOG)
        except OSError as error:
            raise AddressError(f"cannot listen on {address}: {_reason(error)}") from error
        sock.setblocking(False)
        return sock
    except BaseException:
        sock.close()
        raise


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use; stop its user (`ss -ltnp` names it), take another port, or port 0 for any free one"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address; `ip address` lists the ones it has, 0.0.0.0 and [::] mean all"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "not permitted; take a port above net.ipv4.ip_unprivileged_port_start (1023 by default)"
    return str(error.strerror)
