"""Prefill instances of one cluster and the prompts that wait for them: first come, first served."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.simulate.events import Events
    from kvstore.simulate.job import Job

REPLAYED_PROMPTS_MAX = 256


class PrefillInstances:
    """Instances that prefill one prompt at a time, from one queue. Not thread-safe.

    A prompt has its place in the queue from its arrival on; while its prefix is on its way, those behind it pass.

    Args:
        start: called with a job and the instance that it has got; says by `finished` when it is through.
    """

    def __init__(self, events: Events, instances: int, start: Callable[[Job, int], None]) -> None:
        self._events = events
        self._start = start
        self._queue: list[tuple[float, int, Job]] = []
        self._idle = list(range(instances))
        self._next_instance = instances
        self._free_at_s = [0.0] * instances
        self._leaving: deque[Callable[[], None]] = deque()
        self.busy: dict[int, Job] = {}
        self.expected = 0

    @property
    def instances(self) -> int:
        """That work; those that leave when their prompt ends are left out."""
        return self.present - len(self._leaving)

    @property
    def present(self) -> int:
        """Instances that have a prompt or could take one, those included that leave."""
        return len(self._idle) + len(self.busy)

    @property
    def idle(self) -> int:
        """Instances without a prompt."""
        return len(self._idle)

    @property
    def queued(self) -> int:
        """Prompts that wait for an instance and for nothing else."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Prompts without an instance, those included whose prefix is on its way."""
        return len(self._queue) + self.expected

    def wait_s(self) -> float:
        """Until an instance is free for a prompt that comes last, as the service of those before it is estimated."""
        return max(self._free_at_s[0] - self._events.now_s, 0.0) if self._free_at_s else 0.0

    def expect(self, job: Job) -> None:
        """A job will come when its prefix is there."""
        self.expected += 1
        if self._free_at_s:
            heapreplace(self._free_at_s, max(self._free_at_s[0], self._events.now_s) + job.service_s)

    def enqueue(self, job: Job) -> None:
        """An expected job is ready."""
        self.expected -= 1
        if self._idle:
            self._begin(job)
        else:
            heappush(self._queue, (job.arrival_s, job.request.number, job))

    def recall(self) -> list[Job]:
        """Take all prompts out of the queue, in their order; they are expected again."""
        recalled = [job for _, _, job in sorted(self._queue)]
        self._queue.clear()
        self.expected += len(recalled)
        return recalled

    def finished(self, instance: int) -> None:
        """An instance is through with its prompt."""
        del self.busy[instance]
        if self._leaving:
            self._leaving.popleft()()
            return
        heappush(self._idle, instance)
        self._next()

    def add(self, instances: int) -> None:
        """More instances from now on."""
        for _ in range(instances):
            heappush(self._idle, self._next_instance)
            self._next_instance += 1
        for _ in range(instances):
            self._next()
        self.estimate()

    def fail(self, picked: Callable[[int, int], list[int]], instances: int) -> list[Job]:
        """Take so many working instances away at once.

        Args:
            picked: chooses so many of so many.

        Returns:
            The jobs that they were at.
        """
        alive = sorted([*self._idle, *self.busy])
        lost = []
        for at in picked(len(alive), min(instances, len(alive))):
            if alive[at] in self.busy:
                lost.append(self.busy.pop(alive[at]))
            else:
                self._idle.remove(alive[at])
        heapify(self._idle)
        # An instance that fails while it is to leave comes back in its old role, if at all.
        while len(self._leaving) > len(self.busy):
            self._leaving.pop()
        self.estimate()
        return lost

    def release(self, gone: Callable[[], None]) -> None:
        """Let one instance go; `gone` is called when it has no prompt any more, which may be at once."""
        if self._idle:
            heappop(self._idle)
            self.estimate()
            gone()
        else:
            self._leaving.append(gone)

    def estimate(self) -> None:
        """Work out from the present state when instances will be free."""
        now_s = self._events.now_s
        free_at_s = [job.end_s for job in self.busy.values()] + [now_s] * len(self._idle)
        if free_at_s:
            heapify(free_at_s)
            if len(self._queue) <= REPLAYED_PROMPTS_MAX:
                for _, _, job in sorted(self._queue):
                    heapreplace(free_at_s, max(free_at_s[0], now_s) + job.service_s)
            else:
                work_s = sum(each - now_s for each in free_at_s) + sum(job.service_s for _, _, job in self._queue)
                free_at_s = [now_s + work_s / len(free_at_s)] * len(free_at_s)
        self._free_at_s = free_at_s

    def _next(self) -> None:
        if self._queue and self._idle:
            self._begin(heappop(self._queue)[2])

    def _begin(self, job: Job) -> None:
        instance = heappop(self._idle)
        self.busy[instance] = job
        self._start(job, instance)
