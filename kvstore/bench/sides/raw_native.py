"""Plain TCP sockets, from C++: `raw_sockets.cc`, compiled when a run begins. Uses nothing of kvstore."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.bench.sides.network import system_congestion
from kvstore.bench.sides.side import Half, ReceivingHalf, SendingHalf, Side, Told
from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.bench.load import Load

SOURCE = Path(__file__).parent / "raw_sockets.cc"
COMPILERS = ("c++", "g++", "clang++")
COMPILE_S = 120.0
END_S = 5.0
TOOL = "raw_sockets"


@dataclass(frozen=True)
class RawNative(Side):
    """Sockets over a number of connections."""

    connections: int

    @property
    def name(self) -> str:
        return f"raw sockets x {self.connections} (compiled)"

    def missing(self) -> str | None:
        if _compiler() is None:
            return f"there is no C++ compiler ({', '.join(COMPILERS)}) in PATH; install one, or use raw-python"
        if not SOURCE.exists():
            return f"{SOURCE.name} was not installed with this package; use raw-python"
        return None

    def declines(self, load: Load) -> str | None:
        if load.pacing_bytes_per_s:
            return "it does not pace; use raw-python"
        if ":" in load.host:
            return "it is for IPv4; use raw-python"
        return None

    def prepare(self, folder: Path) -> dict[str, str]:
        program = folder / TOOL
        if not program.exists():
            command = [str(_compiler()), "-std=c++20", "-O2", "-pthread", str(SOURCE), "-o", str(program)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S, check=False)
            if done.returncode:
                raise BenchmarkError(f"{SOURCE.name} does not compile here: {done.stderr.strip()[-400:]}")
        return {TOOL: str(program)}

    def receiving(self, load: Load, tools: Mapping[str, str]) -> NativeReceiver:
        return NativeReceiver(load, self.connections, tools[TOOL])

    def sending(self, load: Load, tools: Mapping[str, str]) -> NativeSender:
        return NativeSender(load, self.connections, tools[TOOL])


def _compiler() -> str | None:
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


class _Program(Half):
    """A child of the process of this half; it prints `seconds cpu_seconds` for each batch."""

    def __init__(self, load: Load, connections: int) -> None:
        self.load = load
        # Records of one size are named once: the order in which sizes follow each other does not matter here.
        sizes = sorted(Counter(load.record_bytes).items())
        self.arguments = (
            str(connections),
            ",".join(str(size_bytes) for size_bytes, _ in sizes),
            ",".join(str(count) for _, count in sizes),
            load.baseline_congestion or "default",
        )
        self.rounds = (str(load.batches), str(load.seed))
        self.cpu = 0.0
        self._child: subprocess.Popen[str] | None = None

    def start(self, *command: str) -> str:
        """Start it; its first line."""
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        return self.read()

    def read(self) -> str:
        assert self._child is not None
        assert self._child.stdout is not None
        line = self._child.stdout.readline().strip()
        if not line:
            assert self._child.stderr is not None
            status, reason = self._child.wait(END_S), self._child.stderr.read().strip()[-200:]
            raise BenchmarkError(f"{TOOL} ended with status {status}" + (f": {reason}" if reason else ""))
        return line

    def go(self) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()

    def congestion(self) -> list[str]:
        # The sockets are the child's, which ends where it may not have what it is told.
        return [self.load.baseline_congestion or system_congestion()]

    def cpu_s(self) -> float:
        return self.cpu

    def close(self) -> None:
        if self._child is None:
            return
        self._child.kill()
        self._child.wait(END_S)
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            assert pipe is not None
            pipe.close()
        self._child = None


class NativeReceiver(_Program, ReceivingHalf):
    """It forgets nothing on request: its memory is zero when it starts, and it says what came in the first round."""

    def __init__(self, load: Load, connections: int, program: str) -> None:
        super().__init__(load, connections)
        self._checksums: list[str] = []
        self._address = self.start(program, "receive", *self.arguments, load.host, *self.rounds)

    def tell(self) -> Told:
        return {"address": f"{self.load.host}:{self._address}"}

    def finish_round(self) -> None:
        for _ in range(self.load.batches):
            _, cpu_s, *checksum = self.read().split()
            self.cpu += float(cpu_s)
            self._checksums += checksum

    def clear(self) -> None:
        if self._checksums:
            raise BenchmarkError(f"{TOOL} can be checked in its first round only")

    def digest(self) -> str:
        return " ".join(self._checksums)


class NativeSender(_Program, SendingHalf):
    def __init__(self, load: Load, connections: int, program: str) -> None:
        super().__init__(load, connections)
        self._program = program
        self._target = ""
        self._checksums = ""

    def hear(self, told: Told) -> None:
        self._target = str(told["address"])

    def connect(self) -> None:
        self._checksums = self.start(self._program, "send", self._target, *self.arguments, *self.rounds)

    def send(self, batch: int) -> float:
        self.go()
        seconds, cpu_s = map(float, self.read().split())
        self.cpu += cpu_s
        return seconds

    def digest(self) -> str:
        return self._checksums
