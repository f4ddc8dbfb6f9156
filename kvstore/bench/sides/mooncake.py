"""Mooncake's transfer engine over TCP, as its users call it: registered memory, one batched call."""

from __future__ import annotations

import importlib.util
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.bench.sides.buffers import Buffers
from kvstore.bench.sides.preload import prepare_shim, shim_environment
from kvstore.bench.sides.side import Half, ReceivingHalf, SendingHalf, Side, Told
from kvstore.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvstore.bench.load import Load

ENVIRONMENT = {
    # By default a batch of more than some two thousand pieces fails.
    "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "16384",
    "MC_LOG_LEVEL": "ERROR",
}


@dataclass(frozen=True)
class Mooncake(Side):
    """The engine, a batch shared out over a number of calling threads."""

    threads: int

    @property
    def name(self) -> str:
        return "Mooncake TE" if self.threads == 1 else f"Mooncake TE, {self.threads} threads"

    def missing(self) -> str | None:
        if importlib.util.find_spec("mooncake") is None:
            return (
                "it is not installed: pip install mooncake-transfer-engine-non-cuda (mooncake-transfer-engine where "
                "there is CUDA)"
            )
        return None

    def declines(self, load: Load) -> str | None:
        if load.pacing_bytes_per_s:
            return "it does not pace"
        if self.threads > 1 and len(load.record_bytes) < 2 * self.threads:
            return "too few records to share out"
        return None

    def prepare(self, folder: Path) -> dict[str, str]:
        return prepare_shim(folder)

    def environment(self, load: Load, tools: Mapping[str, str]) -> dict[str, str]:
        return shim_environment(tools, load.baseline_congestion)

    def receiving(self, load: Load, tools: Mapping[str, str]) -> MooncakeReceiver:
        return MooncakeReceiver(load)

    def sending(self, load: Load, tools: Mapping[str, str]) -> MooncakeSender:
        return MooncakeSender(load, self.threads)


class _MooncakeHalf(Half):
    def __init__(self, load: Load) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mooncake.engine import TransferEngine

        self.load = load
        self.buffers = Buffers(load)
        self.engine: Any = TransferEngine()
        _check("initialize", self.engine.initialize(load.host, "P2PHANDSHAKE", "tcp", ""))
        size_bytes = self.buffers.array.nbytes
        _check("register_memory", self.engine.register_memory(self.buffers.address, size_bytes))

    def digest(self) -> str:
        return self.buffers.digest()

    def close(self) -> None:
        """The engine ends with its process; it has no call for it."""


class MooncakeReceiver(_MooncakeHalf, ReceivingHalf):
    def tell(self) -> Told:
        return {"session": f"{self.load.host}:{self.engine.get_rpc_port()}", "address": self.buffers.address}

    def clear(self) -> None:
        self.buffers.clear()


class MooncakeSender(_MooncakeHalf, SendingHalf):
    def __init__(self, load: Load, threads: int) -> None:
        super().__init__(load)
        self.buffers.fill(load.seed)
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._session = ""
        self._parts: list[list[tuple[list[int], list[int], list[int]]]] = []

    def hear(self, told: Told) -> None:
        self._session = str(told["session"])
        here, there = self.buffers.address, int(told["address"])
        for batch in self.buffers.records:
            shared = [batch[first :: self._threads] for first in range(self._threads)]
            self._parts.append(
                [
                    ([here + at for at, _ in part], [there + at for at, _ in part], [size for _, size in part])
                    for part in shared
                ]
            )

    def send(self, batch: int) -> float:
        parts = self._parts[batch]
        begin = time.perf_counter()
        if self._threads > 1:
            for _ in self._pool.map(self._write, parts):
                pass
        else:
            self._write(parts[0])
        return time.perf_counter() - begin

    def _write(self, part: tuple[list[int], list[int], list[int]]) -> None:
        sources, targets, sizes = part
        if len(sizes) == 1:
            done = self.engine.transfer_sync_write(self._session, sources[0], targets[0], sizes[0])
            _check("transfer_sync_write", done)
        else:
            done = self.engine.batch_transfer_sync_write(self._session, sources, targets, sizes)
            _check("batch_transfer_sync_write", done)


def _check(call: str, status: int) -> None:
    if status:
        raise BenchmarkError(f"Mooncake's {call} returned {status}")
