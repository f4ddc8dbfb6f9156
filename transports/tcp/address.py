"""`tcp://host:port`: parsing, resolving and printing."""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import AddressError, PeerGoneError

if TYPE_CHECKING:
    from kvstore.clock import Deadline

PORT_MAX = 65535
ALTERNATIVES_MAX = 16
"""Addresses of one peer that an address may list."""
HOST_CHARACTERS_MAX = 253
"""Length limit of a DNS name (RFC 1035, section 2.3.4)."""

_ADDRESS = re.compile(r"tcp://(?:\[(?P<v6>[^\[\]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_EXAMPLES = "write tcp://HOST:PORT, for example tcp://10.0.0.2:7400 or tcp://[fd00::2]:7400"


@dataclass(frozen=True)
class TcpAddress:
    """A parsed address.

    Attributes:
        host: a name, or a numeric address without brackets.
        port: 0 to 65535; 0 lets the system choose when listening.
        is_numeric: whether `host` needs no name service.
    """

    host: str
    port: int
    is_numeric: bool


@dataclass(frozen=True)
class Endpoint:
    """One resolved address: what `bind` and `connect` take."""

    family: socket.AddressFamily
    socket_address: tuple[Any, ...]


def alternatives(address: str) -> tuple[str, ...]:
    """The single addresses that `tcp://host:port,host:port` lists; usually one.

    Raises:
        AddressError: too many.
    """
    scheme, separator, listed = address.partition("://")
    if not separator:
        return (address,)
    found = tuple(f"{scheme}://{part}" for part in listed.split(","))
    if len(found) > ALTERNATIVES_MAX:
        raise AddressError(f"an address lists {len(found)} hosts and ports; the limit is {ALTERNATIVES_MAX}")
    return found


def parse_address(address: str) -> TcpAddress:
    """The parts of `tcp://host:port`.

    Raises:
        AddressError: it is not such an address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise AddressError(f"{address!r} is not a TCP address: {_EXAMPLES}")
    port = int(match["port"])
    if port > PORT_MAX:
        raise AddressError(f"{address!r} names port {port}; the largest is {PORT_MAX}")
    if match["v6"] is not None:
        try:
            ipaddress.IPv6Address(match["v6"])
        except ValueError as error:
            raise AddressError(f"{address!r} has no IPv6 address in its brackets ({error}): {_EXAMPLES}") from error
        return TcpAddress(match["v6"], port, is_numeric=True)
    host = match["host"]
    if len(host) > HOST_CHARACTERS_MAX:
        raise AddressError(f"a host name of {len(host)} characters is too long; the limit is {HOST_CHARACTERS_MAX}")
    if re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.IPv4Address(host)
        except ValueError as error:
            raise AddressError(f"{address!r} has no valid IPv4 address ({error}): {_EXAMPLES}") from error
        return TcpAddress(host, port, is_numeric=True)
    return TcpAddress(host, port, is_numeric=False)


def resolve(address: TcpAddress, deadline: Deadline) -> list[Endpoint]:
    """The endpoints that an address stands for, in the order in which the system prefers them.

    Raises:
        AddressError: no such host, or a numeric address of an unsupported family.
        PeerGoneError: the name service did not answer in time.
    """
    if address.is_numeric:
        try:
            return _endpoints(address, socket.AI_NUMERICHOST)
        except socket.gaierror as error:
            raise AddressError(f"{address.host} cannot be used on this machine: {error.strerror}") from error
    return _resolve_name(address, deadline)


def _resolve_name(address: TcpAddress, deadline: Deadline) -> list[Endpoint]:
    # The system's resolver takes no deadline; a thread of its own lets the caller leave before it does.
    outcome: queue.SimpleQueue[list[Endpoint] | OSError] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            outcome.put(_endpoints(address, 0))
        except OSError as error:
            outcome.put(error)

    threading.Thread(target=look_up, name="kvstore-tcp-resolve", daemon=True).start()
    try:
        found = outcome.get(timeout=deadline.remaining_s())
    except queue.Empty:
        raise PeerGoneError(
            f"the host name {address.host!r} was not resolved in time; use a numeric address or check the name service"
        ) from None
    if isinstance(found, socket.gaierror) and found.errno == socket.EAI_AGAIN:
        raise PeerGoneError(f"the host name {address.host!r} cannot be resolved now: {found.strerror}") from found
    if isinstance(found, OSError):
        raise AddressError(f"the host name {address.host!r} cannot be resolved: {found.strerror}") from found
    return found


def _endpoints(address: TcpAddress, flags: int) -> list[Endpoint]:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags)
    return [Endpoint(socket.AddressFamily(family), tuple(target)) for family, _, _, _, target in found]


def local_endpoint(local_address: str) -> Endpoint:
    """Where to bind a connection that shall leave from one of this machine's addresses.

    Raises:
        AddressError: not a numeric address.
    """
    try:
        found = socket.getaddrinfo(local_address, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError) as error:
        raise AddressError(
            f"local address {local_address!r} is not numeric; give one of this machine, as `ip address` lists them"
        ) from error
    family, _, _, _, target = found[0]
    return Endpoint(socket.AddressFamily(family), tuple(target))


def format_address(socket_address: tuple[Any, ...]) -> str:
    """`tcp://…` of what `getsockname` or `getpeername` gave."""
    host, port = str(socket_address[0]), int(socket_address[1])
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
