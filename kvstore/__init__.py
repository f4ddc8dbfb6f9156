"""kvstore: keep, find and move the cache of a prompt's prefix, for LLM inference engines.

    spec = kvstore.ModelSpec.from_transformers(config, weights="sha256:...")
    with kvstore.open(spec, dram="8GiB") as store:
        match = store.match(token_ids)

See README.md, and docs/architecture.md for the picture behind it. Names are imported on first use, so that
`kvstore doctor` can say what is wrong with an installation whose native module does not load.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kvstore._version import __version__

if TYPE_CHECKING:
    from kvstore.abc import TransportOptions
    from kvstore.errors import KVStoreError
    from kvstore.keys import ExtraInput
    from kvstore.placement.gpu.slab_shelf import GpuOptions
    from kvstore.placement.ssd import SsdOptions
    from kvstore.pool import Candidate, HandOver, Match, Pin, Prompt, StoreLimits
    from kvstore.spec import ChunkGrid, Coverage, ModelSpec, Shard
    from kvstore.store import Arrival, Lease, Store, Writer
    from kvstore.store import attach_store as attach
    from kvstore.store import open_store as open
    from kvstore.tiers.gpu.pages import PagedTensor, Pages

_HOMES = {
    "Arrival": "kvstore.store",
    "Candidate": "kvstore.pool",
    "ChunkGrid": "kvstore.spec",
    "Coverage": "kvstore.spec",
    "ExtraInput": "kvstore.keys",
    "GpuOptions": "kvstore.placement.gpu.slab_shelf",
    "HandOver": "kvstore.pool",
    "KVStoreError": "kvstore.errors",
    "Lease": "kvstore.store",
    "Match": "kvstore.pool",
    "ModelSpec": "kvstore.spec",
    "PagedTensor": "kvstore.tiers.gpu.pages",
    "Pages": "kvstore.tiers.gpu.pages",
    "Pin": "kvstore.pool",
    "Prompt": "kvstore.pool",
    "Shard": "kvstore.spec",
    "SsdOptions": "kvstore.placement.ssd",
    "Store": "kvstore.store",
    "StoreLimits": "kvstore.pool",
    "TransportOptions": "kvstore.abc",
    "Writer": "kvstore.store",
    "attach": "kvstore.store",
    "open": "kvstore.store",
}
_NAMES_THERE = {"attach": "attach_store", "open": "open_store"}

__all__ = [
    "Arrival",
    "Candidate",
    "ChunkGrid",
    "Coverage",
    "ExtraInput",
    "GpuOptions",
    "HandOver",
    "KVStoreError",
    "Lease",
    "Match",
    "ModelSpec",
    "PagedTensor",
    "Pages",
    "Pin",
    "Prompt",
    "Shard",
    "SsdOptions",
    "Store",
    "StoreLimits",
    "TransportOptions",
    "Writer",
    "__version__",
    "attach",
    "open",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kvstore' has no attribute {name!r}")
    value: object = getattr(import_module(home), _NAMES_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
