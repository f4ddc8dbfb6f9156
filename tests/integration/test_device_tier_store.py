"""A store with a tier on a device: kept there behind the writer's back, found there, and copied from there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.placement.gpu.slab_shelf import GpuOptions
from kvstore.placement.tiered import TieredPool
from kvstore.spec import ReuseRule
from kvstore.store import Store, open_store
from kvstore.testing.specs import check_lease, hybrid, put_all, state_values, token_values

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.store import Lease

torch = pytest.importorskip("torch")

IDS = list(range(40))
TEST_S = 30.0


@pytest.fixture(params=["cpu", "cuda"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    with open_store(hybrid(), dram="2MiB", gpu=GpuOptions("4MiB", device=request.param)) as store:
        yield store
        store.pool.check()


def device_of(store: Store) -> str:
    (found,) = store.devices.statistics()
    return found.device


def check_on_device(store: Store, lease: Lease) -> None:
    """Every layer, copied into tensors of the device."""
    prompt = store.prompt(IDS)
    for group in lease.spec.groups:
        for number in group.layers:
            layer = lease.layer(number)
            tensors: dict[str, Any] = {
                tensor.name: torch.zeros(
                    layer.shape(tensor.name), dtype=getattr(torch, tensor.dtype.label), device=device_of(store)
                )
                for tensor in group.tensors
            }
            layer.copy_to(**tensors)
            values = token_values if group.rule is ReuseRule.ATTENTION else state_values
            at = (0, lease.tokens) if group.rule is ReuseRule.ATTENTION else (lease.tokens,)
            for name, tensor in tensors.items():
                expected = values(lease.spec, prompt, number, name, *at)  # type: ignore[operator]
                found = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
                assert np.array_equal(found, np.frombuffer(expected.tobytes(), np.uint8))


def kept(store: Store) -> TieredPool:
    pool = store.pool
    assert isinstance(pool, TieredPool)
    pool._keeper.flush(Deadline.after(TEST_S))
    return pool


def test_what_was_written_is_copied_from_the_device(store: Store) -> None:
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    kept(store)
    with store.read(store.match([*IDS, 1])) as lease:
        check_on_device(store, lease)
    (found,) = store.devices.statistics()
    assert found.resident_bytes == found.read_bytes > 0


@pytest.mark.parametrize("layered", [False, True])
def test_what_the_host_has_lost_comes_back(store: Store, layered: bool) -> None:
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    pool = kept(store)
    assert pool.evict_here(store.prompt(IDS).path.key(0)) > 0
    found = store.match([*IDS, 1])
    assert (found.tokens, found.tier) == (40, "gpu")
    with store.read(found, layered=layered) as lease:
        check_on_device(store, lease)
        check_lease(lease, store.prompt(IDS))


def test_a_store_closes_with_copies_under_way(store: Store) -> None:
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    lease = store.read(store.match([*IDS, 1]))
    check_on_device(store, lease)
    store.close()
    lease.release()
