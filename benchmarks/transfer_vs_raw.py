"""Transfers against raw sockets: `python -m benchmarks.transfer_vs_raw`.

Two processes on loopback each. Ours is a whole transfer, from `send` to the acknowledged commit: offer, reservation,
checksums verified, records framed, the commit. The baseline (`raw_sockets.cc`, compiled here) moves as many bytes
from memory to memory over 1, 2 and 4 connections and does nothing else; `iperf3` stands beside it where installed. A
further side of ours does not verify checksums, which only this benchmark can ask for. All alternate in one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import kvstore
import kvstore.transfer.native
from benchmarks.paired import Row, report
from kvstore._native import receive_pieces
from kvstore.abc import TransportOptions
from kvstore.limits import KIB, MIB
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.transfer import Endpoint, TransferSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "kvstore" / "bench" / "sides" / "raw_sockets.cc"
RAW_CONNECTIONS = (1, 2, 4)
OURS, UNVERIFIED = "kvstore", "kvstore, not verified"
IPERF3_GIGABYTES_MIN = 0.01
"""Smaller cases measure latency, for which `iperf3` has no figure."""
BLOCK_TOKENS = 64
WITHIN_S = 60.0


@dataclass(frozen=True)
class Case:
    """Records of one size: `layers` of a model with `heads` KV heads of 128 elements, one block each."""

    name: str
    records: int
    layers: int
    heads: int

    @property
    def record_bytes(self) -> int:
        return self.layers * self.heads * 2 * 128 * 2 * BLOCK_TOKENS

    @property
    def gigabytes(self) -> float:
        return self.records * self.record_bytes / 1e9

    def spec(self) -> ModelSpec:
        heads = (Segment("heads", self.heads, 1),)
        keys, values = (TensorSpec(name, DType.BFLOAT16, heads, (128,), has_tokens=True) for name in ("k", "v"))
        group = CacheGroup("full", ReuseRule.ATTENTION, tuple(range(self.layers)), (keys, values))
        return ModelSpec("benchmark", "sha256:benchmark", BLOCK_TOKENS, (group,))


CASES = {
    "1x64K": Case("1 x 64 KiB", 1, 1, 2),
    "1x1M": Case("1 x 1 MiB", 1, 8, 4),
    "16x1M": Case("16 x 1 MiB", 16, 8, 4),
    "256x1M": Case("256 x 1 MiB", 256, 8, 4),
    "4096x64K": Case("4096 x 64 KiB", 4096, 1, 2),
}


# Our two processes: told what to do line by line, answering each with `seconds cpu_seconds`.


def _ids(case: Case) -> list[int]:
    return list(range(case.records * BLOCK_TOKENS))


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _capacity(case: Case) -> str:
    return f"{(case.records * (case.record_bytes + 16 * KIB)) * 5 // 4 // MIB + 64}MiB"


def _receive(case: Case, congestion: str, *, is_verified: bool) -> None:
    if not is_verified:
        # For this comparison only: nothing of the library passes it, so that damage never passes as data.
        unverified = partial(receive_pieces, is_verified=False)
        kvstore.transfer.native.receive_pieces = unverified  # type: ignore[attr-defined]  # not its to export
    options = TransportOptions(congestion_control=None if congestion == "default" else congestion)
    with (
        kvstore.open(case.spec(), dram=_capacity(case)) as store,
        Endpoint(store.pool, "tcp://127.0.0.1:0", transport=options) as endpoint,
    ):
        print(endpoint.address, flush=True)
        path = store.prompt(_ids(case)).path
        cpu_s = _cpu_s()
        for _ in sys.stdin:
            spent_s = _cpu_s() - cpu_s
            hit = store.match([*_ids(case), 1])
            assert hit.tokens == case.records * BLOCK_TOKENS, "the prompt did not arrive"
            while store.match([*_ids(case), 1]).tokens:
                # A slot that the last transfer's thread has not let go of stays for a moment.
                store.pool.evict(path.keys[0])
                time.sleep(0.005)
            print(f"0 {spent_s}", flush=True)
            cpu_s = _cpu_s()


def _send(case: Case, target: str, congestion: str, connections: int | None) -> None:
    options = TransportOptions(congestion_control=None if congestion == "default" else congestion)
    settings = TransferSettings(connections=connections)
    generator = np.random.default_rng(1)
    with kvstore.open(case.spec(), dram=_capacity(case)) as store, kvstore.transfer.Sender(settings=settings) as sender:
        ids = _ids(case)
        chunk = 64 * BLOCK_TOKENS
        with store.write(ids) as writer:
            for layer in range(case.layers):
                for start in range(0, len(ids), chunk):
                    stop = min(len(ids), start + chunk)
                    noise = generator.integers(0, 1 << 16, (case.heads, stop - start, 128), np.uint16)
                    writer.put(layer, tokens=slice(start, stop), k=noise, v=noise)
            writer.commit()
        print("ready", flush=True)
        for _ in sys.stdin:
            lease = store.read(store.match([*ids, 1]))
            cpu_s = _cpu_s()
            handle = kvstore.transfer.send_lease(lease, target, transport=options, sender=sender)
            done = handle.result(WITHIN_S)
            assert done.total_bytes == case.records * case.record_bytes, "part of it was there already"
            print(f"{done.seconds} {_cpu_s() - cpu_s}", flush=True)


# The harness


class Process:
    """A child that answers lines with lines."""

    def __init__(self, *command: str, has_greeting: bool = True) -> None:
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.first_line = self.answer() if has_greeting else ""

    def answer(self) -> str:
        assert self._child.stdout is not None
        line = self._child.stdout.readline().strip()
        if not line:
            raise RuntimeError(f"{self._child.args!r} ended with {self._child.wait(WITHIN_S)}")
        return line

    def ask(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()

    def close(self) -> None:
        self._child.kill()
        self._child.wait(WITHIN_S)
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            pipe.close()


class Pair:
    """A sending and a receiving process; `round` is one transfer: (seconds, CPU seconds of both)."""

    def __init__(self, sender: Process, receiver: Process, *, is_raw: bool) -> None:
        self._sender, self._receiver, self._is_raw = sender, receiver, is_raw

    def round(self) -> tuple[float, float]:
        self._sender.ask()
        seconds, sender_cpu_s = map(float, self._sender.answer().split())
        if not self._is_raw:
            self._receiver.ask()
        receiver_cpu_s = float(self._receiver.answer().split()[1])
        return seconds, sender_cpu_s + receiver_cpu_s


def _raw_pair(stack: ExitStack, program: Path, case: Case, connections: int, congestion: str) -> Pair:
    load = (str(connections), str(case.record_bytes), str(case.records), congestion)
    receiver = _child(stack, str(program), "receive", *load)
    sender = _child(stack, str(program), "send", receiver.first_line, *load, has_greeting=False)
    return Pair(sender, receiver, is_raw=True)


def _our_pair(
    stack: ExitStack, name: str, congestion: str, connections: int | None, *, is_verified: bool = True
) -> Pair:
    module = (sys.executable, "-m", "benchmarks.transfer_vs_raw")
    unverified = () if is_verified else ("--unverified",)
    receiver = _child(stack, *module, "--role", "receive", "--case", name, "--congestion", congestion, *unverified)
    sender = _child(
        stack, *module, "--role", "send", "--case", name, "--congestion", congestion,
        "--target", receiver.first_line, *([] if connections is None else ["--connections", str(connections)]),
    )  # fmt: skip
    return Pair(sender, receiver, is_raw=False)


def _child(stack: ExitStack, *command: str, has_greeting: bool = True) -> Process:
    process = Process(*command, has_greeting=has_greeting)
    stack.callback(process.close)
    return process


class Iperf3:
    """As many bytes by `iperf3` over one connection; its own figures, which leave out how it connects."""

    def __init__(self, case: Case, congestion: str) -> None:
        self._client = ["iperf3", "-c", "127.0.0.1", "-n", str(case.records * case.record_bytes), "-J"]
        if congestion != "default":
            self._client += ["-C", congestion]

    def round(self) -> tuple[float, float]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        server = ["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port, "--forceflush"]
        with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "listening" not in process.stdout.readline():
                if process.poll() is not None:
                    raise RuntimeError("iperf3 does not listen")
            command = [*self._client, "-p", port]
            answer = subprocess.run(command, check=True, timeout=WITHIN_S, capture_output=True, text=True)
            process.communicate(timeout=WITHIN_S)
        end = json.loads(answer.stdout)["end"]
        seconds = float(end["sum_received"]["seconds"])
        usage = end["cpu_utilization_percent"]
        return seconds, (usage["host_total"] + usage["remote_total"]) / 100 * seconds


def measure(name: str, program: Path, congestion: str, rounds: int, connections: int | None) -> list[Row]:
    """All sides in turn; rows against each baseline, and the unverified and CPU seconds against the fastest."""
    case = CASES[name]
    with ExitStack() as stack:
        sides: dict[str, Pair | Iperf3] = {
            OURS: _our_pair(stack, name, congestion, connections),
            UNVERIFIED: _our_pair(stack, name, congestion, connections, is_verified=False),
        }
        for count in RAW_CONNECTIONS:
            sides[f"raw x {count}"] = _raw_pair(stack, program, case, count, congestion)
        if shutil.which("iperf3") and case.gigabytes >= IPERF3_GIGABYTES_MIN:
            sides["iperf3"] = Iperf3(case, congestion)
        results: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side, pair in sides.items():
                measured = pair.round()
                if number:
                    results[side].append(measured)
    seconds = {side: [second for second, _ in pairs] for side, pairs in results.items()}
    cpu_s = {side: statistics.median(cpu for _, cpu in pairs) / case.gigabytes for side, pairs in results.items()}
    label = f"{case.name}, {congestion}"
    rows = [_rate_row(label, case, seconds, side) for side in sides if side not in (OURS, UNVERIFIED)]
    fastest = max((row for row in rows if row.baseline_name.startswith("raw")), key=lambda row: row.baseline)
    unverified = _rate_row(f"{label}, not verified", case, seconds, fastest.baseline_name, ours=UNVERIFIED)
    for row in rows:
        best = case.gigabytes / min(seconds[row.baseline_name])
        print(f"{label}: {row.baseline_name} best {best:.2f} GB/s, {cpu_s[row.baseline_name]:.3f} CPU s/GB")
    for side in (OURS, UNVERIFIED):
        best = case.gigabytes / min(seconds[side])
        print(f"{label}: {side} best {best:.2f} GB/s, {cpu_s[side]:.3f} CPU s/GB; fastest {fastest.baseline_name}")
    baseline_cpu_s, our_cpu_s = cpu_s[fastest.baseline_name], cpu_s[OURS]
    ratio = baseline_cpu_s / our_cpu_s
    name_of_cpu = f"fastest: {fastest.baseline_name}"
    return [*rows, unverified, Row(label, "CPU s/GB", our_cpu_s, name_of_cpu, baseline_cpu_s, ratio, ratio, rounds)]


def _rate_row(label: str, case: Case, seconds: dict[str, list[float]], side: str, *, ours: str = OURS) -> Row:
    """A ratio of times; small cases are shown as so many transfers per second."""
    amount, unit = (case.gigabytes, "GB/s") if case.gigabytes >= IPERF3_GIGABYTES_MIN else (1.0, "1/s")
    mine, baseline = seconds[ours], seconds[side]
    ratios = [theirs / own for own, theirs in zip(mine, baseline, strict=True)]
    return Row(
        label,
        unit,
        amount / statistics.median(mine),
        side,
        amount / statistics.median(baseline),
        statistics.median(ratios),
        min(ratios),
        len(ratios),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*CASES, "all"], default="all")
    parser.add_argument("--congestion", default="default,cubic", help="congestion controls, separated by commas")
    parser.add_argument("--connections", type=int, help="of ours; by default what the transfer chooses")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks" / "transfer_vs_raw.json")
    parser.add_argument("--role", choices=["receive", "send"], help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--unverified", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.role == "receive":
        _receive(CASES[chosen.case], chosen.congestion, is_verified=not chosen.unverified)
        return
    if chosen.role == "send":
        _send(CASES[chosen.case], chosen.target, chosen.congestion, chosen.connections)
        return
    with tempfile.TemporaryDirectory(prefix="kvstore-raw-sockets-") as folder:
        program = Path(folder) / "raw_sockets"
        command = ["c++", "-std=c++20", "-O2", "-pthread", str(SOURCE), "-o", str(program)]
        subprocess.run(command, check=True, timeout=WITHIN_S)
        rows: list[Row] = []
        for name in CASES if chosen.case == "all" else [chosen.case]:
            for congestion in chosen.congestion.split(","):
                rows.extend(measure(name, program, congestion, chosen.rounds, chosen.connections))
    report("Transfers against raw sockets (two processes, loopback)", rows, chosen.output)


if __name__ == "__main__":
    main()
