"""The store's state machine through an attached store, with workers that are killed wherever they are, as rules.

`KVSTORE_STATEFUL_EXAMPLES=2000` looks much longer.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvstore.spec import ReuseRule, Shard
from kvstore.store import attach_store, open_store
from kvstore.testing.specs import dense, hybrid
from kvstore.testing.store_machine import MANY, SHARDS, StoreMachine
from kvstore.testing.store_model import Ids, Prefix, prefixes
from tests.attached.driver import Worker, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "20"))
STEPS = 30
DEADLINE_S = 60.0
BUSY_MAX = 2
KILLS_MAX = 4
"""Within one example: each takes some hundredths of a second."""

pytestmark = pytest.mark.timeout(900 if EXAMPLES <= 100 else 0)

NURSERY: list[Worker] = []


@pytest.fixture(scope="module", autouse=True)
def nursery() -> Iterator[None]:
    """Where workers come from, started when the first is needed."""
    yield
    while NURSERY:
        NURSERY.pop().kill()


def _nursery() -> Worker:
    if not NURSERY:
        NURSERY.append(Worker("none", program="tests.attached.nursery").started())
    return NURSERY[0]


@dataclass
class Busy:
    """A worker somewhere in its life, and the prefixes that it keeps from being evicted."""

    pid: int
    path: list[Prefix] = field(default_factory=list)
    states: list[Prefix] = field(default_factory=list)


class AttachedMachine(StoreMachine):
    """As `StoreMachine`; every call crosses to the owner."""

    patience_s = DEADLINE_S

    def __init__(self) -> None:
        super().__init__()
        self.store.close()
        self.folder = tempfile.mkdtemp(prefix="kvs-")
        self.path = f"{self.folder}/pool.sock"
        self.owner = open_store(self.spec, dram=self.dram_bytes, socket=self.path)
        self.store = attach_store(self.path, deadline_s=DEADLINE_S)
        self.busy: list[Busy] = []
        self.kills = 0

    def _is_held(self, prefix: Prefix, rule_: ReuseRule) -> bool:
        if super()._is_held(prefix, rule_):
            return True
        return any(prefix in (each.path if rule_ is ReuseRule.ATTENTION else each.states) for each in self.busy)

    # Workers

    @precondition(lambda self: len(self.busy) < BUSY_MAX and self.kills + len(self.busy) < KILLS_MAX)
    @rule(
        data=st.data(),
        stage=st.sampled_from(("reserve", "fill", "commit", "lease")),
        salt=st.sampled_from((b"", b"", b"other")),
        shard=st.sampled_from(SHARDS),
    )
    def a_worker_comes(self, data: st.DataObject, stage: str, salt: bytes, shard: Shard) -> None:
        ids = self._draw_ids(data)
        if len(ids) < self.spec.block_tokens:
            return
        before = {prefix: list(copies) for prefix, copies in self.model.records.items()}
        parent = _nursery()
        where = [shard.index, shard.count]
        parent.post("reach", path=self.path, stage=stage, ids=list(ids), salt=salt.decode(), shard=where)
        worker = Busy(parent.answer())
        answer = parent.next_answer()
        assert answer is not None
        self.busy.append(worker)
        if "error" in answer:
            assert answer["error"] in ("PoolFullError", "QuarantineFullError"), answer
            assert not self._vanished(), "a refused write evicted something"
            assert self.model.records == before
        elif stage == "lease":
            self._a_worker_leased(worker, ids, salt, shard, answer["ok"])
        else:
            self._a_worker_wrote(worker, ids, salt, shard, is_committed=stage == "commit")

    def _a_worker_leased(self, worker: Busy, ids: Ids, salt: bytes, shard: Shard, tokens: int) -> None:
        expected = self.model.resume_points(salt, ids, len(ids), shard, None)
        assert tokens == max(expected, default=0)
        if tokens:
            worker.path = prefixes(salt, ids[:tokens], self.spec.block_tokens)
            worker.states = worker.path[-1:]

    def _a_worker_wrote(self, worker: Busy, ids: Ids, salt: bytes, shard: Shard, *, is_committed: bool) -> None:
        path = prefixes(
            salt, ids[: len(ids) // self.spec.block_tokens * self.spec.block_tokens], self.spec.block_tokens
        )
        worker.path = worker.states = path
        self._accept_evictions()
        if not is_committed:
            return
        for prefix, copy in self._named(path, (), 0, shard, None):
            if not self.model.find(prefix, copy) and self._is_reachable(path, prefix, copy):
                self.model.add(prefix, copy)
        worker.path = worker.states = []

    @precondition(lambda self: self.busy)
    @rule(data=st.data())
    def a_worker_is_killed(self, data: st.DataObject) -> None:
        self._kill(data.draw(st.sampled_from(self.busy), label="which"))

    def _kill(self, worker: Busy) -> None:
        os.kill(worker.pid, signal.SIGKILL)
        _nursery().call("reap", pid=worker.pid)
        server = self.owner._owner
        assert server is not None
        eventually(lambda: worker.pid not in {state.pid for state in server.processes()})
        self.busy.remove(worker)
        self.kills += 1

    # What the store's own rules must know of them

    @precondition(lambda self: not self.busy)
    @rule(data=st.data(), payload=st.binary(max_size=8))
    def hand_over(self, data: st.DataObject, payload: bytes) -> None:
        super().hand_over(data=data, payload=payload)

    @precondition(lambda self: False)
    @rule(data=st.data(), is_unfinished=st.booleans())
    def finish_together(self, data: st.DataObject, is_unfinished: bool) -> None:
        """Not by transactions: writers of other processes become parties of a joint commit by its name."""

    @invariant()
    def budget_is_exact(self) -> None:
        self.owner.pool.check()
        statistics = self.store.statistics()
        assert statistics.committed_bytes == self.model.slot_bytes()
        if not self.writers and not self.busy:
            assert statistics.reserved_bytes == 0
            if not self.leases:
                assert statistics.quarantined_bytes == 0

    @precondition(
        lambda self: len(self.model.records) > MANY and not self.writers and not self.leases and not self.busy
    )
    @rule()
    def evict_everything(self) -> None:
        super().evict_everything()

    def teardown(self) -> None:
        for worker in list(self.busy):
            self._kill(worker)
        super().teardown()
        self.owner.close()
        shutil.rmtree(self.folder)


def _case(machine: type[StoreMachine], examples: int) -> type:
    case = machine.TestCase
    case.settings = settings(
        settings.default,
        max_examples=max(1, examples),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestRoomyHybrid = _case(AttachedMachine.for_spec(hybrid(4), dram_bytes=4 << 20), EXAMPLES // 2)
TestTightHybrid = _case(AttachedMachine.for_spec(hybrid(4), dram_bytes=120 << 10), EXAMPLES)
TestTightDense = _case(AttachedMachine.for_spec(dense(4), dram_bytes=120 << 10), EXAMPLES)
