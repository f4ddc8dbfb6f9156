"""Tensors of a device as sources and destinations: on the host, on CUDA, and on a device that lags."""

from __future__ import annotations

import gc
import json
import os
import weakref
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.gpu_copy import main as benchmark
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, DeviceError, LeaseError, WriteError
from kvstore.limits import STAGING_BUFFERS
from kvstore.placement.gpu.slab_shelf import SlabShelf
from kvstore.spec import Coverage, ReuseRule, Shard
from kvstore.store import Lease, Store, Writer, open_store
from kvstore.store.device_put import token_parts
from kvstore.testing.lagging_device import LaggingDevice, LaggingMark, LaggingStream
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.specs import (
    check_lease,
    dense,
    hybrid,
    latent,
    pure_state,
    put_all,
    spans,
    state_values,
    tensors_of,
    token_values,
)
from kvstore.tiers.gpu.staging import StagingRing
from kvstore.tiers.gpu.torch_device import CudaDevice, open_device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from kvstore.pool import Prompt
    from kvstore.spec import ModelSpec, TensorSpec
    from kvstore.store.devices import DeviceLane
    from kvstore.tiers.gpu.device import Device


torch = pytest.importorskip("torch")
B = 16
IDS = [(13 * number) % 1000 for number in range(40)]
TEST_S = 30.0


@dataclass(frozen=True)
class Bench:
    """A device and how a test brings values there and back."""

    device: Device

    def put(self, values: npt.NDArray[Any], tensor: TensorSpec) -> Any:
        host = torch.from_numpy(np.ascontiguousarray(values)).view(getattr(torch, tensor.dtype.label))
        if isinstance(self.device, LaggingDevice):
            return self.device.tensor(host)
        return host.to(self.device.name)

    def empty(self, shape: tuple[int, ...], tensor: TensorSpec) -> Any:
        return self.put(np.full(shape, 7, tensor.dtype.storage), tensor)

    def values(self, tensor: Any) -> bytes:
        """What the device has by now; on a device with streams, what it has when the current one is done."""
        return bytes(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())

    def finish(self) -> None:
        if isinstance(self.device, LaggingDevice):
            self.device.drain()


@pytest.fixture(params=["cpu", "cuda", "lagging"])
def bench(request: pytest.FixtureRequest) -> Bench:
    if request.param == "lagging":
        return Bench(LaggingDevice())
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return Bench(open_device(request.param))


def opened(
    spec: ModelSpec, bench: Bench, *, gpu_bytes: int = 0, buffer_bytes: int | None = None, dram: str = "8MiB"
) -> Store:
    """A store with the device, and a tier on it where it has any bytes."""
    store = open_store(spec, dram=dram)
    shelf = SlabShelf(spec, bench.device, gpu_bytes) if gpu_bytes else None
    lane = store.devices.add(bench.device, shelf)
    if buffer_bytes is not None:
        for way in (lane.puts, lane.reads):
            way.ring = StagingRing(bench.device, buffer_bytes)
    return store


def lane_of(store: Store) -> DeviceLane:
    return store.devices._lanes[0]


def described(spec: ModelSpec, layer: int, name: str) -> TensorSpec:
    group = spec.groups[spec.group_index(layer, name)]
    return next(tensor for tensor in group.tensors if tensor.name == name)


def put_from_device(bench: Bench, writer: Writer, *, step: int = 1 << 20) -> None:
    """Everything that the writer wants, `step` tokens at a time, transposed in memory now and then."""
    spec, prompt, end = writer.spec, writer.prompt, len(writer.prompt)
    for start in range(0, end, step):
        stop = min(start + step, end)
        for layer, names in tensors_of(spec, ReuseRule.ATTENTION):
            tensors: dict[str, Any] = {}
            held = slice(None) if writer.coverage is None else writer.coverage.mask(layer)[start:stop]
            for number, name in enumerate(names):
                values = token_values(spec, prompt, layer, name, start, stop, writer.shard)[:, held]
                if number % 2:
                    swapped = bench.put(values.swapaxes(0, 1).copy(), described(spec, layer, name))
                    tensors[name] = swapped.transpose(0, 1)
                else:
                    tensors[name] = bench.put(values, described(spec, layer, name))
            writer.put(layer, tokens=slice(start, stop), **tensors)
    for at in writer.resume_at:
        for layer, names in tensors_of(spec, ReuseRule.STATE):
            tensors = {
                name: bench.put(state_values(spec, prompt, layer, name, at, writer.shard), described(spec, layer, name))
                for name in names
            }
            writer.put_state(layer, at=at, **tensors)


def check_on_device(bench: Bench, lease: Lease, prompt: Prompt, *, is_swapped: bool = False) -> None:
    """Copy every layer to the device and compare it."""
    asked: list[tuple[str, Any, bytes]] = []
    for group in lease.spec.groups:
        for number in group.layers:
            layer = lease.layer(number)
            tensors: dict[str, Any] = {}
            for tensor in group.tensors:
                shape = layer.shape(tensor.name)
                if is_swapped and len(shape) > 1:
                    into = bench.empty((shape[1], shape[0], *shape[2:]), tensor).transpose(0, 1)
                else:
                    into = bench.empty(shape, tensor)
                tensors[tensor.name] = into
                if group.rule is ReuseRule.ATTENTION:
                    expected = token_values(lease.spec, prompt, number, tensor.name, 0, lease.tokens, lease.shard)
                    expected[:, ~layer.mask] = 0
                else:
                    expected = state_values(lease.spec, prompt, number, tensor.name, lease.tokens, lease.shard)
                asked.append((f"{tensor.name!r} of layer {number}", into, expected.tobytes()))
            layer.copy_to(**tensors)
    bench.finish()
    for what, into, expected_bytes in asked:
        assert bench.values(into) == expected_bytes, f"{what} is not what belongs to this prefix"


# Puts


@pytest.mark.parametrize("make", [dense, hybrid, pure_state, latent])
@pytest.mark.parametrize("step", [1 << 20, 10])
def test_what_is_put_from_a_device_is_what_was_computed(
    bench: Bench, make: Callable[..., ModelSpec], step: int
) -> None:
    spec = make()
    with opened(spec, bench) as store:
        with store.write(IDS, resume_at=[32, 40]) as writer:
            put_from_device(bench, writer, step=step)
            writer.commit()
        with store.read(store.match([*IDS, 1]), verify=True) as lease:
            assert lease.tokens == 40
            check_lease(lease, store.prompt(IDS))
        (found,) = store.devices.statistics()
        assert found.put_bytes > 0
        assert (found.waiting, found.overdue) == (0, 0)
        store.pool.check()


@pytest.mark.parametrize("buffer_bytes", [64, 4096])
def test_puts_larger_than_a_buffer(bench: Bench, buffer_bytes: int) -> None:
    with opened(hybrid(), bench, buffer_bytes=buffer_bytes) as store:
        with store.write(IDS) as writer:
            put_from_device(bench, writer)
            writer.commit()
        with store.read(store.match([*IDS, 1]), verify=True) as lease:
            check_lease(lease, store.prompt(IDS))


def test_a_put_of_which_a_part_is_there(bench: Bench) -> None:
    with opened(dense(), bench) as store:
        with store.write(IDS[:32]) as writer:
            put_all(writer)
            writer.commit()
        before = store.devices.statistics()[0].put_bytes
        with store.write(IDS[:32]) as writer:
            put_from_device(bench, writer)
            writer.commit()
        assert store.devices.statistics()[0].put_bytes == before
        with store.write(IDS) as writer:
            put_from_device(bench, writer, step=B)
            writer.commit()
        with store.read(store.match([*IDS, 1]), verify=True) as lease:
            check_lease(lease, store.prompt(IDS))


def test_a_share_of_a_sharded_model(bench: Bench) -> None:
    with opened(hybrid(), bench) as store:
        for index in range(2):
            with store.write(IDS, shard=Shard(index, 2)) as writer:
                put_from_device(bench, writer)
                writer.commit()
        with store.read(store.match([*IDS, 1]), verify=True) as lease:
            check_lease(lease, store.prompt(IDS))
        with store.read(store.match([*IDS, 1], shard=Shard(1, 2))) as lease:
            check_on_device(bench, lease, store.prompt(IDS))


def test_sparse_layers(bench: Bench) -> None:
    mask = np.ones(40, np.bool_)
    mask[[0, 5, 6, 20, 39]] = False
    with opened(dense(), bench) as store:
        prompt = store.prompt(IDS, coverage=Coverage.of_masks({1: mask}))
        with store.write(prompt) as writer:
            put_from_device(bench, writer)
            writer.commit()
        with store.read(store.match([*IDS, 1], accept_coverage=True), verify=True) as lease:
            check_lease(lease, store.prompt(IDS))
            exact = store.prompt(IDS).exact.with_masks(lease.path.masks)
            check_on_device(bench, lease, exact)


def test_wrong_tensors_are_refused(bench: Bench) -> None:
    spec = dense()
    tensor = described(spec, 0, "keys")
    with opened(spec, bench) as store, store.write(IDS) as writer:
        good = bench.empty((2, 40, 4), tensor)
        with pytest.raises(WriteError, match="shape"):
            writer.put(0, tokens=slice(0, 39), keys=good)
        bad = on(bench, torch.zeros((2, 40, 4), dtype=torch.float64))
        with pytest.raises(WriteError, match="type float64"):
            writer.put(0, tokens=slice(0, 40), keys=bad)
        with pytest.raises(WriteError, match="one device"):
            writer.put(0, tokens=slice(0, 40), keys=good, values=np.zeros((2, 40, 4), tensor.dtype.storage))
        with pytest.raises(WriteError, match="stream= is for"):
            writer.put(0, tokens=slice(0, 40), stream=1, keys=np.zeros((2, 40, 4), tensor.dtype.storage))
        with pytest.raises(DeviceError, match="stream"):
            writer.put(0, tokens=slice(0, 40), stream="no stream", keys=good)
        writer.put(0, tokens=slice(0, 20), keys=good[:, :20])
        with pytest.raises(WriteError, match="put before"):
            writer.put(0, tokens=slice(10, 40), keys=good[:, 10:])
        with pytest.raises(WriteError, match="not complete"):
            writer.commit()
        writer.abort()
        with pytest.raises(WriteError, match="ended"):
            writer.put(0, tokens=slice(20, 40), keys=good[:, 20:])


def on(bench: Bench, host: Any) -> Any:
    return bench.device.tensor(host) if isinstance(bench.device, LaggingDevice) else host.to(bench.device.name)


def test_parts_cover_each_token_once() -> None:
    for start, stop, token_bytes, part_bytes in (
        (0, 40, 10, 100),
        (5, 70, 10, 320),
        (16, 17, 1000, 10),
        (3, 99, 1, 48),
    ):
        parts = token_parts(start, stop, B, token_bytes, part_bytes)
        assert [first for first, _ in parts][1:] == [end for _, end in parts][:-1]
        assert (parts[0][0], parts[-1][1]) == (start, stop)
        assert all(0 < (end - first) * token_bytes <= max(part_bytes, B * token_bytes) for first, end in parts)
        assert all(first % B == 0 for first, _ in parts[1:])


def test_a_put_lands_only_when_the_device_is_done() -> None:
    """The tensor is computed late: what is stored is what the stream had computed before the put, not after."""
    spec, device = dense(), LaggingDevice()
    bench = Bench(device)
    with opened(spec, bench) as store, store.write(IDS) as writer:
        device.is_held = True
        stream = device.stream()
        for layer, names in tensors_of(spec, ReuseRule.ATTENTION):
            tensors = {}
            for name in names:
                final = bench.put(token_values(spec, writer.prompt, layer, name, 0, 40), described(spec, layer, name))
                into = bench.empty(tuple(final.shape), described(spec, layer, name))
                stream.run(lambda into=into, final=final: into.copy_(final))  # the model computes
                tensors[name] = into
            writer.put(layer, tokens=slice(0, 40), stream=stream, **tensors)
            for into in tensors.values():
                stream.run(lambda into=into: into.zero_())  # and uses the memory for something else
            if layer == 1:
                break
        with pytest.raises(DeadlineError, match="have not come from their device"):
            writer.commit(deadline_s=0.01)
        assert not any(writer.transaction.is_sealed(number) for number in range(len(writer.transaction.records)))
        copying = lane_of(store).puts.stream
        assert isinstance(copying, LaggingStream)
        copying.is_held = True
        device.drain()  # everything else goes as far as it may
        assert stream.queue, "the tensors were overwritten before they were copied"
        copying.is_held = device.is_held = False
        for layer, names in tensors_of(spec, ReuseRule.ATTENTION)[2:]:
            values = {name: token_values(spec, writer.prompt, layer, name, 0, 40) for name in names}
            writer.put(layer, tokens=slice(0, 40), **values)
        writer.commit()
        with store.read(store.match([*IDS, 1]), verify=True) as lease:
            check_lease(lease, store.prompt(IDS))


def test_commit_async_waits_for_what_is_on_its_way() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    with opened(dense(), bench, buffer_bytes=1 << 16) as store, store.write(IDS[:16]) as writer:
        lane_of(store).puts.ring = StagingRing(device, 1 << 16, 64)
        device.is_held = True
        put_from_device(bench, writer)
        handle = writer.commit_async()
        assert not handle.done()
        assert store.match([*IDS[:16], 1]).tokens == 0
        device.is_held = False
        handle.result(TEST_S)
        assert store.match([*IDS[:16], 1]).tokens == 16
    with opened(dense(), bench) as store, store.write(IDS) as writer:
        tensor = described(dense(), 0, "keys")
        device.is_held = True
        writer.put(0, tokens=slice(0, 40), keys=bench.empty((2, 40, 4), tensor))
        handle = writer.commit_async()
        device.is_held = False
        with pytest.raises(WriteError):
            handle.result(TEST_S)


def test_an_aborted_writer_keeps_its_slots_until_the_device_is_done() -> None:
    """Bytes are on their way to them: they are quarantined, not reused."""
    device = LaggingDevice()
    bench = Bench(device)
    tensor = described(dense(), 0, "keys")
    with opened(dense(), bench) as store:
        device.is_held = True
        writer = store.write(IDS)
        writer.put(0, tokens=slice(0, 40), keys=bench.empty((2, 40, 4), tensor))
        writer.abort()
        assert store.statistics().quarantined_bytes > 0
        assert store.devices.statistics()[0].waiting == 1
        device.is_held = False
        lane_of(store).landings.wait(Deadline.after(TEST_S), "landing")
        assert store.statistics().quarantined_bytes == 0
        store.pool.check()


def test_a_failed_device_ends_the_writer() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    tensor = described(dense(), 0, "keys")
    with opened(dense(), bench) as store:
        device.is_held = True
        writer = store.write(IDS)
        writer.put(0, tokens=slice(0, 40), keys=bench.empty((2, 40, 4), tensor))
        device.failure = "the device fell off the bus"
        with pytest.raises(WriteError, match="fell off the bus"):
            writer.commit()
        lane_of(store).landings.wait(Deadline.after(TEST_S), "landing")
        assert store.statistics().quarantined_bytes == store.statistics().reserved_bytes == 0
        with store.write(IDS) as writer, pytest.raises(DeviceError, match="bus"):
            writer.put(0, tokens=slice(0, 40), keys=bench.empty((2, 40, 4), tensor))
        store.pool.check()


def test_staging_is_bounded() -> None:
    """A writer that is faster than the device waits for it."""
    device = LaggingDevice()
    bench = Bench(device)
    made: list[int] = []
    staging = device.staging
    device.staging = lambda size_bytes: made.append(size_bytes) or staging(size_bytes)  # type: ignore[method-assign,func-returns-value]
    with opened(dense(), bench, buffer_bytes=1024) as store, store.write(range(400)) as writer:
        device.is_held = True
        putting = Background(lambda: put_from_device(bench, writer))
        while device.waiting < STAGING_BUFFERS:
            assert putting.is_running
        assert len(made) <= STAGING_BUFFERS
        device.is_held = False
        putting.result(TEST_S)
        writer.commit()
        assert len(made) == STAGING_BUFFERS
        with store.read(store.match([*range(400), 1]), verify=True) as lease:
            check_lease(lease, store.prompt(range(400)))


# Reads


@pytest.mark.parametrize("make", [dense, hybrid, pure_state, latent])
@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize("is_swapped", [False, True])
def test_what_is_copied_to_a_device_is_what_was_written(
    bench: Bench, make: Callable[..., ModelSpec], is_resident: bool, is_swapped: bool
) -> None:
    spec = make()
    with opened(spec, bench, gpu_bytes=8 << 20, buffer_bytes=512) as store:
        shelf = lane_of(store).shelf
        assert shelf is not None
        with closing(shelf):
            with store.write(IDS) as writer:
                put_all(writer)
                writer.commit()
            if is_resident:
                keep(store, shelf)
            with store.read(store.match([*IDS, 1])) as lease:
                check_on_device(bench, lease, store.prompt(IDS), is_swapped=is_swapped)
            found = store.devices.statistics()[0]
            assert found.read_bytes > 0
            assert found.resident_bytes == (found.read_bytes if is_resident else 0)
            lane_of(store).releases.wait(Deadline.after(TEST_S), "the release")
            assert evicted(shelf, store)
            shelf.check()


def test_a_layer_in_several_records(bench: Bench) -> None:
    """Layers of several spans, each larger than a staging buffer."""
    spec, ids = spans(), IDS[:3]
    with opened(spec, bench, gpu_bytes=96 << 20, dram="96MiB") as store:
        shelf = lane_of(store).shelf
        assert shelf is not None
        with closing(shelf):
            with store.write(ids) as writer:
                put_from_device(bench, writer)
                writer.commit()
            for _ in range(2):
                with store.read(store.match([*ids, 1])) as lease:
                    check_on_device(bench, lease, store.prompt(ids))
                keep(store, shelf, ids)
            found = store.devices.statistics()[0]
            assert found.resident_bytes == found.read_bytes // 2


def keep(store: Store, shelf: SlabShelf, ids: list[int] = IDS) -> None:
    hold = store.pool.hold(store.match([*ids, 1]).candidates[0].path)
    shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)  # type: ignore[attr-defined]
    hold.release()


def evicted(shelf: SlabShelf, store: Store) -> bool:
    """Nothing on the shelf is held."""
    path = store.match([*IDS, 1]).candidates[0].path
    for node in range(len(path)):
        shelf.evict(path.key(node))
    return shelf.statistics().committed_bytes == 0


def test_the_device_has_the_bytes_when_its_stream_has_come_so_far(bench: Bench) -> None:
    """What the caller asks of its stream afterwards finds them, and what it asked before is not overtaken."""
    spec = dense()
    tensor = described(spec, 0, "keys")
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        with store.read(store.match([*IDS, 1])) as lease:
            into, seen = bench.empty((2, 40, 4), tensor), bench.empty((2, 40, 4), tensor)
            callers = bench.device.stream_of(None)
            callers.run(lambda: into.zero_())
            lease.layer(0).copy_to(keys=into)
            callers.run(lambda: seen.copy_(into))
            callers.mark().wait(Deadline.after(TEST_S), "the copy")
            assert bench.values(seen) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()


def test_a_copy_waits_for_what_the_caller_asked_before() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        with store.read(store.match([*IDS, 1])) as lease:
            into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
            callers = device.stream()
            callers.is_held = True
            callers.run(lambda: into.zero_())
            lease.layer(0).copy_to(keys=into, stream=callers)
            device.drain()
            callers.is_held = False
            device.drain()
            assert bench.values(into) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()


@pytest.mark.parametrize("is_resident", [False, True])
def test_a_lease_ends_after_its_copies_and_not_before(is_resident: bool) -> None:
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench, gpu_bytes=1 << 20) as store:
        lane = lane_of(store)
        shelf = lane.shelf
        assert shelf is not None
        with closing(shelf):
            with store.write(IDS) as writer:
                put_all(writer)
                writer.commit()
            if is_resident:
                keep(store, shelf)
            lease = store.read(store.match([*IDS, 1]))
            first = lease.path.key(0)
            into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
            device.is_held = True
            lease.layer(0).copy_to(keys=into)
            lease.release()
            lease.release()
            with pytest.raises(LeaseError, match="released"):
                lease.layer(0)
            # The bytes are read late: neither tier gives the slots away.
            assert store.pool.evict(first) == 0
            if is_resident:
                assert shelf.evict(first) == 0
            (found,) = store.devices.statistics()
            assert (found.waiting, found.overdue) == (1, 0)
            device.is_held = False
            lane.releases.wait(Deadline.after(TEST_S), "the release")
            device.drain()
            assert bench.values(into) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()
            if is_resident:
                assert shelf.evict(first) > 0
            assert store.pool.evict(first) > 0
            store.pool.check()
            shelf.check()


def test_a_dropped_lease_ends_after_its_copies_too() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        lease = store.read(store.match([*IDS, 1]))
        first = lease.path.key(0)
        into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
        device.is_held = True
        lease.layer(0).copy_to(keys=into)
        del lease
        gc.collect()
        assert store.pool.evict(first) == 0
        device.is_held = False
        lane_of(store).releases.wait(Deadline.after(TEST_S), "the release")
        assert store.pool.evict(first) > 0


def test_a_lease_that_is_dropped_lets_go_at_once() -> None:
    """Nothing in it refers to itself."""
    bench = Bench(open_device("cpu"))
    with opened(dense(), bench) as store:
        with store.write(IDS) as writer:
            put_from_device(bench, writer)
            writer.commit()
        lease = store.read(store.match([*IDS, 1]))
        first = lease.path.key(0)
        lease.layer(0).copy_to(keys=bench.empty((2, 40, 4), described(dense(), 0, "keys")))
        gc.disable()
        try:
            del lease, writer
            assert store.pool.evict(first) > 0
        finally:
            gc.enable()


def test_what_hangs_is_counted_as_overdue() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        lane_of(store).releases._deadline_s = 0.0
        device.is_held = True
        with store.read(store.match([*IDS, 1])) as lease:
            lease.layer(0).copy_to(keys=bench.empty((2, 40, 4), described(spec, 0, "keys")))
        (found,) = store.devices.statistics()
        assert (found.waiting, found.overdue) == (1, 1)
        assert store.metrics().devices == (found,)
        assert store.pool.evict(lease.path.key(0)) == 0, "an overdue copy still uses its records"
        device.is_held = False
        lane_of(store).releases.wait(Deadline.after(TEST_S), "the release")
        assert store.devices.statistics()[0].overdue == 0


def test_a_failed_device_lets_leases_end() -> None:
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        lease = store.read(store.match([*IDS, 1]))
        into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
        device.is_held = True
        lease.layer(0).copy_to(keys=into)
        device.failure = "the device fell off the bus"
        with pytest.raises(DeviceError, match="bus"):
            lease.layer(0).copy_to(keys=into)
        lease.release()
        lane_of(store).releases.wait(Deadline.after(TEST_S), "the release")
        assert store.pool.evict(lease.path.key(0)) > 0


def test_the_host_gathers_while_the_device_copies() -> None:
    """Overlap: several windows are with the device before the first is done, and reading goes on while it is busy."""
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench, buffer_bytes=256) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        with store.read(store.match([*IDS, 1])) as lease:
            asked: list[int] = []
            take = lane_of(store).reads.ring.take

            def taken(deadline: Deadline) -> Any:
                asked.append(device.waiting)
                return take(deadline)

            lane_of(store).reads.ring.take = taken  # type: ignore[method-assign]
            into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
            lease.layer(0).copy_to(keys=into)
            assert max(asked[:STAGING_BUFFERS]) > asked[0]
            device.drain()
            assert bench.values(into) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()


def test_puts_and_reads_beside_each_other(bench: Bench) -> None:
    """Threads that share one ring of few buffers."""
    with leaves_nothing(), opened(hybrid(), bench, buffer_bytes=300) as store:

        def work(seed: int) -> None:
            ids = [(seed * 31 + number) % 1000 for number in range(36)]
            with store.write(ids) as writer:
                put_from_device(bench, writer, step=20)
                writer.commit()
            with store.read(store.match([*ids, 1])) as lease:
                check_lease(lease, store.prompt(ids))

        running = [Background(lambda seed=seed: work(seed)) for seed in range(6)]  # type: ignore[misc]
        for each in running:
            each.result(TEST_S)
        store.pool.check()


def test_a_read_does_not_wait_behind_somebody_elses_put() -> None:
    """Its stream is not held up by kernels that compute what is put, nor are the buffers that it needs."""
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench, buffer_bytes=256, dram="16MiB") as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        computing, decoding = device.stream(), device.stream()
        other = store.write([number + 1 for number in IDS])
        keys = bench.empty((2, STAGING_BUFFERS * B // 2, 4), described(spec, 0, "keys"))
        computing.is_held = True
        computing.run(lambda: None)
        other.put(0, tokens=slice(0, keys.shape[1]), keys=keys, stream=computing)
        assert not other.transaction.is_sealed(0)
        with store.read(store.match([*IDS, 1])) as lease:
            into = bench.empty((2, 40, 4), described(spec, 0, "keys"))
            lease.layer(0).copy_to(keys=into, stream=decoding)
            decoding.mark().wait(Deadline.after(TEST_S), "the read")
            assert bench.values(into) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()
        computing.is_held = False
        other.abort("the test has seen enough")


def test_tensors_that_require_gradients_or_were_made_for_inference(bench: Bench) -> None:
    """Nothing is noted for gradients, which would keep a whole forward pass, and whatever tensor is filled in place."""
    spec = dense()
    shape = (40, 2, 4)
    with opened(spec, bench, gpu_bytes=1 << 20) as store:
        values = {
            (layer, name): bench.put(
                token_values(spec, store.prompt(IDS), layer, name, 0, 40), described(spec, layer, name)
            )
            for layer, names in tensors_of(spec, ReuseRule.ATTENTION)
            for name in names
        }
        for asked in values.values():
            asked.requires_grad_()
        with store.write(IDS) as writer:
            for layer, names in tensors_of(spec, ReuseRule.ATTENTION):
                writer.put(layer, tokens=slice(0, 40), **{name: values[layer, name] for name in names})
            writer.commit()
        with torch.inference_mode():
            inferred = bench.empty(shape, described(spec, 0, "keys")).transpose(0, 1)
        leaf = bench.empty(shape, described(spec, 0, "keys")).requires_grad_().transpose(0, 1)
        with store.read(store.match([*IDS, 1])) as lease:
            check_lease(lease, store.prompt(IDS))
            for into in (inferred, leaf):
                lease.layer(0).copy_to(keys=into)
        bench.finish()
        for into in (inferred, leaf):
            assert bench.values(into.detach()) == token_values(spec, store.prompt(IDS), 0, "keys", 0, 40).tobytes()


def test_a_stream_of_our_own_moves_bytes_without_gradients() -> None:
    """A staging buffer outlives the forward pass that filled it."""
    for stream in (open_device("cpu").stream(), (device := LaggingDevice()).stream()):
        computed = torch.ones(4, requires_grad=True) * 2
        buffer = torch.zeros(4)
        with torch.inference_mode():
            inferred = torch.zeros(4)
        stream.run(lambda buffer=buffer, computed=computed: buffer.copy_(computed))
        stream.run(lambda inferred=inferred, computed=computed: inferred.copy_(computed))
        device.drain() if isinstance(stream, LaggingStream) else None
        assert not buffer.requires_grad
        assert buffer.tolist() == inferred.tolist() == [2.0] * 4


def test_the_default_stream_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 0; to torch, an external stream of 0 is a new one, which waits for nothing."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: found.append(device) or "the default one")
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *given, **named: pytest.fail("another stream"))
    stream = CudaDevice(1).stream_of(0)
    assert stream._stream == "the default one"  # type: ignore[attr-defined]
    assert found == [torch.device("cuda", 1)]


def test_a_forked_child_has_no_devices() -> None:
    """Copies that are under way are the parent's, and so are the threads that wait for them."""
    device = LaggingDevice()
    bench = Bench(device)
    spec = dense()
    with opened(spec, bench) as store:
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit()
        device.is_held = True
        with store.read(store.match([*IDS, 1])) as lease:
            lease.layer(0).copy_to(keys=bench.empty((2, 40, 4), described(spec, 0, "keys")))
        way = weakref.ref(lane_of(store).reads)
        child = os.fork()
        if child == 0:
            store.close()
            gc.collect()
            os._exit(0 if way() is not None and store.is_closed and store.devices.statistics() == () else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert store.devices.statistics()[0].waiting == 1
        device.is_held = False
        lane_of(store).releases.wait(Deadline.after(TEST_S), "the release")


def test_marks_in_order() -> None:
    """The device of these tests does what it says: nothing before its turn."""
    device = LaggingDevice()
    first, second = device.stream(), device.stream()
    seen: list[str] = []
    first.run(lambda: seen.append("first"))
    mark = first.mark()
    second.wait(mark)
    second.run(lambda: seen.append("second"))
    first.run(lambda: seen.append("late"))
    assert seen == []
    last = second.mark()
    assert isinstance(last, LaggingMark)
    assert last.is_done()
    assert seen == ["first", "second"]
    device.is_held = True
    assert not first.mark().is_done()
    device.drain()
    assert seen == ["first", "second", "late"]


def test_the_benchmark_needs_a_device_and_runs_with_any(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        assert benchmark([]) == 2
        assert "finds no CUDA" in capsys.readouterr().err
    output = tmp_path / "rows.json"
    small = ["--rounds", "1", "--mebibytes", "1", "--blocks", "64", "--output", str(output)]
    assert benchmark(["--device", "cpu", *small]) == 0
    assert len(json.loads(output.read_text())["rows"]) == 5
