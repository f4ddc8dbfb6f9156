"""Plain TCP sockets, from Python: vectored sends and receives, a thread per connection, no headers, no checksums.

Runs wherever kvstore does. Where there is a compiler, `raw_native` takes its place.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from kvstore.bench.sides.buffers import Buffers
from kvstore.bench.sides.network import set_congestion
from kvstore.bench.sides.side import ReceivingHalf, SendingHalf, Side, Told
from kvstore.errors import BenchmarkError, KVStoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.bench.load import Load

READ_BYTES = 256 << 10
WRITE_BYTES = 1 << 20
BUFFERS_PER_CALL = 64
SO_MAX_PACING_RATE = 47
"""`asm-generic/socket.h`; Python's `socket` has no name for it."""


@dataclass(frozen=True)
class RawPython(Side):
    """Sockets over a number of connections."""

    connections: int

    @property
    def name(self) -> str:
        return f"raw sockets x {self.connections} (Python)"

    def missing(self) -> str | None:
        return None

    def receiving(self, load: Load, tools: Mapping[str, str]) -> RawReceiver:
        return RawReceiver(load, self.connections)

    def sending(self, load: Load, tools: Mapping[str, str]) -> RawSender:
        return RawSender(load, self.connections)


def shares(records: list[tuple[int, int]], connections: int) -> list[list[tuple[int, int]]]:
    """The (offset, bytes) that each connection carries: dealt out in turn, and cut where there are too few."""
    if len(records) < connections:
        parts = []
        for offset, size_bytes in records:
            step = -(-size_bytes // connections)
            parts += [(offset + start, min(step, size_bytes - start)) for start in range(0, size_bytes, step)]
        records = parts
    return [records[first::connections] for first in range(connections)]


def _window(views: list[memoryview], bytes_max: int) -> list[memoryview]:
    """The first views, at most about so many bytes."""
    window: list[memoryview] = []
    size_bytes = 0
    for view in views[:BUFFERS_PER_CALL]:
        if size_bytes >= bytes_max:
            break
        window.append(view[: bytes_max - size_bytes])
        size_bytes += len(window[-1])
    return window


def _advance(views: list[memoryview], moved: int) -> None:
    done = 0
    while done < len(views) and moved >= len(views[done]):
        moved -= len(views[done])
        done += 1
    del views[:done]
    if moved:
        views[0] = views[0][moved:]


class _Ends:
    def __init__(self, load: Load, connections: int) -> None:
        self.load = load
        self.buffers = Buffers(load)
        view = self.buffers.array.data
        self._views = [
            [[view[offset : offset + size] for offset, size in share] for share in shares(batch, connections)]
            for batch in self.buffers.records
        ]
        self.sockets: list[socket.socket] = []

    def views(self, batch: int, connection: int) -> list[memoryview]:
        return list(self._views[batch][connection])

    def digest(self) -> str:
        return self.buffers.digest()


class RawReceiver(_Ends, ReceivingHalf):
    def __init__(self, load: Load, connections: int) -> None:
        super().__init__(load, connections)
        family = socket.AF_INET6 if ":" in load.host else socket.AF_INET
        self._listener = socket.socket(family, socket.SOCK_STREAM)
        set_congestion(self._listener, load.baseline_congestion)
        self._listener.bind((load.host, 0))
        self._listener.listen(connections)
        self._error: BaseException | None = None
        self._accepting = threading.Thread(target=self._accept, args=(connections,), daemon=True)
        self._accepting.start()

    def tell(self) -> Told:
        return {"host": self.load.host, "port": self._listener.getsockname()[1]}

    def _accept(self, connections: int) -> None:
        # The first byte says which of the sender's connections it is: they need not arrive in order.
        try:
            for _ in range(connections):
                sock, _ = self._listener.accept()
                self.sockets.append(sock)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                number = sock.recv(1)[0]
                threading.Thread(target=self._receive, args=(sock, number), daemon=True).start()
        except (OSError, IndexError) as error:
            self._error = error

    def _receive(self, sock: socket.socket, number: int) -> None:
        try:
            for batch in cycle(range(self.load.batches)):
                views = self.views(batch, number)
                while views:
                    moved = sock.recvmsg_into(_window(views, READ_BYTES))[0]
                    if not moved:
                        return
                    _advance(views, moved)
                sock.sendall(b"k")
        except OSError as error:
            self._error = error

    def make_room(self) -> None:
        if self._error is not None:
            raise BenchmarkError(f"a raw socket failed: {self._error}")

    def clear(self) -> None:
        self.buffers.clear()

    def close(self) -> None:
        for sock in (self._listener, *self.sockets):
            sock.close()


class RawSender(_Ends, SendingHalf):
    def __init__(self, load: Load, connections: int) -> None:
        super().__init__(load, connections)
        self.buffers.fill(load.seed)
        self._connections = connections
        self._threads = ThreadPoolExecutor(connections)
        self._told: Told = {}

    def hear(self, told: Told) -> None:
        self._told = told

    def connect(self) -> None:
        for number in range(self._connections):
            sock = connect_raw(
                self._told["host"], self._told["port"], self.load, self.load.pacing_bytes_per_s / self._connections
            )
            self.sockets.append(sock)
            sock.sendall(bytes([number]))

    def send(self, batch: int) -> float:
        begin = time.perf_counter()
        if self._connections == 1:
            self._send(batch, 0)
        else:
            for _ in self._threads.map(self._send, [batch] * self._connections, range(self._connections)):
                pass
        return time.perf_counter() - begin

    def _send(self, batch: int, number: int) -> None:
        sock, views = self.sockets[number], self.views(batch, number)
        while views:
            _advance(views, sock.sendmsg(_window(views, WRITE_BYTES)))
        if sock.recv(1) != b"k":
            raise BenchmarkError("the receiver of raw sockets has ended")

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self._threads.shutdown(wait=False)


def connect_raw(host: str, port: int, load: Load, pacing_bytes_per_s: float) -> socket.socket:
    """A blocking socket; the kernel's own limits end its waits only with the process, which has a deadline."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        set_congestion(sock, load.baseline_congestion)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if pacing_bytes_per_s:
            sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(pacing_bytes_per_s).to_bytes(8, sys.byteorder))
        sock.settimeout(load.deadline_s)
        sock.connect((host, port))
        sock.settimeout(None)
    except (OSError, KVStoreError) as error:
        sock.close()
        raise BenchmarkError(f"cannot connect to {host} port {port} with raw sockets: {error}") from error
    return sock
