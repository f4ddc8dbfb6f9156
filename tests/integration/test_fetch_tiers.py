"""Fetches of what a node has in another tier only."""

from __future__ import annotations

from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

import kvstore
from kvstore.clock import Deadline
from kvstore.errors import PoolFullError, TransferError
from kvstore.placement.tiered import TieredPool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.resources import leaves_nothing
from kvstore.tiers import ArenaTier
from kvstore.transfer import Endpoint, Fetcher
from tests.integration.transfer_nodes import (
    BLOCK,
    FAST,
    WITHIN_S,
    address,
    assert_same,
    match_all,
    prompt,
    store_prompt,
    tiny_spec,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = prompt(40)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


class Tiered:
    """A node's store with a shelf; the prompt is on the shelf only."""

    def __init__(self, dram_bytes: int = 4 << 20) -> None:
        spec = tiny_spec()
        self.shelf = MemoryShelf(spec, capacity_bytes=16 << 20, name="shelf", medium=ShelfMedium())
        sizes = slot_sizes_bytes(spec)
        arena = ArenaTier(dram_bytes, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=sizes)
        self.pool = TieredPool(spec, arena, [self.shelf], close_deadline_s=1.0)
        self.store = kvstore.Store(self.pool)
        store_prompt(self.store, IDS)
        self.store.flush(WITHIN_S)
        assert self.pool.evict_here(self.store.prompt(IDS).path.key(0)) > 0


@pytest.fixture
def there() -> Iterator[Tiered]:
    tiered = Tiered()
    with closing(tiered.store):
        yield tiered


@pytest.fixture
def here() -> Iterator[kvstore.Store]:
    with kvstore.open(tiny_spec(), dram="4MiB") as store:
        yield store


def test_a_disk_slower_than_a_peer_bears_silence(there: Tiered, here: kvstore.Store) -> None:
    """The requester asks again while the node loads, and gets it once it is there."""
    there.shelf.loads.close()
    with (
        Endpoint(there.pool, address("tcp"), settings=FAST, serves=True) as node,
        Fetcher(here.pool, settings=FAST) as fetcher,
    ):
        handle = fetcher.fetch(here.prompt([*IDS, 1]), node.address)
        there.shelf.loads.wait_for_somebody(Deadline.after(WITHIN_S))
        began = Deadline.after(2.5 * FAST.progress_deadline_s)
        wait_until(lambda: began.has_passed or handle.done(), "longer than the peer bears silence")
        assert not handle.done(), "the requester gave up"
        there.shelf.loads.open()
        assert handle.result(WITHIN_S).tokens == len(IDS)
    assert there.pool.statistics().loading.loads == 1
    assert_same(there.store, here, IDS, len(IDS))


@contextmanager
def full(there: Tiered) -> Iterator[None]:
    """A node whose memory is leased to its last block."""
    with ExitStack() as held:
        seed = 1
        for tokens in (400, 40, BLOCK):
            with suppress(PoolFullError):
                while True:
                    seed += 1
                    ids = prompt(tokens, seed)
                    store_prompt(there.store, ids)
                    best = match_all(there.store, ids).best
                    assert best is not None
                    held.callback(there.pool.hold_here(best.path).release)
        yield


def test_a_node_without_room_says_so(there: Tiered, here: kvstore.Store) -> None:
    """A refusal that names the cause, not a connection that breaks."""
    with (
        full(there),
        Endpoint(there.pool, address("tcp"), settings=FAST, serves=True) as node,
        Fetcher(here.pool, settings=FAST) as fetcher,
        pytest.raises(TransferError, match="LIMIT"),
    ):
        fetcher.fetch(here.prompt([*IDS, 1]), node.address).result(WITHIN_S)
