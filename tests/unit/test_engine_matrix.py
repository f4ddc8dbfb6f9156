"""How the matrix of engines is judged and reported; no engine is needed for that."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engines import environment
from tests.engines.environment import NotRunError, prepare
from tests.engines.jax import cells as jax_cells
from tests.engines.matrix import Answer, Verdict, distance, holds, judge, not_run
from tests.engines.report import line, table, write

ROOT = Path(__file__).parents[2]
CONTEXT = ("engine", "model", "case")


def answer(*steps: tuple[int, dict[int, float]]) -> Answer:
    return Answer(tuple(token for token, _ in steps), tuple(logprobs for _, logprobs in steps))


WHOLE = answer((1, {1: -0.5, 2: -1.5}), (2, {2: -0.25, 3: -2.0}))
NEAR = answer((1, {1: -0.5, 2: -1.5}), (2, {2: -0.375, 3: -2.0}))
FAR = answer((1, {1: -0.5, 2: -1.5}), (3, {3: -0.25, 2: -1.0}))


def test_distance() -> None:
    assert distance([WHOLE], [WHOLE]) == 0
    assert distance([WHOLE], [NEAR]) == 0.125
    assert distance([WHOLE, WHOLE], [WHOLE, FAR]) == 1.75
    assert distance([WHOLE], [WHOLE, WHOLE]) == math.inf
    assert distance([WHOLE], [answer(*zip(WHOLE.tokens[:1], WHOLE.logprobs[:1], strict=True))]) == math.inf
    assert distance([answer()], [answer()]) == math.inf, "an engine that said nothing is equal to nothing"


def test_what_follows_another_token_does_not_count() -> None:
    one = answer((1, {1: -0.5, 2: -0.75}), (5, {5: -0.1, 6: -9.0}))
    other = answer((2, {1: -0.75, 2: -0.5}), (6, {6: -0.1, 5: -9.0}))
    assert distance([one], [other]) == 0.25


def test_an_id_that_only_one_lists() -> None:
    assert distance([answer((1, {1: -0.5, 2: -1.0}))], [answer((1, {1: -0.5, 3: -1.5}))]) == 0.5


@pytest.mark.parametrize(
    ("answers", "spread", "control", "verdict", "is_caught", "is_good"),
    [
        (WHOLE, 0.0, FAR, Verdict.EQUAL, True, True),
        (WHOLE, 0.0, WHOLE, Verdict.EQUAL, False, False),
        (WHOLE, 0.0, None, Verdict.EQUAL, None, True),
        (NEAR, 0.0, FAR, Verdict.DIFFERENT, True, False),
        (NEAR, 0.125, FAR, Verdict.WITHIN_SPREAD, True, True),
        (NEAR, 0.125, NEAR, Verdict.WITHIN_SPREAD, False, False),
        (FAR, 0.125, FAR, Verdict.DIFFERENT, False, False),
    ],
)
def test_judgement(
    answers: Answer, spread: float, control: Answer | None, verdict: Verdict, is_caught: bool | None, is_good: bool
) -> None:
    cell = judge(
        *CONTEXT, reference=[WHOLE], answers=[answers], spread=spread, control=None if control is None else [control]
    )
    assert (cell.verdict, cell.is_caught, cell.is_good) == (verdict, is_caught, is_good)


def test_what_should_have_held() -> None:
    assert judge(*CONTEXT, reference=[WHOLE], answers=[WHOLE], broken=["nothing was cached"]).is_good is False
    assert holds(*CONTEXT, ["leases 1"]).is_good is False
    assert holds(*CONTEXT, []).is_good


def test_report(tmp_path: Path) -> None:
    cells = [
        judge(*CONTEXT, reference=[WHOLE], answers=[WHOLE], control=math.inf, figures={"cached": 512}),
        not_run("engine", "model", "other case", "no package of it for this machine"),
    ]
    assert line(cells[0]) == "engine model, case: equal, differs by 0, control inf, caught, cached 512"
    assert line(cells[1]) == "engine model, other case: not run: no package of it for this machine"
    assert table(cells).splitlines()[1].split() == ["engine", "model", "case", "equal", "0", "inf", "yes"]
    write(cells, tmp_path / "folder" / "matrix.json")
    rows = json.loads((tmp_path / "folder" / "matrix.json").read_text())
    assert [(row["verdict"], row["is_caught"], row["control"]) for row in rows] == [
        ("equal", True, "inf"),
        ("not run", None, None),
    ]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands that an installation gave, none of which has run; those that contain a text of FAILURES fail."""
    given: list[tuple[str, ...]] = []

    def call(*command: str, **_options: object) -> None:
        given.append(command)
        outputs = FAILURES.get(command[-1].rpartition("/")[2])
        if outputs and (output := outputs.pop(0)):
            raise subprocess.CalledProcessError(1, command, output=output)
        if "venv" in command:
            (tmp_path / "engines" / "vllm").mkdir()

    monkeypatch.delenv("KVSTORE_ENGINE_VLLM", raising=False)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "BUILD", tmp_path / "engines")
    monkeypatch.setattr(environment, "PAUSE_S", 0.0)
    monkeypatch.setattr(environment, "_call", call)
    monkeypatch.setattr(environment, "_install_kvstore", lambda place, python: given.append(("kvstore",)))
    monkeypatch.setitem(FAILURES, "requirements.txt", [])
    monkeypatch.setitem(FAILURES, "import torch", [])
    return given


FAILURES: dict[str, list[str]] = {}
HOPELESS = "WARNING: slow\nERROR: No matching distribution\n"
PASSING = "WARNING: slow\nReadTimeoutError: Read timed out.\n"


def test_an_engine_that_cannot_be_installed_says_why(commands: list[tuple[str, ...]]) -> None:
    FAILURES["requirements.txt"] = [HOPELESS, HOPELESS]
    with pytest.raises(NotRunError, match="vllm cannot be installed: ERROR: No matching distribution"):
        prepare("vllm")
    assert sum("install" in command for command in commands) == 1, "another attempt would end the same way"
    with pytest.raises(subprocess.CalledProcessError):
        prepare("vllm", insists=True)


def test_a_registry_that_fails_is_asked_again(
    commands: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    FAILURES["requirements.txt"] = [PASSING, PASSING, ""]
    prepare("vllm")
    assert commands[-1] == ("kvstore",)
    assert "attempt 2 of 3 failed: ReadTimeoutError" in capsys.readouterr().out
    prepare("vllm")
    assert sum("install" in command for command in commands) == 3, "it is there"


def test_a_registry_that_does_not_answer(commands: list[tuple[str, ...]]) -> None:
    FAILURES["requirements.txt"] = [PASSING] * 3
    with pytest.raises(NotRunError, match="vllm cannot be installed: ReadTimeoutError"):
        prepare("vllm")
    assert ("kvstore",) not in commands


def test_a_build_for_another_machine_is_no_installation(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    FAILURES["import torch"] = ["ImportError: libcudart.so.13: cannot open shared object file\n"]
    with pytest.raises(NotRunError, match=r"vllm cannot be installed: ImportError: libcudart.so.13"):
        prepare("vllm")
    assert not (tmp_path / "engines" / "vllm" / ".installed").exists()


def test_a_disk_that_is_full_is_noticed_first(commands: list[tuple[str, ...]]) -> None:
    with pytest.raises(
        NotRunError, match=r"vllm cannot be installed: it needs 1152921504.6 GB of disk, and .* are free"
    ):
        prepare("vllm", disk_bytes=1 << 60)
    assert not commands


JUNIT = """<testsuites><testsuite><testcase name="one"/><testcase name="two">{}</testcase></testsuite></testsuites>"""


@pytest.mark.parametrize(
    ("outcome", "verdict", "reason"),
    [
        ("", Verdict.HOLDS, ""),
        ('<skipped message="no torch"/>', Verdict.HOLDS, "skipped two: no torch"),
        ('<failure message="!="/>', Verdict.BROKEN, "two failed"),
        ('<error message="fixture"/>', Verdict.BROKEN, "two failed"),
        (None, Verdict.BROKEN, "no test ran"),
    ],
)
def test_cells_of_unit_tests(tmp_path: Path, outcome: str | None, verdict: Verdict, reason: str) -> None:
    results = tmp_path / "tests.xml"
    if outcome is not None:
        results.write_text(JUNIT.format(outcome))
    cell = jax_cells.cell_of(results, "adapter", "test.py")
    assert (cell.verdict, cell.reason) == (verdict, reason)


def test_unit_tests_that_are_all_skipped_have_not_run(tmp_path: Path) -> None:
    results = tmp_path / "tests.xml"
    results.write_text('<testsuite><testcase name=""><skipped message="no JAX"/></testcase></testsuite>')
    cell = jax_cells.cell_of(results, "adapter", "test.py")
    assert (cell.verdict, cell.reason) == (Verdict.NOT_RUN, "no JAX")


def test_a_process_that_is_ended_leaves_no_shared_memory(tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(
        "from multiprocessing import shared_memory\n"
        "import sys\n"
        "held = shared_memory.SharedMemory(create=True, size=4096)\n"
        "print(held.name, flush=True)\n"
        "sys.stdin.read()\n"
    )
    made = environment.Environment("engine", Path(sys.executable), is_tree=False)
    with made.start(script, (), log=tmp_path / "log", is_talking=True) as process:
        assert process.stdout is not None
        path = Path("/dev/shm") / process.stdout.readline().decode().strip()
        try:
            assert path.exists()
        finally:
            environment.end(process)
        assert not path.exists()


def test_faults_find_what_they_change() -> None:
    """They reach into the library by name; in the engines' environments alone that would be noticed late."""
    folder = ROOT / "tests" / "engines" / "vllm"
    code = "import faults, tier_faults; faults.Faults(); tier_faults.Faults()"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
