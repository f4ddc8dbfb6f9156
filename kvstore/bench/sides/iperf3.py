"""iperf3, which many know: a stream from one small buffer into another, not a transfer between two memories."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.bench.sides.network import free_port, system_congestion
from kvstore.bench.sides.side import Half, ReceivingHalf, SendingHalf, Side, Told
from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.bench.load import Load

CASE_BYTES_MIN = 16 << 20
STREAM_BYTES_MIN = 256 << 20
"""Shorter runs measure how it starts."""
START_S = 10.0
START_PAUSE_S = 0.05
END_S = 5.0


@dataclass(frozen=True)
class Iperf3(Side):
    """One client per round, over a number of connections; its seconds are scaled to the bytes of the case."""

    connections: int

    @property
    def name(self) -> str:
        return f"iperf3 x {self.connections}"

    def missing(self) -> str | None:
        return None if shutil.which("iperf3") else "iperf3 is not in PATH; install it: apt install iperf3"

    def declines(self, load: Load) -> str | None:
        if load.total_bytes < CASE_BYTES_MIN:
            return f"it streams, and has no messages to compare below {CASE_BYTES_MIN >> 20} MiB"
        return None

    def needs_bytes(self, load: Load) -> int:
        return 0

    def receiving(self, load: Load, tools: Mapping[str, str]) -> IperfServer:
        return IperfServer(load)

    def sending(self, load: Load, tools: Mapping[str, str]) -> IperfClient:
        return IperfClient(load, self.connections)


def _stream_bytes(load: Load) -> int:
    return max(STREAM_BYTES_MIN, load.total_bytes)


class _IperfHalf(Half):
    _load: Load

    def congestion(self) -> list[str]:
        # The sockets are the child's, which ends where it may not have what it is told.
        return [self._load.baseline_congestion or system_congestion()]

    def digest(self) -> None:
        return None

    def clear(self) -> None:
        """There is no memory that could be looked at."""


class IperfServer(_IperfHalf, ReceivingHalf):
    def __init__(self, load: Load) -> None:
        self._load = load
        self._host, self._port = load.host, free_port(load.host)
        self._server = subprocess.Popen(
            ["iperf3", "--server", "--bind", load.host, "--port", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    def tell(self) -> Told:
        return {"host": self._host, "port": self._port}

    def cpu_s(self) -> float:
        # The CPU clock of another process, by its number: clock_getcpuclockid(3).
        clock = (~self._server.pid << 3) | 2
        return time.clock_gettime(clock) * self._load.total_bytes / _stream_bytes(self._load)

    def close(self) -> None:
        self._server.kill()
        self._server.wait(END_S)


class IperfClient(_IperfHalf, SendingHalf):
    def __init__(self, load: Load, connections: int) -> None:
        self._load, self._connections = load, connections
        self._told: Told = {}
        self._cpu_s = 0.0

    def hear(self, told: Told) -> None:
        self._told = told

    def send(self, batch: int) -> float:
        command = [
            "iperf3", "--client", str(self._told["host"]), "--port", str(self._told["port"]), "--json",
            "--bytes", str(_stream_bytes(self._load)), "--parallel", str(self._connections),
        ]  # fmt: skip
        if self._load.baseline_congestion:
            command += ["--congestion", self._load.baseline_congestion]
        if self._load.pacing_bytes_per_s:
            command += ["--fq-rate", str(int(self._load.pacing_bytes_per_s * 8 / self._connections))]
        end = self._run(command)["end"]
        received, cpu = end["sum_received"], end["cpu_utilization_percent"]
        scale = self._load.total_bytes / received["bytes"]
        self._cpu_s += cpu["host_total"] / 100 * received["seconds"] * scale
        return float(received["seconds"] * scale)

    def _run(self, command: list[str]) -> dict[str, dict[str, dict[str, float]]]:
        """Run the client; again for a moment while the server starts, or ends its last test."""
        until_s = time.monotonic() + START_S
        while True:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self._load.deadline_s, check=False)
            try:
                result = json.loads(done.stdout)
            except ValueError:
                result = {"error": done.stderr.strip()[-200:] or "no output"}
            if "error" not in result and not done.returncode:
                return dict(result)
            if time.monotonic() > until_s:
                raise BenchmarkError(f"iperf3: {result.get('error', f'status {done.returncode}')}")
            time.sleep(START_PAUSE_S)

    def cpu_s(self) -> float:
        return self._cpu_s

    def close(self) -> None:
        """Each client has ended by itself."""
