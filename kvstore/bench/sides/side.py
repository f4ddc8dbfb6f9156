"""What a side of the comparison has to do: two halves, each in a process of its own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from kvstore.bench.sides.network import own_congestion

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvstore.bench.load import Load

Told = dict[str, Any]
"""What one half tells the other: addresses, keys. Plain values."""


class Half(ABC):
    """One end. It is made, hears what the other end has told, connects; then come the rounds."""

    def tell(self) -> Told:
        """What the other half has to know."""
        return {}

    def hear(self, told: Told) -> None:  # noqa: B027 - most have nothing to hear
        """What the other half told."""

    def connect(self) -> None:  # noqa: B027 - most are connected by now
        """Both halves have heard each other."""

    def cpu_s(self) -> float:
        """CPU seconds that this end has taken so far, its child processes included."""
        return time.process_time()

    def congestion(self) -> list[str]:
        """The congestion controls of the TCP sockets of this end, each once."""
        return own_congestion()

    @abstractmethod
    def digest(self) -> str | None:
        """Of the contents of all batches, equal at both ends if they are; None if this side has none to compare."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""


class SendingHalf(Half):
    """The end that has the bytes."""

    @abstractmethod
    def send(self, batch: int) -> float:
        """Move one batch; the seconds until this end knows that all of it is there."""


class ReceivingHalf(Half):
    """The end that gets them."""

    def finish_round(self) -> None:
        """Wait for what this end still does of the round; counted as its CPU time."""

    def make_room(self) -> None:
        """After a round: check that everything came, and make all of it cross again. Not counted."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all contents, so that the next digest speaks of what came afterwards."""


class Side(ABC):
    """A program that moves bytes from one process to another."""

    @property
    @abstractmethod
    def name(self) -> str:
        """For tables: `raw sockets x 2 (compiled)`."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot run on this machine and what would help; None if it can."""

    @property
    def spins_when_idle(self) -> bool:
        """Whether its processes use a core while they wait; they are stopped while it is another side's turn."""
        return False

    def declines(self, load: Load) -> str | None:
        """Why it takes no part in this case; None if it does."""
        return None

    def needs_bytes(self, load: Load) -> int:
        """Memory that each half takes, its process not counted."""
        return load.buffer_bytes

    def prepare(self, folder: Path) -> dict[str, str]:
        """Make once per machine and run what both halves need, in a temporary folder; passed to them as `tools`."""
        return {}

    def environment(self, load: Load, tools: Mapping[str, str]) -> dict[str, str]:
        """What the processes of both halves have in their environment besides what is there."""
        return {}

    @abstractmethod
    def receiving(self, load: Load, tools: Mapping[str, str]) -> ReceivingHalf:
        """The receiving half, in the calling process."""

    @abstractmethod
    def sending(self, load: Load, tools: Mapping[str, str]) -> SendingHalf:
        """The sending half, in the calling process."""
