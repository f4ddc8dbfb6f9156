"""How close to fio do the engines of the SSD tier come, with the same engine, block size and depth?

Both sides move the same blocks of one file with O_DIRECT, alternately in one run: every block once, in random order,
without a sync. fio's time is the one that it reports, so neither side pays for starting. Ours goes into 256 MiB of
memory, fio's into as much as its depth, both advised to be huge pages unless `--small-pages` is given: a drive moves
more parts where pages are scattered. fio's threads have a block each, too little for a huge page.

- read, write: each block is an operation.
- records of 8 MiB: 8 MiB operations of ours, which are begun in pieces, against fio with the pieces' size.
- threads against io_uring: the same with our two engines.

    python -m benchmarks.ssd_io [--directory DIR] [--mebibytes N] [--depth N ...] [--rounds N] [--small-pages]
        [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import ExitStack, closing
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.paired import Absent, Row, report
from kvstore._native import file_engines
from kvstore.abc.files import FileOperation
from kvstore.clock import Deadline
from kvstore.limits import FILE_PIECE_BYTES
from kvstore.tiers.ssd.direct_files import DirectFiles

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

FILE_NAME = "kvstore-bench-ssd"
MEMORY_BYTES = 256 << 20
BLOCKS_KIB = (64, 1024)
RECORD_KIB = 8192
ROUND_S = 300.0
FIO_ENGINES = {"io_uring": "io_uring", "threads": "psync"}


class Ours:
    """One of our engines on the file."""

    def __init__(self, directory: str, engine: str, depth: int, size_bytes: int, has_small_pages: bool) -> None:
        self._files = DirectFiles(directory, engine=engine, depth=depth)
        self._file = self._files.open(FILE_NAME, may_write=True)
        self._size_bytes = size_bytes
        self._memory = mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.madvise(mmap.MADV_NOHUGEPAGE if has_small_pages else mmap.MADV_HUGEPAGE)
        self._base = int(np.frombuffer(self._memory, np.uint8).ctypes.data)
        # Every page exists, so that no side pays for page faults.
        np.frombuffer(self._memory, np.uint8)[:: mmap.PAGESIZE] = 1

    def close(self) -> None:
        self._files.close()

    def seconds(self, kind: FileOperation, block_bytes: int, seed: int) -> float:
        """Every block of the file once, in random order."""
        rows = self._rows(kind, block_bytes, seed)
        begin = time.perf_counter()
        self._run(rows)
        return time.perf_counter() - begin

    def _rows(self, kind: FileOperation, block_bytes: int, seed: int) -> npt.NDArray[np.uint64]:
        blocks = self._size_bytes // block_bytes
        rows = np.zeros((blocks, 5), np.uint64)
        rows[:, 0] = kind
        rows[:, 1] = self._file
        rows[:, 2] = np.random.default_rng(seed).permutation(blocks) * block_bytes
        rows[:, 3] = self._base + np.arange(blocks) * block_bytes % MEMORY_BYTES
        rows[:, 4] = block_bytes
        return rows

    def _run(self, rows: npt.NDArray[np.uint64]) -> None:
        batch = self._files.submit(rows)
        batch.wait(len(rows), Deadline.after(ROUND_S))
        for error in batch.errors().values():
            raise error


def fio_seconds(
    directory: str,
    engine: str,
    depth: int,
    kind: FileOperation,
    block_bytes: int,
    size_bytes: int,
    has_small_pages: bool,
    _seed: int,
) -> float:
    """The same by fio: one job with a queue, or as many jobs as the depth."""
    is_read = kind is FileOperation.READ
    jobs = 1 if engine == "io_uring" else depth
    command = [
        "fio",
        "--name=kvstore",
        f"--filename={directory}/{FILE_NAME}",
        f"--ioengine={FIO_ENGINES[engine]}",
        f"--rw={'randread' if is_read else 'randwrite'}",
        f"--bs={block_bytes}",
        f"--iodepth={depth if engine == 'io_uring' else 1}",
        f"--numjobs={jobs}",
        f"--size={size_bytes // jobs}",
        f"--offset_increment={size_bytes // jobs}",
        "--direct=1",
        "--thread",
        "--group_reporting",
        "--allow_file_create=0",
        "--randrepeat=0",
        "--output-format=json",
    ]
    # fio 3.33 has no option of its own for it; its C library has.
    environment = {**os.environ, "GLIBC_TUNABLES": f"glibc.malloc.hugetlb={0 if has_small_pages else 1}"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=ROUND_S, env=environment)
    output = done.stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["read" if is_read else "write"]
    if side["io_bytes"] != size_bytes:
        raise RuntimeError(f"fio moved {side['io_bytes']} bytes instead of {size_bytes}")
    return float(side["runtime"]) / 1000


def alternate(
    case: str, gigabytes: float, ours: Callable[[int], float], name: str, theirs: Callable[[int], float], rounds: int
) -> Row:
    """Both sides in turn, after one round that is not counted."""
    pairs = [(ours(number), theirs(number)) for number in range(rounds + 1)][1:]
    ratios = [their_s / our_s for our_s, their_s in pairs]
    return Row(
        case,
        "GB/s",
        gigabytes / statistics.median(our_s for our_s, _ in pairs),
        name,
        gigabytes / statistics.median(their_s for _, their_s in pairs),
        statistics.median(ratios),
        min(ratios),
        rounds,
    )


def measure(
    directory: str, size_bytes: int, depth: int, rounds: int, has_small_pages: bool
) -> tuple[list[Row], list[Absent]]:
    """All rows of one depth."""
    missing = dict(file_engines(depth))
    absent = [Absent(f"our {engine}, depth {depth}", why) for engine, why in missing.items() if why]
    if shutil.which("fio") is None:
        absent.append(Absent("fio", "it is not installed"))
    rows: list[Row] = []
    with ExitStack() as opened:
        sides = {
            engine: opened.enter_context(closing(Ours(directory, engine, depth, size_bytes, has_small_pages)))
            for engine, why in missing.items()
            if not why
        }
        for kind, kib in product((FileOperation.READ, FileOperation.WRITE), (*BLOCKS_KIB, RECORD_KIB)):
            case = f"{kind.name.lower()} {kib} KiB, depth {depth}"
            ours = {engine: partial(side.seconds, kind, kib << 10) for engine, side in sides.items()}
            for engine in sides if shutil.which("fio") else ():
                fio_block = min(kib << 10, FILE_PIECE_BYTES)
                theirs = partial(fio_seconds, directory, engine, depth, kind, fio_block, size_bytes, has_small_pages)
                name = f"fio {FIO_ENGINES[engine]}"
                rows.append(alternate(f"{engine}: {case}", size_bytes / 1e9, ours[engine], name, theirs, rounds))
            if len(ours) == 2:
                both = (ours["threads"], "our io_uring", ours["io_uring"])
                rows.append(alternate(f"threads: {case}", size_bytes / 1e9, *both, rounds))
    return rows, absent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=None, help="on the drive in question; default: a temporary one"
    )
    parser.add_argument("--mebibytes", type=int, default=1024, help="size of the file, a multiple of 8 x the depth")
    parser.add_argument("--depth", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small-pages", action="store_true", help="memory of both sides in pages of 4 KiB")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/ssd_io.json"))
    arguments = parser.parse_args()
    size_bytes = arguments.mebibytes << 20
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=arguments.directory) as directory:
        # Written once, so that no block is a hole and no write allocates.
        with open(Path(directory) / FILE_NAME, "wb") as file:
            noise = np.random.default_rng(1).integers(0, 256, 8 << 20, np.uint8).tobytes()
            for _ in range(size_bytes // len(noise)):
                file.write(noise)
        rows: list[Row] = []
        absent: list[Absent] = []
        for depth in arguments.depth:
            more, lacking = measure(directory, size_bytes, depth, arguments.rounds, arguments.small_pages)
            rows += more
            absent += lacking
    report(
        "File I/O of the SSD tier, against fio with the same engine, block size and depth",
        rows,
        arguments.output,
        absent,
    )


if __name__ == "__main__":
    main()
