"""Many pieces of work over processes of their own: what fails, dies or takes too long loses nothing but itself."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvstore.errors import SimulationError
from kvstore.limits import SWEEP_WORKERS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

TaskT = TypeVar("TaskT")
ValueT = TypeVar("ValueT")

END_S = 10.0
"""How long a process that was told to end is waited for before it is killed."""


@dataclass(frozen=True)
class Ended(Generic[ValueT]):
    """How a piece of work ended.

    Attributes:
        value: what it returned; None where it failed.
        error: why it failed; empty where it did not.
    """

    value: ValueT | None
    error: str = ""


class _Worker(Generic[TaskT, ValueT]):
    """One process, and what it is at."""

    def __init__(self, work: Callable[[TaskT], ValueT]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, work), daemon=True)
        # It unblocks signals when it starts, which the first process would do otherwise, behind the mask below.
        resource_tracker.ensure_running()
        # The child inherits the mask: Ctrl-C is the parent's to answer, and ends the children in order.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.number = -1
        self.until_s = 0.0

    def give(self, number: int, task: TaskT, deadline_s: float) -> None:
        self.number, self.until_s = number, monotonic() + deadline_s
        # A process that has died already is found by whoever waits for its answer.
        with suppress(OSError):
            self.connection.send(task)

    def end(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process.close()


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """What a process does: work until its parent closes the pipe."""
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            ended: Ended[Any] = Ended(work(task))
        except Exception as error:
            # The parent reports it; what one piece of work meets is no reason to end the others.
            ended = Ended(None, f"{type(error).__name__}: {error}")
        try:
            _answer(connection, ended)
        except BrokenPipeError:
            return


def _answer(connection: Connection, ended: Ended[Any]) -> None:
    try:
        connection.send(ended)
    except BrokenPipeError:
        raise
    except Exception as error:
        connection.send(Ended(None, f"what it returned cannot be sent: {error}"))


def run_all(
    tasks: Sequence[TaskT],
    work: Callable[[TaskT], ValueT],
    *,
    workers: int,
    deadline_s: float,
    ended: Callable[[int, Ended[ValueT]], None] | None = None,
) -> tuple[Ended[ValueT], ...]:
    """Do all tasks, and return how each ended, in their order.

    Work that raises, whose process dies, or that takes longer than `deadline_s` is an `Ended` with its error. Whatever
    ends this call early, Ctrl-C included, ends the processes, too. Call it from one thread, in a program that may be
    imported (`if __name__ == "__main__":`), since processes are spawned.

    Args:
        tasks: can be pickled, as what `work` returns.
        work: a function of a module.
        workers: processes at a time.
        deadline_s: for one task.
        ended: told of each task as it ends, by number, in this thread.

    Raises:
        SimulationError: the number of workers is out of its limits.
    """
    if not 1 <= workers <= SWEEP_WORKERS_MAX:
        raise SimulationError(f"{workers} workers are outside 1 to {SWEEP_WORKERS_MAX}; give about as many as cores")
    waiting = deque(range(len(tasks)))
    found: dict[int, Ended[ValueT]] = {}
    idle: list[_Worker[TaskT, ValueT]] = []
    busy: dict[Connection, _Worker[TaskT, ValueT]] = {}

    def settle(number: int, how: Ended[ValueT]) -> None:
        found[number] = how
        if ended is not None:
            ended(number, how)

    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(work)
                busy[worker.connection] = worker
                number = waiting.popleft()
                worker.give(number, tasks[number], deadline_s)
            soonest_s = min(worker.until_s for worker in busy.values())
            ready = wait(list(busy), timeout=max(0.0, soonest_s - monotonic()))
            for connection in ready:
                worker = busy.pop(connection)  # type: ignore[call-overload]
                number = worker.number
                try:
                    how: Ended[ValueT] = worker.connection.recv()
                    idle.append(worker)
                except (EOFError, OSError):
                    worker.process.join(END_S)
                    code = worker.process.exitcode
                    worker.end()
                    how = Ended(None, f"its process died ({_death(code)}); it may have run out of memory")
                settle(number, how)
            for worker in [each for each in busy.values() if each.until_s <= monotonic()]:
                del busy[worker.connection]
                number = worker.number
                worker.end()
                settle(number, Ended(None, f"it took longer than {deadline_s:g} s; make the scenario shorter"))
    finally:
        for worker in [*idle, *busy.values()]:
            worker.end()
    return tuple(found[number] for number in range(len(tasks)))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}"
    return f"exit status {code}"
