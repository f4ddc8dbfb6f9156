"""Model specs to measure with: named models, by the numbers of their published configurations, in bfloat16.

Only what decides the shape of a cache is given. The weights have no identity, so these specs name no cache.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvstore.errors import BenchmarkError
from kvstore.spec import ModelSpec

WEIGHTS = "benchmark"
BLOCK_TOKENS_DEFAULT = 64


def _every(layers: int, step: int, other: str) -> list[str]:
    """Each `step`-th layer is full attention, the others `other`."""
    return ["full_attention" if (layer + 1) % step == 0 else other for layer in range(layers)]


def _at(layers: int, full: tuple[int, ...], other: str) -> list[str]:
    return ["full_attention" if layer in full else other for layer in range(layers)]


SHAPES: dict[str, dict[str, Any]] = {
    # Attention only
    "llama-3.1-8b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    },
    "gemma-3-12b": {
        "model_type": "gemma3_text", "num_hidden_layers": 48, "hidden_size": 3840, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024,
        "layer_types": _every(48, 6, "sliding_attention"),
    },
    # Attention and recurrent states
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 16,
        "num_key_value_heads": 2, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "layer_types": _every(48, 4, "linear_attention"),
    },
    "kimi-linear-48b-a3b": {
        "model_type": "kimi_linear", "num_hidden_layers": 27, "hidden_size": 2304, "num_attention_heads": 32,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "linear_num_heads": 32, "linear_head_dim": 128,
        "linear_conv_kernel_dim": 4, "layer_types": _at(27, (3, 7, 11, 15, 19, 23, 26), "linear_attention"),
    },
    # 15 latent layers of 1152 bytes a token, and states of 173.7 MiB: within .1 % of what the Prefill-as-a-Service
    # paper prints of its hybrid of 1T parameters, whose configuration is not public.
    "paper-1t": {
        "model_type": "kimi_linear", "num_hidden_layers": 60, "hidden_size": 7168, "num_attention_heads": 56,
        "kv_lora_rank": 512, "qk_rope_head_dim": 64, "linear_num_heads": 59, "linear_head_dim": 128,
        "linear_conv_kernel_dim": 4, "layer_types": _every(60, 4, "linear_attention"),
    },
    "bamba-9b": {
        "model_type": "bamba", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
        "num_key_value_heads": 8, "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_n_groups": 1,
        "mamba_d_state": 256, "mamba_d_conv": 4, "layer_types": _at(32, (9, 18, 27), "linear_attention"),
    },
}  # fmt: skip


def shape(name: str, block_tokens: int = BLOCK_TOKENS_DEFAULT) -> ModelSpec:
    """The spec of a named model.

    Raises:
        BenchmarkError: no such name. SpecError: `block_tokens` is out of its limits.
    """
    if name not in SHAPES:
        raise BenchmarkError(
            f"no model shape is called {name!r}; known are {', '.join(SHAPES)}. For another model pass a spec "
            "file, which `kvstore spec` makes"
        )
    config = SimpleNamespace(**SHAPES[name])
    return ModelSpec.from_transformers(config, weights=WEIGHTS, block_tokens=block_tokens, dtype="bfloat16")
