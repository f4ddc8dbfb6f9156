"""How long an SSD directory takes to be there again: `python -m benchmarks.ssd_recovery`.

A directory is made with the journal that 100 GB of records leave, one append per prompt of 256 blocks. Its segments are
sparse files with their heads and tails, since of a segment recovery reads nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from kvstore.bench.rows import machine_and_commit
from kvstore.clock import Deadline
from kvstore.keys import KEY_BYTES, root_key
from kvstore.limits import KIB, MIB
from kvstore.record import RecordLayout, record_layout
from kvstore.spec import CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.directory import SsdDirectory
from kvstore.tiers.ssd.finding import find, own_manifest
from kvstore.tiers.ssd.footer import SegmentStamp, head_bytes, pack_head, pack_tail
from kvstore.tiers.ssd.frame import FrameKind
from kvstore.tiers.ssd.names import FileName
from kvstore.tiers.ssd.opening import ensure_made, find_and_settle
from kvstore.tiers.ssd.rows import NodeRows, RecordRows, TailIds
from kvstore.tiers.ssd.tables import pack_tables

BLOCK_TOKENS = 64
PROMPT_BLOCKS = 256
CORPUS_BYTES = 100_000_000_000
SEGMENTS = 256
WAIT_S = 600.0


@dataclass(frozen=True)
class Figure:
    """One directory: what it holds, and the median time from nothing to its rows, and to the whole `open`."""

    record_bytes: int
    records: int
    segments: int
    journal_bytes: int
    find_s: float
    open_s: float
    find_s_per_million: float


def spec_of(record_bytes: int) -> ModelSpec:
    """One layer, whose records take a header more than so many bytes."""
    width = record_bytes // 2 // BLOCK_TOKENS // 2
    heads = (Segment("heads", 1, 1),)
    tensors = tuple(TensorSpec(name, DType.BFLOAT16, heads, (width,), True) for name in ("keys", "values"))
    return ModelSpec("benchmark", "none", BLOCK_TOKENS, (CacheGroup("attention", ReuseRule.ATTENTION, (0,), tensors),))


def fill(path: str, spec: ModelSpec, records: int) -> None:
    """Make the directory."""
    layout = record_layout(spec, 0, 0, spec.groups[0].all_units)
    generator = np.random.default_rng(7)
    with closing(DirectFiles(path)) as files:
        finding, journal = find_and_settle(files, ensure_made(files, spec), is_alone=True)
        per_segment = -(-records // SEGMENTS // PROMPT_BLOCKS) * PROMPT_BLOCKS
        deadline = Deadline.after(WAIT_S)
        for number, first in enumerate(range(0, records, per_segment), 1):
            count = min(per_segment, records - first)
            nonce = make_segment(path, layout, finding.manifest.directory_id, number, count)
            named = {number: (nonce, (0, 0, 0, spec.groups[0].unit_count))}
            for at in range(0, count, PROMPT_BLOCKS):
                nodes, rows = prompt(generator, spec, layout, min(PROMPT_BLOCKS, count - at), number, at)
                journal.add(pack_tables(nodes, rows, (), named), FrameKind.BATCH, number + 1, deadline)
        journal.sync(deadline)
        files.sync_names()


def make_segment(path: str, layout: RecordLayout, directory_id: bytes, number: int, count: int) -> int:
    """A sparse file with head and tail; its nonce."""
    name = FileName(number, int.from_bytes(os.urandom(8), "little"), is_journal=False)
    stamp = SegmentStamp(directory_id, number, name.nonce)
    offsets = head_bytes(layout) + np.arange(count, dtype=np.uint64) * np.uint64(layout.slot_bytes)
    end = int(offsets[-1]) + layout.slot_bytes
    with (Path(path) / str(name)).open("wb") as file:
        file.write(pack_head(layout, stamp).tobytes())
        file.seek(end)
        file.write(pack_tail(layout, stamp, offsets, end).tobytes())
    return name.nonce


def prompt(
    generator: np.random.Generator, spec: ModelSpec, layout: RecordLayout, blocks: int, segment: int, first: int
) -> tuple[NodeRows, RecordRows]:
    """The rows of one append."""
    root = root_key(spec.fingerprint)
    keys = generator.integers(0, 256, (blocks, KEY_BYTES), np.uint8)
    parents = np.concatenate([np.frombuffer(root, np.uint8).reshape(1, -1), keys[:-1]])
    ends = (np.arange(blocks, dtype=np.uint32) + 1) * np.uint32(BLOCK_TOKENS)
    tails = TailIds(np.empty(0, np.uint32), np.zeros(blocks, np.int64))
    nodes = NodeRows(keys, parents, ends, tails, np.zeros(blocks, np.int32), ((root, b""),))
    place = np.empty((blocks, 3), np.uint64)
    place[:, 0] = segment
    place[:, 1] = head_bytes(layout) + (first + np.arange(blocks)) * layout.slot_bytes
    place[:, 2] = layout.slot_bytes
    name = np.tile(np.array([0, 0, 0, spec.groups[0].unit_count], np.uint16), (blocks, 1))
    zeros = np.zeros(blocks, np.int32)
    rows = RecordRows(
        np.arange(blocks, dtype=np.int32), name, zeros, (bytes(KEY_BYTES),), zeros.astype(np.uint64), place,
        generator.integers(0, 1 << 32, blocks, np.uint32),
    )  # fmt: skip
    return nodes, rows


def measure(record_bytes: int, records: int, rounds: int, folder: Path) -> Figure:
    """Fill a directory, then find out several times what it holds."""
    spec = spec_of(record_bytes)
    with tempfile.TemporaryDirectory(dir=folder) as path:
        fill(path, spec, records)
        journal_bytes = sum(each.stat().st_size for each in Path(path).glob("journal-*"))
        find_s, open_s = [], []
        for _ in range(rounds):
            with closing(DirectFiles(path)) as files:
                begin_s = time.perf_counter()
                manifest = own_manifest(files, spec)
                assert manifest is not None
                finding = find(files, manifest)
                find_s.append(time.perf_counter() - begin_s)
                assert len(finding.records) == records, finding.losses
                segments = len(finding.segments)
            begin_s = time.perf_counter()
            SsdDirectory.open(DirectFiles(path), spec, capacity_bytes=CORPUS_BYTES).close()
            open_s.append(time.perf_counter() - begin_s)
    median_s = statistics.median(find_s)
    per_million_s = median_s / records * 1e6
    return Figure(record_bytes, records, segments, journal_bytes, median_s, statistics.median(open_s), per_million_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build"))
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/ssd_recovery.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    cases = [(1 * MIB, CORPUS_BYTES // MIB), (128 * KIB, CORPUS_BYTES // (128 * KIB)), (128 * KIB, 1_000_000)]
    figures = [measure(size, records, arguments.rounds, arguments.folder) for size, records in cases]
    table = Table(title="An SSD directory that is opened again")
    for column in ("record", "records", "segments", "journal MB", "rows found, s", "opened, s", "s per million"):
        table.add_column(column, justify="right")
    for each in figures:
        table.add_row(
            f"{each.record_bytes // KIB:,} KiB", f"{each.records:,}", f"{each.segments}",
            f"{each.journal_bytes / 1e6:.1f}", f"{each.find_s:.2f}", f"{each.open_s:.2f}",
            f"{each.find_s_per_million:.2f}",
        )  # fmt: skip
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    document = {**machine_and_commit(), "rows": [asdict(each) for each in figures]}
    arguments.output.write_text(json.dumps(document, indent=2) + "\n")
    Console().print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
