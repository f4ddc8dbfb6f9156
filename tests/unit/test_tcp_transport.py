"""What is particular to TCP: options, names, broken peers, interrupts."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.abc import Connection, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import AddressError, DeadlineError, PeerGoneError, TransportError, UnavailableError
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.transport import connect_pair, soon
from transports.tcp import TcpTransport
from transports.tcp.address import format_address, parse_address
from transports.tcp.connection import TcpConnection
from transports.tcp.socket_options import SO_MAX_PACING_RATE, congestion_controls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.abc import Listener

TEST_S = 30.0
LOOPBACK = "tcp://127.0.0.1:0"
PLAIN = TransportOptions()

PEER = """
import os, signal, socket, sys
sock = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
sock.sendall(b"begun")
os.kill(os.getpid(), signal.Signals[sys.argv[2]])
"""


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = TcpTransport().listen(LOOPBACK, PLAIN)
    yield listener
    listener.close()


@contextmanager
def peer_that_gets(signal_name: str, listener: Listener) -> Iterator[Connection]:
    """A connection to a process that sends five bytes and then a signal to itself."""
    port = listener.address.rpartition(":")[2]
    process = subprocess.Popen([sys.executable, "-c", PEER, port, signal_name])
    connection = None
    try:
        connection = listener.accept(soon())
        connection.receive([memoryview(bytearray(5))], soon())
        yield connection
    finally:
        process.kill()
        process.wait(TEST_S)
        if connection is not None:
            connection.close()


def test_stopped_peer_ends_send_and_receive_by_their_deadlines(listener: Listener) -> None:
    with peer_that_gets("SIGSTOP", listener) as connection:
        with pytest.raises(DeadlineError):
            connection.receive([memoryview(bytearray(1))], Deadline.after(0.2))
        with pytest.raises(DeadlineError, match="stopped"):
            connection.send([bytes(96 << 20)], Deadline.after(0.5))


def test_killed_peer_ends_receive(listener: Listener) -> None:
    with peer_that_gets("SIGKILL", listener) as connection, pytest.raises(PeerGoneError):
        connection.receive([memoryview(bytearray(1))], soon())


def test_killed_peer_ends_send(listener: Listener) -> None:
    with peer_that_gets("SIGKILL", listener) as connection, pytest.raises(PeerGoneError):
        connection.send([bytes(96 << 20)], soon())


def test_reset_by_the_peer(listener: Listener) -> None:
    host, _, port = listener.address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port))) as raw:
        connection = listener.accept(soon())
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with pytest.raises(PeerGoneError, match="reset"):
        connection.receive([memoryview(bytearray(1))], soon())
    connection.close()


@pytest.mark.parametrize(
    "wait",
    [
        pytest.param(lambda connection: connection.send([bytes(96 << 20)], soon()), id="send"),
        pytest.param(lambda connection: connection.receive([memoryview(bytearray(1))], soon()), id="receive"),
    ],
)
def test_interrupt_ends_a_wait_and_closes(listener: Listener, wait: Callable[[Connection], None]) -> None:
    near, far = connect_pair(TcpTransport(), listener)
    assert threading.current_thread() is threading.main_thread()

    def interrupt() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = Background(interrupt)
    with pytest.raises(KeyboardInterrupt):
        wait(near)
    interrupting.result(TEST_S)
    with pytest.raises(PeerGoneError, match="closed by this side"):
        near.send([b"x"], soon())
    far.close()


def test_signal_without_an_exception_does_not_end_a_wait(listener: Listener) -> None:
    near, far = connect_pair(TcpTransport(), listener)
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))

    def disturb() -> None:
        for _ in range(5):
            time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGUSR1)
        far.send([b"here"], soon())

    try:
        disturbing = Background(disturb)
        received = bytearray(4)
        near.receive([memoryview(received)], soon())
        disturbing.result(TEST_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen
    assert received == b"here"
    near.close()
    far.close()


def test_a_deadline_that_has_passed_takes_what_is_there_and_no_more(listener: Listener) -> None:
    near, far = connect_pair(TcpTransport(), listener)
    passed = Deadline.after(-1.0)
    far.send([b"ab"], passed)
    first = bytearray(1)
    near.receive([memoryview(first)], soon())
    second = bytearray(1)
    near.receive([memoryview(second)], passed)
    assert first + second == b"ab"
    with pytest.raises(DeadlineError):
        near.receive([memoryview(second)], passed)
    far.send([b"c"], soon())
    near.receive([memoryview(second)], soon())
    assert second == b"c"
    near.close()
    far.close()


def test_views_that_cannot_be_used_are_refused_before_anything_is_sent(listener: Listener) -> None:
    near, far = connect_pair(TcpTransport(), listener)
    with pytest.raises(TransportError, match="contiguous"):
        near.send([b"good", memoryview(bytes(10))[::2]], soon())
    with pytest.raises(TransportError, match="read-only"):
        near.receive([memoryview(bytes(4))], soon())
    near.send([b"next"], soon())
    received = bytearray(4)
    far.receive([memoryview(received)], soon())
    assert received == b"next"
    near.close()
    far.close()


def test_no_view_is_kept_after_an_error(listener: Listener) -> None:
    near, far = connect_pair(TcpTransport(), listener)
    memory = bytearray(100)
    view = memoryview(memory)
    with pytest.raises(DeadlineError) as caught:
        near.receive([view], Deadline.after(0.05))
    view.release()
    memory.extend(b"a bytearray with a view cannot grow")
    assert caught.traceback
    near.close()
    far.close()


# Options


def option_of(connection: Connection, level: int, option: int, size_bytes: int) -> bytes:
    assert isinstance(connection, TcpConnection)
    return connection._socket.getsockopt(level, option, size_bytes)


def test_pacing_reaches_the_kernel_in_64_bits(listener: Listener) -> None:
    for rate in (1e6, 6e9):
        near, far = connect_pair(TcpTransport(), listener, TransportOptions(pacing_bytes_per_s=rate))
        kept = option_of(near, socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
        assert int.from_bytes(kept, sys.byteorder) == int(rate)
        assert option_of(far, socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8) != kept, "the listener was not paced"
        near.close()
        far.close()


def test_a_listener_passes_its_options_on() -> None:
    options = TransportOptions(pacing_bytes_per_s=2e6, congestion_control="reno")
    listener = TcpTransport().listen(LOOPBACK, options)
    near, far = connect_pair(TcpTransport(), listener)
    kept = option_of(far, socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8)
    assert int.from_bytes(kept, sys.byteorder) == 2_000_000
    assert option_of(far, socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
    for end in (near, far, listener):
        end.close()


@pytest.mark.parametrize("rate", [0.0, -1.0, 10.0, float("nan"), float("inf")])
def test_senseless_pacing(listener: Listener, rate: float) -> None:
    options = TransportOptions(pacing_bytes_per_s=rate)
    with pytest.raises(TransportError, match="pacing_bytes_per_s"):
        TcpTransport().listen(LOOPBACK, options)
    with pytest.raises(TransportError, match="pacing_bytes_per_s"):
        TcpTransport().connect(listener.address, options, soon())


@pytest.mark.parametrize("name", ["no-such-one", "a" * 100, "nul\0"])
def test_unknown_congestion_control_names_what_there_is(listener: Listener, name: str) -> None:
    options = TransportOptions(congestion_control=name)
    offered = congestion_controls()
    assert offered
    with pytest.raises(UnavailableError) as caught:
        TcpTransport().listen(LOOPBACK, options)
    assert all(other in str(caught.value) for other in offered)
    with pytest.raises(UnavailableError):
        TcpTransport().connect(listener.address, options, soon())


def test_congestion_control_that_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if (level, option) == (socket.IPPROTO_TCP, socket.TCP_CONGESTION):
                raise PermissionError(errno.EPERM, "Operation not permitted")
            super().setsockopt(level, option, *value)

    monkeypatch.setattr("transports.tcp.listener.socket.socket", Refusing)
    with pytest.raises(UnavailableError, match="tcp_allowed_congestion_control"):
        TcpTransport().listen(LOOPBACK, TransportOptions(congestion_control="cubic"))


# Addresses


@pytest.mark.parametrize(
    ("address", "host", "port", "is_numeric"),
    [
        ("tcp://10.0.0.2:7400", "10.0.0.2", 7400, True),
        ("tcp://[fd00::2]:0", "fd00::2", 0, True),
        ("tcp://[fe80::1%eth0]:65535", "fe80::1%eth0", 65535, True),
        ("tcp://decode-3.example:1", "decode-3.example", 1, False),
    ],
)
def test_parse_address(address: str, host: str, port: int, is_numeric: bool) -> None:
    parsed = parse_address(address)
    assert (parsed.host, parsed.port, parsed.is_numeric) == (host, port, is_numeric)
    assert format_address((host, port)) == address


def test_a_name_is_resolved(listener: Listener) -> None:
    port = listener.address.rpartition(":")[2]
    accepting = Background(lambda: listener.accept(soon()))
    near = TcpTransport().connect(f"tcp://localhost:{port}", PLAIN, soon())
    assert near.peer_address == listener.address
    near.close()
    accepting.result(TEST_S).close()


def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolver_that_raises(monkeypatch, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    with pytest.raises(AddressError, match=r"'no\.such\.host'"):
        TcpTransport().connect("tcp://no.such.host:1", PLAIN, soon())
    with pytest.raises(AddressError, match=r"'no\.such\.host'"):
        TcpTransport().listen("tcp://no.such.host:1", PLAIN)


def test_a_name_service_that_fails_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    _resolver_that_raises(monkeypatch, socket.gaierror(socket.EAI_AGAIN, "Temporary failure"))
    with pytest.raises(PeerGoneError, match="Temporary failure") as caught:
        TcpTransport().connect("tcp://some.host:1", PLAIN, soon())
    assert caught.value.retryable
    with pytest.raises(AddressError, match="Temporary failure"):
        TcpTransport().listen("tcp://some.host:1", PLAIN)


def test_a_name_service_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def never(*_: object, **__: object) -> list[object]:
        release.wait(TEST_S)
        return []

    monkeypatch.setattr("transports.tcp.address.socket.getaddrinfo", never)
    try:
        with pytest.raises(PeerGoneError, match="not resolved in time"):
            TcpTransport().connect("tcp://some.host:1", PLAIN, Deadline.after(0.1))
    finally:
        release.set()


def test_port_zero_is_no_peer() -> None:
    with pytest.raises(AddressError, match="port 0"):
        TcpTransport().connect(LOOPBACK, PLAIN, soon())


def test_port_of_another_socket_is_in_use_and_says_what_to_do() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = format_address(other.getsockname())
        with pytest.raises(AddressError, match=rf"{address}: the port is in use.*port 0"):
            TcpTransport().listen(address, PLAIN)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(AddressError, match="no such address"):
        TcpTransport().listen("tcp://203.0.113.7:0", PLAIN)


def test_a_listener_that_was_just_connected_to_can_come_back() -> None:
    transport = TcpTransport()
    listener = transport.listen(LOOPBACK, PLAIN)
    near, far = connect_pair(transport, listener)
    far.close()  # the listening side ends first, so its port stays in TIME_WAIT
    near.close()
    listener.close()
    transport.listen(listener.address, PLAIN).close()


def test_nobody_answers_in_time() -> None:
    # A queue of length zero holds one connection; the kernel drops what comes after it, as a dead machine would.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = format_address(full.getsockname())
        held: list[Connection] = []

        def connect_until_full() -> None:
            for _ in range(16):
                held.append(TcpTransport().connect(address, PLAIN, Deadline.after(0.3)))

        with pytest.raises(PeerGoneError, match="no answer in time"):
            connect_until_full()
        assert held
        for connection in held:
            connection.close()


def test_all_addresses_of_a_name_are_tried(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    port = int(listener.address.rpartition(":")[2])
    dead = TcpTransport().listen(LOOPBACK, PLAIN)
    dead_port = int(dead.address.rpartition(":")[2])
    dead.close()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", p)) for p in (dead_port, port)]
    monkeypatch.setattr("transports.tcp.address.socket.getaddrinfo", lambda *_, **__: found)
    accepting = Background(lambda: listener.accept(soon()))
    near = TcpTransport().connect("tcp://two.addresses:1", PLAIN, soon())
    assert near.peer_address == listener.address
    near.close()
    accepting.result(TEST_S).close()


def _resolver_that_raises(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transports.tcp.address.socket.getaddrinfo", fail)
