"""Connections between transfers: how many are kept, for how long, and which are not given out again."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvstore.limits import IDLE_CONNECTIONS_MAX
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer.connector import GreetedLink
from kvstore.transfer.greeting import make_hello
from kvstore.transfer.idle_links import IdleLinks
from kvstore.transfer.link import FrameLink
from kvstore.transfer.settings import KEEPALIVE_FRACTION, TransferSettings
from tests.integration.transfer_nodes import WITHIN_S, tiny_spec, wait_until
from transports.tcp.connection import TcpConnection

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = tiny_spec()


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def idle() -> Iterator[IdleLinks]:
    links = IdleLinks()
    yield links
    links.close()


class Pair:
    """A greeted link and the socket at its other end."""

    def __init__(self, progress_deadline_s: float = 60.0) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            self.theirs, _ = listener.accept()
        link = FrameLink(TcpConnection(ours, "peer"), progress_deadline_s)
        hello = make_hello(SPEC, 1, TransferSettings(), link.connection)
        self.greeted = GreetedLink(link, hello, hello)

    @property
    def is_open(self) -> bool:
        native = self.greeted.link.native
        assert native is not None
        return native.is_connected

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.greeted.link.close()
        self.theirs.close()


def test_a_link_is_given_out_once_and_only_under_its_key(idle: IdleLinks) -> None:
    with Pair() as pair:
        idle.keep("here", pair.greeted)
        assert idle.take("there") is None
        assert idle.take("here") is pair.greeted
        assert idle.take("here") is None
        assert pair.is_open


def test_the_link_that_was_kept_last_is_given_out_first(idle: IdleLinks) -> None:
    with Pair() as first, Pair() as second:
        idle.keep("here", first.greeted)
        idle.keep("here", second.greeted)
        assert idle.take("here") is second.greeted
        assert idle.take("here") is first.greeted


def test_a_link_that_the_peer_has_ended_is_not_given_out(idle: IdleLinks) -> None:
    with Pair() as dead, Pair() as alive:
        idle.keep("here", alive.greeted)
        idle.keep("here", dead.greeted)
        dead.theirs.close()
        wait_until(lambda: not dead.is_open, "the end was heard of")
        assert idle.take("here") is alive.greeted


def test_bytes_that_wait_do_not_hide_an_end(idle: IdleLinks) -> None:
    with Pair() as dead:
        idle.keep("here", dead.greeted)
        dead.theirs.sendall(b"a late PONG")
        dead.theirs.close()
        wait_until(lambda: not dead.is_open, "the end was heard of")
        assert idle.take("here") is None


def test_links_that_nobody_takes_are_closed_and_the_thread_ends(idle: IdleLinks) -> None:
    with Pair(progress_deadline_s=0.2) as pair:
        begin = time.monotonic()
        idle.keep("here", pair.greeted)
        pair.theirs.settimeout(WITHIN_S)
        assert pair.theirs.recv(1) == b""
        assert time.monotonic() - begin >= 0.2 * KEEPALIVE_FRACTION
        wait_until(lambda: not _keepers(), "its thread has ended")
        with Pair() as other:
            idle.keep("here", other.greeted)
            assert idle.take("here") is other.greeted


def test_the_oldest_of_too_many_is_closed(idle: IdleLinks) -> None:
    pairs = [Pair() for _ in range(IDLE_CONNECTIONS_MAX + 1)]
    try:
        for number, pair in enumerate(pairs):
            idle.keep(number, pair.greeted)
        assert len(idle) == IDLE_CONNECTIONS_MAX
        assert not pairs[0].is_open
        assert all(pair.is_open for pair in pairs[1:])
    finally:
        for pair in pairs:
            pair.__exit__()


def test_close_closes_what_waits_and_keeps_nothing_more(idle: IdleLinks) -> None:
    with Pair() as waiting, Pair() as late:
        idle.keep("here", waiting.greeted)
        idle.close()
        assert not waiting.is_open
        idle.keep("here", late.greeted)
        assert not late.is_open
        assert not _keepers()


def _keepers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "kvstore-idle-connections"]
