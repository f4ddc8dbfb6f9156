"""SGLang's unified radix cache with its hybrid controller over a storage backend, by the kit that its wheel carries."""

import json
import unittest
from array import array
from itertools import zip_longest
from typing import Any

import sglang.test.kits.unified_radix_cache.fixtures as fixtures
import torch
from comparing import differing_bytes
from rig import DIRECT
from sglang.kernels.ops.attention.fla.chunk_delta_h import CHUNK_SIZE
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle, MatchPrefixParams
from sglang.srt.mem_cache.pool_host.base import HostKVCache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components.base import ComponentType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.test.kits.unified_radix_cache.config import CacheConfig
from sglang.test.kits.unified_radix_cache.storage import UnifiedRadixCacheStorageFixtures

PAGE_TOKENS = 4
WINDOW_TOKENS = 8
FULL, WINDOW, MAMBA = ComponentType.FULL, ComponentType.SWA, ComponentType.MAMBA
MODELS = {
    "unified, full": CacheConfig(page_size=PAGE_TOKENS, components=(FULL,)),
    "unified, full + window": CacheConfig(
        page_size=PAGE_TOKENS, components=(FULL, WINDOW), sliding_window_size=WINDOW_TOKENS
    ),
    "unified, full + Mamba": CacheConfig(
        page_size=PAGE_TOKENS, components=(FULL, MAMBA), enable_mamba_extra_buffer=True, mamba_cache_size=60
    ),
}

Snapshot = dict[str, list[bytes]]
"""A prompt's cache on the device, by pool: `kv`, `swa` (the last window), `mamba`; the bytes of each tensor."""


def prepare() -> None:
    """What a server sets up before it makes a cache. Once a process."""
    # Host pools are pinned, which needs a GPU.
    original = HostKVCache.__init__
    if not torch.cuda.is_available():
        HostKVCache.__init__ = lambda self, *arguments, **options: original(
            self, *arguments, **{**options, "pin_memory": False}
        )
    # The kit takes the accelerator that it finds, and fails where there is none.
    fixtures.get_device = lambda *_arguments, **_options: "cpu"
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


class Server(UnifiedRadixCacheStorageFixtures, unittest.TestCase):
    """One server's cache. A context manager.

    Args:
        model: a key of `MODELS`.
        layout: of the host pools.
        extra: SGLang's `--hicache-storage-backend-extra-config`.
    """

    def __init__(self, model: str, layout: str, extra: dict[str, Any]) -> None:
        super().__init__("run")
        self.cfg = MODELS[model]
        self.cache, self.allocator, self.requests = fixtures.build_fixture(self.cfg)
        parallel = get_parallel().override(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1)
        parallel.__enter__()
        self.addCleanup(parallel.__exit__, None, None, None)
        arguments = ServerArgs(
            model_path="dummy", page_size=PAGE_TOKENS, hicache_mem_layout=layout,
            hicache_io_backend="direct" if layout in DIRECT else "kernel",
            hicache_write_policy="write_through", hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps({**extra, "prefetch_threshold": 1}),
            hicache_storage_prefetch_policy="wait_complete",
        )  # fmt: skip
        arguments._mamba_cache_chunk_size = max(CHUNK_SIZE, PAGE_TOKENS)
        set_global_server_args_for_scheduler(arguments)
        self.cache.init_hicache(arguments, self.cache.cache_init_params)
        fixtures.drop_hicache_atexit_pin(self.cache)
        self.cache.write_through_threshold = 1 << 30  # written when `save` says so
        self.cache.load_back_threshold = 0
        self.controller = self.cache.cache_controller
        self.controller.prefetch_capacity_limit = self.controller.mem_pool_host.size

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error: object) -> None:
        self.controller.detach_storage_backend()
        self.doCleanups()

    @property
    def backend(self) -> Any:
        return self.controller.storage_backend

    def insert(self, tokens: list[int], seed: int, **namespace: str) -> Snapshot:
        """Put a prompt with random contents into the device pools and the tree."""
        self._insert(self.cache, self.allocator, self.requests, tokens, **namespace)
        node = self._match(tokens, namespace).last_device_node
        numbers = torch.Generator().manual_seed(seed)
        for _, buffer, dimension, slots in self._tensors(node):
            part = buffer.index_select(dimension, slots)
            buffer.index_copy_(dimension, slots, torch.randn(part.shape, generator=numbers).to(part.dtype))
        return self.snapshot(node)

    def save(self, tokens: list[int], **namespace: str) -> None:
        """Write a prompt that is in the tree to the host pools, and from there to the storage."""
        node = self._match(tokens, namespace).last_device_node
        self._backup_node(self.cache, node)
        self._write_path_to_l3(self.cache, node)
        self._flush_l3_backups(self.cache, timeout=60.0)

    def restore(self, tokens: list[int], **namespace: str) -> tuple[int, Snapshot]:
        """Fetch a prompt that is not in the tree; how many tokens came, and what lies on the device then."""
        handle = CacheRequestHandle(rid=f"request {self._rid}", attempt_id=0)
        self._rid += 1
        self.cache.prefetch_from_storage(
            handle, self.cache.root_node_handle(), array("q", tokens), None, None, **namespace
        )
        self._run_prefetch_to_completion(self.cache, handle, timeout=60.0)
        match = self._match(tokens, namespace)
        if not match.host_hit_length:
            return 0, {}
        node = match.best_match_node if match.best_match_node is not None else match.last_host_node
        request = self._make_req(self.requests)
        self._apply_match_to_req(request, match)
        self._load_back_node(self.cache, node, req=request)
        return match.host_hit_length, self.snapshot(node)

    def snapshot(self, node: Any) -> Snapshot:
        """What is on the device of a prompt that ends at a node."""
        parts: Snapshot = {}
        for name, buffer, dimension, slots in self._tensors(node):
            part = buffer.index_select(dimension, slots).contiguous()
            parts.setdefault(name, []).append(part.view(torch.uint8).numpy().tobytes())
        return parts

    def _match(self, tokens: list[int], namespace: dict[str, str]) -> Any:
        return self.cache.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), **namespace)))

    def _tensors(self, node: Any) -> list[tuple[str, torch.Tensor, int, torch.Tensor]]:
        """Every tensor that holds something of a prompt: of which pool, and its slots along which dimension."""
        slots = self.cache.path_device_indices(node)
        pool = self.allocator.get_kvcache()
        found = [("kv", buffer, 0, slots) for buffer in _buffers(getattr(pool, "full_kv_pool", pool))]
        if self.cfg.has_swa:
            window = self.allocator.full_to_swa_index_mapping[slots[-WINDOW_TOKENS:]]
            found += [("swa", buffer, 0, window) for buffer in _buffers(pool.swa_kv_pool)]
        if self.cfg.has_mamba:
            state = fixtures.node_device_value(self.cache, node, MAMBA).reshape(-1).to(torch.int64)
            states = self.requests.mamba_pool.mamba_cache
            found += [("mamba", buffer, 1, state) for buffer in (states.temporal, *states.conv)]
        return found


def _buffers(pool: Any) -> list[torch.Tensor]:
    return [*pool.k_buffer, *pool.v_buffer]


def differing(expected: Snapshot, found: Snapshot) -> int:
    """Bytes that differ; a tensor that one of them lacks, or has shorter, counts with what is missing."""
    return sum(
        differing_bytes(*pair)
        for pool in expected.keys() | found.keys()
        for pair in zip_longest(expected.get(pool, []), found.get(pool, []), fillvalue=b"")
    )
