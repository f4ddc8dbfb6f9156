"""A device pool, a host pool and SGLang's own controller over a storage backend, as one server's rank has them."""

import queue
import threading
import time
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from comparing import differing_bytes
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.runtime_context import get_context, get_parallel

PAGE_TOKENS = 16
SLOTS = 64 * PAGE_TOKENS
WAIT_S = 60.0
DIRECT = ("layer_first", "page_first_direct")
"""Layouts that SGLang copies between device and host in its way `direct`, the others in its way `kernel`."""


def prepare() -> None:
    """What a server sets up before it makes a controller. Once a process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    get_context().override_server_args().install()


@dataclass
class Pages:
    """Pages in a rig's host pool.

    Attributes:
        hashes: SGLang's keys of them.
        slots: where they lie in the host pool.
        device: where they came from.
        bytes_of: of each page, flat.
    """

    key: RadixKey
    hashes: list[str]
    slots: torch.Tensor
    device: torch.Tensor
    bytes_of: list[bytes]


@dataclass
class Fetched:
    """What a prefetch brought.

    Attributes:
        hit_pages: that the storage said it had.
        pages: of these, those that came.
        bytes_of: what lies in the host pool in the place of each hit page.
        slots: their places.
        seconds: that the controller took to read them.
    """

    hit_pages: int
    pages: int
    bytes_of: list[bytes]
    slots: torch.Tensor
    seconds: float = 0.0


class Rig:
    """One rank's pools and controller. A context manager.

    Args:
        layout: of the host pool.
        extra: SGLang's `--hicache-storage-backend-extra-config`.
        tp: tensor-parallel rank and size.
        shape: layers, heads, and elements of a head.
        backend: SGLang's `--hicache-storage-backend`.
    """

    def __init__(
        self,
        layout: str,
        extra: dict[str, Any],
        *,
        tp: tuple[int, int] = (0, 1),
        shape: tuple[int, int, int] = (3, 2, 8),
        backend: str = "dynamic",
    ) -> None:
        layers, heads, head_dim = shape
        self.layout = layout
        self.device = MHATokenToKVPool(
            size=SLOTS, page_size=PAGE_TOKENS, dtype=torch.bfloat16, head_num=heads, head_dim=head_dim,
            layer_num=layers, device="cpu", enable_memory_saver=False,
        )  # fmt: skip
        self.allocator = TokenToKVPoolAllocator(
            size=SLOTS, dtype=torch.bfloat16, device="cpu", kvcache=self.device, need_sort=False
        )
        self.host = MHATokenToKVPoolHost(
            self.device.get_device_pool_infos()[0].buffer_info, 2.0, 0, PAGE_TOKENS, layout, pin_memory=False,
            device="cpu", device_capacity_tokens=self.device.size, start_layer=0, end_layer=layers,
        )  # fmt: skip
        self.host.kv_buffer.zero_()
        with get_parallel().override(
            tp_rank=tp[0],
            tp_size=tp[1],
            attn_tp_rank=tp[0],
            attn_tp_size=tp[1],
            moe_tp_rank=tp[0],
            moe_tp_size=tp[1],
            pp_rank=0,
            pp_size=1,
            attn_dcp_size=1,
            attn_dcp_rank=0,
        ):
            self.controller = HiCacheController(
                self.allocator, self.host, PAGE_TOKENS, torch.distributed.group.WORLD, threading.Event(),
                write_policy="write_through", io_backend="direct" if layout in DIRECT else "kernel",
                storage_backend=backend,
                prefetch_threshold=PAGE_TOKENS, model_name="tiny/controller", storage_backend_extra_config=dict(extra),
            )  # fmt: skip
        self._requests = 0

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_error: object) -> None:
        self.controller.detach_storage_backend()

    @property
    def backend(self) -> Any:
        return self.controller.storage_backend

    def fill(self, key: RadixKey, seed: int) -> Pages:
        """Random KV for the tokens of a key, in the device pool, and from there in the host pool."""
        numbers = torch.Generator().manual_seed(seed)
        device = self.allocator.alloc(len(key))
        for buffers in (self.device.k_buffer, self.device.v_buffer):
            for buffer in buffers:
                buffer[device] = torch.randn(buffer[device].shape, generator=numbers).to(buffer.dtype)
        slots = self.controller.write(device)
        self.controller.ack_write_queue.pop().finish_event.synchronize()
        return Pages(key, get_storage_hash_str(key, None, page_size=PAGE_TOKENS), slots, device, self.pages_at(slots))

    def save(self, pages: Pages) -> int:
        """Let the controller write pages to its storage; how many it says are there."""
        self.controller.write_storage(pages.slots, pages.key, pages.hashes)
        return self._next(self.controller.ack_backup_queue).completed_tokens // PAGE_TOKENS

    def find(self, key: RadixKey) -> Any:
        """Let the controller ask its storage for a prefix; the operation, to be fetched."""
        self._requests += 1
        self.controller.prefetch(f"request {self._requests}", key)
        return self._next(self.controller.prefetch_hit_queue)

    def fetch(self, operation: Any) -> Fetched:
        """Let the controller read what was found, into fresh slots."""
        hit_pages = operation.storage_hit_count // PAGE_TOKENS
        if not hit_pages:
            return Fetched(0, 0, [], torch.empty(0, dtype=torch.int64))
        operation.host_indices = self.controller.alloc_prefetch_host_buffers(operation, operation.storage_hit_count)
        for first in range(0, len(operation.host_indices), PAGE_TOKENS):  # nothing of an earlier owner is there
            slot = int(operation.host_indices[first])
            self.host.set_from_flat_data_page(slot, torch.zeros_like(self.host.get_dummy_flat_data_page()))
        pages, began = 0, time.perf_counter()
        self.controller.prefetch_buffer.put(operation)
        while True:
            ack = self._next(self.controller.ack_prefetch_queue)
            if ack.completed_req:
                break
            pages = ack.completed_tokens // PAGE_TOKENS
        seconds = time.perf_counter() - began
        return Fetched(hit_pages, pages, self.pages_at(operation.host_indices), operation.host_indices, seconds)

    def read(self, key: RadixKey) -> Fetched:
        return self.fetch(self.find(key))

    def to_device(self, fetched: Fetched) -> torch.Tensor:
        """Load fetched pages into the device pool, by SGLang's own way; where they are then."""
        slots = fetched.slots[: fetched.pages * PAGE_TOKENS]
        device = self.controller.load(slots)
        self.controller.start_loading()
        self.controller.ack_load_queue.pop().finish_event.synchronize()
        return device

    def pages_at(self, slots: torch.Tensor) -> list[bytes]:
        firsts = range(0, len(slots), PAGE_TOKENS)
        pages = (self.host.get_data_page(int(slots[first])) for first in firsts)
        return [page.contiguous().view(torch.uint8).numpy().tobytes() for page in pages]

    def device_bytes(self, slots: torch.Tensor) -> bytes:
        buffers = (*self.device.k_buffer, *self.device.v_buffer)
        return b"".join(buffer[slots].contiguous().view(torch.uint8).numpy().tobytes() for buffer in buffers)

    def free(self, pages: Pages | Fetched) -> None:
        """Give slots back, so that the pools last for all cases."""
        if len(pages.slots):
            self.host.free(pages.slots)
        if isinstance(pages, Pages):
            self.allocator.free(pages.device)

    def _next(self, waiting: queue.Queue) -> Any:
        return waiting.get(timeout=WAIT_S)


def differing(expected: list[bytes], found: list[bytes]) -> int:
    """Bytes that differ, page by page; a page that one of them lacks counts whole."""
    return sum(differing_bytes(*pair) for pair in zip_longest(expected, found, fillvalue=b""))
