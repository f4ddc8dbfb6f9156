"""A slow link: all connections share its bytes, taken in turn, and what has passed is counted in its order."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

STEP_BYTES = 16 << 10
BUFFER_BYTES = 64 << 10
"""Of each socket of the link, so that nearly everything waits at the sender."""


@dataclass(frozen=True)
class Passed:
    """Bytes of one connection, in their place among all others."""

    connection: int
    size_bytes: int


class SlowLink:
    """Listens on loopback and connects on to `target`; a context manager.

    Args:
        target: `tcp://127.0.0.1:port`.
        bytes_per_s: of all connections together, from clients to the target. The way back is free.
    """

    def __init__(self, target: str, bytes_per_s: float) -> None:
        self._port = int(target.rpartition(":")[2])
        self._bytes_per_s = bytes_per_s
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed: list[Passed] = []
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._sockets: list[socket.socket] = []
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._selector.close()
        for sock in (self._listener, *self._sockets):
            sock.close()

    def bytes_of(self, connections: set[int], since: int = 0) -> int:
        """What has passed on some connections, from a place in `passed` on."""
        return sum(part.size_bytes for part in self.passed[since:] if part.connection in connections)

    def _run(self) -> None:
        number = 0
        free_s = time.monotonic()
        while not self._is_over.is_set():
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._listener:
                    self._connect(number)
                    number += 1
                    continue
                client, (connection, server) = key.fileobj, key.data
                assert isinstance(client, socket.socket)
                data = b""
                with suppress(OSError):
                    data = client.recv(STEP_BYTES)
                if not data:
                    self._selector.unregister(client)
                    with suppress(OSError):
                        server.shutdown(socket.SHUT_WR)
                    continue
                self.passed.append(Passed(connection, len(data)))
                with suppress(OSError):
                    server.sendall(data)
                free_s = max(free_s, time.monotonic() - 0.01) + len(data) / self._bytes_per_s
                self._is_over.wait(max(0.0, free_s - time.monotonic()))

    def _connect(self, number: int) -> None:
        client, _ = self._listener.accept()
        server = socket.create_connection(("127.0.0.1", self._port))
        self._sockets += [client, server]
        back = threading.Thread(target=self._pass_back, args=(server, client), daemon=True)
        self._threads.append(back)
        back.start()
        self._selector.register(client, selectors.EVENT_READ, (number, server))

    @staticmethod
    def _pass_back(server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(STEP_BYTES):
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
