"""NIXL with its UCX backend over TCP, as its users call it: registered memory, prepared transfers, a polling client."""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
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

MODULES = ("nixl", "nixl_cu12", "nixl_cu13")
LOOPBACK = ("127.0.0.1", "::1")


@dataclass(frozen=True)
class Nixl(Side):
    """The agent; a client without a progress thread of its own is the faster one."""

    @property
    def name(self) -> str:
        return "NIXL (UCX, tcp)"

    @property
    def spins_when_idle(self) -> bool:
        return True  # the receiver's progress thread

    def missing(self) -> str | None:
        if _module() is None:
            return "it is not installed: pip install nixl-cu12 (its wheel runs without a GPU)"
        return None

    def declines(self, load: Load) -> str | None:
        return "it does not pace" if load.pacing_bytes_per_s else None

    def prepare(self, folder: Path) -> dict[str, str]:
        return prepare_shim(folder)

    def environment(self, load: Load, tools: Mapping[str, str]) -> dict[str, str]:
        return shim_environment(tools, load.baseline_congestion)

    def receiving(self, load: Load, tools: Mapping[str, str]) -> NixlReceiver:
        return NixlReceiver(load, has_progress_thread=True)

    def sending(self, load: Load, tools: Mapping[str, str]) -> NixlSender:
        return NixlSender(load, has_progress_thread=False)


def _module() -> str | None:
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), None)


class _NixlHalf(Half):
    def __init__(self, load: Load, *, has_progress_thread: bool) -> None:
        os.environ["UCX_TLS"] = "tcp"
        if load.host in LOOPBACK:
            os.environ["UCX_NET_DEVICES"] = "lo"
        name = _module()
        if name is None:
            raise BenchmarkError("NIXL is not installed here")
        api: Any = importlib.import_module(f"{name}._api")
        self.load = load
        self.buffers = Buffers(load)
        config = api.nixl_agent_config(backends=["UCX"], enable_prog_thread=has_progress_thread)
        self.agent: Any = api.nixl_agent(f"kvstore-benchmark-{type(self).__name__}", config)
        whole = [(self.buffers.address, self.buffers.array.nbytes, 0, "")]
        self.agent.register_memory(self.agent.get_reg_descs(whole, "DRAM"))
        self.peer: Any = None

    def tell(self) -> Told:
        return {"metadata": self.agent.get_agent_metadata().hex(), "address": self.buffers.address}

    def digest(self) -> str:
        return self.buffers.digest()

    def close(self) -> None:
        """The agent ends with its process."""


class NixlReceiver(_NixlHalf, ReceivingHalf):
    def hear(self, told: Told) -> None:
        self.peer = self.agent.add_remote_agent(bytes.fromhex(told["metadata"]))

    def clear(self) -> None:
        self.buffers.clear()


class NixlSender(_NixlHalf, SendingHalf):
    def __init__(self, load: Load, *, has_progress_thread: bool) -> None:
        super().__init__(load, has_progress_thread=has_progress_thread)
        self.buffers.fill(load.seed)
        self._there = 0
        self._handles: list[Any] = []

    def hear(self, told: Told) -> None:
        self.peer = self.agent.add_remote_agent(bytes.fromhex(told["metadata"]))
        self._there = int(told["address"])

    def connect(self) -> None:
        self.agent.make_connection(self.peer)
        for batch in self.buffers.records:
            here, there = (
                self.agent.get_xfer_descs([(base + at, size, 0) for at, size in batch], "DRAM")
                for base in (self.buffers.address, self._there)
            )
            self._handles.append(self.agent.initialize_xfer("WRITE", here, there, self.peer, b""))

    def send(self, batch: int) -> float:
        handle = self._handles[batch]
        begin = time.perf_counter()
        state = self.agent.transfer(handle)
        while state == "PROC":
            # The client makes progress by being asked; whoever else wants the core gets it.
            os.sched_yield()
            state = self.agent.check_xfer_state(handle)
            if time.perf_counter() - begin > self.load.deadline_s:
                raise BenchmarkError(f"NIXL had not finished after {self.load.deadline_s:g} s")
        seconds = time.perf_counter() - begin
        if state != "DONE":
            raise BenchmarkError(f"NIXL ended a transfer with {state!r}")
        return seconds
