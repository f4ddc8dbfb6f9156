"""Copies between a device pool and a host pool where both are memory of the CPU.

SGLang has them as GPU kernels only. These do the same with indexing, for the layouts of its "direct" way and for those
of its "kernel" way. Pools look them up in their own modules: `Finder` puts them there when such a module is imported,
in whichever process.
"""

import ctypes
import sys
from importlib.machinery import PathFinder

import torch

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


def transfer_kv_per_layer_pf_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim
):
    """From `[slot, layer, ...]` to tensors of one layer, of one layer."""
    for source, target in ((src_k, dst_k), (src_v, dst_v)):
        target[dst_indices] = source[src_indices, layer_id]


def transfer_kv_all_layer_lf_pf(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers
):
    """From tensors of one layer each, had by their addresses, to `[slot, layer, ...]`, of all layers."""
    for addresses, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer in range(num_layers):
            target[dst_indices, layer] = _rows(addresses[layer], src_indices, item_size, target[dst_indices, layer])


def transfer_kv_per_layer_ph_lf(
    src_k, dst_k, src_v, dst_v, src_indices, dst_indices, layer_id, item_size, src_layout_dim, page_size, head_num
):
    """From `[page, head, slot in the page, layer, ...]` to tensors of one layer, of one layer."""
    for source, target in ((src_k, dst_k), (src_v, dst_v)):
        target[dst_indices] = source[src_indices // page_size, :, src_indices % page_size, layer_id]


def transfer_kv_all_layer_lf_ph(
    src_k_layers, dst_k, src_v_layers, dst_v, src_indices, dst_indices, item_size, dst_layout_dim, num_layers,
    page_size, head_num,
):  # fmt: skip
    """From tensors of one layer each, had by their addresses, to `[page, head, slot in the page, layer, ...]`."""
    pages, slots = dst_indices // page_size, dst_indices % page_size
    for addresses, target in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer in range(num_layers):
            place = pages, slice(None), slots, layer
            target[place] = _rows(addresses[layer], src_indices, item_size, target[place])


def transfer_kv_mamba_pf_lf(src, dst, src_indices, dst_indices, layer_id, item_size, src_layout_dim):
    """States from `[slot, layer, ...]` to a tensor of one layer."""
    dst[dst_indices] = src[src_indices, layer_id].reshape(dst[dst_indices].shape)


def transfer_kv_mamba_lf_pf(src_ptrs, dst, src_indices, dst_indices, item_size, dst_layout_dim, num_layers):
    """States from tensors of one layer each, had by their addresses, to `[slot, layer, ...]`."""
    for layer in range(num_layers):
        dst[dst_indices, layer] = _rows(src_ptrs[layer], src_indices, item_size, dst[dst_indices, layer])


def _rows(address, indices, item_size, like):
    """Rows of a tensor at an address, in the type and shape of what they go to."""
    count = int(indices.max()) + 1
    memory = (ctypes.c_uint8 * (count * item_size)).from_address(int(address))
    rows = torch.frombuffer(memory, dtype=torch.uint8).view(count, item_size)
    return rows[indices].view(like.dtype).reshape(like.shape)


COPIES = (
    transfer_kv_direct, transfer_kv_all_layer_direct_lf_pf, transfer_kv_per_layer_direct_pf_lf,
    transfer_kv_per_layer_pf_lf, transfer_kv_all_layer_lf_pf, transfer_kv_per_layer_ph_lf, transfer_kv_all_layer_lf_ph,
    transfer_kv_mamba_pf_lf, transfer_kv_mamba_lf_pf,
)  # fmt: skip


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
