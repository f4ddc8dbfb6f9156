"""The transport kit notices broken transports: each defect below must fail the case that is named beside it."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvstore.abc import Connection, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, PeerGoneError
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.transport import TransportConformance, connect_pair
from transports.memory import MemoryTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.abc import Listener

_names = itertools.count()


class Broken(Connection):
    """A good connection with one defect added by a subclass."""

    def __init__(self, inner: Connection) -> None:
        self.inner = inner

    @property
    def peer_address(self) -> str:
        return self.inner.peer_address

    @property
    def supports_get(self) -> bool:
        return True

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        self.inner.send(buffers, deadline)

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        self.inner.receive(into, deadline)

    def close(self) -> None:
        self.inner.close()

    def expose(self, view: memoryview) -> bytes:
        return self.inner.expose(view)

    def withdraw(self, descriptor: bytes) -> None:
        self.inner.withdraw(descriptor)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        self.inner.get(descriptor, offset, into, deadline)


class FlipsABit(Broken):
    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        joined = bytearray(b"".join(buffers))
        if joined:
            joined[len(joined) // 2] ^= 1
        self.inner.send([memoryview(joined)], deadline)


class SwapsViews(Broken):
    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        self.inner.send(list(reversed(buffers)), deadline)


class CountsItemsAsBytes(Broken):
    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        self.inner.send([bytes(buffer)[: len(buffer)] for buffer in buffers], deadline)


class GivesUpQuietly(Broken):
    """Pretends that what could not be sent in time has been sent."""

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        try:
            self.inner.send(buffers, deadline)
        except DeadlineError:
            return


class TakesOneDirectionAtATime(Broken):
    """Deadlocks when both sides send: the peer's bytes are not looked at meanwhile."""

    busy: list[Connection] = []  # noqa: RUF012

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        while self.busy:
            if deadline.has_passed:
                raise DeadlineError("busy")
            time.sleep(0.001)
        self.inner.receive(into, deadline)

    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        self.busy.append(self)
        try:
            self.inner.send(buffers, Deadline.after(0.5))
        finally:
            self.busy.remove(self)


class GoesOnAfterAPart(Broken):
    """Keeps a connection whose stream has lost its message boundary."""

    def receive(self, into: Sequence[memoryview], deadline: Deadline) -> None:
        for view in into:
            for place in range(len(view)):
                self.inner.receive([view[place : place + 1]], deadline)


class ReadsPastTheEnd(Broken):
    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        if offset + len(into) > 100:
            into[:] = bytes(len(into))
            return
        self.inner.get(descriptor, offset, into, deadline)


class ExposesACopy(Broken):
    def expose(self, view: memoryview) -> bytes:
        return self.inner.expose(memoryview(bytes(view)))


class IgnoresWithdraw(Broken):
    def withdraw(self, descriptor: bytes) -> None:
        pass


class OutlivesClose(Broken):
    def send(self, buffers: Sequence[bytes | memoryview], deadline: Deadline) -> None:
        try:
            self.inner.send(buffers, deadline)
        except PeerGoneError:
            return


class Kit(TransportConformance):
    __test__ = False
    buffered_bytes_max = 4 << 20


@pytest.mark.parametrize(
    ("defect", "case"),
    [
        (FlipsABit, lambda kit, pair: kit.test_echo(pair, 65536)),
        (SwapsViews, lambda kit, pair: kit.test_many_views_keep_their_order(pair)),
        (CountsItemsAsBytes, lambda kit, pair: kit.test_views_of_any_item_type(pair)),
        (GivesUpQuietly, lambda kit, pair: kit.test_sender_without_reader_reaches_its_deadline_and_loses_nothing(pair)),
        (TakesOneDirectionAtATime, lambda kit, pair: kit.test_both_directions_at_once(pair)),
        (GoesOnAfterAPart, lambda kit, pair: kit.test_receive_deadline_within_a_message_closes_the_connection(pair)),
        (ReadsPastTheEnd, lambda kit, pair: kit.test_get_outside_the_exposure(pair)),
        (ExposesACopy, lambda kit, pair: kit.test_get_sees_the_memory_and_not_a_copy(pair)),
        (OutlivesClose, lambda kit, pair: kit.test_use_after_close(pair, MemoryTransport().listen(*_fresh()))),
    ],
)
def test_kit_notices(
    defect: type[Broken],
    case: Callable[[TransportConformance, tuple[Connection, Connection]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A defect that hangs shall fail soon; a good connection needs far less.
    monkeypatch.setattr("kvstore.testing.transport.TEST_S", 2.0)
    near, far = (defect(end) for end in _pair())
    with pytest.raises((AssertionError, PeerGoneError, DeadlineError, pytest.fail.Exception)):
        case(Kit(), (near, far))
    near.close()
    far.close()


def test_kit_notices_a_withdrawal_without_effect() -> None:
    near, far = _pair()
    with pytest.raises(pytest.fail.Exception):
        Kit().test_get_of_what_is_not_exposed(*_transport_and_listener(), (near, IgnoresWithdraw(far)))
    near.close()
    far.close()


def test_kit_passes_what_it_wraps() -> None:
    near, far = (Broken(end) for end in _pair())
    kit = Kit()
    kit.test_echo((near, far), 65536)
    kit.test_many_views_keep_their_order((near, far))
    kit.test_both_directions_at_once((near, far))
    kit.test_get_outside_the_exposure((near, far))
    kit.test_get_sees_the_memory_and_not_a_copy((near, far))
    kit.test_receive_deadline_within_a_message_closes_the_connection((near, far))
    near.close()
    far.close()


def test_leaks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.testing.resources.SETTLE_S", 0.1)
    go_on = threading.Event()
    with pytest.raises(AssertionError, match="kvstore-testing"), leaves_nothing():
        waiting = Background(lambda: go_on.wait(60.0))
    go_on.set()
    assert waiting.result(30.0)
    with pytest.raises(AssertionError, match="/dev/null"), leaves_nothing():
        left_open = open("/dev/null", "rb")  # noqa: SIM115
    left_open.close()


def _fresh() -> tuple[str, TransportOptions]:
    return f"memory://kit-{next(_names)}", TransportOptions()


def _transport_and_listener() -> tuple[MemoryTransport, Listener]:
    transport = MemoryTransport()
    return transport, transport.listen(*_fresh())


def _pair() -> tuple[Connection, Connection]:
    transport = MemoryTransport()
    listener = transport.listen(*_fresh())
    pair = connect_pair(transport, listener)
    listener.close()
    return pair
