"""`kvstore serve` as a child process, as an operator runs it: its log is read, its health endpoint polled."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.integration.transfer_nodes import WITHIN_S

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


class ServeProcess:
    """One node. Its log lines are objects, in `lines`.

    Attributes:
        address: where it listens (the last one, if there are several).
        http: host and port of its health endpoint.
    """

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvstore", "serve", "--log-format", "json", "--http", "127.0.0.1:0", *arguments],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
        )
        self.lines: list[dict[str, Any]] = []
        self._new: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(json.loads(line) if line.startswith("{") else {"event": "text", "message": line})
            self._new.put(None)
        self._new.put(None)

    def event(self, name: str) -> dict[str, Any]:
        """The last line of one event, waited for."""
        until_s = time.monotonic() + WITHIN_S
        while True:
            found = [line for line in self.lines if line.get("event") == name]
            if found:
                return found[-1]
            assert self._reader.is_alive(), f"no {name!r} in the log of an ended node: {self.lines}"
            try:
                self._new.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {name!r} within {WITHIN_S:g} s: {self.lines}") from None

    @property
    def address(self) -> str:
        return str(self.event("listening")["address"])

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a request to the health endpoint."""
        host = str(self.event("http")["address"]).removeprefix("http://")
        with closing(http.client.HTTPConnection(host, timeout=WITHIN_S)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def wait_ready(self) -> None:
        until_s = time.monotonic() + WITHIN_S
        while self.get("/readyz")[0] != 200:
            assert time.monotonic() < until_s, f"not ready within {WITHIN_S:g} s: {self.lines}"
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        status, body = self.get("/metrics")
        assert status == 200, body
        samples = [line.rpartition(" ")[2] for line in body.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        assert samples, f"no {name} in {body}"
        return sum(map(float, samples))

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def exit_status(self) -> int:
        """Of a process that is about to end."""
        status = self.process.wait(WITHIN_S)
        self._reader.join(WITHIN_S)
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.wait(WITHIN_S)
        self._reader.join(WITHIN_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[ServeProcess]:
    """A node that is killed at the end, if it has not ended by then."""
    node = ServeProcess(*arguments, **environment)
    try:
        yield node
    finally:
        node.close()
