"""Negative controls of resume equivalence: damage that a comparison of logits must notice.

Each control damages what was read from the store in one way, as a fault of a store or of an adapter
might, and continues from it. If the logits do not change, the comparison proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from kvstore.spec import ModelSpec
    from kvstore.store import Store

LayerTensors: TypeAlias = "dict[int, dict[str, torch.Tensor]]"
"""What a prefix keeps: tensors by name, by layer."""


@dataclass(frozen=True)
class Control:
    """A damage that was noticed.

    Attributes:
        name: what was done.
        resumed_tokens: length of the prefix that it was done to.
        difference: largest change of a logit; infinite if the model failed on it.
    """

    name: str
    resumed_tokens: int
    difference: float

    def __str__(self) -> str:
        return f"{self.name} at {self.resumed_tokens} tokens changed the logits by up to {self.difference:.3g}"


def check_controls(
    model: torch.nn.Module,
    store: Store,
    token_ids: Sequence[int],
    other_ids: Sequence[int],
    boundaries: Sequence[int],
    chunk_tokens: int,
    decoded_tokens: int,
) -> tuple[Control, ...]:
    """Continue from the deepest resume point, undamaged and damaged in every way that the spec allows.

    Args:
        model: the model.
        store: holds both prompts, with states at every boundary.
        token_ids: the prompt.
        other_ids: another prompt that shares no prefix with it.
        boundaries: lengths at which both can be resumed.
        chunk_tokens: tokens of a chunk.
        decoded_tokens: tokens to decode after the prompt.

    Raises:
        AssertionError: the undamaged cache does not continue as expected, or a damage goes unnoticed.
    """
    from transformers import DynamicCache

    from kvstore.adapters.transformers import Decoder

    config: Any = model.config
    tokens = boundaries[-1]
    right = _read(store, token_ids, tokens)
    other = _read(store, other_ids, tokens)
    shorter = _read(store, token_ids, boundaries[-2]) if len(boundaries) > 1 else None
    decoder = Decoder(model)

    def logits(cache: Any, start: int, decoder: Decoder = decoder) -> list[torch.Tensor]:
        # Of every token: the last layer's convolution state touches only the first ones after it.
        return decoder.continue_prompt(cache, token_ids, start, chunk_tokens, decoded_tokens, every_token=True)

    def continued(tensors: LayerTensors, decoder: Decoder = decoder, seen: int | None = None) -> list[torch.Tensor]:
        cache = _cache(model, store.spec, tokens, tensors)
        for layer in cache.layers:
            if seen is not None and hasattr(layer, "cumulative_length"):
                layer.cumulative_length = seen
        return logits(cache, tokens, decoder)

    rest = logits(DynamicCache(config=config), 0)[tokens // chunk_tokens :]
    if _difference(rest, continued(_copy(right))) != 0.0:
        raise AssertionError(f"an undamaged cache of {tokens} tokens does not continue as the uncached run does")
    controls = []
    for name, tensors in _damages(store.spec, right, other, shorter):
        controls.append(Control(name, tokens, _difference(rest, _attempt(lambda t=tensors: continued(t)))))
    held = _window_tokens(store.spec, right)
    if held is not None and held < tokens:
        # Left to itself, as in `generate`, a model derives positions from the length that a window has seen.
        own = Decoder(model, explicit_positions=False)
        if _difference(rest, continued(_copy(right), own)) == 0.0:
            wrong = _attempt(lambda: continued(_copy(right), own, held))
            controls.append(Control(f"a window that claims {held} tokens", tokens, _difference(rest, wrong)))
    unnoticed = [control.name for control in controls if control.difference == 0.0]
    if unnoticed:
        raise AssertionError(
            f"damage went unnoticed at {tokens} tokens: {'; '.join(unnoticed)}. The comparison cannot see these parts "
            "of the cache: sharpen the model's weights, or use longer prompts"
        )
    return tuple(controls)


def _read(store: Store, token_ids: Sequence[int], tokens: int) -> LayerTensors:
    """Everything that the store has at one resume point of a prompt."""
    from kvstore.adapters.transformers.cache_io import layer_buffers

    match = store.match(token_ids).at(tokens)
    with store.read(match) as lease:
        found = {number: layer_buffers(store.spec, number, tokens) for number in store.spec.layers}
        for number, tensors in found.items():
            lease.layer(number).copy_to(**tensors)
    return found


def _cache(model: torch.nn.Module, spec: ModelSpec, tokens: int, tensors: LayerTensors) -> Any:
    from kvstore.adapters.transformers import restore_cache

    def fill(layer: int, into: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in into.items():
            tensor.copy_(tensors[layer][name])

    return restore_cache(model.config, spec, tokens, fill, next(model.parameters()).device)


def _copy(tensors: LayerTensors) -> LayerTensors:
    return {layer: {name: tensor.clone() for name, tensor in named.items()} for layer, named in tensors.items()}


def _damages(
    spec: ModelSpec, right: LayerTensors, other: LayerTensors, shorter: LayerTensors | None
) -> Iterator[tuple[str, LayerTensors]]:
    """Damaged copies of a prefix, each with a name. One layer at a time, so that nothing hides behind another."""
    from kvstore.spec import ReuseRule

    block = spec.block_tokens
    for group in spec.groups:
        first, last = group.layers[0], group.layers[-1]
        is_attention = group.rule is ReuseRule.ATTENTION
        names = [tensor.name for tensor in group.tensors]
        for name in names:
            if is_attention:
                damaged = _copy(right)
                damaged[last][name][:, block : 2 * block].zero_()
                yield f"one block of {name} of layer {last} zeroed", damaged
            else:
                damaged = _copy(right)
                damaged[first][name].zero_()
                yield f"{name} of layer {first} zeroed", damaged
        if is_attention:
            damaged = _copy(right)
            for name in names:
                damaged[first][name][:, :block] = other[first][name][:, :block]
            yield f"the first block of layer {first} from another prompt", damaged
        else:
            damaged = _copy(right)
            for name in names:
                damaged[last][name] = other[last][name]
            yield f"{' and '.join(names)} of layer {last} from another prompt", damaged
            if shorter is not None and all(shorter[last][name].shape == right[last][name].shape for name in names):
                damaged = _copy(right)
                for name in names:
                    damaged[last][name] = shorter[last][name]
                yield f"{' and '.join(names)} of layer {last} from a shorter prefix", damaged
        if first != last:
            damaged = _copy(right)
            for name in names:
                damaged[first][name], damaged[last][name] = damaged[last][name], damaged[first][name]
            yield f"{' and '.join(names)} of layers {first} and {last} swapped", damaged


def _window_tokens(spec: ModelSpec, tensors: LayerTensors) -> int | None:
    """Tokens that a windowed layer holds, if the model's first layer with a cache is one.

    That layer tells the model its position.
    """
    group = next((group for group in spec.groups if spec.layers[0] in group.layers), None)
    if group is None or group.window_tokens is None:
        return None
    return int(tensors[spec.layers[0]][group.tensors[0].name].shape[1])


def _attempt(run: Any) -> list[torch.Tensor] | None:
    """The logits, or None where the model fails: a mask that does not fit is noticed too."""
    try:
        rows: list[torch.Tensor] = run()
    except (RuntimeError, ValueError, IndexError):
        return None
    return rows


def _difference(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor] | None) -> float:
    if found is None:
        return float("inf")
    worst = 0.0
    for right, row in zip(expected, found, strict=True):
        if not right.equal(row):
            change = float((right.float() - row.float()).abs().max())
            # Not-a-number compares with nothing, and is noticed all the same.
            worst = max(worst, change if change == change else float("inf"))
    return worst
