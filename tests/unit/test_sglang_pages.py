"""Pages of SGLang's host pools in a store: what is written comes back, under its own name and nobody else's."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.adapters.sglang.position import Position
from kvstore.errors import ConfigError
from tests.unit.sglang_pools import (
    LAYOUTS,
    FlatTensor,
    MambaPoolHost,
    MHATokenToKVPoolHost,
    MLATokenToKVPoolHost,
    hashes,
    make_storage,
    slots_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.adapters.sglang.storage import PageStorage


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_written_in_place_come_back_to_other_slots(layout: str) -> None:
    pool = MHATokenToKVPoolHost(layout)
    pool.fill(1)
    expected = [pool.page_bytes(page) for page in range(6)]
    keys = hashes(7)
    with closing(make_storage(("kv", pool))) as storage:
        assert storage.count_prefix(keys) == 0
        assert storage.write("kv", keys[:6], slots_of(list(range(6)))) == [True] * 6
        assert storage.count_prefix(keys) == 6
        pool.zero()
        assert storage.read("kv", keys, slots_of([20, 9, 11, 8, 30, 2, 4])) == [True] * 6 + [False]
        assert [pool.page_bytes(page) for page in (20, 9, 11, 8, 30, 2)] == expected
        untouched = set(range(32)) - {20, 9, 11, 8, 30, 2}
        assert not any(any(pool.page_bytes(page)) for page in untouched)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_written_as_tensors_come_back(layout: str) -> None:
    pool = MHATokenToKVPoolHost(layout)
    pool.fill(2)
    keys = hashes(4)
    pages = [pool.get_data_page(page * 4) for page in range(4)]
    with closing(make_storage(("kv", pool), is_zero_copy=False)) as storage:
        assert storage.write_tensors(keys[:3], pages[:3]) == [True] * 3
        assert storage.count_prefix(keys) == 3
        targets = [pool.get_dummy_flat_data_page() for _ in keys]
        assert storage.read_tensors(keys, targets) == [True, True, True, False]
        for page, target in zip(pages[:3], targets, strict=False):
            assert (page.array == target.array).all()


def test_a_tensor_of_another_size_is_refused() -> None:
    import numpy as np

    pool = MHATokenToKVPoolHost()
    small = FlatTensor(np.zeros(8, np.uint16))
    with closing(make_storage(("kv", pool), is_zero_copy=False)) as storage:
        assert storage.write_tensors(hashes(1), [pool.get_data_page(0)]) == [True]
        assert storage.write_tensors(hashes(2), [small, pool.get_data_page(4)]) == [False, True]
        assert storage.read_tensors(hashes(2), [small, None]) == [False, False]
        assert storage.statistics().not_written == {"indices": 1}
        assert storage.statistics().not_read == {"indices": 2}


def test_slots_that_are_not_so_many_pages_are_refused() -> None:
    pool = MHATokenToKVPoolHost()
    with closing(make_storage(("kv", pool))) as storage:
        assert storage.write("kv", hashes(2), slots_of([0])) == [False, False]
        assert storage.write("kv", hashes(2), None) == [False, False]
        assert storage.read("kv", hashes(1), slots_of([0, 1])) == [False]
        assert storage.write("swa", hashes(1), slots_of([0])) == [False]
        assert storage.count_prefix(hashes(2)) == 0


def test_a_page_that_is_there_is_not_written_again() -> None:
    pool = MHATokenToKVPoolHost()
    pool.fill(3)
    first = pool.page_bytes(0)
    with closing(make_storage(("kv", pool))) as storage:
        assert storage.write("kv", hashes(1), slots_of([0])) == [True]
        assert storage.write("kv", hashes(1), slots_of([1])) == [True]
        assert storage.read("kv", hashes(1), slots_of([5])) == [True]
        assert pool.page_bytes(5) == first


def shares(one: PageStorage, other: PageStorage, pool: Any, name: str = "kv") -> bool:
    """Whether a backend finds what another one writes."""
    keys = hashes(1, salt=f"{id(one)}{id(other)}")
    assert one.write(name, keys, slots_of([0], pool.page_size)) == [True]
    return other.read(name, keys, slots_of([1], pool.page_size)) == [True]


@pytest.fixture
def socket(tmp_path: Path) -> str:
    return str(tmp_path / "s")


TP0, TP1 = Position(tp_rank=0, tp_size=2), Position(tp_rank=1, tp_size=2)
DIFFERENT: dict[str, dict[str, Any]] = {
    "rank": {"position": TP1},
    "tensor-parallel size": {"position": Position(tp_rank=0, tp_size=4)},
    "pipeline stage": {"position": Position(tp_rank=0, tp_size=2, pp_rank=1, pp_size=2)},
    "context-parallel rank": {"position": Position(tp_rank=0, tp_size=2, cp_rank=1, cp_size=2)},
    "tenant": {"tenant": "other"},
    "version": {"version": "0.5.24"},
    "layout": {"layout": "page_first_direct"},
    "element type": {"dtype": "torch.float16"},
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_what_differs_is_not_shared(difference: str, socket: str) -> None:
    changes = {"position": TP0, **DIFFERENT[difference]}
    layout, dtype = changes.pop("layout", "page_first"), changes.pop("dtype", "torch.bfloat16")
    pool, other_pool = MHATokenToKVPoolHost(), MHATokenToKVPoolHost(layout, dtype=dtype)
    with (
        closing(make_storage(("kv", pool), position=TP0, own_socket=socket)) as one,
        closing(make_storage(("kv", pool), position=TP0, socket=socket)) as same,
        closing(make_storage(("kv", other_pool), socket=socket, **changes)) as other,
    ):
        assert shares(one, same, pool)
        assert shares(same, one, pool)
        assert not shares(one, other, pool)
        assert not shares(other, one, pool)


def test_pages_as_tensors_and_in_place_are_not_mixed(socket: str) -> None:
    """In layer_first their bytes are in another order."""
    pool = MHATokenToKVPoolHost("layer_first")
    with (
        closing(make_storage(("kv", pool), own_socket=socket)) as in_place,
        closing(make_storage(("kv", pool), is_zero_copy=False, socket=socket)) as as_tensors,
    ):
        assert as_tensors.write_tensors(hashes(1), [pool.get_data_page(0)]) == [True]
        assert in_place.read("kv", hashes(1), slots_of([1])) == [False]
        assert as_tensors.read("kv", hashes(1), slots_of([1])) == [False]


def test_another_model_is_not_attached_to(socket: str) -> None:
    from kvstore.errors import SpecError

    pool = MHATokenToKVPoolHost()
    with closing(make_storage(("kv", pool), own_socket=socket)):
        for changes in ({"weights": "others"}, {"model": "others"}):
            with pytest.raises(SpecError, match="others"):
                make_storage(("kv", pool), socket=socket, **changes)


def test_ranks_that_hold_the_same_share_it(socket: str) -> None:
    """MLA: one writes, all read; a state that is split by heads is nevertheless each rank's own."""
    ranks = [Position(tp_rank=rank, tp_size=2, is_replicated=True) for rank in range(2)]
    pool, states = MLATokenToKVPoolHost(), MambaPoolHost()
    pools = (("kv", pool), ("mamba", states))
    with (
        closing(make_storage(*pools, position=ranks[0], own_socket=socket)) as writer,
        closing(make_storage(*pools, position=ranks[1], own_socket=socket)) as reader,
    ):
        assert shares(writer, reader, pool)
        keys = hashes(1)
        assert writer.write("kv", keys, slots_of([0])) == [True]
        assert writer.write("mamba", keys, slots_of([0], 1)) == [True]
        assert writer.read("mamba", keys, slots_of([1], 1)) == [True]
        assert reader.read("mamba", keys, slots_of([1], 1)) == [False]


def test_ranks_that_hold_the_same_need_one_store() -> None:
    with pytest.raises(ConfigError, match="own_socket"):
        make_storage(("kv", MLATokenToKVPoolHost()), position=Position(tp_size=2, is_replicated=True))


def test_a_split_pool_beside_a_replicated_one_is_refused() -> None:
    """SGLang writes it from one rank only, so the others would never find it, silently."""
    position = Position(tp_size=2, is_replicated=True)
    with pytest.raises(ConfigError, match="draft"):
        make_storage(("kv", MLATokenToKVPoolHost()), ("draft", MHATokenToKVPoolHost()), position=position)


def test_bytes_of_no_named_type_are_refused() -> None:
    pool = MHATokenToKVPoolHost(dtype="torch.uint8")
    with pytest.raises(ConfigError, match="kv_dtype"):
        make_storage(("kv", pool))
    with (
        closing(make_storage(("kv", pool), kv_dtype="fp8_e4m3")) as one,
        closing(make_storage(("kv", pool), kv_dtype="fp8_e5m2")) as other,
    ):
        assert one.pools["kv"].group != other.pools["kv"].group


def test_only_missing_pages_are_written() -> None:
    """Whether the first page is there or not, and wherever the gaps are."""
    pool, keys = MHATokenToKVPoolHost("layer_first"), hashes(6)
    pool.fill(8)
    expected = [pool.page_bytes(page) for page in range(6)]
    with closing(make_storage(("kv", pool))) as storage:
        for present in ([], [0, 3], [1, 2], [0, 1, 2, 3, 4, 5]):
            storage.clear()
            for page in present:
                assert storage.write("kv", keys[page : page + 1], slots_of([page])) == [True]
            assert storage.write("kv", keys, slots_of([0, 1, 2, 3, 4, 5])) == [True] * 6
            assert storage.read("kv", keys, slots_of([10, 11, 12, 13, 14, 15])) == [True] * 6
            assert [pool.page_bytes(10 + page) for page in range(6)] == expected
        objects = storage.objects
        assert objects is not None
        assert objects.statistics().present == 2  # of the third time: its first page was missing
