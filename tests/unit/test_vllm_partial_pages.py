"""Pages of windows that a load has filled in part: vLLM gives them a hash, and nobody may find them by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from kvstore.adapters.paged import CheckpointPolicy, EngineGroup, EngineTensor
from kvstore.adapters.vllm.partial_pages import PartialPages
from kvstore.adapters.vllm.scheduling import Scheduling
from kvstore.adapters.vllm.search import Searches
from kvstore.spec import DType, ReuseRule, Segment, TensorSpec
from kvstore.store import open_store
from kvstore.testing.specs import hybrid
from tests.vllm_requests import FakeRequest, FakeSchedulerStore, keep, step

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_TOKENS = 8
WINDOW_TOKENS = 4
SPEC = hybrid(4)
IDS = list(range(100, 119))
KEYS = EngineTensor(
    TensorSpec("keys", DType.FLOAT32, (Segment("heads", 1, 1),), (2,), has_tokens=True), "page row token inner"
)
WINDOW = EngineGroup(
    index=1,
    rule=ReuseRule.STATE,
    layers=(0,),
    names=("layers.0",),
    tensors=(KEYS,),
    page_tokens=PAGE_TOKENS,
    window_tokens=WINDOW_TOKENS,
)
TABLES = ((1, 2, 3), (0, 5, 6))


class Pool:
    """vLLM's pages: which of them have a hash."""

    def __init__(self) -> None:
        self.blocks = [SimpleNamespace(block_hash=None) for _ in range(10)]

    def cache(self, *pages: int) -> None:
        """As vLLM does with what it takes for complete."""
        for page in pages:
            self.blocks[page].block_hash = b"hash"

    def evict_blocks(self, block_ids: set[int]) -> None:
        for page in block_ids:
            self.blocks[page].block_hash = None

    @property
    def found(self) -> set[int]:
        return {number for number, block in enumerate(self.blocks) if block.block_hash is not None}


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def half(pool: Pool) -> Iterator[Scheduling]:
    with open_store(SPEC, dram="4MiB") as store:
        keep(store, IDS[:18])
        source = FakeSchedulerStore(store)
        pages = PartialPages([WINDOW])
        pages.bind(pool)
        searches = Searches(source, prepare_deadline_s=5.0, fetch_deadline_s=5.0)
        half = Scheduling(SPEC, source, searches, CheckpointPolicy(8, has_states=True), partial_pages=pages)
        yield half
        half.close()


def load(half: Scheduling, request: FakeRequest) -> None:
    """Up to 18 tokens: the window begins at 14, in the middle of the second page."""
    assert half.match(request, 0) == (18, True)
    half.allocated(request, TABLES, 18)
    half.orders(step())


@pytest.mark.parametrize(
    ("start", "tokens", "hidden"),
    [
        (0, 18, {5}),  # the window begins at 14, and pages end at 16
        (0, 21, set()),  # all of it lies in the last page
        (0, 20, set()),  # it begins with a page
        (0, 16, set()),  # the page that it begins in is the last one
        (16, 18, set()),  # the engine has its first page itself
        (0, 3, set()),  # the prompt begins with it
    ],
)
def test_pages_that_are_filled_from_the_middle(pool: Pool, start: int, tokens: int, hidden: set[int]) -> None:
    pages = PartialPages([WINDOW])
    pages.bind(pool)
    pages.loading("a", TABLES, start, tokens)
    pool.cache(1, 2, 3, 5, 6)
    assert pages.hide() is bool(hidden)
    assert pool.found == {1, 2, 3, 5, 6} - hidden
    assert not pages.hide()


def test_a_hit_that_may_be_with_such_a_page_is_looked_for_again(half: Scheduling, pool: Pool) -> None:
    load(half, FakeRequest("a", IDS))
    half.reported(["a"], [], None)
    pool.cache(1, 2, 5)  # the engine thinks that the request can go on, and then looks at another one
    other = FakeRequest("b", [*IDS[:16], 7])
    assert half.match(other, 16) == (None, False)
    assert pool.found == {1, 2}
    assert half.match(other, 8) == (0, False)


@pytest.mark.parametrize("ends", [False, True])
def test_they_are_hidden_when_the_request_goes_on_or_ends(half: Scheduling, pool: Pool, ends: bool) -> None:
    request = FakeRequest("a", IDS)
    load(half, request)
    half.reported(["a"], [], None)
    pool.cache(1, 2, 5)
    if ends:
        half.finish(request)
    else:
        half.allocated(request, TABLES, 0)
    assert pool.found == {1, 2}
    pool.cache(5)  # another request's by now
    assert half.match(FakeRequest("b", [*IDS[:16], 7]), 16) == (0, False)
    assert pool.found == {1, 2, 5}


def test_they_are_hidden_by_the_end_of_the_step(half: Scheduling, pool: Pool) -> None:
    load(half, FakeRequest("a", IDS))
    half.reported(["a"], [], None)
    pool.cache(1, 2, 5)
    half.orders(step())
    assert pool.found == {1, 2}


def test_a_load_that_failed_leaves_nothing_to_hide(half: Scheduling, pool: Pool) -> None:
    load(half, FakeRequest("a", IDS))
    half.reported(["a"], ["a"], None)
    pool.cache(1, 2, 5)
    assert half.match(FakeRequest("b", [*IDS[:16], 7]), 16) == (0, False)
    assert pool.found == {1, 2, 5}
