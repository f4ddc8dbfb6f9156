"""JAX arrays in and out. `make test-engines` installs JAX and runs these; elsewhere they are skipped."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.adapters import jax as kvstore_jax
from kvstore.errors import KVStoreError, LeaseError, SpecError, WriteError
from kvstore.spec import CacheGroup, DType, ReuseRule, Segment, TensorSpec

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
jax = pytest.importorskip("jax", reason="JAX is not installed; make test-engines installs it")

if TYPE_CHECKING:
    from collections.abc import Iterator

jnp = jax.numpy
IDS = list(range(100, 150))
BLOCK = 16


def random(seed: int, shape: tuple[int, ...], dtype: str) -> Any:
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def states(layers: int = 3, seed: int = 0) -> dict[str, list[Any]]:
    conv = [random(seed + layer, (1, 24, 3), "bfloat16") for layer in range(layers)]
    return {"conv": conv, "ssm": [random(seed + 50 + layer, (1, 4, 8, 16), "float32") for layer in range(layers)]}


def same_bits(first: Any, second: Any) -> bool:
    first, second = np.asarray(first), np.asarray(second)
    equal = first.dtype == second.dtype and first.shape == second.shape
    return equal and first.tobytes() == second.tobytes()


@pytest.fixture
def store() -> Iterator[kvstore.Store]:
    spec = kvstore_jax.spec_of_states(states(), model="mamba2", weights="test", block_tokens=BLOCK)
    with kvstore.open(spec, dram="16MiB") as opened:
        yield opened


def test_states_come_back_bit_for_bit(store: kvstore.Store) -> None:
    written = states()
    assert kvstore_jax.write_states(store, IDS, written, salt=b"tenant") == len(IDS)
    assert not store.match([*IDS, 1])
    with store.read(store.match([*IDS, 1], salt=b"tenant")) as lease:
        assert lease.tokens == len(IDS)
        found = kvstore_jax.read_states(lease)
    assert list(found) == ["conv", "ssm"]
    for name, arrays in found.items():
        assert len(arrays) == len(written[name])
        for array, original in zip(arrays, written[name], strict=True):
            assert isinstance(array, jax.Array)
            assert same_bits(array, original)
    other = states(seed=9)
    assert not any(same_bits(a, b) for name in found for a, b in zip(found[name], other[name], strict=True))


def test_what_was_read_outlives_the_lease(store: kvstore.Store) -> None:
    kvstore_jax.write_states(store, IDS, states())
    with store.read(store.match([*IDS, 1])) as lease:
        found = kvstore_jax.read_states(lease, device=jax.devices()[1])
    store.expire(IDS)
    kvstore_jax.write_states(store, [9] * 40, states(seed=7))
    assert same_bits(found["ssm"][0], states()["ssm"][0])
    assert found["ssm"][0].devices() == {jax.devices()[1]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"])
def test_a_source_shares_the_memory_of_its_array(dtype: str) -> None:
    array = random(1, (4, 6, 8), dtype)
    seen = kvstore_jax.as_source(array)
    assert seen.ctypes.data == array.unsafe_buffer_pointer()
    assert same_bits(seen, array)


WAYS = [
    ("float32", "numpy"),
    ("bfloat16", "numpy"),
    ("float8_e4m3fn", "numpy"),
    ("float32", "torch"),
    ("bfloat16", "torch"),
]


@pytest.mark.parametrize(("label", "way"), WAYS)
def test_attention_blocks_in_and_out(label: str, way: str) -> None:
    if way == "torch":
        pytest.importorskip("torch", reason="arrays reach GPUs through torch")
    tensors = tuple(TensorSpec(name, DType.parse(label), (Segment("heads", 2, 1),), (8,), True) for name in "kv")
    spec = kvstore.ModelSpec("m", "w", BLOCK, (CacheGroup("attention", ReuseRule.ATTENTION, (0,), tensors),))
    arrays = {name: random(seed, (2, len(IDS), 8), label) for seed, name in enumerate("kv")}
    with kvstore.open(spec, dram="16MiB") as opened:
        with opened.write(IDS) as writer:
            writer.put(0, tokens=slice(0, len(IDS)), **{n: kvstore_jax.as_source(a) for n, a in arrays.items()})
            writer.commit()
        with opened.read(opened.match([*IDS, 1])) as lease:
            layer = lease.layer(0)
            read = kvstore_jax.as_jax if way == "numpy" else through_torch
            found = {name: read(layer, name) for name in "kv"}
    assert all(same_bits(found[name], arrays[name]) for name in "kv")
    assert not same_bits(found["k"], found["v"])


def through_torch(layer: Any, name: str) -> Any:
    """How an array reaches a GPU, on the host."""
    return kvstore_jax._through_torch(layer, name, "cpu")


def test_bad_input_is_named(store: kvstore.Store) -> None:
    with pytest.raises(WriteError, match="ndarray is no JAX array"):
        kvstore_jax.as_source(np.zeros(3))
    with pytest.raises(WriteError, match="outside of jit"):
        jax.jit(kvstore_jax.as_source)(jnp.zeros(3))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("heads",))
    split = jax.device_put(jnp.zeros((4, 2)), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("heads")))
    with pytest.raises(WriteError, match="2 devices; pass each worker's share"):
        kvstore_jax.as_source(split)
    bad: list[tuple[dict[str, list[Any]], type[KVStoreError], str]] = [
        (states(layers=2), WriteError, "of 2 layers, the store's model has 3"),
        ({**states(), "ssm": states()["conv"]}, WriteError, "'ssm' of layer 0"),
        ({**states(), "conv": [each[0] for each in states()["conv"]]}, WriteError, "batch of one"),
        ({**states(), "conv": states()["conv"][:1]}, SpecError, "equally many"),
        ({name: [each.astype("float16") for each in arrays] for name, arrays in states().items()}, WriteError, "type"),
        ({"conv": states()["conv"]}, WriteError, "the store's model has .'conv', 'ssm'."),
    ]
    for given, error, message in bad:
        with pytest.raises(error, match=message):
            kvstore_jax.write_states(store, IDS, given)
    assert not store.match([*IDS, 1])
    assert store.statistics().reserved_bytes == 0
    with pytest.raises(SpecError, match="differ between layers"):
        kvstore_jax.spec_of_states({"s": [jnp.zeros((1, 2)), jnp.zeros((1, 3))]}, model="m", weights="w")
    with pytest.raises(SpecError, match="batch of one"):
        kvstore_jax.spec_of_states({"s": [jnp.zeros((2, 2))]}, model="m", weights="w")


def test_other_models_leases_are_refused() -> None:
    tensor = TensorSpec("k", DType.parse("float32"), (Segment("heads", 1, 1),), (2,), True)
    spec = kvstore.ModelSpec("m", "w", BLOCK, (CacheGroup("attention", ReuseRule.ATTENTION, (0,), (tensor,)),))
    with kvstore.open(spec, dram="16MiB") as opened:
        with opened.write(IDS) as writer:
            writer.put(0, tokens=slice(0, 50), k=kvstore_jax.as_source(jnp.zeros((1, 50, 2))))
            writer.commit()
        with opened.read(opened.match([*IDS, 1])) as lease, pytest.raises(LeaseError, match="as_jax"):
            kvstore_jax.read_states(lease)
