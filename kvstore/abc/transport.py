"""How bytes move between two nodes.

A transport moves bytes and knows nothing of records; the protocol above it (docs/protocol.md) is the
same for all. Two shapes exist. Every connection is an ordered byte stream in both directions. A
one-sided connection (RDMA, shared memory) also lets one side *expose* memory and the other *get* from
it; nothing is ever written into a peer's memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.clock import Deadline


@dataclass(frozen=True)
class TransportOptions:
    """What a user may ask of a connection. A transport that cannot do it raises `UnavailableError`.

    Attributes:
        pacing_bytes_per_s: the most bytes per second that this side sends; None is unpaced.
        congestion_control: name of the algorithm (`cubic`, `bbr`); None leaves it to what is measured of the path.
        local_addresses: addresses of this machine that the connections to a peer leave from, in turn, such as one per
            network interface; () leaves it to the system. They mean nothing to a listener.
    """

    pacing_bytes_per_s: float | None = None
    congestion_control: str | None = None
    local_addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class Availability:
    """Whether a transport works on this machine, and if not, why and what would help."""

    is_available: bool
    detail: str


@dataclass(frozen=True)
class ConnectionInformation:
    """What is known of a connection's path at this moment; None is what its transport cannot tell.

    Counts and times are from the connection's beginning, of this side's sending.

    Attributes:
        round_trip_s, round_trip_variation_s: smoothed round-trip time and its mean deviation.
        round_trip_min_s: the smallest round-trip time of the last minutes.
        delivery_bytes_per_s: how fast the peer acknowledged bytes when there were enough to send.
        is_app_limited: the last measured delivery rate was that of a sender which had nothing to send.
        sent_bytes, retransmitted_bytes: on the wire; the former include the latter.
        acknowledged_bytes: known to have arrived.
        in_flight_bytes: sent and not acknowledged.
        unsent_bytes: given to the transport, and waiting there.
        buffer_max_bytes: the most that this side keeps of bytes which are not acknowledged.
        busy_s: time in which there was something to send or to be acknowledged.
        receiver_limited_s, buffer_limited_s: of `busy_s`, waiting for the receiver's window, or for a larger buffer on
            this side.
        congestion_control: name of the algorithm in use.
    """

    round_trip_s: float | None = None
    round_trip_variation_s: float | None = None
    round_trip_min_s: float | None = None
    delivery_bytes_per_s: float | None = None
    is_app_limited: bool | None = None
    sent_bytes: int | None = None
    retransmitted_bytes: int | None = None
    acknowledged_bytes: int | None = None
    in_flight_bytes: int | None = None
    unsent_bytes: int | None = None
    buffer_max_bytes: int | None = None
    busy_s: float | None = None
    receiver_limited_s: float | None = None
    buffer_limited_s: float | None = None
    congestion_control: str | None = None


class Connection(ABC):
    """An ordered, reliable byte stream to one peer, optionally with one-sided reads.

    One thread may send while another receives; two threads must not do the same at once. Any thread
    may `close`, which wakes both with `PeerGoneError`; so ends every later call. Buffers may be of any
    item type and shape, as long as they are contiguous, and empty.
    """

    @property
    @abstractmethod
    def peer_address(self) -> str:
        """The peer, for people: `tcp://10.0.0.2:41002`."""

    @property
    def supports_get(self) -> bool:
        """Whether `expose` and `get` work on this connection."""
        return False

    @abstractmethod
    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        """Send all bytes of all buffers, in order. They may be reused once this returns.

        Raises:
            PeerGoneError: the peer is gone, or this side closed the connection.
            DeadlineError: not all bytes left in time; the connection is closed, since part may have.
        """

    @abstractmethod
    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        """Fill every view completely, in order.

        Raises:
            PeerGoneError: the stream ended first.
            DeadlineError: it took too long; the connection is closed if some bytes had arrived.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connection. Idempotent, from any thread; waiting calls end with `PeerGoneError`.

        What was sent before can still be received, unless this side leaves received bytes unread: a stream
        over a network may then drop both. Every exposure of this side ends as by `withdraw`.
        """

    def native_stream(self) -> int | None:
        """A descriptor of the connected stream socket below, for native code that moves bytes by itself.

        A duplicate that the caller owns and closes; it receives and sends what `receive` and `send` would, so whoever
        takes it uses nothing else afterwards. `close` ends its waits, too. None if there is no such socket, or if the
        bytes on it are not those of the stream (encryption, say); the connection is then used as it is.

        Raises:
            PeerGoneError: this side closed the connection. TransportError: no descriptor is left.
        """
        return None

    def information(self) -> ConnectionInformation:
        """What is known of the path now; cheap enough to be asked for many times a second. Any thread.

        Raises:
            PeerGoneError: this side closed the connection.
        """
        return ConnectionInformation()

    def congestion_controls(self) -> tuple[str, ...]:
        """Algorithms that this process may choose for the connection, the system's own first; () if there is no choice.

        There is none either where the options that the connection was made with have chosen.
        """
        return ()

    def use_congestion_control(self, name: str) -> None:
        """Choose one of `congestion_controls` for what this side sends from here on.

        Raises:
            UnavailableError: it is none of them. PeerGoneError: this side closed the connection.
        """
        raise UnavailableError(f"{type(self).__name__} has no choice of congestion control; leave {name!r} out")

    def expose(self, view: memoryview) -> bytes:
        """Let the peer of this connection read `view` until `withdraw`; the caller keeps it alive.

        Returns:
            A descriptor to send to the peer (at most 256 bytes).

        Raises:
            UnavailableError: `supports_get` is False.
        """
        raise _no_get(self)

    def withdraw(self, descriptor: bytes) -> None:
        """End an exposure. When this returns no `get` of it is running or will start. Idempotent."""
        raise _no_get(self)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Read `into.nbytes` bytes at `offset` of memory that the peer has exposed.

        Raises:
            PeerGoneError: the exposure was withdrawn or the peer is gone.
            TransportError: the range lies outside the exposure.
            DeadlineError: not all bytes came in time; `into` may hold part of them.
        """
        raise _no_get(self)


def _no_get(connection: Connection) -> Exception:
    return UnavailableError(f"{type(connection).__name__} is a stream; ask supports_get before exposing memory")


class Listener(ABC):
    """Accepts connections on one address. Any thread may call."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where peers connect, with the real port: `tcp://127.0.0.1:40321`."""

    @abstractmethod
    def accept(self, deadline: Deadline) -> Connection:
        """The next connection.

        Raises:
            DeadlineError: none came in time; the listener goes on.
            PeerGoneError: the listener was closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening and free the address. Idempotent; every waiting `accept` ends with `PeerGoneError`.

        Connections that were accepted live on.
        """


class Transport(ABC):
    """Makes connections for one address scheme. Found by the entry-point group `kvstore.transports`."""

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The part before `://` in addresses."""

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this machine can use it; cheap, without side effects."""

    def routes(self, address: str, options: TransportOptions) -> tuple[tuple[str, TransportOptions], ...]:
        """The ways to a peer, each an address and options for `connect`; connections of a transfer take them in turn.

        Raises:
            AddressError, UnavailableError: as `connect`.
        """
        return ((address, options),)

    @abstractmethod
    def listen(self, address: str, options: TransportOptions) -> Listener:
        """Listen on an address of this scheme.

        Raises:
            AddressError: the address is malformed, of another scheme, or in use (the message says so).
            UnavailableError: this machine or transport cannot do what the options ask for.
        """

    @abstractmethod
    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        """Connect to a listener.

        Raises:
            AddressError: the address is malformed, or of another scheme.
            PeerGoneError: nobody listens there, or it did not answer in time.
            UnavailableError: as in `listen`.
        """
