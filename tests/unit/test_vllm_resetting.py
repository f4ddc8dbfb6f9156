"""A reset while steps are under way: what they save was computed before it, and is forgotten, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvstore.adapters.paged import CheckpointPolicy
from kvstore.adapters.vllm.config import ConnectorConfig
from kvstore.adapters.vllm.metadata import WorkerReport
from kvstore.adapters.vllm.opening import OwnedStore
from kvstore.adapters.vllm.resetting import LATE_STEPS
from kvstore.adapters.vllm.scheduling import Scheduling
from kvstore.adapters.vllm.search import Searches
from kvstore.testing.specs import hybrid
from tests.vllm_requests import FakeRequest, keep, step

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = hybrid(4)
IDS = list(range(100, 117))


class Engine:
    """A scheduler's half over a store of its own."""

    def __init__(self) -> None:
        self.source = OwnedStore(SPEC, ConnectorConfig(weights="w", dram="4MiB"))
        searches = Searches(self.source, prepare_deadline_s=5.0, fetch_deadline_s=5.0)
        self.half = Scheduling(SPEC, self.source, searches, CheckpointPolicy(8, has_states=True))

    def schedule(self) -> int:
        """A step that saves a prompt; its number."""
        self.half.add(FakeRequest("a", IDS))
        orders = self.half.orders(step({"a": len(IDS)}))
        assert orders.saves
        return orders.step

    def end(self, number: int) -> None:
        """The worker has carried a step out, and says so."""
        store = self.source.get()
        assert store is not None
        keep(store, IDS)
        self.half.reported((), (), WorkerReport(committed={"a": len(IDS)}, saved_steps={number}))

    def found(self) -> int | None:
        return self.half.match(FakeRequest("b", [*IDS, 7]), 0)[0]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.half.close()


def test_what_a_step_under_way_saves_is_forgotten(engine: Engine) -> None:
    first, second = engine.schedule(), engine.schedule()
    assert engine.half.reset()
    engine.end(first)
    assert engine.found() == 0
    engine.end(second)
    assert engine.found() == 0
    engine.end(engine.schedule())
    assert engine.half.match(FakeRequest("c", [*IDS, 7]), 0) == (len(IDS), True)


def test_with_nothing_under_way_it_is_used_at_once(engine: Engine) -> None:
    engine.end(engine.schedule())
    assert engine.half.reset()
    assert engine.found() == 0
    engine.end(engine.schedule())
    assert engine.half.match(FakeRequest("c", [*IDS, 7]), 0) == (len(IDS), True)


def test_a_step_that_is_never_reported_is_not_waited_for(engine: Engine) -> None:
    engine.schedule()
    assert engine.half.reset()
    store = engine.source.get()
    assert store is not None
    keep(store, IDS)  # it has saved, and its report is lost
    for _ in range(LATE_STEPS + 1):
        assert engine.found() == 0
        engine.half.orders(step())
    assert engine.found() == 0
    keep(store, IDS)
    assert engine.half.match(FakeRequest("c", [*IDS, 7]), 0) == (len(IDS), True)


def test_what_is_in_use_is_waited_for(engine: Engine) -> None:
    number = engine.schedule()
    assert engine.half.reset()
    store = engine.source.get()
    assert store is not None
    keep(store, IDS)
    with store.read(store.match([*IDS, 7])):
        engine.half.reported((), (), WorkerReport(saved_steps={number}))
        assert engine.found() == 0
        assert store.match([*IDS, 7]).tokens, "a lease keeps it"
    for _ in range(LATE_STEPS + 1):
        engine.half.orders(step())
    assert not store.match([*IDS, 7]).tokens
