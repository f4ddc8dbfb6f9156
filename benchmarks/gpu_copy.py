"""How close to the device's own copies is moving a model's KV between tensors, device slabs and host memory?

Each row compares with one copy of the same number of bytes by torch, alternately in one run: within the device, or from
or to page-locked host memory, which is the limit of PCIe. Sources and destinations are whole layers
`[heads, tokens, dim]`.

- copy_to, resident: `Lease.layer(n).copy_to` out of the device slabs, against a copy within the device.
- copy_to, staged: the same where only the host has the records, against a copy to the device.
- put: `Writer.put` of device tensors, checksums, framing, commit and the eviction that makes room for the next round,
  against a copy to the host.
- keep: records from the arena into device slabs, against a copy to the device.
- load: records from device slabs into host memory, against a copy to the host.

    python -m benchmarks.gpu_copy [--device cuda] [--rounds N] [--mebibytes N] [--blocks TOKENS ...] [--output FILE]

It needs a GPU. With `--device cpu` it runs without one; its figures then say nothing of any.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from benchmarks.paired import Row, compare, report
from kvstore.clock import Deadline
from kvstore.errors import UnavailableError
from kvstore.placement.gpu.slab_shelf import SlabShelf
from kvstore.pool import Hold
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.tiers.gpu.device import Device

HEADS, HEAD_DIM = 8, 128
TENSORS = ("keys", "values")
CHUNK_TOKENS = 4096
WAIT_S = 60.0


def spec_of(block_tokens: int, layers: int) -> ModelSpec:
    """Dense attention with 8 heads of 128 numbers in bfloat16."""
    tensors = tuple(
        TensorSpec(name, DType.BFLOAT16, (Segment("heads", HEADS, 1),), (HEAD_DIM,), True) for name in TENSORS
    )
    group = CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(layers)), tensors)
    return ModelSpec("benchmark", "random", block_tokens, (group,))


class Workload:
    """A prompt's cache of about `total_bytes` on a device, and as much memory again for each limit."""

    def __init__(self, device: Device, block_tokens: int, total_bytes: int) -> None:
        import torch

        layer_bytes = len(TENSORS) * HEADS * HEAD_DIM * 2 * CHUNK_TOKENS
        self.device = device
        self.layers = max(1, total_bytes // layer_bytes)
        self.size_bytes = self.layers * layer_bytes
        self.spec = spec_of(block_tokens, self.layers)
        self.token_ids = np.arange(CHUNK_TOKENS)
        shape = (HEADS, CHUNK_TOKENS, HEAD_DIM)
        made = torch.Generator(device=device.name).manual_seed(1)
        self.sources: list[dict[str, Any]] = [
            {
                name: torch.randn(shape, generator=made, device=device.name, dtype=torch.float32).to(torch.bfloat16)
                for name in TENSORS
            }
            for _ in range(self.layers)
        ]
        self.targets = [{name: torch.empty_like(tensor) for name, tensor in each.items()} for each in self.sources]
        self._first, self._second = device.empty(self.size_bytes), device.empty(self.size_bytes)
        self._host = device.staging(self.size_bytes)
        self._host.fill_(1)

    def finish(self) -> None:
        """Wait for everything that the current stream was asked."""
        self.device.stream_of(None).mark().wait(Deadline.after(WAIT_S), "the device")

    def within_device(self) -> None:
        self._first.copy_(self._second)
        self.finish()

    def to_device(self) -> None:
        self._first.copy_(self._host, non_blocking=True)
        self.finish()

    def to_host(self) -> None:
        self._host.copy_(self._first, non_blocking=True)
        self.finish()


def measure(device: Device, block_tokens: int, total_bytes: int, rounds: int) -> list[Row]:
    """All rows for one size of blocks."""
    work = Workload(device, block_tokens, total_bytes)
    rows: list[Row] = []

    def row(case: str, run: Callable[[], object], limit: str, baseline: Callable[[], object]) -> None:
        named = f"{case}, blocks of {block_tokens} tokens"
        rows.append(compare(named, work.size_bytes / 1e9, "GB/s", run, limit, baseline, rounds=rounds))

    capacity = work.size_bytes + work.size_bytes // 4 + (64 << 20)
    with kvstore.open(work.spec, dram=capacity) as store:
        memory = store.pool._tier.memory  # type: ignore[attr-defined]
        with closing(SlabShelf(work.spec, device, capacity, arena_memory=memory)) as shelf:
            store.devices.add(device, shelf)
            if device.needs_pinning and shelf.statistics().trouble:
                print(shelf.statistics().trouble)
            path = store.prompt(work.token_ids).path

            def write() -> None:
                with store.write(work.token_ids) as writer:
                    for layer, tensors in enumerate(work.sources):
                        writer.put(layer, tokens=slice(0, CHUNK_TOKENS), **tensors)
                    writer.commit()

            def write_anew() -> None:
                store.pool.evict(path.keys[0])
                write()

            def read() -> None:
                with store.read(store.match(np.append(work.token_ids, 0))) as lease:
                    for layer, tensors in enumerate(work.targets):
                        lease.layer(layer).copy_to(**tensors)
                work.finish()
                # The records are let go a moment after the copies have ended.
                store.devices.wait(Deadline.after(WAIT_S))

            row("put", write_anew, "copy to the host", work.to_host)
            row("copy_to, staged", read, "copy to the device", work.to_device)
            hold = store.pool.hold(path)
            assert isinstance(hold, Hold)

            def keep() -> None:
                shelf.evict(path.keys[0])
                shelf.keep(hold.path, hold.salt, hold.placed).result(WAIT_S)

            row("keep", keep, "copy to the device", work.to_device)
            row("copy_to, resident", read, "copy within the device", work.within_device)
            resident = shelf.hold(path, shard=WHOLE)
            assert resident is not None, "the records are not on the device"
            numbers = np.arange(len(resident.rows))

            def load() -> None:
                # Into the very records that they are a copy of: the bytes do not change.
                resident.load(numbers, hold.placed.addresses).wait(len(numbers), Deadline.after(WAIT_S))

            row("load", load, "copy to the host", work.to_host)
            for found, expected in zip(work.targets, work.sources, strict=True):
                if not all(bool((found[name] == expected[name]).all()) for name in TENSORS):
                    raise AssertionError("what was read is not what was written")
            resident.release()
            hold.release()
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; or cpu, to see that it runs")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mebibytes", type=int, default=1024, help="working set of each side")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 64, 256], help="tokens")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gpu_copy.json"))
    arguments = parser.parse_args(given)
    try:
        device = open_device(arguments.device)
    except UnavailableError as error:
        print(f"gpu_copy: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for block_tokens in arguments.blocks:
        rows += measure(device, block_tokens, arguments.mebibytes << 20, arguments.rounds)
    report(f"Records to and from {device.name}, against copies of the same bytes", rows, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
