"""What a run can do on a machine: this one, or another that listens (`kvstore.bench.remote`)."""

from __future__ import annotations

import contextlib
import platform
import tempfile
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvstore._version import __version__
from kvstore.bench.processes import BusyProcesses, WorkerProcess
from kvstore.bench.rows import machine_and_commit
from kvstore.bench.sides.choice import SIDES, side_named
from kvstore.bench.sides.network import system_congestion
from kvstore.bench.sides.preload import shim_missing
from kvstore.errors import BenchmarkError
from kvstore.tiers.available_memory import available_memory

if TYPE_CHECKING:
    from kvstore.bench.load import Load
    from kvstore.bench.sides.side import Told

OPEN_S = 180.0
"""To start a process, to compile what it needs, to fill its memory."""
WORKERS_MAX = 64
BUSY_MAX = 256


@dataclass(frozen=True)
class Facts:
    """A machine, as a run has to know it.

    Attributes:
        machine, commit, version: what is measured, and on what.
        boot: names this run of the machine; two names for one machine would count its memory twice.
        available_bytes: memory that processes may still take.
        congestion: what the system gives to a socket that nobody set anything on.
        missing: why a side cannot run here, by its name.
        shim_missing: why sides that cannot be told a congestion control get the system's here; empty if they do not.
    """

    machine: str
    commit: str
    version: str
    boot: str
    available_bytes: int
    congestion: str
    missing: dict[str, str]
    shim_missing: str = ""

    @classmethod
    def here(cls) -> Facts:
        boot = Path("/proc/sys/kernel/random/boot_id")
        available = available_memory()
        reasons = {side.name: side.missing() for side in SIDES.values()}
        return cls(
            **machine_and_commit(),
            version=__version__,
            boot=boot.read_text().strip() if boot.exists() else platform.node(),
            available_bytes=available.bytes if available is not None else 1 << 62,
            congestion=system_congestion(),
            missing={name: reason for name, reason in reasons.items() if reason is not None},
            shim_missing=shim_missing() or "",
        )

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> Facts:
        try:
            return cls(**{field.name: message[field.name] for field in fields(cls)})
        except KeyError as error:
            raise BenchmarkError(
                f"the other machine does not tell its {error}; run the same version of kvstore on both"
            ) from error

    def to_message(self) -> dict[str, Any]:
        return asdict(self)


class Handle(ABC):
    """A half that was opened. Raises `BenchmarkError` for whatever goes wrong in it."""

    told: Told

    @abstractmethod
    def ask(self, what: str, deadline_s: float, **more: Any) -> dict[str, Any]:
        """Have it do something; its answer."""

    @abstractmethod
    def pause(self) -> None:
        """Stop its process, until `resume`."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on."""

    @abstractmethod
    def close(self) -> None:
        """End its process. Idempotent."""


class Hands(ABC):
    """One machine. A context manager that ends all that was started there."""

    @abstractmethod
    def facts(self) -> Facts:
        """What is here now."""

    @abstractmethod
    def round_trip_s(self) -> float:
        """To there and back; 0 on this machine."""

    @abstractmethod
    def open(self, side: str, half: str, load: Load) -> Handle:
        """Start a half; the load's host becomes the address that this machine has for the other."""

    @abstractmethod
    def end_workers(self) -> None:
        """End every half that was opened."""

    @abstractmethod
    def busy(self, count: int) -> None:
        """So many busy processes from now on, instead of those before."""

    @abstractmethod
    def close(self) -> None:
        """Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalHandle(Handle):
    def __init__(self, process: WorkerProcess, told: Told) -> None:
        self._process = process
        self.told = told

    def ask(self, what: str, deadline_s: float, **more: Any) -> dict[str, Any]:
        return self._process.ask({"do": what, **more}, deadline_s)

    def pause(self) -> None:
        self._process.pause()

    def resume(self) -> None:
        self._process.resume()

    def close(self) -> None:
        self._process.close()


class LocalHands(Hands):
    """This machine."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvstore-bench-")
        self._handles: list[LocalHandle] = []
        self._busy: BusyProcesses | None = None

    def facts(self) -> Facts:
        return Facts.here()

    def round_trip_s(self) -> float:
        return 0.0

    def open(self, side: str, half: str, load: Load) -> LocalHandle:
        if len(self._handles) >= WORKERS_MAX:
            raise BenchmarkError(f"{WORKERS_MAX} processes have been started, the most of one case")
        chosen = side_named(side)
        tools = chosen.prepare(Path(self._folder.name))
        process = WorkerProcess(chosen.environment(load, tools))
        try:
            message = {"do": "open", "side": side, "half": half, "load": load.to_message(), "tools": tools}
            handle = LocalHandle(process, process.ask(message, OPEN_S)["told"])
        except BaseException:
            process.close()
            raise
        self._handles.append(handle)
        return handle

    def end_workers(self) -> None:
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.close()

    def busy(self, count: int) -> None:
        if not 0 <= count <= BUSY_MAX:
            raise BenchmarkError(f"{count} busy processes are not from 0 to {BUSY_MAX}")
        if self._busy is not None:
            self._busy.close()
        self._busy = BusyProcesses(count)

    def close(self) -> None:
        with contextlib.ExitStack() as last:
            last.callback(self._folder.cleanup)
            if self._busy is not None:
                last.callback(self._busy.close)
            last.callback(self.end_workers)
