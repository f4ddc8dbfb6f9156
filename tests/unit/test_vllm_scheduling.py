"""The scheduler's half of the vLLM connector: what it answers, orders, and holds."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.adapters.paged import CheckpointPolicy
from kvstore.adapters.vllm.handover import answer
from kvstore.adapters.vllm.metadata import Counters, StepOrders, WorkerReport
from kvstore.adapters.vllm.scheduling import Scheduling
from kvstore.adapters.vllm.search import Searches
from kvstore.errors import LoadFailedError, OwnerGoneError
from kvstore.store import open_store
from kvstore.testing.specs import hybrid
from tests.vllm_requests import FakeRequest, FakeSchedulerStore, keep, step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvstore.store import Lease, Match, Store

SPEC = hybrid(4)
TEST_S = 30.0
IDS = list(range(100, 121))
"""21 tokens: five blocks and a tail."""


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Setting:
    """A scheduler's half over a store of this process."""

    def __init__(self, store: Store, *, is_local: bool = True, alignment_tokens: int = 8, **settings: Any) -> None:
        self.clock = Clock()
        self.source = FakeSchedulerStore(store, is_local=is_local, address=settings.pop("address", ""))
        self.searches = Searches(
            self.source, prepare_deadline_s=5.0, fetch_deadline_s=20.0, push_wait_s=2.0, clock=self.clock
        )
        policy = CheckpointPolicy(alignment_tokens, has_states=settings.pop("has_states", True))
        self.half = Scheduling(SPEC, self.source, self.searches, policy, **settings)

    def ask(self, request: FakeRequest, computed: int = 0) -> tuple[int | None, bool]:
        """Ask until there is an answer."""
        until_s = time.monotonic() + TEST_S
        while (found := self.half.match(request, computed))[0] is None:
            assert time.monotonic() < until_s, "no answer"
            time.sleep(0.001)
        return found

    def begin_load(self, request: FakeRequest, computed: int = 0) -> StepOrders:
        more, is_async = self.ask(request, computed)
        assert more
        assert is_async
        self.half.allocated(request, ([5, 6, 7], [8]), more)
        return self.half.orders(step())


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def store(opened: ExitStack) -> Store:
    return opened.enter_context(open_store(SPEC, dram="4MiB"))


@pytest.fixture
def make(opened: ExitStack) -> Callable[..., Setting]:
    def made(store: Store, **settings: Any) -> Setting:
        setting = Setting(store, **settings)
        opened.callback(setting.half.close)
        return setting

    return made


def is_held(store: Store, ids: list[int] = IDS) -> bool:
    """Whether a lease keeps a prompt in memory; evicts it if not."""
    pool: Any = store.pool
    evict = getattr(pool, "evict_here", pool.evict)
    return bool(evict(store.prompt(ids).path.keys[0]) == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + TEST_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.001)


# Finding


def test_a_miss_is_computed(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store)
    request = FakeRequest("a", IDS)
    assert setting.half.match(request, 0) == (0, False)
    setting.half.allocated(request, ([1],), 0)
    assert setting.half.orders(step()).loads == ()


def test_a_hit_is_loaded_beside_the_steps(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7, 8])
    assert setting.half.match(request, 8) == (len(IDS) - 8, True)
    setting.half.allocated(request, ([5, 6, 0], [8]), len(IDS) - 8)
    orders = setting.half.orders(step())
    (load,) = orders.loads
    assert (load.tokens, load.start, load.tables, load.request_id) == (21, 8, ((5, 6, 0), (8,)), "a")
    (prompt,) = orders.prompts
    assert prompt.token_ids.tolist() == [*IDS, 7, 8]
    assert setting.half.orders(step()).is_empty, "an order was given twice"


def test_the_last_token_is_always_computed(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    keep(store, IDS[:16])
    assert make(store).half.match(FakeRequest("a", IDS), 0) == (16, True)


def test_asking_again_changes_nothing(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    answers = {setting.half.match(request, computed) for computed in (0, 0, 0)}
    assert answers == {(21, True)}
    assert setting.half.match(request, 16) == (5, True), "the engine's own hit has grown meanwhile"
    assert setting.half.counters.queries == 1


def test_what_the_engine_has_is_not_loaded(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, *range(20)])
    assert setting.half.match(request, 24) == (0, False)
    setting.half.allocated(request, ([1],), 0)
    assert not is_held(store)


def test_a_miss_is_looked_at_again_after_a_while(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (0, False)
    keep(store, IDS)
    assert setting.half.match(request, 0) == (0, False)
    setting.clock.now_s += 2.0
    assert setting.half.match(request, 0) == (21, True)


def test_a_request_that_must_not_read_does_not(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7], skip_reading_prefix_cache=True)
    assert setting.half.match(request, 0) == (0, False)
    assert not is_held(store)


def test_roles_load_only_or_save_only(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    request = FakeRequest("a", [*IDS, 7])
    assert make(store, may_load=False).half.match(request, 0) == (0, False)
    reader = make(store, may_save=False).half
    reader.add(request)
    assert reader.orders(step({"a": 22})).saves == ()


# Identity


def image(identifier: str) -> Any:
    place = SimpleNamespace(offset=2, length=3)
    return SimpleNamespace(modality="image", identifier=identifier, mm_position=place)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ({"cache_salt": "tenant 1"}, {"cache_salt": "tenant 2"}),
        ({"cache_salt": "tenant 1"}, {}),
        ({}, {"cache_salt": "tenant 1"}),
        ({}, {"lora_request": SimpleNamespace(lora_int_id=1, lora_name="l", lora_path="/nowhere")}),
        (
            {"lora_request": SimpleNamespace(lora_int_id=1, lora_name="l", lora_path="/nowhere")},
            {"lora_request": SimpleNamespace(lora_int_id=1, lora_name="m", lora_path="/nowhere")},
        ),
        (
            {"mm_features": [image("aa")]},
            {"mm_features": [image("bb")]},
        ),
    ],
    ids=["other tenant", "no tenant", "a tenant", "adapter", "other adapter", "other image"],
)  # fmt: skip
def test_a_prompt_under_another_name_is_a_miss(
    store: Store, make: Callable[..., Setting], written: dict[str, Any], asked: dict[str, Any]
) -> None:
    setting = make(store)
    for request_id, identity in (("writer", written), ("reader", asked)):
        request = FakeRequest(request_id, IDS, **identity)
        setting.half.add(request)
        if request_id == "writer":
            new = setting.half.orders(step({"writer": 21})).prompts[0]
            keep(store, IDS, salt=new.salt, adapter=new.adapter, extras=new.extras)
            same = FakeRequest("same", [*IDS, 7], **identity)
            assert setting.half.match(same, 0) == (21, True)
        else:
            assert setting.half.match(FakeRequest("other", [*IDS, 7], **identity), 0) == (0, False)


@pytest.mark.parametrize(
    "unnamed",
    [{"prompt_embeds": object()}, {"resumable": True}, {"lora_request": SimpleNamespace(load_inplace=True)}],
    ids=["embeddings", "streaming", "adapter replaced in place"],
)
def test_what_has_no_name_is_not_cached(store: Store, make: Callable[..., Setting], unnamed: dict[str, Any]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7], **unnamed)
    assert setting.half.match(request, 0) == (0, False)
    assert setting.half.orders(step({"a": 22})).is_empty
    assert setting.half.counters.not_cached.total() == 1
    assert setting.half.finish(request) is None


# Holding


def test_a_lease_is_held_from_match_to_loaded(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (21, True)
    assert is_held(store)
    setting.half.allocated(request, ([5],), 21)
    setting.half.orders(step())
    assert is_held(store)
    setting.half.reported({"a"}, (), WorkerReport(loads_done={("a", 1): 21}))
    assert not is_held(store)


def test_an_abort_while_loading_holds_until_the_worker_has_ended(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    setting.begin_load(request)
    assert setting.half.finish(request) is None
    assert is_held(store)
    assert setting.half.orders(step()).ended == ("a",)
    setting.half.reported({"a"}, (), None)
    assert not is_held(store)
    setting.half.reported({"a"}, {"a"}, None)  # whatever comes later is of nobody


def test_another_connectors_load_lets_go(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (21, True)
    setting.half.allocated(request, ([5],), 0)
    assert not is_held(store)
    assert setting.half.orders(step()).is_empty


def test_an_abort_before_pages_lets_go(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (21, True)
    setting.half.finish(request)
    assert not is_held(store)
    assert setting.half.orders(step()).ended == (), "no worker knows of it"


def test_two_requests_of_one_prefix_hold_it_each(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    first, second = FakeRequest("a", [*IDS, 7]), FakeRequest("b", [*IDS, 8])
    setting.begin_load(first)
    setting.begin_load(second)
    setting.half.reported({"a"}, (), None)
    assert is_held(store)
    setting.half.reported({"b"}, (), None)
    assert not is_held(store)


def test_what_could_not_be_loaded_is_computed(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    request = FakeRequest("a", [*IDS, 7])
    setting.begin_load(request)
    report = WorkerReport(failures={"ChecksumError": 1}, counters=Counters(loads=1, loads_failed=1))
    setting.half.reported({"a"}, {"a"}, report)
    assert setting.half.match(request, 0) == (0, False), "it would fail again and again"
    assert not is_held(store)
    assert setting.half.counters.failures == {"ChecksumError": 1}
    assert setting.half.match(FakeRequest("b", [*IDS, 7]), 0) == (0, False)  # evicted by is_held


def test_closing_ends_every_lease(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    setting.begin_load(FakeRequest("a", [*IDS, 7]))
    assert setting.half.match(FakeRequest("b", [*IDS, 8]), 0) == (21, True)
    setting.half.close()
    assert not is_held(store)


# Making ready


@pytest.fixture
def on_disk(opened: ExitStack, tmp_path: Path) -> Store:
    """A store that has the prompt on disk only."""
    store = opened.enter_context(open_store(SPEC, dram="4MiB", ssd=f"{tmp_path}/ssd:64MiB"))
    keep(store, IDS)
    store.flush(TEST_S)
    evict_from_memory(store)
    return store


def evict_from_memory(store: Store) -> None:
    pool: Any = store.pool
    pool.evict_here(store.prompt(IDS).path.keys[0])
    assert store.match([*IDS, 7]).tier == "ssd"


class Gate:
    """Holds reads of a store up."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        self.leases: list[Lease] = []
        read = store.read

        def waits(match: Match, **settings: Any) -> Lease:
            assert self.open.wait(TEST_S)
            lease = read(match, **settings)
            self.leases.append(lease)
            return lease

        monkeypatch.setattr(store, "read", waits)


def test_what_lies_on_disk_is_made_ready_meanwhile(
    on_disk: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(on_disk, monkeypatch)
    setting = make(on_disk)
    request = FakeRequest("a", [*IDS, 7])
    assert [setting.half.match(request, 0) for _ in range(3)] == [(None, False)] * 3
    gate.open.set()
    assert setting.ask(request) == (21, True)
    assert is_held(on_disk)


def test_a_disk_that_takes_too_long_is_not_waited_for(
    on_disk: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(on_disk, monkeypatch)
    setting = make(on_disk)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (None, False)
    setting.clock.now_s += 6.0
    assert setting.half.match(request, 0) == (0, False)
    assert setting.searches.failures == {"DeadlineError": 1}
    gate.open.set()
    wait_for(lambda: len(gate.leases) == 1)
    wait_for(lambda: not is_held(on_disk))


def test_what_is_in_memory_serves_when_the_disk_is_late(
    on_disk: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(on_disk, IDS[:8])
    read = on_disk.read
    gate = Gate(on_disk, monkeypatch)
    setting = make(on_disk)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (None, False)
    setting.clock.now_s += 6.0
    monkeypatch.setattr(on_disk, "read", read)
    assert setting.half.match(request, 0) == (8, True)
    gate.open.set()


def test_an_abort_while_making_ready_lets_go(
    on_disk: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(on_disk, monkeypatch)
    setting = make(on_disk)
    request = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(request, 0) == (None, False)
    setting.half.finish(request)
    gate.open.set()
    wait_for(lambda: len(gate.leases) == 1)
    wait_for(lambda: not is_held(on_disk))


def test_a_store_of_another_process_is_asked_in_the_background(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store, is_local=False)
    assert setting.ask(FakeRequest("a", [*IDS, 7])) == (21, True)


@pytest.mark.parametrize("error", [OwnerGoneError("gone"), LoadFailedError("damaged"), RuntimeError("a bug")])
def test_whatever_fails_is_a_miss(
    store: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    keep(store, IDS)

    def fails(*_: Any, **__: Any) -> Lease:
        raise error

    monkeypatch.setattr(store, "read", fails)
    for is_local in (True, False):
        setting = make(store, is_local=is_local)
        assert setting.ask(FakeRequest("a", [*IDS, 7])) == (0, False)
        assert setting.searches.failures == {type(error).__name__: 1}
        assert setting.source.errors == [error]


def test_without_a_store_everything_is_computed(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    loading = FakeRequest("a", [*IDS, 7])
    assert setting.half.match(loading, 0) == (21, True)
    setting.half.allocated(loading, ([5],), 21)
    setting.source.store = None
    assert setting.half.match(FakeRequest("b", [*IDS, 7]), 0) == (0, False)
    request = FakeRequest("c", IDS)
    setting.half.add(request)
    orders = setting.half.orders(step({"c": 21}))
    assert (orders.socket, orders.saves) == ("", ())
    assert [load.request_id for load in orders.loads] == ["a"], "the engine waits for it: a worker has to say it failed"
    setting.source.store = store
    assert setting.half.match(FakeRequest("d", [*IDS, 7]), 0) == (21, True)


def test_an_owner_that_does_not_answer_does_not_keep_the_scheduler(
    store: Store, make: Callable[..., Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make(store, is_local=False, peers=ANYONE)
    may_go, scheduler = threading.Event(), threading.get_ident()
    begun: list[Any] = []
    when_ready = store.when_ready

    def slow(*arguments: Any, **options: Any) -> Any:
        assert threading.get_ident() != scheduler, "the engine's scheduler would wait for the owner"
        assert may_go.wait(30.0)
        begun.append(when_ready(*arguments, **options))
        return begun[-1]

    monkeypatch.setattr(store, "when_ready", slow)
    params = answer("tcp://127.0.0.1:1", 21, is_pushed=True)
    request = FakeRequest("a", [*IDS, 7], kv_transfer_params=params)
    assert setting.half.match(request, 0) == (None, False)
    assert setting.half.match(request, 0) == (None, False)
    setting.half.finish(request)
    may_go.set()
    wait_for(lambda: bool(begun) and begun[0].done())  # cancelled: nothing was ever stored


# Saving


def test_steps_are_saved_where_resume_points_lie(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store)
    request = FakeRequest("a", IDS)
    setting.half.add(request)
    ordered = []
    for start, stop in ((0, 6), (6, 16), (16, 21)):
        request.num_computed_tokens = start
        tables = {"a": ([1, 2, 3], [stop])}
        ordered.append(setting.half.orders(step({"a": stop - start}, tables=tables)))
    assert [[(save.start, save.stop, save.resume_at) for save in orders.saves] for orders in ordered] == [
        [],  # states exist at the end of a step only, and nobody asks for one here
        [(6, 16, (16,))],
        [(16, 21, (21,))],
    ]
    assert ordered[1].saves[0].tables == ((1, 2, 3), (16,))
    assert [len(orders.prompts) for orders in ordered] == [0, 1, 0]
    assert len({save.joint for orders in ordered for save in orders.saves}) == 2


def test_a_resumed_request_is_saved_from_its_new_pages(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store)
    request = FakeRequest("a", IDS)
    setting.half.add(request)
    first = setting.half.orders(step({"a": 21}, tables={"a": ([1, 2, 3], [4])}))
    request.output = [7, 8, 9, 10]
    assert setting.half.orders(step(preempted=["a"])).preempted == ("a",)
    assert setting.half.match(request, 0) == (0, False)
    setting.half.allocated(request, ([9],), 0)
    again = setting.half.orders(step({"a": 25}, tables={"a": ([6, 7, 8, 9], [5])}))
    (save,) = again.saves
    assert (save.start, save.stop, save.tables) == (0, 25, ((6, 7, 8, 9), (5,)))
    assert save.joint != first.saves[0].joint
    (more,) = again.more_tokens
    assert (more.start, more.token_ids.tolist()) == (21, [7, 8, 9, 10])


def test_decoded_tokens_are_saved_if_asked_for(store: Store, make: Callable[..., Setting]) -> None:
    plain, setting = make(store), make(store, saves_decoded=True)
    for half, expected in ((plain.half, []), (setting.half, [(21, 24, (24,)), (24, 32, (32,))])):
        request = FakeRequest("a", IDS)
        half.add(request)
        half.orders(step({"a": 21}))
        found = []
        for length in range(22, 40):
            request.output.append(length)
            request.num_computed_tokens = length - 1
            orders = half.orders(step({"a": 1}))
            found += [(save.start, save.stop, save.resume_at) for save in orders.saves]
            for save in orders.saves:
                assert orders.more_tokens[0].start + len(orders.more_tokens[0].token_ids) >= save.stop
        assert found == expected


def test_tokens_that_are_sampled_meanwhile_are_saved_a_step_later(store: Store, make: Callable[..., Setting]) -> None:
    """Asynchronous scheduling: a step is scheduled before the token that it begins with is known."""
    setting = make(store, saves_decoded=True)
    request = FakeRequest("a", IDS)
    setting.half.add(request)
    setting.half.orders(step({"a": 21}))
    found = []
    for computed in range(21, 40):
        request.num_computed_tokens = computed
        found += [(save.start, save.stop) for save in setting.half.orders(step({"a": 1})).saves]
        request.output.append(computed)
    assert found == [(21, 24), (24, 32)]


def test_workers_forget_what_they_know(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store)
    request = FakeRequest("a", IDS)
    setting.half.add(request)
    setting.half.orders(step({"a": 21}))
    setting.half.finish(request)
    assert setting.half.orders(step()).ended == ("a",)
    assert setting.half.orders(step()).ended == ()
    assert setting.half.finish(request) is None


# Hand-over


@pytest.fixture
def other(opened: ExitStack) -> Store:
    return opened.enter_context(open_store(SPEC, dram="4MiB"))


ANYONE = ("tcp://127.0.0.1:*",)


@pytest.mark.parametrize("is_local", [True, False])
def test_what_another_instance_has_is_fetched(
    store: Store, other: Store, make: Callable[..., Setting], is_local: bool
) -> None:
    keep(other, IDS)
    address = other.listen("tcp://127.0.0.1:0", serves=True).address
    setting = make(store, is_local=is_local, peers=ANYONE)
    request = FakeRequest("a", [*IDS, 7], kv_transfer_params=answer(address, 21, is_pushed=False))
    assert setting.half.match(request, 0) == (None, False)
    assert setting.ask(request) == (21, True)
    assert is_held(store)


def test_what_is_sent_is_waited_for(store: Store, other: Store, make: Callable[..., Setting]) -> None:
    address = other.listen("tcp://127.0.0.1:0", serves=True).address
    setting = make(store, peers=ANYONE)
    request = FakeRequest("a", [*IDS, 7], kv_transfer_params=answer(address, 21, is_pushed=True))
    assert setting.half.match(request, 0) == (None, False)
    keep(store, IDS)
    assert setting.ask(request) == (21, True)


@pytest.mark.parametrize("is_local", [True, False])
def test_what_does_not_come_by_itself_is_fetched(
    store: Store, other: Store, make: Callable[..., Setting], is_local: bool
) -> None:
    keep(other, IDS)
    address = other.listen("tcp://127.0.0.1:0", serves=True).address
    setting = make(store, is_local=is_local, peers=ANYONE)
    request = FakeRequest("a", [*IDS, 7], kv_transfer_params=answer(address, 21, is_pushed=True))
    assert setting.half.match(request, 0) == (None, False)
    setting.clock.now_s += 3.0
    assert setting.ask(request) == (21, True)


def test_an_instance_that_is_gone_is_a_miss(store: Store, other: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS[:8])
    endpoint = other.listen("tcp://127.0.0.1:0", serves=True)
    endpoint.close()
    setting = make(store, peers=ANYONE)
    request = FakeRequest("a", [*IDS, 7], kv_transfer_params=answer(endpoint.address, 21, is_pushed=False))
    assert setting.ask(request) == (8, True), "what is here serves nevertheless"
    assert setting.searches.failures.total() == 1


@pytest.mark.parametrize(
    "params",
    [
        {"do_remote_prefill": True},
        {"do_remote_prefill": True, "kvstore": {"address": "tcp://198.51.100.1:1", "tokens": 21}},
        {"do_remote_prefill": True, "kvstore": {"address": "tcp://127.0.0.1:1", "tokens": "21"}},
        {"do_remote_decode": True, "send_to": "tcp://198.51.100.1:1"},
    ],
)
def test_a_hand_over_from_a_stranger_is_none(
    store: Store, make: Callable[..., Setting], params: dict[str, Any]
) -> None:
    setting = make(store, peers=ANYONE)
    request = FakeRequest("a", IDS, kv_transfer_params=params, num_computed_tokens=21)
    assert setting.half.match(request, 0) == (0, False)
    assert setting.half.counters.failures == {"TransferError": 1}
    assert setting.half.finish(request) is None


def test_a_prefill_is_answered_with_where_it_is(store: Store, make: Callable[..., Setting]) -> None:
    setting = make(store, address="tcp://127.0.0.1:7400")
    request = FakeRequest("a", IDS, kv_transfer_params={"do_remote_decode": True})
    setting.half.add(request)
    setting.half.orders(step({"a": 21}))
    request.num_computed_tokens = 21
    assert setting.half.finish(request) == answer("tcp://127.0.0.1:7400", 21, is_pushed=False)
    aborted = FakeRequest("b", IDS, kv_transfer_params={"do_remote_decode": True}, num_computed_tokens=20)
    setting.half.add(aborted)
    assert setting.half.finish(aborted) is None


def test_a_prefill_is_sent_as_it_is_committed(store: Store, other: Store, make: Callable[..., Setting]) -> None:
    address = other.listen("tcp://127.0.0.1:0").address
    setting = make(store, peers=ANYONE, address="tcp://127.0.0.1:7400")
    request = FakeRequest("a", IDS, kv_transfer_params={"do_remote_decode": True, "send_to": address})
    setting.half.add(request)
    setting.half.orders(step({"a": 16}))
    keep(store, IDS[:16])
    setting.half.reported((), (), WorkerReport(committed={"a": 16}))
    assert other.when_ready([*IDS, 7], 16).result(TEST_S).tokens == 16
    request.num_computed_tokens = 16
    setting.half.orders(step({"a": 5}))
    keep(store, IDS)
    request.num_computed_tokens = 21
    # vLLM ends a request before it passes on what its last step has committed.
    told = setting.half.finish(request)
    assert told is not None
    assert told["kvstore"]["is_pushed"] is True
    setting.half.orders(step())  # the next step may be scheduled before
    setting.half.reported((), (), WorkerReport(committed={"a": 21}))
    assert other.when_ready([*IDS, 7], 21).result(TEST_S).tokens == 21


# Counting


def test_counters_are_told_once(store: Store, make: Callable[..., Setting]) -> None:
    keep(store, IDS)
    setting = make(store)
    setting.begin_load(FakeRequest("a", [*IDS, 7]))
    setting.half.reported({"a"}, (), WorkerReport(counters=Counters(loads=1, loaded_tokens=21), failures={"X": 2}))
    assert setting.half.take_counters() == {
        "queries": 1, "hits": 1, "hit_tokens": 21, "loads": 1, "loaded_tokens": 21, "failures:X": 2,
    }  # fmt: skip
    assert setting.half.take_counters() == {}
