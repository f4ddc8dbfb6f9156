"""Plans of puts and reads: what they copy, in which order, with which checksums, on how many threads."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore._native import copy_rows, copy_rows_crc32c, crc32c
from kvstore.limits import COPY_BYTES_PER_THREAD_MIN, COPY_THREADS_DEFAULT, COPY_THREADS_MAX
from kvstore.record import Record, RecordLayout, record_layout
from kvstore.record import threads as threads_module
from kvstore.record.array_view import view_array
from kvstore.record.copy import token_plan
from kvstore.record.threads import copy_threads, threads_allowed
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec, UnitRange
from kvstore.store import open_store
from kvstore.testing.specs import check_lease, hybrid, put_states, put_tokens

if TYPE_CHECKING:
    import numpy.typing as npt

B = 4
ROWS = 6
WIDTH = 5


def layout_of(unit_rows: int) -> RecordLayout:
    """One layer, one tensor of six rows in pieces of `unit_rows`."""
    tensor = TensorSpec("keys", DType.FLOAT32, (Segment("heads", ROWS // unit_rows, unit_rows),), (WIDTH,), True)
    spec = ModelSpec("test", "random", B, (CacheGroup("attention", ReuseRule.ATTENTION, (0,), (tensor,)),))
    return record_layout(spec, 0, 0, UnitRange(0, ROWS // unit_rows))


def tensor_of(tokens: int, *, tokens_first: bool) -> npt.NDArray[np.float32]:
    """Values `[rows, tokens, inner]`; in memory either rows or tokens come first."""
    values = np.random.default_rng(tokens).random((ROWS, tokens, WIDTH), dtype=np.float32)
    return np.ascontiguousarray(values.transpose(1, 0, 2)).transpose(1, 0, 2) if tokens_first else values


@pytest.mark.parametrize("unit_rows", [1, 2, 6])
@pytest.mark.parametrize("tokens_first", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_records_and_checksums_of_a_gather(unit_rows: int, tokens_first: bool, threads: int) -> None:
    layout = layout_of(unit_rows)
    blocks = 7
    values = tensor_of(blocks * B, tokens_first=tokens_first)
    memory = [np.full(layout.record_bytes, 0xEE, np.uint8) for _ in range(blocks)]
    addresses = np.array([record.ctypes.data for record in memory], np.uint64)
    zeros = np.zeros(blocks, np.int64)
    counts = np.full(blocks, B)
    columns = addresses + np.uint64(layout.checksum_offset)
    columns[3] = 0
    view = view_array(values, DType.FLOAT32, "values")
    plan = token_plan(
        layout, 0, 0, WHOLE, view, addresses, zeros, np.arange(blocks) * B, counts, checksums=columns
    )  # fmt: skip
    copy_rows_crc32c(plan, threads=threads)
    for block, found in enumerate(memory):
        record = Record(layout, found.data)
        assert np.array_equal(record.tensor(0, "keys"), values[:, block * B : (block + 1) * B])
        if block == 3:
            assert set(record.checksums.tobytes()) == {0xEE}
        else:
            pieces = range(len(layout.pieces))
            assert record.checksums.tolist() == [crc32c(record.piece(piece)) for piece in pieces]

    again = np.zeros_like(values)
    into = view_array(again, DType.FLOAT32, "values")
    copy_rows(token_plan(layout, 0, 0, WHOLE, into, addresses, zeros, np.arange(blocks) * B, counts), threads=threads)
    assert np.array_equal(again, values)


def test_a_gather_reads_its_source_in_order() -> None:
    """Heads outermost in the source, blocks outermost in the destination: reading in order is the faster one."""
    layout = layout_of(1)
    values = tensor_of(8 * B, tokens_first=False)
    view = view_array(values, DType.FLOAT32, "values")
    addresses = np.arange(1, 9, dtype=np.uint64) * np.uint64(1 << 20)
    zeros = np.zeros(8, np.int64)
    plan = token_plan(
        layout, 0, 0, WHOLE, view, addresses, zeros, np.arange(8) * B, np.full(8, B), checksums=addresses
    )  # fmt: skip
    assert (np.diff(plan[:, 1].astype(np.int64)) > 0).all()


@pytest.mark.parametrize("seed", range(6))
def test_pieces_filled_by_one_put_or_by_several(seed: int) -> None:
    """Blocks that one put fills are checksummed with the copy, the others where they lie; all of them hold."""
    random = np.random.default_rng(seed)
    ids = list(range(100, 170))
    with open_store(hybrid(16), dram="4MiB") as store:
        with store.write(ids) as writer:
            for layer in (1, 3):
                edges = [0, *sorted(random.choice(np.arange(1, 70), int(random.integers(0, 12)), replace=False)), 70]
                ranges = list(pairwise(edges))
                for number in random.permutation(len(ranges)):
                    put_tokens(writer, int(ranges[number][0]), int(ranges[number][1]), layer=layer)
            put_states(writer, 70)
            writer.commit()
        with store.read(store.match([*ids, 1]), verify=True) as lease:
            assert lease.tokens == 70
            check_lease(lease, writer.prompt)


def test_threads_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(threads_module, "THREADS_ALLOWED", 3)
    sizes = [0, COPY_BYTES_PER_THREAD_MIN, 2 * COPY_BYTES_PER_THREAD_MIN - 1]
    assert [copy_threads(size) for size in sizes] == [1, 1, 1]
    assert copy_threads(2 * COPY_BYTES_PER_THREAD_MIN) == 2
    assert copy_threads(100 * COPY_BYTES_PER_THREAD_MIN) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert copy_threads(100 * COPY_BYTES_PER_THREAD_MIN) == 1


def test_threads_allowed() -> None:
    assert threads_allowed("") == COPY_THREADS_DEFAULT
    assert [threads_allowed(text) for text in ("1", "2", str(COPY_THREADS_MAX))] == [1, 2, COPY_THREADS_MAX]
    for wrong in ("0", "-1", "two", "1.5", str(COPY_THREADS_MAX + 1)):
        with pytest.raises(ImportError, match=f"KVSTORE_COPY_THREADS={wrong} is no number of threads; set it to 1 to"):
            threads_allowed(wrong)


def test_the_environment_sets_the_threads() -> None:
    environment = dict(os.environ, KVSTORE_COPY_THREADS="7", PYTHONPATH=os.pathsep.join(sys.path))
    code = "from kvstore.record.threads import THREADS_ALLOWED; print(THREADS_ALLOWED)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (run.stdout, run.stderr) == ("7\n", "")
