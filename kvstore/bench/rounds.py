"""Rounds: every side moves the same bytes in turn, so that what a shared machine does hits all of them alike."""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.bench.worker import RECEIVE, SEND
from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.bench.hands import Handle, Hands
    from kvstore.bench.load import Load
    from kvstore.bench.sides.side import Side

CONTROL_S = 60.0
"""For what moves no bytes under measurement: digests, eviction."""


@dataclass
class Measured:
    """What one side did in one case.

    Attributes:
        name: the side's.
        seconds: of each batch, by round.
        sender_cpu_s, receiver_cpu_s: by round.
        is_verified: the contents at the receiver were compared with the sender's; None if this side has none.
        failure: why it has no rounds, or no more of them.
        congestion: of its sockets at both ends; more than one algorithm with commas between.
    """

    name: str
    seconds: list[list[float]] = field(default_factory=list)
    sender_cpu_s: list[float] = field(default_factory=list)
    receiver_cpu_s: list[float] = field(default_factory=list)
    is_verified: bool | None = None
    failure: str | None = None
    congestion: str = ""

    @property
    def round_s(self) -> list[float]:
        """Seconds of one batch, the median of each round."""
        return [statistics.median(batches) for batches in self.seconds]

    @property
    def every_s(self) -> list[float]:
        """Seconds of each batch of all rounds, ascending."""
        return sorted(seconds for batches in self.seconds for seconds in batches)

    @property
    def cpu_s(self) -> list[float]:
        """CPU seconds of both ends, by round."""
        return [sender + receiver for sender, receiver in zip(self.sender_cpu_s, self.receiver_cpu_s, strict=True)]


class Pair:
    """Both halves of a side, connected.

    Attributes:
        congestion: what the sockets of both ends have, once it was checked.
    """

    def __init__(self, side: Side, load: Load, receiver: Handle, sender: Handle) -> None:
        self.side = side
        self.congestion = ""
        self._load, self._receiver, self._sender = load, receiver, sender

    @classmethod
    def open(cls, side: Side, receiving: Hands, sending: Hands, receiver_load: Load, sender_load: Load) -> Pair:
        """Raises `BenchmarkError` if it does not come about."""
        receiver = receiving.open(side.name, RECEIVE, receiver_load)
        sender = sending.open(side.name, SEND, sender_load)
        sender.ask("hear", CONTROL_S, told=receiver.told)
        receiver.ask("hear", CONTROL_S, told=sender.told)
        sender.ask("connect", CONTROL_S)
        return cls(side, sender_load, receiver, sender)

    def check(self) -> bool | None:
        """One round that is not counted, and whether the bytes at the receiver are the sender's; None if unknown.

        Raises:
            BenchmarkError: they are not, or the round failed.
        """
        self._receiver.ask("clear", CONTROL_S)
        self._receiver.ask("begin_round", CONTROL_S)
        self._sender.ask("send", self._load.deadline_s)
        self._receiver.ask("end_round", self._load.deadline_s)
        there = self._receiver.ask("digest", CONTROL_S)["digest"]
        here = self._sender.ask("digest", CONTROL_S)["digest"]
        if here != there:
            raise BenchmarkError(f"the bytes that arrived are not those that were sent: {there} instead of {here}")
        self._receiver.ask("make_room", CONTROL_S)
        ends = [handle.ask("congestion", CONTROL_S)["congestion"] for handle in (self._sender, self._receiver)]
        self.congestion = ", ".join(sorted({str(name) for names in ends for name in names}))
        self._rest()
        return None if here is None else True

    def round(self) -> tuple[list[float], float, float]:
        """Seconds of each batch, CPU seconds of the sender and of the receiver."""
        self._wake()
        result = self._round()
        self._rest()
        return result

    def _rest(self) -> None:
        """It is another side's turn: one that spins would take a core from it."""
        if self.side.spins_when_idle:
            for handle in (self._sender, self._receiver):
                handle.pause()

    def _wake(self) -> None:
        if self.side.spins_when_idle:
            for handle in (self._receiver, self._sender):
                handle.resume()

    def _round(self) -> tuple[list[float], float, float]:
        self._receiver.ask("begin_round", CONTROL_S)
        sent = self._sender.ask("send", self._load.deadline_s)
        received = self._receiver.ask("end_round", self._load.deadline_s)
        self._receiver.ask("make_room", CONTROL_S)
        return list(map(float, sent["seconds"])), float(sent["cpu_s"]), float(received["cpu_s"])

    def close(self) -> None:
        for handle in (self._sender, self._receiver):
            with contextlib.suppress(BenchmarkError):  # another machine that is gone has no processes of ours
                handle.close()


def run_rounds(
    sides: Sequence[Side],
    receiving: Hands,
    sending: Hands,
    receiver_load: Load,
    sender_load: Load,
    rounds: int,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, Measured]:
    """Every side's rounds, by its name; a side that fails has a reason instead of further ones.

    Args:
        tick: told of each step: `rounds + 1` of every side.
    """
    measured = {side.name: Measured(side.name) for side in sides}
    pairs: list[Pair] = []
    try:
        for side in sides:
            tick(side.name)
            try:
                pairs.append(pair := Pair.open(side, receiving, sending, receiver_load, sender_load))
                measured[side.name].is_verified = pair.check()
                measured[side.name].congestion = pair.congestion
            except BenchmarkError as error:
                measured[side.name].failure = str(error)
        pairs = [pair for pair in pairs if measured[pair.side.name].failure is None]
        for number in range(rounds):
            # Another one begins each time: what a side leaves behind meets each of the others.
            first = number % max(1, len(pairs))
            for pair in pairs[first:] + pairs[:first]:
                result = measured[pair.side.name]
                tick(pair.side.name)
                if result.failure is not None:
                    continue
                try:
                    seconds, sender_cpu_s, receiver_cpu_s = pair.round()
                except BenchmarkError as error:
                    result.failure = f"round {number + 1}: {error}"
                    pair.close()
                    continue
                result.seconds.append(seconds)
                result.sender_cpu_s.append(sender_cpu_s)
                result.receiver_cpu_s.append(receiver_cpu_s)
    finally:
        for hands in (sending, receiving):
            with contextlib.suppress(BenchmarkError):
                hands.end_workers()
    return measured
