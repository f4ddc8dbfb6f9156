"""The model spec of a `transformers` configuration.

Neither torch nor transformers is imported: a configuration is any object with the attributes that its
class in transformers 5 has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.errors import SpecError, UnsupportedModelError
from kvstore.spec.dtypes import DType
from kvstore.spec.families import (
    FAMILY_OF,
    NO_CACHE,
    REFUSED,
    Family,
    Mechanism,
    layer_configs,
    layer_types,
    numerics_digest,
)
from kvstore.spec.group import CacheGroup
from kvstore.spec.model import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

CONFIG_DIGEST = "config.sha256"
"""Name under which the digest of the configuration stands in `ModelSpec.numerics`."""

_GROUP_ORDER = ("attention", "window", "state")


def spec_from_transformers(
    config: Any,
    *,
    weights: str,
    block_tokens: int = 64,
    dtype: Any = None,
    numerics: Mapping[str, str] | None = None,
) -> ModelSpec:
    """The spec of a model as `transformers` caches it.

    Of a composite configuration (text and vision) the text model's part counts.

    Args:
        config: a `PreTrainedConfig`.
        weights: identity of the weights.
        block_tokens: tokens per attention block.
        dtype: element type of the activations: a name, a NumPy or a torch type. By default the
            configuration's own.
        numerics: further facts that change cache bytes and are not in the configuration.

    Raises:
        UnsupportedModelError: the model, or one of its layers, is not known or cannot be cached.
        SpecError: the type of the activations is not known, or the spec exceeds a limit.
    """
    text_config = _text_config(config)
    family = _family(text_config)
    element_type = _element_type(dtype, text_config, config)
    facts = dict(numerics or {})
    if CONFIG_DIGEST in facts:
        raise SpecError(f"numerics: the name {CONFIG_DIGEST!r} is taken by the digest of the configuration")
    facts[CONFIG_DIGEST] = numerics_digest(text_config)
    return ModelSpec(
        model=text_config.model_type,
        weights=weights,
        block_tokens=block_tokens,
        groups=_groups(text_config, family, element_type),
        numerics=tuple(sorted(facts.items())),
    )


def _text_config(config: Any) -> Any:
    model_type = getattr(config, "model_type", None)
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModelError(f"a {type(config).__name__} is no transformers configuration: it has no model_type")
    if model_type in REFUSED:
        raise UnsupportedModelError(f"model type {model_type!r} cannot be cached: {REFUSED[model_type]}")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model type {model_type!r} cannot be cached: it is an encoder-decoder, and its cross-attention depends "
            "on the encoder's input; only decoders are supported"
        )
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if getattr(text_config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"model type {model_type!r} cannot be cached: with use_bidirectional_attention a token's keys and values "
            "depend on the tokens after it"
        )
    return text_config


def _family(config: Any) -> Family:
    model_type = config.model_type
    if model_type in REFUSED:
        raise UnsupportedModelError(f"model type {model_type!r} cannot be cached: {REFUSED[model_type]}")
    family = FAMILY_OF.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not known; known are {', '.join(sorted(FAMILY_OF))}. "
            "For any other model write the ModelSpec by hand: one CacheGroup for each kind of layer"
        )
    return family


def _element_type(dtype: Any, *configs: Any) -> DType:
    for candidate in (dtype, *(getattr(config, "dtype", None) for config in configs)):
        if candidate is not None:
            return DType.parse(candidate)
    raise SpecError(
        f"model type {configs[0].model_type!r}: the configuration names no dtype; pass dtype= (the type of the "
        "activations, for example 'bfloat16')"
    )


def _groups(config: Any, family: Family, dtype: DType) -> tuple[CacheGroup, ...]:
    """Layers with equal mechanisms, grouped; attention first, then windows, then states."""
    layers_of: dict[Mechanism, list[int]] = {}
    for layer, (layer_type, layer_config) in enumerate(zip(layer_types(config), layer_configs(config), strict=True)):
        if layer_type == NO_CACHE:
            continue
        builders = family.layers.get(layer_type)
        if builders is None:
            raise UnsupportedModelError(
                f"model type {config.model_type!r}: layer {layer} is of type {layer_type!r}; known for this model "
                f"are {', '.join(sorted(family.layers))}. Write the ModelSpec by hand"
            )
        for build in builders:
            layers_of.setdefault(build(layer_config, dtype), []).append(layer)
    if not layers_of:
        raise UnsupportedModelError(f"model type {config.model_type!r}: none of its layers keeps a cache")

    groups: list[CacheGroup] = []
    count_of: dict[str, int] = {}
    for mechanism, layers in sorted(layers_of.items(), key=lambda item: (_GROUP_ORDER.index(item[0].kind), item[1])):
        number = count_of[mechanism.kind] = count_of.get(mechanism.kind, 0) + 1
        groups.append(
            CacheGroup(
                name=mechanism.kind if number == 1 else f"{mechanism.kind}_{number}",
                rule=mechanism.rule,
                layers=tuple(layers),
                tensors=mechanism.tensors,
                window_tokens=mechanism.window_tokens,
            )
        )
    return tuple(groups)
