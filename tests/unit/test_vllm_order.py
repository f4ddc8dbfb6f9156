"""The worker's half of the vLLM connector on a device that does nothing until it is waited for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvstore.adapters.vllm import registering, stores  # noqa: E402
from kvstore.adapters.vllm.metadata import LoadOrder, NewPrompt, SaveOrder, StepOrders  # noqa: E402
from kvstore.adapters.vllm.working import Worker  # noqa: E402
from kvstore.clock import Deadline  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from kvstore.testing.lagging_device import LaggingDevice  # noqa: E402
from kvstore.testing.specs import check_lease, hybrid  # noqa: E402
from kvstore.tiers.gpu import pages  # noqa: E402
from tests.vllm_cases import PAGES, SmallEngine  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Store

TEST_S = 30.0
SOCKET = "the owner's own"
IDS = list(range(100, 131))


class Setting:
    def __init__(self, device: LaggingDevice, engine: SmallEngine, store: Store) -> None:
        self.device = device
        self.engine = engine
        self.store = store
        self.worker = Worker(engine.mapping, page_count=PAGES, again_s=0.01)
        self.worker.register(engine.tensors)

    def save(self, tables: tuple[tuple[int, ...], ...]) -> None:
        """A step whose forward is asked for, and its save."""
        new, order = named("first"), SaveOrder("first", 0, 30, tables, (30,), "joint")
        self.worker.take_orders(StepOrders(1, SOCKET, (new,), saves=(order,)))
        prompt = self.store.prompt(IDS[:30])
        self.device.stream_of(None).run(lambda: self.engine.compute(prompt, tables, 0, 30))
        self.worker.begin_loads()
        self.worker.end_step()


def named(request_id: str) -> NewPrompt:
    return NewPrompt(request_id, np.asarray(IDS, np.uint32))


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    device = LaggingDevice()
    for module in (registering, pages):
        monkeypatch.setattr(module, "open_device", lambda name: device)
    monkeypatch.setattr(registering, "_stream_on", lambda device: device.stream())
    engine = SmallEngine(hybrid(4), device=device)
    with open_store(engine.spec, dram="8MiB") as store:
        stores.share(SOCKET, store)
        setting = Setting(device, engine, store)
        yield setting
        device.is_held = False
        setting.worker.close()
        stores.withdraw(SOCKET, store)


def test_a_save_reads_behind_the_forward_and_before_the_next(setting: Setting) -> None:
    tables = setting.engine.tables(30)
    setting.save(tables)
    # The next step overwrites states, and pages that were given to another request.
    setting.engine.compute(setting.store.prompt(range(900, 930)), tables, 0, 30)
    with setting.store.read(setting.store.match(IDS)) as lease:
        check_lease(lease, setting.store.prompt(IDS))


def test_a_load_writes_behind_what_the_engine_asked_for_before(setting: Setting) -> None:
    """The pages were another request's, whose last step may still run; and its end is told once they are filled."""
    setting.save(setting.engine.tables(30))
    tables = setting.engine.tables(31)
    last = setting.store.prompt(range(900, 931))
    engine_stream = setting.device.stream_of(None)
    seen: list[dict[str, bytes]] = []
    engine_stream.run(lambda: setting.engine.compute(last, tables, 0, 30))
    engine_stream.run(lambda: seen.append(setting.engine.image()))
    order = LoadOrder("second", 30, 0, tables, 1)
    setting.worker.take_orders(StepOrders(2, SOCKET, (named("second"),), loads=(order,)))
    setting.worker.begin_loads()
    setting.worker.end_step()
    assert setting.worker._loader is not None
    assert setting.worker._loader.wait(TEST_S)
    assert setting.worker.finished_loads() == ({"second"}, set())
    assert seen, "the load did not wait for the engine"
    setting.engine.check(setting.store.prompt(IDS), tables, 30)
    engine_stream.mark().wait(Deadline.after(TEST_S), "the engine")
    setting.engine.check(setting.store.prompt(IDS), tables, 30)


def test_a_load_is_not_told_before_the_device_has_done_it(setting: Setting) -> None:
    setting.save(setting.engine.tables(30))
    tables = setting.engine.tables(31)
    setting.device.is_held = True
    order = LoadOrder("second", 30, 0, tables, 1)
    setting.worker.take_orders(StepOrders(2, SOCKET, (named("second"),), loads=(order,)))
    setting.worker.begin_loads()
    setting.worker.end_step()
    assert setting.worker._loader is not None
    assert not setting.worker._loader.wait(0.05)
    assert setting.worker.finished_loads() == (set(), set())
    setting.device.is_held = False
    assert setting.worker._loader.wait(TEST_S)
    assert setting.worker.finished_loads() == ({"second"}, set())
    setting.engine.check(setting.store.prompt(IDS), tables, 30)


def test_a_device_that_hangs_fails_the_load_when_nothing_moves_any_more(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told as failed, its pages may be given away: a copy that is still under way must not land in them."""
    setting.save(setting.engine.tables(30))
    tables = setting.engine.tables(31)
    loader = setting.worker._loader
    assert loader is not None
    monkeypatch.setattr(loader, "_deadline_s", 0.02)
    setting.device.is_held = True
    order = LoadOrder("second", 30, 0, tables, 1)
    setting.worker.take_orders(StepOrders(2, SOCKET, (named("second"),), loads=(order,)))
    setting.worker.begin_loads()
    assert not loader.wait(0.1)
    setting.device.is_held = False
    assert loader.wait(TEST_S)
    assert setting.worker.finished_loads() == ({"second"}, {"second"})
    before = setting.engine.image()
    setting.device.drain()
    assert setting.engine.image() == before
