"""Rows of an engine's host memory in a store, without an engine: jobs, damage, a store that goes and comes again."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.adapters.vllm.rows import JobEnd, RowJobs, Rows, split_key
from kvstore.adapters.vllm.tier_config import TierConfig
from kvstore.adapters.vllm.tier_store import TierStore
from kvstore.attached.pool import AttachedPool
from kvstore.errors import ConfigError, DeadlineError
from kvstore.foreign import ForeignNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROW_BYTES = 16 * 1024
ROW_COUNT = 32
LIMIT_S = 30.0


@pytest.fixture
def memory() -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (ROW_COUNT, ROW_BYTES), dtype=np.uint8)


def namespace() -> ForeignNamespace:
    groups = (("0", ROW_BYTES), ("1", ROW_BYTES))
    return ForeignNamespace("tiny", "random", "vllm", "0.32.0", "sha256", b"root", groups)


def key(block: int, group: int = 0) -> bytes:
    return block.to_bytes(32, "big") + group.to_bytes(4, "big")


def jobs_of(source: TierStore, memory: np.ndarray) -> RowJobs:
    return RowJobs(source, Rows(memory.ctypes.data, ROW_BYTES, ROW_COUNT), load_deadline_s=LIMIT_S)


@pytest.fixture
def source() -> Iterator[TierStore]:
    opened = TierStore(TierConfig(weights="random", dram="8MiB"), namespace())
    yield opened
    opened.close()


def ended(jobs: RowJobs) -> list[JobEnd]:
    """How all jobs ended."""
    jobs.drain(LIMIT_S)
    ends = jobs.finished()
    assert not len(jobs)
    return ends


def until(holds: Callable[[], Any]) -> None:
    limit_s = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < limit_s
        time.sleep(0.005)


def test_a_key_says_its_group() -> None:
    assert split_key(key(5, 3)) == ("3", (5).to_bytes(32, "big"))


def test_rows_come_back_to_other_places(source: TierStore, memory: np.ndarray) -> None:
    jobs = jobs_of(source, memory)
    keys = [key(number, number % 2) for number in range(4)]
    jobs.begin(1, keys, [0, 1, 2, 3], is_load=False)
    (stored,) = ended(jobs)
    assert (stored.job_id, stored.is_load, stored.has_come) == (1, False, (True,) * 4)
    assert jobs.find([*keys, key(9), key(0, 1)]) == [True] * 4 + [False, False]
    jobs.begin(2, [*keys, key(9)], [10, 11, 12, 13, 14], is_load=True)
    (loaded,) = ended(jobs)
    assert loaded.has_come == (True, True, True, True, False)
    assert loaded.keys == (*keys, key(9))
    assert np.array_equal(memory[:4], memory[10:14])


def test_a_row_that_was_evicted_or_damaged_since_is_said(source: TierStore, memory: np.ndarray) -> None:
    jobs = jobs_of(source, memory)
    keys = [key(number) for number in range(3)]
    jobs.begin(1, keys, [0, 1, 2], is_load=False)
    ended(jobs)
    store = source.current()
    assert store is not None
    assert jobs.find(keys) == [True] * 3
    store.remove("0", [keys[0][:-4]])
    name = namespace().object_key("0", keys[1][:-4])
    match = store.store.match([ROW_BYTES, 0], extras=[kvstore.ExtraInput(0, name)])
    with store.store.read(match) as lease:
        offset = lease.records[0].layout.pieces[0].offset
        ctypes.c_uint8.from_address(int(lease.arrays[1][0]) + offset).value ^= 1
    jobs.begin(2, keys, [10, 11, 12], is_load=True)
    (loaded,) = ended(jobs)
    assert loaded.has_come == (False, False, True)
    assert np.array_equal(memory[2], memory[12])
    assert jobs.find(keys) == [False, False, True]


def test_a_full_store_is_a_job_that_failed(memory: np.ndarray) -> None:
    source = TierStore(TierConfig(weights="random", dram="1MiB"), namespace())
    try:
        store = source.current()
        assert store is not None
        jobs = jobs_of(source, memory)
        many = [key(number) for number in range(100)]
        jobs.begin(1, many, [0] * 100, is_load=False)  # the last of them evict the first
        assert all(ended(jobs)[0].has_come)
        with store.hold([split_key(each)[0] for each in many], [split_key(each)[1] for each in many]) as hold:
            assert any(hold.found)
            jobs.begin(2, [key(number, 1) for number in range(50)], [0] * 50, is_load=False)
            (stored,) = ended(jobs)
        assert not all(stored.has_come)
        assert store.statistics().refused["full"] == stored.has_come.count(False)
    finally:
        source.close()


def test_what_waits_is_bounded_and_closing_ends_it(source: TierStore, memory: np.ndarray) -> None:
    store = source.current()
    assert store is not None
    may_go_on = threading.Event()
    inner = store._pool.begin_flat

    def slow(*arguments: Any, **options: Any) -> Any:
        may_go_on.wait(LIMIT_S)
        return inner(*arguments, **options)

    store._pool.begin_flat = slow  # type: ignore[method-assign]
    jobs = jobs_of(source, memory)
    count = 400
    for number in range(count):
        jobs.begin(number, [key(number)], [0], is_load=False)
    declined = jobs.finished()
    assert declined
    assert all(end.has_come == (False,) for end in declined)
    assert store.statistics().refused["busy"] == len(declined)
    with pytest.raises(DeadlineError):
        jobs.drain(0.01)
    may_go_on.set()
    ends = ended(jobs)
    assert len(ends) + len(declined) == count
    assert all(end.has_come == (True,) for end in ends)


def test_a_store_that_goes_is_misses_and_is_found_again(memory: np.ndarray, tmp_path: Path) -> None:
    socket = str(tmp_path / "s")
    with kvstore.open(namespace().spec, dram="8MiB", socket=socket):
        source = TierStore(TierConfig(weights="random", socket=socket, attach_again_s=0.01), namespace())
        jobs = jobs_of(source, memory)
        keys = [key(0), key(1)]
        jobs.begin(1, keys, [0, 1], is_load=False)
        assert ended(jobs)[0].has_come == (True, True)
        assert jobs.find(keys) == [True, True]
        jobs.begin(2, keys, [4, 5], is_load=True)
        assert ended(jobs)[0].has_come == (True, True)
        assert np.array_equal(memory[:2], memory[4:6])
        first = source.current()
        assert first is not None
        gone = first.store.pool
        assert isinstance(gone, AttachedPool)
    try:
        jobs.begin(3, keys, [6, 7], is_load=True)
        assert ended(jobs)[0].has_come == (False, False)
        assert jobs.find(keys) == [False, False]
        with kvstore.open(namespace().spec, dram="8MiB", socket=socket):
            until(source.current)
            until(lambda: gone._mapping is None)  # else the memory of the one that has gone stays taken
            assert jobs.find(keys) == [False, False]
            jobs.begin(4, keys, [0, 1], is_load=False)
            assert ended(jobs)[0].has_come == (True, True)
            assert jobs.find(keys) == [True, True]
            source.close()
    finally:
        source.close()


def test_settings_are_checked() -> None:
    assert TierConfig.parse({"weights": "w", "ssd": ["/x:1GiB"]}).ssd == ("/x:1GiB",)
    for settings, said in (
        ({}, "no weights"),
        ({"weights": "w", "drams": 1}, "drams"),
        ({"weights": "w", "threads": 0}, "threads"),
        ({"weights": "w", "socket": "/s", "ssd": ["/x:1GiB"]}, "ssd"),
    ):
        with pytest.raises(ConfigError, match=said):
            TierConfig.parse(settings)
