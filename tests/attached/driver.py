"""Worker processes that tests drive, stop and kill; and owners in processes of their own."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
START_S = 60.0
ANSWER_S = 60.0
"""Generous: machines are loaded. What should happen happens long before."""


class WorkerError(Exception):
    """What a worker's call raised.

    Attributes:
        kind: name of the exception's class.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class Worker:
    """A process running `tests.attached.program` or another one that speaks the same lines."""

    def __init__(self, path: str, *, deadline_s: float = 30.0, program: str = "tests.attached.program") -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", program, path, str(deadline_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
        )
        self._data = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def started(self) -> Worker:
        """Wait until it has attached."""
        self.answer(START_S)
        return self

    def post(self, do: str, **arguments: Any) -> None:
        """Ask without waiting."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, within_s: float = ANSWER_S) -> Any:
        """The next answer.

        Raises:
            WorkerError: the call raised. AssertionError: no answer came, or the process has ended.
        """
        answer = self.next_answer(within_s)
        assert answer is not None, "the worker has ended"
        if "error" in answer:
            raise WorkerError(answer["error"], answer["message"])
        return answer["ok"]

    def next_answer(self, within_s: float = ANSWER_S) -> dict[str, Any] | None:
        """The next answer as it came; None when the process has ended."""
        assert self.process.stdout is not None
        until_s = time.monotonic() + within_s
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._data:
            left_s = until_s - time.monotonic()
            assert left_s > 0, f"the worker did not answer within {within_s:g} s"
            if select.select([descriptor], [], [], left_s)[0]:
                data = os.read(descriptor, 1 << 16)
                if not data:
                    return None
                self._data += data
        line, _, self._data = self._data.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def call(self, do: str, **arguments: Any) -> Any:
        self.post(do, **arguments)
        return self.answer()

    def stop(self) -> None:
        """SIGSTOP, and wait until no thread of it runs any more: a signal is not at once."""
        self.process.send_signal(signal.SIGSTOP)
        which = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
        eventually(lambda: os.waitid(os.P_PID, self.process.pid, which) is not None)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone. Idempotent."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue


@contextmanager
def workers(path: str, count: int, **options: Any) -> Iterator[list[Worker]]:
    """Several attached workers, killed at the end."""
    started: list[Worker] = []
    try:
        started.extend(Worker(path, **options) for _ in range(count))
        yield [worker.started() for worker in started]
    finally:
        for worker in started:
            worker.kill()


@contextmanager
def socket_folder() -> Iterator[str]:
    """A folder with a short name: a socket's path has 107 bytes at most."""
    folder = tempfile.mkdtemp(prefix="kvs-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def eventually(is_so: Callable[[], object], within_s: float = 30.0) -> None:
    """Wait for something that another process brings about.

    Raises:
        AssertionError: it has not come.
    """
    until_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < until_s, "it did not come to that"
        time.sleep(0.005)
