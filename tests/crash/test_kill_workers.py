"""Kill workers and owners at random points: what is visible is right bit for bit, and no byte of the budget is lost.

KVSTORE_KILLS=1000 is the long form. The seed is fixed, so that the same decisions are made; where a process is at that
moment is up to the machine.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.errors import JointCommitError, OwnerGoneError, PoolError, WriteError
from kvstore.spec import Shard
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.specs import check_lease, hybrid, put_all
from tests.attached.driver import Worker, eventually, socket_folder
from tests.attached.nursery import work
from tests.attached.prompts import every_prompt, joint_prompt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Store

KILLS = int(os.environ.get("KVSTORE_KILLS", "100"))
LIFE_S = 0.06
"""A worker lives up to this long, from its attachment: some hundred messages."""
DRAM = "256KiB"
SPEC = hybrid(16)
DEADLINE_S = 60.0

pytestmark = pytest.mark.timeout(120 + 2 * KILLS)


@pytest.fixture
def path() -> Iterator[str]:
    with leaves_nothing(), socket_folder() as folder:
        yield f"{folder}/pool.sock"


@contextmanager
def nursery(path: str) -> Iterator[Worker]:
    made = Worker(path, program="tests.attached.nursery")
    try:
        yield made.started()
    finally:
        made.kill()


def is_attached(store: Store, pid: int) -> bool:
    assert store._owner is not None
    return any(state.pid == pid for state in store._owner.processes())


def check_all(store: Store, prompts: list[list[int]]) -> int:
    """Read everything that is visible and compare it with what it must be; the resume points that were there."""
    points = 0
    for ids in prompts:
        match = store.match([*ids, 0])
        for candidate in match.candidates:
            with store.read(match.at(candidate.tokens), verify=True) as lease:
                assert lease.tokens == candidate.tokens, "a visible resume point was damaged"
                check_lease(lease, store.prompt(ids[: lease.tokens]))
            points += 1
    assert store.statistics().damaged_records == 0
    return points


def check_budget(store: Store) -> None:
    store.pool.check()
    statistics = store.statistics()
    assert statistics.reserved_bytes == statistics.quarantined_bytes == 0


def test_workers_are_killed_at_random_points(path: str) -> None:
    """One dies, another one goes on; after each death the dead one's bytes are back."""
    generator = random.Random(1)
    points = 0
    with kvstore.open(SPEC, dram=DRAM, socket=path) as store, nursery(path) as parent:
        for number in range(KILLS):
            parent.post("live", seed=number)
            pid = parent.answer()
            time.sleep(generator.random() * LIFE_S)
            if generator.random() < 0.2:
                os.kill(pid, signal.SIGSTOP)  # a stopped one is killed like any other
            os.kill(pid, signal.SIGKILL)
            parent.post("reap", pid=pid)
            answer = parent.next_answer()
            assert answer == {"ok": None}, f"the worker failed before it was killed: {answer}"
            eventually(lambda pid=pid: not is_attached(store, pid))  # type: ignore[misc]
            check_budget(store)
            points += check_all(store, every_prompt())
        statistics = store.statistics()
    assert points > KILLS, "hardly anything was ever committed"
    assert statistics.evicted_records > 0, "memory was never short"


def test_parties_of_joint_commits_are_killed(path: str) -> None:
    """Both shards or none: a resume point of one shard alone must not appear."""
    generator = random.Random(2)
    rounds = max(4, KILLS // 8)
    visible = 0
    with kvstore.open(SPEC, dram="8MiB", socket=path) as store, nursery(path) as parent:
        for number in range(rounds):
            pids = []
            for rank in range(2):
                parent.post("live", seed=number, joint=[f"round-{number}", rank, 2])
                pids.append(parent.answer())
            time.sleep(generator.random() * LIFE_S)
            os.kill(pids[generator.randrange(2)], signal.SIGKILL)
            said = parent.next_answer()
            assert said is not None
            assert said.get("error") == "JointCommitError", said
            for pid in pids:
                parent.call("reap", pid=pid)
                eventually(lambda pid=pid: not is_attached(store, pid))  # type: ignore[misc]
            check_budget(store)
            for attempt in range(16):
                ids = joint_prompt(number, attempt)
                shards = (Shard(0, 2), Shard(1, 2), Shard(0, 1))
                found = [store.match([*ids, 0], shard=shard).tokens for shard in shards]
                assert len(set(found)) == 1, f"the shards of {ids[:2]} reach {found} tokens"
                visible += check_all(store, [ids])
    assert visible > 0, "no joint commit ever came about"


def test_the_owner_is_killed_at_random_points(path: str) -> None:
    """Every worker learns it, by name and soon, and goes on with the next owner."""
    generator = random.Random(3)
    for number in range(max(3, KILLS // 25)):
        owner = Worker(path, program="tests.attached.owner_program").started()
        try:
            stores = [kvstore.attach(path, deadline_s=DEADLINE_S) for _ in range(2)]

            def until_it_dies(store: Store, seed: int) -> str:
                choices = random.Random(seed)
                while True:
                    try:
                        work(store, choices)
                    except OwnerGoneError as error:
                        assert store.is_closed
                        return str(error)

            running = [
                Background(lambda store=store, seed=seed: until_it_dies(store, seed))  # type: ignore[misc]
                for seed, store in enumerate(stores, 2 * number)
            ]
            time.sleep(generator.random() * 4 * LIFE_S)
            owner.kill()
            for each in running:
                assert "epoch" in each.result(DEADLINE_S)
            for store in stores:
                store.close()
        finally:
            owner.kill()
    with kvstore.open(SPEC, dram=DRAM, socket=path) as store:
        assert check_all(store, every_prompt()) == 0


def test_threads_of_attached_stores_end_when_their_pool_does(path: str) -> None:
    """Nothing waits for ever in a process whose owner closes in the middle of its work."""
    for seed in range(3):
        store = kvstore.open(SPEC, dram=DRAM, socket=path)
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)

        def keep_writing(attached: Store = attached, seed: int = seed) -> None:
            for number in range(1_000_000):
                try:
                    with attached.write([seed, number, *range(40)], shard=Shard(0, 2), joint=f"{number}") as writer:
                        put_all(writer)
                        writer.commit(deadline_s=0.02)
                except JointCommitError:
                    continue
                except (OwnerGoneError, WriteError, PoolError):
                    return

        running = Background(keep_writing)
        time.sleep(0.1)
        store.close()
        running.result(DEADLINE_S)
        attached.close()
