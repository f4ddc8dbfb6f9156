"""A node that engines attach to: `kvstore serve`, as an operator starts it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.environment import end, tail
from tests.engines.vllm.engine import EngineError

if TYPE_CHECKING:
    import subprocess

    from tests.engines.environment import Environment

SERVE = Path(__file__).parent / "serve.py"
READY_LIMIT_S = 60.0


class ServedNode:
    """One node; `start` and `kill` as often as wanted. A context manager that ends it."""

    def __init__(self, environment: Environment, name: str, folder: Path, *arguments: str) -> None:
        self.socket = str(folder / f"{name}.sock")
        self._environment = environment
        self._arguments = arguments
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServedNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until engines may attach.

        Raises:
            EngineError: it is not ready in time, or has ended.
        """
        arguments = ("serve", "--socket", self.socket, "--http", "", *self._arguments)
        self._process = self._environment.start(SERVE, arguments, log=self._log)
        until = time.monotonic() + READY_LIMIT_S
        while "ready" not in (self._log.read_text(errors="replace") if self._log.exists() else ""):
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise EngineError(f"the node does not serve\n{tail(self._log)}")
            time.sleep(0.05)

    def kill(self) -> None:
        """With SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            end(process)

    def stop(self) -> None:
        """With SIGSTOP; `go_on` continues it."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGCONT)
