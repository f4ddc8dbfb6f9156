"""Model specs: what a model's cache consists of, and when two caches are the same."""

from kvstore.spec.coverage import Coverage
from kvstore.spec.dtypes import DType
from kvstore.spec.file import load_spec, save_spec, spec_from_file_text, spec_to_file_text
from kvstore.spec.grid import UNKNOWN_GRID, ChunkGrid
from kvstore.spec.group import CacheGroup, LayerSpan, ReuseRule
from kvstore.spec.model import ModelSpec
from kvstore.spec.shard import WHOLE, Segment, Shard, UnitRange
from kvstore.spec.tensor import TensorSpec

__all__ = [
    "UNKNOWN_GRID",
    "WHOLE",
    "CacheGroup",
    "ChunkGrid",
    "Coverage",
    "DType",
    "LayerSpan",
    "ModelSpec",
    "ReuseRule",
    "Segment",
    "Shard",
    "TensorSpec",
    "UnitRange",
    "load_spec",
    "save_spec",
    "spec_from_file_text",
    "spec_to_file_text",
]
