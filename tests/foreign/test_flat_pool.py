"""Many short paths at once: the same as one by one, or nothing."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
from kvstore.errors import PoolFullError, StoreClosedError
from kvstore.foreign import ForeignNamespace, ForeignStore
from kvstore.foreign.objects import ObjectPaths
from kvstore.pool import StoreLimits
from kvstore.pool.flat import FlatHold, flat_layout
from kvstore.testing.specs import hybrid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.pool import NodePath, Pool

CHUNK_BYTES = 8 * 1024
LIMIT_S = 30.0


def namespace() -> ForeignNamespace:
    return ForeignNamespace(
        model="tiny", weights="random", engine="vllm", version="1", hash_algorithm="sha256", hash_root=b"root",
        groups=(("kv", 2 * CHUNK_BYTES),), chunk_bytes=CHUNK_BYTES,
    )  # fmt: skip


@pytest.fixture
def objects() -> Iterator[ForeignStore]:
    with kvstore.open(namespace().spec, dram="4MiB") as store, ForeignStore(store, namespace()) as opened:
        yield opened
        if not store.is_closed:
            store.pool.check()


def pool_of(objects: ForeignStore) -> Pool:
    pool = objects.store.pool
    assert isinstance(pool, kvstore.pool.Pool)
    return pool


def paths(*names: int, size_bytes: int = 2 * CHUNK_BYTES) -> list[NodePath]:
    of = ObjectPaths(namespace().spec.fingerprint, CHUNK_BYTES, b"")
    return [of.path(b"%032d" % name, size_bytes) for name in names]


def content(number: int, size_bytes: int = 2 * CHUNK_BYTES) -> bytes:
    return np.random.default_rng(number).bytes(size_bytes)


def test_a_batch_takes_one_reservation(objects: ForeignStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(objects)

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("objects were stored or held one by one")

    monkeypatch.setattr(pool, "begin", refuse)
    monkeypatch.setattr(pool, "hold", refuse)
    monkeypatch.setattr(pool, "match", refuse)
    told = []
    pool.subscribe(lambda: told.append(1))
    keys = [b"%d" % number for number in range(20)]
    values = [content(number) for number in range(20)]
    assert all(objects.put("kv", keys, values))
    assert len(told) == 1
    assert all(objects.has("kv", keys))
    read = [bytearray(2 * CHUNK_BYTES) for _ in keys]
    assert all(objects.get("kv", keys, read))
    assert read == values
    assert pool.statistics().stored_records == 40


def test_an_object_twice_in_a_batch_is_stored_once(objects: ForeignStore) -> None:
    assert objects.put("kv", [b"a", b"b", b"a"], [content(1), content(2), content(1)]) == [True] * 3
    assert pool_of(objects).statistics().stored_records == 4
    read = bytearray(2 * CHUNK_BYTES)
    assert objects.get("kv", [b"a"], [read]) == [True]
    assert read == content(1)


def test_what_does_not_fit_at_once_is_stored_as_far_as_it_fits(objects: ForeignStore) -> None:
    keys = [b"%d" % number for number in range(60)]
    assert all(objects.put("kv", keys, [content(number) for number in range(60)]))
    others = [b"x%d" % number for number in range(200)]
    with objects.hold("kv", keys) as held:
        assert all(held.found)
        # There is no room for all of them at once; one by one the later ones evict the earlier.
        assert all(objects.put("kv", others, [content(7)] * 200))
        assert all(objects.has("kv", keys))
        assert 0 < sum(objects.has("kv", others)) < 200
    assert pool_of(objects).statistics().reserved_bytes == 0


def test_what_is_not_committed_leaves_nothing(objects: ForeignStore) -> None:
    pool = pool_of(objects)
    assert objects.put("kv", [b"before"], [content(1)]) == [True]
    before = pool.statistics()
    write = pool.begin_flat(paths(1, 2, 3), salt=b"")
    assert write is not None
    assert [len(each) for each in write.places] == [2, 2, 2]
    assert pool.statistics().reserved_bytes > 0
    assert pool.stored(paths(1, 2, 3)) == [False] * 3
    write.abort()
    write.abort()
    after = pool.statistics()
    assert (after.reserved_bytes, after.committed_bytes, after.nodes - after.ghosts) == (
        0,
        before.committed_bytes,
        before.nodes,
    )
    with pytest.raises(PoolFullError):
        pool.begin_flat(paths(*range(1000)), salt=b"")
    after = pool.statistics()
    assert (after.reserved_bytes, after.committed_bytes, after.nodes - after.ghosts) == (
        0,
        before.committed_bytes,
        before.nodes,
    )


def test_what_is_held_is_not_evicted(objects: ForeignStore) -> None:
    pool = pool_of(objects)
    assert all(objects.put("kv", [b"a", b"b"], [content(1), content(2)]))
    asked = [
        ObjectPaths(namespace().spec.fingerprint, CHUNK_BYTES, b"").path(
            namespace().object_key("kv", key), 2 * CHUNK_BYTES
        )
        for key in (b"a", b"x", b"b")
    ]
    hold = pool.hold_flat(asked)
    assert hold is not None
    assert [None if each is None else len(each) for each in hold.places] == [2, None, 2]
    assert objects.remove("kv", [b"a", b"b"]) == [False, False]
    hold.release()
    hold.release()
    assert objects.remove("kv", [b"a", b"b"]) == [True, True]


def test_closing_while_it_is_copied_leaves_memory_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that copies keeps what it copies from mapped, and says nothing that it read."""
    store = kvstore.open(namespace().spec, dram="4MiB")
    with ForeignStore(store, namespace()) as objects:
        assert objects.put("kv", [b"a"], [content(1)]) == [True]
        inner = FlatHold.check

        def close_first(hold: FlatHold) -> None:
            thread = threading.Thread(target=store.close)
            thread.start()
            thread.join(LIMIT_S)
            inner(hold)

        monkeypatch.setattr(FlatHold, "check", close_first)
        with pytest.raises(StoreClosedError):
            objects.get("kv", [b"a"], [bytearray(2 * CHUNK_BYTES)])


def test_quotas_and_lifetimes_hold_for_batches() -> None:
    limits = StoreLimits(quotas={b"small": 256 * 1024})
    with (
        kvstore.open(namespace().spec, dram="4MiB", limits=limits) as store,
        ForeignStore(store, namespace()) as objects,
    ):
        keys = [b"%d" % number for number in range(64)]
        objects.put("kv", keys, [content(1)] * 64, salt=b"small")
        assert store.pool.statistics().bytes_by_salt[b"small"] <= 256 * 1024
        assert 0 < sum(objects.has("kv", keys, salt=b"small")) < 64
        assert objects.put("kv", [b"a", b"b"], [content(2)] * 2, ttl_s=0.0) == [True, True]
        assert objects.has("kv", [b"a", b"b"]) == [False, False]
        store.pool.check()


def test_other_specs_go_one_by_one() -> None:
    assert flat_layout(hybrid(4)) is None
    with kvstore.open(hybrid(4), dram="4MiB") as store:
        assert store.pool.begin_flat([], salt=b"") is None
        assert store.pool.hold_flat([]) is None


def test_an_attached_process_asks_once_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, own = str(tmp_path / "socket"), namespace()
    with (
        kvstore.open(own.spec, dram="4MiB", socket=path) as owner,
        kvstore.attach(path) as attached,
        ForeignStore(owner, own) as here,
        ForeignStore(attached, own) as there,
    ):
        keys = [b"%d" % number for number in range(30)]
        assert all(here.put("kv", keys, [content(1)] * 30))
        asked = []
        inner = attached.pool.request
        monkeypatch.setattr(attached.pool, "request", lambda *each: (asked.append(each[0]), inner(*each))[1])
        assert there.has("kv", [*keys, b"x"]) == [True] * 30 + [False]
        assert len(asked) == 1
        assert there.count_prefix("kv", [*keys, b"x"]) == 30
        read = bytearray(2 * CHUNK_BYTES)
        assert there.get("kv", [b"3"], [read]) == [True]
        assert read == content(1)
