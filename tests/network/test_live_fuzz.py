"""Damaged streams against live endpoints and senders: no crash, no hang, bounded memory, and honest peers are served.

`tests/fuzz` tries the parsers by themselves, many thousand inputs a second; here they reach what lies behind.
"""

from __future__ import annotations

import random
import socket
import threading
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.errors import KVStoreError
from kvstore.limits import FRAME_HEADER_BYTES
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from kvstore.transfer.frames import Kind, TransferId, parse_header
from tests.integration.transfer_nodes import match_all, prompt, store_prompt, tiny_spec
from tests.network.nodes import WITHIN_S, Node, assert_same, assert_settled
from tests.network.rounds import SOAK_ROUNDS, TIMEOUT_S
from tests.network.streams import Babbler, Frame, Recording, damaged, split_frames

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAMS_AT_ONCE = 8
BATCHES = 10 + 50 * SOAK_ROUNDS
TOKENS = 32
IDS = prompt(TOKENS, seed=3)
HASTY = {"progress_deadline_s": 0.5, "connect_deadline_s": 0.5, "resume_window_s": 0.1, "queue_deadline_s": 0.1}
GROWTH_BYTES_MAX = 64 << 20
"""A process that has served nonsense for a while: less than a hundredth of what the nonsense announced."""
pytestmark = pytest.mark.timeout(TIMEOUT_S)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture
def source() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="8MiB") as store:
        store_prompt(store, IDS, seed=3)
        yield store


EPOCH = 0x0123456789ABCDEF


def record(source: kvstore.Store) -> tuple[list[Frame], list[Frame]]:
    """What both sides of one honest transfer say, transfer EPOCH-1."""
    settings = TransferSettings(connections=1)
    with kvstore.open(tiny_spec(), dram="8MiB") as target, Endpoint(target.pool, "tcp://127.0.0.1:0") as endpoint:
        with Recording(endpoint.address) as recording, Sender(settings=settings, boot_epoch=EPOCH) as sender:
            send_lease(source.read(match_all(source, IDS)), recording.address, sender=sender).result(WITHIN_S)
        assert match_all(target, IDS).tokens == TOKENS
    return split_frames(bytes(recording.sent)), split_frames(bytes(recording.received))


def generation_of(sock: socket.socket) -> int:
    """What the answers to HELLO and OFFER name; 0 if there are none."""
    with suppress(KVStoreError, ConnectionError), sock.makefile("rb") as answers:
        while True:
            header = parse_header(answers.read(FRAME_HEADER_BYTES))
            answers.read(header.payload_bytes)
            if header.kind is not Kind.HELLO:
                return header.generation
    return 0


def converse(address: str, frames: list[Frame], seed: int, *, is_honest: bool) -> None:
    """Begin a transfer and go wrong at some point, from the first byte on or in what follows the offer."""
    generator = random.Random(seed)
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=WITHIN_S) as sock, suppress(ConnectionError):
        if not is_honest and generator.random() < 0.3:
            sock.sendall(damaged(generator, frames))
        else:
            sock.sendall(b"".join(frame.wire for frame in frames[:2]))
            generation = generation_of(sock)
            rest = [Frame(replace(frame.header, generation=generation), frame.payload) for frame in frames[2:]]
            sock.sendall(b"".join(frame.wire for frame in rest) if is_honest else damaged(generator, rest))
        if is_honest or generator.random() < 0.7:
            with suppress(OSError):  # the endpoint has hung up
                sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                continue


def test_an_endpoint_survives_damaged_streams(source: kvstore.Store, make_node: Callable[..., Node]) -> None:
    sent, _ = record(source)
    generator = random.Random(21)
    honest = make_node()
    honest.put(5, TOKENS)
    victim = make_node(settings=HASTY, dram="16MiB")
    victim.listen()
    resident_bytes: list[int] = []
    committed = 0
    for batch in range(BATCHES):
        speakers = []
        for number in range(STREAMS_AT_ONCE):
            # Another transfer each time: the endpoint remembers how one has ended.
            transfer = TransferId(generator.getrandbits(63) + 1, batch * STREAMS_AT_ONCE + number + 1)
            frames = [frame.of(transfer) for frame in sent]
            seed = generator.getrandbits(32)
            speakers.append(
                Background(
                    lambda frames=frames, seed=seed, number=number: converse(  # type: ignore[misc]
                        victim.address, frames, seed, is_honest=not number
                    )
                )
            )
        for speaker in speakers:
            speaker.result(WITHIN_S)
        assert_settled(victim)
        # By the honest one, or by one whose damage did not matter.
        assert victim.digest(3, TOKENS)[0] == TOKENS
        committed = victim.state()["received"]["committed"]
        victim.evict(3, TOKENS)
        resident_bytes.append(victim.state()["resident_bytes"])
    assert BATCHES <= committed <= BATCHES * STREAMS_AT_ONCE
    assert victim.state()["received"]["refused"] > BATCHES
    assert max(resident_bytes[2:]) - resident_bytes[1] < GROWTH_BYTES_MAX, resident_bytes
    honest.send(victim.address, 5, TOKENS)
    assert honest.wait()["failed"] is None
    assert_same(honest, victim, 5, TOKENS)
    assert_settled(honest, victim)


def test_a_sender_survives_damaged_answers(source: kvstore.Store) -> None:
    _, received = record(source)
    generator = random.Random(22)
    lock = threading.Lock()
    settings = TransferSettings(**HASTY, connections=1)

    def babble() -> bytes:
        with lock:
            return damaged(generator, received)

    def send_to(address: str) -> str:
        # The answers were recorded for this transfer.
        with Sender(settings=settings, boot_epoch=EPOCH) as sender:
            handle = send_lease(source.read(match_all(source, IDS)), address, sender=sender, total_deadline_s=5.0)
            try:
                handle.result(WITHIN_S)
            except KVStoreError as error:
                return type(error).__name__
            return "sent"

    endings: set[str] = set()
    for _ in range(BATCHES // 3):
        with ExitStack() as stack:
            babblers = [stack.enter_context(Babbler(babble, hang_up_s=0.3)) for _ in range(STREAMS_AT_ONCE)]
            senders = [Background(lambda to=babbler.address: send_to(to)) for babbler in babblers]  # type: ignore[misc]
            endings |= {sender.result(WITHIN_S) for sender in senders}
    assert len(endings) > 1, endings
    # No lease was lost: everything can go.
    assert source.pool.evict(source.prompt(IDS).path.keys[0]) > 0
    assert source.statistics().committed_bytes == 0
