"""Which model types are known, and what a layer of each type keeps in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.spec.families.attention import chunked_attention, full_attention, latent_attention, sliding_attention
from kvstore.spec.families.linear import gated_delta, kimi_delta, mamba2, short_convolution

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.spec.families.mechanism import MechanismBuilder


@dataclass(frozen=True)
class Family:
    """Models whose layers are built from the same mechanisms.

    Attributes:
        title: for people.
        model_types: `model_type` of the configurations of text models.
        layers: mechanisms of each layer type; none for a layer without a cache.
    """

    title: str
    model_types: frozenset[str]
    layers: Mapping[str, tuple[MechanismBuilder, ...]]


_HYBRID_MAMBA2 = mamba2(
    heads="mamba_n_heads",
    head_dim="mamba_d_head",
    state="mamba_d_state",
    groups="mamba_n_groups",
    kernel="mamba_d_conv",
)
_NEMOTRON_MAMBA2 = mamba2(
    heads="mamba_num_heads",
    head_dim="mamba_head_dim",
    state="ssm_state_size",
    groups="n_groups",
    kernel="conv_kernel",
)
_PURE_MAMBA2 = mamba2(
    heads="num_heads",
    head_dim="head_dim",
    state="state_size",
    groups="n_groups",
    kernel="conv_kernel",
)

FAMILIES = (
    # A window named in the configuration of one of these is not in the model's mask, but transformers would
    # cut the cache to it: such a layer type is unknown here and refused.
    Family(
        "attention",
        frozenset(
            {
                "apertus", "arcee", "cohere", "ernie4_5", "ernie4_5_moe", "gemma", "glm", "glm4", "glm4_moe", "granite",
                "granitemoe", "hunyuan_v1_dense", "llama", "minimax_m2", "nemotron", "olmo", "olmo2", "phi", "seed_oss",
                "stablelm",
            }
        ),
        {"full_attention": (full_attention,)},
    ),
    Family(
        "attention, full or over a sliding window",
        frozenset(
            {
                "cohere2", "exaone4", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "ministral", "mistral",
                "mixtral", "olmo3", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
            }
        ),
        {"full_attention": (full_attention,), "sliding_attention": (sliding_attention,)},
    ),
    Family(
        "attention, full or within chunks",
        frozenset({"llama4_text"}),
        {"full_attention": (full_attention,), "chunked_attention": (chunked_attention,)},
    ),
    Family(
        "gated delta rule with attention",
        frozenset({"olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}),
        {"full_attention": (full_attention,), "linear_attention": (gated_delta,)},
    ),
    Family(
        "Mamba-2 with attention",
        frozenset({"bamba", "granitemoehybrid"}),
        {"full_attention": (full_attention,), "linear_attention": (_HYBRID_MAMBA2,)},
    ),
    Family(
        "Mamba-2, attention and feed-forward layers",
        frozenset({"nemotron_h"}),
        {"full_attention": (full_attention,), "linear_attention": (_NEMOTRON_MAMBA2,), "mlp": (), "moe": ()},
    ),
    Family(
        "Mamba-2 and attention in one layer",
        frozenset({"falcon_h1"}),
        {"hybrid": (full_attention, _HYBRID_MAMBA2)},
    ),
    Family("Mamba-2", frozenset({"mamba2"}), {"linear_attention": (_PURE_MAMBA2,)}),
    Family(
        "short convolution with attention",
        frozenset({"lfm2", "lfm2_moe"}),
        {"full_attention": (full_attention,), "conv": (short_convolution,)},
    ),
    Family("latent attention", frozenset({"deepseek_v2", "deepseek_v3"}), {"full_attention": (latent_attention,)}),
    Family(
        "Kimi delta attention with latent attention",
        frozenset({"kimi_linear"}),
        {"full_attention": (latent_attention,), "linear_attention": (kimi_delta,)},
    ),
)  # fmt: skip

FAMILY_OF = {model_type: family for family in FAMILIES for model_type in family.model_types}

_IGNORES_STATE = (
    "its forward pass over several tokens starts the recurrence at zero whatever state is cached, so continuing a "
    "prompt from a cache is silently wrong"
)
_OWN_CACHE = "it keeps its cache in a class of its own, with tensors that are not read here"
REFUSED = {
    "deepseek_v4": _OWN_CACHE,
    "falcon_mamba": _IGNORES_STATE,
    "jamba": _IGNORES_STATE,
    "mamba": _IGNORES_STATE,
    "minimax": _OWN_CACHE,
    "recurrent_gemma": "it keeps its recurrent states inside its modules, not in a cache that can be saved",
    "rwkv": _OWN_CACHE,
    "xlstm": _OWN_CACHE,
    "zamba": _IGNORES_STATE,
}
"""Model types that cannot be cached as `transformers` runs them, and why."""
