"""The transfer benchmark: its cases, its arguments, its figures, and what it says when something is missing."""

from __future__ import annotations

import json
import socket
import threading
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import kvstore
from kvstore.bench.cases import (
    CASES_DEFAULT,
    Case,
    parse_sized,
    record_sizes_bytes,
    sized_case,
    spec_case,
)
from kvstore.bench.channel import Channel
from kvstore.bench.hands import Facts, LocalHands
from kvstore.bench.load import Load
from kvstore.bench.plot import write_plot
from kvstore.bench.processes import BusyProcesses
from kvstore.bench.remote import RemoteHands, Session, is_loopback, parse_address
from kvstore.bench.result import CaseResult, percentile
from kvstore.bench.rounds import Measured, run_rounds
from kvstore.bench.rows import Absent
from kvstore.bench.shapes import SHAPES, shape
from kvstore.bench.sides.choice import BASELINES, baselines
from kvstore.bench.sides.ours import OUR_VARIANTS
from kvstore.bench.sides.raw_python import RawPython, shares
from kvstore.bench.sides.side import ReceivingHalf, SendingHalf, Side
from kvstore.bench.transfer import Settings, TransferRun
from kvstore.bench.worker import Worker
from kvstore.cli.main import app
from kvstore.clock import Deadline
from kvstore.errors import AddressError, BenchmarkError, DeadlineError, PeerGoneError, SpecError
from kvstore.limits import CONNECTIONS_PER_TRANSFER_MAX, KIB, MIB
from kvstore.record import record_layout
from kvstore.spec import ReuseRule, save_spec
from kvstore.testing import specs

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["bench", "transfer", *map(str, arguments)], env={"COLUMNS": "200"})


# Cases


def test_the_default_cases() -> None:
    cases = parse_sized(list(CASES_DEFAULT), [1])
    assert [(len(case.record_bytes), set(case.record_bytes)) for case in cases] == [
        (1, {64 * KIB}), (1, {MIB}), (1, {16 * MIB}), (256, {MIB}), (4096, {64 * KIB}),
    ]  # fmt: skip
    assert [case.name for case in cases] == ["64 KiB", "1 MiB", "16 MiB", "256 x 1 MiB", "4096 x 64 KiB"]
    assert [case.batches for case in cases] == [64, 64, 4, 1, 1], "small ones are repeated within a round"


def test_counts_apply_to_sizes_without_one() -> None:
    cases = parse_sized(["64KiB", "3x128KiB"], [1, 7])
    assert [case.record_bytes for case in cases] == [(64 * KIB,), 7 * (64 * KIB,), 3 * (128 * KIB,)]


@pytest.mark.parametrize(
    ("notation", "reason"),
    [
        ("many", "neither a size nor a count"),
        ("4xx1MiB", "neither a size nor a count"),
        ("1.2.3MiB", "neither a size nor a count"),
        ("0x1MiB", "0 records"),
        ("65MiB", "above the limit"),
        ("100000B", "does not divide"),
        ("1B", "does not divide"),
        ("999999999x64KiB", "records are not from 1"),
    ],
)
def test_a_size_that_cannot_be_measured_is_refused(notation: str, reason: str) -> None:
    with pytest.raises(BenchmarkError, match=reason):
        parse_sized([notation], [1])


def test_pieces_have_the_size_that_was_asked_for() -> None:
    for piece_bytes in (4 * KIB, 256 * KIB):
        spec = sized_case(1, MIB, piece_bytes).spec
        layout = record_layout(spec, 0, 0, spec.groups[0].all_units)
        assert {piece.size_bytes for piece in layout.pieces} == {piece_bytes}
    with pytest.raises(BenchmarkError, match="larger --piece"):
        sized_case(1, 64 * MIB, 64)


@pytest.mark.parametrize("name", SHAPES)
def test_a_named_model_has_the_records_of_its_spec(name: str) -> None:
    case = spec_case(name, 4096)
    assert case.total_bytes == sum(case.spec.bytes_by_group(4096).values())
    blocks = 4096 // case.spec.block_tokens
    expected = sum(
        len(spans) * (blocks if group.rule is ReuseRule.ATTENTION else 1)
        for group, spans in zip(case.spec.groups, case.spec.spans, strict=True)
    )
    assert len(case.record_bytes) == expected
    assert case.name == f"{name}, 4096 tokens"


def test_named_models_are_of_both_kinds() -> None:
    kinds = {tuple(group.rule for group in shape(name).groups) for name in SHAPES}
    assert {(ReuseRule.ATTENTION,), (ReuseRule.ATTENTION, ReuseRule.STATE)} <= kinds


def test_a_spec_from_a_file(tmp_path: Path) -> None:
    spec = specs.hybrid()
    file = tmp_path / "mine.json"
    save_spec(spec, file)
    case = spec_case(str(file), 64)
    assert case.spec == spec
    assert case.name == "mine, 64 tokens"
    assert case.total_bytes == sum(spec.bytes_by_group(64).values())


@pytest.mark.parametrize(
    ("source", "tokens", "reason"),
    [
        ("no-such-model", 64, "known are llama"),
        ("llama-3.1-8b", 65, "whole blocks of 64"),
        ("llama-3.1-8b", 0, "whole blocks of 64"),
        ("llama-3.1-8b", 1 << 24, "fewer than"),
    ],
)
def test_a_spec_that_cannot_be_measured_is_refused(source: str, tokens: int, reason: str) -> None:
    with pytest.raises(BenchmarkError, match=reason):
        spec_case(source, tokens)


def test_a_file_that_is_no_spec_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"{}")
    with pytest.raises(SpecError, match=r"config\.json"):
        spec_case(str(file), 64)


def test_a_window_has_its_full_record_from_the_first_token_on() -> None:
    spec = specs.hybrid()
    window = next(group for group in spec.groups if group.window_tokens)
    sizes = record_sizes_bytes(spec, 16)
    assert window.layer_bytes(16) * len(window.layers) in sizes


# What is told to another process


def test_a_load_survives_its_message() -> None:
    load = Load.of(sized_case(3, 64 * KIB), connections=2, pacing_bytes_per_s=1e6)
    assert Load.from_message(json.loads(json.dumps(load.to_message()))) == load
    assert load.record_bytes == 3 * (64 * KIB,)
    assert load.buffer_bytes == load.batches * 3 * (64 * KIB + 4 * KIB)


def test_a_load_of_another_spec_is_refused() -> None:
    message = Load.of(sized_case(1, 64 * KIB)).to_message()
    other = sized_case(2, 64 * KIB, 8 * KIB).spec
    with pytest.raises(BenchmarkError, match=r"fingerprint .* here and .* at the other end"):
        Load.from_message({**message, "spec_json": other.to_json()})
    for damaged in (
        {},
        {**message, "spec_json": "{"},
        {**message, "batches": 0},
        {**message, "batches": 1 << 40},
        None,
    ):
        with pytest.raises(BenchmarkError):
            Load.from_message(damaged)


def test_what_a_worker_does_not_know_is_an_error() -> None:
    worker = Worker()
    for message in ({}, {"do": "send"}, {"do": "open", "side": "nobody", "tools": {}}):
        with pytest.raises(BenchmarkError):
            worker.do(message)


def test_a_channel_refuses_what_is_no_message() -> None:
    for sent in (b"no json\n", b"[1]\n"):
        here, there = socket.socketpair()
        with here, there:
            there.sendall(sent)
            with pytest.raises(BenchmarkError, match="no benchmark's peer"):
                Channel(here).receive(Deadline.after(10))


def test_a_channel_waits_no_longer_than_it_may() -> None:
    here, there = socket.socketpair()
    with here, there:
        channel = Channel(here)
        with pytest.raises(DeadlineError):
            channel.receive(Deadline.after(0.01))
        there.close()
        with pytest.raises(PeerGoneError):
            channel.receive(Deadline.after(10))
        with pytest.raises(PeerGoneError):
            channel.send({}, Deadline.after(10))


# Figures


def measured(name: str, *rounds: float, cpu_s: float = 1.0, failure: str | None = None) -> Measured:
    seconds = [[value, value, 10 * value] for value in rounds]
    return Measured(name, seconds, [cpu_s] * len(rounds), [cpu_s] * len(rounds), True, failure)


def result_of(*sides: Measured, case: Case | None = None) -> CaseResult:
    return CaseResult("case", case or sized_case(1, 64 * KIB), sides[0].name, sides, ())


def test_rows_pair_the_rounds() -> None:
    result = result_of(measured("ours", 1.0, 2.0, 4.0, cpu_s=2.0), measured("theirs", 2.0, 2.0, 2.0, cpu_s=1.0))
    rate, latency, cpu = result.rows()
    assert (rate.unit, rate.ratio_median, rate.ratio_min, rate.rounds) == ("GB/s", 1.0, 0.5, 3)
    assert rate.ours == pytest.approx(result.case.gigabytes / 2.0)
    assert (latency.unit, latency.ours, latency.baseline) == ("us", 2e6, 2e6)
    assert (cpu.unit, cpu.ratio_median) == ("CPU s/GB", 0.5), "a ratio above 1 is better for us in every unit"
    assert cpu.ours == pytest.approx(4.0 / (result.case.gigabytes * result.case.batches))


def test_percentiles_are_of_single_batches() -> None:
    assert [percentile([1.0, 2.0, 3.0, 4.0], share) for share in (1, 50, 51, 99, 100)] == [1.0, 2.0, 3.0, 4.0, 4.0]
    figures = result_of(measured("ours", 1.0, 2.0)).figures()[0]
    assert figures.latency_us == {50: 2e6, 90: 2e7, 99: 2e7}
    assert figures.gigabytes_per_s_min < figures.gigabytes_per_s < figures.gigabytes_per_s_max


def test_large_cases_have_no_latencies() -> None:
    result = result_of(measured("ours", 1.0), measured("theirs", 1.0), case=sized_case(1, 16 * MIB))
    assert [row.unit for row in result.rows()] == ["GB/s", "CPU s/GB"]


def test_a_side_that_fails_on_its_way_keeps_its_pairs() -> None:
    result = result_of(measured("ours", 1.0, 1.0, 1.0), measured("theirs", 2.0, failure="round 2: gone"))
    assert {row.rounds for row in result.rows()} == {1}
    assert result.failures() == [Absent("theirs", "case: round 2: gone")]
    assert result.failure is None


def test_without_ours_there_are_no_rows() -> None:
    result = result_of(Measured("ours", failure="no"), measured("theirs", 1.0))
    assert result.rows() == []
    assert result.failure == "no"
    assert [figures.name for figures in result.figures()] == ["theirs"]


def test_a_plot_is_well_formed_and_names_every_side(tmp_path: Path) -> None:
    result = result_of(measured("ours", 1.0), measured("<theirs> & others", 1.0), Measured("none", failure="no"))
    path = tmp_path / "deep" / "plot.svg"
    write_plot(path, [result], "this & that")
    text = "".join(ElementTree.parse(path).getroot().itertext())
    for expected in ("ours", "<theirs> & others", "none: no result", "this & that"):
        assert expected in text


# Sides


def test_shares_cover_every_byte_once() -> None:
    for records in ([(0, 10)], [(0, 7), (100, 3)], [(number * 10, 9) for number in range(11)]):
        for connections in (1, 2, 4):
            dealt = shares(records, connections)
            assert len(dealt) == connections
            covered = [byte for share in dealt for offset, size in share for byte in range(offset, offset + size)]
            assert sorted(covered) == [byte for offset, size in records for byte in range(offset, offset + size)]


def test_baselines_have_names_of_their_own() -> None:
    sides = baselines(BASELINES)
    assert len({side.name for side in sides}) == len(sides)
    with pytest.raises(BenchmarkError, match="no baseline 'rawe'"):
        baselines(["rawe"])


class Wrong(Side):
    """A side that raises, or claims to have moved what it did not."""

    def __init__(self, name: str, digest: str, failure: str = "") -> None:
        self._name, self._digest, self._failure = name, digest, failure

    @property
    def name(self) -> str:
        return self._name

    def missing(self) -> str | None:
        return None

    def receiving(self, load: Load, tools: Mapping[str, str]) -> WrongReceiver:
        return WrongReceiver(self._digest)

    def sending(self, load: Load, tools: Mapping[str, str]) -> WrongSender:
        return WrongSender(self._failure)


class WrongReceiver(ReceivingHalf):
    def __init__(self, digest: str) -> None:
        self._digest = digest

    def digest(self) -> str:
        return self._digest

    def clear(self) -> None:
        pass

    def close(self) -> None:
        pass


class WrongSender(SendingHalf):
    def __init__(self, failure: str) -> None:
        self._failure, self._sent = failure, 0

    def send(self, batch: int) -> float:
        self._sent += 1
        if self._failure and self._sent > 2:
            raise OSError(self._failure)
        return 0.001

    def digest(self) -> str:
        return "right"

    def close(self) -> None:
        pass


class HandsInThreads(LocalHands):
    """Halves in this process: for sides that only this test knows."""

    def __init__(self, sides: dict[str, Side]) -> None:
        super().__init__()
        self._sides = sides
        self.workers: list[Worker] = []

    def open(self, side: str, half: str, load: Load) -> Any:
        worker = Worker()
        chosen = self._sides[side]
        worker.half = chosen.receiving(load, {}) if half == "receive" else chosen.sending(load, {})
        self.workers.append(worker)
        return InThread(worker)


class InThread:
    told: Mapping[str, Any] = {}

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def ask(self, what: str, deadline_s: float, **more: Any) -> dict[str, Any]:
        try:
            return self._worker.do({"do": what, **more})
        except OSError as error:
            raise BenchmarkError(str(error)) from error

    def close(self) -> None:
        pass


def test_wrong_bytes_and_failures_are_results_and_no_crash() -> None:
    sides: dict[str, Side] = {
        side.name: side
        for side in (Wrong("right", "right"), Wrong("wrong", "left"), Wrong("failing", "right", "cable cut"))
    }
    load = Load.of(sized_case(1, 16 * MIB))
    with HandsInThreads(sides) as hands:
        found = run_rounds(list(sides.values()), hands, hands, load, load, 4)
    assert found["right"].failure is None
    assert found["right"].is_verified
    assert len(found["right"].seconds) == 4
    assert "the bytes that arrived are not those that were sent" in str(found["wrong"].failure)
    assert found["wrong"].seconds == []
    assert found["failing"].failure == "round 2: cable cut"
    assert len(found["failing"].seconds) == 1


# Conditions


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--sizes", "many"), "neither a size"),
        (("--sizes", "64KiB", "--spec", "llama-3.1-8b"), "two ways"),
        (("--spec", "nobody"), "no model shape"),
        (("--count", "some"), "no list of whole numbers"),
        (("--piece", "thin"), "is not a size"),
        (("--against", "everything"), "there is no baseline"),
        (("--connections", "9999"), f"1 to {CONNECTIONS_PER_TRANSFER_MAX} connections"),
        (("--rounds", "0"), "0 rounds"),
        (("--busy", "-1"), "not negative"),
        (("--deadline", "0"), "not 0"),
        (("--pacing", "0"), "must be positive"),
        (("--sizes", ","), "at least one case"),
        (("tcp://127.0.0.1:1", "--listen", "tcp://127.0.0.1:0"), "no target"),
    ],
)
def test_arguments_that_make_no_sense_end_with_status_2(arguments: tuple[str, ...], reason: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert reason in " ".join(done.output.replace("│", " ").split())


def test_every_condition_is_measured() -> None:
    cases = tuple(parse_sized(["64KiB", "1MiB"], [1]))
    settings = Settings(cases, connections=(1, 4), congestion=("cubic", "bbr"), busy=(0, 2))
    conditions = settings.conditions()
    assert len(conditions) == len(set(conditions)) == 16
    assert conditions[0] == (cases[0], 1, "cubic", 0)


def test_too_little_memory_is_known_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Facts("machine", "commit", "version", "boot", 1 << 30, "cubic", {})
    monkeypatch.setattr(LocalHands, "facts", lambda _: facts)
    monkeypatch.setattr(LocalHands, "open", lambda *_: pytest.fail("something was started"))
    settings = Settings(tuple(parse_sized(["256x1MiB"], [1])), against=("raw",))
    with pytest.raises(BenchmarkError, match=r"takes .* GiB of memory .* 1.00 GiB are available; measure less"):
        TransferRun(settings)


def test_a_baseline_that_is_missing_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"Mooncake TE": "it is not installed", "raw sockets x 2 (compiled)": "no compiler"}
    facts = Facts("machine", "commit", "version", "boot", 1 << 40, "cubic", missing)
    monkeypatch.setattr(LocalHands, "facts", lambda _: facts)
    cases = tuple(parse_sized(["64KiB"], [1]))
    with TransferRun(Settings(cases, against=("raw", "mooncake"))) as run:
        names = [side.name for side in run._sides]
        assert run._absent == [Absent("Mooncake TE", "it is not installed")]
    assert RawPython(2).name in names
    assert "raw sockets x 1 (compiled)" in names
    assert names[0] == OUR_VARIANTS[0].name


# Two machines


def test_addresses() -> None:
    assert parse_address("tcp://10.0.0.1:7400") == ("10.0.0.1", 7400)
    assert parse_address("tcp://[::1]:7400") == ("::1", 7400)
    for address in ("10.0.0.1:7400", "tcp://10.0.0.1", "udp://10.0.0.1:1", "tcp://:1", "tcp://a:b", "tcp://a:1/x"):
        with pytest.raises(AddressError):
            parse_address(address)
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "host")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_a_machine_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    done = invoke(address, "--sizes", "64KiB", "--against", "none")
    assert isinstance(done.exception, BenchmarkError)
    assert "start `kvstore bench transfer --listen" in str(done.exception)
    assert address in str(done.exception)


def test_a_listener_answers_nonsense_with_an_error() -> None:
    here, there = socket.socketpair()
    with here, there, LocalHands() as hands:
        thread = threading.Thread(target=Session(Channel(there), hands, own_host="127.0.0.1").run, args=(10.0,))
        thread.start()
        channel = Channel(here)
        load = Load.of(sized_case(1, 64 * KIB)).to_message()
        try:
            for message in (
                {},
                {"do": "format the disk"},
                {"do": "open"},
                {"do": "open", "side": "nobody", "half": "receive", "load": load},
                {"do": "open", "side": "kvstore", "half": "receive", "load": {**load, "tokens": 1 << 50}},
                {"do": "ask", "worker": 7, "what": "send", "more": {}, "deadline_s": 1},
                {"do": "ask", "worker": "x", "what": "send", "more": {}, "deadline_s": 1},
                {"do": "busy", "count": 1 << 30},
            ):
                channel.send(message, Deadline.after(10))
                assert "error" in channel.receive(Deadline.after(30)), message
            channel.send({"do": "ping"}, Deadline.after(10))
            assert channel.receive(Deadline.after(10)) == {}
        finally:
            here.shutdown(socket.SHUT_RDWR)
            thread.join(30)
        assert not thread.is_alive()


def test_another_version_of_the_protocol_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                channel = Channel(sock)
                channel.receive(Deadline.after(10))
                channel.send({"protocol": 99}, Deadline.after(10))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BenchmarkError, match="speaks version 99"):
            RemoteHands(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(10)


def test_busy_processes_end() -> None:
    with BusyProcesses(2) as busy:
        children = list(busy._children)
        assert all(child.poll() is None for child in children)
    assert all(child.poll() is not None for child in children)


def test_the_library_does_not_load_the_benchmark() -> None:
    assert kvstore.open is not None
    assert "kvstore.bench" not in vars(kvstore)
