"""A `transformers` cache seen through a model spec: what to put into the store, and how to fill one from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from kvstore.adapters.transformers.cache_layers import (
    check_layer_class,
    has_window,
    recurrent_tensors,
    restore_layer,
    token_tensors,
)
from kvstore.errors import SpecError, UnsupportedModelError, WriteError
from kvstore.spec import CacheGroup, ModelSpec, ReuseRule, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class LayerPlan:
    """The tensors that a spec names for one layer, each with its group, by the tensor's name.

    Attributes:
        attention: tensors kept for every token.
        window: tensors kept for the last tokens.
        states: tensors without a token axis.
    """

    attention: Mapping[str, tuple[CacheGroup, TensorSpec]]
    window: Mapping[str, tuple[CacheGroup, TensorSpec]]
    states: Mapping[str, tuple[CacheGroup, TensorSpec]]

    @property
    def tensors(self) -> dict[str, tuple[CacheGroup, TensorSpec]]:
        return {**self.attention, **self.window, **self.states}


@lru_cache(maxsize=65536)
def layer_plan(spec: ModelSpec, layer: int) -> LayerPlan:
    """What the spec names for a layer; nothing for a layer without a cache.

    Raises:
        SpecError: two groups of the layer have a tensor of one name, which a cache layer cannot have.
    """
    attention: dict[str, tuple[CacheGroup, TensorSpec]] = {}
    window: dict[str, tuple[CacheGroup, TensorSpec]] = {}
    states: dict[str, tuple[CacheGroup, TensorSpec]] = {}
    for group in spec.groups:
        if layer not in group.layers:
            continue
        named = attention if group.rule is ReuseRule.ATTENTION else window if group.window_tokens else states
        for tensor in group.tensors:
            if any(tensor.name in kind for kind in (attention, window, states)):
                raise SpecError(f"layer {layer} has the tensor {tensor.name!r} in two groups; rename one of them")
            named[tensor.name] = (group, tensor)
    return LayerPlan(attention, window, states)


def torch_dtype(tensor: TensorSpec) -> torch.dtype:
    """The torch type of a spec's tensor."""
    dtype = getattr(torch, tensor.dtype.label)
    assert isinstance(dtype, torch.dtype)
    return dtype


def attention_range(spec: ModelSpec, cache: Any, layer: int, start: int, end: int) -> dict[str, torch.Tensor]:
    """Keys, values and the like of tokens [`start`, `end`) of a layer, as host tensors `[rows, tokens, *inner]`.

    They are views of the cache if it lies in host memory, copies otherwise. Empty for a layer without
    full attention.

    Raises:
        UnsupportedModelError: the layer holds what the spec does not name, or is of an unknown class.
        WriteError: the layer has not exactly `end` tokens yet, or its batch is not 1.
    """
    plan = layer_plan(spec, layer)
    held = token_tensors(cache.layers[layer], layer)
    _check_names(spec, layer, plan, held, recurrent_tensors(cache.layers[layer], layer))
    found = {}
    for name in plan.attention:
        tokens = held[name].shape[1]
        if tokens != end or not 0 <= start < end:
            raise WriteError(
                f"{name} of cache layer {layer} hold {tokens} tokens, expected {end} with the chunk that began at "
                f"{start}; give the exporter the range that the model is computing"
            )
        found[name] = held[name][:, start:end].to("cpu")
    return found


def states_at(spec: ModelSpec, cache: Any, layer: int, tokens: int) -> dict[str, torch.Tensor]:
    """States and windows of a layer that has seen exactly `tokens` tokens, as host tensors.

    A window is `[rows, min(tokens, window - 1), *inner]`, a state `[rows, *inner]`. In host memory they
    are views that the model overwrites with the next tokens. Empty for a layer without states.

    Raises:
        UnsupportedModelError, WriteError: as `attention_range`.
    """
    plan = layer_plan(spec, layer)
    by_token = token_tensors(cache.layers[layer], layer)
    states = recurrent_tensors(cache.layers[layer], layer)
    _check_names(spec, layer, plan, by_token, states)
    if plan.window:
        seen = cache.layers[layer].get_seq_length()
        if seen != tokens:
            raise WriteError(f"cache layer {layer} has seen {seen} tokens, expected {tokens} at this checkpoint")
    held = {**by_token, **states}
    return {name: held[name].to("cpu") for name in (*plan.window, *plan.states)}


def _check_names(
    spec: ModelSpec, layer: int, plan: LayerPlan, by_token: Mapping[str, Any], states: Mapping[str, Any]
) -> None:
    held = {*by_token, *states}
    named = set(plan.tensors)
    if held != named:
        missing = ", ".join(sorted(named - held)) or "nothing"
        surplus = ", ".join(sorted(held - named)) or "nothing"
        raise UnsupportedModelError(
            f"the cache of layer {layer} is not what the spec of {spec.model!r} says: it lacks {missing} and has "
            f"{surplus} beyond it; build the spec for this very model"
        )


def layer_buffers(spec: ModelSpec, layer: int, tokens: int) -> dict[str, torch.Tensor]:
    """Uninitialized host tensors for everything that a prefix of `tokens` tokens keeps in a layer, by name."""
    return {
        name: torch.empty(
            tensor.shape(tensor.rows, min(tokens, group.window_tokens) if group.window_tokens else tokens),
            dtype=torch_dtype(tensor),
        )
        for name, (group, tensor) in layer_plan(spec, layer).tensors.items()
    }


@torch.no_grad()
def restore_cache(
    config: Any,
    spec: ModelSpec,
    tokens: int,
    fill: Callable[[int, Mapping[str, torch.Tensor]], None],
    device: torch.device | str = "cpu",
) -> DynamicCache:
    """A new cache as if the model had seen a prefix, with `fill` copying each layer's tensors in.

    Args:
        config: the model's configuration; it decides the class of each cache layer.
        spec: the spec of what `fill` gives.
        tokens: length of the prefix.
        fill: called once per layer that the spec names, in ascending order, with the layer's number and
            its tensors by name (`layer_buffers`), which it must fill completely.
        device: where the cache is to lie. For other devices than the CPU each layer is staged in host
            memory and copied.

    Raises:
        UnsupportedModelError: the model's cache and the spec differ.
    """
    cache = DynamicCache(config=config)
    if len(cache.layers) <= spec.layers[-1]:
        raise UnsupportedModelError(
            f"the spec of {spec.model!r} names layer {spec.layers[-1]}, but the model's cache has {len(cache.layers)} "
            "layers; build the spec for this very model"
        )
    for number, layer in enumerate(cache.layers):
        check_layer_class(layer, number)
        plan = layer_plan(spec, number)
        if bool(plan.window) != has_window(layer):
            raise UnsupportedModelError(
                f"layer {number} is windowed in the {'spec' if plan.window else 'model'} only; "
                "build the spec for this very model"
            )
        if not plan.tensors:
            continue
        buffers = layer_buffers(spec, number, tokens)
        fill(number, buffers)
        on_device = {name: tensor.to(device) for name, tensor in buffers.items()}
        by_token = {name: on_device[name] for name in (*plan.attention, *plan.window)}
        restore_layer(cache, number, tokens, by_token, {name: on_device[name] for name in plan.states})
    return cache
