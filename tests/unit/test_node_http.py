"""The health endpoint's server: what it answers, and that nobody can hold it."""

from __future__ import annotations

import http.client
import re
import socket
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.cluster.http import HttpServer, Response
from kvstore.errors import AddressError
from kvstore.limits import HTTP_REQUEST_BYTES_MAX
from kvstore.testing.resources import leaves_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

WITHIN_S = 20.0
ROUTES = {"/good": lambda: Response(200, b"good\n"), "/bad": lambda: Response(503, b"bad\n", "text/x-bad")}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def port_of(server: HttpServer) -> int:
    return int(server.address.rpartition(":")[2])


def ask(server: HttpServer, path: str, method: str = "GET") -> tuple[int, bytes, dict[str, str]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=WITHIN_S)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())


def raw(server: HttpServer, data: bytes) -> bytes:
    """Everything that the server says to these bytes until it ends the connection."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=WITHIN_S) as sock:
        sock.sendall(data)
        said = b""
        while part := sock.recv(4096):
            said += part
        return said


def test_answers() -> None:
    with HttpServer("127.0.0.1:0", ROUTES) as server:
        status, body, headers = ask(server, "/good?x=1")
        assert (status, body, headers["Content-Type"]) == (200, b"good\n", "text/plain; charset=utf-8")
        assert headers["Server"] == "kvstore"
        assert ask(server, "/bad")[:2] == (503, b"bad\n")
        assert ask(server, "/bad", "HEAD")[1] == b""
        assert ask(server, "/good", "HEAD")[2]["Content-Length"] == "5"
        status, body, _ = ask(server, "/else\x41")
        assert (status, body) == (404, b"'/elseA' is not here; there are /good, /bad\n")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(method: str) -> None:
    with HttpServer("127.0.0.1:0", ROUTES) as server:
        status, body, _ = ask(server, "/good", method)
        assert (status, body) == (501, f"501 Unsupported method ('{method}')\n".encode())


def test_a_fault_of_a_route_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Response:
        raise KeyError("x")

    with HttpServer("127.0.0.1:0", {"/broken": broken}) as server:
        assert ask(server, "/broken")[:2] == (500, b"answering failed; the log says why\n")
    assert "answering /broken failed" in caplog.text


@pytest.mark.parametrize("data", [b"\0\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"a b c d\r\n\r\n"])
def test_what_is_not_http(data: bytes) -> None:
    with HttpServer("127.0.0.1:0", ROUTES) as server:
        assert re.match(rb"(HTTP/1\.0 )?(400|505) ", raw(server, data))
        assert ask(server, "/good")[0] == 200


def test_an_endless_request_is_cut_at_its_limit() -> None:
    with HttpServer("127.0.0.1:0", ROUTES) as server:
        line = b"GET /good HTTP/1.1\r\nX: "
        said = raw(server, line + b"a" * (HTTP_REQUEST_BYTES_MAX - len(line)))
        # Exactly the limit was read: the headers end there, as if the client had ended them.
        assert said.startswith(b"HTTP/1.0 200")
        assert ask(server, "/good")[0] == 200


def test_a_slow_client_is_cut_and_keeps_nobody_waiting() -> None:
    with (
        HttpServer("127.0.0.1:0", ROUTES, deadline_s=0.5) as server,
        socket.create_connection(("127.0.0.1", port_of(server)), timeout=WITHIN_S) as slow,
    ):
        slow.sendall(b"GET /go")
        assert ask(server, "/good")[0] == 200
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(0.05):
                try:
                    slow.sendall(b"o")
                except OSError:
                    return

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            # Each byte is a sign of life, and the deadline holds all the same.
            assert slow.recv(1) in (b"", b"H")
        except ConnectionResetError:
            pass
        finally:
            stop.set()
            dripping.join()


def test_too_many_connections_are_refused() -> None:
    entered, release = threading.Semaphore(0), threading.Event()

    def hold() -> Response:
        entered.release()
        release.wait(WITHIN_S)
        return Response(200, b"held\n")

    with HttpServer("127.0.0.1:0", {"/hold": hold, **ROUTES}, connections_max=2) as server:
        answers: list[int] = []
        holders = [threading.Thread(target=lambda: answers.append(ask(server, "/hold")[0])) for _ in range(2)]
        for holder in holders:
            holder.start()
        for _ in holders:
            assert entered.acquire(timeout=WITHIN_S)
        with socket.create_connection(("127.0.0.1", port_of(server)), timeout=WITHIN_S) as refused:
            # Told without being read: a client that has already asked may see its connection reset.
            assert refused.recv(4096).startswith(b"HTTP/1.0 503")
        release.set()
        for holder in holders:
            holder.join(WITHIN_S)
        assert answers == [200, 200]
        assert ask(server, "/good")[0] == 200


def test_closing_ends_connections_that_hang() -> None:
    server = HttpServer("127.0.0.1:0", ROUTES, deadline_s=3600.0)
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=WITHIN_S) as hanging:
        hanging.sendall(b"GET /go")
        assert ask(server, "/good")[0] == 200  # served after the other one was taken
        server.close()
        server.close()
        assert hanging.recv(1) == b""


def test_the_port_is_free_afterwards() -> None:
    with HttpServer("127.0.0.1:0", ROUTES) as server:
        address = server.address.removeprefix("http://")
        with pytest.raises(AddressError, match=r"cannot listen on .*in use; set http.listen to another address"):
            HttpServer(address, ROUTES)
        ask(server, "/good")
    with HttpServer(address, ROUTES) as server:
        assert server.address == f"http://{address}"


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":80", "a b:80", "127.0.0.1:70000", "[::1]"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(AddressError, match="is not host:port; write for example"):
        HttpServer(address, ROUTES)


def test_ipv6() -> None:
    try:
        with HttpServer("[::1]:0", ROUTES) as server:
            assert server.address.startswith("http://[::1]:")
    except AddressError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
