"""What a TCP connection begins with, what may be chosen for it, and what it tells of its path."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import Connection, ConnectionInformation, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import PeerGoneError, UnavailableError
from transports.memory import MemoryTransport
from transports.tcp import TcpTransport
from transports.tcp.socket_options import choosable_congestion_controls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Transport

LOOPBACK = "tcp://127.0.0.1:0"
NAME_BYTES = 16
MESSAGE = bytes(1 << 20)


@contextmanager
def connected(options: TransportOptions, transport: Transport, address: str) -> Iterator[tuple[Connection, Connection]]:
    listener = transport.listen(address, options)
    try:
        near = transport.connect(listener.address, options, Deadline.after(30.0))
        far = listener.accept(Deadline.after(30.0))
        try:
            yield near, far
        finally:
            near.close()
            far.close()
    finally:
        listener.close()


def tcp_pair(options: TransportOptions | None = None, address: str = LOOPBACK):  # type: ignore[no-untyped-def]
    return connected(options or TransportOptions(), TcpTransport(), address)


def algorithms(options: TransportOptions) -> list[str | None]:
    with tcp_pair(options) as pair:
        return [connection.information().congestion_control for connection in pair]


def system_default() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES).rstrip(b"\0").decode()


def test_both_ends_begin_with_cubic_where_it_may_be_chosen() -> None:
    expected = "cubic" if "cubic" in choosable_congestion_controls() else system_default()
    assert algorithms(TransportOptions()) == [expected] * 2


def test_a_choice_of_the_user_is_kept() -> None:
    options = TransportOptions(congestion_control="reno")
    assert algorithms(options) == ["reno"] * 2
    with tcp_pair(options) as pair:
        assert [connection.congestion_controls() for connection in pair] == [(), ()]


def test_a_paced_connection_keeps_the_systems_choice() -> None:
    options = TransportOptions(pacing_bytes_per_s=1e8)
    assert algorithms(options) == [system_default()] * 2
    with tcp_pair(options) as pair:
        assert [connection.congestion_controls() for connection in pair] == [(), ()]


def test_an_algorithm_can_be_chosen_at_either_end_of_an_open_connection() -> None:
    with tcp_pair() as (near, far):
        for connection in (near, far):
            choices = connection.congestion_controls()
            assert choices[0] == system_default()
            for name in choices:
                connection.use_congestion_control(name)
                assert connection.information().congestion_control == name
            with pytest.raises(UnavailableError, match="no congestion control 'nonsense'"):
                connection.use_congestion_control("nonsense")


def test_the_transport_says_what_it_may_choose_among() -> None:
    detail = TcpTransport().availability().detail
    assert all(name in detail for name in choosable_congestion_controls())


@pytest.mark.parametrize("address", [LOOPBACK, "tcp://[::1]:0"])
def test_a_connection_tells_of_its_path(address: str) -> None:
    if "::1" in address and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with tcp_pair(address=address) as (near, far):
        received = bytearray(len(MESSAGE))
        for _ in range(4):
            near.send([MESSAGE[: 1 << 17]], Deadline.after(30.0))
            far.receive([memoryview(received)[: 1 << 17]], Deadline.after(30.0))
        # A reply, so that everything before it has been acknowledged.
        far.send([b"done"], Deadline.after(30.0))
        near.receive([memoryview(received)[:4]], Deadline.after(30.0))
        told = near.information()
        assert told.acknowledged_bytes is not None
        assert (1 << 19) - (1 << 17) <= told.acknowledged_bytes <= (1 << 19) + 1
        assert told.round_trip_s is not None
        assert 0 < told.round_trip_s < 10.0
        assert told.round_trip_min_s is None or told.round_trip_min_s <= 2 * told.round_trip_s
        if told.sent_bytes is not None:  # Linux 4.19 and later
            assert told.sent_bytes >= 1 << 19
            assert told.retransmitted_bytes is not None
        assert told.delivery_bytes_per_s is None or told.delivery_bytes_per_s > 0
        assert told.busy_s is None or told.busy_s >= 0
        assert far.information().acknowledged_bytes is not None


def test_what_waits_in_the_kernel_is_told() -> None:
    with tcp_pair() as (near, _):
        fits = 0
        descriptor = near.native_stream()
        assert descriptor is not None
        with socket.socket(fileno=descriptor) as sock:
            sock.setblocking(False)
            try:
                while True:
                    fits += sock.send(MESSAGE)
            except BlockingIOError:
                pass
            told = near.information()
            assert told.unsent_bytes is not None
            assert told.acknowledged_bytes is not None
            assert told.unsent_bytes > 0
            assert told.unsent_bytes + told.acknowledged_bytes <= fits + 1


def test_a_closed_connection_tells_nothing_more() -> None:
    with tcp_pair() as (near, _):
        near.close()
        with pytest.raises(PeerGoneError):
            near.information()
        with pytest.raises(PeerGoneError):
            near.use_congestion_control("cubic")


def test_a_transport_that_cannot_tell_says_so() -> None:
    with connected(TransportOptions(), MemoryTransport(), "memory://tells-nothing") as (near, _):
        assert near.information() == ConnectionInformation()
        assert near.congestion_controls() == ()
        with pytest.raises(UnavailableError):
            near.use_congestion_control("cubic")
