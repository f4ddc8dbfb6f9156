"""One end of a connection inside the process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.abc import Connection
from kvstore.errors import DeadlineError, PeerGoneError
from transports.buffers import byte_view, byte_views
from transports.memory.exposures import Exposures
from transports.memory.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.clock import Deadline


class MemoryConnection(Connection):
    """Two pipes for the stream, and each side's exposures for the other to get from."""

    def __init__(
        self, peer_address: str, outgoing: Pipe, incoming: Pipe, exposed: Exposures, offered: Exposures
    ) -> None:
        self._peer_address = peer_address
        self._outgoing = outgoing
        self._incoming = incoming
        self._exposed = exposed
        self._offered = offered
        self._closed = threading.Event()

    def __repr__(self) -> str:
        return f"MemoryConnection({self._peer_address}, {'closed' if self._closed.is_set() else 'open'})"

    @property
    def peer_address(self) -> str:
        return self._peer_address

    @property
    def supports_get(self) -> bool:
        return True

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        with byte_views(buffers) as views:
            try:
                self._outgoing.send(views, deadline)
            except PeerGoneError:
                raise
            except BaseException:
                # A timeout or an interrupt leaves a message cut in two: nothing sensible can follow it.
                self.close()
                raise

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        with byte_views(into, is_target=True) as views:
            before_bytes = self._incoming.received_bytes
            try:
                self._incoming.receive(views, deadline)
            except DeadlineError:
                if self._incoming.received_bytes != before_bytes:
                    self.close()
                raise
            except PeerGoneError:
                raise
            except BaseException:
                # An interrupt may have come between copying bytes and counting them.
                self.close()
                raise

    def close(self) -> None:
        self._closed.set()
        self._outgoing.close_sender()
        self._incoming.close_receiver()
        self._exposed.close()

    def expose(self, view: memoryview) -> bytes:
        flat = byte_view(view)
        try:
            return self._exposed.expose(flat)
        except BaseException:
            flat.release()
            raise

    def withdraw(self, descriptor: bytes) -> None:
        self._exposed.withdraw(descriptor)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        if self._closed.is_set():
            raise PeerGoneError(f"the connection to {self._peer_address} was closed by this side; connect again")
        with byte_view(into, is_target=True) as flat:
            self._offered.get(descriptor, offset, flat, deadline)


def connection_pair(listener_address: str, number: int) -> tuple[MemoryConnection, MemoryConnection]:
    """Both ends of a new connection: the one that connects, and the one to be accepted."""
    near = f"{listener_address}#{number}"
    there, back = Pipe(near, listener_address), Pipe(listener_address, near)
    near_exposures, far_exposures = Exposures(near), Exposures(listener_address)
    return (
        MemoryConnection(listener_address, there, back, near_exposures, far_exposures),
        MemoryConnection(near, back, there, far_exposures, near_exposures),
    )
