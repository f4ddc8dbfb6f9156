"""`kvstore bench transfer` as a user runs it, with small records; two machines are two processes on loopback."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest

from kvstore.bench.cases import sized_case, spec_case
from kvstore.bench.hands import LocalHands
from kvstore.bench.load import Load
from kvstore.bench.rounds import Pair
from kvstore.bench.sides.iperf3 import Iperf3
from kvstore.bench.sides.mooncake import Mooncake
from kvstore.bench.sides.network import near_congestion, system_congestion
from kvstore.bench.sides.nixl import Nixl
from kvstore.bench.sides.ours import OUR_VARIANTS
from kvstore.bench.sides.preload import prepare_shim, shim_environment, shim_missing
from kvstore.bench.sides.raw_native import RawNative
from kvstore.bench.sides.raw_python import RawPython
from kvstore.bench.transfer import Settings, TransferRun
from kvstore.spec import save_spec
from kvstore.testing import specs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.bench.sides.side import Side

ROOT = Path(__file__).parents[2]
WITHIN_S = 100.0
SMALL = ("--sizes", "3x8KiB", "--piece", "1KiB", "--rounds", "2")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "kvstore", "bench", "transfer", *map(str, arguments)]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=WITHIN_S, env={**ENVIRONMENT, **environment}
    )


def children_of(pid: int) -> set[int]:
    """Processes that a process has started, and theirs, that still run."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended meanwhile
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    found: set[int] = set()
    front = {pid}
    while front:
        front = {child for child, parent in parents.items() if parent in front} - found
        found |= front
    return found


def wait_until(condition: Any, what: str) -> None:
    until_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until_s, what
        time.sleep(0.02)


@contextmanager
def listening(*more: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A listening machine on loopback: its address, and its process."""
    listener = subprocess.Popen(
        command("--listen", "tcp://127.0.0.1:0", *more), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    lines: queue.Queue[str] = queue.Queue()
    assert listener.stdout is not None
    stream = listener.stdout

    def read() -> None:
        for line in stream:
            lines.put(line)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield lines.get(timeout=30).rpartition(" ")[2].strip(), listener
    finally:
        listener.kill()
        listener.wait(30)
        reader.join(30)
        stream.close()


def test_a_run_prints_a_table_and_writes_json_and_a_picture(tmp_path: Path) -> None:
    output, plot = tmp_path / "figures" / "run.json", tmp_path / "run.svg"
    done = run(*SMALL, "--against", "raw-python,mooncake", "--output", output, "--plot", plot, MC_LOG_LEVEL="FATAL")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "there is no progress bar where there is no terminal"
    lines = [line.split() for line in done.stdout.splitlines()]
    table = {line[0]: line for line in lines if line}
    assert table["kvstore"][-3:] == ["2", near_congestion() or system_congestion(), "checked"]
    assert "3 x 8 KiB: 0.0 MB in 3 records" in done.stdout
    for heading in ("GB/s", "p50", "p99", "CPU s/GB send", "ours/it", "rounds", "cc"):
        assert heading in done.stdout
    document = json.loads(output.read_text())
    assert {"machine", "commit", "rows", "sides", "notes", "seed"} == set(document)
    rows = [row for row in document["rows"] if "case" in row]
    assert rows
    for row in rows:
        assert set(row) == {
            "case", "unit", "ours", "baseline_name", "baseline", "ratio_median", "ratio_min", "rounds"
        }  # fmt: skip
        assert row["rounds"] == 2
        assert row["ratio_min"] <= row["ratio_median"]
    units = {(row["baseline_name"], row["unit"]) for row in rows}
    assert {(f"raw sockets x {count} (Python)", unit) for count in (1, 2, 4) for unit in ("GB/s", "us")} <= units
    absent = {row["baseline_name"]: row["reason"] for row in document["rows"] if "reason" in row}
    measured = {name for name, _ in units}
    assert "Mooncake TE" in measured or "pip install" in absent["Mooncake TE"]
    assert all(side["is_verified"] for side in document["sides"])
    # The same for all, also for those that cannot be told.
    if not shim_missing():
        assert {side["congestion"] for side in document["sides"]} == {near_congestion() or system_congestion()}
    assert "kvstore" in "".join(ElementTree.parse(plot).getroot().itertext())


def test_sockets_of_a_program_that_knows_nothing_of_it_get_an_algorithm(tmp_path: Path) -> None:
    """`reno` is always there, and everyone may have it."""
    if reason := shim_missing():
        pytest.skip(reason)
    tools = prepare_shim(tmp_path)
    assert prepare_shim(tmp_path) == tools
    script = (
        "import socket\n"
        "with socket.create_server(('127.0.0.1', 0)) as server, socket.socket() as client:\n"
        "    client.connect(server.getsockname())\n"
        "    for each in (client, server.accept()[0]):\n"
        "        print(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b'\\0').decode())\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()\n"
    )

    def of_sockets(congestion: str) -> list[str]:
        environment = {**os.environ, **shim_environment(tools, congestion)}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.split()

    assert of_sockets("reno") == ["reno", "reno"]
    assert of_sockets("") == of_sockets("nonsense") == [system_congestion()] * 2


@pytest.mark.parametrize("side", [Mooncake(1), Nixl()], ids=lambda side: side.name)
def test_a_side_that_cannot_be_told_uses_what_the_others_use(side: Side) -> None:
    if reason := side.missing() or shim_missing():
        pytest.skip(reason)
    load = replace(Load.of(sized_case(1, 1 << 20)), batches=1, baseline_congestion="reno")
    with LocalHands() as hands:
        pair = Pair.open(side, hands, hands, load, load)
        assert pair.check() is True
        assert pair.congestion == "reno"


def test_without_a_compiler_a_note_says_what_such_sides_got(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert prepare_shim(tmp_path) == {}
    assert shim_environment({}, "cubic") == {}
    monkeypatch.setattr(Mooncake, "missing", lambda side: None)
    settings = Settings((sized_case(1, 1 << 20),), against=("mooncake",))
    with TransferRun(settings) as run:
        (note,) = run.notes
    assert "there is no C compiler (cc, gcc, clang) in PATH" in note
    assert note.startswith("Mooncake TE, Mooncake TE, 2 threads cannot be told")


def test_a_missing_program_is_a_row_that_says_how_to_get_it(tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    done = run(*SMALL, "--against", "iperf3", "--output", output, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "iperf3 x 1: iperf3 is not in PATH; install it" in done.stdout
    document = json.loads(output.read_text())
    assert {row["baseline_name"] for row in document["rows"] if "reason" in row} == {"iperf3 x 1", "iperf3 x 2"}


def test_what_cannot_be_had_is_said(tmp_path: Path) -> None:
    """A file that cannot be written before anything is measured; an algorithm that is not there by every side."""
    for option in ("--output", "--plot"):
        done = run(*SMALL, "--against", "none", option, tmp_path)
        assert done.returncode == 1
        assert f"{tmp_path} cannot be written: Is a directory" in done.stderr
        assert done.stdout == ""
    if RawNative(1).missing() is None:
        done = run(*SMALL, "--against", "raw", "--congestion", "nonsense")
        assert done.returncode == 1
        words = " ".join(done.stdout.split())
        assert "kvstore: 3 x 8 KiB, nonsense: the kernel has no congestion control 'nonsense'" in words
        assert "raw_sockets ended with status 1: " in words


def test_two_machines(tmp_path: Path) -> None:
    spec = tmp_path / "hybrid.json"
    save_spec(specs.hybrid(), spec)
    conditions = ("--busy", "1", "--connections", "1", "--congestion", "cubic", "--pacing", "1GB")
    with listening() as (address, listener):
        for more in (("--against", "raw-python", *conditions), ("--against", "none")):
            done = run(
                address, "--spec", spec, "--prompt-tokens", "64", "--rounds", "2", *more,
                "--output", tmp_path / f"{len(more)}.json",
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            wait_until(lambda: not children_of(listener.pid), "the listening machine has processes left")
    first, second = (json.loads((tmp_path / f"{count}.json").read_text())["sides"] for count in (10, 2))
    assert {side["name"] for side in first} == {"kvstore", *(f"raw sockets x {count} (Python)" for count in (1, 2, 4))}
    for side in first:
        assert side["case"] == "hybrid, 64 tokens, 1 connection, cubic, paced at 953.67 MiB/s, 1 busy"
        assert side["bytes"] == sum(specs.hybrid().bytes_by_group(64).values())
        assert side["is_verified"]
    assert [(side["case"], side["is_verified"]) for side in second] == [("hybrid, 64 tokens", True)]


def test_a_listener_ends_when_nobody_comes() -> None:
    done = run("--listen", "tcp://127.0.0.1:0", "--idle", "0.2")
    assert done.returncode == 0
    assert "nobody came for 0.2 s" in done.stdout
    assert run("--listen", "nowhere").returncode == 1


@pytest.mark.parametrize("name", ["raw compiled", "raw Python", "nixl", "kvstore"])
def test_each_side_moves_every_byte_of_records_of_several_sizes(name: str, tmp_path: Path) -> None:
    sides: dict[str, Side] = {
        "raw compiled": RawNative(2), "raw Python": RawPython(4), "nixl": Nixl(), "kvstore": OUR_VARIANTS[0]
    }  # fmt: skip
    side = sides[name]
    if reason := side.missing():
        pytest.skip(reason)
    file = tmp_path / "hybrid.json"
    save_spec(specs.hybrid(), file)
    load = Load.of(spec_case(str(file), 64))
    assert len(set(load.record_bytes)) > 1
    with LocalHands() as hands:
        pair = Pair.open(side, hands, hands, load, load)
        assert pair.check() is True
        for _ in range(2):
            seconds, sender_cpu_s, receiver_cpu_s = pair.round()
            assert len(seconds) == load.batches
            assert min(seconds) > 0
            assert sender_cpu_s > 0
            assert receiver_cpu_s > 0


def test_iperf3_streams_between_memories_of_its_own() -> None:
    side = Iperf3(1)
    if reason := side.missing():
        pytest.skip(reason)
    load = replace(Load.of(sized_case(1, 16 << 20)), batches=1)
    assert side.declines(load) is None
    assert side.declines(Load.of(sized_case(1, 1 << 20))) is not None
    with LocalHands() as hands:
        pair = Pair.open(side, hands, hands, load, load)
        assert pair.check() is None, "there are no contents to compare"
        seconds, sender_cpu_s, receiver_cpu_s = pair.round()
        assert len(seconds) == 1
        assert min(seconds[0], sender_cpu_s, receiver_cpu_s) > 0


def test_a_side_whose_process_dies_is_a_failure_with_a_reason() -> None:
    load = Load.of(spec_case("kimi-linear-48b-a3b", 64))
    with LocalHands() as hands:
        pair = Pair.open(RawPython(1), hands, hands, load, load)
        pair.check()
        receiver = hands._handles[0]._process._child
        os.kill(receiver.pid, signal.SIGKILL)
        with pytest.raises(Exception, match=r"ended while it did|receiver of raw sockets|reset|Broken pipe"):
            pair.round()


def test_nothing_is_left_when_whoever_runs_it_is_killed() -> None:
    """Workers end with their socket; one that is paused at that moment, by the system."""
    script = (
        "import sys, time\n"
        "from kvstore.bench.processes import BusyProcesses, WorkerProcess\n"
        "workers = [WorkerProcess(), WorkerProcess()]\n"
        "busy = BusyProcesses(1)\n"
        "workers[0].pause()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert parent.stdout is not None
    try:
        assert parent.stdout.readline().strip() == "ready"
        children = children_of(parent.pid)
        assert len(children) == 3
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdout.close()

    def are_gone() -> bool:
        return not any(_is_running(child) for child in children)

    wait_until(are_gone, f"some of {children} still run")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_ends_every_process() -> None:
    child = subprocess.Popen(
        command(*SMALL[:4], "--rounds", "5000", "--against", "none", "--busy", "1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        wait_until(lambda: len(children_of(child.pid)) == 3, "its processes did not start")
        children = children_of(child.pid)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
        wait_until(lambda: not any(_is_running(each) for each in children), "some processes are left")
    finally:
        child.kill()
        child.communicate()
