"""`kvstore simulate` from a file to figures, tables and pages, with the real simulator."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as parquet
import pytest
from typer.testing import CliRunner

from kvstore.cli.collected import Collected
from kvstore.cli.main import app
from kvstore.errors import KVStoreError
from kvstore.simulate.workers import Ended

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
RATE = "workload.arrivals.rate_per_s"
SCENARIO = """
name = "small"
warmup_s = 20.0
duration_s = 120.0

[slo]
ttft_s = 15.0
tpot_s = 0.026

[policy]
name = "threshold"
settings = { threshold_tokens = 19400 }

[[clusters]]
name = "prfaas"
profile = "paper-1t-h200"
prefill_instances = 4
decode_instances = 0

[[clusters]]
name = "pd"
profile = "paper-1t-h20"
prefill_instances = 3
decode_instances = 5

[[links]]
source = "prfaas"
target = "pd"
bytes_per_s = 12.5e9
round_trip_s = 0.01

[workload]
kind = "lognormal"
requests_max = 5_000

[workload.settings]
mu = 9.9
sigma = 1.0
tokens_min = 128
tokens_max = 131072
output_tokens = 64

[workload.arrivals]
rate_per_s = 2.0
"""


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return str(path)


def invoke(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)], catch_exceptions=False)


def test_figures_on_the_terminal(scenario: str) -> None:
    done = invoke(scenario)
    assert done.exit_code == 0
    for phrase in ("small: threshold, seed 0", "goodput of", "time to first token", "decode wait", "prfaas → pd"):
        assert phrase in done.stdout, done.stdout


def test_files_and_a_page(scenario: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert invoke(scenario, "--out", out, "--html").exit_code == 0
    names = {path.name for path in out.iterdir()}
    assert names == {
        "summary.json", "requests.csv", "requests.parquet", "samples.csv", "samples.parquet", "report.html",
    }  # fmt: skip
    (run,) = json.loads((out / "summary.json").read_text())["runs"]
    table = parquet.read_table(out / "requests.parquet").to_pylist()
    measured = [row for row in table if row["is_measured"]]
    assert len(measured) == run["requests"] > 100
    assert run["done"] == run["requests"]
    assert run["is_stable"]
    # Generated prompts have nothing in common.
    assert run["possible_share"] == run["hit_share"] == 0.0
    far = [row for row in measured if row["prefill"] == "prfaas"]
    assert far
    assert all(row["prompt_tokens"] > 19400 and row["handover_bytes"] > 0 for row in far)
    moved = sum(row["handover_bytes"] for row in table)
    samples = parquet.read_table(out / "samples.parquet")
    assert sum(samples["link_bytes:prfaas>pd"].to_pylist()) == pytest.approx(moved, rel=1e-6)
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "paper-1t-h20" in page


def test_json_is_the_summary_and_equal_each_time(scenario: str) -> None:
    first, second = (json.loads(invoke(scenario, "--json").stdout)["runs"][0] for _ in range(2))
    assert first.pop("wall_s") > 0
    second.pop("wall_s")
    assert first == second
    (other,) = json.loads(invoke(scenario, "--json", "--sweep", "seed=1").stdout)["runs"]
    assert other["settings"] == {"seed": "1"}
    assert other["ttft"] != first["ttft"]


def test_a_sweep_over_processes(scenario: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    options = ("--sweep", f"{RATE}=1,2", "--sweep", "policy.name=threshold,none", "--workers", "2", "--html")
    run = subprocess.run(
        [sys.executable, "-m", "kvstore", "simulate", scenario, *options, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert run.returncode == 1
    assert "there is no routing policy 'none'" in run.stderr
    assert "4 of 4: " in run.stderr
    assert "2 of 4 simulations" in run.stdout
    document = json.loads((out / "comparison.json").read_text())
    assert [each["settings"][RATE] for each in document["runs"]] == ["1", "2"]
    assert [each["run"] for each in document["failed"]] == ["2-small", "4-small"]
    assert {path.name for path in out.iterdir()} == {
        "1-small", "3-small", "comparison.csv", "comparison.html", "comparison.json",
    }  # fmt: skip
    assert "there is no routing policy" in (out / "comparison.html").read_text()


def test_an_interrupted_sweep_compares_what_had_ended(scenario: str, tmp_path: Path) -> None:
    """The second point has a million requests, and would take minutes."""
    out = tmp_path / "out"
    options = ("--sweep", "duration_s=60,1e9", "--sweep", "workload.requests_max=1000000", "--workers", "1")
    run = subprocess.Popen(
        [sys.executable, "-m", "kvstore", "simulate", scenario, *options, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    assert run.stderr is not None
    try:
        assert run.stderr.readline() == "1 of 2: 1-small done\n"
        os.killpg(run.pid, signal.SIGINT)
        text, errors = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 130, errors
    assert errors == "kvstore simulate: 2-small: interrupted before it had ended\n"
    assert "1 of 2 simulations" in text
    document = json.loads((out / "comparison.json").read_text())
    assert [each["settings"]["duration_s"] for each in document["runs"]] == ["60"]
    assert document["failed"] == [{"run": "2-small", "error": "interrupted before it had ended"}]
    assert {path.name for path in out.iterdir()} == {"1-small", "comparison.csv", "comparison.json"}


def test_what_an_interrupt_leaves_undone_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def work(ended: Callable[[int, Ended[int]], None]) -> None:
        ended(2, Ended(7))
        ended(0, Ended(None, "lost"))
        raise KeyboardInterrupt

    found: Collected[int] = Collected.of(["a", "b", "c"], work)
    assert found.values == (7,)
    assert found.failures == (("a", "lost"), ("b", "interrupted before it had ended"))
    assert found.told() == 130
    assert "kvstore simulate: b: interrupted" in capsys.readouterr().err
    for how, status in ((Ended(1), 0), (Ended[int](None, "lost"), 1)):
        done: Collected[int] = Collected.of(["a"], lambda ended, how=how: ended(0, how))  # type: ignore[misc]
        assert done.told() == status


def test_pages_need_matplotlib_before_anything_is_simulated(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "kvstore.simulate.simulation", None)
    with pytest.raises(KVStoreError, match=r"kvstore\[report\]"):
        invoke(scenario, "--out", tmp_path / "out", "--html")
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_shows_before_anything_is_simulated(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvstore.simulate.simulation", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(KVStoreError, match=r"file/out cannot be written \(Not a directory\)"):
        invoke(scenario, "--out", tmp_path / "file" / "out")


def test_the_goodput_of_a_scenario(scenario: str, tmp_path: Path) -> None:
    done = invoke(scenario, "--goodput", "--rate-max", "8", "--tolerance", "0.2", "--out", tmp_path / "out")
    assert done.exit_code == 0
    document = json.loads((tmp_path / "out" / "goodput.json").read_text())
    (found,) = document["goodput"]
    assert document["failed"] == []
    assert 0 < found["requests_per_s"] < found["above_requests_per_s"] <= min(1.2 * found["requests_per_s"], 8)
    tried = {each["requests_per_s"]: each for each in found["tried"]}
    assert tried[found["requests_per_s"]]["good_share"] == found["good_share"] >= found["share"] == 0.9
    bad = tried[found["above_requests_per_s"]]
    assert not bad["is_stable"] or bad["good_share"] < 0.9
    lines = done.stderr.splitlines()
    assert len(lines) == len(tried)
    assert lines[0].startswith("1: 8 requests/s, ")
    assert f"{found['requests_per_s']:.3g}/s" in done.stdout
    assert "Goodput: the largest rate" in done.stdout


def test_the_goodput_of_a_grid(scenario: str) -> None:
    sweep = ("--sweep", "policy.name=threshold,none", "--sweep", "duration_s=60")
    done = invoke(scenario, "--goodput", "--rate-max", "8", "--tolerance", "0.4", *sweep, "--workers", "1", "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    (found,) = document["goodput"]
    assert found["settings"] == {"policy.name": "threshold", "duration_s": "60"}
    assert [each["run"] for each in document["failed"]] == ["2-small"]
    assert "there is no routing policy 'none'" in document["failed"][0]["error"]


def test_a_grid_without_any_goodput_leaves_no_file_of_an_earlier_one(scenario: str, tmp_path: Path) -> None:
    (tmp_path / "goodput.json").write_text("{}")
    sweep = ("--sweep", "policy.name=none,nothing", "--workers", "1", "--out", tmp_path)
    assert invoke(scenario, "--goodput", *sweep).exit_code == 1
    document = json.loads((tmp_path / "goodput.json").read_text())
    assert document["goodput"] == []
    assert len(document["failed"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goodput", "--sweep", f"{RATE}=1,2"], "looks for the rate itself"),
        (["--goodput", "--tolerance", "0"], "tolerance of 0"),
        (["--goodput", "--rate-max", "-1"], "positive rate_max_per_s"),
        (["--html"], "give --out DIR"),
        (["--sweep", "seed"], "KEY=A,B,C"),
        (["--sweep", "sed=1,2"], "sed"),
        (["--sweep", "seed=1,2", "--workers", "0"], "0 workers"),
    ],
)
def test_wrong_uses_are_named(scenario: str, arguments: list[str], message: str) -> None:
    with pytest.raises(KVStoreError, match=message):
        invoke(scenario, *arguments)


@pytest.mark.parametrize("arguments", [["--goodput", "--html"], ["--rate-max", "3"], ["--tolerance", "0.1"]])
def test_options_that_do_not_go_together(scenario: str, arguments: list[str]) -> None:
    done = invoke(scenario, *arguments)
    assert done.exit_code == 2
    assert "--goodput" in done.stderr


def test_an_overload_is_labelled(scenario: str) -> None:
    done = invoke(scenario, "--sweep", f"{RATE}=12")
    assert done.exit_code == 0
    assert done.stdout.startswith("NOT STABLE: ")
    (run,) = json.loads(invoke(scenario, "--json", "--sweep", f"{RATE}=12").stdout)["runs"]
    assert not run["is_stable"]
    assert not run["meets_slo"]
