"""What does a page of SGLang's hierarchical cache cost in each storage backend, in microseconds?

One host pool of SGLang's own, pages of one size, batches of 128 as its controller makes them. In turn, in one run:

- dict: the bytes in a dict of this process, copied once each way. What any backend has to do at least.
- file: SGLang's own file backend, through the tensor interface, as its controller calls it.
- kvstore: a store of this process, in place; with and without checking what is read against its checksums.
- kvstore attached: a store that another process owns.

Four steps: write new pages, write them again (they are there), ask for the prefix, read them into other slots.

    python -m benchmarks.sglang_backends [--pages N] [--rounds N] [--layout L] [--directory DIR] [--output FILE]

Needs SGLang, and runs without a GPU. It takes about eight times the pages' bytes in memory, and once on disk.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

BATCH_PAGES = 128
PAGE_TOKENS = 64
SHAPES = {"64 KiB": (2, 2, 64), "1 MiB": (8, 4, 128)}
"""Layers, heads and head dimension; bfloat16."""
STEPS = ("write", "write again", "ask", "read")


class Side(Protocol):
    """A backend, as SGLang's controller uses it."""

    def write(self, keys: list[str], slots: Any) -> bool: ...
    def ask(self, keys: list[str]) -> int: ...
    def read(self, keys: list[str], slots: Any) -> bool: ...


class Dictionary:
    """The least that has to be done."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._pages: dict[str, list[bytes]] = {}

    def _pieces(self, slots: Any, count: int) -> list[list[tuple[int, int]]]:
        addresses, sizes = self._pool.get_page_buffer_meta(slots)
        each = len(addresses) // count
        pieces = list(zip(addresses, sizes, strict=True))
        return [pieces[first : first + each] for first in range(0, len(pieces), each)]

    def write(self, keys: list[str], slots: Any) -> bool:
        missing = [number for number, key in enumerate(keys) if key not in self._pages]
        if missing:
            pieces = self._pieces(slots, len(keys))
            for number in missing:
                self._pages[keys[number]] = [ctypes.string_at(address, size) for address, size in pieces[number]]
        return True

    def ask(self, keys: list[str]) -> int:
        return next((number for number, key in enumerate(keys) if key not in self._pages), len(keys))

    def read(self, keys: list[str], slots: Any) -> bool:
        for key, pieces in zip(keys, self._pieces(slots, len(keys)), strict=True):
            for (address, size), data in zip(pieces, self._pages[key], strict=True):
                ctypes.memmove(address, data, size)
        return True


class Tensors:
    """A backend behind the tensor interface: pages are copied together first."""

    def __init__(self, pool: Any, backend: Any) -> None:
        self._pool, self._backend = pool, backend

    def write(self, keys: list[str], slots: Any) -> bool:
        pages = [self._pool.get_data_page(slots[number * PAGE_TOKENS]) for number in range(len(keys))]
        return bool(self._backend.batch_set(keys, pages))

    def ask(self, keys: list[str]) -> int:
        return int(self._backend.batch_exists(keys))

    def read(self, keys: list[str], slots: Any) -> bool:
        pages = self._backend.batch_get(keys, [self._pool.get_dummy_flat_data_page() for _ in keys])
        for number, page in enumerate(pages):
            if page is None:
                return False
            self._pool.set_from_flat_data_page(slots[number * PAGE_TOKENS], page)
        return True


class InPlace:
    """A backend behind the zero-copy interface."""

    def __init__(self, pool: Any, backend: Any) -> None:
        self._backend = backend

    def write(self, keys: list[str], slots: Any) -> bool:
        return all(self._backend.batch_set_v1(keys, slots))

    def ask(self, keys: list[str]) -> int:
        return int(self._backend.batch_exists(keys))

    def read(self, keys: list[str], slots: Any) -> bool:
        return all(self._backend.batch_get_v1(keys, slots))


def host_pool(layout: str, shape: tuple[int, int, int], pages: int) -> Any:
    """SGLang's own pool for keys and values, in plain memory."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    layers, heads, head_dim = shape
    device_pool = MHATokenToKVPool(
        size=PAGE_TOKENS * 2, page_size=PAGE_TOKENS, dtype=torch.bfloat16, head_num=heads, head_dim=head_dim,
        layer_num=layers, device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    pool = MHATokenToKVPoolHost(
        device_pool.get_device_pool_infos()[0].buffer_info, 1.0, 0, PAGE_TOKENS, layout, pin_memory=False,
        device="cpu", device_capacity_tokens=PAGE_TOKENS * 2, start_layer=0, end_layer=layers,
        host_token_capacity=pages * PAGE_TOKENS,
    )  # fmt: skip
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


def storage_config(**extra: Any) -> Any:
    """SGLang's, for one rank."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    return HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=False, model_name="benchmark", extra_config=extra,
    )  # fmt: skip


def our_backend(pool: Any, **settings: Any) -> Any:
    """Ours, with its store open."""
    from kvstore.adapters.sglang import KVStoreHiCache

    backend = KVStoreHiCache(storage_config(interface_v1=1, weights="random", **settings))
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


def own_a_store(layout: str, shape: tuple[int, int, int], socket: str, dram: int, connection: Connection) -> None:
    """In a process of its own: a backend that others attach to, until told to end."""
    backend = our_backend(host_pool(layout, shape, 2), own_socket=socket, dram=dram)
    connection.send("ready")
    connection.recv()
    backend.close()


def measure(
    side: Side, rounds: int, batches: int, pages_of: Callable[[int], Any], name: str
) -> dict[str, list[tuple[float, float]]]:
    """Microseconds a page of each step, one pair a round: by the clock, and of this process's processor time."""
    took: dict[str, list[tuple[float, float]]] = {step: [] for step in STEPS}
    for number in range(rounds):
        keys = [
            [sha256(f"{name} {number} {batch} {page}".encode()).hexdigest() for page in range(BATCH_PAGES)]
            for batch in range(batches)
        ]
        for step in STEPS:
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            for batch in range(batches):
                if step == "ask":
                    done = side.ask(keys[batch]) == BATCH_PAGES
                elif step == "read":
                    done = side.read(keys[batch], pages_of((batch + 1) % batches))
                else:
                    done = side.write(keys[batch], pages_of(batch))
                if not done:
                    raise RuntimeError(f"{name}: {step} failed")
            seconds = time.perf_counter() - began_s, time.process_time() - began_cpu_s
            took[step].append((seconds[0] / (batches * BATCH_PAGES) * 1e6, seconds[1] / (batches * BATCH_PAGES) * 1e6))
    return took


def run(
    shape_name: str, layout: str, pages: int, rounds: int, directory: str | None
) -> dict[str, dict[str, tuple[float, float]]]:
    """All sides on pages of one size: the median by the clock, and the least of processor time."""
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile

    shape = SHAPES[shape_name]
    layers, heads, head_dim = shape
    batches = pages // BATCH_PAGES
    held_bytes = pages * rounds * 2 * layers * heads * head_dim * PAGE_TOKENS * 2
    dram = held_bytes * 2 + (64 << 20)
    pool = host_pool(layout, shape, pages)

    def pages_of(batch: int) -> Any:
        return torch.arange(batch * BATCH_PAGES * PAGE_TOKENS, (batch + 1) * BATCH_PAGES * PAGE_TOKENS)

    figures: dict[str, dict[str, tuple[float, float]]] = {}
    with ExitStack() as last:
        folder = tempfile.mkdtemp(prefix="kvstore-bench-sglang-", dir=directory)
        last.callback(shutil.rmtree, folder, ignore_errors=True)

        def file() -> Side:
            return Tensors(pool, HiCacheFile(storage_config(), file_path=os.path.join(folder, "file")))

        def ours(**settings: Any) -> Side:
            backend = our_backend(pool, dram=dram, **settings)
            ended.callback(backend.close)
            return InPlace(pool, backend)

        def attached() -> Side:
            socket = os.path.join(folder, "socket")
            context = multiprocessing.get_context("spawn")
            here, there = context.Pipe()
            process = context.Process(target=own_a_store, args=(layout, shape, socket, dram, there), daemon=True)
            process.start()
            ended.callback(process.join, 60)
            ended.callback(here.send, "end")
            if not here.poll(300):
                raise RuntimeError("the owner of the store did not start")
            here.recv()
            backend = our_backend(pool, socket=socket)
            ended.callback(backend.close)
            return InPlace(pool, backend)

        sides: dict[str, Callable[[], Side]] = {
            "dict": lambda: Dictionary(pool),
            "file": file,
            "kvstore": ours,
            "kvstore, not verified": lambda: ours(verify=False),
            "kvstore attached": attached,
        }
        for name, make in sides.items():
            with ExitStack() as ended:
                took = measure(make(), rounds, batches, pages_of, name)
            figures[name] = {
                step: (statistics.median(clock for clock, _ in values), min(cpu for _, cpu in values))
                for step, values in took.items()
            }
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pages", type=int, default=512, help="of the pool; a multiple of 128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layout", default="page_first_direct")
    parser.add_argument("--directory", default=None, help="where SGLang's file backend writes")
    parser.add_argument("--output", default=None, help="a file for the figures, as JSON")
    options = parser.parse_args()
    results = {}
    for shape in SHAPES:
        figures = run(shape, options.layout, options.pages, options.rounds, options.directory)
        results[shape] = figures
        print(f"\npages of {shape}, {options.layout}: µs per page, median by the clock / least of processor time")
        print(f"{'':24s}" + "".join(f"{step:>20s}" for step in STEPS))
        for name, steps in figures.items():
            cells = (f"{clock:.1f} / {cpu:.1f}" for clock, cpu in (steps[step] for step in STEPS))
            print(f"{name:24s}" + "".join(f"{cell:>20s}" for cell in cells), flush=True)
    if options.output:
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"layout": options.layout, "us_per_page": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
