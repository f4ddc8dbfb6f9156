"""Tensor-parallel ranks of the vLLM connector: attached to one store, committing together."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvstore.adapters.vllm.metadata import (  # noqa: E402
    LoadOrder,
    MoreTokens,
    NewPrompt,
    SaveOrder,
    StepOrders,
    WorkerReport,
    joined,
)
from kvstore.adapters.vllm.stores import StoreAccess  # noqa: E402
from kvstore.adapters.vllm.working import Worker  # noqa: E402
from kvstore.clock import Deadline  # noqa: E402
from kvstore.spec import Shard  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from kvstore.testing.specs import hybrid  # noqa: E402
from tests.vllm_cases import PAGES, SmallEngine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.store import Store

TEST_S = 30.0
RANKS = 2
IDS = list(range(100, 130))


class Rank:
    def __init__(self, index: int) -> None:
        self.engine = SmallEngine(hybrid(4), shard=Shard(index, RANKS))
        access = StoreAccess(self.engine.mapping.spec, again_s=0.01, deadline_s=TEST_S)
        self.worker = Worker(self.engine.mapping, page_count=PAGES, again_s=0.01, access=access)
        self.worker.register(self.engine.tensors)
        assert self.worker._saver is not None
        self.worker._saver._joint_deadline_s = self.worker._saver._deadline_s = TEST_S

    def step(self, orders: StepOrders, prompt: Any = None) -> None:
        self.worker.take_orders(orders)
        for order in orders.saves:
            self.engine.compute(prompt, order.tables, order.start, order.stop)
        self.worker.begin_loads()
        self.worker.end_step()

    def finish(self) -> tuple[set[str], set[str]]:
        assert self.worker._loader is not None
        assert self.worker._loader.wait(TEST_S)
        return self.worker.finished_loads()


class Ranks:
    """Ranks of one engine, in step; each attached for itself. They wait long, since machines of tests are slow."""

    def __init__(self, store: Store, socket: str) -> None:
        self.store = store
        self.socket = socket
        self.ranks = [Rank(index) for index in range(RANKS)]

    def together(self, orders: StepOrders, among: list[Rank] | None = None) -> None:
        """All ranks' step at once, as in processes of their own."""
        prompt = self.store.prompt(IDS)
        threads = [threading.Thread(target=rank.step, args=(orders, prompt)) for rank in among or self.ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TEST_S)
        assert not any(thread.is_alive() for thread in threads)

    def save(self, joint: str, among: list[Rank] | None = None) -> None:
        tables = self.ranks[0].engine.tables(30)
        order = SaveOrder("first", 0, 30, tables, (30,), joint)
        self.together(StepOrders(1, self.socket, (named("first", IDS),), saves=(order,)), among)

    def report(self) -> WorkerReport:
        return joined(report for rank in self.ranks if (report := rank.worker.report()) is not None)


def named(request_id: str, ids: list[int]) -> NewPrompt:
    return NewPrompt(request_id, np.asarray(ids, np.uint32))


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    socket = str(tmp_path / "store")
    with ExitStack() as last:
        store = last.enter_context(open_store(SmallEngine(hybrid(4)).spec, dram="8MiB", socket=socket))
        ranks = Ranks(store, socket)
        for rank in ranks.ranks:
            last.callback(rank.worker.close)
        yield ranks


def test_ranks_attach_when_they_are_told_the_path(ranks: Ranks) -> None:
    """Not with the first save, which would wait for it."""
    ranks.together(StepOrders(1, ""))
    assert not ranks.store.attached_process_count
    ranks.together(StepOrders(2, ranks.socket))
    assert all(not rank.worker._access.is_gone for rank in ranks.ranks)
    assert all(rank.worker._access._store is not None for rank in ranks.ranks)


def test_ranks_save_and_load_their_shares(ranks: Ranks) -> None:
    ranks.save("one")
    report = ranks.report()
    assert report.committed == {"first": 30}
    assert not report.failures
    assert ranks.store.match([*IDS, 1]).tokens == 30
    tables = ranks.ranks[0].engine.tables(31)
    load = LoadOrder("second", 30, 0, tables, 1)
    ranks.together(StepOrders(2, ranks.socket, (named("second", [*IDS, 1]),), loads=(load,)))
    for rank in ranks.ranks:
        assert rank.finish() == ({"second"}, set())
        rank.engine.check(ranks.store.prompt([*IDS, 1]), tables, 30)


def test_another_number_of_ranks_reads_what_they_saved(ranks: Ranks) -> None:
    ranks.save("one")
    whole = SmallEngine(hybrid(4))
    worker = Worker(whole.mapping, page_count=PAGES, again_s=0.01)
    worker.register(whole.tensors)
    tables = whole.tables(31)
    worker.take_orders(
        StepOrders(1, ranks.socket, (named("second", [*IDS, 1]),), loads=(LoadOrder("second", 30, 0, tables, 1),))
    )
    worker.begin_loads()
    assert worker._loader is not None
    assert worker._loader.wait(TEST_S)
    assert worker.finished_loads() == ({"second"}, set())
    whole.check(ranks.store.prompt([*IDS, 1]), tables, 30)
    worker.close()


def test_a_rank_that_does_not_come_hangs_nobody(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(ranks.ranks[0].worker._saver, "_joint_deadline_s", 0.05)
        ranks.save("one", among=ranks.ranks[:1])
    report = ranks.report()
    assert report.failures == {"JointCommitError": 1}
    assert not report.committed
    assert not ranks.store.match([*IDS, 1])
    ranks.save("two")
    assert ranks.report().committed == {"first": 30}


def test_a_rank_that_fails_fails_all_at_once(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the deadline: it would be later than the test."""
    for rank in ranks.ranks:
        monkeypatch.setattr(rank.worker._saver, "_joint_deadline_s", 10 * TEST_S)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a kernel")

    pages = ranks.ranks[1].worker._pages
    assert pages is not None
    with monkeypatch.context() as broken:
        broken.setattr(pages._mapping, "save", fail)
        ranks.save("one")
    report = ranks.report()
    assert report.failures == {"JointCommitError": 1, "RuntimeError": 1}
    assert not ranks.store.match([*IDS, 1])
    ranks.save("two")
    assert ranks.report().committed == {"first": 30}


def test_what_only_one_rank_committed_is_not_reported(ranks: Ranks) -> None:
    one, other = WorkerReport(committed={"a": 8, "b": 8}), WorkerReport(committed={"b": 16})
    assert joined([one, other]).committed == {"b": 8}


def test_an_owner_that_goes_is_a_miss_and_its_successor_is_used(ranks: Ranks) -> None:
    ranks.save("one")
    assert ranks.report().committed == {"first": 30}
    ranks.store.close()
    tables = ranks.ranks[0].engine.tables(31)
    load = LoadOrder("second", 30, 0, tables, 1)
    for rank in ranks.ranks:
        before = rank.engine.image()
        rank.step(StepOrders(2, ranks.socket, (named("second", [*IDS, 1]),), loads=(load,)))
        assert rank.finish() == ({"second"}, {"second"})
        assert rank.engine.image() == before
    assert ranks.report().is_store_gone
    with open_store(ranks.ranks[0].engine.spec, dram="8MiB", socket=ranks.socket) as store:
        ranks.store = store
        deadline = Deadline.after(TEST_S)
        for rank in ranks.ranks:  # steps with nothing to do find it
            while rank.worker._access.is_gone:
                assert not deadline.has_passed
                rank.step(StepOrders(3, ranks.socket))
                time.sleep(0.01)
        ranks.save("two")
        report = ranks.report()
        assert report.committed == {"first": 30}
        assert not report.is_store_gone
        for rank in ranks.ranks:
            rank.worker.close()


def test_orders_in_a_log_say_nothing_of_prompts_and_salts() -> None:
    ids = np.array([31337, 31338], np.uint32)
    orders = StepOrders(
        prompts=(NewPrompt("first", ids, b"a tenant's secret"),), more_tokens=(MoreTokens("first", 2, ids),)
    )
    for shown in (repr(orders), orders.anon_repr()):  # the second is what vLLM asks for
        assert "31337" not in shown
        assert "secret" not in shown
        assert "first" in shown
