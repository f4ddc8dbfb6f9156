"""What a compared store has to do."""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class PeerMissingError(Exception):
    """The peer cannot run here; the message says what is not there."""


class Peer(ABC):
    """A running server with one client; a context manager that ends both."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What the table calls it, with its version."""

    @abstractmethod
    def put(self, source: npt.NDArray[np.uint8]) -> None:
        """Store each row of `source` as an object under the row's number, in place of what is there."""

    @abstractmethod
    def get(self, target: npt.NDArray[np.uint8]) -> None:
        """Read each row's object; into `target` where the peer's client can."""

    @property
    @abstractmethod
    def singly_name(self) -> str:
        """What the table calls it where each object is a call of its own."""

    @abstractmethod
    def put_singly(self, source: npt.NDArray[np.uint8]) -> None:
        """As `put`, each object by a call that is answered before the next."""

    @abstractmethod
    def get_singly(self, target: npt.NDArray[np.uint8]) -> None:
        """As `get`, each object by a call that is answered before the next."""

    @abstractmethod
    def close(self) -> None:
        """End the client and the server. Idempotent."""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
