"""What a page of SGLang's hierarchical cache costs in each storage, and what a prompt waits for in its controller.

Storages, in turn in one run, on one host pool of SGLang's own and batches of 128 pages as its controller makes them:

- kvstore, zero-copy: a store of this process, pages copied from and to where they lie, checked when they are read;
- kvstore, attached: the same at a store that another process owns, whose processor time is counted too;
- file: SGLang's own file backend through the tensor interface, into the page cache, unchecked;
- dict: the bytes in a dict of this process, copied once each way. What any storage has to do at least.

Steps: write new pages, write them again (they are there), ask for the prefix, read them into other slots. What is there
is cleared between rounds, and the first round, in which memory is touched for the first time, is not counted.

The controller: `save` a prompt; `cold`, ask for one that is not there, which is what a cold request pays; `warm`, ask
for it, read it, and load it into the device pool. Copies to the device are index copies of the CPU here.

    python -m benchmarks.engine_sglang [--pages N] [--rounds N] [--layout L] [--output FILE]

Runs without a GPU, in the environment of `make test-engines`, which it installs if there is none.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.paired import Row, report
from tests.engines.environment import BUILD, prepare
from tests.engines.sglang.cells import HERE, variables

OURS, ATTACHED, FILE, DICT = "kvstore, zero-copy", "kvstore, attached", "file", "dict"
STEPS = ("write", "write again", "ask", "read")
CONTROLLER_PAGES = 32
LIMIT_S = 900.0


def row(case: str, ours: list[float], other_name: str, theirs: list[float], amount: int) -> Row:
    """Rates of two sides that alternated, and the ratio of each round."""
    ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
    rates = (amount / median(side) for side in (ours, theirs))
    return Row(case, "pages/s", next(rates), other_name, next(rates), median(ratios), min(ratios), len(ours))


def storage_rows(found: list[dict[str, Any]], pages: int) -> list[Row]:
    """Print microseconds a page; and kvstore beside SGLang's files."""
    by_name = {(each["size"], each["side"], each["step"]): each for each in found}
    rows = []
    for size in dict.fromkeys(each["size"] for each in found):
        print(f"\npages of {size}: µs a page by the clock, median (least); of processor time, median (least)")
        print(f"{'':20s}" + "".join(f"{step:>32s}" for step in STEPS))
        for side in (OURS, ATTACHED, FILE, DICT):
            cells = []
            for step in STEPS:
                each = by_name[size, side, step]
                clock, cpu = ([1e6 * seconds / pages for seconds in each[what]] for what in ("clock_s", "cpu_s"))
                cells.append(f"{median(clock):.1f} ({min(clock):.1f}); {median(cpu):.1f} ({min(cpu):.1f})")
            print(f"{side:20s}" + "".join(f"{cell:>32s}" for cell in cells))
        for side in (OURS, ATTACHED):
            for step in STEPS:
                ours, theirs = (by_name[size, each, step]["clock_s"] for each in (side, FILE))
                rows.append(row(f"{size}, {step}, {side}", ours, FILE, theirs, pages))
    return rows


def controller_rows(found: list[dict[str, Any]]) -> list[Row]:
    """Print milliseconds of a prompt; and kvstore beside SGLang's files."""
    by_name = {(each["side"], each["what"]): each["seconds"] for each in found}
    print(f"\nSGLang's controller, {CONTROLLER_PAGES} pages of 512 KiB: ms, median (least)")
    rows = []
    for what in ("save", "cold", "warm"):
        ours, theirs = by_name[OURS, what], by_name[FILE, what]
        for side, seconds in ((OURS, ours), (FILE, theirs)):
            print(f"{what:6s} {side:20s} {1e3 * median(seconds):8.2f} ({1e3 * min(seconds):.2f})")
        rows.append(row(f"controller, {what}", ours, FILE, theirs, CONTROLLER_PAGES))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_sglang", description=__doc__)
    parser.add_argument("--pages", type=int, default=256, help="of a round; a multiple of 128")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layout", default="page_first_direct")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/engine_sglang.json"))
    arguments = parser.parse_args()
    if arguments.pages < 128 or arguments.pages % 128:
        parser.error("--pages is a multiple of 128")
    environment = prepare("sglang", insists=True)
    folder = BUILD / "bench" / "sglang"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = {
        "pages": arguments.pages, "rounds": arguments.rounds, "layout": arguments.layout,
        "controller_pages": CONTROLLER_PAGES, "folder": str(folder / "files"),
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    environment.run(
        HERE / "inside" / "bench.py",
        [str(folder / "plan.json"), str(folder / "results.json")],
        log=folder / "bench.log",
        limit_s=LIMIT_S,
        variables=variables(environment),
    )
    shutil.rmtree(folder / "files", ignore_errors=True)
    found = json.loads((folder / "results.json").read_text())
    rows = storage_rows(found["storages"], arguments.pages) + controller_rows(found["controller"])
    report("SGLang: pages a second", rows, arguments.output)


if __name__ == "__main__":
    main()
