"""A TCP proxy that damages and cuts what passes through it, so that both ends can be native."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class CutAfter:
    """Passes so many bytes on, then None."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes

    def __call__(self, data: bytes) -> bytes | None:
        if self._left <= 0:
            return None
        kept = data[: self._left]
        self._left -= len(data)
        return kept


class FlipAt:
    """Flips a bit of one byte."""

    def __init__(self, offset: int) -> None:
        self._offset = offset

    def __call__(self, data: bytes) -> bytes:
        changed = bytearray(data)
        if 0 <= self._offset < len(data):
            changed[self._offset] ^= 0x10
        self._offset -= len(data)
        return bytes(changed)


class Proxy:
    """Listens on loopback and connects on to `target`; a context manager.

    Args:
        target: `tcp://127.0.0.1:port`.
        forward: makes, for each connection by its number, what client bytes pass through; None cuts both ways.
    """

    def __init__(
        self,
        target: str,
        forward: Callable[[int], Callable[[bytes], bytes | None]],
        backward: Callable[[int], Callable[[bytes], bytes | None]] = lambda number: bytes,
    ) -> None:
        self._port = int(target.rpartition(":")[2])
        self._forward = forward
        self._backward = backward
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.connection_count = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join(10)
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets:
            sock.close()

    def retarget(self, target: str) -> None:
        """New connections lead elsewhere."""
        self._port = int(target.rpartition(":")[2])

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            number = self.connection_count
            self.connection_count += 1
            server = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [client, server]
            ways = ((client, server, self._forward(number)), (server, client, self._backward(number)))
            for source, sink, through in ways:
                thread = threading.Thread(target=self._pass, args=(source, sink, through), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass(self, source: socket.socket, sink: socket.socket, through: Callable[[bytes], bytes | None]) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed = through(data)
                if passed is None:
                    break
                sink.sendall(passed)
        # The sink may still send: a socket that is shut both ways answers that with a reset, and what was passed on
        # and not yet read would be lost with it.
        for sock, ways in ((source, socket.SHUT_RDWR), (sink, socket.SHUT_WR)):
            with suppress(OSError):
                sock.shutdown(ways)
