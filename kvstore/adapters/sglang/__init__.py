"""SGLang's hierarchical cache over a store: a backend for its "dynamic" storage (docs/sglang.md).

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvstore",
        "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache", "interface_v1": 1,
        "weights": "sha256:1f0c...", "dram": "8GiB"}'

Only `KVStoreHiCache` needs SGLang, and imports it when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.adapters.sglang.backend import KVStoreHiCache

__all__ = ["KVStoreHiCache"]


def __getattr__(name: str) -> object:
    if name != "KVStoreHiCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore.adapters.sglang.backend import KVStoreHiCache

    globals()[name] = KVStoreHiCache
    return KVStoreHiCache
