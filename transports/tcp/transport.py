"""The TCP transport: `tcp://host:port`."""

from __future__ import annotations

import errno
import socket

from kvstore.abc import Availability, Connection, Listener, Transport, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import AddressError, PeerGoneError, TransportError, UnavailableError
from kvstore.limits import CONNECT_DEADLINE_S
from transports.tcp.address import Endpoint, format_address, parse_address, resolve
from transports.tcp.connection import TcpConnection
from transports.tcp.listener import open_listener
from transports.tcp.socket_options import (
    choosable_congestion_controls,
    congestion_controls,
    may_choose_congestion_control,
    prepare_socket,
)


class TcpTransport(Transport):
    """Streams over TCP and IPv4 or IPv6. Holds no state; any thread may call any method."""

    @property
    def scheme(self) -> str:
        return "tcp"

    def availability(self) -> Availability:
        offered = congestion_controls()
        controls = f"{offered[0]} by default, of {', '.join(offered)}" if offered else "the kernel does not say which"
        choosable = choosable_congestion_controls()
        if len(choosable) > 1:
            controls += f"; by round-trip time among {', '.join(choosable)}"
        ipv6 = "and IPv6" if socket.has_ipv6 else "only, no IPv6"
        return Availability(True, f"IPv4 {ipv6}; unencrypted; congestion control: {controls}")

    def listen(self, address: str, options: TransportOptions) -> Listener:
        parsed = parse_address(address)
        try:
            endpoints = resolve(parsed, Deadline.after(CONNECT_DEADLINE_S))
        except PeerGoneError as error:
            raise AddressError(f"cannot listen on {address}: {error}") from error
        return open_listener(address, endpoints[0], options)

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        parsed = parse_address(address)
        if parsed.port == 0:
            raise AddressError(f"{address!r} names port 0, which is no port to connect to; use the listener's address")
        reasons: list[str] = []
        for endpoint in resolve(parsed, deadline):
            try:
                return _connect(endpoint, options, deadline)
            except OSError as error:
                if isinstance(error, TransportError) and not isinstance(error, PeerGoneError):
                    raise
                where = format_address(endpoint.socket_address)
                reasons.append(_reason(error) if where == address else f"{where}: {_reason(error)}")
        raise PeerGoneError(
            f"cannot connect to {address}: {', '.join(reasons)}; start the receiver, or correct the address"
        )


def _connect(endpoint: Endpoint, options: TransportOptions, deadline: Deadline) -> TcpConnection:
    try:
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise UnavailableError(f"this machine lacks {endpoint.family.name}; use an IPv4 address") from error
        raise TransportError(f"no socket to connect with: {error.strerror} (descriptors: see `ulimit -n`)") from error
    try:
        prepare_socket(sock, options)
        # Zero would mean "do not wait at all", and a connection on one machine needs no time but more than none.
        sock.settimeout(max(deadline.remaining_s(), 0.001))
        sock.connect(endpoint.socket_address)
        if sock.getsockname() == sock.getpeername():
            # TCP's simultaneous open: a free port of the ephemeral range can be chosen for our own side.
            raise PeerGoneError("nobody listens there (the socket connected to itself)")
        may_choose = may_choose_congestion_control(options)
        return TcpConnection(sock, format_address(sock.getpeername()), may_choose=may_choose)
    except BaseException:
        sock.close()
        raise


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if error.errno == errno.ECONNREFUSED:
        return "nobody listens there"
    return str(error.strerror or error)
