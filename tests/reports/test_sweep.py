"""Sweeps: the grid is what was asked for, and what fails, dies or hangs loses nothing but itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ScenarioError, SimulationError
from kvstore.limits import SWEEP_POINTS_MAX
from kvstore.scenario import scenario_table
from kvstore.simulate.sweep import Axis, axis_of, named_apart, points_of, run_sweep
from kvstore.simulate.workers import Ended, run_all
from tests.reports.work import draw, obey

ROOT = Path(__file__).parents[2]
RATE = "workload.arrivals.rate_per_s"


def grid(*texts: str, name: str = "paper-adaptive") -> Any:
    table, base_directory, file = scenario_table(name)
    return points_of(table, base_directory, [axis_of(text) for text in texts], file=file)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# The grid


def test_axes() -> None:
    assert axis_of("seed=1,2, 3") == Axis("seed", (1, 2, 3))
    assert axis_of("policy.name=threshold,adaptive") == Axis("policy.name", ("threshold", "adaptive"))
    assert axis_of(f"{RATE}=1,2.5") == Axis(RATE, (1, 2.5))
    assert axis_of("clusters.pd.convertible=true,false") == Axis("clusters.pd.convertible", (True, False))
    assert axis_of("workload.path=1979-05-27,[1]").values == ("1979-05-27", "[1]")


@pytest.mark.parametrize("text", ["seed", "=1,2", "seed=", "seed=1,,2", "a..b=1", "seed=1,1"])
def test_what_is_no_axis(text: str) -> None:
    with pytest.raises(SimulationError, match=r"KEY=A,B,C|twice"):
        axis_of(text)


def test_the_grid() -> None:
    points = grid(f"{RATE}=1,2", "seed=5,6", "clusters.pd.decode_instances=4")
    assert [(point.scenario.workload.arrivals.rate_per_s, point.scenario.seed) for point in points] == [
        (1, 5), (1, 6), (2, 5), (2, 6),
    ]  # fmt: skip
    assert {point.scenario.deployment.cluster("pd").decode_instances for point in points} == {4}
    assert points[1].settings == ((RATE, 1), ("seed", 6), ("clusters.pd.decode_instances", 4))
    assert len({point.name for point in points}) == 4


def test_links_and_numbers_name_entries() -> None:
    (point,) = grid("links.prfaas>pd.loss=0.001", "links.1.round_trip_s=0.5", "policy.settings.made_up=3")
    first, second = point.scenario.deployment.links
    assert (first.loss, second.round_trip_s) == (0.001, 0.5)
    assert dict(point.scenario.policy.settings) == {"admission": 1, "made_up": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed=1", "sed"),
        ("seed=-1", "seed = -1"),
        (f"{RATE}=1,many", "rate_per_s"),
        ("clusters.nobody.decode_instances=1", "prfaas, pd"),
        ("clusters.pd=1", "names no entry"),
        ("links.9.loss=0.1", "names no entry"),
        ("name.first=x", "no table"),
    ],
)
def test_wrong_values_show_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        grid(text)


def test_grids_have_limits() -> None:
    many = ",".join(map(str, range(SWEEP_POINTS_MAX + 1)))
    with pytest.raises(SimulationError, match=str(SWEEP_POINTS_MAX)):
        grid(f"seed={many}")
    with pytest.raises(SimulationError, match="twice"):
        grid("seed=1", "seed=2")
    with pytest.raises(SimulationError, match="workers"):
        run_sweep(grid("seed=1"), workers=0)


def test_the_scenario_is_left_as_it_was() -> None:
    table, base_directory, file = scenario_table("paper-adaptive")
    before = repr(table)
    points_of(table, base_directory, [axis_of("clusters.pd.decode_instances=1,2")], file=file)
    assert repr(table) == before


def test_names_of_folders_are_safe_and_apart() -> None:
    table, base_directory, _ = scenario_table("paper-adaptive")
    for name in ("../../etc", "a/b", "..", "x" * 500, "\0", "ä b"):
        (point,) = points_of({**table, "name": name}, base_directory, [])
        assert "/" not in point.name
        assert point.name.strip(".")
        assert "\0" not in point.name
        assert len(point.name) < 100
    again = named_apart([*grid("seed=1"), *grid("seed=2")])
    assert [point.name for point in again] == ["1-paper-adaptive", "2-paper-adaptive"]


# Processes


def test_what_fails_loses_nothing_but_itself() -> None:
    tasks = [
        ("return", 1),
        ("die", None),
        ("return", 2),
        ("raise", "no such thing"),
        ("exit", 7),
        ("return", 3),
        ("unpicklable", 1),
        ("return", 4),
    ]
    told: dict[int, Ended[Any]] = {}
    found = run_all(tasks, obey, workers=2, deadline_s=60.0, ended=told.__setitem__)
    assert [ended.value[0] for ended in found if ended.value] == [1, 2, 3, 4]
    assert "signal 9" in found[1].error
    assert found[3].error == "SimulationError: no such thing"
    assert "exit status 7" in found[4].error
    assert "cannot be sent" in found[6].error
    assert told == dict(enumerate(found))
    assert all(map(has_ended, {ended.value[1] for ended in found if ended.value}))


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    (found,) = run_all([("hang", str(tmp_path / "hung"))], obey, workers=1, deadline_s=3.0)
    assert "longer than 3 s" in found.error
    assert not active_children()


def test_no_work_needs_no_process() -> None:
    assert run_all([], obey, workers=1, deadline_s=1.0) == ()


def test_interrupts_are_the_parents_alone(tmp_path: Path) -> None:
    """From the first process on: before it, a program starts one of `multiprocessing`'s own."""
    script = tmp_path / "masks.py"
    script.write_text("from tests.reports.work import print_masks\nif __name__ == '__main__':\n    print_masks()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[True, True]\n", run.stderr


def test_an_interrupt_ends_the_processes(tmp_path: Path) -> None:
    program = f"from tests.reports.work import hang_two\nif __name__ == '__main__':\n    hang_two({str(tmp_path)!r})\n"
    script = tmp_path / "sweep.py"
    script.write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline_s = time.monotonic() + 60
    while not all((tmp_path / name).is_file() and (tmp_path / name).read_text() for name in "01"):
        assert time.monotonic() < deadline_s
        assert run.poll() is None
        time.sleep(0.05)
    workers = [int((tmp_path / name).read_text()) for name in "01"]
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert errors.count("KeyboardInterrupt") == 1, errors
    assert all(map(has_ended, workers))


@given(st.lists(st.integers(0, 100), max_size=4, unique=True))
def test_results_are_in_order(values: list[int]) -> None:
    text = ",".join(map(str, values))
    if values:
        assert [point.scenario.seed for point in grid(f"seed={text}")] == values


def test_a_sweep() -> None:
    points = grid("policy.name=threshold,naive", "seed=12,13,14")
    found = run_sweep(points, workers=2, work=draw)
    assert [ended.value is None for ended in found] == [False, True, False] * 2
    assert found[1].error == "SimulationError: thirteen cannot be simulated"
    assert found[0].value is not None
    assert found[0].value.settings == (("policy.name", "threshold"), ("seed", "12"))
    assert found == run_sweep(points, workers=1, work=draw)
