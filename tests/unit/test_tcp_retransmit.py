"""A path that was cut is tried again soon after it is back."""

from __future__ import annotations

import errno
import socket

import pytest

from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.registry import transport_for
from transports.tcp import socket_options
from transports.tcp.socket_options import RETRANSMIT_PAUSE_MS_MAX, TCP_RTO_MAX_MS, prepare_socket

OPTIONS = TransportOptions()


def is_offered() -> bool:
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
        except OSError:
            return False
    return True


@pytest.mark.skipif(not is_offered(), reason="this kernel has no TCP_RTO_MAX_MS (Linux has it from 6.15 on)")
def test_both_ends_of_a_connection_have_short_pauses() -> None:
    transport = transport_for("tcp://127.0.0.1:0")
    listener = transport.listen("tcp://127.0.0.1:0", OPTIONS)
    ours = transport.connect(listener.address, OPTIONS, Deadline.after(30.0))
    theirs = listener.accept(Deadline.after(30.0))
    try:
        for connection in (ours, theirs):
            descriptor = connection.native_stream()
            assert descriptor is not None
            with socket.socket(fileno=descriptor) as sock:
                assert sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS) == RETRANSMIT_PAUSE_MS_MAX
    finally:
        for end in (ours, theirs, listener):
            end.close()


def test_a_kernel_that_does_not_know_them_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_options, "TCP_RTO_MAX_MS", 9999)
    with socket.socket() as sock:
        with pytest.raises(OSError, match="not available") as caught:
            sock.setsockopt(socket.IPPROTO_TCP, 9999, 1)
        assert caught.value.errno == errno.ENOPROTOOPT
        prepare_socket(sock, OPTIONS)
