"""What is tested with SGLang, and how it is told: scripts in `inside` do it, in the engine's environment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.environment import ROOT, NotRunError
from tests.engines.matrix import Cell, Verdict, holds, not_run
from tests.engines.sglang import whole
from tests.engines.sglang.whole import Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.engines.environment import Environment

ENGINE = "sglang"
DISK_BYTES = 4 << 30
HERE = Path(__file__).parent
EXAMPLE, EXAMPLE_SAYS = "13_sglang_hicache.py", "question 2: 512 of 536 tokens came from kvstore"
LAYOUTS = ("layer_first", "page_first_direct", "page_first", "page_head")
INTERFACES = ("generic", "zero-copy")
CONTROLLER_CASES = (
    "cold", "warm", "restarted, warm disk", "corrupted record on disk", "corrupted record in memory",
    "evicted between exists and get", "two tenants", "tensor-parallel ranks",
)  # fmt: skip
UNIFIED_FULL, UNIFIED_WINDOW, UNIFIED_MAMBA = "unified, full", "unified, full + window", "unified, full + Mamba"
UNIFIED = (
    *((model, layout, interface) for model in (UNIFIED_FULL, UNIFIED_WINDOW) for layout in LAYOUTS
      for interface in INTERFACES),
    *((UNIFIED_MAMBA, layout, interface) for layout in LAYOUTS[1:3] for interface in INTERFACES),  # it has no others
)  # fmt: skip
UNIFIED_QUICK = ((UNIFIED_MAMBA, LAYOUTS[1], INTERFACES[1]),)
UNIFIED_CASES = ("warm", "restarted, warm disk", "two tenants", "corrupted record on disk")
UNIFIED_STATE_CASES = ("state without its anchor", "anchor without its state")
WHOLE = ((whole.MODEL, 1), (whole.PARALLEL, 2))
"""Models, and ranks of their engines."""
NOT_HERE = (
    ("controller and unified", "SGLang's copies between device and host",
     "they are kernels for a GPU; index copies stand in for them"),
    ("engine, hybrid", "all",
     "linear attention on a CPU calls kernels (causal_conv1d_fn_cpu and others) of a build of sgl-kernel that is not "
     "published as a wheel; SGLang's cache and controller for such models are tested as 'unified'"),
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """One script, what it is told, and the cells that it has to report.

    Attributes:
        name: of the file in `inside`.
        plan: as JSON; the folder and the seed are added.
        expected: models and cases.
    """

    name: str
    plan: dict[str, Any]
    expected: tuple[tuple[str, str], ...]
    limit_s: float


def scripts(is_quick: bool) -> list[Script]:
    layouts = LAYOUTS[:2] if is_quick else LAYOUTS
    models = [f"{layout}, {interface}" for layout in layouts for interface in INTERFACES]
    runs = UNIFIED_QUICK if is_quick else UNIFIED
    return [
        Script(
            "controller.py",
            {"layouts": layouts, "interfaces": INTERFACES},
            (*((model, case) for model in models for case in CONTROLLER_CASES), (models[0], "node killed")),
            600.0,
        ),
        Script(
            "unified.py",
            {"runs": runs},
            tuple(
                (", ".join(run), case)
                for run in runs
                for case in (*UNIFIED_CASES, *(UNIFIED_STATE_CASES if run[0] != UNIFIED_FULL else ()))
            ),
            600.0,
        ),
    ]


def expected(is_quick: bool) -> list[tuple[str, str]]:
    """Models and cases that are reported."""
    return [each for script in scripts(is_quick) for each in script.expected] + whole.expected(is_quick)


def cells(
    environment: Environment, folder: Path, *, is_quick: bool, models: Sequence[str] | None, seed: int
) -> Iterator[Cell]:
    """Run the scripts one after the other; `models` takes those cells only, by the beginning of the model's name."""
    for script in scripts(is_quick):
        wanted = [each for each in script.expected if not models or each[0].startswith(tuple(models))]
        if not wanted:
            continue
        found = set()
        for cell in _cells_of(environment, script, folder, seed):
            found.add((cell.model, cell.case))
            if not models or cell.model.startswith(tuple(models)):
                yield cell
        for model, case in wanted:
            if (model, case) not in found:
                yield Cell(ENGINE, model, case, Verdict.BROKEN, reason=f"{script.name} has not reported it")
    for model, ranks in WHOLE[:1] if is_quick else WHOLE:
        if not models or model.startswith(tuple(models)):
            place = folder / f"engine-{ranks}"
            place.mkdir()
            run = Whole(
                environment, place, variables(environment), is_quick=is_quick or ranks > 1, seed=seed, ranks=ranks
            )
            yield from run.cells()
    if not is_quick and not models:
        yield _example(environment, folder)
    if not is_quick:
        for model, case, reason in NOT_HERE:
            if not models or model.startswith(tuple(models)):
                yield not_run(ENGINE, model, case, reason)


def _example(environment: Environment, folder: Path) -> Cell:
    log = folder / "example.log"
    try:
        environment.run(ROOT / "examples" / EXAMPLE, (), log=log, limit_s=400.0, variables=variables(environment))
        missing = [f"it does not say {EXAMPLE_SAYS!r}"] if EXAMPLE_SAYS not in log.read_text(errors="replace") else []
    except NotRunError as error:
        missing = [str(error)]
    return holds(ENGINE, "example", EXAMPLE, missing)


def _cells_of(environment: Environment, script: Script, folder: Path, seed: int) -> Iterator[Cell]:
    name = script.name.removesuffix(".py")
    plan, results = folder / f"{name}.json", folder / f"{name}.results"
    plan.write_text(json.dumps({**script.plan, "folder": str(folder / name), "seed": seed}))
    results.touch()
    ended = ""
    try:
        environment.run(
            HERE / "inside" / script.name,
            [str(plan), str(results)],
            log=folder / f"{name}.log",
            limit_s=script.limit_s,
            variables=variables(environment),
        )
    except NotRunError as error:
        ended = str(error)
    for line in results.read_text().splitlines():
        yield cell_of(json.loads(line))
    if ended:
        yield Cell(ENGINE, name, "ran to its end", Verdict.BROKEN, reason=ended)


def variables(environment: Environment) -> dict[str, str]:
    """What SGLang needs to run without a GPU, and nothing from the network."""
    path = [str(HERE / "shims")]
    if environment.is_tree:
        path.append(str(ROOT))
    return {
        "PYTHONPATH": ":".join(path),
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def cell_of(row: dict[str, Any]) -> Cell:
    """A row of a script's results."""
    model, case = row["model"], row["case"]
    if "not_run" in row:
        return not_run(ENGINE, model, case, row["not_run"])
    broken, difference = row["broken"], row.get("difference")
    if broken:
        verdict = Verdict.BROKEN
    elif difference is None:
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.DIFFERENT if difference else Verdict.EQUAL
    return Cell(
        ENGINE, model, case, verdict, difference, control=row.get("control"), reason="; ".join(broken),
        figures=row["figures"],
    )  # fmt: skip
