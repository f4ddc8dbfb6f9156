"""Questions and answers between the processes of a benchmark: one JSON object per line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvstore.errors import BenchmarkError, DeadlineError, PeerGoneError

if TYPE_CHECKING:
    import socket

    from kvstore.clock import Deadline

MESSAGE_BYTES_MAX = 4 << 20
"""A spec of thousands of layers is a megabyte."""


class Channel:
    """A connected stream socket. One thread at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = bytearray()

    def send(self, message: dict[str, Any], deadline: Deadline) -> None:
        """Raises `PeerGoneError` or `DeadlineError`."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MESSAGE_BYTES_MAX:
            raise BenchmarkError(f"a message of {len(line)} bytes is above the limit of {MESSAGE_BYTES_MAX}")
        self.sock.settimeout(max(deadline.remaining_s(), 0.001))
        try:
            self.sock.sendall(line)
        except TimeoutError as error:
            raise DeadlineError("the other end of a benchmark takes no message") from error
        except OSError as error:
            raise PeerGoneError(f"the other end of a benchmark is gone: {error.strerror}") from error

    def receive(self, deadline: Deadline) -> dict[str, Any]:
        """The next message.

        Raises:
            PeerGoneError: the stream ended. DeadlineError: nothing came in time. BenchmarkError: it is no message.
        """
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MESSAGE_BYTES_MAX:
                raise BenchmarkError(f"a message has more than {MESSAGE_BYTES_MAX} bytes; this is no benchmark's peer")
            self.sock.settimeout(max(deadline.remaining_s(), 0.001))
            try:
                chunk = self.sock.recv(1 << 16)
            except TimeoutError as error:
                raise DeadlineError("the other end of a benchmark did not answer in time") from error
            except OSError as error:
                raise PeerGoneError(f"the other end of a benchmark is gone: {error.strerror}") from error
            if not chunk:
                raise PeerGoneError("the other end of a benchmark has ended")
            self._received += chunk
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            message = json.loads(line)
        except ValueError as error:
            raise BenchmarkError("what the other end sent is no JSON; it is no benchmark's peer") from error
        if not isinstance(message, dict):
            raise BenchmarkError("what the other end sent is no message; it is no benchmark's peer")
        return message

    def close(self) -> None:
        self.sock.close()
