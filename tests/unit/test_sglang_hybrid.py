"""Several pools of one model: what hangs on a page of the prefix is there with that page only."""

from __future__ import annotations

from contextlib import closing

import pytest

from kvstore.adapters.sglang.hits import ALL_PAGES, TRAILING_PAGES
from kvstore.adapters.sglang.position import Position
from kvstore.adapters.sglang.storage import Asked, PageStorage
from tests.unit.sglang_pools import (
    DeepSeekV4PagedHostPool,
    LogicalHostPool,
    MambaPoolHost,
    MHATokenToKVPoolHost,
    hashes,
    make_storage,
    slots_of,
)

MAMBA = Asked("mamba", TRAILING_PAGES, 1)
SWA = Asked("swa", TRAILING_PAGES, 2)
INDEXER = Asked("indexer", ALL_PAGES, 0)


def write(storage: PageStorage, name: str, keys: list[str], pages: list[int]) -> None:
    pool = storage.pools[name].pool
    chosen = [keys[page] for page in pages]
    assert storage.write(name, chosen, slots_of(pages, pool.page_size)) == [True] * len(pages)


def test_a_state_becomes_visible_with_its_anchor() -> None:
    """SGLang writes states before the pages that they belong to."""
    states, keys = MambaPoolHost(), hashes(4)
    states.fill(1)
    expected = states.page_bytes(3)
    with closing(make_storage(("kv", MHATokenToKVPoolHost()), ("mamba", states))) as storage:
        write(storage, "mamba", keys, [3])
        assert storage.restorable(keys, [MAMBA]).pages == 0
        assert storage.read("mamba", keys[3:], slots_of([7], 1)) == [False]
        assert states.page_bytes(7) != expected
        assert storage.statistics().not_read == {"anchor": 1}

        write(storage, "kv", keys, [0, 1, 2])
        assert storage.restorable(keys, [MAMBA]).pages == 0
        assert storage.read("mamba", keys[3:], slots_of([7], 1)) == [False]

        write(storage, "kv", keys, [3])
        assert storage.restorable(keys, [MAMBA]).lengths == (4,)
        assert storage.read("mamba", keys[3:], slots_of([7], 1)) == [True]
        assert states.page_bytes(7) == expected


def test_an_anchor_without_its_state_is_no_hit() -> None:
    keys = hashes(4)
    with closing(make_storage(("kv", MHATokenToKVPoolHost()), ("mamba", MambaPoolHost()))) as storage:
        write(storage, "kv", keys, [0, 1, 2, 3])
        assert storage.count_prefix(keys) == 4
        found = storage.restorable(keys, [MAMBA])
        assert (found.pages, found.lengths, found.pool_pages) == (0, (), {"kv": 4})
        write(storage, "mamba", keys, [1])
        assert storage.restorable(keys, [MAMBA]).lengths == (2,)


def test_a_state_whose_anchor_was_evicted_is_gone() -> None:
    keys = hashes(2)
    with closing(make_storage(("kv", MHATokenToKVPoolHost()), ("mamba", MambaPoolHost()))) as storage:
        write(storage, "mamba", keys, [1])
        write(storage, "kv", keys, [0, 1])
        assert storage.restorable(keys, [MAMBA]).pages == 2
        objects = storage.objects
        assert objects is not None
        assert objects.remove(storage.pools["kv"].group, [keys[1].encode()]) == [True]
        assert storage.restorable(keys, [MAMBA]).pages == 0
        assert storage.read("mamba", keys[1:], slots_of([0], 1)) == [False]


def test_every_pool_has_to_fit() -> None:
    keys = hashes(6)
    pools = (
        ("kv", MHATokenToKVPoolHost()),
        ("mamba", MambaPoolHost()),
        ("swa", MHATokenToKVPoolHost("page_first_direct")),
        ("indexer", MHATokenToKVPoolHost("layer_first")),
    )
    with closing(make_storage(*pools)) as storage:
        write(storage, "kv", keys, [0, 1, 2, 3, 4, 5])
        write(storage, "indexer", keys, [0, 1, 2, 3, 4])
        write(storage, "mamba", keys, [1, 3, 5])
        write(storage, "swa", keys, [0, 1, 2, 4, 5])
        found = storage.restorable(keys, [MAMBA, SWA, INDEXER])
        assert found.lengths == (2,)
        assert found.pool_pages == {"kv": 6, "mamba": 6, "swa": 6, "indexer": 5}
        assert storage.read("swa", keys[3:5], slots_of([8, 9])) == [False, True]


def test_some_of_a_pool_are_read_exactly() -> None:
    pool, keys = MHATokenToKVPoolHost("layer_first"), hashes(5)
    swa = MHATokenToKVPoolHost("layer_first")
    swa.fill(3)
    expected = [swa.page_bytes(page) for page in range(5)]
    with closing(make_storage(("kv", pool), ("swa", swa))) as storage:
        write(storage, "kv", keys, [0, 2, 3, 4])
        write(storage, "swa", keys, [0, 1, 3, 4])
        swa.zero()
        assert storage.read("swa", keys, slots_of([10, 11, 12, 13, 14])) == [True, False, False, True, True]
        assert [swa.page_bytes(page) for page in (10, 13, 14)] == [expected[0], expected[3], expected[4]]
        assert not any(swa.page_bytes(11))


def test_states_that_lie_apart_are_copied_together() -> None:
    """A pool that has no addresses for its pages gives and takes them as tensors."""
    states, keys = MambaPoolHost(), hashes(2)
    states.has_side_states = True
    states.fill(4)
    expected = states.page_bytes(1)
    with closing(make_storage(("kv", MHATokenToKVPoolHost()), ("mamba", states))) as storage:
        assert storage.pools["mamba"].form.value == "flat"
        write(storage, "kv", keys, [0, 1])
        write(storage, "mamba", keys, [1])
        states.zero()
        assert storage.read("mamba", keys[1:], slots_of([9], 1)) == [True]
        assert states.page_bytes(9) == expected


def test_a_pool_that_comes_later_is_stored_too() -> None:
    keys = hashes(2)
    with closing(make_storage(("kv", MHATokenToKVPoolHost()))) as storage:
        write(storage, "kv", keys, [0, 1])
        storage.register("draft", MHATokenToKVPoolHost("layer_first"))
        write(storage, "draft", keys, [0])
        assert storage.count_prefix(keys) == 2
        assert storage.restorable(keys, [Asked("draft", ALL_PAGES, 0)]).pages == 1


def test_an_anchor_without_memory_is_what_the_other_pools_have() -> None:
    position = Position(is_replicated=True)
    pools = (("kv", LogicalHostPool()), ("deepseek_v4_c4", DeepSeekV4PagedHostPool()), ("swa", MHATokenToKVPoolHost()))
    compressed, keys = Asked("deepseek_v4_c4", ALL_PAGES, 0), hashes(4)
    with closing(make_storage(*pools, position=position)) as storage:
        assert storage.write("kv", keys, slots_of([0, 1, 2, 3])) == [True] * 4
        assert storage.count_prefix(keys) == 0
        assert storage.restorable(keys, [compressed, SWA]).pages == 0
        write(storage, "swa", keys, [1, 2])
        assert storage.restorable(keys, [compressed, SWA]).pages == 0
        assert storage.restorable(keys, [SWA]).pages == 0
        write(storage, "deepseek_v4_c4", keys, [0, 1, 2])
        assert storage.restorable(keys, [compressed, SWA]).lengths == (3,)
        assert storage.read("kv", keys, slots_of([0, 1, 2, 3])) == [True] * 4


@pytest.mark.parametrize("count", [1, 128, 300])
def test_long_prompts_in_one_call(count: int) -> None:
    pool, states, keys = MHATokenToKVPoolHost(pages=count), MambaPoolHost(count), hashes(count)
    pool.fill(5)
    expected = pool.page_bytes(count - 1)
    with closing(make_storage(("kv", pool), ("mamba", states), dram="32MiB")) as storage:
        write(storage, "mamba", keys, [count - 1])
        write(storage, "kv", keys, list(range(count)))
        assert storage.restorable([*keys, *hashes(9000, first=count)], [MAMBA]).lengths == (count,)
        pool.zero()
        assert storage.read("kv", keys, slots_of(list(range(count)))) == [True] * count
        assert pool.page_bytes(count - 1) == expected
