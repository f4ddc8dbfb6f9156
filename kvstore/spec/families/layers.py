"""The type of each layer's cache, as `transformers` would decide it."""

from __future__ import annotations

from typing import Any

from kvstore.errors import SpecError
from kvstore.spec.families.mechanism import read_count

NO_CACHE = "no cache"
"""Layer type given here, in any family, to layers that only read the cache of another layer."""


def layer_types(config: Any) -> tuple[str, ...]:
    """Type of each layer, from its number 0 on.

    The rules are those of `get_layer_types_and_kwargs` in `transformers/cache_utils.py`: an explicit
    list; else a window or chunk size makes a layer windowed; and layers that reuse another's keys and
    values hold nothing.

    Raises:
        SpecError: the list does not fit the number of layers.
    """
    layers = layer_configs(config)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = [_implied_type(layer) for layer in layers]
    modes = getattr(config, "kv_sharing_modes", None) or [None] * len(types)
    if len(types) != len(layers) or len(modes) != len(layers):
        raise SpecError(
            f"model type {config.model_type!r} has {len(layers)} layers, but {len(types)} layer_types and "
            f"{len(modes)} kv_sharing_modes; correct the configuration"
        )
    return tuple(NO_CACHE if mode == "reuse" else kind for kind, mode in zip(types, modes, strict=True))


def layer_configs(config: Any) -> tuple[Any, ...]:
    """The configuration of each layer: the same one, unless layers differ in sizes (as in Gemma 4)."""
    count = read_count(config, "num_hidden_layers")
    if getattr(config, "is_heterogeneous", False):
        return tuple(config.per_layer_config[layer] for layer in range(count))
    return (config,) * count


def _implied_type(config: Any) -> str:
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"
