"""`kvstore bench transfer`: every case, under every set of conditions, between two processes or two machines."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from kvstore.bench.hands import Facts, Hands, LocalHands
from kvstore.bench.load import Load
from kvstore.bench.remote import RemoteHands
from kvstore.bench.result import CaseResult
from kvstore.bench.rounds import run_rounds
from kvstore.bench.rows import Absent
from kvstore.bench.sides.choice import RAW, baselines
from kvstore.bench.sides.mooncake import Mooncake
from kvstore.bench.sides.network import NEAR_S, near_congestion
from kvstore.bench.sides.nixl import Nixl
from kvstore.bench.sides.ours import OUR_VARIANTS
from kvstore.bench.sides.raw_native import RawNative
from kvstore.bench.sides.raw_python import RawPython
from kvstore.errors import BenchmarkError
from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.bench.cases import Case
    from kvstore.bench.sides.side import Side

PROCESS_BYTES = 192 << 20
"""Interpreter, libraries and stacks of one half."""
ROUNDS_MAX = 10_000
SPARE = 0.9
"""Share of the memory that is available which a run may take."""


@dataclass(frozen=True)
class Settings:
    """What a run measures.

    Attributes:
        cases: what is moved.
        connections: of ours; 0 is the library's default.
        congestion: algorithms; empty is ours by round-trip time, which the baselines that can be told get, too.
        pacing_bytes_per_s: 0 is unpaced.
        busy: how many busy processes run beside, on each machine.
        rounds: of each side; one more is not counted, and its contents are compared.
        seed: of the contents.
        against: names of baselines.
        deadline_s: the longest that one round may take.
    """

    cases: tuple[Case, ...]
    connections: tuple[int, ...] = (0,)
    congestion: tuple[str, ...] = ("",)
    pacing_bytes_per_s: float = 0.0
    busy: tuple[int, ...] = (0,)
    rounds: int = 20
    seed: int = 1
    against: tuple[str, ...] = ()
    deadline_s: float = 60.0

    def __post_init__(self) -> None:
        if not (self.cases and self.connections and self.congestion and self.busy):
            raise BenchmarkError("a run needs at least one case, number of connections, algorithm and busy count")
        if not 1 <= self.rounds <= ROUNDS_MAX:
            raise BenchmarkError(f"{self.rounds} rounds are not from 1 to {ROUNDS_MAX}")
        if any(not 0 <= count <= CONNECTIONS_PER_TRANSFER_MAX for count in self.connections):
            raise BenchmarkError(f"a transfer has 1 to {CONNECTIONS_PER_TRANSFER_MAX} connections")
        if any(count < 0 for count in self.busy) or self.pacing_bytes_per_s < 0 or not self.deadline_s > 0:
            raise BenchmarkError("busy processes, pacing and the deadline are not negative, the deadline not 0")
        baselines(self.against)

    def conditions(self) -> list[tuple[Case, int, str, int]]:
        """(case, connections, congestion, busy) of each measurement."""
        return list(product(self.cases, self.connections, self.congestion, self.busy))


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        label: case and conditions. side: which one is running.
        done, of: steps of all cases.
    """

    label: str
    side: str
    done: int
    of: int


class TransferRun:
    """A run; a context manager that ends every process it has started.

    Args:
        settings: what to measure.
        target: where the other machine listens; None is a second process of this one.
        tick: told of every step.

    Raises:
        BenchmarkError: the other machine cannot be reached, or there is too little memory.
    """

    def __init__(
        self, settings: Settings, target: str | None = None, tick: Callable[[Progress], None] = lambda _: None
    ) -> None:
        self.settings = settings
        self._tick = tick
        self._sending: Hands = LocalHands()
        self._receiving: Hands = self._sending
        try:
            self._sender_host = self._receiver_host = "127.0.0.1"
            if target is not None:
                self._receiving = remote = RemoteHands(target)
                self._sender_host, self._receiver_host = remote.own_host, ""
            self.facts: tuple[Facts, Facts] = (self._sending.facts(), self._receiving.facts())
            self._is_near = self._receiving.round_trip_s() < NEAR_S
            if self.facts[0].version != self.facts[1].version:
                raise BenchmarkError(
                    f"kvstore is {self.facts[0].version} here and {self.facts[1].version} there; install the same"
                )
            self._sides, self._absent = self._choose()
            self._check_memory()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TransferRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Idempotent."""
        for hands in (self._sending, self._receiving):
            hands.close()

    @property
    def place(self) -> dict[str, str]:
        """Machine and commit, of both ends if they differ."""
        here, there = self.facts
        is_one = here.boot == there.boot
        return {
            "machine": here.machine if is_one else f"{here.machine} -> {there.machine}",
            "commit": here.commit if here.commit == there.commit else f"{here.commit} -> {there.commit}",
        }

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures has to know."""
        notes = []
        if RAW in self.settings.against and not any(isinstance(side, RawNative) for side in self._sides):
            why = "pacing" if self.settings.pacing_bytes_per_s else "no C++ compiler"
            notes.append(f"raw sockets ran in Python, not compiled: {why}")
        others = [side.name for side in self._sides if isinstance(side, Mooncake | Nixl)]
        reasons = sorted({facts.shim_missing for facts in self.facts if facts.shim_missing})
        if others and reasons:
            notes.append(
                f"{', '.join(others)} cannot be told which congestion control to use and got the system's, since "
                f"{' and '.join(reasons)}; mend that, or set net.ipv4.tcp_congestion_control: "
                "these rows compare algorithms"
            )
        return notes

    def _choose(self) -> tuple[list[Side], list[Absent]]:
        """Who takes part, and who cannot."""
        sides: list[Side] = []
        absent: list[Absent] = []
        here, there = (facts.missing for facts in self.facts)
        for side in baselines(self.settings.against):
            if isinstance(side, RawNative):
                is_possible = side.name not in here and side.name not in there
                chosen = side if is_possible and not self.settings.pacing_bytes_per_s else RawPython(side.connections)
                sides.append(chosen)
            elif side.name in here:
                absent.append(Absent(side.name, here[side.name]))
            elif side.name in there:
                absent.append(Absent(side.name, f"on the receiving machine: {there[side.name]}"))
            else:
                sides.append(side)
        return [*OUR_VARIANTS, *dict.fromkeys(sides)], absent

    def _check_memory(self) -> None:
        """Raises `BenchmarkError` before anything is started."""
        here, there = self.facts
        for case in self.settings.cases:
            load = Load.of(case)
            half_bytes = sum(
                side.needs_bytes(load) + PROCESS_BYTES for side in self._sides if side.declines(load) is None
            )
            needed = 2 * half_bytes if here.boot == there.boot else half_bytes
            available = min(here.available_bytes, there.available_bytes)
            if needed > available * SPARE:
                raise BenchmarkError(
                    f"{case.name} with {len(self._sides)} sides takes {format_bytes(needed)} of memory on one machine, "
                    f"{format_bytes(available)} are available; measure less at once (--sizes, --prompt-tokens), or "
                    "against fewer (--against raw)"
                )

    def results(self) -> Iterator[CaseResult]:
        """Measure; one result after the other."""
        conditions = self.settings.conditions()
        steps = (self.settings.rounds + 1) * len(self._sides)
        busy_before = 0
        for number, (case, connections, congestion, busy) in enumerate(conditions):
            if busy != busy_before:
                self._set_busy(busy)
                busy_before = busy
            label = self._label(case, connections, congestion, busy)
            done = number * steps

            def tick(side: str, label: str = label) -> None:
                nonlocal done
                self._tick(Progress(label, side, done, len(conditions) * steps))
                done += 1

            yield self._measure(label, case, connections, congestion, tick)

    def _set_busy(self, count: int) -> None:
        self._sending.busy(count)
        if self.facts[0].boot != self.facts[1].boot:
            self._receiving.busy(count)

    def _measure(
        self, label: str, case: Case, connections: int, congestion: str, tick: Callable[[str], None]
    ) -> CaseResult:
        load = Load.of(
            case,
            seed=self.settings.seed,
            connections=connections,
            congestion=congestion,
            baseline_congestion=congestion or (near_congestion() if self._is_near else ""),
            pacing_bytes_per_s=self.settings.pacing_bytes_per_s,
            deadline_s=self.settings.deadline_s,
            host=self._sender_host,
        )
        absent = list(self._absent)
        sides: list[Side] = []
        for side in self._sides:
            reason = side.declines(load)
            if reason is None:
                sides.append(side)
            else:
                absent.append(Absent(side.name, f"{label}: {reason}"))
        measured = run_rounds(
            sides,
            self._receiving,
            self._sending,
            replace(load, host=self._receiver_host),
            load,
            self.settings.rounds,
            tick,
        )
        return CaseResult(label, case, OUR_VARIANTS[0].name, tuple(measured.values()), tuple(absent))

    def _label(self, case: Case, connections: int, congestion: str, busy: int) -> str:
        parts = [case.name]
        if connections:
            parts.append(f"{connections} connection{'s' if connections > 1 else ''}")
        if congestion:
            parts.append(congestion)
        if self.settings.pacing_bytes_per_s:
            parts.append(f"paced at {format_bytes(self.settings.pacing_bytes_per_s)}/s")
        if busy or len(self.settings.busy) > 1:
            parts.append(f"{busy} busy" if busy else "quiet")
        return ", ".join(parts)
