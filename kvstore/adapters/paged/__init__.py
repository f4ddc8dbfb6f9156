"""What engines with paged caches have in common: their groups and pages, mapped to specs, spans and resume points.

Knows no engine, and imports no torch before it is given a tensor of it.
"""

from kvstore.adapters.paged.checkpoints import CheckpointPolicy
from kvstore.adapters.paged.groups import EngineGroup, EngineTensor, layer_number
from kvstore.adapters.paged.identity import (
    NotCached,
    RequestIdentity,
    adapter_digest,
    adapter_name,
    adapter_stamp,
    check_hash_root,
    identify,
)
from kvstore.adapters.paged.mapping import PagedMapping, Tables
from kvstore.adapters.paged.spec import group_names, spec_of

__all__ = [
    "CheckpointPolicy",
    "EngineGroup",
    "EngineTensor",
    "NotCached",
    "PagedMapping",
    "RequestIdentity",
    "Tables",
    "adapter_digest",
    "adapter_name",
    "adapter_stamp",
    "check_hash_root",
    "group_names",
    "identify",
    "layer_number",
    "spec_of",
]
