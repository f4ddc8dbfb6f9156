"""A drive that stops answering: reads, flush and close end by their deadlines, and what it may still write to stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kvstore._native import file_engines
from kvstore.errors import DeadlineError, KVStoreError
from kvstore.placement.ssd import shelf as shelf_module
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers.ssd import directory as directory_module
from kvstore.tiers.ssd import moves
from tests.crash.test_store_faults import mounted
from tests.crash.test_store_power_cut import opened

SPEC = hybrid(4)
ENGINES = ("threads", *(() if dict(file_engines(8))["io_uring"] else ("io_uring",)))
IDS = tuple(range(22))
MORE = (*IDS, 99)
TEST_S = 30.0
SOON_S = 0.3
"""Deadlines of these tests, in place of tens of seconds."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "SSD_CLOSE_DEADLINE_S", SOON_S)
    monkeypatch.setattr(moves, "SSD_SETTLE_S", SOON_S)
    monkeypatch.setattr(directory_module, "SSD_SETTLE_S", SOON_S)


def test_a_drive_that_hangs_while_it_writes() -> None:
    disk = ForgetfulDisk(seed=1)
    store = opened(SPEC, {"disk": disk}, 64 << 20, 1 << 20)
    with store.write(IDS) as writer:
        put_all(writer)
        disk.hold(is_begun=True)
        writer.commit()
    with pytest.raises(DeadlineError):
        store.flush(SOON_S)
    # It is served from memory meanwhile.
    with store.read(store.match(MORE)) as lease:
        check_lease(lease, store.prompt(IDS))
    began_s = time.monotonic()
    with pytest.raises(DeadlineError, match="the SSD tier is closed, but"):
        store.close()
    assert time.monotonic() - began_s < TEST_S
    assert store.is_closed
    store.close()
    # The drive answers at last: what it moves is still there, and its thread ends.
    disk.release()
    again = opened(SPEC, {"disk": disk}, 64 << 20, 1 << 20)
    again.close()


def test_a_drive_that_hangs_while_it_reads() -> None:
    disk = ForgetfulDisk(seed=1)
    store = opened(SPEC, {"disk": disk}, 64 << 20, 1 << 20)
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    store.flush(TEST_S)
    store.close()
    store = opened(SPEC, {"disk": disk}, 64 << 20, 1 << 20)
    disk.hold(is_begun=True)
    match = store.match(MORE)
    assert match.tokens == len(IDS)
    with pytest.raises(KVStoreError):
        store.read(match, deadline_s=SOON_S)
    other = tuple(range(500, 510))
    with store.write(other) as writer:
        put_all(writer)
        writer.commit()
    with store.read(store.match((*other, 1))) as lease:
        check_lease(lease, store.prompt(other))
    with pytest.raises(DeadlineError, match="the SSD tier is closed, but"):
        store.close()
    disk.release()


PROGRAM = """
import sys, threading
import numpy as np
import kvstore
from kvstore.placement.ssd import shelf as shelf_module, writer as writer_module
from kvstore.testing.specs import hybrid, put_all
from kvstore.tiers.ssd import directory as directory_module

shelf_module.SSD_CLOSE_DEADLINE_S = 0.3
never = threading.Event()
directory_module.SsdDirectory.append = lambda *_: never.wait()  # as a thread in the kernel that does not come back
store = kvstore.open(hybrid(4), dram="1MiB", ssd=sys.argv[1] + ":64MiB")
with store.write(tuple(range(22))) as writer:
    put_all(writer)
    writer.commit()
try:
    store.flush(0.3)
except kvstore.errors.DeadlineError:
    print("flush")
store.pool._close_deadline_s = 0.3
try:
    store.close()
except kvstore.errors.DeadlineError as error:
    print("close", error)
"""


def test_the_process_ends(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=root,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("flush\nclose the SSD tier is closed, but")


FROZEN = """
import sys
import kvstore
from kvstore.placement.ssd import shelf as shelf_module
from kvstore.testing.specs import check_lease, hybrid, put_all
from kvstore.tiers.ssd import directory as directory_module, moves

shelf_module.SSD_CLOSE_DEADLINE_S = moves.SSD_SETTLE_S = directory_module.SSD_SETTLE_S = 0.3
ssd = kvstore.SsdOptions(sys.argv[1] + ":8MiB", engine=sys.argv[2], write_deadline_s=0.3)
store = kvstore.open(hybrid(4), dram="4MiB", ssd=ssd)
store.pool._close_deadline_s = 0.3
print("open", flush=True)
sys.stdin.readline()
ids = tuple(range(22))
with store.write(ids) as writer:
    put_all(writer)
    writer.commit()
try:
    store.flush(1.0)
except kvstore.errors.KVStoreError as error:
    print("flush", type(error).__name__, flush=True)
with store.read(store.match((*ids, 1))) as lease:
    check_lease(lease, store.prompt(ids))
try:
    store.close()
except kvstore.errors.DeadlineError as error:
    print("close", error, flush=True)
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_system_that_is_frozen(tmp_path: Path, engine: str) -> None:
    """The kernel itself holds every write: threads that wait there cannot be interrupted."""
    if shutil.which("fsfreeze") is None:
        pytest.skip("there is no fsfreeze")
    root = Path(__file__).parents[2]
    with mounted(tmp_path, "16M") as place:
        command = [sys.executable, "-c", FROZEN, str(place / "kv"), engine]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            frozen = subprocess.run(["fsfreeze", "-f", place], check=False, capture_output=True, timeout=TEST_S)
            thaw = threading.Timer(2 * TEST_S, subprocess.run, (["fsfreeze", "-u", place],))
            thaw.start()  # whatever happens here, nothing stays frozen
            try:
                process.stdin.write("go on\n")
                process.stdin.flush()
                lines = [] if frozen.returncode else [process.stdout.readline(), process.stdout.readline()]
            finally:
                thaw.cancel()
                subprocess.run(["fsfreeze", "-u", place], check=False, capture_output=True, timeout=TEST_S)
            process.stdin.close()
            assert process.wait(TEST_S) == 0
        if frozen.returncode:
            pytest.skip("no file system can be frozen here")
        assert lines[0].startswith("flush ")
        assert lines[1].startswith("close the SSD tier is closed, but what was begun on a drive of")
