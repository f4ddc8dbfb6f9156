"""Conformance kit for transports. The only import of pytest in the package is in these kits.

A test module of the implementer's own:

    class TestMine(TransportConformance):
        malformed_addresses = ("mine://", "mine://a b")

        @pytest.fixture
        def transport(self):
            return MyTransport()

        def listen_address(self):
            return "mine://any"

What a transport cannot do (pacing, `get`) is skipped, not failed.
"""

from __future__ import annotations

import array
import itertools
import random
import time
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore._native import Stream
from kvstore.abc import Connection, Listener, Transport, TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import AddressError, DeadlineError, PeerGoneError, TransportError, UnavailableError
from kvstore.testing.resources import Background, leaves_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[Connection, Connection]

TEST_S = 30.0
"""No single step of the kit takes longer, also on a slow and busy machine."""
WAKE_S = 1.0
"""`close` ends the calls that wait within this."""
SETTLE_S = 0.05
"""For a thread to reach the call in which it shall wait. Too short makes a test weaker, never fail."""
UNPACED = TransportOptions()


class TransportConformance:
    """The cases; a subclass says what to test."""

    malformed_addresses: ClassVar[tuple[str, ...]] = ()
    """Addresses of the transport's own scheme that `listen` and `connect` must refuse."""
    buffered_bytes_max: ClassVar[int] = 96 << 20
    """More than a connection takes while nobody receives: what the system and the transport buffer together."""

    @pytest.fixture
    def transport(self) -> Transport:
        """The transport under test."""
        raise NotImplementedError("override the fixture `transport`")

    def listen_address(self) -> str:
        """An address on which nobody listens; called several times in a test, it must not repeat a used one."""
        raise NotImplementedError("override `listen_address`")

    @pytest.fixture(autouse=True)
    def _leaves_nothing(self) -> Iterator[None]:
        with leaves_nothing():
            yield

    @pytest.fixture
    def listener(self, transport: Transport) -> Iterator[Listener]:
        listener = transport.listen(self.listen_address(), UNPACED)
        yield listener
        listener.close()

    @pytest.fixture
    def pair(self, transport: Transport, listener: Listener) -> Iterator[Pair]:
        """The two ends of a connection: the one that connected, and the one that was accepted."""
        near, far = connect_pair(transport, listener)
        yield near, far
        near.close()
        far.close()

    # The socket below, for native code

    def test_a_native_stream_is_the_same_stream(self, pair: Pair) -> None:
        near, far = pair
        streams = [native_stream(connection) for connection in pair]
        if None in streams:
            assert streams == [None, None]
            return
        sending, receiving = (stream for stream in streams if stream is not None)
        message = random_bytes(1 << 20)
        received = bytearray(len(message))
        sender = Background(lambda: sending.send([message[:1000], message[1000:]]))
        far.receive([memoryview(received)], soon())
        sender.result(TEST_S)
        assert received == message
        near.send([message[:100]], soon())
        receiving.receive_into(memoryview(received)[:100])
        assert received[:100] == message[:100]
        # Closing the connection ends what native code waits for, without the native stream being closed.
        waiting = Background(lambda: receiving.receive_header(soon().at_s))
        far.close()
        with pytest.raises(PeerGoneError):
            waiting.result(TEST_S)
        with pytest.raises(PeerGoneError):
            far.native_stream()
        for stream in (sending, receiving):
            stream.close()

    # Bytes

    @pytest.mark.parametrize("size_bytes", [0, 1, 65535, 65536, 5 << 20])
    def test_echo(self, pair: Pair, size_bytes: int) -> None:
        near, far = pair
        message = random_bytes(size_bytes)

        def echo() -> None:
            received = bytearray(size_bytes)
            far.receive([memoryview(received)], soon())
            assert received == message, "checked on both sides: the way back may undo what the way there did"
            far.send([memoryview(received)], soon())

        echoing = Background(echo)
        near.send([message], soon())
        returned = bytearray(size_bytes)
        near.receive([memoryview(returned)], soon())
        echoing.result(TEST_S)
        assert returned == message

    def test_many_views_keep_their_order(self, pair: Pair) -> None:
        near, far = pair
        message = random_bytes(300_000)
        sent_views = cut(memoryview(message), 5000, seed=1)
        assert any(len(view) == 0 for view in sent_views)
        received = bytearray(len(message))
        receiving = Background(lambda: far.receive(cut(memoryview(received), 3000, seed=2), soon()))
        near.send(sent_views, soon())
        receiving.result(TEST_S)
        assert received == message

    def test_messages_keep_their_order(self, pair: Pair) -> None:
        near, far = pair
        sizes = [random.Random(3).randrange(1, 40_000) for _ in range(200)]
        message = memoryview(random_bytes(sum(sizes)))
        received = bytearray(len(message))

        def receive() -> None:
            start = 0
            for size in reversed(sizes):
                far.receive([memoryview(received)[start : start + size]], soon())
                start += size

        receiving = Background(receive)
        start = 0
        for size in sizes:
            near.send([message[start : start + size]], soon())
            start += size
        receiving.result(TEST_S)
        assert received == message

    def test_views_of_any_item_type(self, pair: Pair) -> None:
        near, far = pair
        numbers = array.array("d", [1.5, -2.0, 3.25])
        grid = memoryview(bytes(range(12))).cast("B", (3, 4))
        received = array.array("I", [0] * 9)
        near.send([memoryview(numbers), grid], soon())
        far.receive([memoryview(received)], soon())
        assert received.tobytes() == numbers.tobytes() + bytes(range(12))

    def test_both_directions_at_once(self, pair: Pair) -> None:
        near, far = pair
        messages = [random_bytes(6 << 20, seed) for seed in (1, 2)]
        received = [bytearray(6 << 20) for _ in messages]
        running = [
            Background(lambda: near.send([messages[0]], soon())),
            Background(lambda: far.send([messages[1]], soon())),
            Background(lambda: far.receive([memoryview(received[0])], soon())),
            Background(lambda: near.receive([memoryview(received[1])], soon())),
        ]
        for call in running:
            call.result(TEST_S)
        assert received == messages

    def test_connections_are_independent(self, transport: Transport, listener: Listener) -> None:
        pairs = [connect_pair(transport, listener) for _ in range(4)]
        stalled = Background(lambda: pairs[0][1].receive([memoryview(bytearray(1))], soon()))
        for number, (near, far) in enumerate(pairs[1:]):
            near.send([random_bytes(50_000, number)], soon())
            received = bytearray(50_000)
            far.receive([memoryview(received)], soon())
            assert received == random_bytes(50_000, number)
        assert stalled.is_running
        pairs[0][0].send([b"x"], soon())
        stalled.result(TEST_S)
        for near, far in pairs:
            near.close()
            far.close()

    # Deadlines

    def test_sender_without_reader_reaches_its_deadline_and_loses_nothing(self, pair: Pair) -> None:
        near, far = pair
        piece_bytes = 1 << 20
        sent_numbers: list[int] = []

        def send_until_full() -> None:
            for number in range(self.buffered_bytes_max // piece_bytes + 1):
                near.send([numbered_piece(number, piece_bytes)], Deadline.after(0.3))
                sent_numbers.append(number)

        with pytest.raises(DeadlineError):
            send_until_full()
        with pytest.raises(PeerGoneError):
            near.send([b"after a deadline the connection is closed"], soon())
        received = bytearray(piece_bytes)
        for number in sent_numbers:
            far.receive([memoryview(received)], soon())
            assert received == numbered_piece(number, piece_bytes)
        with pytest.raises(PeerGoneError):
            far.receive([memoryview(received)], soon())

    def test_slow_reader_gets_everything(self, pair: Pair) -> None:
        near, far = pair
        sending = Background(lambda: near.send([random_bytes(12 << 20)], soon()))
        time.sleep(4 * SETTLE_S)
        received = bytearray(12 << 20)
        for start in range(0, len(received), 1 << 20):
            far.receive([memoryview(received)[start : start + (1 << 20)]], soon())
        sending.result(TEST_S)
        assert received == random_bytes(12 << 20)

    def test_receive_deadline_before_the_first_byte_keeps_the_connection(self, pair: Pair) -> None:
        near, far = pair
        received = bytearray(5)
        for seconds in (0.05, 0.0):
            with pytest.raises(DeadlineError):
                far.receive([memoryview(received)], Deadline.after(seconds))
        near.send([b"later"], soon())
        far.receive([memoryview(received)], soon())
        assert received == b"later"

    def test_receive_deadline_within_a_message_closes_the_connection(self, pair: Pair) -> None:
        near, far = pair
        near.send([b"part"], soon())
        with pytest.raises(DeadlineError):
            far.receive([memoryview(bytearray(10))], Deadline.after(0.3))
        with pytest.raises(PeerGoneError):
            far.receive([memoryview(bytearray(1))], soon())

    def test_accept_deadline_keeps_the_listener(self, transport: Transport, listener: Listener) -> None:
        for seconds in (0.05, 0.0):
            with pytest.raises(DeadlineError):
                listener.accept(Deadline.after(seconds))
        for end in connect_pair(transport, listener):
            end.close()

    # Ends

    def test_close_wakes_receive(self, pair: Pair) -> None:
        near, _ = pair
        waiting = Background(lambda: near.receive([memoryview(bytearray(1))], soon()))
        time.sleep(SETTLE_S)
        near.close()
        with pytest.raises(PeerGoneError):
            waiting.result(WAKE_S)

    def test_close_wakes_send(self, pair: Pair) -> None:
        near, _ = pair
        waiting = Background(lambda: near.send([bytes(self.buffered_bytes_max)], soon()))
        time.sleep(4 * SETTLE_S)
        assert waiting.is_running
        near.close()
        with pytest.raises(PeerGoneError):
            waiting.result(WAKE_S)

    def test_close_wakes_accept(self, listener: Listener) -> None:
        waiting = [Background(lambda: listener.accept(soon())) for _ in range(3)]
        time.sleep(SETTLE_S)
        listener.close()
        for call in waiting:
            with pytest.raises(PeerGoneError):
                call.result(WAKE_S)

    def test_peer_close_wakes_receive_within_a_message(self, pair: Pair) -> None:
        near, far = pair
        waiting = Background(lambda: near.receive([memoryview(bytearray(10))], soon()))
        far.send([b"part"], soon())
        time.sleep(SETTLE_S)
        far.close()
        with pytest.raises(PeerGoneError):
            waiting.result(WAKE_S)

    def test_peer_close_wakes_send(self, pair: Pair) -> None:
        near, far = pair
        waiting = Background(lambda: near.send([bytes(self.buffered_bytes_max)], soon()))
        time.sleep(4 * SETTLE_S)
        far.close()
        with pytest.raises(PeerGoneError):
            waiting.result(WAKE_S)

    def test_what_was_sent_before_close_is_received(self, pair: Pair) -> None:
        near, far = pair
        message = random_bytes(100_000)
        near.send([message], soon())
        near.close()
        received = bytearray(len(message))
        far.receive([memoryview(received)], soon())
        assert received == message
        with pytest.raises(PeerGoneError):
            far.receive([memoryview(received)], soon())

    def test_use_after_close(self, pair: Pair, listener: Listener) -> None:
        near, _ = pair
        near.close()
        near.close()
        with pytest.raises(PeerGoneError):
            near.send([b"x"], soon())
        with pytest.raises(PeerGoneError):
            near.receive([memoryview(bytearray(1))], soon())
        listener.close()
        listener.close()
        with pytest.raises(PeerGoneError):
            listener.accept(soon())

    def test_many_threads_close_at_once(self, transport: Transport, listener: Listener) -> None:
        for _ in range(20):
            near, far = connect_pair(transport, listener)
            waiting = Background(partial(near.receive, [memoryview(bytearray(1))], soon()))
            closing = [Background(end.close) for end in (near, near, far, near)]
            for call in closing:
                call.result(WAKE_S)
            with pytest.raises(PeerGoneError):
                waiting.result(WAKE_S)

    # Addresses

    def test_availability_says_something(self, transport: Transport) -> None:
        availability = transport.availability()
        assert availability.is_available
        assert availability.detail

    def test_addresses_carry_the_scheme(self, transport: Transport, listener: Listener, pair: Pair) -> None:
        for address in (listener.address, pair[0].peer_address, pair[1].peer_address):
            assert address.startswith(f"{transport.scheme}://")

    def test_address_in_use(self, transport: Transport, listener: Listener) -> None:
        with pytest.raises(AddressError, match="in use"):
            transport.listen(listener.address, UNPACED)

    def test_address_is_free_after_close(self, transport: Transport, listener: Listener) -> None:
        near, far = connect_pair(transport, listener)
        listener.close()
        again = transport.listen(listener.address, UNPACED)
        far.send([b"connections outlive their listener"], soon())
        for end in (near, far, *connect_pair(transport, again)):
            end.close()
        again.close()

    def test_nobody_listens(self, transport: Transport, listener: Listener) -> None:
        listener.close()
        with pytest.raises(PeerGoneError):
            transport.connect(listener.address, UNPACED, soon())

    def test_malformed_addresses(self, transport: Transport) -> None:
        for address in (*self.malformed_addresses, "", "no-scheme", "other-scheme://127.0.0.1:1"):
            with pytest.raises(AddressError):
                transport.listen(address, UNPACED)
            with pytest.raises(AddressError):
                transport.connect(address, UNPACED, soon())

    # Pacing

    def test_pacing_is_kept(self, transport: Transport) -> None:
        rate_bytes_per_s, seconds = 8e6, 0.75
        options = TransportOptions(pacing_bytes_per_s=rate_bytes_per_s)
        try:
            listener = transport.listen(self.listen_address(), options)
        except UnavailableError as reason:
            pytest.skip(str(reason))
        ends = connect_pair(transport, listener, options)
        received = memoryview(bytearray(int(rate_bytes_per_s * seconds)))
        for source, target in (ends, reversed(ends)):
            receiving = Background(partial(target.receive, [received], soon()))
            began_s = time.monotonic()
            source.send([bytes(len(received))], soon())
            receiving.result(TEST_S)
            assert time.monotonic() - began_s >= 0.6 * seconds
        for end in (*ends, listener):
            end.close()

    # Reading exposed memory

    @pytest.fixture
    def one_sided_pair(self, pair: Pair) -> Pair:
        if not pair[0].supports_get:
            pytest.skip("this transport's connections are streams")
        return pair

    def test_stream_refuses_to_expose(self, pair: Pair) -> None:
        if pair[0].supports_get:
            pytest.skip("this transport's connections are one-sided")
        for use in (
            lambda: pair[0].expose(memoryview(b"x")),
            lambda: pair[0].withdraw(b"x"),
            lambda: pair[0].get(b"x", 0, memoryview(bytearray(1)), soon()),
        ):
            with pytest.raises(UnavailableError):
                use()

    def test_get_ranges(self, one_sided_pair: Pair) -> None:
        near, far = one_sided_pair
        size_bytes = 9 << 20
        memory = bytearray(random_bytes(size_bytes))
        descriptor = far.expose(memoryview(memory))
        assert 1 <= len(descriptor) <= 256
        for offset, size in ((0, size_bytes), (0, 1), (size_bytes - 1, 1), (12345, 6 << 20), (7, 0), (size_bytes, 0)):
            into = bytearray(size)
            near.get(descriptor, offset, memoryview(into), soon())
            assert into == memory[offset : offset + size]
        far.withdraw(descriptor)

    def test_get_sees_the_memory_and_not_a_copy(self, one_sided_pair: Pair) -> None:
        near, far = one_sided_pair
        memory, into = bytearray(b"before"), bytearray(5)
        descriptor = far.expose(memoryview(memory))
        memory[:] = b"after!"
        near.get(descriptor, 0, memoryview(into), soon())
        assert into == b"after"
        far.withdraw(descriptor)
        memory.extend(b"an exposure that has ended holds no view of the memory")

    def test_get_outside_the_exposure(self, one_sided_pair: Pair) -> None:
        near, far = one_sided_pair
        descriptor = far.expose(memoryview(random_bytes(100)))
        for offset, size in ((0, 101), (100, 1), (-1, 1), (1 << 62, 1), (99, 2)):
            into = bytearray(size)
            with pytest.raises(TransportError):
                near.get(descriptor, offset, memoryview(into), soon())
            assert into == bytes(size)
        far.withdraw(descriptor)

    def test_get_of_what_is_not_exposed(self, transport: Transport, listener: Listener, one_sided_pair: Pair) -> None:
        near, far = one_sided_pair
        other_near, other_far = connect_pair(transport, listener)
        own, foreign, withdrawn = (end.expose(memoryview(b"secret")) for end in (near, other_far, far))
        assert len({own, foreign, withdrawn}) == 3
        far.withdraw(withdrawn)
        far.withdraw(withdrawn)
        for descriptor in (own, foreign, withdrawn, b"", bytes(len(own))):
            into = bytearray(6)
            with pytest.raises(PeerGoneError):
                near.get(descriptor, 0, memoryview(into), soon())
            assert into == bytes(6)
        for end in (other_near, other_far):
            end.close()
        late = far.expose(memoryview(b"secret"))
        far.close()
        with pytest.raises(PeerGoneError):
            near.get(late, 0, memoryview(bytearray(6)), soon())
        with pytest.raises(PeerGoneError):
            far.expose(memoryview(b"secret"))

    def test_no_get_runs_after_withdraw(self, one_sided_pair: Pair) -> None:
        near, far = one_sided_pair
        size_bytes = 16 << 20
        for round_number in range(3):
            memory, into = bytearray(b"\1" * size_bytes), bytearray(size_bytes)
            descriptor = far.expose(memoryview(memory))

            def get_until_withdrawn(descriptor: bytes = descriptor, into: bytearray = into) -> None:
                until = soon()
                while not until.has_passed:
                    near.get(descriptor, 0, memoryview(into), soon())
                    assert into.count(1) == size_bytes, "a get read memory whose exposure had ended"

            getting = Background(get_until_withdrawn)
            time.sleep(SETTLE_S + 0.003 * round_number)
            far.withdraw(descriptor)
            memory[:] = b"\2" * size_bytes
            with pytest.raises(PeerGoneError):
                getting.result(TEST_S)
            assert into.count(2) == 0, "a get read memory whose exposure had ended"


def native_stream(connection: Connection) -> Stream | None:
    """A native stream on a connection's socket, if it has one."""
    descriptor = connection.native_stream()
    return None if descriptor is None else Stream(descriptor, connection.peer_address, TEST_S)


def connect_pair(transport: Transport, listener: Listener, options: TransportOptions = UNPACED) -> Pair:
    """Both ends of a new connection."""
    accepting = Background(lambda: listener.accept(soon()))
    near = transport.connect(listener.address, options, soon())
    return near, accepting.result(TEST_S)


def soon() -> Deadline:
    """A deadline that is reached only if something hangs."""
    return Deadline.after(TEST_S)


def random_bytes(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def numbered_piece(number: int, size_bytes: int) -> bytes:
    """Bytes that no other piece has at the same place."""
    return number.to_bytes(8, "little") * (size_bytes // 8)


def cut(view: memoryview, parts: int, seed: int) -> list[memoryview]:
    """`view` in so many parts of random sizes, some of them empty."""
    source = random.Random(seed)
    bounds = sorted([0, len(view), *(source.randrange(len(view)) for _ in range(parts - 1))])
    bounds[1] = bounds[0]
    return [view[start:stop] for start, stop in itertools.pairwise(bounds)]
