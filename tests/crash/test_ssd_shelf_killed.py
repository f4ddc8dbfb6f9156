"""A process that keeps records in an SSD tier is killed at any instant; what it had reported durable is there."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from tests.stateful.test_ssd_shelf_machine import SPEC, SsdMachine, originals

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

ROUNDS = 10
TEST_S = 30.0


def options(paths: list[str], capacity_bytes: int) -> SsdOptions:
    places = tuple(SsdPlace(path, capacity_bytes // len(paths)) for path in paths)
    return SsdOptions(places, engine="threads", batch_bytes=1 << 16)


def _keeper(paths: list[str], capacity_bytes: int, seed: int, told: Connection) -> None:
    """Keep one prompt after the other, again and again, and say which are durable."""
    chosen = random.Random(seed)
    shelf = open_ssd(SPEC, options(paths, capacity_bytes))
    told.send(-1)
    while True:
        number = chosen.randrange(len(originals()))
        hold = originals()[number]
        shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)
        told.send(number)
        if chosen.randrange(4) == 0:
            # What is dropped on purpose is promised no more.
            victim = originals()[chosen.randrange(len(originals()))].path.key(0)
            told.send(victim)
            shelf.evict(victim)


class Checker(SsdMachine):
    """Reads as the machine does, without its rules."""

    def __init__(self, shelf: object) -> None:
        super().__init__()
        self.shelf = shelf  # type: ignore[assignment]
        self.disks = {}


def note(promised: set[int], what: int | bytes) -> None:
    """Take what a child said into account: a prompt that is durable, or the key of a node that is dropped."""
    if isinstance(what, bytes):
        promised -= {number for number, hold in enumerate(originals()) if hold.path.key(0) == what}
    elif what >= 0:
        promised.add(what)


@pytest.mark.parametrize(
    ("drives", "capacity_bytes"), [(1, 64 << 20), (2, 64 << 20), (1, 1 << 20)], ids=["one", "two", "full"]
)
def test_killed(tmp_path: Path, drives: int, capacity_bytes: int) -> None:
    paths = [str(tmp_path / f"drive {number}") for number in range(drives)]
    is_ample = capacity_bytes > 1 << 20
    chosen = random.Random(drives + capacity_bytes)
    originals()  # made before the children are, which inherit them
    context = multiprocessing.get_context("fork")
    promised: set[int] = set()
    for seed in range(ROUNDS if is_ample else ROUNDS // 3):
        heard, told = context.Pipe(duplex=False)
        child = context.Process(target=_keeper, args=(paths, capacity_bytes, seed, told))
        child.start()
        told.close()
        count = 0
        until = chosen.randrange(1, 40)
        try:
            while heard.poll(TEST_S):
                what = heard.recv()
                note(promised, what)
                count += 1
                if count == until:
                    break
            else:
                pytest.fail("the process that keeps did nothing for too long")
        finally:
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join(TEST_S)
        while heard.poll(0):
            try:
                what = heard.recv()
            except (EOFError, OSError):
                break  # a message that was cut off is none that was said
            note(promised, what)
        heard.close()
        child.close()
        with closing(open_ssd(SPEC, options(paths, capacity_bytes))) as shelf:
            checker = Checker(shelf)
            shelf.check()
            assert not shelf.statistics().trouble
            there = {number for number in range(len(originals())) if checker.check_loads(number)}
            if is_ample:
                assert promised <= there, f"durable and lost: {sorted(promised - there)}"
            assert shelf.statistics().used_bytes <= capacity_bytes
