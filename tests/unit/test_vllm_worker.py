"""The worker's half of the vLLM connector on pages of a small engine."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvstore.adapters.vllm import stores  # noqa: E402
from kvstore.adapters.vllm.metadata import LoadOrder, MoreTokens, NewPrompt, SaveOrder, StepOrders  # noqa: E402
from kvstore.adapters.vllm.working import Worker  # noqa: E402
from kvstore.errors import LoadFailedError  # noqa: E402
from kvstore.keys import ExtraInput  # noqa: E402
from kvstore.store import Lease, open_store  # noqa: E402
from kvstore.testing.specs import dense, hybrid, pure_state, windowed  # noqa: E402
from tests.vllm_cases import PAGES, SmallEngine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Store

TEST_S = 30.0
SOCKET = "the owner's own"
LIKE = {spec.model: spec for spec in (dense(4), hybrid(4), windowed(4), pure_state(4))}


class Setting:
    """A worker in its owner's process, its engine, and the scheduler's part as the tests write it."""

    def __init__(self, engine: SmallEngine, store: Store) -> None:
        self.engine = engine
        self.store = store
        self.worker = Worker(engine.mapping, page_count=PAGES, again_s=0.01)
        self.worker.register(engine.tensors)
        self._known: set[str] = set()

    def prompts(self, request_id: str, token_ids: Any) -> tuple[NewPrompt, ...]:
        if request_id in self._known:
            return ()
        self._known.add(request_id)
        return (NewPrompt(request_id, np.asarray(token_ids, np.uint32)),)

    def save(
        self, request_id: str, token_ids: Any, tables: Any, start: int, stop: int, resume_at: tuple[int, ...] = ()
    ) -> None:
        """A step over `[start, stop)` of one request, and its save."""
        order = SaveOrder(request_id, start, stop, tables, resume_at or (stop,), f"{request_id}-{stop}")
        self.worker.take_orders(StepOrders(1, SOCKET, self.prompts(request_id, token_ids), saves=(order,)))
        self.engine.compute(self.store.prompt(token_ids), tables, start, stop)
        self.worker.begin_loads()
        self.worker.end_step()

    def load(self, request_id: str, token_ids: Any, tables: Any, tokens: int, start: int = 0) -> None:
        order = LoadOrder(request_id, tokens, start, tables, 1)
        self.worker.take_orders(StepOrders(1, SOCKET, self.prompts(request_id, token_ids), loads=(order,)))
        self.worker.begin_loads()
        self.worker.end_step()

    def finish(self) -> tuple[set[str], set[str]]:
        """Wait for the loads as an engine's idle steps do."""
        assert self.worker._loader is not None
        assert self.worker._loader.wait(TEST_S)
        return self.worker.finished_loads()


@pytest.fixture(params=list(LIKE))
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    yield from opened(SmallEngine(LIKE[request.param]))


@pytest.fixture
def hybrid_setting() -> Iterator[Setting]:
    yield from opened(SmallEngine(hybrid(4)))


def opened(engine: SmallEngine) -> Iterator[Setting]:
    with open_store(engine.spec, dram="8MiB") as store:
        stores.share(SOCKET, store)
        setting = Setting(engine, store)
        yield setting
        setting.worker.close()
        stores.withdraw(SOCKET, store)


def test_what_steps_leave_is_loaded_for_the_next_request(setting: Setting) -> None:
    ids = list(range(100, 130))
    tables = setting.engine.tables(30)
    setting.save("first", ids, tables, 0, 16)
    setting.save("first", ids, tables, 16, 30)
    report = setting.worker.report()
    assert report is not None
    assert report.committed == {"first": 30}
    assert report.counters.saves == 2
    assert not report.failures
    assert setting.worker.report() is None
    others = setting.engine.tables(31)
    setting.load("second", [*ids, 7], others, 30)
    assert setting.finish() == ({"second"}, set())
    setting.engine.check(setting.store.prompt([*ids, 7]), others, 30)
    report = setting.worker.report()
    assert report is not None
    assert report.loads_done == {("second", 1): 30}
    assert report.counters.loaded_tokens == 30


def test_what_the_store_has_is_not_put_again(setting: Setting) -> None:
    ids = list(range(100, 130))
    setting.save("first", ids, setting.engine.tables(30), 0, 30)
    assert setting.worker.report()
    setting.save("second", ids, setting.engine.tables(30), 0, 30)
    report = setting.worker.report()
    assert report is not None
    assert report.committed == {"second": 30}
    assert report.counters.saved_tokens == report.counters.saved_bytes == 0


def test_what_the_store_has_lost_is_put_again_with_the_next_step(setting: Setting) -> None:
    ids = list(range(100, 132))
    tables = setting.engine.tables(32)
    setting.save("first", ids, tables, 0, 16)
    setting.store.expire(setting.store.prompt(ids[:16]), after_tokens=0)
    setting.save("first", ids, tables, 16, 32)
    others = setting.engine.tables(33)
    setting.load("second", [*ids, 7], others, 32)
    assert setting.finish() == ({"second"}, set())
    setting.engine.check(setting.store.prompt([*ids, 7]), others, 32)


def test_a_load_begins_behind_what_the_engine_has(setting: Setting) -> None:
    """Tokens of the engine's own prefix cache stay what they are, in the page in which the load begins, too."""
    ids = list(range(100, 131))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)
    prompt, others = setting.store.prompt(ids), setting.engine.tables(31)
    setting.engine.compute(setting.store.prompt([*ids[:12], *range(19)]), others, 0, 12)
    setting.load("second", ids, others, 30, start=12)
    assert setting.finish() == ({"second"}, set())
    setting.engine.check(prompt, others, 30)


def test_only_pages_of_the_order_are_touched(setting: Setting) -> None:
    engine = setting.engine
    ids = list(range(100, 131))
    setting.save("first", ids[:30], engine.tables(30), 0, 30)
    before = {
        (name, page): engine.page_bytes(name, group, page).tobytes()
        for group in engine.groups
        for name in group.names
        for page in range(64)
    }
    others = engine.tables(31)
    setting.load("second", ids, others, 30)
    assert setting.finish() == ({"second"}, set())
    filled = engine.mapping.pages_filled(others, 0, 30)
    for group in engine.groups:
        for name in group.names:
            for page in range(64):
                if page not in filled[group.index]:
                    assert engine.page_bytes(name, group, page).tobytes() == before[name, page]


def test_what_a_load_leaves_of_a_page_is_zero(setting: Setting) -> None:
    """Attention kernels multiply it by zero, and what another request left there may be no number."""
    engine = setting.engine
    ids = list(range(100, 131))
    setting.save("first", ids[:30], engine.tables(30), 0, 30)
    others = engine.tables(31)
    setting.load("second", ids, others, 30)
    setting.finish()
    for group in engine.groups:
        if not group.is_state:
            for name in group.names:
                last = engine.page_bytes(name, group, others[group.index][30 // 8])
                behind = last.reshape(last.shape[0], last.shape[1], 8, -1)[:, :, 30 % 8 :]
                assert not behind.any()
                if group.is_window and group.first_needed(30) % 8:
                    first = engine.page_bytes(name, group, others[group.index][group.first_needed(30) // 8])
                    before = first.reshape(first.shape[0], first.shape[1], 8, -1)[:, :, : group.first_needed(30) % 8]
                    assert not before.any()


def test_kernel_pages_smaller_than_the_tables(setting: Setting) -> None:
    for small in opened(SmallEngine(setting.engine.spec, parts=2)):
        ids = list(range(100, 131))
        small.save("first", ids[:30], small.engine.tables(30), 0, 30)
        others = small.engine.tables(31)
        small.load("second", ids, others, 30)
        assert small.finish() == ({"second"}, set())
        small.engine.check(small.store.prompt(ids), others, 30)


def test_several_requests_of_one_step(setting: Setting) -> None:
    many = {f"request {number}": [number, *range(100, 100 + 10 + number)] for number in range(4)}
    tables = {name: setting.engine.tables(len(ids)) for name, ids in many.items()}
    orders = tuple(
        SaveOrder(name, 0, len(ids), tables[name], (len(ids),), f"joint {name}") for name, ids in many.items()
    )
    prompts = tuple(NewPrompt(name, np.asarray(ids, np.uint32)) for name, ids in many.items())
    setting.worker.take_orders(StepOrders(1, SOCKET, prompts, saves=orders))
    for name, ids in many.items():
        setting.engine.compute(setting.store.prompt(ids), tables[name], 0, len(ids))
    setting.worker.begin_loads()
    setting.worker.end_step()
    report = setting.worker.report()
    assert report is not None
    assert report.committed == {name: len(ids) for name, ids in many.items()}
    others = {name: setting.engine.tables(len(ids) + 1) for name, ids in many.items()}
    loads = tuple(LoadOrder(f"{name} again", len(ids), 0, others[name], 1) for name, ids in many.items())
    prompts = tuple(NewPrompt(f"{name} again", np.asarray([*ids, 1], np.uint32)) for name, ids in many.items())
    setting.worker.take_orders(StepOrders(2, SOCKET, prompts, loads=loads))
    setting.worker.begin_loads()
    setting.worker.end_step()
    assert setting.finish() == ({f"{name} again" for name in many}, set())
    for name, ids in many.items():
        setting.engine.check(setting.store.prompt([*ids, 1]), others[name], len(ids))


# What fails


def test_a_resume_point_that_is_gone_fails_the_load(setting: Setting) -> None:
    ids = list(range(100, 131))
    others = setting.engine.tables(31)
    before = setting.engine.image()
    setting.load("second", ids, others, 30)
    assert setting.finish() == ({"second"}, {"second"})
    assert setting.engine.image() == before
    report = setting.worker.report()
    assert report is not None
    assert report.loads_done == {("second", 1): 0}
    assert report.failures == {"LeaseGoneError": 1}
    assert setting.finish() == (set(), set()), "each load ends once"


def test_a_shorter_resume_point_is_no_substitute(setting: Setting) -> None:
    """The engine counts what was ordered as computed, all or nothing."""
    ids = list(range(100, 131))
    setting.save("first", ids[:16], setting.engine.tables(16), 0, 16)
    setting.load("second", ids, setting.engine.tables(31), 30)
    assert setting.finish() == ({"second"}, {"second"})


def test_no_store_fails_loads_and_saves_and_nothing_else(setting: Setting) -> None:
    stores.withdraw(SOCKET, setting.store)
    ids = list(range(100, 131))
    setting.save("first", ids, setting.engine.tables(31), 0, 31)
    setting.load("second", ids, setting.engine.tables(31), 30)
    assert setting.finish() == ({"second"}, {"second"})
    report = setting.worker.report()
    assert report is not None
    assert report.is_store_gone
    assert report.counters.saves_failed == report.counters.loads_failed == 1
    assert not report.committed


def test_a_store_that_closes_and_another_that_opens(setting: Setting) -> None:
    ids = list(range(100, 131))
    setting.save("first", ids, setting.engine.tables(31), 0, 31)
    setting.store.close()
    setting.load("second", ids, setting.engine.tables(31), 30)
    assert setting.finish() == ({"second"}, {"second"})
    setting.save("first", ids, setting.engine.tables(31), 0, 31)
    report = setting.worker.report()
    assert report is not None
    assert report.is_store_gone
    with open_store(setting.engine.spec, dram="8MiB") as store:
        stores.share(SOCKET, store)
        setting.store = store
        setting.save("third", ids, setting.engine.tables(31), 0, 31)
        assert store.match([*ids, 1]).tokens == 31
        report = setting.worker.report()
        assert report is not None
        assert not report.is_store_gone
        stores.withdraw(SOCKET, store)


def test_a_full_store_is_counted(setting: Setting) -> None:
    tables = setting.engine.tables(61)
    with open_store(setting.engine.spec, dram="192KiB") as small, ExitStack() as leases:
        stores.share(SOCKET, small)
        for number in range(64):  # each keeps what it has read, so that nothing can be evicted
            ids = [number, *range(100, 160)]
            setting.save(f"request {number}", ids, tables, 0, 61)
            match = small.match([*ids, 1])
            if not match:
                break
            leases.enter_context(small.read(match))
        report = setting.worker.report()
        assert report is not None
        assert report.counters.saves_failed == 1
        assert sum(report.failures.values()) == 1
        assert set(report.failures) <= {"PoolFullError", "WriteTooLargeError"}
        stores.withdraw(SOCKET, small)


def test_a_forward_that_failed_is_not_saved(setting: Setting) -> None:
    """A connector's step is ended also while an error is on its way up: the pages hold nobody's cache."""
    ids = list(range(100, 130))
    tables = setting.engine.tables(30)
    order = SaveOrder("first", 0, 30, tables, (30,), "joint")
    setting.worker.take_orders(StepOrders(1, SOCKET, setting.prompts("first", ids), saves=(order,)))

    def step() -> None:
        try:
            raise RuntimeError("forward")
        finally:
            setting.worker.begin_loads()
            setting.worker.end_step()

    with pytest.raises(RuntimeError, match="forward"):
        step()
    assert setting.worker.report() is None
    assert not setting.store.match([*ids, 1])


def test_an_order_for_a_request_that_nobody_named(setting: Setting) -> None:
    tables = setting.engine.tables(31)
    orders = StepOrders(
        1, SOCKET, loads=(LoadOrder("nobody", 30, 0, tables, 1),), saves=(SaveOrder("none", 0, 30, tables, (30,), "j"),)
    )
    setting.worker.take_orders(orders)
    setting.worker.begin_loads()
    setting.worker.end_step()
    assert setting.finish() == ({"nobody"}, {"nobody"})
    report = setting.worker.report()
    assert report is not None
    assert report.failures == {"WriteError": 2}


def test_an_aborted_request_ends_its_load_once(setting: Setting) -> None:
    ids = list(range(100, 131))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)
    others = setting.engine.tables(31)
    order = LoadOrder("second", 30, 0, others, 1)
    worker = setting.worker
    assert worker._loader is not None
    before = setting.engine.image()
    with worker._loader._changed:  # no thread begins before the request ends
        worker.take_orders(StepOrders(1, SOCKET, setting.prompts("second", ids), loads=(order,)))
        worker.begin_loads()
        worker.end_step()
        worker.take_orders(StepOrders(2, SOCKET, ended=("second",)))
    assert setting.finish() == ({"second"}, {"second"})
    assert setting.engine.image() == before, "the engine may give the pages to another request"
    report = worker.report()
    assert report is not None
    assert report.failures == {"LoadCancelledError": 1}


def test_closing_ends_what_waits(hybrid_setting: Setting) -> None:
    ids = list(range(100, 131))
    worker = hybrid_setting.worker
    orders = tuple(LoadOrder(f"request {number}", 30, 0, hybrid_setting.engine.tables(31), 1) for number in range(3))
    prompts = tuple(NewPrompt(order.request_id, np.asarray(ids, np.uint32)) for order in orders)
    worker.take_orders(StepOrders(1, SOCKET, prompts, loads=orders))
    worker.begin_loads()
    worker.close()
    assert worker._loader is not None
    assert not worker._loader.under_way
    assert worker.finished_loads()[0] == {order.request_id for order in orders}
    assert not any(thread.is_alive() for thread in worker._loader._threads)


def test_a_load_that_fails_half_way_is_failed_as_a_whole(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some pages were written: the engine computes all of them again, and asks nobody which."""
    ids = list(range(100, 131))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)
    copy = Lease.copy_to_pages
    copied: list[Any] = []

    def fails_at_the_second(lease: Lease, *arguments: Any, **named: Any) -> None:
        if copied:
            raise LoadFailedError("a record is damaged")
        copied.append(copy(lease, *arguments, **named))

    before = setting.engine.image()
    layers = [[layer] for layer in setting.engine.spec.layers]
    mapping = setting.engine.mapping
    load = mapping.load
    with monkeypatch.context() as broken:
        broken.setattr(Lease, "copy_to_pages", fails_at_the_second)
        broken.setattr(
            mapping,
            "load",
            lambda *arguments, **named: [load(*arguments, **{**named, "layers": chosen}) for chosen in layers],
        )
        setting.load("second", ids, setting.engine.tables(31), 30)
        assert setting.finish() == ({"second"}, {"second"})
    assert copied
    assert setting.engine.image() != before
    report = setting.worker.report()
    assert report is not None
    assert report.failures == {"LoadFailedError": 1}
    others = setting.engine.tables(31)
    setting.load("third", ids, others, 30)
    assert setting.finish() == ({"third"}, set())
    setting.engine.check(setting.store.prompt(ids), others, 30)


def test_an_error_that_is_none_of_the_stores_still_ends_the_load(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that is never told waits for ever."""
    ids = list(range(100, 131))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(setting.engine.mapping, "load", fail)
        setting.load("second", ids, setting.engine.tables(31), 30)
        assert setting.finish() == ({"second"}, {"second"})
    assert "ZeroDivisionError" in caplog.text
    setting.load("third", ids, setting.engine.tables(31), 30)
    assert setting.finish() == ({"third"}, set()), "its thread goes on"


def test_a_load_that_waits_too_long_fails_without_a_copy(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(100, 131))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)
    before = setting.engine.image()
    monkeypatch.setattr(setting.worker._loader, "_deadline_s", 0.0)
    setting.load("second", ids, setting.engine.tables(31), 30)
    assert setting.finish() == ({"second"}, {"second"})
    assert setting.engine.image() == before
    report = setting.worker.report()
    assert report is not None
    assert report.failures == {"DeadlineError": 1}


def test_the_engine_goes_on_while_a_load_runs(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the engine's thread calls waits for a load; another request is saved meanwhile."""
    ids, other = list(range(100, 131)), list(range(500, 520))
    setting.save("first", ids[:30], setting.engine.tables(30), 0, 30)
    assert setting.worker.report()
    may_go = threading.Event()
    load = setting.engine.mapping.load

    def waits(*arguments: Any, **named: Any) -> None:
        assert may_go.wait(TEST_S)
        load(*arguments, **named)

    monkeypatch.setattr(setting.engine.mapping, "load", waits)
    others = setting.engine.tables(31)
    setting.load("second", ids, others, 30)
    setting.save("third", other, setting.engine.tables(20), 0, 20)
    report = setting.worker.report()
    assert report is not None
    assert report.committed == {"third": 20}
    assert setting.worker.finished_loads() == (set(), set())
    may_go.set()
    assert setting.finish() == ({"second"}, set())
    setting.engine.check(setting.store.prompt(ids), others, 30)


def test_tenants_and_adapters_do_not_meet(setting: Setting) -> None:
    ids = list(range(100, 131))
    tables = setting.engine.tables(30)
    new = NewPrompt("first", np.asarray(ids[:30], np.uint32), b"tenant", "adapter", (ExtraInput(3, b"image"),))
    order = SaveOrder("first", 0, 30, tables, (30,), "joint")
    setting.worker.take_orders(StepOrders(1, SOCKET, (new,), saves=(order,)))
    prompt = setting.store.prompt(ids[:30], salt=b"tenant", adapter="adapter", extras=(ExtraInput(3, b"image"),))
    setting.engine.compute(prompt, tables, 0, 30)
    setting.worker.end_step()
    named: dict[str, dict[str, Any]] = {
        "another tenant": {"adapter": "adapter", "extras": (ExtraInput(3, b"image"),)},
        "another adapter": {"salt": b"tenant", "extras": (ExtraInput(3, b"image"),)},
        "another image": {"salt": b"tenant", "adapter": "adapter", "extras": (ExtraInput(3, b"other"),)},
        "itself": {"salt": b"tenant", "adapter": "adapter", "extras": (ExtraInput(3, b"image"), ExtraInput(30, b"x"))},
    }
    loads = tuple(LoadOrder(name, 30, 0, setting.engine.tables(31), 1) for name in named)
    prompts = tuple(NewPrompt(name, np.asarray(ids, np.uint32), **identity) for name, identity in named.items())
    setting.worker.take_orders(StepOrders(2, SOCKET, prompts, loads=loads))
    setting.worker.begin_loads()
    assert setting.finish() == (set(named), set(named) - {"itself"})


def test_tokens_that_were_decoded_are_known_when_they_are_saved(setting: Setting) -> None:
    ids = list(range(100, 132))
    tables = setting.engine.tables(32)
    setting.save("first", ids[:20], tables, 0, 20)
    more = tuple(MoreTokens("first", 20 + n, np.asarray(ids[20 + n : 21 + n], np.uint32)) for n in range(12))
    order = SaveOrder("first", 20, 32, tables, (32,), "joint")
    setting.engine.compute(setting.store.prompt(ids), tables, 20, 32)
    setting.worker.take_orders(StepOrders(2, SOCKET, more_tokens=more, saves=(order,)))
    setting.worker.end_step()
    assert setting.store.match([*ids, 1]).tokens == 32
    unknown = MoreTokens("nobody", 0, np.asarray([1], np.uint32))
    gap = MoreTokens("first", 40, np.asarray([1], np.uint32))
    setting.worker.take_orders(StepOrders(3, SOCKET, more_tokens=(unknown, gap)))
    report = setting.worker.report()
    assert report is not None
    assert report.failures == {"WriteError": 2}
    setting.worker.take_orders(StepOrders(4, SOCKET, ended=("first", "nobody")))
    assert not len(setting.worker._prompts)
