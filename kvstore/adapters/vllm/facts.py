"""What vLLM's specs do not say of a model: sizes of all ranks together, and how attention backends lay pages out."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class KeyValueLayout(enum.Enum):
    """How an attention backend takes the elements of a page, whatever shape vLLM gives its tensor."""

    CONTENT = "content"
    """`[pages, heads, tokens, key dim + value dim]`."""
    CPU = "cpu"
    """Of each page and head: keys `[key dim, tokens]`, then values `[tokens, value dim]` (`CPU_ATTN`, `vec`)."""


_LAYOUTS = {
    "FLASH_ATTN": KeyValueLayout.CONTENT,
    "FLASHINFER": KeyValueLayout.CONTENT,
    "TRITON_ATTN": KeyValueLayout.CONTENT,
}
_CPU_INSTRUCTIONS = {"vec", "vec16"}


def key_value_layout(backend: str, instructions: str = "") -> KeyValueLayout:
    """The layout of an attention backend.

    Args:
        backend: `get_attn_backend().get_name()` of the layer.
        instructions: of the CPU's backend: the layer's `isa`.

    Raises:
        UnsupportedModelError: its layout is not known, or cannot be cut into tokens.
    """
    if backend == "CPU_ATTN":
        if instructions in _CPU_INSTRUCTIONS:
            return KeyValueLayout.CPU
        raise UnsupportedModelError(
            f"vLLM's attention for CPUs keeps keys in a form of its own with {instructions!r} instructions; known are "
            f"{', '.join(sorted(_CPU_INSTRUCTIONS))}"
        )
    layout = _LAYOUTS.get(backend)
    if layout is None:
        raise UnsupportedModelError(
            f"it is not known how vLLM's attention backend {backend!r} lays keys and values out; known are CPU_ATTN, "
            f"{', '.join(_LAYOUTS)}. Choose one of them with attention_backend"
        )
    return layout


def layouts_of(names: Iterable[str], modules: Mapping[str, Any]) -> dict[str, KeyValueLayout]:
    """The layout of each layer with keys and values.

    Args:
        names: of the layers; those of states and latents have no entry in the result.
        modules: vLLM's `static_forward_context`.

    Raises:
        UnsupportedModelError: as `key_value_layout`.
    """
    found = {}
    for name in names:
        module = modules[name]
        if not hasattr(module, "head_size_v") and not hasattr(module, "head_size"):
            continue
        backend = module.get_attn_backend().get_name()
        if "MLA" not in backend:
            found[name] = key_value_layout(backend, str(getattr(module, "isa", "")))
    return found


@dataclass(frozen=True)
class ModelFacts:
    """What a rank's spec does not say of the whole model.

    Attributes:
        ranks: tensor-parallel size.
        kv_heads: of the whole model; by layer where layers differ. Needed with several ranks.
        mamba_groups: of B and C of Mamba-2 layers in the whole model. Needed with several ranks.
        is_channel_first: vLLM's `VLLM_SSM_CONV_STATE_LAYOUT` is `DS`: convolution states are `[channels, tokens]`.
        layouts: of keys and values, by the engine's name of the layer; only a worker knows them, and needs them.
    """

    ranks: int = 1
    kv_heads: int | Mapping[int, int] | None = None
    mamba_groups: int | None = None
    is_channel_first: bool = False
    layouts: Mapping[str, KeyValueLayout] | None = None
