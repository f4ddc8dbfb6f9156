"""Which congestion control a connection gets when nobody asks for one."""

from __future__ import annotations

import socket

import pytest

from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from transports.tcp import TcpTransport, socket_options
from transports.tcp.socket_options import near_congestion_control, round_trip_s

LOOPBACK = "tcp://127.0.0.1:0"
NAME_BYTES = 16


def algorithms(options: TransportOptions) -> list[str]:
    """What both ends of a loopback connection use."""
    transport = TcpTransport()
    listener = transport.listen(LOOPBACK, options)
    try:
        near = transport.connect(listener.address, options, Deadline.after(10.0))
        far = listener.accept(Deadline.after(10.0))
        names = []
        for connection in (near, far):
            descriptor = connection.native_stream()
            assert descriptor is not None
            with socket.socket(fileno=descriptor) as sock:
                assert round_trip_s(sock) is not None
                raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES)
                names.append(raw.rstrip(b"\0").decode())
            connection.close()
        return names
    finally:
        listener.close()


def system_default() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        return probe.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES).rstrip(b"\0").decode()


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow this machine is at the moment, loopback counts as near."""
    monkeypatch.setattr(socket_options, "NEAR_S", 60.0)


@pytest.mark.usefixtures("near")
def test_short_round_trips_get_cubic_where_it_may_be_chosen() -> None:
    expected = near_congestion_control() or system_default()
    assert algorithms(TransportOptions()) == [expected] * 2


def test_long_round_trips_keep_the_systems_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_options, "NEAR_S", 0.0)
    assert algorithms(TransportOptions()) == [system_default()] * 2


@pytest.mark.usefixtures("near")
def test_a_choice_is_kept() -> None:
    assert algorithms(TransportOptions(congestion_control="reno")) == ["reno"] * 2


@pytest.mark.usefixtures("near")
def test_a_paced_connection_keeps_the_systems_choice() -> None:
    assert algorithms(TransportOptions(pacing_bytes_per_s=1e8)) == [system_default()] * 2


def test_the_transport_says_what_it_would_choose() -> None:
    near = near_congestion_control()
    detail = TcpTransport().availability().detail
    assert (near is None or near == system_default()) == ("at round trips below" not in detail)
