"""What a store said is durable, and what was dropped since: what must be there again after a crash."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvstore.pool import NodePath

Key = bytes


@dataclass(frozen=True)
class Point:
    """A resume point of a prompt of the workload.

    Attributes:
        number: of the prompt.
        tokens: its length.
        keys: of all prefix nodes up to it.
    """

    number: int
    tokens: int
    keys: tuple[Key, ...]

    @classmethod
    def of(cls, number: int, tokens: int, path: NodePath) -> Point:
        return cls(number, tokens, tuple(path.key(node) for node in range(len(path))))

    def needs(self, key: Key, *, is_state: bool) -> bool:
        """Whether it goes with a node's states, or with its attention and all below."""
        return key == self.keys[-1] if is_state else key in self.keys


@dataclass(frozen=True)
class Durable:
    """These were reported durable."""

    points: tuple[Point, ...]


@dataclass(frozen=True)
class Dropped:
    """The tier on disk is about to drop these on purpose: nodes' states, or their attention with all below."""

    keys: tuple[tuple[Key, bool], ...]


@dataclass(frozen=True)
class Did:
    """What the workload has just done."""

    what: str


Message = Durable | Dropped | Did


class Ledger:
    """Takes messages in the order in which they were said.

    Attributes:
        promised: resume points that were durable and were not dropped since.
        reports: how often a resume point was reported durable.
        dropped: promises that ended because the tier dropped something on purpose.
        done: what the workload did, counted.
    """

    def __init__(self) -> None:
        self.promised: set[Point] = set()
        self.reports = 0
        self.dropped = 0
        self.done: Counter[str] = Counter()

    def note(self, message: Message) -> None:
        if isinstance(message, Durable):
            self.promised.update(message.points)
            self.reports += len(message.points)
        elif isinstance(message, Dropped):
            before = len(self.promised)
            self.promised = without(self.promised, message.keys)
            self.dropped += before - len(self.promised)
        else:
            self.done[message.what] += 1


def without(points: Iterable[Point], keys: Sequence[tuple[Key, bool]]) -> set[Point]:
    """Those that none of these takes away."""
    states = {key for key, is_state in keys if is_state}
    attention = {key for key, is_state in keys if not is_state}
    return {point for point in points if point.keys[-1] not in states and attention.isdisjoint(point.keys)}


class Teller:
    """Says things in an order that holds: nothing is said to be durable that was dropped after it was looked at.

    Any thread; `say` is called under a lock.
    """

    def __init__(self, say: Callable[[Message], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._dropped: list[tuple[Key, bool]] = []

    def dropping(self, keys: Sequence[Key], are_states: Sequence[bool]) -> None:
        """The tier on disk is about to drop these; it waits until that was said."""
        dropped = tuple(zip(keys, map(bool, are_states), strict=True))
        if dropped:
            with self._lock:
                self._dropped.extend(dropped)
                self._say(Dropped(dropped))

    def moment(self) -> int:
        """Before what is going to be said is looked at."""
        with self._lock:
            return len(self._dropped)

    def durable(self, points: Iterable[Point], since: int) -> None:
        """These were durable after `since`, a `moment`."""
        with self._lock:
            kept = without(points, self._dropped[since:])
            if kept:
                self._say(Durable(tuple(kept)))

    def did(self, what: str) -> None:
        with self._lock:
            self._say(Did(what))
