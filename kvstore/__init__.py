"""kvstore: keep, find and move the cache of a prompt's prefix, for LLM inference engines.

    spec = kvstore.ModelSpec.from_transformers(config, weights="sha256:...")
    with kvstore.open(spec, dram="8GiB") as store:
        match = store.match(token_ids)

See README.md, and docs/architecture.md for the picture behind it.
"""

from kvstore._version import __version__
from kvstore.abc import TransportOptions
from kvstore.errors import KVStoreError
from kvstore.keys import ExtraInput
from kvstore.pool import Candidate, HandOver, Match, Prompt
from kvstore.spec import ChunkGrid, ModelSpec, Shard
from kvstore.store import Arrival, Lease, Store, Writer
from kvstore.store import open_store as open

__all__ = [
    "Arrival",
    "Candidate",
    "ChunkGrid",
    "ExtraInput",
    "HandOver",
    "KVStoreError",
    "Lease",
    "Match",
    "ModelSpec",
    "Prompt",
    "Shard",
    "Store",
    "TransportOptions",
    "Writer",
    "__version__",
    "open",
]
