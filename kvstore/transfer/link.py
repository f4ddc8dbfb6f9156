"""Frames over one connection."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

from kvstore._native import Stream, crc32c
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, PeerGoneError, ProtocolError, TransportError
from kvstore.limits import FRAME_HEADER_BYTES, KIB
from kvstore.transfer.frames import FrameHeader, Kind, parse_header

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.abc import Connection
    from kvstore.transfer.frames import TransferId

DATA_PATH_VARIABLE = "KVSTORE_TRANSFER"
"""`python` moves pieces through `Connection.send` and `receive` even where native code could do it."""
SLICE_BYTES = 512 * KIB
"""Bytes of one call to the connection. Each has the whole no-progress deadline, so a slow link that moves
this much within it is alive, and what was received is still in the cache when it is checksummed."""


class FrameLink:
    """Sends and receives frames. One thread receives; any thread may send, a whole frame at a time.

    Attributes:
        connection: what carries them.
        native: the connection's stream socket, if it has one; everything goes over it then.

    Raises:
        PeerGoneError, TransportError: the connection is closed, or no descriptor is left.
    """

    def __init__(self, connection: Connection, progress_deadline_s: float) -> None:
        self.connection = connection
        self._progress_deadline_s = progress_deadline_s
        self._last_sent_s = self._last_received_s = time.monotonic()
        self._send_lock = threading.Lock()
        self._header = bytearray(FRAME_HEADER_BYTES)
        self.native: Stream | None = None
        descriptor = connection.native_stream() if uses_native_path() else None
        if descriptor is not None:
            self.native = Stream(descriptor, connection.peer_address, progress_deadline_s)

    @property
    def progress_deadline_s(self) -> float:
        """The longest that one slice may take."""
        return self._progress_deadline_s

    @progress_deadline_s.setter
    def progress_deadline_s(self, seconds: float) -> None:
        self._progress_deadline_s = seconds
        if self.native is not None:
            self.native.progress_deadline_s = seconds

    @property
    def last_sent_s(self) -> float:
        """When the last slice had left, by the monotonic clock."""
        return self._last_sent_s if self.native is None else self.native.last_sent_s

    @property
    def last_received_s(self) -> float:
        """When the last bytes had come."""
        return self._last_received_s if self.native is None else self.native.last_received_s

    def note_received(self) -> None:
        """The peer has shown otherwise than by frames that it is there."""
        self._last_received_s = time.monotonic()

    @property
    def peer_address(self) -> str:
        return self.connection.peer_address

    def close(self) -> None:
        """End the connection and every wait on it. Idempotent, from any thread."""
        if self.native is not None:
            self.native.close()
        self.connection.close()

    def send(self, kind: Kind, transfer: TransferId, generation: int = 0, payload: bytes = b"") -> None:
        """Send a control frame.

        Raises:
            PeerGoneError: the peer is gone or silent; the connection is closed.
        """
        header = FrameHeader(kind, transfer, generation, len(payload), payload_crc32c=crc32c(payload))
        self.send_frame(header, [memoryview(payload)] if payload else [])

    def send_frame(self, header: FrameHeader, payload: Sequence[memoryview]) -> None:
        """Send a header and its payload; raises as `send` does."""
        packed = memoryview(header.pack())
        if self.native is not None:
            self.native.send([packed, *payload])
            return
        if not self._send_lock.acquire(timeout=self.progress_deadline_s):
            raise PeerGoneError(f"{self.peer_address} took no bytes for {self.progress_deadline_s:g} s")
        try:
            for part in slices([packed, *payload]):
                self.connection.send(part, Deadline.after(self.progress_deadline_s))
                self._last_sent_s = time.monotonic()
        except DeadlineError as error:
            self.close()
            raise PeerGoneError(
                f"{self.peer_address} took no bytes for {self.progress_deadline_s:g} s; it is stopped, or the "
                "network between is cut or too slow"
            ) from error
        finally:
            self._send_lock.release()

    def receive_header(self, deadline: Deadline) -> FrameHeader:
        """The next frame's header, checked.

        Raises:
            PeerGoneError: the stream ended.
            DeadlineError: nothing came.
            ProtocolError, PeerMismatchError: a bad header; the caller closes the connection.
        """
        if self.native is not None:
            return parse_header(self.native.receive_header(deadline.at_s))
        self.connection.receive([memoryview(self._header)], deadline)
        self._last_received_s = time.monotonic()
        return parse_header(self._header)

    def receive_payload(self, header: FrameHeader) -> memoryview:
        """The payload of a control frame, or the table of a DATA frame, after its checksum was found to hold.

        Raises:
            PeerGoneError: the stream ended, or stopped.
            ProtocolError: the checksum does not hold.
        """
        size_bytes = header.table_bytes if header.kind is Kind.DATA else header.payload_bytes
        payload = memoryview(bytearray(size_bytes))
        for part in slices([payload]) if self.native is None else [[payload]]:
            self.receive_into(part)
        if crc32c(payload) != header.payload_crc32c:
            raise ProtocolError(f"the payload of a {header.kind.name} frame is damaged: its checksum does not hold")
        return payload.toreadonly()

    def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fill the views with what comes next; the caller passes at most about `SLICE_BYTES`.

        Raises:
            PeerGoneError: the stream ended, or stopped in the middle of a frame.
        """
        if self.native is not None:
            for view in views:
                self.native.receive_into(view)
            return
        try:
            self.connection.receive(views, Deadline.after(self.progress_deadline_s))
        except DeadlineError as error:
            self.close()
            raise PeerGoneError(
                f"{self.peer_address} stopped in the middle of a frame for {self.progress_deadline_s:g} s"
            ) from error
        self._last_received_s = time.monotonic()


def uses_native_path() -> bool:
    """Whether pieces move in native code where the connection allows it.

    Raises:
        TransportError: the environment names no data path.
    """
    forced = os.environ.get(DATA_PATH_VARIABLE, "")
    if forced not in ("", "native", "python"):
        raise TransportError(f"{DATA_PATH_VARIABLE}={forced} names no data path; use 'native' or 'python', or unset it")
    return forced != "python"


def slices(views: Sequence[memoryview], size_bytes: int = SLICE_BYTES) -> Iterator[list[memoryview]]:
    """The views in groups of at most `size_bytes`, cut where they must be. Empty views are left out."""
    group: list[memoryview] = []
    room = size_bytes
    for view in views:
        start, end = 0, view.nbytes
        while start < end:
            step = min(room, end - start)
            group.append(view[start : start + step])
            start += step
            room -= step
            if not room:
                yield group
                group, room = [], size_bytes
    if group:
        yield group
