"""A bounded byte stream in one direction between two threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, PeerGoneError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.clock import Deadline

PIPE_BYTES = 1 << 20
"""What a connection buffers in each direction before its sender waits for the reader."""


class Pipe:
    """A ring of bytes with one sender and one receiver. Any thread may close either end."""

    def __init__(self, sender_name: str, receiver_name: str, capacity_bytes: int = PIPE_BYTES) -> None:
        self._sender_name = sender_name
        self._receiver_name = receiver_name
        self._ring = memoryview(bytearray(capacity_bytes))
        self._changed = threading.Condition()
        self._sent_bytes = 0
        self._received_bytes = 0
        self._sender_closed = False
        self._receiver_closed = False

    @property
    def received_bytes(self) -> int:
        """Bytes that the receiver has taken so far."""
        return self._received_bytes

    def send(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Copy all bytes in, waiting for room.

        Raises:
            PeerGoneError: either end was closed.
            DeadlineError: not all bytes found room in time; some may have.
        """
        with self._changed:
            self._check_sender()
            for view in views:
                done = 0
                while done < len(view):
                    self._wait(self._can_send, deadline, f"{self._receiver_name} to take what it was sent")
                    self._check_sender()
                    done += self._copy_in(view, done)
                    self._changed.notify_all()

    def receive(self, views: Sequence[memoryview], deadline: Deadline) -> None:
        """Fill all views, waiting for bytes.

        Raises:
            PeerGoneError: this end was closed, or the other one was and the stream has ended.
            DeadlineError: not all bytes came in time; `received_bytes` tells whether some did.
        """
        with self._changed:
            self._check_receiver()
            for view in views:
                done = 0
                while done < len(view):
                    self._wait(self._can_receive, deadline, f"bytes from {self._sender_name}")
                    self._check_receiver()
                    if self._sent_bytes == self._received_bytes:
                        raise PeerGoneError(f"{self._sender_name} closed the connection before all expected bytes came")
                    done += self._copy_out(view, done)
                    self._changed.notify_all()

    def close_sender(self) -> None:
        """No more bytes will come. What was sent can still be received."""
        with self._changed:
            self._sender_closed = True
            self._changed.notify_all()

    def close_receiver(self) -> None:
        """No more bytes will be taken."""
        with self._changed:
            self._receiver_closed = True
            self._changed.notify_all()

    def _wait(self, is_ready: Callable[[], bool], deadline: Deadline, waiting_for: str) -> None:
        if not self._changed.wait_for(is_ready, min(deadline.remaining_s(), threading.TIMEOUT_MAX)):
            raise DeadlineError(f"the deadline passed while waiting for {waiting_for}")

    def _can_send(self) -> bool:
        is_closed = self._sender_closed or self._receiver_closed
        return is_closed or self._sent_bytes - self._received_bytes < len(self._ring)

    def _can_receive(self) -> bool:
        return self._receiver_closed or self._sender_closed or self._sent_bytes > self._received_bytes

    def _check_sender(self) -> None:
        if self._sender_closed:
            raise PeerGoneError(f"the connection to {self._receiver_name} was closed by this side; connect again")
        if self._receiver_closed:
            raise PeerGoneError(f"{self._receiver_name} closed the connection; what was not received is lost")

    def _check_receiver(self) -> None:
        if self._receiver_closed:
            raise PeerGoneError(f"the connection to {self._sender_name} was closed by this side; connect again")

    def _copy_in(self, view: memoryview, start: int) -> int:
        place = self._sent_bytes % len(self._ring)
        room = len(self._ring) - (self._sent_bytes - self._received_bytes)
        size = min(room, len(self._ring) - place, len(view) - start)
        self._ring[place : place + size] = view[start : start + size]
        self._sent_bytes += size
        return size

    def _copy_out(self, view: memoryview, start: int) -> int:
        place = self._received_bytes % len(self._ring)
        size = min(self._sent_bytes - self._received_bytes, len(self._ring) - place, len(view) - start)
        view[start : start + size] = self._ring[place : place + size]
        self._received_bytes += size
        return size
