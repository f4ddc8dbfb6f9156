"""Objects under foreign keys: put, has, get, hold, remove, in this thread and by others."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import pytest

import kvstore
from kvstore.errors import SpecError, WriteError
from kvstore.foreign import ForeignNamespace, ForeignStore, Region

if TYPE_CHECKING:
    from collections.abc import Iterator

KV_BYTES = 96 * 1024
STATE_BYTES = 32 * 1024


def namespace(**changes: object) -> ForeignNamespace:
    known: dict[str, object] = {
        "model": "tiny",
        "weights": "random",
        "engine": "vllm",
        "version": "0.32.0",
        "hash_algorithm": "sha256",
        "hash_root": b"root",
        "groups": (("kv", KV_BYTES), ("state", STATE_BYTES)),
    }
    return ForeignNamespace(**{**known, **changes})  # type: ignore[arg-type]


@pytest.fixture
def objects() -> Iterator[ForeignStore]:
    own = namespace()
    with kvstore.open(own.spec, dram="16MiB") as store, ForeignStore(store, own) as opened:
        yield opened


def content(seed: int, size_bytes: int = KV_BYTES) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size_bytes, dtype=np.uint8)


def test_what_was_put_comes_back(objects: ForeignStore) -> None:
    values = [content(seed) for seed in range(3)]
    assert objects.put("kv", [b"a", b"b", b"c"], values) == [True, True, True]
    assert objects.has("kv", [b"a", b"x", b"c"]) == [True, False, True]
    assert objects.count_prefix("kv", [b"a", b"b", b"x", b"c"]) == 2
    read = [np.zeros_like(value) for value in [*values, values[0]]]
    assert objects.get("kv", [b"a", b"b", b"c", b"x"], read) == [True, True, True, False]
    for value, copy in zip(values, read, strict=False):
        assert np.array_equal(value, copy)
    counted = objects.statistics()
    assert (counted.stored, counted.loaded, counted.missed) == (3, 3, {"absent": 1})
    assert counted.stored_bytes == counted.loaded_bytes == 3 * KV_BYTES


@pytest.mark.parametrize("size_bytes", [1, 4095, STATE_BYTES, STATE_BYTES + 1, KV_BYTES, 5 * KV_BYTES + 77])
def test_objects_of_any_size(objects: ForeignStore, size_bytes: int) -> None:
    value = content(1, size_bytes)
    assert objects.put("kv", [b"key"], [value.tobytes()]) == [True]
    assert objects.has("kv", [b"key"], sizes_bytes=[size_bytes]) == [True]
    assert objects.has("kv", [b"key"], sizes_bytes=[size_bytes + 1]) == [False]
    copy = bytearray(size_bytes)
    assert objects.get("kv", [b"key"], [copy]) == [True]
    assert copy == value.tobytes()


def test_an_object_may_lie_in_several_regions(objects: ForeignStore) -> None:
    value = content(2)
    cuts = [value[:100], value[100:70_000], value[70_000:]]
    assert objects.put("kv", [b"a"], [[Region(cut.ctypes.data, cut.nbytes) for cut in cuts]]) == [True]
    copy = np.zeros_like(value)
    halves = [Region(copy.ctypes.data, 50_001), Region(copy.ctypes.data + 50_001, KV_BYTES - 50_001)]
    assert objects.get("kv", [b"a"], [halves]) == [True]
    assert np.array_equal(value, copy)


def test_groups_and_salts_are_apart(objects: ForeignStore) -> None:
    value = content(3, STATE_BYTES)
    assert objects.put("state", [b"a"], [value], salt=b"one") == [True]
    assert objects.has("state", [b"a"], salt=b"one") == [True]
    assert objects.has("state", [b"a"]) == [False]
    assert objects.has("kv", [b"a"], sizes_bytes=[STATE_BYTES], salt=b"one") == [False]
    assert objects.has(["kv", "state"], [b"a", b"a"], salt=b"one") == [False, True]


def test_a_hold_outlives_eviction(objects: ForeignStore) -> None:
    value = content(4)
    objects.put("kv", [b"kept"], [value])
    with objects.hold("kv", [b"kept", b"absent"]) as hold:
        assert hold.found == (True, False)
        many = [b"%d" % number for number in range(400)]
        assert all(objects.put("kv", many, [content(number) for number in range(400)]))
        copy = np.zeros_like(value)
        assert hold.get([copy, None]) == [True, False]
        assert np.array_equal(value, copy)
    assert objects.put("kv", many, [content(number) for number in range(400)])
    assert objects.has("kv", [b"kept"]) == [False]


def test_removed_is_gone(objects: ForeignStore) -> None:
    objects.put("kv", [b"a", b"b"], [content(1), content(2)])
    assert objects.remove("kv", [b"a", b"x"]) == [True, False]
    assert objects.has("kv", [b"a", b"b"]) == [False, True]


def test_damage_is_a_miss_and_heals(objects: ForeignStore) -> None:
    value = content(5)
    objects.put("kv", [b"a"], [value])
    with objects.store.read(objects.store.match(_prompt(objects, b"a"))) as lease:
        address = lease.arrays[1][0]
        _flip(int(address) + lease.records[0].layout.pieces[0].offset)
    copy = np.zeros_like(value)
    assert objects.get("kv", [b"a"], [copy]) == [False]
    assert objects.statistics().missed == {"damaged": 1}
    assert objects.has("kv", [b"a"]) == [False]
    assert objects.put("kv", [b"a"], [value]) == [True]
    assert objects.get("kv", [b"a"], [copy]) == [True]
    assert np.array_equal(value, copy)


def _prompt(objects: ForeignStore, key: bytes) -> kvstore.Prompt:
    """The object as a prompt, with one token more, so that all of the object may match."""
    name = objects.namespace.object_key("kv", key)
    ids = [KV_BYTES] + [0] * (KV_BYTES // objects.namespace.chunk_bytes)
    return objects.store.prompt(ids, extras=[kvstore.ExtraInput(0, name)])


def _flip(address: int) -> None:
    byte = ctypes.c_uint8.from_address(address)
    byte.value ^= 0x10


def test_without_waiting(objects: ForeignStore) -> None:
    value = content(6)
    assert objects.put_async("kv", [b"a"], [value]).result(30) == [True]
    assert objects.has_async("kv", [b"a", b"b"]).result(30) == [True, False]
    copy = np.zeros_like(value)
    assert objects.get_async("kv", [b"a"], [copy]).result(30) == [True]
    assert np.array_equal(value, copy)
    with objects.hold_async("kv", [b"a"]).result(30) as hold:
        assert hold.found == (True,)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hash_root": None}, "PYTHONHASHSEED"),
        ({"hash_root": b""}, "PYTHONHASHSEED"),
        ({"hash_algorithm": "xxhash"}, "xxhash"),
        ({"hash_algorithm": "builtin"}, "builtin"),
        ({"groups": (("kv", 0),)}, "kv"),
        ({"groups": ()}, "groups"),
        ({"rank": 2, "ranks": 2}, "rank"),
        ({"weights": ""}, "weights"),
    ],
)
def test_a_namespace_that_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        namespace(**changes)


def test_misuse_is_named(objects: ForeignStore) -> None:
    with pytest.raises(SpecError, match="no group 'other'"):
        objects.has("other", [b"a"])
    with pytest.raises(WriteError, match="writable"):
        objects.get("kv", [b"a"], [bytes(KV_BYTES)])
    with pytest.raises(WriteError, match="2 keys"):
        objects.put("kv", [b"a", b"b"], [content(1)])
    with pytest.raises(SpecError, match="bytes, not 0"):
        objects.put("kv", [b"a"], [b""])
