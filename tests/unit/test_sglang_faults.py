"""What goes wrong under a backend is a miss, said exactly, and never wrong bytes or an error of the request."""

from __future__ import annotations

import ctypes
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
from kvstore.clock import Deadline
from kvstore.errors import AttachError
from tests.unit.sglang_pools import (
    PAGE_BYTES,
    MambaPoolHost,
    MHATokenToKVPoolHost,
    hashes,
    make_storage,
    slots_of,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvstore.adapters.sglang.storage import PageStorage


def address_of(storage: PageStorage, key: str) -> int:
    """Where the first bytes of a page lie in the store's memory."""
    objects = storage.objects
    assert objects is not None
    name = objects.namespace.object_key(storage.pools["kv"].group, key.encode())
    chunks = -(-PAGE_BYTES // objects.namespace.chunk_bytes)
    prompt = objects.store.prompt([PAGE_BYTES] + [0] * chunks, extras=[kvstore.ExtraInput(0, name)])
    with objects.store.read(objects.store.match(prompt)) as lease:
        return int(lease.arrays[1][0]) + lease.records[0].layout.pieces[0].offset


@pytest.mark.parametrize("offset", [0, 1, PAGE_BYTES // 3])
def test_damaged_pages_are_misses(offset: int) -> None:
    pool, keys = MHATokenToKVPoolHost(), hashes(4)
    pool.fill(1)
    expected = [pool.page_bytes(page) for page in range(4)]
    with closing(make_storage(("kv", pool))) as storage:
        assert all(storage.write("kv", keys, slots_of([0, 1, 2, 3])))
        ctypes.c_uint8.from_address(address_of(storage, keys[2]) + offset).value ^= 0x40
        assert storage.count_prefix(keys) == 4
        assert storage.read("kv", keys, slots_of([8, 9, 10, 11])) == [True, True, False, True]
        assert [pool.page_bytes(page) for page in (8, 9, 11)] == [expected[0], expected[1], expected[3]]
        assert storage.count_prefix(keys) == 2
        assert storage.statistics().not_read == {"store": 1}
        # Written anew, it is whole again.
        assert storage.write("kv", keys, slots_of([0, 1, 2, 3])) == [True] * 4
        assert storage.read("kv", keys, slots_of([8, 9, 10, 11])) == [True] * 4
        assert pool.page_bytes(10) == expected[2]


def test_pages_evicted_between_query_and_read_are_misses() -> None:
    pool, keys = MHATokenToKVPoolHost(), hashes(4)
    with closing(make_storage(("kv", pool))) as storage:
        assert all(storage.write("kv", keys, slots_of([0, 1, 2, 3])))
        assert storage.count_prefix(keys) == 4
        objects = storage.objects
        assert objects is not None
        objects.remove(storage.pools["kv"].group, [keys[1].encode()])
        assert storage.read("kv", keys, slots_of([8, 9, 10, 11])) == [True, False, True, True]
        assert storage.count_prefix(keys) == 1


def test_a_full_store_evicts_and_stays_sound() -> None:
    pool, keys = MHATokenToKVPoolHost(pages=64), hashes(2000)
    pool.fill(2)
    with closing(make_storage(("kv", pool), dram="2MiB")) as storage:
        for first in range(0, 2000, 50):
            assert all(storage.write("kv", keys[first : first + 50], slots_of(list(range(50)))))
        expected = [pool.page_bytes(page) for page in range(50)]
        pool.zero()
        last = storage.read("kv", keys[1950:], slots_of(list(range(50))))
        assert last == [True] * 50
        assert [pool.page_bytes(page) for page in range(50)] == expected
        assert storage.count_prefix(keys) == 0


def test_what_does_not_fit_at_all_is_false() -> None:
    """Held pages cannot be evicted: the store is full until they are let go."""
    pool, keys = MHATokenToKVPoolHost(pages=64), hashes(4000)
    with closing(make_storage(("kv", pool), dram="2MiB")) as storage:
        objects = storage.objects
        assert objects is not None
        group = storage.pools["kv"].group
        holds, count = [], 0
        while storage.write("kv", keys[count : count + 20], slots_of(list(range(20)))) == [True] * 20:
            holds.append(objects.hold(group, [key.encode() for key in keys[count : count + 20]]))
            count += 20
        assert count > 0
        written = storage.write("kv", keys[count : count + 20], slots_of(list(range(20))))
        assert not all(written)
        assert storage.count_prefix(keys[count : count + 20]) == written.index(False)
        assert storage.statistics().not_written["store"] >= 1
        for hold in holds:
            hold.release()
        assert storage.write("kv", keys[count : count + 20], slots_of(list(range(20)))) == [True] * 20


def test_after_close_nothing_is_found_and_nothing_raises() -> None:
    pool, keys = MHATokenToKVPoolHost(), hashes(2)
    storage = make_storage(("kv", pool))
    assert all(storage.write("kv", keys, slots_of([0, 1])))
    storage.close()
    storage.close()
    assert storage.count_prefix(keys) == 0
    assert storage.write("kv", keys, slots_of([0, 1])) == [False, False]
    assert storage.read("kv", keys, slots_of([0, 1])) == [False, False]
    assert storage.restorable(keys, []).pages == 0
    assert storage.clear() is False
    assert storage.statistics().not_read == {"gone": 2}


def test_before_the_store_is_open_nothing_is_found() -> None:
    pool = MHATokenToKVPoolHost()
    with closing(make_storage(("kv", pool), is_open=False)) as storage:
        assert storage.write("kv", hashes(1), slots_of([0])) == [False]
        storage.open()
        storage.open()
        assert storage.write("kv", hashes(1), slots_of([0])) == [True]


def test_clear_removes_what_the_tenant_has_and_nothing_else(tmp_path: Path) -> None:
    pool, states, keys = MHATokenToKVPoolHost(), MambaPoolHost(), hashes(3)
    own_socket = str(tmp_path / "s")
    settings = {"own_socket": own_socket, "ssd": [f"{tmp_path}/kv:64MiB"]}
    with (
        closing(make_storage(("kv", pool), ("mamba", states), **settings)) as storage,
        closing(make_storage(("kv", pool), tenant="other", socket=own_socket)) as other,
    ):
        for each in (storage, other):
            assert all(each.write("kv", keys, slots_of([0, 1, 2])))
        assert all(storage.write("mamba", keys[2:], slots_of([0], 1)))
        objects = storage.objects
        assert objects is not None
        objects.store.flush(30)
        assert storage.clear() is True
        assert storage.count_prefix(keys) == 0
        assert other.count_prefix(keys) == 3
        assert storage.read("kv", keys, slots_of([0, 1, 2])) == [False] * 3
        # What another process owns is cleared there.
        assert all(storage.write("kv", keys, slots_of([0, 1, 2])))
        assert other.clear() is True
        assert other.count_prefix(keys) == 0
        assert storage.count_prefix(keys) == 3


def test_what_is_being_read_is_not_cleared_and_said_so() -> None:
    pool, keys = MHATokenToKVPoolHost(), hashes(3)
    with closing(make_storage(("kv", pool), call_deadline_s=0.05)) as storage:
        assert all(storage.write("kv", keys, slots_of([0, 1, 2])))
        objects = storage.objects
        assert objects is not None
        with objects.hold(storage.pools["kv"].group, [keys[1].encode()]) as held:
            assert held.found == (True,)
            assert storage.clear() is False
        assert storage.clear() is True
        assert storage.count_prefix(keys) == 0


def test_an_ssd_keeps_pages_over_a_restart(tmp_path: Path) -> None:
    pool, keys = MHATokenToKVPoolHost(), hashes(4)
    pool.fill(7)
    expected = [pool.page_bytes(page) for page in range(4)]
    settings = {"ssd": [f"{tmp_path}/kv:64MiB"], "call_deadline_s": 30.0}
    with closing(make_storage(("kv", pool), **settings)) as storage:
        assert all(storage.write("kv", keys, slots_of([0, 1, 2, 3])))
    pool.zero()
    with closing(make_storage(("kv", pool), **settings)) as storage:
        assert storage.count_prefix(keys) == 4
        assert storage.read("kv", keys, slots_of([3, 2, 1, 0])) == [True] * 4
        assert [pool.page_bytes(page) for page in (3, 2, 1, 0)] == expected


def test_no_owner_is_an_error_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(AttachError):
        make_storage(("kv", MHATokenToKVPoolHost()), socket=str(tmp_path / "none"), start_deadline_s=0.05)


def test_an_owner_that_goes_and_comes_back(tmp_path: Path) -> None:
    pool, keys, socket = MHATokenToKVPoolHost(), hashes(2), str(tmp_path / "s")
    pool.fill(3)
    expected = pool.page_bytes(0)
    owner = make_storage(("kv", pool), own_socket=socket)
    with closing(make_storage(("kv", pool), socket=socket, attach_again_s=0.01)) as storage:
        assert all(storage.write("kv", keys, slots_of([0, 1])))
        owner.close()
        assert storage.count_prefix(keys) == 0
        assert storage.read("kv", keys, slots_of([4, 5])) == [False, False]
        assert storage.write("kv", keys, slots_of([0, 1])) == [False, False]
        with closing(make_storage(("kv", pool), own_socket=socket)):
            deadline = Deadline.after(30)
            while storage.write("kv", keys, slots_of([0, 1])) != [True, True]:
                deadline.check("the backend to find the store again")
                threading.Event().wait(0.01)
            assert storage.read("kv", keys, slots_of([4, 5])) == [True, True]
            assert pool.page_bytes(4) == expected


def test_ranks_wait_for_the_first(tmp_path: Path) -> None:
    """The first rank opens the store when its pools are known; the others may be sooner."""
    from kvstore.adapters.sglang.position import Position

    socket, keys = str(tmp_path / "s"), hashes(2)
    pools = [MHATokenToKVPoolHost() for _ in range(2)]
    storages = [
        make_storage(("kv", pool), position=Position(tp_rank=rank, tp_size=2), own_socket=socket, is_open=False)
        for rank, pool in enumerate(pools)
    ]
    waiting = threading.Thread(target=storages[1].open)
    waiting.start()
    try:
        storages[0].open()
        waiting.join(30)
        assert not waiting.is_alive()
        for rank, (storage, pool) in enumerate(zip(storages, pools, strict=True)):
            pool.fill(rank)
            assert storage.write("kv", keys, slots_of([0, 1])) == [True, True]
        for storage, pool in zip(storages, pools, strict=True):
            expected = pool.page_bytes(1)
            assert storage.read("kv", keys, slots_of([8, 9])) == [True, True]
            assert pool.page_bytes(9) == expected
        # SGLang asks each rank; the first one does it for all.
        assert [storage.clear() for storage in storages] == [True, True]
        assert [storage.count_prefix(keys) for storage in storages] == [0, 0]
    finally:
        waiting.join(30)
        for storage in reversed(storages):
            storage.close()


def test_several_threads_at_once() -> None:
    """As SGLang, and more: two write, one asks, one reads; what is read is what was written under that key."""
    rounds, keys = 60, hashes(240)
    pool = MHATokenToKVPoolHost(pages=12)
    wrong: list[str] = []
    came: list[str] = []

    def values(page: int) -> np.ndarray:
        return pool.kv_buffer[:, page * 4 : page * 4 + 4]

    def parts() -> list[tuple[int, list[str]]]:
        return [(number * 4, keys[number * 4 : number * 4 + 4]) for number in range(rounds)]

    def write(first_page: int) -> None:
        for number, part in parts():
            for page in range(4):
                values(first_page + page)[...] = number + page
            storage.write("kv", part, slots_of(list(range(first_page, first_page + 4))))

    def ask() -> None:
        for _ in range(rounds):
            storage.count_prefix(keys)

    def read() -> None:
        for _ in range(3):
            for number, part in parts():
                for page, has_come in enumerate(storage.read("kv", part, slots_of([8, 9, 10, 11]))):
                    if has_come:
                        came.append(part[page])
                        if np.unique(values(8 + page)).tolist() != [number + page]:
                            wrong.append(part[page])

    with closing(make_storage(("kv", pool), dram="1MiB")) as storage:
        threads = [threading.Thread(target=write, args=[first]) for first in (0, 4)]
        threads += [threading.Thread(target=each) for each in (ask, read)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        read()
    assert came
    assert not wrong
