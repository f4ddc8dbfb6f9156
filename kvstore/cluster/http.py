"""A small HTTP server for health and metrics: reads only, with a limit on connections, bytes and time."""

from __future__ import annotations

import io
import logging
import socket
import socketserver
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.cluster.exposure import split_http_address
from kvstore.errors import AddressError
from kvstore.limits import HTTP_CONNECTIONS_MAX, HTTP_DEADLINE_S, HTTP_REQUEST_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LOG = logging.getLogger("kvstore.http")
POLL_S = 0.1
"""How soon the server notices that it is closed."""
BUSY = b"HTTP/1.0 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Response:
    """An answer."""

    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class HttpServer:
    """Answers GET and HEAD of some paths, in threads of its own. A context manager.

    Args:
        address: `host:port`; port 0 lets the system choose.
        routes: what each path answers; called from several threads at once.
        connections_max: served at once; a further one is answered 503.
        deadline_s: for one request and its answer together.

    Raises:
        AddressError: malformed, in use, or not of this machine.
    """

    def __init__(
        self,
        address: str,
        routes: Mapping[str, Callable[[], Response]],
        *,
        connections_max: int = HTTP_CONNECTIONS_MAX,
        deadline_s: float = HTTP_DEADLINE_S,
    ) -> None:
        host, port = split_http_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._server = _Server((host, port), family, routes, connections_max, deadline_s)
        except OSError as error:
            raise AddressError(
                f"cannot listen on http://{address}: {error.strerror}; set http.listen to another address, port 0 for "
                "any free one, or empty for no HTTP"
            ) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="kvstore-http", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """`http://host:port`, with the real port."""
        host, port = self._server.server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def close(self) -> None:
        """End what is being answered, free the address. Idempotent."""
        self._server.shutdown()
        self._server.cut()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    # `server_close` waits for the threads: `cut` has ended their connections by then.
    block_on_close = True
    daemon_threads = False

    def __init__(
        self,
        address: tuple[str, int],
        family: socket.AddressFamily,
        routes: Mapping[str, Callable[[], Response]],
        connections_max: int,
        deadline_s: float,
    ) -> None:
        self.address_family = family
        self.routes = routes
        self.deadline_s = deadline_s
        self._places = threading.BoundedSemaphore(connections_max)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            with suppress(OSError):
                request.setblocking(False)
                request.send(BUSY)
            self.shutdown_request(request)
            return
        with self._lock:
            self._open.add(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._done(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._done(request)

    def _done(self, request: socket.socket) -> None:
        with self._lock:
            self._open.discard(request)
        self._places.release()

    def cut(self) -> None:
        """End every connection."""
        with self._lock:
            for request in self._open:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away, in one way or another.
        LOG.debug("a request from %s ended", client_address, exc_info=True)


class _Request(io.RawIOBase):
    """What one client sends, as long as its time and bytes last; then it ends, as if the client had."""

    def __init__(self, sock: socket.socket, deadline: Deadline) -> None:
        self._socket = sock
        self._deadline = deadline
        self._left_bytes = HTTP_REQUEST_BYTES_MAX

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left_bytes]
        if self._deadline.has_passed or not len(view):
            return 0
        self._socket.settimeout(self._deadline.remaining_s() or 0.001)
        received = self._socket.recv_into(view)
        self._left_bytes -= received
        return received


class _Handler(BaseHTTPRequestHandler):
    """One request; its connection ends with the answer."""

    server: _Server
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        super().setup()
        self._deadline = Deadline.after(self.server.deadline_s)
        self.rfile.close()
        self.rfile = io.BufferedReader(_Request(self.connection, self._deadline), 4096)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        route = self.server.routes.get(path)
        if route is None:
            known = ", ".join(self.server.routes)
            response = Response(404, f"{path!r} is not here; there are {known}\n".encode())
        else:
            try:
                response = route()
            except Exception:
                LOG.exception("answering %s failed", path)
                response = Response(500, b"answering failed; the log says why\n")
        self._answer(response)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, response: Response) -> None:
        self.connection.settimeout(self._deadline.remaining_s() or 0.001)
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def version_string(self) -> str:
        return "kvstore"

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug(format, *args)
