"""Work for other processes, which import it."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore.errors import SimulationError
from kvstore.scenario import PolicyChoice
from kvstore.simulate.report.summary import summarise
from kvstore.simulate.workers import run_all
from tests.reports.results import drawn

if TYPE_CHECKING:
    from kvstore.simulate.report.values import Summary
    from kvstore.simulate.sweep import Point


def obey(task: tuple[str, Any]) -> Any:
    """Return, raise, die or hang as told."""
    what, value = task
    if what == "raise":
        raise SimulationError(value)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(value)
    if what == "unpicklable":
        return lambda: value
    if what == "hang":
        Path(value).write_text(str(os.getpid()))
        time.sleep(600)
    if what == "mask":
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return value, os.getpid()


def draw(point: Point) -> Summary:
    """Figures that the seed and the policy alone decide."""
    if point.scenario.seed == 13:
        raise SimulationError("thirteen cannot be simulated")
    run = drawn(point.scenario.seed, requests=100)
    scenario = replace(run.scenario, name=point.scenario.name, policy=PolicyChoice(point.scenario.policy.name))
    return summarise(replace(run, scenario=scenario), settings=point.settings)


def print_masks() -> None:
    """Whether each of two processes, the first of a program, has interrupts blocked."""
    print([ended.value for ended in run_all([("mask", 0), ("mask", 0)], obey, workers=2, deadline_s=60)])


def hang_two(directory: str) -> None:
    """Two that never end, for somebody who interrupts."""
    tasks = [("hang", f"{directory}/{number}") for number in range(2)]
    run_all(tasks, obey, workers=2, deadline_s=600)
