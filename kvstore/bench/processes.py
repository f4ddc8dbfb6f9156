"""Child processes of a benchmark: workers, and busy ones beside them. Each is ended by whoever started it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.bench.channel import Channel
from kvstore.clock import Deadline
from kvstore.errors import BenchmarkError, DeadlineError, PeerGoneError

if TYPE_CHECKING:
    from collections.abc import Mapping

END_S = 5.0
STOP_LOOK_S = 0.0005
LAST_LINES = 3
PACKAGE_ROOT = Path(__file__).parents[2]
_BUSY = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True:
    pass
"""
"""Ends with the pipe, so with whoever started it."""


class WorkerProcess:
    """A process that runs one half of one side.

    Args:
        environment: what it has besides the environment of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        own, theirs = socket.socketpair()
        self._channel = Channel(own)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "kvstore.bench.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(paths)},
                # A group of its own: an interrupt reaches whoever asked, who then ends this one and what it started.
                process_group=0,
            )
        except BaseException:
            self._log.close()
            own.close()
            raise
        finally:
            theirs.close()

    def ask(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Its answer.

        Raises:
            BenchmarkError: it failed, ended or was late; the message has its last words.
        """
        deadline = Deadline.after(deadline_s)
        try:
            self._channel.send(message, deadline)
            answer = self._channel.receive(deadline)
        except DeadlineError as error:
            raise BenchmarkError(f"{message['do']!r} was not done within {deadline_s:g} s") from error
        except PeerGoneError as error:
            raise BenchmarkError(f"its process ended while it did {message['do']!r}{self._last_words()}") from error
        if "error" in answer:
            raise BenchmarkError(str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(END_S)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        status = f" (status {self._child.returncode})"
        return status + ": " + " | ".join(lines[-LAST_LINES:]) if lines else status

    def pause(self) -> None:
        """Stop it. Should whoever started it die meanwhile, the system ends it: a stopped group without a parent."""
        os.killpg(self._child.pid, signal.SIGSTOP)
        # Only a group that has stopped by then is ended by the system, and on a busy machine that takes a moment.
        deadline = Deadline.after(END_S)
        which = os.WSTOPPED | os.WEXITED | os.WNOWAIT | os.WNOHANG
        while os.waitid(os.P_PID, self._child.pid, which) is None and not deadline.has_passed:
            time.sleep(STOP_LOOK_S)

    def resume(self) -> None:
        os.killpg(self._child.pid, signal.SIGCONT)

    def close(self) -> None:
        """End it: by closing its socket, else by force. Idempotent."""
        self._channel.close()
        if self._child.poll() is None:
            self.resume()
        try:
            self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait(END_S)
        self._log.close()


class BusyProcesses:
    """So many processes that do nothing but use a core each; a context manager."""

    def __init__(self, count: int) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        try:
            for _ in range(count):
                self._children.append(
                    subprocess.Popen([sys.executable, "-c", _BUSY], stdin=subprocess.PIPE, process_group=0)
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> BusyProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.wait(END_S)
            assert child.stdin is not None
            child.stdin.close()
        self._children = []
