"""How close to the device's own copies is moving a prompt between an engine's pages and records?

Each row compares with one copy of the same number of bytes by torch, alternately in one run. Pages are
`[2, pages, tokens, heads, dim]` in random order, of another size than blocks.

- gather, scatter: between pages and packed records on the device, against a copy within the device.
- put_pages: `Writer.put_pages`, checksums, framing, commit and the eviction that makes room for the next round, against
  a copy to the host.
- copy_to_pages: `Lease.copy_to_pages`, against a copy to the device.
- load: records out of a `PageShelf` into host memory, with their checksums, against a copy to the host.

    python -m benchmarks.gpu_pages [--device cuda] [--gather triton] [--rounds N] [--mebibytes N] [--pages TOKENS ...]
                                   [--output FILE]

It needs a GPU. With `--device cpu` it runs without one; its figures then say nothing of any.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvstore
from benchmarks.paired import Row, compare, report
from kvstore.clock import Deadline
from kvstore.errors import UnavailableError
from kvstore.placement.gpu.page_shelf import PageShelf
from kvstore.pool import Hold
from kvstore.record import record_layout
from kvstore.spec import WHOLE, CacheGroup, DType, ModelSpec, ReuseRule, Segment, TensorSpec
from kvstore.tiers.gpu.packing import PagePlaces, packings_of_records
from kvstore.tiers.gpu.pages import PagedTensor, Pages
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.tiers.gpu.device import Device

HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 128, 64
TENSORS = ("keys", "values")
PROMPT_TOKENS = 4096
WAIT_S = 60.0


def spec_of(layers: int) -> ModelSpec:
    """Dense attention with 8 heads of 128 numbers in bfloat16."""
    tensors = tuple(
        TensorSpec(name, DType.BFLOAT16, (Segment("heads", HEADS, 1),), (HEAD_DIM,), True) for name in TENSORS
    )
    return ModelSpec(
        "benchmark",
        "random",
        BLOCK_TOKENS,
        (CacheGroup("attention", ReuseRule.ATTENTION, tuple(range(layers)), tensors),),
    )


class Engine:
    """Pages of a prompt of about `total_bytes`, and as much memory again for each limit."""

    def __init__(self, device: Device, page_tokens: int, total_bytes: int, gather: str | None) -> None:
        import torch

        layer_bytes = len(TENSORS) * HEADS * HEAD_DIM * 2 * PROMPT_TOKENS
        self.device = device
        layers = max(1, total_bytes // layer_bytes)
        self.size_bytes = layers * layer_bytes
        self.spec = spec_of(layers)
        count = -(-PROMPT_TOKENS // page_tokens)
        shape = (len(TENSORS), 2 * count, page_tokens, HEADS, HEAD_DIM)
        self.layers = [
            torch.randint(-30000, 30000, shape, device=device.name, dtype=torch.int16).view(torch.bfloat16)
            for _ in range(layers)
        ]
        tensors = {
            (layer, name): PagedTensor(both[number], "page token row inner")
            for layer, both in enumerate(self.layers)
            for number, name in enumerate(TENSORS)
        }
        self.pages = Pages(self.spec, tensors, gather=gather)
        order = np.random.default_rng(1).permutation(2 * count)
        self.ids, self.other_ids = order[:count], order[count:]
        self._first, self._second = device.empty(self.size_bytes), device.empty(self.size_bytes)
        self._host = device.staging(self.size_bytes)
        self._host.fill_(1)

    def finish(self) -> None:
        """Wait for everything that the current stream was asked."""
        self.device.stream_of(None).mark().wait(Deadline.after(WAIT_S), "the device")

    def copy(self, to: str) -> None:
        target, source = {
            "device": (self._first, self._second),
            "host": (self._host, self._first),
            "from host": (self._first, self._host),
        }[to]
        target.copy_(source, non_blocking=True)
        self.finish()


def measure(device: Device, page_tokens: int, total_bytes: int, rounds: int, gather: str | None) -> list[Row]:
    """All rows for one size of pages."""
    import torch

    work = Engine(device, page_tokens, total_bytes, gather)
    pages, rows = work.pages, []

    def row(case: str, run: Callable[[], object], limit: str, to: str) -> None:
        named = f"{case} ({pages.gather_name}), pages of {page_tokens} tokens"
        rows.append(compare(named, work.size_bytes / 1e9, "GB/s", run, limit, partial(work.copy, to), rounds=rounds))

    blocks = PROMPT_TOKENS // BLOCK_TOKENS
    layouts = [record_layout(work.spec, 0, span.index, work.spec.groups[0].all_units) for span in work.spec.spans[0]]
    packings = [packings_of_records(layout, pages.shard, blocks) for layout in layouts]
    packed = device.empty(max(blocks * each[0].image_bytes for each in packings))

    def on_device(move: Callable[..., None], ids: Any) -> None:
        places = PagePlaces.of_tokens(ids, page_tokens, 0, PROMPT_TOKENS)
        for each in packings:
            move(0, each, places, packed)
        work.finish()

    row("gather", partial(on_device, pages.pack, work.ids), "copy within the device", "device")
    row("scatter", partial(on_device, pages.unpack, work.other_ids), "copy within the device", "device")
    token_ids = np.arange(PROMPT_TOKENS)
    with kvstore.open(work.spec, dram=work.size_bytes + work.size_bytes // 4 + (64 << 20)) as store:
        path = store.prompt(token_ids).path

        def put() -> None:
            store.pool.evict(path.keys[0])
            with store.write(token_ids) as writer:
                writer.put_pages(pages, work.ids, tokens=slice(0, PROMPT_TOKENS))
                writer.commit()

        def read() -> None:
            with store.read(store.match(np.append(token_ids, 0))) as lease:
                lease.copy_to_pages(pages, work.other_ids)
            work.finish()

        row("put_pages", put, "copy to the host", "host")
        row("copy_to_pages", read, "copy to the device", "from host")
        for both in work.layers:
            words = both.view(torch.int16)
            if not torch.equal(words[:, work.ids], words[:, work.other_ids]):
                raise AssertionError("what was read is not what was written")
        hold = store.pool.hold(path)
        assert isinstance(hold, Hold)
        with closing(PageShelf(pages)) as shelf:
            shelf.note(store.prompt(token_ids), work.ids)
            found = shelf.hold(path, shard=WHOLE)
            assert found is not None, "the pages were not noted"
            numbers = np.arange(len(found.rows))

            def load() -> None:
                # Into the very records that were written from the same pages: the bytes do not change.
                found.load(numbers, hold.placed.addresses).wait(len(numbers), Deadline.after(WAIT_S))

            row("load", load, "copy to the host", "host")
            found.release()
        hold.release()
    return rows


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; or cpu, to see that it runs")
    parser.add_argument("--gather", choices=["triton", "native", "index"], help="the fastest for the device by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mebibytes", type=int, default=1024, help="working set of each side")
    parser.add_argument("--pages", type=int, nargs="+", default=[16, 64, 256], help="tokens")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/gpu_pages.json"))
    arguments = parser.parse_args(given)
    try:
        device = open_device(arguments.device)
        rows: list[Row] = []
        for page_tokens in arguments.pages:
            rows += measure(device, page_tokens, arguments.mebibytes << 20, arguments.rounds, arguments.gather)
    except UnavailableError as error:
        print(f"gpu_pages: {error}", file=sys.stderr)
        return 2
    report(f"Pages to and from records on {device.name}, against copies of the same bytes", rows, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
