"""Copies between a device pool and a host pool where both are memory of the CPU.

SGLang has them as GPU kernels only. These do the same with indexing, for the layouts of its "direct" way, whose pools
look them up in their own modules: `Finder` puts them there when such a module is imported, in whichever process.
"""

import sys
from importlib.machinery import PathFinder

POOLS = ("sglang.srt.mem_cache.pool_host.mamba", "sglang.srt.mem_cache.pool_host.mha")


def transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size):
    """Between tensors of one layer each: `[slot, ...]` on both sides."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def transfer_kv_all_layer_direct_lf_pf(src_ptrs, dst_ptrs, src_indices, dst_indices, page_size):
    """From tensors of one layer each to `[page, layer, slot in the page, ...]`, of all layers."""
    layers = len(src_ptrs) // len(dst_ptrs)
    pages = dst_indices[::page_size] // page_size
    for part, target in enumerate(dst_ptrs):
        for layer in range(layers):
            target[pages, layer] = src_ptrs[part * layers + layer][src_indices].reshape(target[pages, layer].shape)


def transfer_kv_per_layer_direct_pf_lf(src_ptrs, dst_ptrs, src_indices, dst_indices, layer_id, page_size):
    """From `[page, layer, slot in the page, ...]` to tensors of one layer each, of one layer."""
    pages = src_indices[::page_size] // page_size
    for source, target in zip(src_ptrs, dst_ptrs, strict=True):
        target[dst_indices] = source[pages, layer_id].reshape(target[dst_indices].shape)


COPIES = (transfer_kv_direct, transfer_kv_all_layer_direct_lf_pf, transfer_kv_per_layer_direct_pf_lf)


class Finder:
    """Finds SGLang's modules of host pools, and adds the copies that they lack."""

    def find_spec(self, name, path, target=None):
        if name not in POOLS:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for copy in COPIES:
                if not hasattr(module, copy.__name__):
                    setattr(module, copy.__name__, copy)

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    sys.meta_path.insert(0, Finder())
