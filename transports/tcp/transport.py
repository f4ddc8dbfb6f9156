"""The TCP transport: `tcp://host:port`, or several of them for a peer with several interfaces."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace

from kvstore.abc import Availability, Connection, Listener, Transport, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import AddressError, PeerGoneError, TransportError, UnavailableError
from kvstore.limits import CONNECT_DEADLINE_S
from transports.tcp.address import Endpoint, alternatives, format_address, local_endpoint, parse_address, resolve
from transports.tcp.connection import TcpConnection
from transports.tcp.listener import open_listener
from transports.tcp.socket_options import (
    choosable_congestion_controls,
    congestion_controls,
    may_choose_congestion_control,
    prepare_socket,
)

IP_BIND_ADDRESS_NO_PORT = 24
"""`linux/in.h`; Python's `socket` has no name for it."""


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

    def routes(self, address: str, options: TransportOptions) -> tuple[tuple[str, TransportOptions], ...]:
        targets = alternatives(address)
        sources = options.local_addresses
        for target in targets:
            parse_address(target)
        count = max(len(targets), len(sources))
        return tuple(
            (
                targets[number % len(targets)],
                replace(options, local_addresses=(sources[number % len(sources)],) if sources else ()),
            )
            for number in range(count)
        )

    def listen(self, address: str, options: TransportOptions) -> Listener:
        endpoints = []
        for single in alternatives(address):
            try:
                endpoints.append((single, resolve(parse_address(single), Deadline.after(CONNECT_DEADLINE_S))[0]))
            except PeerGoneError as error:
                raise AddressError(f"cannot listen on {single}: {error}") from error
        return open_listener(endpoints, options)

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        reasons: list[str] = []
        for single in alternatives(address):
            parsed = parse_address(single)
            if parsed.port == 0:
                raise AddressError(
                    f"{single!r} names port 0, which is no port to connect to; use the listener's address"
                )
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
        if options.local_addresses:
            _bind(sock, options.local_addresses[0], endpoint)
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


def _bind(sock: socket.socket, local_address: str, endpoint: Endpoint) -> None:
    local = local_endpoint(local_address)
    if local.family != endpoint.family:
        raise AddressError(
            f"local address {local_address} cannot reach {format_address(endpoint.socket_address)}, which is of "
            "another family; give addresses of one family"
        )
    # A port is chosen at `connect`, where one that is used towards another peer will do.
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    try:
        sock.bind(local.socket_address)
    except OSError as error:
        raise AddressError(
            f"no connection can leave from {local_address}: {error.strerror}; `ip address` lists what this machine has"
        ) from error


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if error.errno == errno.ECONNREFUSED:
        return "nobody listens there"
    return str(error.strerror or error)
