"""How long does a long prompt take from the SSD tier into memory, and from memory to where it is durable?

The prompt is one of a named model, by default 16,384 tokens of the Prefill-as-a-Service paper's hybrid of 1T parameters
(465 MB). Ours finds, reserves, reads, verifies every checksum and commits; or writes, syncs and enters the journal. fio
moves as many bytes through one file with the same engine, depth and block size, O_DIRECT, and syncs at the end of a
write. Both sides alternate in one run.

- read, write: whole prompts.
- first layer: a layered read's time until the first layer is there, in seconds, against its last.
- reopen: seconds until a store on everything that was written is open.

    python -m benchmarks.ssd_tier [--directory DIR] [--model NAME] [--tokens N] [--block-tokens N] [--rounds N]
        [--engine NAME ...] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from benchmarks.paired import Absent, Row, report
from kvstore.bench.shapes import BLOCK_TOKENS_DEFAULT, shape
from kvstore.limits import FILE_DEPTH_DEFAULT, FILE_PIECE_BYTES
from kvstore.placement.ssd.options import SsdPlace
from kvstore.spec import ReuseRule
from kvstore.testing.specs import tensors_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvstore.spec import ModelSpec
    from kvstore.store.store import Store

FIO_ENGINES = {"io_uring": "io_uring", "threads": "psync"}
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Setting:
    """What one run compares.

    Attributes:
        directory: on the drive in question.
        engine, depth: how both sides do their I/O.
        spec, tokens: the prompt's.
        rounds: that are counted.
    """

    directory: Path
    engine: str
    depth: int
    spec: ModelSpec
    tokens: int
    rounds: int

    @property
    def prompt_bytes(self) -> int:
        return sum(self.spec.bytes_by_group(self.tokens).values())

    def prompt(self, number: int) -> list[int]:
        """Token ids that share no block with those of another number; one more than is stored."""
        return [number * (self.tokens + 1) + index for index in range(self.tokens + 1)]

    @contextmanager
    def opened(self, prompts: int) -> Iterator[Store]:
        """A store whose SSD tier holds so many prompts, and whose memory little more than two."""
        place = SsdPlace(str(self.directory / "tier"), (prompts + 2) * self.prompt_bytes * 2)
        options = kvstore.SsdOptions((place,), engine=self.engine)
        with kvstore.open(self.spec, dram=int(self.prompt_bytes * 2.5), ssd=options) as store:
            yield store


def put_whole(store: Store, token_ids: list[int], values: dict[tuple[int, str], npt.NDArray[Any]]) -> kvstore.Writer:
    """A writer with everything in place but the commit."""
    spec = store.spec
    tokens = len(token_ids) - 1
    writer = store.write(token_ids[:-1])
    for layer, names in tensors_of(spec, ReuseRule.ATTENTION):
        put_values: dict[str, Any] = {name: values[layer % 2, name] for name in names}
        writer.put(layer, tokens=slice(0, tokens), **put_values)
    for layer, names in tensors_of(spec, ReuseRule.STATE):
        state_values: dict[str, Any] = {name: values[layer % 2, name] for name in names}
        writer.put_state(layer, at=tokens, **state_values)
    return writer


def values_of(spec: ModelSpec, tokens: int) -> dict[tuple[int, str], npt.NDArray[Any]]:
    """Two layers' worth of noise for each tensor: what is written does not compress, and takes little memory here."""
    random = np.random.default_rng(7)
    made: dict[tuple[int, str], npt.NDArray[Any]] = {}
    for group in spec.groups:
        for tensor in group.tensors:
            held = tokens if group.rule is ReuseRule.ATTENTION else group.valid_tokens(1, tokens)
            dims = tensor.shape(tensor.rows, held)
            for parity in (0, 1):
                noise = random.integers(0, 255, int(np.prod(dims)) * tensor.dtype.storage.itemsize, np.uint8)
                made[parity, tensor.name] = noise.view(tensor.dtype.storage).reshape(dims)
    return made


def fio(setting: Setting, file: str, *, writes: bool) -> float:
    """Seconds that fio says the same bytes took."""
    jobs = 1 if setting.engine == "io_uring" else setting.depth
    unit = FILE_PIECE_BYTES * jobs
    size_bytes = -(-setting.prompt_bytes // unit) * unit
    command = [
        "fio",
        "--name=kvstore",
        f"--filename={setting.directory / file}",
        f"--ioengine={FIO_ENGINES[setting.engine]}",
        f"--rw={'write' if writes else 'read'}",
        f"--bs={FILE_PIECE_BYTES}",
        f"--iodepth={setting.depth if setting.engine == 'io_uring' else 1}",
        f"--numjobs={jobs}",
        f"--size={size_bytes // jobs}",
        f"--offset_increment={size_bytes // jobs}",
        "--direct=1",
        "--thread",
        "--group_reporting",
        "--fallocate=none",
        "--output-format=json",
    ]
    if writes:
        (setting.directory / file).unlink(missing_ok=True)
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=DEADLINE_S)
    output = done.stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["write" if writes else "read"]
    moved_s = float(side["runtime"]) / 1000
    if writes:
        begin = time.perf_counter()
        with open(setting.directory / file, "rb") as written:
            os.fdatasync(written)
        moved_s += time.perf_counter() - begin
    return moved_s * setting.prompt_bytes / int(side["io_bytes"])


def measure(setting: Setting) -> tuple[list[Row], list[tuple[str, str]]]:
    """Rows against fio, and lines about what has no counterpart there."""
    values = values_of(setting.spec, setting.tokens)
    rounds = setting.rounds + 1
    writes: list[tuple[float, float]] = []
    reads: list[tuple[float, float]] = []
    layers: list[tuple[float, float]] = []
    opens: list[float] = []
    with setting.opened(rounds) as store:
        for number in range(rounds):
            writer = put_whole(store, setting.prompt(number), values)
            begin = time.perf_counter()
            writer.commit()
            store.flush(DEADLINE_S)
            ours_s = time.perf_counter() - begin
            writes.append((ours_s, fio(setting, "fio-write", writes=True)))
    for number in range(rounds):
        begin = time.perf_counter()
        with setting.opened(rounds) as store:
            opens.append(time.perf_counter() - begin)
            match = store.match(setting.prompt(number))
            if match.tokens != setting.tokens or match.tier != "ssd":
                raise RuntimeError(f"{match.tokens} tokens were found in {match.tier}, not all on the drive")
            begin = time.perf_counter()
            with store.read(match, deadline_s=DEADLINE_S):
                ours_s = time.perf_counter() - begin
            reads.append((ours_s, fio(setting, "fio-write", writes=False)))
            other = store.match(setting.prompt((number + 1) % rounds))
            begin = time.perf_counter()
            with store.read(other, layered=True, deadline_s=DEADLINE_S) as lease:
                moments = []
                for _ in lease:
                    moments.append(time.perf_counter() - begin)
            layers.append((moments[0], moments[-1]))
    gigabytes = setting.prompt_bytes / 1e9
    name = f"fio {FIO_ENGINES[setting.engine]}"
    rows = []
    for case, pairs in (("write and sync", writes[1:]), ("read and verify", reads[1:])):
        ratios = [theirs / ours for ours, theirs in pairs]
        rows.append(
            Row(
                f"{setting.engine}: {case}, {setting.tokens} tokens",
                "GB/s",
                gigabytes / statistics.median(ours for ours, _ in pairs),
                name,
                gigabytes / statistics.median(theirs for _, theirs in pairs),
                statistics.median(ratios),
                min(ratios),
                setting.rounds,
            )
        )
    first, last = (statistics.median(column) for column in zip(*layers[1:], strict=True))
    lines = [
        (f"{setting.engine}: first and last layer", f"{first * 1e3:.0f} ms and {last * 1e3:.0f} ms"),
        (
            f"{setting.engine}: reopen on {rounds * gigabytes:.1f} GB",
            f"{statistics.median(opens) * 1e3:.0f} ms, the arena's {2.5 * gigabytes:.1f} GB of memory included",
        ),
    ]
    return rows, lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=None, help="on the drive in question; default: a temporary one"
    )
    parser.add_argument("--model", default="paper-1t")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--block-tokens", type=int, default=BLOCK_TOKENS_DEFAULT, help="small blocks, small records")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", nargs="+", choices=sorted(FIO_ENGINES), default=sorted(FIO_ENGINES))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/ssd_tier.json"))
    arguments = parser.parse_args()
    if shutil.which("fio") is None:
        parser.error("fio is what this compares with, and it is not installed")
    rows: list[Row] = []
    lines: list[tuple[str, str]] = []
    spec = shape(arguments.model, arguments.block_tokens)
    absent: list[Absent] = []
    for engine in arguments.engine:
        with tempfile.TemporaryDirectory(prefix="kvstore-bench-", dir=arguments.directory) as directory:
            setting = Setting(Path(directory), engine, FILE_DEPTH_DEFAULT, spec, arguments.tokens, arguments.rounds)
            try:
                more, said = measure(setting)
            except kvstore.errors.UnavailableError as error:
                absent.append(Absent(f"our {engine}", str(error)))
                continue
            rows += more
            lines += said
    report(
        f"A prompt of {arguments.model} on the SSD tier, against fio with the same engine, block size and depth",
        rows,
        arguments.output,
        absent,
    )
    for what, said_of_it in lines:
        print(f"{what}: {said_of_it}")


if __name__ == "__main__":
    main()
