"""The vLLM connector layer by layer: saves behind each layer's forward, loads in front of it."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvstore.adapters.paged import CheckpointPolicy  # noqa: E402
from kvstore.adapters.vllm import registering, stores  # noqa: E402
from kvstore.adapters.vllm.layered_loading import check_may_be_layered  # noqa: E402
from kvstore.adapters.vllm.metadata import LoadOrder, NewPrompt, SaveOrder, StepOrders, WorkerReport  # noqa: E402
from kvstore.adapters.vllm.scheduling import Scheduling  # noqa: E402
from kvstore.adapters.vllm.search import Searches  # noqa: E402
from kvstore.adapters.vllm.working import Worker  # noqa: E402
from kvstore.clock import Deadline  # noqa: E402
from kvstore.errors import ConfigError, LoadFailedError  # noqa: E402
from kvstore.store import open_store  # noqa: E402
from kvstore.testing.lagging_device import LaggingDevice  # noqa: E402
from kvstore.testing.specs import check_lease, dense, hybrid, pure_state, windowed  # noqa: E402
from kvstore.tiers.gpu import pages  # noqa: E402
from tests.vllm_cases import PAGES, SmallEngine, groups_like  # noqa: E402
from tests.vllm_requests import FakeRequest, FakeSchedulerStore, keep, step  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvstore.spec import ModelSpec
    from kvstore.store import Store

TEST_S = 30.0
SOCKET = "the owner's own"
LIKE = {spec.model: spec for spec in (dense(4), hybrid(4), windowed(4), pure_state(4))}
IDS = list(range(100, 131))

Tables = tuple[tuple[int, ...], ...]


class Setting:
    """A worker and its engine, whose forward tells it of each layer of attention, as vLLM's does."""

    def __init__(self, engine: SmallEngine, store: Store, *, saves_by_layer: bool = True) -> None:
        self.engine = engine
        self.store = store
        self.worker = Worker(engine.mapping, page_count=PAGES, again_s=0.01, saves_by_layer=saves_by_layer)
        self.worker.register(engine.tensors)
        self._known: set[str] = set()
        self._step = 0

    @property
    def thread(self) -> Any:
        """Of saves."""
        assert self.worker._saver is not None
        return self.worker._saver._layers

    def new(self, request_id: str, token_ids: Sequence[int]) -> tuple[NewPrompt, ...]:
        if request_id in self._known:
            return ()
        self._known.add(request_id)
        return (NewPrompt(request_id, np.asarray(token_ids, np.uint32)),)

    def orders(self, token_ids: dict[str, Sequence[int]], **orders: Any) -> None:
        self._step += 1
        prompts = tuple(new for name, ids in token_ids.items() for new in self.new(name, ids))
        self.worker.take_orders(StepOrders(self._step, SOCKET, prompts, **orders))

    def forward(
        self,
        computed: Sequence[tuple[Sequence[int], Tables, int, int]],
        *,
        behind: Callable[[str], None] = lambda name: None,
    ) -> None:
        """One step's: of token ids, their tables, from, to."""
        for name in self.engine.hooked:
            self.worker.wait_for_layer(name)
            for ids, tables, start, stop in computed:
                self.engine.compute(self.store.prompt(ids), tables, start, stop, only=name)
            self.worker.save_layer(name)
            behind(name)
        for name in self.engine.silent:
            for ids, tables, start, stop in computed:
                self.engine.compute(self.store.prompt(ids), tables, start, stop, only=name)

    def save(
        self, request_id: str, token_ids: Sequence[int], tables: Tables, start: int, stop: int,
        resume_at: tuple[int, ...] = (), behind: Callable[[str], None] = lambda name: None,
    ) -> None:  # fmt: skip
        order = SaveOrder(request_id, start, stop, tables, resume_at or (stop,), f"{request_id}-{stop}")
        self.orders({request_id: token_ids}, saves=(order,))
        self.forward([(token_ids, tables, start, stop)], behind=behind)
        self.worker.begin_loads()
        self.worker.end_step()

    def report(self) -> WorkerReport:
        report = self.worker.report()
        assert report is not None
        return report

    def stored(self, ids: Sequence[int]) -> dict[int, dict[tuple[int, str], bytes]]:
        """All bytes of all resume points of a prompt, by length."""
        found = {}
        for candidate in self.store.match([*ids, 1]).candidates:
            with self.store.read(self.store.match([*ids, 1]).at(candidate.tokens)) as lease:
                check_lease(lease, self.store.prompt([*ids, 1]))
                found[candidate.tokens] = {
                    (layer, tensor.name): lease.layer(layer).read(tensor.name).tobytes()
                    for group in lease.spec.groups
                    for layer in group.layers
                    for tensor in group.tensors
                }
        return found


def opened(engine: SmallEngine, **settings: Any) -> Iterator[Setting]:
    with open_store(engine.spec, dram="8MiB") as store:
        stores.share(SOCKET, store)
        setting = Setting(engine, store, **settings)
        yield setting
        setting.worker.close()
        stores.withdraw(SOCKET, store)
        assert store.statistics().reserved_bytes == 0, "a writer is open"


@pytest.fixture(params=list(LIKE))
def setting(request: pytest.FixtureRequest) -> Iterator[Setting]:
    yield from opened(SmallEngine(LIKE[request.param]))


@pytest.fixture
def plain() -> Iterator[Setting]:
    """Of a model of attention alone."""
    yield from opened(SmallEngine(dense(4)))


# Saves


def test_what_is_saved_by_layer_is_what_is_saved_at_the_end(setting: Setting) -> None:
    def run(one: Setting) -> dict[int, dict[tuple[int, str], bytes]]:
        tables = one.engine.tables(30)
        one.save("first", IDS[:30], tables, 0, 16)
        windows = (20, 30) if not one.engine.silent else (30,)
        one.save("first", IDS[:30], tables, 16, 30, windows)
        assert one.report().committed == {"first": 30}
        return one.stored(IDS[:30])

    by_layer = run(setting)
    for other in opened(SmallEngine(setting.engine.spec), saves_by_layer=False):
        at_the_end = run(other)
    assert 30 in by_layer
    assert by_layer == at_the_end


def test_a_layer_is_put_behind_its_own_forward(setting: Setting) -> None:
    """Its pages may be anything afterwards; those of states, of which no call tells, are put at the end."""

    def overwrite(name: str) -> None:
        assert setting.thread.wait(Deadline.after(TEST_S))
        setting.engine.tensors[name].view(torch.uint8).fill_(77)

    setting.save("first", IDS[:30], setting.engine.tables(30), 0, 30, behind=overwrite)
    assert setting.report().committed == {"first": 30}
    assert setting.stored(IDS[:30])


def test_a_layer_that_nobody_tells_of_is_put_at_the_end(plain: Setting) -> None:
    tables = plain.engine.tables(30)
    order = SaveOrder("first", 0, 30, tables, (30,), "joint")
    plain.orders({"first": IDS[:30]}, saves=(order,))
    plain.engine.compute(plain.store.prompt(IDS), tables, 0, 30)
    plain.worker.save_layer(plain.engine.hooked[0])
    plain.worker.save_layer("model.layers.0.no_cache")
    plain.worker.end_step()
    assert plain.report().committed == {"first": 30}
    assert plain.stored(IDS[:30])


def test_a_forward_that_fails_ends_all_writers(setting: Setting) -> None:
    tables = setting.engine.tables(30)
    orders = tuple(SaveOrder(name, 0, 30, tables, (30,), name) for name in ("first", "second"))
    setting.orders({"first": IDS[:30], "second": [5, *IDS[:29]]}, saves=orders)
    assert setting.store.statistics().reserved_bytes

    def forward() -> None:
        try:
            if setting.engine.hooked:
                setting.worker.save_layer(setting.engine.hooked[0])
            raise RuntimeError("forward")
        finally:
            setting.worker.begin_loads()
            setting.worker.end_step()

    with pytest.raises(RuntimeError, match="forward"):
        forward()
    assert setting.store.statistics().reserved_bytes == 0
    assert setting.worker.report() is None
    assert not setting.store.match([*IDS[:30], 1])
    setting.save("first", IDS[:30], tables, 0, 30)
    assert setting.report().committed == {"first": 30}


def test_a_step_that_does_not_end_leaves_no_writer_to_the_next(setting: Setting) -> None:
    tables = setting.engine.tables(30)
    setting.orders({"first": IDS[:30]}, saves=(SaveOrder("first", 0, 30, tables, (30,), "joint"),))
    for name in setting.engine.hooked:
        setting.worker.save_layer(name)
    setting.orders({}, ended=("first",))
    assert setting.store.statistics().reserved_bytes == 0
    setting.worker.end_step()
    assert setting.worker.report() is None
    assert not setting.store.match([*IDS[:30], 1])


def test_requests_of_one_step_with_the_same_prefix(setting: Setting) -> None:
    prompts = {"first": IDS[:30], "second": [*IDS[:20], *range(7)], "third": IDS[:30]}
    tables = {name: setting.engine.tables(30) for name in prompts}
    orders = tuple(SaveOrder(name, 0, len(ids), tables[name], (len(ids),), name) for name, ids in prompts.items())
    setting.orders(dict(prompts), saves=orders)
    setting.forward([(ids, tables[name], 0, len(ids)) for name, ids in prompts.items()])
    setting.worker.end_step()
    assert setting.report().committed == {name: len(ids) for name, ids in prompts.items()}
    for ids in prompts.values():
        assert len(ids) in setting.stored(ids)


def test_a_layer_that_cannot_be_put_fails_its_save_alone(plain: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    save = plain.engine.mapping.save

    def fails(writer: Any, tables: Any, *arguments: Any, **named: Any) -> None:
        if len(writer.prompt) == 30 and named["names"] == (plain.engine.hooked[1],):
            raise LoadFailedError("a layer")
        save(writer, tables, *arguments, **named)

    monkeypatch.setattr(plain.engine.mapping, "save", fails)
    tables = plain.engine.tables(30)
    orders = (SaveOrder("first", 0, 30, tables, (30,), "1"), SaveOrder("second", 0, 20, tables, (20,), "2"))
    plain.orders({"first": IDS[:30], "second": IDS[:20]}, saves=orders)
    plain.forward([(IDS, tables, 0, 30)])
    plain.worker.end_step()
    report = plain.report()
    assert report.committed == {"second": 20}
    assert (report.counters.saves, report.counters.saves_failed) == (2, 1)
    assert report.failures == {"LoadFailedError": 1}
    assert plain.store.match([*IDS[:30], 1]).tokens == 20


def test_a_layer_that_is_told_of_twice_is_not_saved(plain: Setting) -> None:
    """Which of both calls came behind all of its tokens is not known."""
    tables = plain.engine.tables(30)
    plain.orders({"first": IDS[:30]}, saves=(SaveOrder("first", 0, 30, tables, (30,), "joint"),))
    plain.forward([(IDS, tables, 0, 30)], behind=plain.worker.save_layer)
    plain.worker.end_step()
    report = plain.report()
    assert report.failures == {"WriteError": 1}
    assert not plain.store.match([*IDS[:30], 1])


def test_layers_that_are_late_are_not_waited_for(plain: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go, save = threading.Event(), plain.engine.mapping.save

    def waits(*arguments: Any, **named: Any) -> None:
        assert may_go.wait(TEST_S)
        save(*arguments, **named)

    monkeypatch.setattr(plain.engine.mapping, "save", waits)
    monkeypatch.setattr(plain.worker._saver, "_deadline_s", 0.02)
    plain.save("first", IDS[:30], plain.engine.tables(30), 0, 30)
    assert plain.report().failures == {"DeadlineError": 1}
    may_go.set()
    assert plain.thread.wait(Deadline.after(TEST_S))
    assert not plain.store.match([*IDS[:30], 1])


def test_a_store_that_is_full_when_the_step_begins(plain: Setting) -> None:
    with open_store(plain.engine.spec, dram="64KiB") as small:
        stores.share(SOCKET, small)
        plain.save("first", list(range(500)), plain.engine.tables(500), 0, 500)
        report = plain.report()
        assert (report.counters.saves, report.counters.saves_failed) == (1, 1)
        assert not report.committed
        stores.share(SOCKET, plain.store)


# Loads within a step


def loads(setting: Setting, tokens: int, tables: Tables, *, start: int = 0, name: str = "second") -> LoadOrder:
    return LoadOrder(name, tokens, start, tables, 1, is_layered=True)


def prepared(setting: Setting) -> None:
    setting.save("first", IDS[:30], setting.engine.tables(30), 0, 30)
    assert setting.report().committed


def test_each_layer_is_there_when_its_forward_begins(plain: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(plain)
    tables = plain.engine.tables(31)
    load, gates = plain.engine.mapping.load, {name: threading.Event() for name in plain.engine.hooked}

    def waits(*arguments: Any, names: tuple[str], **named: Any) -> None:
        assert gates[names[0]].wait(TEST_S)
        load(*arguments, names=names, **named)

    monkeypatch.setattr(plain.engine.mapping, "load", waits)
    plain.orders({"second": IDS}, loads=(loads(plain, 30, tables),))
    plain.worker.begin_loads()
    for name in plain.engine.hooked:
        # The new token is written before the layer's load is waited for, and lies in a page that the load fills.
        plain.engine.compute(plain.store.prompt(IDS), tables, 30, 31, only=name)
        gates[name].set()
        plain.worker.wait_for_layer(name)
        check_layer(plain, name, tables, 31)
    plain.worker.end_step()
    report = plain.report()
    assert report.loads_done == {("second", 1): 30}
    assert report.counters.loaded_tokens == 30
    assert plain.worker.load_errors() == set()
    assert plain.worker.finished_loads() == (set(), set()), "vLLM waits for no request"
    plain.engine.check(plain.store.prompt(IDS), tables, 31)


def check_layer(setting: Setting, name: str, tables: Tables, stop: int) -> None:
    """Against one whose pages were computed."""
    other = SmallEngine(setting.engine.spec)
    computed = other.tables(stop)
    other.compute(setting.store.prompt(IDS), computed, 0, stop, only=name)
    group = other.groups[0]
    for column in range(-(-stop // group.page_tokens)):
        left = min(group.page_tokens, stop - column * group.page_tokens)
        mine = setting.engine.page_bytes(name, group, tables[0][column])[0, :, :left]
        theirs = other.page_bytes(name, group, computed[0][column])[0, :, :left]
        assert mine.tobytes() == theirs.tobytes(), f"{name}, page {column}"


def test_several_loads_and_what_the_engine_has(plain: Setting) -> None:
    prepared(plain)
    many = {f"request {number}": plain.engine.tables(31) for number in range(3)}
    for tables in many.values():
        plain.engine.compute(plain.store.prompt(IDS), tables, 0, 8)
    orders = tuple(loads(plain, 30, tables, start=8, name=name) for name, tables in many.items())
    plain.orders(dict.fromkeys(many, IDS), loads=orders)
    plain.worker.begin_loads()
    plain.forward([(IDS, tables, 30, 31) for tables in many.values()])
    plain.worker.end_step()
    assert plain.report().loads_done == {(name, 1): 30 for name in many}
    for tables in many.values():
        plain.engine.check(plain.store.prompt(IDS), tables, 31)


def test_what_was_computed_from_a_failed_load_is_not_saved(plain: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of the request, nor of another one that begins behind the same page; others are."""
    prepared(plain)
    load = plain.engine.mapping.load

    def fails(lease: Any, tables: Any, *arguments: Any, names: tuple[str], **named: Any) -> None:
        if names[0] == plain.engine.hooked[-1]:
            raise LoadFailedError("a record is damaged")
        load(lease, tables, *arguments, names=names, **named)

    monkeypatch.setattr(plain.engine.mapping, "load", fails)
    tables, others = plain.engine.tables(40), plain.engine.tables(20)
    shared = (tables[0][:2] + plain.engine.tables(24)[0],)
    more = [*IDS, *range(9)]
    end = {"second": more, "shares": [*IDS[:16], *range(8)], "third": list(range(20))}
    saves = (
        SaveOrder("second", 30, 40, tables, (40,), "2"),
        SaveOrder("shares", 16, 24, shared, (24,), "s"),
        SaveOrder("third", 0, 20, others, (20,), "3"),
    )
    plain.orders(dict(end), loads=(loads(plain, 30, tables),), saves=saves)
    plain.worker.begin_loads()
    plain.forward([(more, tables, 30, 40), (end["shares"], shared, 16, 24), (end["third"], others, 0, 20)])
    plain.worker.end_step()
    assert plain.worker.load_errors() == set(tables[0][:4])
    assert plain.worker.load_errors() == set()
    report = plain.report()
    assert report.loads_done == {("second", 1): 0}
    assert report.committed == {"third": 20}
    assert (report.counters.saves_failed, report.counters.loads_failed) == (2, 1)
    assert plain.store.match([*more, 1]).tokens == 30
    assert plain.store.match([*end["shares"], 1]).tokens == 16

    # vLLM computes again from the first of these pages on, and that is saved.
    plain.save("second", more, tables, 0, 40)
    assert plain.report().committed == {"second": 40}
    assert 40 in plain.stored(more)


def test_a_resume_point_that_is_gone(plain: Setting) -> None:
    tables = plain.engine.tables(31)
    plain.orders({"second": IDS}, loads=(loads(plain, 30, tables, start=8),))
    plain.worker.begin_loads()
    plain.forward([(IDS, tables, 30, 31)])
    plain.worker.end_step()
    assert plain.worker.load_errors() == set(tables[0][1:])
    assert plain.report().failures == {"LeaseGoneError": 1}


def test_no_store(plain: Setting) -> None:
    stores.withdraw(SOCKET, plain.store)
    tables = plain.engine.tables(31)
    plain.orders({"second": IDS}, loads=(loads(plain, 30, tables),))
    plain.worker.begin_loads()
    plain.forward([(IDS, tables, 30, 31)])
    plain.worker.end_step()
    assert plain.worker.load_errors() == set(tables[0])
    assert plain.report().loads_done == {("second", 1): 0}


def test_a_forward_that_does_not_wait_has_not_read_what_was_loaded(plain: Setting) -> None:
    """A graph of the whole forward that is replayed calls nobody; nor does an engine that loads behind it."""
    prepared(plain)
    tables = plain.engine.tables(31)
    plain.orders({"second": IDS}, loads=(loads(plain, 30, tables),))
    plain.worker.begin_loads()
    for name in plain.engine.hooked[1:]:
        plain.worker.wait_for_layer(name)
    plain.worker.end_step()
    assert plain.worker.load_errors() == set(tables[0])
    assert plain.report().failures == {"LoadFailedError": 1}


def test_a_load_that_is_late_holds_the_forward_until_its_deadline(
    plain: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the end of the step until nothing moves into the pages: they are computed next."""
    prepared(plain)
    may_go, load, copied = threading.Event(), plain.engine.mapping.load, []

    def waits(*arguments: Any, **named: Any) -> None:
        assert may_go.wait(TEST_S)
        load(*arguments, **named)
        copied.append(named["names"])

    tables = plain.engine.tables(31)
    plain.orders({"second": IDS}, loads=(loads(plain, 30, tables),))
    monkeypatch.setattr(plain.engine.mapping, "load", waits)
    plain.worker._begin_layered([], None)  # makes it
    monkeypatch.setattr(plain.worker._layered, "_deadline_s", 0.02)
    plain.worker.begin_loads()
    for name in plain.engine.hooked:
        plain.worker.wait_for_layer(name)
    assert not copied
    threading.Timer(0.05, may_go.set).start()
    plain.worker.end_step()
    count = len(copied)
    assert plain.worker.load_errors() == set(tables[0])
    assert len(copied) == count
    assert plain.worker._layered is not None
    assert plain.worker._layered._thread.wait(Deadline.after(0))


# On a device


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[LaggingDevice, Setting]]:
    device = LaggingDevice()
    for module in (registering, pages):
        monkeypatch.setattr(module, "open_device", lambda name: device)
    monkeypatch.setattr(registering, "_stream_on", lambda device: device.stream())
    for setting in opened(SmallEngine(dense(4), device=device)):
        yield device, setting
        device.is_held = False


def test_a_layers_save_reads_behind_its_forward_and_not_the_whole(lagging: tuple[LaggingDevice, Setting]) -> None:
    device, setting = lagging
    tables, stream = setting.engine.tables(30), device.stream_of(None)
    setting.orders({"first": IDS[:30]}, saves=(SaveOrder("first", 0, 30, tables, (30,), "joint"),))
    prompt, done = setting.store.prompt(IDS[:30]), []

    def forward(name: str) -> None:
        setting.engine.compute(prompt, tables, 0, 30, only=name)
        done.append(name)

    first, *rest = setting.engine.hooked
    stream.run(lambda: forward(first))
    setting.worker.save_layer(first)
    assert setting.thread.wait(Deadline.after(TEST_S))
    assert done == [first], "it was asked for, and waited for by the save"
    for name in rest:
        stream.run(lambda name=name: forward(name))  # type: ignore[misc]
        setting.worker.save_layer(name)
    setting.worker.end_step()
    stream.run(lambda: setting.engine.compute(setting.store.prompt(range(900, 930)), tables, 0, 30))
    assert setting.report().committed == {"first": 30}
    assert setting.stored(IDS[:30])


def test_a_layers_load_is_behind_what_was_asked_and_before_its_forward(lagging: tuple[LaggingDevice, Setting]) -> None:
    device, setting = lagging
    tables, stream = setting.engine.tables(30), device.stream_of(None)
    setting.engine.compute(setting.store.prompt(IDS), tables, 0, 30)
    setting.orders({"first": IDS[:30]}, saves=(SaveOrder("first", 0, 30, tables, (30,), "joint"),))
    setting.worker.end_step()
    assert setting.report().committed
    tables = setting.engine.tables(31)
    # The step before still uses the pages, and what is behind the last token is zeroed before it is computed.
    stream.run(lambda: setting.engine.compute(setting.store.prompt(range(900, 931)), tables, 0, 31))
    setting.orders({"second": IDS}, loads=(loads(setting, 30, tables),))
    setting.worker.begin_loads()
    seen: list[str] = []

    def forward(name: str) -> None:
        setting.engine.compute(setting.store.prompt(IDS), tables, 30, 31, only=name)
        check_layer(setting, name, tables, 31)
        seen.append(name)

    for name in setting.engine.hooked:
        setting.worker.wait_for_layer(name)
        stream.run(lambda name=name: forward(name))  # type: ignore[misc]
    setting.worker.end_step()
    assert setting.report().loads_done == {("second", 1): 30}
    stream.mark().wait(Deadline.after(TEST_S), "the forward")
    assert seen == list(setting.engine.hooked)
    setting.engine.check(setting.store.prompt(IDS), tables, 31)


# Who must not


@pytest.mark.parametrize("spec", [hybrid(4), windowed(4), pure_state(4)], ids=lambda spec: spec.model)
def test_models_with_states_or_windows_are_refused_everywhere(spec: ModelSpec) -> None:
    with pytest.raises(ConfigError, match="load = 'layered', and the model has"):
        check_may_be_layered(groups_like(spec), 1)
    with open_store(spec, dram="1MiB") as store:
        source = FakeSchedulerStore(store)
        searches = Searches(source, prepare_deadline_s=1.0, fetch_deadline_s=1.0)
        with pytest.raises(ConfigError, match="load = 'layered', and the model has"):
            Scheduling(spec, source, searches, CheckpointPolicy(8, has_states=True), loads_by_layer=True)
        searches.close()
    for setting in opened(SmallEngine(spec)):
        setting.orders({"second": IDS}, loads=(loads(setting, 30, setting.engine.tables(31)),))
        with pytest.raises(ConfigError, match="load = 'layered', and the model has"):
            setting.worker.begin_loads()


def test_one_group_of_attention_is_not_refused() -> None:
    check_may_be_layered(groups_like(dense(4)), 1)
    with pytest.raises(ConfigError, match="has 2 cache groups"):
        check_may_be_layered(groups_like(dense(4)), 2)


def scheduling(spec: ModelSpec, store: Store, **settings: Any) -> Scheduling:
    source = FakeSchedulerStore(store)
    searches = Searches(source, prepare_deadline_s=TEST_S, fetch_deadline_s=TEST_S)
    return Scheduling(spec, source, searches, CheckpointPolicy(8, has_states=bool(spec.state_groups)), **settings)


@pytest.mark.parametrize("seed", range(20))
def test_no_way_leads_to_a_load_of_states_within_a_step(seed: int) -> None:
    """Whatever comes of requests, what can be loaded is answered as a load beside the steps."""
    random_one = random.Random(seed)
    spec = hybrid(4)
    with open_store(spec, dram="4MiB") as store:
        half = scheduling(spec, store)
        requests = [FakeRequest(f"request {number}", IDS[: random_one.randrange(9, 31)]) for number in range(4)]
        answered = 0
        for _ in range(60):
            request = random_one.choice(requests)
            did = random_one.choice(("keep", "match", "load", "report", "fail", "preempt", "finish"))
            if did == "keep":
                keep(store, IDS[: random_one.randrange(4, 30)])
            elif did in ("match", "load"):
                more, is_async = half.match(request, random_one.choice((0, 4, 8)))
                assert is_async or not more
                answered += bool(more)
                if did == "load" and more:
                    half.allocated(request, ([5, 6, 7], [8]), more)
                    assert not any(order.is_layered for order in half.orders(step()).loads)
            elif did in ("report", "fail"):
                name = request.request_id
                done = WorkerReport(loads_done={(name, 1): 0 if did == "fail" else 8})
                half.reported({name}, {name} if did == "fail" else (), done)
            elif did == "preempt":
                half.orders(step(preempted=[request.request_id]))
            else:
                half.finish(request)
        half.close()
    assert answered


# The scheduler's half


class Pages:
    """Of vLLM's block pool what is called."""

    blocks: Sequence[Any] = ()

    def __init__(self) -> None:
        self.evicted: set[int] = set()

    def evict_blocks(self, block_ids: set[int]) -> None:
        self.evicted |= block_ids


def test_a_layered_load_is_held_until_it_was_reported() -> None:
    with open_store(dense(4), dram="4MiB") as store:
        keep(store, IDS[:20])
        half = scheduling(dense(4), store, loads_by_layer=True)
        request = FakeRequest("one", IDS)
        assert half.match(request, 4) == (16, False)
        half.allocated(request, ([5, 6, 7],), 16)
        (order,) = half.orders(step({"one": 11})).loads
        assert order.is_layered
        assert (order.start, order.tokens) == (4, 20)
        pool: Any = store.pool
        key = store.prompt(IDS).path.keys[0]
        assert pool.evict_here(key) == 0 if hasattr(pool, "evict_here") else pool.evict(key) == 0
        half.reported((), (), WorkerReport(loads_done={("one", 7): 20}))
        assert half._loading, "another attempt's"
        half.reported((), (), WorkerReport(loads_done={("one", 1): 20}))
        assert not half._loading
        assert half.match(FakeRequest("two", IDS), 0) == (20, False)
        half.close()


def test_a_layered_load_that_failed_is_not_asked_for_again() -> None:
    with open_store(dense(4), dram="4MiB") as store:
        keep(store, IDS[:20])
        half = scheduling(dense(4), store, loads_by_layer=True)
        request = FakeRequest("one", IDS)
        half.match(request, 8)
        half.allocated(request, ([5, 6, 7, 8],), 12)
        # What this step computes behind the load, and what another one computes behind its pages, is nothing, too.
        tables = {"one": ([5, 6, 7, 8],), "shares": ([5, 6, 9],), "first page": ([5, 10],)}
        half.orders(step({"one": 11, "shares": 3, "first page": 2}, tables=tables))
        pool = Pages()
        half.unfilled_pages.bind(pool)
        half.reported((), (), WorkerReport(loads_done={("one", 1): 0}))
        assert pool.evicted == {6, 7, 8, 9}, "vLLM may find them by their hashes"
        assert not half._loading
        assert half.match(request, 0) == (0, False)
        half.close()
