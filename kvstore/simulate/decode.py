"""Decode instances of one cluster: continuous batching without an event per token.

The requests of a batch get their tokens in the same steps. So one counter of steps for each instance tells when they
end: a request that joins at counter c with n tokens to come leaves at c + n. The counter's speed, 1 / T_decode(batch),
changes only when somebody joins or leaves. Steps are fluid: who joins does not wait for the running step to end.
"""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.profile import Profile
    from kvstore.simulate.events import Events
    from kvstore.simulate.job import Job

_STALE_ENTRIES_FACTOR = 8


class _Instance:
    __slots__ = ("batch", "gone", "is_there", "number", "steps", "updated_s", "version")

    def __init__(self, number: int) -> None:
        self.number = number
        self.batch: list[tuple[float, int, Job]] = []
        self.steps = 0.0
        self.updated_s = 0.0
        self.version = 0
        self.is_there = True
        self.gone: Callable[[], None] | None = None


class DecodeInstances:
    """Instances that decode, and the requests that wait for a place. Not thread-safe.

    A request goes to the instance with the fewest requests.

    Args:
        placed: called with a job when it gets its place.
        finished: called with a job when its last token is there.
    """

    def __init__(
        self,
        events: Events,
        profile: Profile,
        instances: int,
        placed: Callable[[Job], None],
        finished: Callable[[Job], None],
    ) -> None:
        self._events = events
        self._placed = placed
        self._finished = finished
        self._batch_max = profile.decode_batch_max
        self._step_s = [0.0] + [profile.decode_step(batch) for batch in range(1, profile.decode_batch_max + 1)]
        self._instances: list[_Instance] = []
        self._leaving = 0
        self._next_number = 0
        self._by_load: list[tuple[int, int, _Instance]] = []
        self._waiting: deque[Job] = deque()
        self.running = 0
        self.expected = 0
        self.add(instances)

    @property
    def instances(self) -> int:
        """That work; those that leave when their requests have ended are left out."""
        return len(self._instances) - self._leaving

    @property
    def present(self) -> int:
        """Instances that work, those included that leave."""
        return len(self._instances)

    @property
    def queued(self) -> int:
        """Requests that are here with their cache, and wait for a place."""
        return len(self._waiting)

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return len(self._waiting)

    def tpot_s(self) -> float:
        """Seconds per token at the mean batch."""
        instances = len(self._instances)
        batch = -(-self.running // instances) if instances else 1
        return self._step_s[min(max(batch, 1), self._batch_max)]

    def join(self, job: Job) -> None:
        """An expected job is here with its cache."""
        self.expected -= 1
        instance = self._least_loaded()
        if instance is None:
            self._waiting.append(job)
        else:
            self._place(job, instance)

    def add(self, instances: int) -> None:
        """More instances from now on."""
        for _ in range(instances):
            instance = _Instance(self._next_number)
            instance.updated_s = self._events.now_s
            self._next_number += 1
            self._instances.append(instance)
            self._offer(instance)
        self._fill()

    def fail(self, picked: Callable[[int, int], list[int]], instances: int) -> list[Job]:
        """Take so many instances away at once; the jobs in their batches are returned."""
        gone = [self._instances[at] for at in picked(len(self._instances), min(instances, len(self._instances)))]
        lost = []
        for instance in gone:
            self._instances.remove(instance)
            self._leaving -= instance.gone is not None
            instance.is_there = False
            instance.version += 1
            self.running -= len(instance.batch)
            lost += [job for _, _, job in sorted(instance.batch)]
        return lost

    def release(self, gone: Callable[[], None]) -> None:
        """Let the least loaded instance go; `gone` is called when its requests have ended, which may be at once."""
        staying = [each for each in self._instances if each.gone is None]
        if not staying:
            return
        instance = min(staying, key=lambda each: (len(each.batch), each.number))
        instance.gone = gone
        self._leaving += 1
        if not instance.batch:
            self._let_go(instance, gone)

    def _let_go(self, instance: _Instance, gone: Callable[[], None]) -> None:
        instance.is_there = False
        self._instances.remove(instance)
        self._leaving -= 1
        gone()

    def _offer(self, instance: _Instance) -> None:
        if len(self._by_load) > _STALE_ENTRIES_FACTOR * len(self._instances) + 64:
            self._by_load = [(len(each.batch), each.number, each) for each in self._instances]
            heapify(self._by_load)
        else:
            heappush(self._by_load, (len(instance.batch), instance.number, instance))

    def _least_loaded(self) -> _Instance | None:
        entries = self._by_load
        while entries:
            load, _, instance = entries[0]
            if load == len(instance.batch) and instance.is_there and instance.gone is None:
                return instance if load < self._batch_max else None
            heappop(entries)
        return None

    def _fill(self) -> None:
        while self._waiting:
            instance = self._least_loaded()
            if instance is None:
                return
            self._place(self._waiting.popleft(), instance)

    def _place(self, job: Job, instance: _Instance) -> None:
        self._placed(job)
        steps = job.request.output_tokens - 1
        if steps <= 0:
            self._finished(job)
            return
        self._advance(instance)
        heappush(instance.batch, (instance.steps + steps, job.request.number, job))
        self.running += 1
        self._offer(instance)
        self._plan(instance)

    def _advance(self, instance: _Instance) -> None:
        now_s = self._events.now_s
        if instance.batch:
            instance.steps += (now_s - instance.updated_s) / self._step_s[len(instance.batch)]
        else:
            instance.steps = 0.0
        instance.updated_s = now_s

    def _plan(self, instance: _Instance) -> None:
        instance.version += 1
        if instance.batch:
            left_s = (instance.batch[0][0] - instance.steps) * self._step_s[len(instance.batch)]
            self._events.at(self._events.now_s + left_s, self._leave, (instance, instance.version))

    def _leave(self, which: tuple[_Instance, int]) -> None:
        instance, version = which
        if version != instance.version:
            return
        # The batch has not changed since the time was computed: its first is through, whatever rounding says.
        self._advance(instance)
        mark, _, job = heappop(instance.batch)
        instance.steps = mark
        self.running -= 1
        self._finished(job)
        if instance.gone is not None:
            if not instance.batch:
                self._let_go(instance, instance.gone)
        else:
            self._offer(instance)
            self._fill()
        self._plan(instance)
