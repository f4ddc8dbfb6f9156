"""What a caller is likely to get wrong: the error names the argument, what it must be, and what to write instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.errors import AttachError, KVStoreError, LeaseError, SpecError, TokenError, WriteError
from kvstore.spec import CacheGroup, ChunkGrid, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.store import Store, open_store
from kvstore.testing.specs import hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SPEC = hybrid(16)
IDS = list(range(32))
HEADS = (Segment("heads", 2, 1),)
KEYS = TensorSpec("keys", DType.FLOAT32, HEADS, (4,), has_tokens=True)


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with open_store(SPEC, dram="1MiB") as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        yield store


@pytest.mark.parametrize("dram", [1.5, None, True, "8 gibi", b"8GiB", 0, "-1"])
def test_sizes(dram: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        open_store(SPEC, dram=dram)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (WriteError, "resume_at='32' is text", lambda store: store.write(IDS, resume_at="32")),
        (WriteError, "resume_at=32 is no sequence", lambda store: store.write(IDS, resume_at=32)),
        (WriteError, "no sequence of whole numbers", lambda store: store.write(IDS, resume_at=(32.0,))),
        (WriteError, "what Store.read returned", lambda store: store.write(IDS, resume=store.match([*IDS, 1]))),
        (WriteError, "joint=5 is no name", lambda store: store.write(IDS, joint=5)),
        (SpecError, "grid='x' is no kvstore.ChunkGrid", lambda store: store.write(IDS, grid="x")),
        (SpecError, "grid=16 is no kvstore.ChunkGrid", lambda store: store.match(IDS, grid=16)),
        (SpecError, r"shard=\(0, 2\) is no kvstore.Shard", lambda store: store.match(IDS, shard=(0, 2))),
        (SpecError, "shard=1 is no kvstore.Shard", lambda store: store.write(IDS, shard=1)),
        (LeaseError, "what Store.match returned", lambda store: store.read(IDS)),
        (LeaseError, "what Store.match returned", lambda store: store.send(IDS, "memory://misuse")),
        (TokenError, "tokenize", lambda store: store.match("hello")),
        (TokenError, "tokenize", lambda store: store.match(None)),
    ],
)
def test_arguments_of_a_store(
    store: Store, error: type[KVStoreError], message: str, call: Callable[[Store], object]
) -> None:
    with pytest.raises(error, match=message):
        call(store)
    assert store.statistics().reserved_bytes == 0


@pytest.mark.parametrize("tokens", [(0, 16), 16, "0:16", slice(0, 32, 2), slice(-16, None), slice(0, 33)])
def test_a_range_of_tokens(store: Store, tokens: Any) -> None:
    with store.write([1, *IDS[1:]]) as writer, pytest.raises(WriteError, match=r"slice|step|within the prompt"):
        writer.put(1, tokens=tokens, keys=np.zeros((2, 32, 4), np.float32))


@pytest.mark.parametrize("layer", [9, "1", -1])
def test_a_layer_that_is_not_in_the_spec(store: Store, layer: Any) -> None:
    message = f"layer {layer!r} has no cache in this spec; it has 5 layers, numbers 0 to 4"
    with store.write([2, *IDS[1:]]) as writer, pytest.raises(SpecError, match=message):
        writer.put(layer, tokens=slice(0, 32), keys=np.zeros((2, 32, 4), np.float32))
    with store.read(store.match([*IDS, 1])) as lease, pytest.raises(SpecError, match=message):
        lease.layer(layer)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("no kvstore.spec.DType", lambda: TensorSpec("keys", "float32", HEADS, (4,), True)),  # type: ignore[arg-type]
        ("are tuples", lambda: TensorSpec("keys", DType.FLOAT32, HEADS[0], (4,), True)),  # type: ignore[arg-type]
        ("are tuples", lambda: TensorSpec("keys", DType.FLOAT32, HEADS, 4, True)),  # type: ignore[arg-type]
        ("no kvstore.spec.ReuseRule", lambda: CacheGroup("a", "attention", (0,), (KEYS,))),  # type: ignore[arg-type]
        ("are tuples", lambda: CacheGroup("a", ReuseRule.ATTENTION, 0, (KEYS,))),  # type: ignore[arg-type]
        ("a tuple of CacheGroup", lambda: ModelSpec("m", "w", 16, SPEC.groups[0])),  # type: ignore[arg-type]
        ("no whole number from 1", lambda: hybrid("16")),  # type: ignore[arg-type]
        ("whole number of tokens", lambda: ChunkGrid.every("16", upto=32)),  # type: ignore[arg-type]
        ("no kvstore.ModelSpec", lambda: open_store({"model": "m"}, dram="1MiB")),  # type: ignore[arg-type]
    ],
)
def test_specs(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(SpecError, match=message):
        make()


@pytest.mark.parametrize("socket", ["", 5, b"/run/x.sock"])
def test_a_socket_is_a_path(socket: Any) -> None:
    with pytest.raises(AttachError, match="is no path"):
        open_store(SPEC, dram="1MiB", socket=socket)
    with pytest.raises(AttachError, match="is no path"):
        kvstore.attach(socket)


def test_a_socket_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="make its folder first"):
        open_store(SPEC, dram="1MiB", socket=tmp_path / "none" / "pool.sock")
    with pytest.raises(AttachError, match="open the pool there first"):
        kvstore.attach(tmp_path / "none" / "pool.sock")


@pytest.mark.parametrize("deadline_s", ["5", 0, -1.0, float("nan")])
def test_a_deadline_to_attach_within(deadline_s: Any) -> None:
    with pytest.raises(AttachError, match="deadline_s="):
        kvstore.attach("/nowhere/pool.sock", deadline_s=deadline_s)
