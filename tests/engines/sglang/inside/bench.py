"""Time of pages of SGLang's hierarchical cache in several storages, in turn: `bench.py PLAN RESULTS`.

The plan has `pages`, `rounds`, `layout` and `folder`. The result has `storages` (rows of page size, side, step, seconds
by the clock and of processor time, of each round) and `controller` (side, what, seconds of each round).
"""

import ctypes
import json
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path

import rig as rigs
import torch
from rig import PAGE_TOKENS, Rig
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey

from kvstore.adapters.sglang import KVStoreHiCache

BATCH_PAGES = 128
"""As many as SGLang's controller moves in one call."""
TOKENS = 64
"""Of a page."""
SHAPES = {"64 KiB": (2, 2, 64), "512 KiB": (8, 2, 128), "1 MiB": (8, 4, 128)}
"""Layers, heads and head dimension; bfloat16."""
STEPS = ("write", "write again", "ask", "read")
CONTROLLER_SHAPE = (16, 8, 64)
"""Pages of 16 tokens have 512 KiB."""


class Dictionary:
    """Bytes in a dict of this process, copied once each way: what any storage has to do at least."""

    def __init__(self, pool):
        self._pool = pool
        self._pages = {}

    def _pieces(self, slots, count):
        addresses, sizes = self._pool.get_page_buffer_meta(slots)
        each = len(addresses) // count
        pieces = list(zip(addresses, sizes, strict=True))
        return [pieces[first : first + each] for first in range(0, len(pieces), each)]

    def write(self, keys, slots):
        if any(key not in self._pages for key in keys):
            for key, pieces in zip(keys, self._pieces(slots, len(keys)), strict=True):
                self._pages[key] = [ctypes.string_at(address, size) for address, size in pieces]
        return True

    def ask(self, keys):
        return next((number for number, key in enumerate(keys) if key not in self._pages), len(keys))

    def read(self, keys, slots):
        for key, pieces in zip(keys, self._pieces(slots, len(keys)), strict=True):
            for (address, size), data in zip(pieces, self._pages[key], strict=True):
                ctypes.memmove(address, data, size)
        return True

    def clear(self):
        self._pages.clear()


class Tensors:
    """A backend behind the tensor interface: pages are copied together first, as SGLang's controller does."""

    def __init__(self, pool, backend):
        self._pool, self._backend = pool, backend
        self.ask, self.clear = backend.batch_exists, backend.clear

    def write(self, keys, slots):
        pages = [self._pool.get_data_page(slots[number * TOKENS]) for number in range(len(keys))]
        return self._backend.batch_set(keys, pages)

    def read(self, keys, slots):
        pages = self._backend.batch_get(keys, [self._pool.get_dummy_flat_data_page() for _ in keys])
        for number, page in enumerate(pages):
            if page is None:
                return False
            self._pool.set_from_flat_data_page(slots[number * TOKENS], page)
        return True


class InPlace:
    """A backend behind the zero-copy interface."""

    def __init__(self, backend):
        self._backend = backend
        self.ask = backend.batch_exists

    def write(self, keys, slots):
        return all(self._backend.batch_set_v1(keys, slots))

    def clear(self):
        return self._backend.clear()

    def read(self, keys, slots):
        return all(self._backend.batch_get_v1(keys, slots))


class Attached(InPlace):
    """The same, where another process owns the store; its processor time counts, too."""

    def __init__(self, backend, owner):
        super().__init__(backend)
        self._owner = owner

    def clear(self):
        self._owner.send("clear")
        if not self._owner.recv():
            raise RuntimeError("the owner could not clear the store")

    def owner_s(self):
        self._owner.send("time")
        return self._owner.recv()


def host_pool(layout, shape, pages):
    """SGLang's own pool for keys and values, in plain memory."""
    layers, heads, head_dim = shape
    device = MHATokenToKVPool(
        size=TOKENS * 2, page_size=TOKENS, dtype=torch.bfloat16, head_num=heads, head_dim=head_dim, layer_num=layers,
        device="cpu", enable_memory_saver=False,
    )  # fmt: skip
    pool = MHATokenToKVPoolHost(
        device.get_device_pool_infos()[0].buffer_info, 1.0, 0, TOKENS, layout, pin_memory=False, device="cpu",
        device_capacity_tokens=TOKENS * 2, start_layer=0, end_layer=layers, host_token_capacity=pages * TOKENS,
    )  # fmt: skip
    pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return pool


def storage_config(**extra):
    """SGLang's, for one rank."""
    return HiCacheStorageConfig(
        tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, attn_cp_rank=0, attn_cp_size=1, is_mla_model=False,
        enable_storage_metrics=False, is_page_first_layout=False, model_name="benchmark", extra_config=extra,
    )  # fmt: skip


def our_backend(pool, **settings):
    backend = KVStoreHiCache(storage_config(interface_v1=1, weights="random", call_deadline_s=60.0, **settings))
    backend.register_mem_pool_host(pool)
    backend.on_host_pools_registered()
    return backend


def own(layout, shape, socket, dram, connection):
    """In a process of its own: a backend that others attach to."""
    backend = our_backend(host_pool(layout, shape, 2), own_socket=socket, dram=dram)
    connection.send("ready")
    while (told := connection.recv()) != "end":
        connection.send(backend.clear() if told == "clear" else time.process_time())
    backend.close()


def attached(pool, layout, shape, folder, dram, ended):
    socket = os.path.join(folder, "socket")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=own, args=(layout, shape, socket, dram, there), daemon=True)
    process.start()
    ended.callback(process.join, 60)
    ended.callback(here.send, "end")
    if not here.poll(300):
        raise RuntimeError("the owner of the store did not start")
    here.recv()
    backend = our_backend(pool, socket=socket)
    ended.callback(backend.close)
    return Attached(backend, here)


def one_round(side, keys, batches, slots_of):
    """Seconds of each step, by the clock and of processor time."""
    took = {}
    owner_s = getattr(side, "owner_s", float)
    for step in STEPS:
        owner_began_s = owner_s()
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        for batch in range(batches):
            part = keys[batch * BATCH_PAGES : (batch + 1) * BATCH_PAGES]
            if step == "ask":
                done = side.ask(part) == len(part)
            elif step == "read":
                done = side.read(part, slots_of((batch + 1) % batches))
            else:
                done = side.write(part, slots_of(batch))
            if not done:
                raise RuntimeError(f"{type(side).__name__}: {step} failed")
        clock_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        took[step] = clock_s, cpu_s + owner_s() - owner_began_s
    side.clear()
    return took


def storages(size, plan):
    """All sides on pages of one size, in turn; the first round is not counted."""
    shape, layout = SHAPES[size], plan["layout"]
    layers, heads, head_dim = shape
    batches = plan["pages"] // BATCH_PAGES
    pages = batches * BATCH_PAGES
    dram = pages * 4 * layers * heads * head_dim * TOKENS * 2 + (64 << 20)
    pool = host_pool(layout, shape, pages)

    def slots_of(batch):
        return torch.arange(batch * BATCH_PAGES * TOKENS, (batch + 1) * BATCH_PAGES * TOKENS)

    with ExitStack() as ended:
        folder = ended.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-bench-"))  # a socket's path is short
        ours = our_backend(pool, dram=dram)
        ended.callback(ours.close)
        files = Path(plan["folder"]) / size.replace(" ", "")
        files.mkdir(parents=True)
        sides = {
            "kvstore, zero-copy": InPlace(ours),
            "kvstore, attached": attached(pool, layout, shape, folder, dram, ended),
            "file": Tensors(pool, HiCacheFile(storage_config(), file_path=str(files))),
            "dict": Dictionary(pool),
        }
        rows = {(side, step): {"clock_s": [], "cpu_s": []} for side in sides for step in STEPS}
        names = list(sides)
        for number in range(plan["rounds"] + 1):
            keys = [sha256(f"{number} {page}".encode()).hexdigest() for page in range(pages)]
            for name in names[number % len(names) :] + names[: number % len(names)]:
                took = one_round(sides[name], keys, batches, slots_of)
                for step, (clock_s, cpu_s) in took.items() if number else ():
                    rows[name, step]["clock_s"].append(clock_s)
                    rows[name, step]["cpu_s"].append(cpu_s)
        return [{"size": size, "side": side, "step": step, **each} for (side, step), each in rows.items()]


def controller(plan):
    """What a cold and a warm prompt wait for in SGLang's controller: an answer of no, or pages on the device."""
    pages = plan["controller_pages"]
    os.environ["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(Path(plan["folder"]) / "controller")
    backend = {
        "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache",
        "weights": "benchmark", "dram": "1GiB", "interface_v1": 1,
    }  # fmt: skip
    with ExitStack() as stack:
        sides = {
            "kvstore, zero-copy": stack.enter_context(Rig(plan["layout"], backend, shape=CONTROLLER_SHAPE)),
            "file": stack.enter_context(Rig(plan["layout"], {}, shape=CONTROLLER_SHAPE, backend="file")),
        }
        seconds = {(side, what): [] for side in sides for what in ("save", "cold", "warm")}
        for number in range(plan["rounds"] + 1):
            first = 10_000 * (number + 1)
            key, other = (RadixKey(list(range(begin, begin + pages * PAGE_TOKENS))) for begin in (first, first + 5_000))
            for name, one in sorted(sides.items(), reverse=bool(number % 2)):
                filled = one.fill(key, number)
                began_s = time.perf_counter()
                assert one.save(filled) == pages
                saved_s = time.perf_counter()
                assert one.find(other).storage_hit_count == 0
                cold_s = time.perf_counter()
                operation = one.find(key)
                found_s = time.perf_counter()
                came = one.fetch(operation)
                assert came.pages == pages
                assert came.bytes_of == filled.bytes_of
                loading_s = time.perf_counter()
                device = one.to_device(came)
                loaded_s = time.perf_counter()
                one.free(filled)
                one.free(came)
                one.allocator.free(device)
                if number:
                    seconds[name, "save"].append(saved_s - began_s)
                    seconds[name, "cold"].append(cold_s - saved_s)
                    seconds[name, "warm"].append(found_s - cold_s + came.seconds + loaded_s - loading_s)
    return [{"side": side, "what": what, "seconds": each} for (side, what), each in seconds.items()]


def main():
    plan = json.loads(Path(sys.argv[1]).read_text())
    rigs.prepare()
    found = {"storages": [row for size in SHAPES for row in storages(size, plan)], "controller": controller(plan)}
    Path(sys.argv[2]).write_text(json.dumps(found))
    os._exit(0)  # threads of SGLang's that wait for more work do not hold the process up


if __name__ == "__main__":
    main()
