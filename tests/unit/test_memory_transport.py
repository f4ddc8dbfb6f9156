"""What is particular to the in-process transport: names, the queue of a listener, limits, exposures under load."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, PeerGoneError, TransportError, UnavailableError
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.transport import connect_pair, random_bytes, soon
from transports.memory import MemoryTransport
from transports.memory.exposures import Exposures
from transports.memory.listener import BACKLOG
from transports.memory.pipe import Pipe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Connection, Listener

PLAIN = TransportOptions()
TEST_S = 30.0
_names = itertools.count()


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = MemoryTransport().listen(f"memory://unit-{next(_names)}", PLAIN)
    yield listener
    listener.close()


@pytest.fixture
def pair(listener: Listener) -> Iterator[tuple[Connection, Connection]]:
    near, far = connect_pair(MemoryTransport(), listener)
    yield near, far
    near.close()
    far.close()


@pytest.mark.parametrize(
    "options", [TransportOptions(pacing_bytes_per_s=1e6), TransportOptions(congestion_control="bbr")]
)
def test_options_of_a_network_are_refused(options: TransportOptions, listener: Listener) -> None:
    with pytest.raises(UnavailableError, match="no pacing, congestion control or interfaces"):
        MemoryTransport().listen("memory://paced", options)
    with pytest.raises(UnavailableError, match="use tcp"):
        MemoryTransport().connect(listener.address, options, soon())


def test_a_full_queue_makes_connect_wait_and_then_fail(listener: Listener) -> None:
    waiting = [MemoryTransport().connect(listener.address, PLAIN, soon()) for _ in range(BACKLOG)]
    with pytest.raises(PeerGoneError, match=f"{BACKLOG} connections waiting"):
        MemoryTransport().connect(listener.address, PLAIN, Deadline.after(0.05))
    late = Background(lambda: MemoryTransport().connect(listener.address, PLAIN, soon()))
    accepted = [listener.accept(soon()) for _ in range(BACKLOG)]
    late.result(TEST_S)
    for end in (*waiting, *accepted):
        end.close()


def test_closing_a_listener_ends_connections_that_were_never_accepted(listener: Listener) -> None:
    near = MemoryTransport().connect(listener.address, PLAIN, soon())
    near.send([b"into the queue"], soon())
    waiting = Background(lambda: near.receive([memoryview(bytearray(1))], soon()))
    listener.close()
    with pytest.raises(PeerGoneError):
        waiting.result(TEST_S)
    with pytest.raises(PeerGoneError):
        near.send([b"x"], soon())


def test_a_pipe_keeps_bytes_across_its_end() -> None:
    pipe = Pipe("source", "target", capacity_bytes=7)
    message = random_bytes(1000)
    received = bytearray(1000)
    receiving = Background(lambda: pipe.receive([memoryview(received)[i : i + 3] for i in range(0, 1000, 3)], soon()))
    for start in range(0, 1000, 5):
        pipe.send([memoryview(message)[start : start + 5]], soon())
    receiving.result(TEST_S)
    assert received == message
    assert pipe.received_bytes == 1000


def test_exposures_have_a_limit(monkeypatch: pytest.MonkeyPatch, pair: tuple[Connection, Connection]) -> None:
    monkeypatch.setattr("transports.memory.exposures.EXPOSURES_MAX", 3)
    near, _ = pair
    memory = bytearray(8)
    held = [near.expose(memoryview(memory)) for _ in range(3)]
    with pytest.raises(TransportError, match="3 views are exposed"):
        near.expose(memoryview(memory))
    near.withdraw(held[0])
    near.expose(memoryview(memory))
    near.close()
    memory.extend(b"close releases every view, the refused one too")


def test_what_cannot_be_exposed_or_filled(pair: tuple[Connection, Connection]) -> None:
    near, far = pair
    with pytest.raises(TransportError, match="contiguous"):
        near.expose(memoryview(bytes(10))[::2])
    descriptor = near.expose(memoryview(bytes(10)))
    with pytest.raises(TransportError, match="read-only"):
        far.get(descriptor, 0, memoryview(bytes(10)), soon())
    with pytest.raises(DeadlineError):
        far.get(descriptor, 0, memoryview(bytearray(10)), Deadline.after(-1.0))


def test_withdraw_waits_for_a_running_get_and_so_does_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    copying, may_end = threading.Event(), threading.Event()

    def slow_copy(target: memoryview, source: memoryview) -> None:
        copying.set()
        assert may_end.wait(TEST_S)
        target[:] = source

    monkeypatch.setattr("transports.memory.exposures._copy_bytes", slow_copy)
    exposures = Exposures("a peer")
    memory, into = bytearray(b"whole"), bytearray(5)
    descriptor = exposures.expose(memoryview(memory))
    getting = Background(lambda: exposures.get(descriptor, 0, memoryview(into), soon()))
    assert copying.wait(TEST_S)
    ending = [Background(lambda: exposures.withdraw(descriptor)), Background(exposures.close)]
    time.sleep(0.05)
    assert all(call.is_running for call in ending), "an exposure ended while a get of it was running"
    with pytest.raises(PeerGoneError):
        exposures.get(descriptor, 0, memoryview(into), soon())
    may_end.set()
    for call in ending:
        call.result(TEST_S)
    getting.result(TEST_S)
    assert into == b"whole"
    memory.extend(b"no view is left")


def test_withdrawal_stops_a_long_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transports.memory.exposures.GET_STEP_BYTES", 1)
    exposures = Exposures("a peer")
    steps: list[int] = []

    def copy(target: memoryview, source: memoryview) -> None:
        steps.append(source[0])
        if len(steps) == 3:
            exposure = exposures._exposures[descriptor]
            withdrawing.append(Background(lambda: exposures.withdraw(descriptor)))
            until = soon()
            while not exposure.is_withdrawn:
                until.check("the withdrawal to begin")
                time.sleep(0.001)

    withdrawing: list[Background[None]] = []
    monkeypatch.setattr("transports.memory.exposures._copy_bytes", copy)
    descriptor = exposures.expose(memoryview(bytes(range(100))))
    with pytest.raises(PeerGoneError, match="withdrawn"):
        exposures.get(descriptor, 0, memoryview(bytearray(100)), soon())
    withdrawing[0].result(TEST_S)
    assert steps == [0, 1, 2]
