"""An engine's pages beside a store's memory: found there, read from there, and gone when the engine says so."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.clock import Deadline
from kvstore.errors import SpecError, StoreClosedError, UnavailableError
from kvstore.placement.tiered import TieredPool
from kvstore.testing.specs import check_lease, dense, hybrid

torch = pytest.importorskip("torch")

from kvstore.testing.pages import EnginePages  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.placement.gpu.page_shelf import PageShelf
    from kvstore.store import Store

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA"))
SPEC = hybrid(4)
TEST_S = 30.0


@pytest.fixture(params=["cpu", CUDA])
def engine(request: pytest.FixtureRequest) -> EnginePages:
    return EnginePages.alike(SPEC, style="two blocks", pages=24, page_tokens=3, device=request.param)


@pytest.fixture
def store(engine: EnginePages) -> Iterator[Store]:
    with kvstore.open(SPEC, gpu=engine.register(), dram="4MiB") as store:
        yield store


@pytest.fixture
def shelf(store: Store) -> PageShelf:
    return store.pages


@pytest.mark.parametrize("layered", [False, True])
def test_a_prompt_is_read_out_of_pages(store: Store, shelf: PageShelf, engine: EnginePages, layered: bool) -> None:
    ids = range(22)
    prompt = store.prompt(ids)
    engine.put_prompt(prompt, range(8), {22: {"state": 20}})
    assert not store.match([*ids, 0])
    shelf.note(prompt, range(8), states={22: {"state": 20}})
    match = store.match([*ids, 0])
    assert (match.tokens, match.tier) == (22, "gpu")
    with store.read(match, layered=layered) as lease:
        check_lease(lease, prompt)
        # Into other pages of the same engine: what it computes for one request serves another that it keeps apart.
        lease.copy_to_pages(shelf.pages, {"attention": range(8, 16), "window": range(8, 16), "state": 21})
        lease.wait()  # a layer is there before all of them are committed
    engine.check_prompt(prompt, range(8, 16), 0, 22, {22: {"state": 21}})
    # What was loaded is in memory as well; without it, and without the pages, it is gone.
    assert store.match([*ids, 0]).tier == "dram"
    pool = store.pool
    assert isinstance(pool, TieredPool)
    pool._keeper.flush(Deadline.after(TEST_S))  # what was committed is offered to the pages behind the reader's back
    shelf.forget(range(24))
    assert store.match([*ids, 0]).tier == "dram"
    store.pool.evict(prompt.path.key(0))
    assert not store.match([*ids, 0])
    store.pool.check()


def test_what_is_written_is_not_kept_in_pages(store: Store, shelf: PageShelf, engine: EnginePages) -> None:
    """The engine's pages are sources of a write, and remain the engine's."""
    prompt = store.prompt(range(22))
    engine.put_prompt(prompt, range(8), {22: {"state": 20}})
    with store.write(prompt, resume_at=[22]) as writer:
        writer.put_pages(shelf.pages, range(8), tokens=slice(0, 22))
        writer.put_state_pages(shelf.pages, {"state": 20, "window": range(8)}, at=22)
        writer.commit()
    deadline = Deadline.after(TEST_S)
    while not shelf.statistics().refused:  # offered behind the writer's back
        deadline.check("what was written to be offered to the tier")
        time.sleep(0.001)
    assert shelf.statistics().refused == {"engine": 1}
    assert shelf.statistics().committed_bytes == 0
    with store.read(store.match([*range(22), 0])) as lease:
        check_lease(lease, prompt)


def test_pages_beside_memory_and_a_disk(tmp_path: Path) -> None:
    """The fastest is asked first; each is what it would be alone."""
    engine = EnginePages.alike(SPEC, style="two blocks", pages=24, page_tokens=3)
    pages = engine.register()
    ids = range(22)
    with kvstore.open(SPEC, gpu=pages, dram="4MiB", ssd=f"{tmp_path / 'kv'}:64MiB") as store:
        prompt = store.prompt(ids)
        engine.put_prompt(prompt, range(8), {22: {"state": 20}})
        store.pages.note(prompt, range(8), states={22: {"state": 20}})
        with store.read(store.match([*ids, 0])) as lease:
            check_lease(lease, prompt)
        store.flush()
        store.pool.evict(prompt.path.key(0))
        assert not store.match([*ids, 0])
        assert [shelf.name for shelf in store.statistics().shelves] == ["gpu", "ssd"]  # type: ignore[attr-defined]
        shelf = store.pages
    with pytest.raises(StoreClosedError):
        shelf.note(prompt, range(8))
    with kvstore.open(SPEC, gpu=pages, dram="4MiB") as again:  # the tensors remain registered
        assert again.pages is not shelf
        assert not again.match([*ids, 0])


def test_pages_of_another_model_and_a_store_without() -> None:
    pages = EnginePages.alike(SPEC, style="two blocks", pages=4, page_tokens=3).register()
    with pytest.raises(SpecError, match="registered for model"):
        kvstore.open(dense(4), gpu=pages, dram="4MiB")
    with kvstore.open(SPEC, dram="4MiB") as store, pytest.raises(UnavailableError, match="gpu="):
        _ = store.pages
