"""kvstore below SGLang's controller, and SGLang's own file backend there: time to save pages and to read them back.

Both are driven by SGLang's HiCacheController on CPU tensors, in one process and in turn, with pages of 512 KiB. `save`:
from the host pool into the backend; `read`: back into other slots, checked against what was saved; `miss`: asking for a
prompt that is not there, which is what a cold request pays. The file backend writes to the page cache and checks
nothing; kvstore's records lie in shared memory, with checksums that are checked when they are read.

    python -m benchmarks.engine_sglang [--pages N] [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from pathlib import Path

from benchmarks.paired import Row, report
from tests.engines.environment import BUILD, prepare
from tests.engines.sglang.cells import HERE, variables

SHAPE = (16, 8, 64)
"""Layers, heads, elements of a head: pages of 16 tokens have 512 KiB."""
INTERFACES = ("generic", "zero-copy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_sglang", description=__doc__)
    parser.add_argument("--pages", type=int, default=32, help="of a prompt; 60 at most")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/engine_sglang.json"))
    arguments = parser.parse_args()
    environment = prepare("sglang", insists=True)
    folder = BUILD / "bench" / "sglang"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "files").mkdir(parents=True)
    backend = {
        "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache",
        "weights": "benchmark", "dram": "1GiB",
    }  # fmt: skip
    extra = {"generic": backend, "zero-copy": backend | {"interface_v1": 1}}
    plan = {"extra": extra, "files": str(folder / "files"), "shape": SHAPE, "pages": arguments.pages}
    (folder / "plan.json").write_text(json.dumps(plan | {"rounds": arguments.rounds}))
    environment.run(
        HERE / "inside" / "bench.py",
        [str(folder / "plan.json"), str(folder / "results.json")],
        log=folder / "bench.log",
        limit_s=580.0,
        variables=variables(environment),
    )
    found = json.loads((folder / "results.json").read_text())
    seconds = {(each["backend"], each["interface"], each["what"]): each["seconds"] for each in found}
    rows = []
    for interface in INTERFACES:
        for what in ("save", "read", "miss"):
            ours, theirs = seconds["kvstore", interface, what], seconds["file", "generic", what]
            ratios = [other / mine for mine, other in zip(ours, theirs, strict=True)]
            rates = [arguments.pages / statistics.median(side) for side in (ours, theirs)]
            ratio = statistics.median(ratios)
            rows.append(
                Row(f"{what}, {interface}", "pages/s", rates[0], "file", rates[1], ratio, min(ratios), len(ours))
            )
            each_us = [1e6 * statistics.median(side) / arguments.pages for side in (ours, theirs)]
            print(f"{what}, {interface}: {each_us[0]:.0f} us a page with kvstore, {each_us[1]:.0f} with files")
    report("SGLang's controller: pages a second", rows, arguments.output)


if __name__ == "__main__":
    main()
