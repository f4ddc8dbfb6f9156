"""What the kernel tells of a socket, and how patient it is with one."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import pytest

from kvstore._native import Stream, socket_information
from kvstore.errors import PeerGoneError, TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator

TCP_USER_TIMEOUT = 18


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


def test_a_sender_waits_while_the_peer_takes_bytes_more_slowly_than_the_buffer_frees() -> None:
    """The kernel lets a sender go on when a third of a large buffer is free, which may take longer than a deadline."""
    deadline_s, slow_reads = 2.0, 90
    message = bytes(12 << 20)
    with connected_pair() as (ours, theirs):
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        received = 0

        def read() -> None:
            nonlocal received
            for number in itertools.count():
                data = theirs.recv(16 << 10 if number < slow_reads else 1 << 20)
                received += len(data)
                if received == len(message) or not data:
                    return
                if number < slow_reads:
                    time.sleep(0.04)

        reader = threading.Thread(target=read)
        stream = Stream(os.dup(ours.fileno()), "peer", deadline_s)
        reader.start()
        with closing(stream):
            stream.send([message])
            reader.join(30.0)
        assert received == len(message)


def test_a_sender_gives_up_when_the_peer_takes_nothing() -> None:
    with connected_pair() as (ours, _):
        stream = Stream(os.dup(ours.fileno()), "peer", 0.3)
        with closing(stream), pytest.raises(PeerGoneError, match="took no bytes"):
            stream.send([bytes(64 << 20)])
