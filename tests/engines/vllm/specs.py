"""vLLM's own cache specs, tensors and CPU kernels against the mapping layer.

Run in vLLM's environment, with no engine:

    python -m tests.engines.vllm.specs

Prints one line for each check, and ends with 1 if one is broken. What needs a GPU or another model is mapped from the
specs that vLLM would make for it.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import vllm._custom_ops as kernels
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes
from vllm.v1 import kv_cache_interface as interface
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum as Mechanism
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvstore.adapters.paged import PagedMapping, spec_of
from kvstore.adapters.vllm import groups as mapped
from kvstore.adapters.vllm import states
from kvstore.adapters.vllm.facts import ModelFacts, key_value_layout
from kvstore.errors import UnsupportedModelError
from kvstore.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS, HEADS, DIM = 2, 2, 64


@dataclass(frozen=True)
class Check:
    name: str
    broken: str = ""


def group_of(spec: Any, *names: str) -> Any:
    return interface.KVCacheGroupSpec(list(names) or ["model.layers.0.attn"], spec)


def heads(ranks: int, total: int = 8) -> dict[str, Any]:
    return {"block_size": 16, "num_kv_heads": max(1, total // ranks), "head_size": DIM, "dtype": torch.bfloat16}


def state(shapes: Any, kind: Any) -> Any:
    dtypes = (torch.bfloat16, torch.float32)[: len(shapes)]
    return interface.MambaSpec(block_size=16, shapes=tuple(shapes), dtypes=dtypes, mamba_type=kind)


MODELS: dict[str, Callable[[int], Any]] = {
    "full": lambda ranks: interface.FullAttentionSpec(**heads(ranks)),
    "few heads": lambda ranks: interface.FullAttentionSpec(**heads(ranks, 2)),
    "window": lambda ranks: interface.SlidingWindowSpec(**heads(ranks), sliding_window=128),
    "chunks": lambda ranks: interface.ChunkedLocalAttentionSpec(**heads(ranks), attention_chunk_size=128),
    "latent": lambda ranks: interface.MLAAttentionSpec(
        block_size=16, num_kv_heads=1, max_tp_shards=1, head_size=576, dtype=torch.bfloat16
    ),
    "gated delta": lambda ranks: state(Shapes.gated_delta_net_state_shape(ranks, 4, 8, 32, 16, 4), Mechanism.GDN_ATTN),
    "kimi delta": lambda ranks: state(Shapes.kda_state_shape(ranks, 8, 16), Mechanism.GDN_ATTN),
    "mamba 2": lambda ranks: state(Shapes.mamba2_state_shape(ranks, 8 * 16, 4, 8, 16, 32, 4), Mechanism.MAMBA2),
    "mamba 2, one group": lambda ranks: state(
        Shapes.mamba2_state_shape(ranks, 8 * 16, 1, 8, 16, 32, 4), Mechanism.MAMBA2
    ),
    "mamba": lambda ranks: state(Shapes.mamba1_state_shape(ranks, 64, 16, 4), Mechanism.MAMBA1),
    "short convolution": lambda ranks: state(Shapes.short_conv_state_shape(ranks, 64, 3), Mechanism.SHORT_CONV),
    "linear": lambda ranks: state(Shapes.linear_attention_state_shape(8, ranks, 16), Mechanism.LINEAR),
}


def fingerprints_over_ranks() -> Iterator[Check]:
    """Of every kind of layer: the spec is the whole model's, whatever a rank has."""
    for name, build in MODELS.items():
        found = set()
        for ranks in (1, 2, 4):
            facts = ModelFacts(
                ranks, kv_heads=2 if name == "few heads" else 8, mamba_groups=1 if "one group" in name else 4
            )
            groups = mapped.engine_groups([group_of(build(ranks))], facts)
            found.add(spec_of(groups, model=name, weights="w").fingerprint)
        yield Check(f"ranks: {name}", "" if len(found) == 1 else "another spec for another number of ranks")


def every_kind_of_spec() -> Iterator[Check]:
    """None of vLLM's kinds of specs, and of its mechanisms, is unknown by name."""
    bases = {"KVCacheSpec", "AttentionSpec", "UniformTypeKVCacheSpecs"}
    known = {*mapped.BUILDERS, *mapped.REFUSED, *bases}
    kinds = {
        name
        for name, kind in vars(interface).items()
        if inspect.isclass(kind) and issubclass(kind, interface.KVCacheSpec)
    }
    yield Check("kinds of specs", ", ".join(sorted(kinds - known)))
    yield Check("kinds of states", ", ".join(sorted(set(Mechanism.__members__) - set(states.STATES) - {"CUSTOM"})))


def uniform_types() -> Iterator[Check]:
    """Layers of several sizes under one table."""
    names = [f"model.layers.{layer}.attn" for layer in range(4)]
    specs = {
        name: interface.FullAttentionSpec(**{**heads(1), "head_size": DIM * (1 + layer % 2)})
        for layer, name in enumerate(names)
    }
    uniform = interface.UniformTypeKVCacheSpecs.from_specs(specs)
    groups = mapped.engine_groups([group_of(uniform, *names)], ModelFacts())
    found = [(group.index, group.layers) for group in groups]
    yield Check("layers of several sizes", "" if found == [(0, (0, 2)), (0, (1, 3))] else str(found))


def refused_by_name() -> Iterator[Check]:
    for name, spec in {
        "INT8_PER_TOKEN_HEAD": interface.FullAttentionSpec(
            **heads(1), kv_quant_mode=interface.KVQuantMode.INT8_PER_TOKEN_HEAD
        ),
        "NVFP4": interface.FullAttentionSpec(**heads(1), kv_quant_mode=interface.KVQuantMode.NVFP4),
        "deepseek_v4": interface.MLAAttentionSpec(
            block_size=64, num_kv_heads=1, head_size=512, dtype=torch.uint8, model_version="deepseek_v4"
        ),
        "accepted yet": interface.MambaSpec(
            block_size=16, shapes=((3, 8),), dtypes=(torch.float32,), num_speculative_blocks=2
        ),
    }.items():
        try:
            mapped.engine_groups([group_of(spec)], ModelFacts())
            yield Check(f"refused: {name}", "it was mapped")
        except UnsupportedModelError as error:
            yield Check(f"refused: {name}", "" if name in str(error) else str(error))


class Pages:
    """Tensors that vLLM allocates, filled by its kernel for CPUs."""

    def __init__(self, block_tokens: int, dtype: torch.dtype, pages: int = 8) -> None:
        self.names = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
        self.spec = interface.FullAttentionSpec(block_size=block_tokens, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
        size = self.spec.page_size_bytes
        raw = torch.zeros(LAYERS * pages * size, dtype=torch.int8)
        placed = interface.KVCacheTensor(
            size=raw.numel(), layers=self.names, layer_stride=pages * size, block_stride=size
        )
        views = interface.create_kv_cache_views(raw, self.spec, pages, KVCacheLayout.LBHNC, placed)
        self.tensors = dict(zip(self.names, views, strict=True))
        self.isa = _get_attn_isa(dtype, block_tokens, DIM)

    def compute(self, keys: torch.Tensor, values: torch.Tensor, table: list[int]) -> None:
        """Have the kernel write tokens `[layers, tokens, heads, dim]` into the pages of a table."""
        tokens = torch.arange(keys.shape[1])
        size = self.spec.block_size
        slots = torch.tensor(table)[tokens // size] * size + tokens % size
        for layer, name in enumerate(self.names):
            cache = self.tensors[name]
            pages, rows, block, _ = cache.size()
            key_cache, value_cache = cache.view((pages, rows, block * 2, -1)).chunk(2, dim=2)
            kernels.cpu_attn_reshape_and_cache(keys[layer], values[layer], key_cache, value_cache, slots, self.isa)

    def mapping(self) -> PagedMapping:
        layout = key_value_layout("CPU_ATTN", self.isa)
        facts = ModelFacts(layouts=dict.fromkeys(self.names, layout))
        groups = mapped.engine_groups([group_of(self.spec, *self.names)], facts)
        spec = spec_of(groups, model="dense", weights="w", block_tokens=64)
        mapping = PagedMapping(spec, groups, null_page=mapped.NULL_PAGE)
        mapping.register(self.tensors)
        return mapping


def kernels_for_cpus() -> Iterator[Check]:
    """What the kernel has written into pages of one size comes back as it writes it into pages of another."""
    count = 300
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        keys, values = (torch.randn(LAYERS, count, HEADS, DIM, generator=generator).to(dtype) for _ in range(2))
        for written, read in ((128, 64), (64, 256), (32, 96)):
            name = f"pages of {written} and {read} tokens, {str(dtype).removeprefix('torch.')}"
            try:
                source, target, wanted = (Pages(size, dtype, 16) for size in (written, read, read))
                mapping = source.mapping()
            except UnsupportedModelError as error:
                print(f"not run: {name}: {error}")
                continue
            table = [5, 3, 9, 1, 2, 4, 6, 7, 8, 10]
            source.compute(keys, values, table)
            wanted.compute(keys, values, table[::-1])
            with open_store(mapping.spec, dram="32MiB") as store:
                with store.write(range(count)) as writer:
                    mapping.save(writer, [table], 0, count)
                    writer.commit()
                with store.read(store.match([*range(count), 0])) as lease:
                    target.mapping().load(lease, [table[::-1]])
            equal = all(
                torch.equal(target.tensors[each].view(torch.uint8), wanted.tensors[each].view(torch.uint8))
                for each in target.names
            )
            yield Check(name, "" if equal else "the kernel would have written something else")


def main() -> int:
    # Pages that vLLM lays out for AMX are refused by name; the driver of the engines has it do without, too.
    torch.cpu._is_amx_tile_supported = lambda: False
    checks = [
        *fingerprints_over_ranks(),
        *every_kind_of_spec(),
        *uniform_types(),
        *refused_by_name(),
        *kernels_for_cpus(),
    ]
    for check in checks:
        print(f"{'BROKEN' if check.broken else 'holds'}: {check.name}{': ' if check.broken else ''}{check.broken}")
    return 1 if any(check.broken for check in checks) else 0


if __name__ == "__main__":
    sys.exit(main())
