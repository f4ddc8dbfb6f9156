"""Simulated time: what happens next, and when."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Events:
    """Actions in the order of their times; at one time, in the order in which they were asked for. Not thread-safe.

    An action that has been overtaken is not taken out of the queue: whoever asked for it sees so when it comes.

    Attributes:
        now_s: since the start of the simulation; never goes back.
        ahead: actions in the queue, those of `watch` left out: nothing more comes to pass once there are none.
    """

    __slots__ = ("_has_ended", "_order", "_queue", "ahead", "now_s")

    def __init__(self) -> None:
        self.now_s = 0.0
        self.ahead = 0
        self._has_ended = False
        self._order = 0
        self._queue: list[tuple[float, int, bool, Callable[[Any], None], Any]] = []

    def at(self, at_s: float, action: Callable[[Any], None], argument: object = None) -> None:
        """Call `action(argument)` at this time, which is not before now."""
        self._order += 1
        self.ahead += 1
        heappush(self._queue, (max(at_s, self.now_s), self._order, True, action, argument))

    def watch(self, at_s: float, action: Callable[[Any], None], argument: object = None) -> None:
        """As `at`, for an action that only looks: the simulation does not go on for its sake."""
        self._order += 1
        heappush(self._queue, (at_s, self._order, False, action, argument))

    def end(self) -> None:
        """Nothing that is ahead matters."""
        self._has_ended = True

    def run(self, until_s: float) -> None:
        """Let time pass until nothing is ahead, until `end`, or until this time; what is later stays in the queue."""
        queue = self._queue
        while self.ahead and queue[0][0] <= until_s and not self._has_ended:
            at_s, _, counts, action, argument = heappop(queue)
            self.now_s = at_s
            if counts:
                self.ahead -= 1
            action(argument)
