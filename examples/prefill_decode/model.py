"""The model of a run, its spec, and how much its cache weighs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore import ModelSpec
from kvstore.spec import ReuseRule
from kvstore.units import format_bytes

from .random_models import build_random_model
from .trained_model import load_trained_model

if TYPE_CHECKING:
    from .arguments import Options


@dataclass(frozen=True)
class LoadedModel:
    """A model and the spec of its cache."""

    model: Any
    spec: ModelSpec

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_model(options: Options) -> LoadedModel:
    """Build or load what the options name. Equal options give equal weights in every process."""
    # Needs torch, which only the children load.
    from kvstore.adapters.transformers import weights_digest

    if options.is_trained:
        model = load_trained_model()
    else:
        model = build_random_model(options.model, options.size, options.seed)
    spec = ModelSpec.from_transformers(
        model.config, weights=weights_digest(model), block_tokens=options.block_tokens, dtype="float32"
    )
    return LoadedModel(model, spec)


def describe_groups(spec: ModelSpec) -> tuple[str, ...]:
    """A line about each cache group."""
    lines = []
    for group in spec.groups:
        names = " + ".join(tensor.name for tensor in group.tensors)
        tokens = group.capacity_tokens(1)
        size = sum(tensor.nbytes(tokens) for tensor in group.tensors) * len(group.layers)
        per = "token" if group.rule is ReuseRule.ATTENTION else "checkpoint"
        layers = ", ".join(str(layer) for layer in group.layers[:12]) + (" ..." if len(group.layers) > 12 else "")
        lines.append(f"{group.name}: {names} of layers {layers}; {format_bytes(size)} per {per}")
    return tuple(lines)


def layer_words(spec: ModelSpec) -> dict[int, str]:
    """For each layer the groups that hold its cache."""
    return {layer: " + ".join(group.name for group in spec.groups if layer in group.layers) for layer in spec.layers}


def cache_bytes(spec: ModelSpec, tokens: int, checkpoints: int = 1) -> int:
    """Bytes of a prefix of `tokens` tokens with states at so many lengths."""
    sizes = spec.bytes_by_group(tokens)
    return sum(sizes[group.name] * (1 if group.rule is ReuseRule.ATTENTION else checkpoints) for group in spec.groups)
