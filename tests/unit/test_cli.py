"""The command line: what it prints, and with which status it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore._version import __version__
from kvstore.cli import doctor, machine, parts
from kvstore.cli.finding import Finding
from kvstore.cli.inspect import printable
from kvstore.cli.main import app
from kvstore.errors import UnavailableError
from kvstore.record import write_record_stream
from kvstore.testing.lagging_device import LaggingDevice
from tests.format.records import attention_record, state_record
from transports.tcp.socket_options import choosable_congestion_controls

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/format/vectors/gated_delta.arrow"


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvstore", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
    )


# The command itself


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"kvstore {__version__} (record format 1)\n"
    assert run_process("--version").stdout == result.stdout


def test_without_a_command_it_helps() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "doctor" in result.output
    assert "inspect" in result.output


@pytest.mark.parametrize("arguments", [("nonsense",), ("inspect",), ("doctor", "--require"), ("--no-such-option",)])
def test_misuse_ends_with_status_2(arguments: tuple[str, ...]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_starting_loads_no_framework() -> None:
    script = "import sys, kvstore.cli.main; print(sorted({'torch', 'transformers', 'rich.table'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


# doctor


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Replaces what the machine has, so that the outcome is known."""
    findings = [
        Finding("memory", True, "1 GiB"),
        Finding("transport.tcp", True, "IPv4", in_use="for tcp:// addresses"),
        Finding("transport.ucx", False, "nothing", why_not_better="this version has none; use tcp://"),
        Finding("one.same", True, "a"),
        Finding("other.same", False, "b"),
    ]
    monkeypatch.setattr(doctor, "machine_findings", lambda: findings)
    monkeypatch.setattr(doctor, "part_findings", list)
    return findings


def test_doctor_shows_every_finding() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["version"] == __version__
    assert document["missing"] == []
    findings = {finding["name"]: finding for finding in document["findings"]}
    assert len(findings) == len(document["findings"])
    for name in (
        "python", "cpu", "memory", "shm", "arena", "hugepages", "limit.memlock", "limit.nofile", "native",
        "crc32c.avx512", "crc32c.sse42", "crc32c.portable", "copy.avx512", "copy.avx2", "copy.portable",
        "copy.checksum", "copy.streaming", "copy.threads", "io.io_uring", "io.threads",
        "transport.memory", "transport.tcp", "transport.ucx",
        "congestion.cubic", "congestion.bbr", "pacing", "codec.raw", "package.torch", "package.transformers",
        "cuda", "gpu", "gpu.pinned", "gather.triton", "gather.native", "gather.index",
    ):  # fmt: skip
        assert name in findings
    used = [name for name in findings if name.startswith("crc32c.") and findings[name]["in_use"]]
    from kvstore._native import cpu_features

    assert used == [f"crc32c.{cpu_features()['crc32c']}"]
    assert findings[f"copy.{cpu_features()['copy']}"]["in_use"] == "yes"
    assert findings["io.threads"]["is_available"]
    assert sum(bool(findings[name]["in_use"]) for name in ("io.io_uring", "io.threads")) == 1
    assert not findings["transport.ucx"]["is_available"]
    assert "no UCX transport" in findings["transport.ucx"]["why_not_better"]
    assert findings["transport.tcp"]["is_available"]
    uses = {name: finding["in_use"] for name, finding in findings.items() if name.startswith("congestion.")}
    for name, use in (("cubic", "below 1 ms"), ("bbr", "of 1 ms and more")):
        if name in choosable_congestion_controls():
            assert use in uses[f"congestion.{name}"]
    for use in ("below 1 ms", "of 1 ms and more", "paced connections"):
        assert sum(use in uses[name] for name in uses) == 1
    assert {"tcp.tcp_rmem", "tcp.tcp_wmem", "tcp.zerocopy"} <= set(findings)
    for finding in findings.values():
        assert finding["is_available"] or finding["why_not_better"] or finding["offered"]
        if not finding["is_available"]:
            assert not finding["in_use"]


def test_doctor_as_text_names_the_same_things() -> None:
    names = [finding["name"] for finding in json.loads(invoke("doctor", "--json").stdout)["findings"]]
    text = invoke("doctor").stdout
    for name in names:
        assert name in text


def test_what_is_required_and_there_is_fine(found: list[Finding]) -> None:
    for name in ("memory", "tcp", "transport.tcp"):
        assert invoke("doctor", "--require", name).exit_code == 0


def test_what_is_required_and_missing_fails(found: list[Finding]) -> None:
    result = invoke("doctor", "--require", "tcp", "--require", "ucx", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["missing"] == ["transport.ucx"]
    assert "transport.ucx is asked for and unavailable: this version has none; use tcp://" in result.stderr
    assert invoke("doctor", "--require", "same").exit_code == 1, "every finding of that name has to be there"
    assert invoke("doctor", "--require", "one.same").exit_code == 0


def test_an_unknown_requirement_is_misuse(found: list[Finding]) -> None:
    result = invoke("doctor", "--require", "quantum")
    assert result.exit_code == 2
    assert "transport.tcp" in result.stderr


def test_what_the_environment_demands_and_is_missing_fails(
    monkeypatch: pytest.MonkeyPatch, found: list[Finding]
) -> None:
    found.append(Finding("crc32c.sse42", False, "", why_not_better="no SSE4.2", is_demanded=True))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "crc32c.sse42 is asked for and unavailable: no SSE4.2" in result.stderr


def test_a_forced_checksum_path_is_shown() -> None:
    done = run_process("doctor", "--json", KVSTORE_CRC32C="portable")
    assert done.returncode == 0, done.stderr
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["crc32c.portable"]["in_use"]
    assert findings["crc32c.portable"]["is_demanded"]
    assert (
        "KVSTORE_CRC32C" in findings["crc32c.sse42"]["why_not_better"] or not findings["crc32c.sse42"]["is_available"]
    )


def test_a_forced_checksum_path_that_cannot_be_had_fails() -> None:
    done = run_process("doctor", KVSTORE_CRC32C="abacus")
    assert done.returncode == 1
    assert "KVSTORE_CRC32C=abacus names no checksum path" in done.stderr + done.stdout


def test_a_machine_without_anything_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that hides /proc and /sys."""
    monkeypatch.setattr(machine, "read_text", lambda path: "")
    monkeypatch.setattr("shutil.disk_usage", lambda path: (_ for _ in ()).throw(FileNotFoundError(2, "gone")))
    findings = {finding.name: finding for finding in machine.machine_findings()}
    assert not findings["shm"].is_available
    assert "gone" in findings["shm"].offered
    assert "unknown" in findings["memory"].offered


def test_memory_limits_of_control_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\nHugePages_Total: 4\nHugePages_Free: 3\n",
    }
    monkeypatch.setattr(machine, "read_text", lambda path: files.get(path, ""))
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 256 << 20)
    findings = {finding.name: finding for finding in machine.machine_findings()}
    assert findings["memory"].offered == "1.00 GiB, of which 512.00 MiB are available"
    assert findings["memory"].in_use == "at most 256.00 MiB"
    assert findings["hugepages"].is_available
    assert findings["hugepages"].offered.startswith("3 of 4")


def test_the_arena_says_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.name: finding for finding in machine.machine_findings()}["arena"]
    assert found.is_available
    assert found.offered in ("memfd, huge pages", "memfd, small pages")
    assert ("small" in found.offered) == bool(found.why_not_better)
    monkeypatch.setattr(machine, "ARENA_PROBE_BYTES", 1 << 60)
    found = {finding.name: finding for finding in machine.machine_findings()}["arena"]
    assert not found.is_available
    assert "less memory" in found.why_not_better


def test_a_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    cuda = next(finding for finding in parts.part_findings() if finding.name == "cuda")
    assert not cuda.is_available
    assert "torch is not installed" in cuda.offered


def test_what_a_gpu_tier_would_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without a GPU too: what is found is what the machine's parts say."""
    monkeypatch.delenv("KVSTORE_PAGE_GATHER", raising=False)

    def found() -> dict[str, Finding]:
        return {finding.name: finding for finding in parts.part_findings()}

    monkeypatch.setattr(parts, "_cuda", lambda: Finding("cuda", False, "no device; torch is built without CUDA"))
    host = found()
    assert not host["gpu"].is_available
    assert "built without CUDA" in host["gpu"].why_not_better
    assert (host["gather.native"].in_use, host["gather.native"].why_not_better) == ("pages on cpu", "")
    assert "kernel is for cuda" in host["gather.triton"].why_not_better
    monkeypatch.setattr(parts, "_cuda", lambda: Finding("cuda", True, "CUDA 13: a device"))
    monkeypatch.setattr(parts, "_pinned", lambda: Finding("gpu.pinned", False, "", why_not_better="error 801"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    device = found()
    assert device["gpu"].is_available
    assert device["gather.index"].in_use == "pages on cuda"
    assert "triton is not installed" in device["gather.triton"].why_not_better
    monkeypatch.setenv("KVSTORE_PAGE_GATHER", "triton")
    assert device.keys() - found().keys() == {"gather.native", "gather.index"}
    assert found()["gather.triton"].is_demanded


def test_page_locking_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    device = LaggingDevice(may_pin=True)
    monkeypatch.setattr("kvstore.tiers.gpu.torch_device.open_device", lambda name: device)
    assert parts._pinned().in_use == "yes"
    assert device.pinned == []
    monkeypatch.setattr("kvstore.tiers.gpu.torch_device.open_device", lambda name: LaggingDevice(may_pin=False))
    assert "told to refuse; records go through staging" in parts._pinned().why_not_better
    monkeypatch.setattr("kvstore.tiers.gpu.torch_device.open_device", lambda name: 1 // 0)
    assert "ZeroDivisionError" in parts._pinned().why_not_better


# inspect


def test_inspect_describes_a_record_as_json() -> None:
    result = invoke("inspect", GOLDEN, "--json")
    assert result.exit_code == 0, result.output
    (document,) = json.loads(result.stdout)
    twin = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert document["fingerprint"] == twin["framing"]["schema_metadata"]["kvstore.fingerprint"]
    assert {name: document[name] for name in twin["header"]} == twin["header"]
    assert document["pieces"] == twin["framing"]["pieces"]
    assert [tensor["name"] for tensor in document["tensors"]] == ["conv", "recurrent"]
    assert document["tensors"][0]["segments"][2] == {"name": "value", "start": 0, "stop": 4, "units": 4, "unit_rows": 2}
    assert document["size_bytes"] == GOLDEN.stat().st_size


def test_inspect_describes_a_record_as_text() -> None:
    result = invoke("inspect", GOLDEN, GOLDEN.with_stem("attention_partial"))
    assert result.exit_code == 0, result.output
    for text in ("undamaged", "golden", "bfloat16", "the state after 8", "query 0 to 2 of 2", "41df91ac"):
        assert text in result.stdout
    assert "3 of room for 4, ending at 7" in result.stdout


def test_inspect_says_which_tokens_a_sparse_record_holds() -> None:
    golden = GOLDEN.with_stem("attention_sparse")
    (document,) = json.loads(invoke("inspect", golden, "--json").output)
    assert (document["coverage"], document["held_tokens"]) == ("tokens", [2, 1])
    assert "raw, tokens (by layer 2, 1 of 3)" in invoke("inspect", golden).output
    (whole,) = json.loads(invoke("inspect", GOLDEN, "--json").output)
    assert (whole["coverage"], whole["held_tokens"]) == ("all", None)


def test_inspect_shortens_long_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.cli.inspect.PIECES_SHOWN", 3)
    assert "21 more; --pieces shows all" in invoke("inspect", GOLDEN).stdout
    assert "more" not in invoke("inspect", "--pieces", GOLDEN).stdout


def test_bad_files_are_one_sentence_each(tmp_path: Path) -> None:
    stream = write_record_stream(attention_record())
    damaged = bytearray(stream)
    damaged[-100] ^= 1
    files = {
        "absent": None,
        "empty": b"",
        "foreign": b"ARROW1\0\0" * 100,
        "truncated": stream[:-1],
        "damaged": bytes(damaged),
        "continued": stream + stream,
        "directory": None,
    }
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, data in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    for name in (*files, "pipe"):
        result = invoke("inspect", tmp_path / name)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.startswith(f"kvstore inspect: {tmp_path / name}: ")
        assert result.stderr.count("\n") == 1
    done = run_process("inspect", str(tmp_path / "damaged"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert "damaged" in done.stderr


def test_a_huge_file_is_not_read_whole(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as opened:
        opened.truncate(1 << 40)
    result = invoke("inspect", huge)
    assert result.exit_code == 1
    assert "more than any record" in result.stderr


def test_good_files_are_shown_beside_bad_ones(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(write_record_stream(state_record()))
    result = invoke("inspect", tmp_path / "absent", good, "--json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert first["kind"] == "FileNotFoundError"
    assert second["group"] == "state"


def test_names_from_a_file_reach_no_terminal() -> None:
    assert printable("model \x1b[31m[red]\n") == "model \\x1b[31m[red]\\n"


def test_doctor_tries_what_attached_processes_need() -> None:
    result = invoke("doctor", "--json", "--require", "attach.pidfd", "--require", "attach.memory")
    assert result.exit_code == 0, result.output
    findings = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert "SCM_RIGHTS" in findings["attach.memory"]["offered"]
    assert findings["attach.pidfd"]["in_use"]


# spec


def test_spec_without_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnavailableError, match=r"pip install 'kvstore\[transformers\]'"):
        invoke("spec", tmp_path, "--weights", "x")
