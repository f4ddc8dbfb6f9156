"""Writing out of an engine's pages and reading into them, through the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeviceError, LeaseError, SpecError, WriteError
from kvstore.spec import Coverage, Shard
from kvstore.store import open_store
from kvstore.testing.specs import check_lease, dense, hybrid, latent, pure_state, put_all, put_states, token_values

torch = pytest.importorskip("torch")

from kvstore.testing.lagging_device import LaggingDevice  # noqa: E402
from kvstore.testing.pages import STYLES, EnginePages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.pool import Prompt
    from kvstore.spec import ModelSpec
    from kvstore.store import Store, Writer

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA"))
TEST_S = 30.0
SPECS = {spec.model: spec for spec in (dense(4), hybrid(4), latent(4), pure_state(4))}


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=list(SPECS))
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    with open_store(SPECS[request.param], dram="4MiB") as store:
        yield store


def state_ids(spec: ModelSpec, first: int) -> dict[str, int]:
    """A page for each group whose states are whole pages."""
    named = [group.name for number, group in enumerate(spec.groups) if number in spec.state_groups]
    recurrent = [name for name in named if not next(g for g in spec.groups if g.name == name).window_tokens]
    return {name: first + number for number, name in enumerate(recurrent)}


def window_names(spec: ModelSpec) -> list[str]:
    return [group.name for group in spec.groups if group.window_tokens]


def put_everything(writer: Writer, engine: EnginePages, ids: list[int], states: dict[int, dict[str, int]]) -> None:
    """Through pages: attention in chunks whose ends are no block's ends, then states."""
    pages = engine.register()
    spec, end = writer.spec, len(writer.prompt)
    if spec.attention_groups:
        for start in range(0, end, 7):
            writer.put_pages(pages, ids, tokens=slice(start, min(start + 7, end)))
    for at, named in states.items():
        writer.put_state_pages(pages, {**named, **dict.fromkeys(window_names(spec), ids)}, at=at)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("page_tokens", [4, 2, 12, 3])
def test_what_pages_hold_is_stored_and_comes_back(store: Store, style: str, page_tokens: int, device: str) -> None:
    spec = store.spec
    prompt = store.prompt(range(22))
    needed = -(-22 // page_tokens)
    engine = EnginePages.alike(spec, style=style, pages=needed + 12, page_tokens=page_tokens, device=device)
    ids = [number + 3 for number in np.random.default_rng(1).permutation(needed).tolist()]
    lengths = (8, 22) if spec.state_groups else ()
    states = {at: state_ids(spec, needed + 4 + 3 * number) for number, at in enumerate(lengths)}
    engine.put_prompt(prompt, ids, states)
    with store.write(prompt, resume_at=lengths or None) as writer:
        put_everything(writer, engine, ids, states)
        writer.commit()
    with store.read(store.match([*range(22), 0])) as lease:
        assert lease.tokens == 22
        assert not lease.verify()
        check_lease(lease, prompt)
        # Into pages of another engine with another layout, of which the first token lies in the middle.
        target = EnginePages.alike(spec, style="canonical", pages=30, page_tokens=5, device=device, seed=9)
        others = [number + 1 for number in np.random.default_rng(2).permutation(5).tolist()]
        named = {group.name: others for group in spec.groups if group.tensors[0].has_tokens}
        lease.copy_to_pages(target.register(), {**named, **state_ids(spec, 20)})
        target.check_prompt(prompt, others, 0, 22, {22: state_ids(spec, 20)} if spec.state_groups else {})


def test_only_what_is_named_is_written(device: str) -> None:
    """A range of tokens, some layers, and not a byte besides."""
    spec = hybrid(4)
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(22))
        with store.write(prompt) as writer:
            put_all(writer)
            writer.commit()
        engine = EnginePages.alike(spec, style="heads first", pages=12, page_tokens=4, device=device)
        before = {(layer, name): engine.array(layer, name) for layer, name in engine.tensors}
        with store.read(store.match([*range(22), 0])) as lease:
            lease.copy_to_pages(
                engine.register(), {"attention": [7, 2, 9, 4]}, tokens=slice(9, 21), first_token=6, layers=[3]
            )
        # The page of token 9 is the first one, since pages begin at token 6.
        for (layer, name), whole in before.items():
            if layer == 3:
                values = engine.tokens(layer, name, [7, 2, 9, 4], 3, 15)
                for number in range(12):
                    whole[[7, 2, 9, 4][(3 + number) // 4], :, (3 + number) % 4] = values[:, number]
            assert engine.array(layer, name).tobytes() == whole.tobytes()
        for name in ("keys", "values"):
            found = engine.tokens(3, name, [7, 2, 9, 4], 3, 15)
            assert found.tobytes() == token_values(spec, prompt, 3, name, 9, 21).tobytes()


def test_pages_of_a_window_that_are_none(device: str) -> None:
    """Zeros are put for a page that the engine gave up; and nothing is copied into a page that is not named."""
    spec = hybrid(4)
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(12))
        engine = EnginePages.alike(spec, pages=12, page_tokens=4, device=device)
        engine.put_prompt(prompt, [5, 6, 7], {12: {"state": 9}})
        with store.write(prompt, resume_at=[12]) as writer:
            pages = engine.register()
            writer.put_pages(pages, [5, 6, 7], tokens=slice(0, 12))
            writer.put_state_pages(pages, {"state": 9, "window": [-1, -1, 7]}, at=12)
            writer.commit()
        with store.read(store.match([*range(12), 0])) as lease:
            found = lease.layer(4).read("window_keys")  # of 7 tokens
            assert not found[:, :3].any()
            assert found[:, 3:].tobytes() == token_values(spec, prompt, 4, "window_keys", 8, 12).tobytes()
            target = EnginePages.alike(spec, pages=12, page_tokens=4, device=device, seed=9)
            before = target.array(4, "window_keys")
            lease.copy_to_pages(target.register(), {"attention": [1, 2, 3], "window": [-1, -1, 8]}, layers=[4, 1])
        before[8] = token_values(spec, prompt, 4, "window_keys", 8, 12)
        assert target.array(4, "window_keys").tobytes() == before.tobytes()


def test_small_staging_takes_several_parts(device: str) -> None:
    """What is larger than staging goes through it in parts, one larger than a whole staging buffer among them."""
    spec = hybrid(4)
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(61))
        engine = EnginePages.alike(spec, pages=90, page_tokens=4, device=device)
        ids = list(range(5, 21))
        states = {61: state_ids(spec, 40)}
        engine.put_prompt(prompt, ids, states)
        for staging_bytes in (1, 700, 3000):
            pages = engine.register()
            pages.copier.staging_bytes = staging_bytes
            with store.write(prompt, resume_at=[61]) as writer:
                writer.put_pages(pages, ids, tokens=slice(0, 61))
                writer.put_state_pages(pages, {**states[61], "window": ids}, at=61)
                writer.commit()
            with store.read(store.match([*range(61), 0])) as lease:
                check_lease(lease, prompt)
                target = EnginePages.alike(spec, pages=90, page_tokens=3, device=device, seed=staging_bytes)
                others = target.register()
                others.copier.staging_bytes = staging_bytes
                lease.copy_to_pages(others, {"attention": range(21), "window": range(21), "state": 70})
                target.check_prompt(prompt, range(21), 0, 61, {61: {"state": 70}})
            assert store.pool.evict(prompt.path.key(0))


def test_each_worker_has_its_rows() -> None:
    """Two workers write what their own pages hold; a whole one finds all of it, and another split reads it."""
    spec = hybrid(4)
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(16))
        for index in range(2):
            shard = Shard(index, 2)
            engine = EnginePages.alike(spec, style="two blocks", pages=9, page_tokens=4, shard=shard)
            engine.put_prompt(prompt, [3, 1, 4, 2], {16: {"state": 8}})
            with store.write(prompt, shard=shard, resume_at=[16]) as writer:
                pages = engine.register()
                writer.put_pages(pages, [3, 1, 4, 2], tokens=slice(0, 16))
                writer.put_state_pages(pages, {"state": 8, "window": [3, 1, 4, 2]}, at=16)
                writer.commit()
        with store.read(store.match([*range(16), 0])) as lease:
            check_lease(lease, prompt)
        with store.read(store.match([*range(16), 0], shard=Shard(1, 2))) as lease:
            target = EnginePages.alike(spec, pages=9, page_tokens=8, shard=Shard(1, 2), seed=4)
            lease.copy_to_pages(target.register(), {"attention": [5, 6], "window": [5, 6], "state": 0})
            target.check_prompt(prompt, [5, 6], 0, 16, {16: {"state": 0}})


def test_what_the_store_has_is_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dense(4)
    with open_store(spec, dram="4MiB") as store:
        with store.write(store.prompt(range(12))) as writer:
            put_all(writer)
            writer.commit()
        prompt = store.prompt(range(20))
        engine = EnginePages.alike(spec, pages=9, page_tokens=4)
        engine.put_prompt(prompt, [4, 3, 2, 1, 0])
        pages = engine.register()
        gathered: list[int] = []
        pack = pages.pack
        monkeypatch.setattr(pages, "pack", lambda *args: (gathered.extend(args[2].pages.tolist()), pack(*args)))
        with store.write(prompt) as writer:
            writer.put_pages(pages, [4, 3, 2, 1, 0], tokens=slice(0, 20))
            writer.commit()
        assert set(gathered) == {1, 0}
        with store.read(store.match([*range(20), 0])) as lease:
            check_lease(lease, prompt)


def test_wrong_pages_are_noticed() -> None:
    """The comparisons above can fail: one page too far, and pages in another order."""
    spec = dense(4)
    for wrong in ([4, 3, 2], [1, 2, 3], [2, 1, 3]):
        with open_store(spec, dram="4MiB") as store:
            prompt = store.prompt(range(12))
            engine = EnginePages.alike(spec, pages=9, page_tokens=4)
            engine.put_prompt(prompt, [3, 2, 1])
            with store.write(prompt) as writer:
                writer.put_pages(engine.register(), wrong, tokens=slice(0, 12))
                writer.commit()
            with store.read(store.match([*range(12), 0])) as lease, pytest.raises(AssertionError):
                check_lease(lease, prompt)


def test_costs_reach_the_records() -> None:
    spec = dense(4)
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(8))
        engine = EnginePages.alike(spec, pages=3, page_tokens=4)
        with store.write(prompt) as writer:
            writer.put_pages(engine.register(), [0, 1], tokens=slice(0, 8), cost_s=0.4)
            writer.commit()
        with store.read(store.match([*range(8), 0])) as lease:
            assert sum(held.header.cost_us for held in lease.records) == pytest.approx(400_000, abs=10)


# Misuse


def misuse(store: Store) -> tuple[Prompt, EnginePages]:
    prompt = store.prompt(range(12))
    return prompt, EnginePages.alike(store.spec, pages=6, page_tokens=4)


def test_misuse_of_a_writer() -> None:
    with open_store(hybrid(4), dram="4MiB") as store:
        prompt, engine = misuse(store)
        pages = engine.register()
        with store.write(prompt, resume_at=[12]) as writer:
            for ids, tokens, message in (
                ([0, 1], slice(0, 12), "lie in 3 pages of 4 tokens, and 2 are named"),
                ([0, 1, -1], slice(0, 12), "page -1 of group 'attention' is none of its 6 pages"),
                ([0, 1, 6], slice(0, 12), "page 6 of group 'attention' is none"),
                ([0, 1, 2], slice(0, 13), "not a range"),
                ({"state": [0]}, slice(0, 12), "lacks group 'attention'"),
            ):
                with pytest.raises((WriteError, SpecError), match=message):
                    writer.put_pages(pages, ids, tokens=tokens)
            with pytest.raises(WriteError, match="begin at token 4"):
                writer.put_pages(pages, [0, 1, 2], tokens=slice(0, 12), first_token=4)
            with pytest.raises(WriteError, match="layer 9 has no registered pages"):
                writer.put_pages(pages, [0, 1, 2], tokens=slice(0, 12), layers=[9])
            with pytest.raises(WriteError, match="which is no cache group"):
                writer.put_state_pages(pages, {"sate": 1}, at=12)
            with pytest.raises(WriteError, match="a state lies in one page, 2 are named"):
                writer.put_state_pages(pages, {"state": [1, 2]}, at=12)
            with pytest.raises(WriteError, match="takes no states at 8"):
                writer.put_state_pages(pages, {"state": 1}, at=8)
            # Nothing of this has been put: the whole can still be.
            writer.put_pages(pages, [0, 1, 2], tokens=slice(0, 12))
            put_states(writer, 12)
            writer.commit()
        others = EnginePages.alike(hybrid(4), pages=6, page_tokens=4, shard=Shard(0, 2)).register()
        with store.write(store.prompt(range(40, 52))) as writer, pytest.raises(WriteError, match="worker 0 of 2"):
            writer.put_pages(others, [0, 1, 2], tokens=slice(0, 12))
        mask = np.ones(12, np.bool_)
        mask[3] = False
        sparse = store.prompt(range(60, 72), coverage=Coverage.of_masks({1: mask}))
        with store.write(sparse) as writer, pytest.raises(WriteError, match="sparse"):
            writer.put_pages(pages, [0, 1, 2], tokens=slice(0, 12))


def test_misuse_of_a_lease() -> None:
    with open_store(hybrid(4), dram="4MiB") as store:
        prompt, engine = misuse(store)
        pages = engine.register()
        with store.write(prompt, resume_at=[12]) as writer:
            put_all(writer)
            writer.commit()
        lease = store.read(store.match([*range(12), 0]))
        before = [allocation.clone() for allocation in engine.allocations]
        for ids, tokens, message in (
            ([0, 1], None, "and 2 are named"),
            ([0, 1, 1], None, "named twice"),
            ([0, 1, 2], slice(0, 13), "no range within the 12 tokens"),
            ([0, 1, 2], slice(3, 3), "no range within"),
            ({"attention": [0, 1, 2], "state": 6}, None, "page 6 of group 'state' is none"),
            ({"attention": [0, 1, 2], "other": 1}, None, "no cache group"),
        ):
            with pytest.raises((LeaseError, SpecError), match=message):
                lease.copy_to_pages(pages, ids, tokens=tokens)
        lease.release()
        with pytest.raises(LeaseError, match="released"):
            lease.copy_to_pages(pages, [0, 1, 2])
        for allocation, was in zip(engine.allocations, before, strict=True):
            assert torch.equal(allocation.view(torch.uint8), was.view(torch.uint8))


# Order


@pytest.fixture
def lagging() -> LaggingDevice:
    return LaggingDevice()


def test_pages_are_read_behind_what_fills_them(lagging: LaggingDevice) -> None:
    """The engine's kernels may still be running when its pages are put; after `put_pages` they may be reused."""
    spec = dense(4)
    engine = EnginePages.alike(spec, pages=9, page_tokens=4, device=lagging)
    pages = engine.register()
    with open_store(spec, dram="4MiB") as store:
        for first in (0, 100):  # the second time staging is there, and waits for nothing of its own
            prompt = store.prompt(range(first, first + 12))
            lagging.stream_of(None).run(lambda prompt=prompt: engine.put_prompt(prompt, [3, 2, 1]))  # type: ignore[misc]
            with store.write(prompt) as writer:
                writer.put_pages(pages, [3, 2, 1], tokens=slice(0, 12))
                engine.put_prompt(store.prompt(range(900, 912)), [3, 2, 1])
                writer.commit()
            with store.read(store.match([*range(first, first + 12), 0])) as lease:
                check_lease(lease, prompt)


@pytest.mark.parametrize("is_early", [False, True], ids=["copies last", "copies first"])
def test_a_lease_ends_before_its_pages_are_written(lagging: LaggingDevice, is_early: bool) -> None:
    """The records are let go, and may be reused, while the device has not begun; what is asked next sees the pages."""
    spec = hybrid(4)
    engine = EnginePages.alike(spec, pages=12, page_tokens=4, device=lagging)
    pages = engine.register()
    seen: list[Any] = []

    def look() -> None:
        seen.append(engine.array(1, "keys"))

    with open_store(spec, dram="4MiB") as store:
        for first in (0, 100):
            ids = range(first, first + 12)
            prompt = store.prompt(ids)
            with store.write(prompt) as writer:
                put_all(writer)
                writer.commit()
            seen.clear()
            # What the engine has asked for before still sees its own bytes, what it asks for afterwards the new ones.
            engine.put_prompt(store.prompt(range(900, 912)), [3, 2, 1], {12: {"state": 7}})
            engine_stream = lagging.stream_of(None)
            engine_stream.run(look)
            with store.read(store.match([*ids, 0])) as lease:
                lease.copy_to_pages(pages, {"attention": [3, 2, 1], "window": [3, 2, 1], "state": 7})
            assert store.pool.evict(prompt.path.key(0))
            with store.write(store.prompt(range(500, 512))) as writer:
                put_all(writer)
            engine_stream.run(look)
            # The copies as early as they may and the engine's own work last, or the copies only when it needs them.
            for stream in reversed(lagging.streams) if is_early else [engine_stream]:
                stream.mark().wait(Deadline.after(TEST_S), "work of the device")
            assert seen[0].tobytes() != seen[1].tobytes()
            assert seen[1].tobytes() == engine.array(1, "keys").tobytes()
            engine.check_prompt(prompt, [3, 2, 1], 0, 12, {12: {"state": 7}})
            before = EnginePages.alike(spec, pages=12, page_tokens=4)
            before.write(1, "keys", seen[0])
            wanted = token_values(spec, store.prompt(range(900, 912)), 1, "keys", 0, 12)
            assert before.tokens(1, "keys", [3, 2, 1], 0, 12).tobytes() == wanted.tobytes()


def test_a_device_that_fails_is_an_error(lagging: LaggingDevice) -> None:
    spec = dense(4)
    engine = EnginePages.alike(spec, pages=9, page_tokens=4, device=lagging)
    pages = engine.register()
    with open_store(spec, dram="4MiB") as store:
        prompt = store.prompt(range(12))
        engine.put_prompt(prompt, [3, 2, 1])
        lagging.failure = "the device was told to fail"
        with store.write(prompt) as writer, pytest.raises(DeviceError, match="told to fail"):
            writer.put_pages(pages, [3, 2, 1], tokens=slice(0, 12))
        lagging.failure = None
        with store.write(prompt) as writer:
            writer.put_pages(pages, [3, 2, 1], tokens=slice(0, 12))
            writer.commit()
        with store.read(store.match([*range(12), 0])) as lease:
            check_lease(lease, prompt)
