"""A store whose process is killed at any instant: what it was told is durable is there, and all that is found is right.

KVSTORE_KILLS=1000 is the long form. The seeds are fixed; where the process is at that moment is up to the machine.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore._native import file_engines
from kvstore.placement.ssd import SsdOptions, SsdPlace
from kvstore.placement.tiered import TieredPool
from tests.crash.ledger import Ledger, Teller
from tests.crash.workload import DRAM_BYTES, SPECS, TEST_S, Workload, telling, verified_points

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

KILLS = max(2, int(os.environ.get("KVSTORE_KILLS", "100")) // 40)
"""Of each case."""
STEPS_MAX = 60
PAUSE_S = 0.03
"""It dies up to this long after one of its steps."""
ENGINES = ("threads", "threads", *(name for name, why_not in file_engines(8) if name == "io_uring" and not why_not))
AMPLE, TIGHT = 64 << 20, 1 << 20
CASES = [(name, 1, AMPLE) for name in SPECS] + [("hybrid", 1, TIGHT), ("hybrid", 2, AMPLE), ("state", 2, TIGHT)]

pytestmark = pytest.mark.timeout(120 + 20 * KILLS)


def options(paths: list[str], capacity_bytes: int, engine: str) -> SsdOptions:
    # Small batches, so that a resume point often takes several.
    places = tuple(SsdPlace(path, max(1 << 20, capacity_bytes // len(paths))) for path in paths)
    return SsdOptions(places, engine=engine, batch_bytes=64 << 10)


def _use(spec_name: str, ssd: SsdOptions, seed: int, told: Connection) -> None:
    """What the process does that is killed."""
    teller = Teller(told.send)
    with telling(teller):
        store = kvstore.open(SPECS[spec_name], dram=DRAM_BYTES, ssd=ssd)
        workload = Workload(store, teller, seed)
        teller.did("open")
        while True:
            workload.step()


def _killed(spec_name: str, ssd: SsdOptions, seed: int, ledger: Ledger, chosen: random.Random) -> None:
    context = multiprocessing.get_context("fork")
    heard, told = context.Pipe(duplex=False)
    child = context.Process(target=_use, args=(spec_name, ssd, seed, told))
    child.start()
    told.close()
    steps, until = 0, chosen.randrange(STEPS_MAX)
    try:
        while steps < until:
            assert heard.poll(TEST_S), "the process did nothing for too long"
            message = heard.recv()
            ledger.note(message)
            steps += not hasattr(message, "points")
        # What it says meanwhile waits in the pipe, and so does the process once that is full.
        time.sleep(chosen.random() * PAUSE_S)
    finally:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join(TEST_S)
        child.close()
    try:
        while heard.poll(0):
            ledger.note(heard.recv())
    except (EOFError, OSError):
        pass  # a message that was cut off is none that was said
    heard.close()


@pytest.mark.parametrize(("spec_name", "drives", "capacity_bytes"), CASES)
def test_killed_at_any_instant(
    tmp_path: Path, spec_name: str, drives: int, capacity_bytes: int, record_property: pytest.RecordProperty
) -> None:
    paths = [str(tmp_path / f"drive {number}") for number in range(drives)]
    chosen = random.Random(f"{spec_name} {drives} {capacity_bytes}")
    ledger = Ledger()
    verified = came_back = checked = 0
    for kill in range(KILLS):
        ssd = options(paths, capacity_bytes, chosen.choice(ENGINES))
        _killed(spec_name, ssd, kill, ledger, chosen)
        # The parent's reads drop nothing on disk; if they did, it would count.
        with telling(Teller(ledger.note)), kvstore.open(SPECS[spec_name], dram="4MiB", ssd=ssd) as store:
            found = verified_points(store)
            lost = ledger.promised - found
            assert not lost, f"after kill {kill}: durable and lost: {[(p.number, p.tokens) for p in lost]}"
            pool = store.pool
            assert isinstance(pool, TieredPool)
            (shelf,) = pool.statistics().shelves
            assert not shelf.trouble
            assert not shelf.damaged_records
            pool.check()
        verified += len(found)
        checked += len(ledger.promised)
        came_back += len(found - ledger.promised)
    assert ledger.reports
    assert verified >= checked
    print(
        f"{spec_name}, {drives} drives of {capacity_bytes >> 20} MiB: {KILLS} kills; {ledger.reports} reports of "
        f"durable resume points, {ledger.dropped} of them dropped on purpose; {checked} looked for, 0 lost; {verified} "
        f"resume points verified, {came_back} of them not promised; {dict(ledger.done)}"
    )
    for name, value in (("kills", KILLS), ("verified", verified), ("looked_for", checked), ("lost", 0)):
        record_property(name, value)
