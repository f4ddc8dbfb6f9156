"""Transfers over a long lossy path: `python -m benchmarks.transfer_wan`.

Two hosts joined by an emulated link (`tests/network`): 200 Mbit/s, 40 ms round trip, .1 % and 1 % of the packets lost.
Ours is whole transfers, from `send` to the acknowledged commit; the baseline is `iperf3` with the same congestion
control and as many connections, in turn with ours. Figures are shares of the link: payload bits per second by the
link's rate, which counts the headers of IP and TCP, too, so that .965 is all there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from benchmarks.paired import Absent, Row, report
from benchmarks.transfer_vs_raw import BLOCK_TOKENS, Case
from kvstore.abc import TransportOptions
from kvstore.transfer import Endpoint, Sender, TransferSettings, send_lease
from tests.network.link import ADDRESSES, Lines, Link, Way, build_emulator

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[1]
CASE = Case("1 MiB records", 110, 8, 4)
PORT = 7000
RATE_BITS_PER_S = 200e6
DELAY_S = 0.02
WITHIN_S = 600.0
RECORDS_MIN = 4
"""Fewer would be over before a connection has found its rate."""


@dataclass(frozen=True)
class Choice:
    """A congestion control and a number of connections; None is what the library, or the system, takes by itself."""

    congestion_control: str | None
    connections: int | None

    @property
    def name(self) -> str:
        if self.congestion_control is None:
            return "default"
        return f"{self.congestion_control} x {self.connections}"


# Our two processes: told what to do line by line.


def _ids(records: int) -> list[int]:
    """Prompts of different lengths share nothing."""
    return [records, *range(1, records * BLOCK_TOKENS)]


def _receive() -> None:
    """Each line is a number of records: that prompt must be here, and is dropped."""
    capacity = f"{CASE.records * 5 // 4 + 64}MiB"
    with (
        kvstore.open(CASE.spec(), dram=capacity) as store,
        Endpoint(store.pool, f"tcp://{ADDRESSES['b']}:{PORT}") as endpoint,
    ):
        print(endpoint.address, flush=True)
        for line in sys.stdin:
            ids = _ids(int(line))
            assert store.match([*ids, 1]).tokens == len(ids), "the prompt did not arrive"
            key = store.prompt(ids).path.keys[0]
            while store.match([*ids, 1]).tokens:
                # A slot that the last transfer's thread has not let go of stays for a moment.
                store.pool.evict(key)
                time.sleep(0.005)
            print("dropped", flush=True)


def _send() -> None:
    """Each line is an order in JSON; the answer is the seconds of a transfer, or why there was none."""
    generator = np.random.default_rng(1)
    with kvstore.open(CASE.spec(), dram=f"{CASE.records * 5 // 4 + 64}MiB") as store:
        print("ready", flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            ids = _ids(order["records"])
            if not store.match([*ids, 1]):
                _put(store, ids, generator)
            chosen = {} if order["connections"] is None else {"connections": order["connections"]}
            try:
                settings = TransferSettings(**chosen)
            except ValueError as error:
                print(json.dumps({"refused": str(error)}), flush=True)
                continue
            options = TransportOptions(congestion_control=order["congestion_control"])
            with Sender(settings=settings) as sender:
                lease = store.read(store.match([*ids, 1]))
                done = send_lease(lease, order["to"], transport=options, sender=sender).result(WITHIN_S)
            path = done.path
            picked = f"{'+'.join(path.congestion_control)} x {path.connections}: {path.why}"
            print(json.dumps({"seconds": done.seconds, "bytes": done.total_bytes, "picked": picked}), flush=True)


def _put(store: kvstore.Store, ids: list[int], generator: np.random.Generator) -> None:
    with store.write(ids) as writer:
        noise = generator.integers(0, 1 << 16, (CASE.heads, len(ids), 128), np.uint16)
        for layer in range(CASE.layers):
            writer.put(layer, tokens=slice(0, len(ids)), k=noise, v=noise)
        writer.commit()


# The harness


class Ends:
    """One emulated path with our processes at both ends."""

    def __init__(self, stack: ExitStack, program: Path, loss: float) -> None:
        self.link = stack.enter_context(Link(program, Way(DELAY_S, loss, RATE_BITS_PER_S)))
        module = (sys.executable, "-m", "benchmarks.transfer_wan", "--role")
        self._receiver = Lines(self.link.command("b", *module, "receive"), cwd=ROOT)
        stack.callback(self._receiver.close)
        self._sender = Lines(self.link.command("a", *module, "send"), cwd=ROOT)
        stack.callback(self._sender.close)
        self.picked = ""
        self._address = self._receiver.answer()
        self._sender.answer()

    def transfer(self, choice: Choice, records: int) -> float | str:
        """Our share of the link, or why the library refuses the choice."""
        order = {
            "to": self._address,
            "records": records,
            "connections": choice.connections,
            "congestion_control": choice.congestion_control,
        }
        answer: dict[str, Any] = json.loads(self._sender.ask(json.dumps(order), WITHIN_S))
        if "refused" in answer:
            return str(answer["refused"])
        size_bytes = records * CASE.record_bytes
        # More is what a connection took that did not last; it crosses again and counts once.
        assert answer["bytes"] >= size_bytes, "part of it was there already"
        self._receiver.ask(str(records))
        self.picked = answer["picked"]
        return float(size_bytes * 8 / answer["seconds"] / RATE_BITS_PER_S)

    def iperf(self, choice: Choice, seconds: float) -> float:
        """The share of the link that `iperf3` has."""
        server = Lines(self.link.command("b", "iperf3", "--server", "--one-off", "--forceflush"))
        try:
            while "listening" not in server.answer():
                continue
            command = ["iperf3", "--client", ADDRESSES["b"], "--json", "--time", f"{seconds:.0f}", "--length", "256K"]
            command += ["--parallel", str(choice.connections or 1)]
            if choice.congestion_control is not None:
                command += ["--congestion", choice.congestion_control]
            result = subprocess.run(
                self.link.command("a", *command), capture_output=True, text=True, check=True, timeout=WITHIN_S
            )
        finally:
            server.close()
        return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"] / RATE_BITS_PER_S)


def measure(
    program: Path, loss: float, choices: Sequence[Choice], rounds: int, seconds: float
) -> tuple[list[Row], list[Absent]]:
    """Both sides in turn, for every choice; what takes `seconds` at the rate that `iperf3` had is sent."""
    ours: dict[Choice, list[float]] = {choice: [] for choice in choices}
    theirs: dict[Choice, list[float]] = {choice: [] for choice in choices}
    refused: dict[Choice, str] = {}
    picked: dict[Choice, str] = {}
    with ExitStack() as stack:
        path = Ends(stack, program, loss)
        records: dict[Choice, int] = {}
        for _ in range(rounds):
            for choice in choices:
                share = path.iperf(choice, seconds)
                theirs[choice].append(share)
                if choice not in records:
                    due = round(share * RATE_BITS_PER_S / 8 * seconds / CASE.record_bytes)
                    records[choice] = min(max(due, RECORDS_MIN), CASE.records)
                outcome = path.transfer(choice, records[choice]) if choice not in refused else refused[choice]
                if isinstance(outcome, str):
                    refused[choice] = outcome
                else:
                    ours[choice].append(outcome)
                    picked[choice] = path.picked
    medians = {choice: statistics.median(shares) for choice, shares in theirs.items()}
    label = f"{loss * 100:g} % loss"
    rows = [_row(f"{label}, {choice.name}", ours[choice], choice, theirs) for choice in choices if ours[choice]]
    fixed = [choice for choice in choices if choice.congestion_control is not None]
    for choice in choices:
        if choice.congestion_control is None and fixed:
            best = max(fixed, key=lambda other: medians[other])
            rows.append(_row(f"{label}, {choice.name} against the best", ours[choice], best, theirs))
    for choice in choices:
        if ours[choice]:
            print(f"{label}, {choice.name}: ours at least {min(ours[choice]):.3f}, iperf3 {min(theirs[choice]):.3f}")
            if choice.congestion_control is None:
                print(f"{label}, {choice.name} picked {picked[choice]}")
    absent = [
        Absent(f"kvstore, {label}, {choice.name}", f"{reason} (iperf3: {medians[choice]:.3f} of the link)")
        for choice, reason in refused.items()
    ]
    return rows, absent


def _row(case: str, ours: list[float], baseline: Choice, theirs: dict[Choice, list[float]]) -> Row:
    ratios = [mine / other for mine, other in zip(ours, theirs[baseline], strict=True)]
    return Row(
        case,
        "of the link",
        statistics.median(ours),
        f"iperf3 {baseline.name}",
        statistics.median(theirs[baseline]),
        statistics.median(ratios),
        min(ratios),
        len(ratios),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", default="0.001,0.01", help="shares of the packets, separated by commas")
    parser.add_argument("--congestion", default="cubic,bbr")
    parser.add_argument("--connections", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one measurement, about")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "benchmarks" / "transfer_wan.json")
    parser.add_argument("--role", choices=["receive", "send"], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.role == "receive":
        _receive()
        return
    if chosen.role == "send":
        _send()
        return
    choices = [
        Choice(name, int(count)) for name in chosen.congestion.split(",") for count in chosen.connections.split(",")
    ]
    choices.append(Choice(None, None))
    rows: list[Row] = []
    absent: list[Absent] = []
    with tempfile.TemporaryDirectory(prefix="kvstore-wan-") as folder:
        program = build_emulator(Path(folder))
        for loss in chosen.loss.split(","):
            more_rows, more_absent = measure(program, float(loss), choices, chosen.rounds, chosen.seconds)
            rows += more_rows
            absent += more_absent
    title = f"{RATE_BITS_PER_S / 1e6:g} Mbit/s, {2000 * DELAY_S:g} ms round trip"
    report(title, rows, chosen.output, absent)


if __name__ == "__main__":
    main()
