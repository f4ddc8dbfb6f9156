"""How close to memcpy is moving a model's KV into records and back?

Each row compares with memcpy of the same number of bytes by the same number of threads, alternately in one run. Both
sides write into memory that has been written before, so no side pays for page faults, and the working set of each is
larger than the last-level cache. Sources and destinations are whole layers `[heads, tokens, dim]`; a piece is one head
of one block.

- gather: layers into reserved records; with CRC32C: and the checksum of each piece beside it.
- write: `Store.write`, all puts with their checks, plans, checksums and framing, commit, and the eviction that makes
  room for the next round.
- scatter: `Lease.layer(n).copy_to`; with CRC32C: the same bytes checksummed on the way and compared with the records'.

    python -m benchmarks.gather_vs_memcpy [--rounds N] [--mebibytes N] [--pieces KIB ...] [--output FILE]
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

import kvstore
from benchmarks.paired import Row, compare, report
from kvstore._native import copy_rows, copy_rows_crc32c, cpu_features
from kvstore.record.array_view import view_array
from kvstore.record.copy import CHECKSUM_BYTES, join_plans, row_steps, token_plan
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.store.fill import spans_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvstore.store import Lease, Store, Writer

HEADS = 8
CHUNK_TOKENS = 2048
TENSORS = ("keys", "values")


def spec_of(piece_bytes: int, layers: int) -> ModelSpec:
    """Dense attention whose pieces (one head of one block) have a size."""
    block_tokens = 64 if piece_bytes <= 256 << 10 else 256
    segments = (Segment("heads", HEADS, 1),)
    inner = (piece_bytes // block_tokens // 4,)
    tensors = tuple(TensorSpec(name, DType.FLOAT32, segments, inner, True) for name in TENSORS)
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(layers)), tensors)
    return ModelSpec("benchmark", "random", block_tokens, (group,))


class Workload:
    """A prompt's cache of about `total_bytes`, whose pieces have a size."""

    def __init__(self, piece_bytes: int, total_bytes: int) -> None:
        token_bytes = len(TENSORS) * HEADS * piece_bytes // spec_of(piece_bytes, 1).block_tokens
        block_tokens = spec_of(piece_bytes, 1).block_tokens
        self.tokens = min(CHUNK_TOKENS, max(block_tokens, (64 << 20) // token_bytes))
        self.layers = max(1, total_bytes // (token_bytes * self.tokens))
        self.spec = spec_of(piece_bytes, self.layers)
        self.size_bytes = token_bytes * self.tokens * self.layers
        self.token_ids = np.arange(self.tokens)
        generator = np.random.default_rng(1)
        shape = (HEADS, self.tokens, token_bytes // (len(TENSORS) * HEADS * 4))
        self.arrays: list[dict[str, Any]] = [
            {name: generator.random(shape, dtype=np.float32) for name in TENSORS} for _ in range(self.layers)
        ]
        self._source = np.ones(self.size_bytes, np.uint8)
        self._target = np.ones(self.size_bytes, np.uint8)

    def memcpy(self, pool: ThreadPoolExecutor, threads: int) -> Callable[[], None]:
        """One memcpy for each thread, each of its share of the bytes."""
        edges = [self.size_bytes * part // threads for part in range(threads + 1)]
        shares = [(self._target[begin:end], self._source[begin:end]) for begin, end in pairwise(edges)]

        def run() -> None:
            waiting = [pool.submit(np.copyto, *share) for share in shares[1:]]
            np.copyto(*shares[0])
            for share in waiting:
                share.result()

        return run

    def put(self, writer: Writer) -> None:
        for layer, tensors in enumerate(self.arrays):
            writer.put(layer, tokens=slice(0, self.tokens), **tensors)

    def gather_plans(self, writer: Writer) -> list[npt.NDArray[np.uint64]]:
        """What `put` copies, a plan for each layer."""
        spans = spans_of(writer.transaction, {})
        plans = []
        for span_number, layers in enumerate(span.layers for span in self.spec.spans[0]):
            (span,) = spans[0, span_number]
            nodes = span.reserved(0, len(span.index))
            counts = np.full(len(nodes), self.spec.block_tokens)
            for layer in layers:
                tensors = [
                    token_plan(
                        span.layout, layer, tensor, WHOLE, view_array(array, DType.FLOAT32, "source"),
                        span.address[nodes], np.zeros_like(nodes), nodes * self.spec.block_tokens, counts,
                        checksums=span.checksum_columns(nodes),
                    )
                    for tensor, array in enumerate(self.arrays[layer].values())
                ]  # fmt: skip
                plans.append(join_plans(tensors, 7))
        return plans

    def scatter_plans(self, lease: Lease) -> tuple[list[npt.NDArray[np.uint64]], list[npt.NDArray[np.uint32]]]:
        """What `copy_to` copies, with a place for the checksum of each piece; and what the records say these are."""
        plans = []
        stored = []
        block = self.spec.block_tokens
        records = {
            span.index: [held for held in lease.records if held.name.span == span.index] for span in self.spec.spans[0]
        }
        for span in self.spec.spans[0]:
            held = records[span.index]
            layout = held[0].layout
            nodes = np.array([record.name.node for record in held])
            addresses = np.array([np.frombuffer(record.memory, np.uint8).ctypes.data for record in held], np.uint64)
            columns = np.array([layout.checksums(record.memory) for record in held])
            for layer in span.layers:
                for tensor, array in enumerate(self.arrays[layer].values()):
                    view = view_array(array, DType.FLOAT32, "destination")
                    counts = np.full(len(nodes), block)
                    plan = token_plan(
                        layout, layer, tensor, WHOLE, view, addresses, np.zeros_like(nodes), nodes * block, counts
                    )
                    pieces = row_steps(layout, layer, tensor, WHOLE).pieces
                    stored.append(columns[:, pieces].ravel())
                    places = np.zeros((len(plan), 1), np.uint64)
                    plans.append(np.hstack([plan, places]))
        return plans, stored


@contextmanager
def copies_on(threads: int) -> Iterator[None]:
    """The store copies with at most so many threads."""
    with mock.patch("kvstore.record.threads.THREADS_ALLOWED", threads):
        yield


def measure(piece_bytes: int, total_bytes: int, rounds: int) -> list[Row]:
    work = Workload(piece_bytes, total_bytes)
    rows: list[Row] = []
    capacity = work.size_bytes + work.size_bytes // 4 + (64 << 20)
    with ThreadPoolExecutor(1) as pool, kvstore.open(work.spec, dram=capacity) as store:
        for threads in (1, 2):
            with copies_on(threads):

                def row(name: str, run: Callable[[], None], threads: int = threads) -> None:
                    case = f"{name}, {piece_bytes >> 10} KiB pieces, {threads} thread{'s' * (threads > 1)}"
                    baseline = work.memcpy(pool, threads)
                    rows.append(compare(case, work.size_bytes / 1e9, "GB/s", run, "memcpy", baseline, rounds=rounds))

                _measure_gather(work, store, threads, row)
                _measure_write(work, store, row)
                _measure_scatter(work, store, threads, row)
    return rows


def _measure_gather(work: Workload, store: Store, threads: int, row: Callable[[str, Callable[[], None]], None]) -> None:
    with store.write(work.token_ids) as writer:
        plans = work.gather_plans(writer)
        bare = [np.ascontiguousarray(plan[:, :6]) for plan in plans]

        def gather() -> None:
            for plan in bare:
                copy_rows(plan, threads=threads)

        def gather_and_checksum() -> None:
            for plan in plans:
                copy_rows_crc32c(plan, threads=threads)

        row("gather", gather)
        row("gather + CRC32C", gather_and_checksum)


def _measure_write(work: Workload, store: Store, row: Callable[[str, Callable[[], None]], None]) -> None:
    def write() -> None:
        with store.write(work.token_ids) as writer:
            work.put(writer)
            writer.commit()
        store.pool.evict(store.prompt(work.token_ids).path.keys[0])

    row("write: put + framing + commit + evict", write)


def _measure_scatter(
    work: Workload, store: Store, threads: int, row: Callable[[str, Callable[[], None]], None]
) -> None:
    with store.write(work.token_ids) as writer:
        work.put(writer)
        writer.commit()
    with store.read(store.match(np.append(work.token_ids, 0))) as lease:

        def scatter() -> None:
            for layer, tensors in enumerate(work.arrays):
                lease.layer(layer).copy_to(**tensors)

        row("scatter", scatter)
        plans, stored = work.scatter_plans(lease)
        found = [np.zeros(len(checksums), np.uint32) for checksums in stored]
        for plan, checksums in zip(plans, found, strict=True):
            plan[:, 6] = checksums.ctypes.data + CHECKSUM_BYTES * np.arange(len(plan))

        def scatter_and_verify() -> None:
            for plan, checksums, expected in zip(plans, found, stored, strict=True):
                copy_rows_crc32c(plan, threads=threads)
                if not np.array_equal(checksums, expected):
                    raise AssertionError("a record does not hold what its checksums say")

        row("scatter + CRC32C", scatter_and_verify)
    store.pool.evict(store.prompt(work.token_ids).path.keys[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mebibytes", type=int, default=256, help="working set of each side")
    parser.add_argument("--pieces", type=int, nargs="+", default=[16, 32, 64, 128, 1024], help="KiB")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gather_vs_memcpy.json"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    for piece_kib in arguments.pieces:
        rows += measure(piece_kib << 10, arguments.mebibytes << 20, arguments.rounds)
    features = cpu_features()
    paths = f"copy {features['copy']}, CRC32C {features['crc32c']}, fused: {features['copy_is_fused']}"
    report(f"Gather into records and back, against memcpy of the same bytes ({paths})", rows, arguments.output)


if __name__ == "__main__":
    main()
