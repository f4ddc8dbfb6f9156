"""The index at a million blocks: match, reserve and commit, bytes per block. `python -m benchmarks.bench_index`.

Records lie in a tier whose slots share one buffer, so that what is measured is the index and not memory.
SGLang's radix tree, which is not installed here, is reported to need 2 to 4 us for 100 blocks of 16 tokens.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.abc import Slot, Tier
from kvstore.bench.rows import machine_and_commit
from kvstore.errors import StaleSlotError
from kvstore.pool import Pool, Prompt, RecordNames
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK_TOKENS = 64
PROMPT_TOKENS = 131_072
BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS


@dataclass(frozen=True)
class Figure:
    """One measurement: the median, and the best of its rounds where there were several."""

    case: str
    unit: str
    median: float
    best: float | None


class SharedTier(Tier):
    """Slots without memory of their own: all see one buffer. Nobody may rely on what is in it."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._next_index = 0
        self._buffer = memoryview(bytearray(1 << 20))

    @property
    def name(self) -> str:
        return "dram"

    @property
    def capacity_bytes(self) -> int:
        return self._capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def quarantined_bytes(self) -> int:
        return 0

    @property
    def supports_views(self) -> bool:
        return True

    def allocate(self, size_bytes: int) -> Slot | None:
        if self._used_bytes + size_bytes > self._capacity_bytes:
            return None
        self._used_bytes += size_bytes
        self._next_index += 1
        return Slot(self._next_index, 0, size_bytes)

    def free(self, slot: Slot) -> None:
        self._used_bytes -= slot.size_bytes

    def pin(self, slot: Slot) -> None:
        if slot.index > self._next_index:
            raise StaleSlotError(f"slot {slot.index} was never allocated")

    def unpin(self, slot: Slot) -> None:
        pass

    def write(self, slot: Slot, data: memoryview, offset: int = 0) -> None:
        pass

    def read(self, slot: Slot, into: memoryview, offset: int = 0) -> None:
        pass

    def view(self, slot: Slot) -> memoryview:
        return self._buffer[: slot.size_bytes]

    def close(self) -> None:
        self._used_bytes = 0


def make_spec(*, has_states: bool) -> ModelSpec:
    heads = (Segment("heads", 2, 1),)
    tensors = tuple(TensorSpec(name, DType.BFLOAT16, heads, (16,), True) for name in ("keys", "values"))
    groups = [CacheGroup("attention", ReuseRule.ATTENTION, (1,), tensors)]
    if has_states:
        state = TensorSpec("recurrent", DType.FLOAT32, heads, (16, 16), False)
        groups.append(CacheGroup("state", ReuseRule.STATE, (0,), (state,)))
    return ModelSpec("benchmark", "random", BLOCK_TOKENS, tuple(groups))


def write(pool: Pool, prompt: Prompt) -> float:
    """Reserve, mark as sealed and commit a whole prompt; seconds of reserving and committing."""
    spec, path = pool.spec, prompt.path
    names = [RecordNames.of_spans(range(len(path)), 0, 1, spec.groups[0].all_units)]
    if spec.state_groups:
        names.append(RecordNames.of_spans([len(path) - 1], 1, 1, spec.groups[1].all_units))
    begin = time.perf_counter()
    transaction = pool.begin(path, RecordNames.join(names), salt=b"", resume_nodes=[len(path) - 1])
    middle = time.perf_counter()
    transaction._is_sealed[:] = True  # sealing writes bytes, which is not what is measured
    sealed = time.perf_counter()
    transaction.commit()
    return middle - begin + time.perf_counter() - sealed


def prompt_of(spec: ModelSpec, seed: int, tokens: int = PROMPT_TOKENS) -> Prompt:
    return Prompt.of(spec, np.random.default_rng(seed).integers(0, 150_000, tokens).astype(np.uint32))


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def median_us(work: Callable[[], object], rounds: int = 200) -> tuple[float, float]:
    """Median and least microseconds of a call."""
    work()
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e6, min(seconds) * 1e6


def measure(blocks: int, *, has_states: bool) -> list[Figure]:
    """Fill a pool with so many blocks and ask it."""
    rows: list[Figure] = []
    kind = "hybrid" if has_states else "dense"

    def note(case: str, unit: str, median: float, best: float | None = None) -> None:
        rows.append(Figure(f"{kind}: {case}", unit, median, best))

    spec = make_spec(has_states=has_states)
    pool = Pool(spec, SharedTier(1 << 44))
    gc.collect()
    before_bytes = resident_bytes()
    seconds = [write(pool, prompt_of(spec, seed)) for seed in range(blocks // BLOCKS)]
    gc.collect()
    counted = pool.statistics()
    stored = counted.nodes
    note("reserve and commit, 2,048 blocks", "ms", statistics.median(seconds) * 1e3, min(seconds) * 1e3)
    note("reserve and commit", "records/s", BLOCKS / statistics.median(seconds), BLOCKS / min(seconds))
    note("index, counted", "bytes/block", counted.index_bytes / stored)
    note("index, allocated", "bytes/block", pool._index.native.allocated_bytes / stored)
    note("process, resident", "bytes/block", (resident_bytes() - before_bytes) / stored)
    known = np.random.default_rng(7).integers(0, 150_000, PROMPT_TOKENS).astype(np.uint32)
    for percent in (0, 50, 100):
        ids = known.copy()
        ids[PROMPT_TOKENS * percent // 100 :] = 1
        if percent == 50 and has_states:
            write(pool, Prompt.of(spec, ids[: PROMPT_TOKENS // 2]))
        prompt = Prompt.of(spec, np.append(ids, np.uint32(1)))
        expected = PROMPT_TOKENS * percent // 100
        assert pool.match(prompt).tokens == expected, (pool.match(prompt).tokens, expected)
        note(f"match, {percent} % hit, {stored:,} blocks", "us", *median_us(partial(pool.match, prompt)))
    others = cycle([Prompt.of(spec, np.append(prompt_of(spec, seed).token_ids, np.uint32(1))) for seed in range(100)])
    note("match, 100 % hit, another prompt each time", "us", *median_us(lambda: pool.match(next(others))))
    everything = Prompt.of(spec, np.append(known, np.uint32(1)))
    note("match, 100 %, and all that it says", "us", *median_us(lambda: read_all(pool.match(everything))))
    match = pool.match(everything)
    assert match.best is not None
    path = match.best.path
    note("hold and release, 2,048 blocks", "us", *median_us(lambda: pool.hold(path).release(), 20))
    fresh = prompt_of(spec, 1 << 20)
    names = RecordNames.of_spans(range(BLOCKS), 0, 1, spec.groups[0].all_units)
    note(
        "reserve and abort, 2,048 blocks",
        "us",
        *median_us(lambda: pool.begin(fresh.path, names, salt=b"").abort("measured"), 20),
    )
    ids = fresh.token_ids
    note("keys from ids, 2,048 blocks", "us", *median_us(lambda: Prompt.of(spec, ids), 20))
    short = prompt_of(spec, 1 << 21, 100 * BLOCK_TOKENS)
    write(pool, short)
    longer = Prompt.of(spec, np.append(short.token_ids, np.uint32(1)))
    note("match of 100 blocks, 100 %", "us", *median_us(lambda: pool.match(longer)))
    pool.check()
    pool.close()
    return rows


def read_all(match: object) -> None:
    """Look at what a match computes only when it is looked at."""
    for name in ("candidates", "missing", "suggested"):
        getattr(match, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/index.json"))
    arguments = parser.parse_args()
    rows: list[Figure] = []
    for has_states in (False, True):
        # Each in a process of its own: what the first has freed would hide what the second takes.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows += process.submit(measure, arguments.blocks, has_states=has_states).result()
    table = Table(title=f"Index, prompts of {PROMPT_TOKENS:,} tokens in blocks of {BLOCK_TOKENS}")
    for column in ("case", "unit", "median", "best"):
        table.add_column(column, justify="left" if column in ("case", "unit") else "right")
    for row in rows:
        table.add_row(row.case, row.unit, f"{row.median:,.1f}", "" if row.best is None else f"{row.best:,.1f}")
    Console().print(table)
    note = "SGLang's radix tree is not installed; it is reported to need 2 to 4 us for 100 blocks of 16 tokens."
    Console().print(note)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {**machine_and_commit(), "rows": [asdict(row) for row in rows], "note": note}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    Console().print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
