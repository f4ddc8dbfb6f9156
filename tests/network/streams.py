"""What two peers say to each other, recorded, and damaged frame by frame: live input for endpoints and senders."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore._native import crc32c
from kvstore.errors import KVStoreError
from kvstore.limits import FRAME_HEADER_BYTES
from kvstore.transfer.frames import FrameHeader, Kind, TransferId, parse_header
from kvstore.transfer.messages import Hello
from tests.fuzz.mutate import mutate

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

JOIN_S = 10.0


@dataclass(frozen=True)
class Frame:
    """A header and its payload as they were on the wire."""

    header: FrameHeader
    payload: bytes

    @property
    def wire(self) -> bytes:
        return self.header.pack() + self.payload

    def mended(self, payload: bytes) -> Frame:
        """Another payload, with the lengths and checksums that it needs."""
        table = payload[: self.header.table_bytes] if self.header.kind is Kind.DATA else payload
        header = replace(self.header, payload_bytes=len(payload), payload_crc32c=crc32c(table))
        try:
            header.pack()
        except KVStoreError:
            # No header can announce it: the old one does, and the stream is out of step from here on.
            header = self.header
        return Frame(header, payload)

    def of(self, transfer: TransferId) -> Frame:
        """The same frame of another transfer, and of the node that began it."""
        if self.header.kind is Kind.HELLO:
            return self.mended(replace(Hello.parse(memoryview(self.payload)), boot_epoch=transfer.epoch).pack())
        return Frame(replace(self.header, transfer=transfer), self.payload)


def split_frames(stream: bytes) -> list[Frame]:
    """The frames of a stream that was recorded whole."""
    frames = []
    while stream:
        header = parse_header(stream[:FRAME_HEADER_BYTES])
        end = FRAME_HEADER_BYTES + header.payload_bytes
        frames.append(Frame(header, stream[FRAME_HEADER_BYTES:end]))
        stream = stream[end:]
    return frames


def damaged(generator: random.Random, frames: list[Frame]) -> bytes:
    """A stream that is wrong somewhere: on the wire, in a payload whose checksums hold, or in its order."""
    frames = list(frames)
    number = generator.randrange(len(frames))
    match generator.randrange(6):
        case 0:
            return mutate(generator, [b"".join(frame.wire for frame in frames)])
        case 1:
            frames[number] = frames[number].mended(mutate(generator, [frames[number].payload]))
        case 2:
            frames[number] = _with_header(generator, frames[number])
        case 3:
            frames.insert(generator.randrange(len(frames) + 1), generator.choice(frames))
        case 4:
            del frames[number]
        case _:
            other = generator.randrange(len(frames))
            frames[number], frames[other] = frames[other], frames[number]
    stream = b"".join(frame.wire for frame in frames)
    return stream if generator.random() < 0.7 else stream[: generator.randrange(len(stream))]


def _with_header(generator: random.Random, frame: Frame) -> Frame:
    """One field of the header is another; its checksum holds."""
    number = generator.choice((0, 1, 255, 4096, (1 << 24) + 1, (1 << 32) - 1))
    field = generator.choice(("generation", "payload_bytes", "piece_count", "transfer", "kind"))
    values = {"transfer": TransferId(number, number), "kind": generator.choice(list(Kind))}
    changed = replace(frame.header, **{field: values.get(field, number)})
    try:
        changed.pack()
    except (KVStoreError, ValueError, OverflowError):
        return frame.mended(mutate(generator, [frame.payload]))
    return Frame(changed, frame.payload)


class Recording:
    """A relay that notes what passes on one connection; a context manager.

    Attributes:
        address: where to connect; passes on to `target`.
        sent, received: what the connecting side and the other one said.
    """

    def __init__(self, target: str) -> None:
        self._port = int(target.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent, self.received = bytearray(), bytearray()
        self._thread = threading.Thread(target=self._relay, daemon=True)
        self._thread.start()

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(JOIN_S)

    def _relay(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:
            back = threading.Thread(target=_pass, args=(server, client, self.received), daemon=True)
            back.start()
            _pass(client, server, self.sent)
            back.join(JOIN_S)


def _pass(source: socket.socket, sink: socket.socket, noted: bytearray) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            noted += data
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Babbler:
    """Says to whoever connects what `speak` makes, hears nothing, and hangs up after a while; a context manager."""

    def __init__(self, speak: Callable[[], bytes], hang_up_s: float) -> None:
        self._speak, self._hang_up_s = speak, hang_up_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def __enter__(self) -> Babbler:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(JOIN_S)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, suppress(OSError):
                client.settimeout(self._hang_up_s)
                client.sendall(self._speak())
                while client.recv(1 << 16):
                    continue
