"""What is tested with JAX: the unit tests that `make test` skips without it, and the example."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.environment import ROOT, NotRunError
from tests.engines.matrix import Cell, Verdict, holds, not_run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.engines.environment import Environment

ENGINE = "jax"
DISK_BYTES = 3 << 30
RUNNER = Path(__file__).parent / "run_tests.py"
TESTS = ROOT / "tests" / "unit" / "test_jax_adapter.py"
EXAMPLE = ROOT / "examples" / "14_jax_mamba2.py"
EXAMPLE_SAYS = ("resumes at 130 of 150 tokens", "bit for bit", "lost conv or ssm state is noticed")
LIMIT_S = 300.0
VARIABLES = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "PASSIVE"}


def expected(is_quick: bool) -> list[tuple[str, str]]:
    """Models and cases that are reported; the quick slice is all of it."""
    return [("adapter", TESTS.name), ("mamba2", EXAMPLE.name)]


def cells(
    environment: Environment, folder: Path, *, is_quick: bool, models: Sequence[str] | None, seed: int
) -> Iterator[Cell]:
    """Both cells, or those of the chosen models. Nothing is drawn by `seed`: the tests have their own."""
    for (model, case), make in zip(expected(is_quick), (_tests, _example), strict=True):
        if models is None or model in models:
            yield make(environment, folder, model, case)


def _tests(environment: Environment, folder: Path, model: str, case: str) -> Cell:
    results, log = folder / "tests.xml", folder / "tests.log"
    ended = ""
    try:
        environment.run(RUNNER, [str(TESTS), str(results)], log=log, limit_s=LIMIT_S, variables=VARIABLES)
    except NotRunError as error:
        ended = str(error)
    return cell_of(results, model, case, ended)


def cell_of(results: Path, model: str, case: str, ended: str = "") -> Cell:
    """What pytest has written to `results`, as a cell. A test that was skipped is named; if none ran, nothing has.

    Args:
        ended: why pytest did not end well; empty if it did.
    """
    tests = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    failed = [
        test.attrib["name"] for test in tests if test.find("failure") is not None or test.find("error") is not None
    ]
    skipped = {
        test.attrib["name"]: skip.attrib["message"] for test in tests if (skip := test.find("skipped")) is not None
    }
    if tests and len(skipped) == len(tests):
        return not_run(ENGINE, model, case, next(iter(skipped.values())))
    broken = [f"{name} failed" for name in failed] + ([ended] if ended else [])
    passed = len(tests) - len(failed) - len(skipped)
    if not passed and not broken:
        broken = ["no test ran"]
    cell = holds(ENGINE, model, case, broken, {"passed": passed, "skipped": len(skipped)})
    if broken or not skipped:
        return cell
    reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    return Cell(ENGINE, model, case, Verdict.HOLDS, reason=f"skipped {reasons}", figures=cell.figures)


def _example(environment: Environment, folder: Path, model: str, case: str) -> Cell:
    log = folder / "example.log"
    try:
        environment.run(EXAMPLE, (), log=log, limit_s=LIMIT_S, variables=VARIABLES)
        said = log.read_text(errors="replace")
        missing = [f"it does not say {phrase!r}" for phrase in EXAMPLE_SAYS if phrase not in said]
    except NotRunError as error:
        missing = [str(error)]
    return holds(ENGINE, model, case, missing)
