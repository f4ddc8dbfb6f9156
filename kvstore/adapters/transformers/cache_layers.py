"""What one layer of a `transformers` cache holds, by the tensor names of the model spec.

Written against `transformers/cache_utils.py` of release 5.23. Only exact classes are known: a subclass
may keep more than its base, and a cache restored without that more is silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import cache_utils

from kvstore.errors import UnsupportedModelError, WriteError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

_FULL = (cache_utils.DynamicLayer, cache_utils.DynamicIndexedLayer, cache_utils.LinearAttentionAndFullAttentionLayer)
_WINDOW = (cache_utils.DynamicSlidingWindowLayer, cache_utils.LinearAttentionAndSlidingWindowAttentionLayer)
_LINEAR = (
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
)
_KNOWN = (*_FULL, *_WINDOW, *_LINEAR, cache_utils.DummyLayer)

INDEXER_KEYS = "indexer_keys"
"""Spec name of the extra keys of a sparse-attention indexer: one row, `[1, tokens, dim]`."""


def state_name(base: str, index: int) -> str:
    """Spec name of a layer's state tensor: `conv`, then `conv_1`, `conv_2` ... for models with several."""
    return base if index == 0 else f"{base}_{index}"


def check_layer_class(layer: Any, number: int) -> None:
    """Raise `UnsupportedModelError` for a cache layer of a class that is not known exactly."""
    if type(layer) not in _KNOWN:
        raise UnsupportedModelError(
            f"cache layer {number} is a {type(layer).__module__}.{type(layer).__name__}, which this adapter does not "
            "know; use DynamicCache(config=model.config) of transformers, or add the class to the adapter"
        )


def has_window(layer: Any) -> bool:
    """Whether the layer keeps only the last tokens of its keys and values."""
    return type(layer) in _WINDOW


def token_tensors(layer: Any, number: int) -> dict[str, torch.Tensor]:
    """Tensors with a token axis, each as a view `[rows, tokens, *inner]`; empty before the first token.

    Those of a windowed layer hold its last tokens, of the others all tokens.

    Raises:
        UnsupportedModelError: the class is not known, or it holds something that has no name in a spec.
        WriteError: the batch is not 1.
    """
    check_layer_class(layer, number)
    found: dict[str, torch.Tensor] = {}
    if type(layer) not in (*_FULL, *_WINDOW) or layer.get_seq_length() == 0:
        return found
    found["keys"] = _single(layer.keys, number, "keys")
    found["values"] = _single(layer.values, number, "values")
    if type(layer) is cache_utils.DynamicIndexedLayer:
        if layer.indexer_position_ids is not None:
            raise UnsupportedModelError(
                f"cache layer {number} keeps indexer positions beside its indexer keys, which cannot be stored"
            )
        if layer.indexer_keys is not None:
            # [batch, tokens, dim] has no head axis: with batch 1 it already is [rows, tokens, dim].
            _single(layer.indexer_keys, number, INDEXER_KEYS)
            found[INDEXER_KEYS] = layer.indexer_keys.detach()
    return found


def recurrent_tensors(layer: Any, number: int) -> dict[str, torch.Tensor]:
    """Convolution and recurrent states, each as a view `[rows, *inner]`; empty before the first token.

    The model overwrites them in place with the next tokens.

    Raises:
        UnsupportedModelError: the class is not known, or the states were recorded for a rollback.
        WriteError: the batch is not 1.
    """
    check_layer_class(layer, number)
    found: dict[str, torch.Tensor] = {}
    if type(layer) not in _LINEAR:
        return found
    if layer.record_past:
        raise UnsupportedModelError(
            f"cache layer {number} records past states for a rollback, so they have no fixed shape; "
            "store caches that do not (activate_past_recording was called)"
        )
    for base, states in (("conv", layer.conv_states), ("recurrent", layer.recurrent_states)):
        for index, state in states.items():
            if state is not None:
                name = state_name(base, index)
                found[name] = _single(state, number, name)
    return found


def restore_layer(
    cache: Any, number: int, tokens: int, by_token: Mapping[str, torch.Tensor], states: Mapping[str, torch.Tensor]
) -> None:
    """Fill one empty layer of a cache, as if it had seen `tokens` tokens.

    Args:
        cache: a `DynamicCache`; its layer `number` is empty.
        number: index of the layer.
        tokens: length of the prefix.
        by_token: tensors with a token axis, as `token_tensors` names and shapes them. Kept, not copied,
            where `transformers` does not copy.
        states: tensors without one, as `recurrent_tensors` does; copied.

    Raises:
        UnsupportedModelError: the class is not known.
        WriteError: the tensors are not those of this class.
    """
    layer = cache.layers[number]
    check_layer_class(layer, number)
    if by_token:
        _restore_tokens(layer, number, tokens, dict(by_token))
    bases = {
        state_name(base, index): (base, index) for base in ("conv", "recurrent") for index in _state_indices(layer)
    }
    for name, state in states.items():
        if name not in bases:
            raise WriteError(f"cache layer {number} is a {type(layer).__name__}, which has no state {name!r}")
        base, index = bases[name]
        update = cache.update_conv_state if base == "conv" else cache.update_recurrent_state
        update(state.unsqueeze(0), number, state_idx=index)


def _restore_tokens(layer: Any, number: int, tokens: int, by_token: dict[str, torch.Tensor]) -> None:
    indexer = by_token.pop(INDEXER_KEYS, None)
    expected = {"keys", "values"} if type(layer) in (*_FULL, *_WINDOW) else set()
    if set(by_token) != expected or (indexer is not None and type(layer) is not cache_utils.DynamicIndexedLayer):
        names = sorted(set(by_token) | ({INDEXER_KEYS} if indexer is not None else set()))
        raise WriteError(f"cache layer {number} is a {type(layer).__name__}, which does not hold {', '.join(names)}")
    held = by_token["keys"].shape[1]
    if held != (min(tokens, layer.sliding_window - 1) if has_window(layer) else tokens):
        raise WriteError(
            f"cache layer {number} was given {held} tokens of keys for a prefix of {tokens}; "
            "the spec's window differs from the model's"
        )
    layer.update(by_token["keys"].unsqueeze(0), by_token["values"].unsqueeze(0))
    if has_window(layer):
        # The layer derives positions and masks from it, and has seen more tokens than it keeps.
        layer.cumulative_length = tokens
    if indexer is not None:
        layer.update_indexer(indexer)


def _state_indices(layer: Any) -> range:
    return range(layer.number_of_states) if type(layer) in _LINEAR else range(0)


def _single(tensor: torch.Tensor, number: int, name: str) -> torch.Tensor:
    if tensor.shape[0] != 1:
        raise WriteError(
            f"{name} of cache layer {number} hold a batch of {tensor.shape[0]}; the store keeps one sequence at a "
            "time: run each prompt with batch 1"
        )
    return tensor.detach()[0]
