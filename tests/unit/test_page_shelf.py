"""What an engine says of its pages: what is found, what it takes back, and what waits for what."""

from __future__ import annotations

import os
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, ShelfRefusedError, SpecError, StoreClosedError, WriteError
from kvstore.events import RemovedWhy
from kvstore.pool.prompt import Prompt
from kvstore.record import Record
from kvstore.spec import WHOLE, ChunkGrid, Coverage, ModelSpec, ReuseRule, Shard
from kvstore.testing.resources import Background
from kvstore.testing.shelf import Landing, intact, query_of
from kvstore.testing.specs import dense, hybrid, latent, state_values, token_values

torch = pytest.importorskip("torch")

from kvstore.placement.gpu.page_shelf import PageHold, PageShelf  # noqa: E402
from kvstore.testing.lagging_device import LaggingDevice, LaggingStream  # noqa: E402
from kvstore.testing.pages import EnginePages  # noqa: E402
from kvstore.tiers.gpu.page_copies import CopyPart, PageCopier  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.events import Changes

TEST_S = 30.0
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA"))


def engine_of(spec: ModelSpec, *, page_tokens: int = 4, device: Any = "cpu", pages: int = 40) -> EnginePages:
    return EnginePages.alike(spec, style="heads first", pages=pages, page_tokens=page_tokens, device=device)


def lengths(shelf: PageShelf, ids: Sequence[int], **asked: Any) -> list[int]:
    prompt = Prompt.of(shelf.pages.spec, [*ids, 0], salt=asked.pop("salt", b""))
    return [tokens for _, tokens, _ in shelf.find(query_of(shelf.pages.spec, prompt, **asked)).candidates]


def held(shelf: PageShelf, prompt: Prompt, tokens: int | None = None) -> PageHold:
    hold = shelf.hold(prompt.prefix(len(prompt) if tokens is None else tokens), shard=shelf.pages.shard)
    assert hold is not None
    return hold


def check_loads(shelf: PageShelf, prompt: Prompt, tokens: int | None = None) -> None:
    """Records that come out of the pages are framed, checksummed, and hold what belongs to the prompt."""
    hold = held(shelf, prompt, tokens)
    numbers = np.arange(len(hold.rows))
    landing = Landing(hold.rows, numbers)
    load = hold.load(numbers, landing.addresses)
    assert list(load.wait(len(numbers), Deadline.after(TEST_S))) == []
    hold.release()
    check_records(shelf, prompt, hold, landing)


def check_records(shelf: PageShelf, prompt: Prompt, hold: PageHold, landing: Landing) -> None:
    spec, shard = shelf.pages.spec, shelf.pages.shard
    assert intact(hold.rows, np.arange(len(hold.rows)), landing.addresses)
    for number, (layout, header) in enumerate(zip(hold.rows.layouts(), hold.rows.headers(), strict=True)):
        record = Record(layout, landing.record(number)[: layout.record_bytes])
        for layer in layout.span.layers:
            for tensor in layout.group.tensors:
                found = record.tensor(layer, tensor.name)
                end, valid = header.end_tokens, header.valid_tokens
                if layout.group.rule is ReuseRule.ATTENTION:
                    wanted = token_values(spec, prompt, layer, tensor.name, end - valid, end, shard)
                else:
                    wanted = state_values(spec, prompt, layer, tensor.name, end, shard)
                if tensor.has_tokens:
                    assert not found[:, valid:].any()
                    found = found[:, :valid]
                assert found.tobytes() == wanted.tobytes(), f"{tensor.name!r} of layer {layer} at {end}"


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def engine(device: str) -> EnginePages:
    return engine_of(dense(4), device=device)


@pytest.fixture
def shelf(engine: EnginePages) -> Iterator[PageShelf]:
    with closing(PageShelf(engine.register())) as shelf:
        yield shelf
        shelf.check()


def computed(engine: EnginePages, ids: Sequence[int], pages: Sequence[int], **options: Any) -> Prompt:
    """A prompt whose cache the engine has computed into pages."""
    prompt = Prompt.of(engine.spec, ids, salt=options.pop("salt", b""))
    engine.put_prompt(prompt, pages, **options)
    return prompt


# What is found


@pytest.mark.parametrize("page_tokens", [4, 2, 12, 3, 1])
def test_noted_pages_are_found_and_load(page_tokens: int, device: str) -> None:
    """Tails too; whatever a page's size is."""
    engine = engine_of(dense(4), page_tokens=page_tokens, device=device)
    with closing(PageShelf(engine.register())) as shelf:
        prompt = computed(engine, range(18), range(5, 5 + -(-18 // page_tokens)))
        noted_bytes = shelf.note(prompt, range(5, 40))
        assert noted_bytes == shelf.statistics().committed_bytes > 0
        assert lengths(shelf, range(18)) == [18, 16, 12, 8, 4]
        for tokens in (18, 16, 4):
            check_loads(shelf, prompt, tokens)
        assert lengths(shelf, range(18), salt=b"other") == []
        assert lengths(shelf, [*range(9), 99, 99, 99]) == [8, 4]
        assert shelf.note(prompt, range(5, 40)) == 0
        shelf.check()


def test_states_and_windows(device: str) -> None:
    """A hybrid can be resumed only where each state lies in a page of its own, and the window is whole."""
    spec = hybrid(4)
    engine = engine_of(spec, page_tokens=3, device=device)
    with closing(PageShelf(engine.register())) as shelf:
        pages = list(range(8))
        prompt = computed(engine, range(22), pages, states={8: {"state": 30}, 22: {"state": 31}})
        shelf.note(prompt, {"attention": pages, "window": pages})
        assert lengths(shelf, range(22)) == []
        # What the window at 22 does not need, the engine has given up: 7 tokens before 22 lie in pages 5 to 7.
        shelf.note(prompt, {"attention": pages, "window": [-1] * 5 + pages[5:]}, states={22: {"state": 31}})
        assert lengths(shelf, range(22)) == [22]
        check_loads(shelf, prompt)
        shelf.note(prompt, pages, upto_tokens=8, states={8: {"state": 30}})
        assert lengths(shelf, range(22)) == [22, 8]
        check_loads(shelf, prompt, 8)
        with pytest.raises(WriteError, match="is said to be given up"):
            shelf.note(prompt, {"attention": pages, "window": [-1, *pages[1:]]}, states={8: {"state": 30}})
        shelf.check()


def test_a_window_alone() -> None:
    """Of models whose only states are windows the lengths are named."""
    spec = ModelSpec("window", "seed 0", 4, tuple(group for group in hybrid(4).groups if group.name != "state"))
    engine = engine_of(spec)
    with closing(PageShelf(engine.register())) as shelf:
        prompt = computed(engine, range(16), range(4))
        shelf.note(prompt, range(4), resume_at=[8, 16])
        assert lengths(shelf, range(16)) == [16, 8]
        check_loads(shelf, prompt)


def test_a_worker_finds_its_own_share() -> None:
    spec, shard = hybrid(4), Shard(1, 2)
    engine = EnginePages.alike(spec, pages=12, page_tokens=4, shard=shard)
    with closing(PageShelf(engine.register())) as shelf:
        prompt = computed(engine, range(8), [3, 4], states={8: {"state": 9}})
        shelf.note(prompt, [3, 4], states={8: {"state": 9}})
        assert lengths(shelf, range(8), shard=shard) == [8]
        assert lengths(shelf, range(8)) == []
        check_loads(shelf, prompt)


def test_replicated_rows() -> None:
    """Each worker's pages hold a whole latent."""
    whole = latent(4)
    spec = ModelSpec("latent", "seed 0", 4, whole.groups[:1])
    engine = EnginePages.alike(spec, pages=12, page_tokens=4, shard=Shard(3, 4))
    with closing(PageShelf(engine.register())) as shelf:
        prompt = computed(engine, range(8), [3, 4])
        shelf.note(prompt, [3, 4])
        assert lengths(shelf, range(8), shard=Shard(3, 4)) == [8, 4]
        assert lengths(shelf, range(8), shard=WHOLE) == [8, 4]
        check_loads(shelf, prompt)


def test_grids(shelf: PageShelf, engine: EnginePages) -> None:
    prompt = computed(engine, range(16), range(4))
    shelf.note(prompt, range(4), grid=ChunkGrid.every(8, upto=16))
    assert lengths(shelf, range(16), grid=ChunkGrid.every(8, upto=20)) == [16, 8]
    assert lengths(shelf, range(16), grid=ChunkGrid.every(4, upto=20)) == []
    check_loads(shelf, prompt)


# What the engine takes back


def test_a_forgotten_page_takes_what_it_made_reachable(shelf: PageShelf, engine: EnginePages) -> None:
    """All that is behind it, of every prompt; nothing before it, and nothing that lies elsewhere."""
    shared, first, second = [0, 1], [2, 3], [4, 5]
    one = computed(engine, [*range(8), *range(50, 58)], [*shared, *first])
    two = computed(engine, [*range(8), *range(70, 78)], [*shared, *second])
    other = computed(engine, range(200, 212), [8, 9, 10])
    shelf.note(one, [*shared, *first])
    shelf.note(two, [*shared, *second])
    shelf.note(other, [8, 9, 10])
    shelf.forget([second[0]])
    assert lengths(shelf, two.token_ids.tolist()) == [8, 4]
    check_loads(shelf, one)
    shelf.forget([shared[1], 33])
    assert lengths(shelf, one.token_ids.tolist()) == lengths(shelf, two.token_ids.tolist()) == [4]
    check_loads(shelf, one, 4)
    check_loads(shelf, other)
    found = shelf.statistics()
    assert found.evicted_records > 0
    assert found.damaged_records == 0
    shelf.forget(range(40))
    assert shelf.statistics().committed_bytes == 0
    assert shelf._table.pages == 0


def test_a_stale_page_is_a_miss(shelf: PageShelf, engine: EnginePages) -> None:
    """Once taken back it may hold another prompt: the old one is not found, and the new one is what lies there."""
    old = computed(engine, range(12), [1, 2, 3])
    shelf.note(old, [1, 2, 3])
    shelf.forget([1, 2, 3])
    new = computed(engine, range(300, 312), [3, 1, 2])
    assert lengths(shelf, range(12)) == []
    assert shelf.hold(old.path, shard=WHOLE) is None
    shelf.note(new, [3, 1, 2])
    assert lengths(shelf, range(12)) == []
    check_loads(shelf, new)


def test_pages_that_are_written_without_being_taken_back_are_read(shelf: PageShelf, engine: EnginePages) -> None:
    """The control of the tests here: a load reads the pages themselves, so that a wrong word about them shows."""
    prompt = computed(engine, range(12), [1, 2, 3])
    shelf.note(prompt, [1, 2, 3])
    computed(engine, range(300, 312), [1, 2, 3])
    with pytest.raises(AssertionError, match="of layer"):
        check_loads(shelf, prompt)


def test_one_prefix_in_two_places(shelf: PageShelf, engine: EnginePages) -> None:
    """Two requests have computed it at once: while one copy is left it is found, and read from there."""
    prompt = computed(engine, range(12), [1, 2, 3])
    computed(engine, range(12), [1, 7, 8])
    shelf.note(prompt, [1, 2, 3])
    assert shelf.note(prompt, [1, 7, 8]) == 0
    shelf.forget([2, 3])
    computed(engine, range(300, 308), [2, 3])
    assert lengths(shelf, range(12)) == [12, 8, 4]
    check_loads(shelf, prompt)
    shelf.forget([7])
    assert lengths(shelf, range(12)) == [4]


def test_forgotten_states_leave_shorter_ones() -> None:
    spec = hybrid(4)
    engine = engine_of(spec)
    with closing(PageShelf(engine.register())) as shelf:
        states = {8: {"state": 30}, 16: {"state": 31}}
        prompt = computed(engine, range(16), range(4), states=states)
        shelf.note(prompt, range(4), states=states)
        assert lengths(shelf, range(16)) == [16, 8]
        shelf.forget([31])
        assert lengths(shelf, range(16)) == [8]
        check_loads(shelf, prompt, 8)


def test_numberings_of_pages() -> None:
    """Page 3 of the states is not page 3 of the tokens, where an engine has a pool of each."""
    spec = hybrid(4)
    engine = engine_of(spec)
    engine.pools = {"state": "states"}
    with closing(PageShelf(engine.register())) as shelf:
        prompt = computed(engine, range(8), [2, 3], states={8: {"state": 3}})
        shelf.note(prompt, [2, 3], states={8: {"state": 3}})
        with pytest.raises(SpecError, match="several numberings"):
            shelf.forget([3])
        with pytest.raises(SpecError, match="no numbering 'token'"):
            shelf.forget([3], pool="token")
        shelf.forget([2], pool="states")
        assert lengths(shelf, range(8)) == [8]
        shelf.forget([3], pool="states")
        assert lengths(shelf, range(8)) == []
        assert shelf.statistics().committed_bytes > 0
        shelf.forget([2], pool="pages")
        assert shelf.statistics().committed_bytes == 0
        shelf.check()


# What waits for what


def test_pages_that_are_held_are_not_given_back(shelf: PageShelf, engine: EnginePages) -> None:
    prompt = computed(engine, range(12), [1, 2, 3])
    shelf.note(prompt, [1, 2, 3])
    hold = held(shelf, prompt)
    with pytest.raises(DeadlineError, match=r"1 pages \(2\) were still being read"):
        shelf.forget([2, 9], deadline_s=0)
    # Nothing new finds them, and what is held still reads them.
    assert lengths(shelf, range(12)) == [4]
    shelf.check()
    shelf.forget([9], deadline_s=0)
    with pytest.raises(DeadlineError):
        shelf.forget([2], deadline_s=0)
    numbers = np.arange(len(hold.rows))
    landing = Landing(hold.rows, numbers)
    assert list(hold.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))) == []
    check_records(shelf, prompt, hold, landing)
    waiting = Background(lambda: shelf.forget([2], deadline_s=TEST_S))
    hold.release()
    waiting.result(TEST_S)
    shelf.check()


def lagging() -> tuple[LaggingDevice, EnginePages, PageShelf]:
    device = LaggingDevice()
    engine = engine_of(dense(4), device=device)
    return device, engine, PageShelf(engine.register())


def test_a_copy_under_way_keeps_pages() -> None:
    """Asked of the device and not done: the engine waits. Done, and it gets its pages at once."""
    device, engine, shelf = lagging()
    with closing(shelf):
        prompt = computed(engine, range(12), [1, 2, 3])
        shelf.note(prompt, [1, 2, 3])
        hold = held(shelf, prompt)
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        device.is_held = True
        load = hold.load(numbers, landing.addresses)
        deadline = Deadline.after(TEST_S)
        while not device.waiting:
            deadline.check("the load to ask something of the device")
        releasing = Background(hold.release)  # which ends the load, and so waits for what was asked of the device
        with pytest.raises(DeadlineError):
            shelf.forget([2], deadline_s=0.05)
        with pytest.raises(DeadlineError, match="0 of the first 1 records"):
            load.wait(1, Deadline.after(0.01))
        device.is_held = False
        releasing.result(TEST_S)
        shelf.forget([2], deadline_s=0)
        shelf.check()


def test_pages_are_read_behind_what_fills_them() -> None:
    """The engine's kernels may still be running when it notes what they compute."""
    device, engine, shelf = lagging()
    with closing(shelf):
        first = computed(engine, range(100, 124), range(10, 16))
        shelf.note(first, range(10, 16))
        check_loads(shelf, first)  # staging is there from here on, and waits for nothing of its own
        prompt = Prompt.of(engine.spec, range(12))
        device.stream_of(None).run(lambda: engine.put_prompt(prompt, [1, 2, 3]))
        shelf.note(prompt, [1, 2, 3])
        assert device.waiting
        check_loads(shelf, prompt)
        assert not device.waiting


def test_a_device_that_failed_is_a_miss() -> None:
    device, engine, shelf = lagging()
    with closing(shelf):
        prompt = computed(engine, range(12), [1, 2, 3])
        shelf.note(prompt, [1, 2, 3])
        hold = held(shelf, prompt)
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        device.failure = "the device was told to fail"
        load = hold.load(numbers, landing.addresses)
        assert list(load.wait(len(numbers), Deadline.after(TEST_S))) == numbers.tolist()
        assert "told to fail" in shelf.statistics().trouble
        assert all(landing.is_untouched(number) for number in numbers.tolist())
        hold.release()
        device.failure = None
        check_loads(shelf, prompt)


def test_engine_and_readers_beside_each_other(shelf: PageShelf, engine: EnginePages) -> None:
    """Pages change hands while others read: whatever is found is whole, or its hold kept the engine waiting."""
    ids = [list(range(100 * number, 100 * number + 12)) for number in range(3)]
    prompts = [Prompt.of(engine.spec, each) for each in ids]
    ended = threading.Event()
    found = []

    def read() -> None:
        while not ended.is_set():
            for prompt in prompts:
                hold = shelf.hold(prompt.path, shard=WHOLE)
                if hold is None:
                    continue
                numbers = np.arange(len(hold.rows))
                landing = Landing(hold.rows, numbers)
                failed = hold.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))
                hold.release()
                assert list(failed) == []
                check_records(shelf, prompt, hold, landing)
                found.append(prompt)

    readers = [Background(read) for _ in range(2)]
    for turn in range(60):
        prompt = prompts[turn % 3]
        shelf.forget([1, 2, 3], deadline_s=TEST_S)
        engine.put_prompt(prompt, [3, 1, 2])
        shelf.note(prompt, [3, 1, 2])
    # The last one stays, so that even a reader that came late has found something.
    check_loads(shelf, prompts[59 % 3])
    ended.set()
    for reader in readers:
        reader.result(TEST_S)
    shelf.check()


# The rest


def test_it_keeps_nothing(shelf: PageShelf, engine: EnginePages) -> None:
    with pytest.raises(ShelfRefusedError, match="engine's own"):
        shelf.keep(Prompt.of(engine.spec, range(4)).path, b"", None).result(TEST_S)  # type: ignore[arg-type]
    assert shelf.statistics().refused == {"engine": 1}
    assert not shelf.is_durable


def test_misuse(shelf: PageShelf, engine: EnginePages) -> None:
    prompt = Prompt.of(engine.spec, range(12))
    for given, options, message in (
        ([1, 2], {}, "2 pages of 4 tokens are named for group 'attention'; 12 tokens lie in 3"),
        ([1, 2, 40], {}, "page 40 of group 'attention' is none of its 40 pages"),
        ([1, -1, 3], {}, "said to be given up"),
        ({"window": [1]}, {}, "names 'window'"),
        ({}, {}, "lacks group 'attention'"),
        ([1, 2, 3], {"upto_tokens": 13}, "outside the prompt"),
        ([1, 2, 3], {"resume_at": [8]}, "has no states"),
        ([1, 2, 3], {"resume_at": [13]}, "outside the 12"),
    ):
        with pytest.raises((WriteError, SpecError), match=message):
            shelf.note(prompt, given, **options)
    with pytest.raises(WriteError, match="another model"):
        shelf.note(Prompt.of(dense(4, weights="other"), range(12)), [1, 2, 3])
    mask = np.ones(12, np.bool_)
    mask[3] = False
    with pytest.raises(ShelfRefusedError, match="sparse"):
        shelf.note(Prompt.of(engine.spec, range(12), coverage=Coverage.of_masks({0: mask})), [1, 2, 3])
    with pytest.raises(SpecError, match="page 40"):
        shelf.forget([40])
    assert shelf.statistics().committed_bytes == 0


def test_states_that_cannot_be() -> None:
    spec = hybrid(4)
    engine = engine_of(spec)
    with closing(PageShelf(engine.register())) as shelf:
        prompt = Prompt.of(spec, range(12))
        for states, message in (
            ({6: {"state": 1}}, "neither at the end of a block"),
            ({8: {}}, "lack the page of group 'state'"),
            ({8: {"state": 40}}, "states at 8 tokens: page 40"),
            ({8: {"state": 1, "attention": 2}}, "names|name 'attention'"),
        ):
            with pytest.raises((WriteError, SpecError), match=message):
                shelf.note(prompt, [1, 2, 3], states=states)
        assert shelf.statistics().committed_bytes == 0


def test_what_cannot_be_a_tier() -> None:
    spec = dense(4)
    engine = engine_of(spec)
    del engine.tensors[2, "keys"], engine.tensors[2, "values"]
    with pytest.raises(SpecError, match="every layer"):
        PageShelf(engine.register())


def test_close_ends_everything(engine: EnginePages) -> None:
    shelf = PageShelf(engine.register())
    prompt = computed(engine, range(12), [1, 2, 3])
    shelf.note(prompt, [1, 2, 3])
    hold = held(shelf, prompt)
    shelf.close()
    shelf.forget([1, 2, 3], deadline_s=0)
    assert lengths(shelf, range(12)) == []
    with pytest.raises(StoreClosedError):
        shelf.note(prompt, [1, 2, 3])
    with pytest.raises(StoreClosedError):
        hold.load(np.arange(1), np.zeros(1, np.uint64))
    hold.release()
    shelf.close()


def test_a_forked_child_touches_nothing(shelf: PageShelf, engine: EnginePages) -> None:
    """Not even while a hold of the parent and its lock are taken."""
    prompt = computed(engine, range(12), [1, 2, 3])
    shelf.note(prompt, [1, 2, 3])
    hold = held(shelf, prompt)
    with shelf._changed:
        child = os.fork()
        if not child:
            code = 1
            try:
                shelf.close_in_child()
                assert lengths(shelf, range(12)) == []
                assert shelf.hold(prompt.path, shard=WHOLE) is None
                hold.release()
                shelf.close()
                with pytest.raises(StoreClosedError):
                    shelf.note(prompt, [1, 2, 3])
                code = 0
            finally:
                os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    hold.release()
    check_loads(shelf, prompt)


def test_what_is_noted_and_forgotten_is_told(device: str) -> None:
    engine = engine_of(dense(4), device=device)
    told: list[tuple[str, Changes]] = []

    def tell(tier: str, changes: Changes) -> bool:
        told.append((tier, changes))
        return True

    shelf = PageShelf(engine.register())
    with closing(shelf):
        prompt = computed(engine, range(16), range(4))
        shelf.note(prompt, range(4), upto_tokens=8)
        ((tier, contents),) = shelf.watch(tell)
        assert (tier, contents.why, len(contents)) == ("gpu", None, 2)
        assert not told
        shelf.note(prompt, range(4))
        shelf.forget([3])
    assert [(tier, each.why, len(each)) for tier, each in told] == [
        ("gpu", None, 2),
        ("gpu", RemovedWhy.EVICTED, 1),
        ("gpu", RemovedWhy.CLOSED, 3),
    ]
    assert shelf.watch(tell) == ()


def test_memory_that_parts_are_packed_in_is_of_the_stream_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator would else give it to somebody else's stream while this one still uses it."""
    used: list[tuple[LaggingStream, Any]] = []
    monkeypatch.setattr(LaggingStream, "uses", lambda stream, tensor: used.append((stream, tensor)))
    device = LaggingDevice()
    arrived: list[int] = []
    part = CopyPart(100, lambda packed: packed.fill_(3), lambda host: arrived.append(int(host.sum())))
    PageCopier(device).out_of_pages([part, part], [], Deadline.after(TEST_S))
    assert arrived == [300, 300]
    assert [len(tensor) for _, tensor in used] == [128, 128]
    assert all(stream is not device.stream_of(None) for stream, _ in used)
