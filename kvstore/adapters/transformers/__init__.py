"""Prefix reuse and hand-over for `transformers` models (docs/transformers.md). Needs torch and transformers."""

from __future__ import annotations

from kvstore.adapters.transformers import requirements as _requirements  # noqa: F401
from kvstore.adapters.transformers.cache_io import attention_range, restore_cache, states_at
from kvstore.adapters.transformers.cached_model import CachedModel
from kvstore.adapters.transformers.decode import Sampling, pack_logits, unpack_logits
from kvstore.adapters.transformers.decoder import Decoder
from kvstore.adapters.transformers.exporter import LayerEvent, LayerExporter
from kvstore.adapters.transformers.results import CachedModelStatistics, Generated, HandedOver, Prefilled, PrefillTimes
from kvstore.adapters.transformers.weights import weights_digest

__all__ = [
    "CachedModel",
    "CachedModelStatistics",
    "Decoder",
    "Generated",
    "HandedOver",
    "LayerEvent",
    "LayerExporter",
    "PrefillTimes",
    "Prefilled",
    "Sampling",
    "attention_range",
    "pack_logits",
    "restore_cache",
    "states_at",
    "unpack_logits",
    "weights_digest",
]
