"""Requests on their way into the simulation: by themselves, or after others have ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import SimulationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvstore.simulate.events import Events
    from kvstore.workload.request import Request


class Coming:
    """Takes requests from a workload as time passes, never more ahead than up to the next that comes by itself.

    A request that comes after another comes its thinking time after that one's end, however it ended. Who would come
    later than `until_s` does not come, and what the workload has behind the first such request that comes by itself is
    not taken: there, all are at least as late. Not thread-safe.

    Args:
        known: called with each request of the workload when it is taken.
        arrive: called with each request when it comes.
        has_ended: whether the request of this number has.

    Attributes:
        has_more: whether the workload has more that come by themselves.
        last_s: when the latest one came.
        is_over: whether nobody is to come but those who wait for others.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        events: Events,
        until_s: float,
        *,
        known: Callable[[Request], None],
        arrive: Callable[[Request], None],
        has_ended: Callable[[int], bool],
    ) -> None:
        self._requests: Iterator[Request] = iter(requests)
        self._events = events
        self._until_s = until_s
        self._known = known
        self._arrive = arrive
        self._has_ended = has_ended
        self._follow: dict[int, list[Request]] = {}
        self._next_number = 0
        self._own_s = 0.0
        self.has_more = True
        self._thinking = 0
        self.last_s = 0.0

    @property
    def is_over(self) -> bool:
        return not self.has_more and not self._thinking

    def pull(self) -> None:
        """Take requests from the workload up to the next that comes by itself."""
        for request in self._requests:
            if request.number != self._next_number:
                raise SimulationError(
                    f"the workload's request {request.number} comes where {self._next_number} is due; number them from "
                    "0 without holes"
                )
            self._next_number += 1
            self._known(request)
            if request.after is None:
                if request.arrival_s < self._own_s:
                    raise SimulationError(
                        f"request {request.number} arrives at {request.arrival_s} s, before the one before it "
                        f"({self._own_s} s); sort the workload"
                    )
                if request.arrival_s > self._until_s:
                    break
                self._own_s = request.arrival_s
                self._events.at(request.arrival_s, self._own, request)
                return
            if not 0 <= request.after < request.number:
                raise SimulationError(f"request {request.number} comes after {request.after}, which is not before it")
            if self._has_ended(request.after):
                self._think(request)
            else:
                self._follow.setdefault(request.after, []).append(request)
        self.has_more = False

    def ended(self, number: int) -> None:
        """A request has ended; those that come after it begin to think."""
        for request in self._follow.pop(number, ()):
            self._think(request)

    def _think(self, request: Request) -> None:
        arrival_s = self._events.now_s + request.arrival_s
        if arrival_s <= self._until_s:
            self._thinking += 1
            self._events.at(arrival_s, self._thought, request)

    def _thought(self, request: Request) -> None:
        self._thinking -= 1
        self.last_s = self._events.now_s
        self._arrive(request)

    def _own(self, request: Request) -> None:
        self.last_s = self._events.now_s
        self._arrive(request)
        self.pull()
