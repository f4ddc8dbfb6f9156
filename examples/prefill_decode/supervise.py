"""The parent of the two processes: requests, progress, and an end that leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import signal
import time
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NoReturn

from .child import DemoError, Failure, Progress, Request, Result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from types import FrameType

    from .arguments import Options

TERMINATE_S = 3.0
"""How long a child may take to end before it is killed."""
BLAME_S = 0.5
"""When one child fails, how long to look whether the other one's death was the cause."""


class Child:
    """One child process and the parent's end of its pipe."""

    def __init__(self, name: str, serve: Callable[[Connection, Options], None], options: Options) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=serve, args=(theirs, options), name=f"kvstore-demo-{name}", daemon=True
        )
        self.process.start()
        theirs.close()

    def death(self) -> str | None:
        """How it ended, if it has."""
        status = self.process.exitcode
        if status is None:
            return None
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return f"the {self.name} process (pid {self.process.pid}) {how}"


class Supervisor:
    """Starts children, passes requests, and ends all of them when the `with` block is left, however.

    Args:
        options: handed to each child.
        on_progress: told of each child's progress.
    """

    def __init__(self, options: Options, on_progress: Callable[[str, Progress], None]) -> None:
        self._options = options
        self._on_progress = on_progress
        self._children: list[Child] = []
        self._is_busy = False
        self._is_interrupted = False

    def __enter__(self) -> Supervisor:
        signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(TERMINATE_S if kind is None else 0.0)

    def start(self, name: str, serve: Callable[[Connection, Options], None]) -> Child:
        """Start a child. Ctrl-C reaches the whole process group, so children are born deaf to it."""
        with self._uninterrupted():
            child = Child(name, serve, self._options)
            self._children.append(child)
        return child

    def call(self, child: Child, method: str, *arguments: Any, deadline_s: float) -> Any:
        """Run a method in one child and wait for its result."""
        return self.gather([(child, method, arguments)], deadline_s=deadline_s)[0]

    def gather(self, requests: Iterable[tuple[Child, str, tuple[Any, ...]]], *, deadline_s: float) -> list[Any]:
        """Run methods in several children at once; their results, in the order of the requests.

        Raises:
            DemoError: a child failed or died, or they did not answer in time.
        """
        order = []
        for child, method, arguments in requests:
            order.append(child)
            self._send(child, Request(method, arguments))
        results: dict[str, Any] = {}
        until_s = time.monotonic() + deadline_s
        while len(results) < len(order):
            waiting = {child.connection: child for child in order if child.name not in results}
            sentinels = [child.process.sentinel for child in self._children]
            ready = wait([*waiting, *sentinels], max(0.0, until_s - time.monotonic()))
            if not ready:
                names = " and ".join(child.name for child in waiting.values())
                raise DemoError(f"the {names} process did not answer within {deadline_s:.0f} s")
            for connection, child in waiting.items():
                if connection in ready:
                    self._receive(child, results)
            self._check_alive({child.name for child in waiting.values()})
        return [results[child.name] for child in order]

    def _send(self, child: Child, request: Request) -> None:
        try:
            child.connection.send(request)
        except BrokenPipeError:
            self._fail(f"the {child.name} process closed its pipe")

    def _receive(self, child: Child, results: dict[str, Any]) -> None:
        try:
            message = child.connection.recv()
        except (EOFError, ConnectionResetError):
            self._fail(f"the {child.name} process closed its pipe")
        if isinstance(message, Progress):
            self._on_progress(child.name, message)
        elif isinstance(message, Result):
            results[child.name] = message.value
        elif isinstance(message, Failure):
            self._fail(
                f"the {child.name} process failed: {message.message}",
                but_not=child,
                details="" if message.is_expected else message.details,
            )

    def _fail(self, message: str, *, but_not: Child | None = None, details: str = "") -> NoReturn:
        """Raise, naming a child that died as the cause if there is one."""
        others = [child for child in self._children if child is not but_not]
        until_s = time.monotonic() + BLAME_S
        wait([child.process.sentinel for child in others], BLAME_S)
        for child in others:
            child.process.join(max(0.0, until_s - time.monotonic()))
            death = child.death()
            if death is not None:
                raise DemoError(f"{death} before it was done")
        raise DemoError(f"{message}\n{details}" if details else message)

    def _check_alive(self, heard: set[str]) -> None:
        for child in self._children:
            # Of a child that is listened to, what it sent before it ended says more than its status.
            if not child.process.is_alive() and not (child.name in heard and child.connection.poll()):
                raise DemoError(f"{child.death()} before it was done")

    def close(self, patience_s: float = 0.0) -> None:
        """End every child and reap it: by itself within `patience_s`, then by SIGTERM, then by SIGKILL. Idempotent."""
        with self._uninterrupted():
            for child in self._children:
                child.connection.close()
            self._join(patience_s)
            for child in self._children:
                child.process.terminate()
            self._join(TERMINATE_S)
            for child in self._children:
                child.process.kill()
                child.process.join()
                child.process.close()
            self._children.clear()

    def _join(self, patience_s: float) -> None:
        until_s = time.monotonic() + patience_s
        for child in self._children:
            child.process.join(max(0.0, until_s - time.monotonic()))

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """No child is left half started or half ended: SIGTERM waits, Ctrl-C is ignored."""
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
            signal.signal(signal.SIGINT, previous)
        if self._is_interrupted and self._children:
            raise KeyboardInterrupt

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        if not self._is_busy:
            raise KeyboardInterrupt
