"""Run the matrix of engines: `python -m tests.engines [--quick] [--engine NAME] [--model NAME] [--insist]`.

An engine `NAME` is a package `tests.engines.NAME` with a `requirements.txt` (complete: installed without resolving)
and a module `cells` with `cells(environment, folder, *, is_quick, models, seed) -> Iterator[Cell]`, `DISK_BYTES` that
its installation takes, and `expected(is_quick)`, the models and cases that are reported as not run where the engine
cannot be had.
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.engines.environment import BUILD, NotRunError, prepare
from tests.engines.matrix import Verdict, not_run
from tests.engines.report import line, table, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engines.matrix import Cell

ENGINES = tuple(sorted((path.parent.name for path in Path(__file__).parent.glob("*/cells.py")), reverse=True))


def run(engine: str, arguments: argparse.Namespace) -> Iterator[Cell]:
    module = importlib.import_module(f"tests.engines.{engine}.cells")
    try:
        begin = time.monotonic()
        environment = prepare(engine, disk_bytes=module.DISK_BYTES, insists=arguments.insist)
        print(f"engines: {engine} is ready after {time.monotonic() - begin:.0f} s", flush=True)
    except NotRunError as error:
        for model, case in module.expected(arguments.quick):
            yield not_run(engine, model, case, str(error))
        return
    folder = BUILD / "runs" / engine
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield from module.cells(
        environment, folder, is_quick=arguments.quick, models=arguments.model or None, seed=arguments.seed
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the slice that CI runs")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="all by default")
    parser.add_argument("--model", action="append", help="all by default")
    parser.add_argument("--insist", action="store_true", help="fail where an engine or a cell cannot run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, default=BUILD / "matrix.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines are ended on the way out
    cells: list[Cell] = []
    begin = time.monotonic()
    for engine in arguments.engine or ENGINES:
        for cell in run(engine, arguments):
            cells.append(cell)
            print(line(cell), flush=True)
    write(cells, arguments.json)
    print(f"\n{table(cells)}\n\nseed {arguments.seed}, {time.monotonic() - begin:.0f} s, {arguments.json}", flush=True)
    bad = [cell for cell in cells if not cell.is_good or (arguments.insist and cell.verdict is Verdict.NOT_RUN)]
    for cell in bad:
        print(f"engines: failed: {line(cell).splitlines()[0]}", file=sys.stderr)
    return 1 if bad or not cells else 0


if __name__ == "__main__":
    sys.exit(main())
