"""Runs of bytes between the memory of a device tier, host memory and one tensor of the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.tiers.gpu.staging import copy_bytes, mark_of
from kvstore.tiers.gpu.torch_device import upload

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvstore.clock import Deadline
    from kvstore.tiers.gpu.device import Stream
    from kvstore.tiers.gpu.staging import StagingRing


@dataclass(frozen=True)
class ByteRuns:
    """What a tensor is put together from, in the order of its own bytes; every byte of it occurs once. Shapes [n].

    Attributes:
        begins: where each run goes, from the tensor's first byte as if it were contiguous.
        sources: where it comes from: an address, or an offset in the memory of a device tier.
        sizes: bytes.
    """

    begins: npt.NDArray[np.int64]
    sources: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of_plan(cls, plan: npt.NDArray[np.uint64]) -> ByteRuns:
        """Of a copy plan whose destination is contiguous and begins at 0, and whose sources are contiguous."""
        table = plan.view(np.int64)
        sizes = table[:, 2] * table[:, 3]
        kept = np.flatnonzero(sizes)
        order = kept[np.argsort(table[kept, 0], kind="stable")]
        return cls(table[order, 0], table[order, 1], sizes[order])

    @property
    def size_bytes(self) -> int:
        return int(self.sizes.sum())

    def windows(self, window_bytes: int) -> Iterator[ByteRuns]:
        """Parts of at most so many bytes; runs are cut where they cross."""
        ends = np.cumsum(self.sizes)
        total = int(ends[-1]) if len(ends) else 0
        for begin in range(0, total, window_bytes):
            stop = min(begin + window_bytes, total)
            first = int(np.searchsorted(ends, begin, side="right"))
            last = int(np.searchsorted(ends, stop, side="left"))
            part = slice(first, last + 1)
            skipped = np.maximum(0, begin - self.begins[part])
            taken = np.minimum(ends[part], stop) - np.maximum(self.begins[part], begin)
            yield ByteRuns(self.begins[part] + skipped, self.sources[part] + skipped, taken)

    def even_runs(self) -> Iterator[ByteRuns]:
        """Parts in which all runs have one size."""
        changes = np.flatnonzero(np.diff(self.sizes)) + 1
        bounds = [0, *changes.tolist(), len(self.sizes)]
        for first, stop in pairwise(bounds):
            if stop > first:
                yield ByteRuns(self.begins[first:stop], self.sources[first:stop], self.sizes[first:stop])


def flat_bytes(tensor: Any) -> Any:
    """A contiguous tensor as its bytes."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)


def gather_resident(memory: Any, runs: ByteRuns, tensor: Any, stream: Stream) -> None:
    """Put a tensor together from the memory of a device tier, behind what `stream` was asked before. Does not wait.

    Args:
        memory: of the tier, a uint8 tensor; it must stay as it is until the stream is done.
        tensor: of the same device.
    """

    def work() -> None:
        import torch

        contiguous = (
            tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        )
        target = flat_bytes(contiguous)
        for part in runs.even_runs():
            _gather_even(memory, part, target)
        if contiguous is not tensor:
            tensor.copy_(contiguous)

    stream.uses(memory)  # also if the tier is closed meanwhile
    stream.run(work)


def _gather_even(memory: Any, runs: ByteRuns, target: Any) -> None:
    """Runs of one size that follow one another in the target: one kernel."""
    import torch

    size, count = int(runs.sizes[0]), len(runs.sizes)
    begin = int(runs.begins[0])
    part = target[begin : begin + size * count]
    base = int(runs.sources.min())
    if count == 1:
        part.copy_(memory[base : base + size])
        return
    # The widest elements that everything is a multiple of.
    common = gcd(size, base, begin + target.storage_offset(), memory.storage_offset(), 8)
    steps = runs.sources - base
    step = gcd(*np.unique(steps).tolist()) or size
    width = gcd(common, step)
    dtype = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[width]
    # Rows may overlap, since a row is longer than the distance between two of them; they are only read.
    last = int(steps.max())
    source = (
        memory[base : base + last + size].view(dtype).as_strided((last // step + 1, size // width), (step // width, 1))
    )
    index = upload(steps // step, memory.device)
    torch.index_select(source, 0, index, out=part.view(dtype).view(count, size // width))


def stage_in(ring: StagingRing, runs: ByteRuns, tensor: Any, stream: Stream, deadline: Deadline) -> None:
    """Put a tensor of a device together from host memory, through the ring: the host gathers while the device copies.

    When this returns, the host memory has been read; the device is done when the stream is.

    Raises:
        DeadlineError: no staging buffer became free. DeviceError: the device failed.
    """
    made: list[Any] = []

    def begin() -> None:
        import torch

        is_flat = tensor.is_contiguous()
        made.append(tensor if is_flat else torch.empty_like(tensor, memory_format=torch.contiguous_format))

    stream.run(begin)
    for part in runs.windows(ring.buffer_bytes):
        buffer = ring.take(deadline)
        try:
            first, size = int(part.begins[0]), part.size_bytes
            copy_bytes(part.begins - first + buffer.address, part.sources, part.sizes)

            def copy(first: int = first, size: int = size, staged: Any = buffer.tensor) -> None:
                flat_bytes(made[0])[first : first + size].copy_(staged[:size], non_blocking=True)

            stream.run(copy)
        finally:
            ring.give(buffer, mark_of(stream))

    def end() -> None:
        if made[0] is not tensor:
            tensor.copy_(made[0])
        made.clear()

    stream.run(end)
