"""Transfers over a long lossy path: `python -m benchmarks.transfer_wan`.

Two hosts joined by an emulated link (`tests/network`): 200 Mbit/s, 40 ms round trip, .1 % and 1 % of the packets lost.
Ours is whole transfers, from `send` over new connections to the acknowledged commit; the baseline is `iperf3` with the
same congestion control and as many connections, in turn with ours and for as many seconds as ours took (whole ones), so
that the beginning weighs as much in both. Figures are shares of the link: payload bits per second by the link's rate,
which counts the headers of IP and TCP, too, so that .965 is all there is.

What the library chooses is measured twice more: a transfer over a connection that an earlier one has left, against an
`iperf3` that does not count its first second; and a longer transfer, whose difference to the shorter one tells the
share in the steady state from what each transfer costs once (connecting, HELLO, OFFER, slow start, COMMIT).
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
CASE = Case("1 MiB records", 220, 8, 4)
PORT = 7000
RATE_BITS_PER_S = 200e6
DELAY_S = 0.02
WITHIN_S = 600.0
RECORDS_MIN = 4
"""Fewer would be over before a connection has found its rate."""
LONGER = 2.5
"""The longer transfer by the shorter one."""
FIRST_RECORDS = 33
"""Of the transfer that leaves a connection behind: past its slow start."""


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
            first = _ids(order["first"]) if order["first"] else []
            for needed in filter(None, (ids, first)):
                if store.match([*needed, 1]).tokens < len(needed):
                    _put(store, needed, generator)
            chosen = {} if order["connections"] is None else {"connections": order["connections"]}
            try:
                settings = TransferSettings(**chosen)
            except ValueError as error:
                print(json.dumps({"refused": str(error)}), flush=True)
                continue
            options = TransportOptions(congestion_control=order["congestion_control"])
            with Sender(settings=settings) as sender:
                for each in filter(None, (first, ids)):
                    lease = store.read(store.match([*each, 1]))
                    done = send_lease(lease, order["to"], transport=options, sender=sender).result(WITHIN_S)
            path = done.path
            told = {
                "seconds": done.seconds,
                "bytes": done.total_bytes,
                "picked": (path.congestion_control[-1] if path.congestion_control else None, path.connections),
                "why": path.why,
            }
            print(json.dumps(told), flush=True)


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
        self.picked = Choice(None, None)
        """Of the last transfer."""
        self.why = ""
        self._address = self._receiver.answer()
        self._sender.answer()

    def transfer(self, choice: Choice, records: int, *, first: int = 0) -> float | str:
        """The seconds of our transfer, or why the library refuses the choice; `first`: after one of so many records."""
        order = {
            "to": self._address,
            "records": records,
            "first": first,
            "connections": choice.connections,
            "congestion_control": choice.congestion_control,
        }
        answer: dict[str, Any] = json.loads(self._sender.ask(json.dumps(order), WITHIN_S))
        if "refused" in answer:
            return str(answer["refused"])
        size_bytes = records * CASE.record_bytes
        # More is what a connection took that did not last; it crosses again and counts once.
        assert answer["bytes"] >= size_bytes, "part of it was there already"
        for sent in filter(None, (first, records)):
            self._receiver.ask(str(sent))
        self.picked, self.why = Choice(*answer["picked"]), answer["why"]
        return float(answer["seconds"])

    def iperf(self, choice: Choice, seconds: float, *, omitted_s: int = 0) -> float:
        """The share of the link that `iperf3` has, in so many whole seconds after those that are omitted."""
        server = Lines(self.link.command("b", "iperf3", "--server", "--one-off", "--forceflush"))
        try:
            while "listening" not in server.answer():
                continue
            command = ["iperf3", "--client", ADDRESSES["b"], "--json", "--length", "256K"]
            command += ["--time", f"{max(1.0, seconds):.0f}", "--omit", str(omitted_s)]
            command += ["--parallel", str(choice.connections or 1)]
            if choice.congestion_control is not None:
                command += ["--congestion", choice.congestion_control]
            result = subprocess.run(
                self.link.command("a", *command), capture_output=True, text=True, check=True, timeout=WITHIN_S
            )
        finally:
            server.close()
        return float(json.loads(result.stdout)["end"]["sum_received"]["bits_per_second"] / RATE_BITS_PER_S)


def share_of(records: int, seconds: float) -> float:
    """Of the link, by the bytes of so many records."""
    return records * CASE.record_bytes * 8 / seconds / RATE_BITS_PER_S


class Measurement:
    """Both sides in turn on one path, for every choice.

    Args:
        path: the two ends.
        label: of the path.
        seconds: about what a transfer takes.
    """

    def __init__(self, path: Ends, label: str, choices: Sequence[Choice], seconds: float) -> None:
        self._path = path
        self._label = label
        self._choices = choices
        self._ours: dict[Choice, list[float]] = {choice: [] for choice in choices}
        self._theirs: dict[Choice, list[float]] = {choice: [] for choice in choices}
        self._kept: list[tuple[float, float]] = []
        self._steady: list[tuple[float, float]] = []
        self._refused: dict[Choice, str] = {}
        self._why = ""
        # What takes so long at the rate that `iperf3` has; not counted.
        self._records = {choice: self._sized(path.iperf(choice, seconds), seconds) for choice in choices}

    @staticmethod
    def _sized(share: float, seconds: float) -> int:
        due = round(share * RATE_BITS_PER_S / 8 * seconds / CASE.record_bytes)
        return min(max(due, RECORDS_MIN), int(CASE.records / LONGER))

    def round(self) -> None:
        for choice in self._choices:
            records = self._records[choice]
            outcome = self._path.transfer(choice, records)
            if isinstance(outcome, str):
                self._refused[choice] = outcome
                continue
            self._ours[choice].append(share_of(records, outcome))
            self._theirs[choice].append(self._path.iperf(choice, outcome))
            if choice.congestion_control is None:
                self._why = self._path.why
                self._more(choice, records, outcome)

    def _more(self, choice: Choice, records: int, seconds: float) -> None:
        longer = round(records * LONGER)
        longer_s = self._path.transfer(choice, longer)
        kept_s = self._path.transfer(choice, records, first=FIRST_RECORDS)
        assert isinstance(longer_s, float)
        assert isinstance(kept_s, float)
        steady = share_of(longer - records, longer_s - seconds)
        self._steady.append((steady, seconds - seconds * share_of(records, seconds) / steady))
        self._kept.append((share_of(records, kept_s), self._path.iperf(self._path.picked, kept_s, omitted_s=1)))

    def rows(self) -> tuple[list[Row], list[Absent]]:
        """What was measured; prints what is no comparison."""
        ours, theirs, label = self._ours, self._theirs, self._label
        measured = [choice for choice in self._choices if ours[choice]]
        rows = [_row(f"{label}, {choice.name}", ours[choice], f"iperf3 {choice.name}", theirs[choice])
                for choice in measured]  # fmt: skip
        fixed = [choice for choice in measured if choice.congestion_control is not None]
        for choice in measured:
            size = self._records[choice] * CASE.record_bytes / 1e6
            print(f"{label}, {choice.name}: {size:.0f} MB; ours at least {min(ours[choice]):.3f}, "
                  f"iperf3 {min(theirs[choice]):.3f}")  # fmt: skip
            if choice.congestion_control is not None:
                continue
            if fixed:
                best = max(fixed, key=lambda other: statistics.median(theirs[other]))
                rows.append(
                    _row(f"{label}, default against the best", ours[choice], f"iperf3 {best.name}", theirs[best])
                )
            kept, omitting = ([pair[side] for pair in self._kept] for side in (0, 1))
            rows.append(
                _row(
                    f"{label}, default, connection kept", kept, f"iperf3 {self._path.picked.name}, after 1 s", omitting
                )
            )
            steady, once_s = (statistics.median(pair[side] for pair in self._steady) for side in (0, 1))
            print(f"{label}, default: {steady:.3f} in the steady state, {once_s:.2f} s once")
            print(f"{label}, default picked {self._path.picked.name}: {self._why}")
        absent = [Absent(f"kvstore, {label}, {choice.name}", reason) for choice, reason in self._refused.items()]
        return rows, absent


def measure(
    program: Path, loss: float, choices: Sequence[Choice], rounds: int, seconds: float
) -> tuple[list[Row], list[Absent]]:
    """All rounds on a path with this loss."""
    with ExitStack() as stack:
        measurement = Measurement(Ends(stack, program, loss), f"{loss * 100:g} % loss", choices, seconds)
        for _ in range(rounds):
            measurement.round()
        return measurement.rows()


def _row(case: str, ours: list[float], baseline: str, theirs: list[float]) -> Row:
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return Row(
        case,
        "of the link",
        statistics.median(ours),
        baseline,
        statistics.median(theirs),
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
