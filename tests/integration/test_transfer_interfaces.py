"""A peer with several addresses: one transfer uses them all, each for what it carries."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

import kvstore
import kvstore.transfer.attachment
import kvstore.transfer.path_watch
from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import AddressError, PeerGoneError, TransferError, UnavailableError
from kvstore.testing.resources import leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from tests.integration.tcp_proxy import Proxy
from tests.integration.transfer_nodes import (
    BIG_TOKENS,
    BIG_WIDTH,
    WITHIN_S,
    assert_same,
    assert_settled,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
)
from transports.memory import MemoryTransport
from transports.tcp import TcpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.abc import Connection

IDS = prompt(BIG_TOKENS)
SPEC = tiny_spec(BIG_WIDTH)
BOTH = "tcp://127.0.0.1:0,127.0.0.2:0"


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 2 MiB are many frames, and enough for further connections."""
    monkeypatch.setattr(kvstore.transfer.attachment, "FRAME_BYTES", 16 << 10)
    monkeypatch.setattr(kvstore.transfer.path_watch, "JOIN_BYTES_MIN", 1)


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        store_prompt(store, IDS)
        yield store


@pytest.fixture
def target() -> Iterator[kvstore.Store]:
    with kvstore.open(SPEC, dram="32MiB") as store:
        yield store


def test_a_listener_on_two_addresses_takes_connections_on_both() -> None:
    transport = TcpTransport()
    listener = transport.listen(BOTH, TransportOptions())
    try:
        first, second = (route for route, _ in transport.routes(listener.address, TransportOptions()))
        assert first.startswith("tcp://127.0.0.1:")
        assert second.startswith("tcp://127.0.0.2:")
        for address in (second, first, listener.address):
            near = transport.connect(address, TransportOptions(), Deadline.after(WITHIN_S))
            far = listener.accept(Deadline.after(WITHIN_S))
            near.send([b"x"], Deadline.after(WITHIN_S))
            far.receive([memoryview(bytearray(1))], Deadline.after(WITHIN_S))
            near.close()
            far.close()
    finally:
        listener.close()
    with pytest.raises(AddressError, match=r"cannot listen on tcp://192\.0\.2\.1:1"):
        transport.listen("tcp://127.0.0.1:0,192.0.2.1:1", TransportOptions())


def test_connections_leave_from_the_addresses_that_are_named() -> None:
    transport = TcpTransport()
    listener = transport.listen("tcp://127.0.0.1:0", TransportOptions())
    options = TransportOptions(local_addresses=("127.0.0.1", "127.0.0.3"))
    try:
        seen = []
        for address, route in transport.routes(listener.address, options):
            near = transport.connect(address, route, Deadline.after(WITHIN_S))
            far = listener.accept(Deadline.after(WITHIN_S))
            seen.append(far.peer_address.rpartition(":")[0])
            near.close()
            far.close()
        assert seen == ["tcp://127.0.0.1", "tcp://127.0.0.3"]
        for wrong, message in (("192.0.2.1", "can leave from"), ("::1", "another family"), ("host", "not numeric")):
            with pytest.raises(AddressError, match=message):
                transport.connect(listener.address, TransportOptions(local_addresses=(wrong,)), Deadline.after(5.0))
    finally:
        listener.close()


def test_routes_pair_targets_and_sources() -> None:
    def pairs(address: str, *sources: str) -> list[tuple[str, tuple[str, ...]]]:
        routes = TcpTransport().routes(address, TransportOptions(local_addresses=sources))
        return [(target, options.local_addresses) for target, options in routes]

    assert pairs("tcp://a:1") == [("tcp://a:1", ())]
    assert pairs("tcp://a:1,b:2") == [("tcp://a:1", ()), ("tcp://b:2", ())]
    assert pairs("tcp://a:1", "10.0.0.1", "10.1.0.1") == [("tcp://a:1", ("10.0.0.1",)), ("tcp://a:1", ("10.1.0.1",))]
    assert pairs("tcp://a:1,b:2", "x", "y") == [("tcp://a:1", ("x",)), ("tcp://b:2", ("y",))]
    for malformed in ("tcp://a:1,", "tcp://,a:1", "tcp://a:1,tcp://b:2", "tcp://" + ",".join(["a:1"] * 17)):
        with pytest.raises(AddressError):
            pairs(malformed)
    with pytest.raises(UnavailableError):
        MemoryTransport().listen("memory://x", TransportOptions(local_addresses=("127.0.0.1",)))


def test_one_transfer_uses_both_ways_each_for_what_it_carries() -> None:
    """Enough bytes that the slow way's buffers do not hold half of them."""
    ids = prompt(3072)
    carried = [0, 0]

    def through(number: int, pause_s: float) -> Callable[[int], Callable[[bytes], bytes]]:
        def forward(data: bytes) -> bytes:
            carried[number] += len(data)
            time.sleep(pause_s)
            return data

        return lambda _: forward

    with (
        kvstore.open(SPEC, dram="64MiB") as source,
        kvstore.open(SPEC, dram="64MiB") as target,
        target.listen("tcp://127.0.0.1:0") as endpoint,
        Proxy(endpoint.address, through(0, 0.001)) as quick,
        Proxy(endpoint.address, through(1, 0.01)) as slow,
    ):
        store_prompt(source, ids)
        both = f"{quick.address},{slow.address.removeprefix('tcp://')}"
        report = source.send(match_all(source, ids), both).result(WITHIN_S)
        (link,) = source.links()
        assert (quick.connection_count, slow.connection_count) == (1, 1)
        assert report.path.connections == 2
        assert link.peer_address == both
        assert carried[0] > carried[1] > 16 << 10, carried
        assert_same(source, target, ids, 3072)
        assert_settled(source, target)


def test_a_way_that_does_not_work_is_passed_over(source: kvstore.Store, target: kvstore.Store) -> None:
    with target.listen("tcp://127.0.0.1:0") as endpoint:
        both = f"tcp://127.0.0.1:1,{endpoint.address.removeprefix('tcp://')}"
        report = source.send(match_all(source, IDS), both).result(WITHIN_S)
    assert report.reconnects == 0
    assert_same(source, target, IDS, BIG_TOKENS)


def test_a_way_that_does_not_answer_is_not_waited_for(source: kvstore.Store, target: kvstore.Store) -> None:
    """Its connect hangs for as long as the test wants; the transfer ends without it."""
    is_over = threading.Event()
    asked = threading.Event()

    class Silent(TcpTransport):
        def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
            if not address.endswith(":1"):
                return super().connect(address, options, deadline)
            asked.set()
            assert is_over.wait(4 * WITHIN_S)
            raise PeerGoneError("no answer in time")

    settings = TransferSettings(progress_deadline_s=3 * WITHIN_S)
    with Endpoint(target.pool, "tcp://127.0.0.1:0", settings=settings) as endpoint, Sender(settings=settings) as sender:
        try:
            lease = source.read(match_all(source, IDS))
            handle = send_lease(
                lease, f"{endpoint.address},127.0.0.1:1", sender=sender, find_transport=lambda _: Silent()
            )
            assert asked.wait(WITHIN_S)
            assert handle.result(WITHIN_S).path.connections == 1
        finally:
            is_over.set()
    assert_same(source, target, IDS, BIG_TOKENS)


def test_local_addresses_of_another_type_are_refused(source: kvstore.Store) -> None:
    options = TransportOptions(local_addresses=["127.0.0.1"])  # type: ignore[arg-type]
    with pytest.raises(TransferError, match="no tuple"):
        source.send(match_all(source, IDS), "tcp://127.0.0.1:1", transport=options)
