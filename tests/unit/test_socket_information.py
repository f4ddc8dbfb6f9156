"""What the kernel tells of a socket, and how patient it is with one."""

from __future__ import annotations

import os
import socket
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from kvstore._native import Stream, socket_information
from kvstore.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator

TCP_USER_TIMEOUT = 18
TCP_RTO_MAX_MS = 44


@contextmanager
def connected_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
        with ours, theirs:
            yield ours, theirs


def test_a_socket_tells_what_it_has_sent() -> None:
    with connected_pair() as (ours, theirs):
        ours.sendall(bytes(1000))
        theirs.recv(1000, socket.MSG_WAITALL)
        theirs.sendall(b"x")
        ours.recv(1)
        told = socket_information(ours.fileno())
        assert told.acknowledged_bytes in (1000, 1001)
        assert told.unsent_bytes == 0
        assert told.round_trip_s is not None
        assert told.window_segments
        assert told.congestion_control


def test_other_sockets_have_nothing_to_tell() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        told = socket_information(ours.fileno())
        assert told.round_trip_s is told.congestion_control is told.acknowledged_bytes is None
    read, write = os.pipe()
    try:
        with pytest.raises(TransportError, match="no open socket"):
            socket_information(read)
    finally:
        os.close(read)
        os.close(write)


def test_the_kernel_gives_up_soon_after_the_no_progress_deadline() -> None:
    with connected_pair() as (sock, _):
        stream = Stream(os.dup(sock.fileno()), "peer", 4.0)
        with closing(stream):
            assert sock.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT) == 6000
            stream.progress_deadline_s = 10.0
            assert sock.getsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT) == 15000
            try:
                longest_ms = sock.getsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS)
            except OSError:
                longest_ms = 2000  # Kernels before 6.15 have no such bound.
            assert longest_ms == 2000
