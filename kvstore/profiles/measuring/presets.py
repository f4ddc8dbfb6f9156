"""Models with random weights that need nothing but transformers."""

from __future__ import annotations

from typing import Any


def preset_fields(name: str) -> tuple[str, dict[str, Any]]:
    """Model type and fields of the configuration of a preset in `PRESETS`."""
    family, size = PRESETS[name]
    is_small = size == "small"
    hidden, head = (512, 64) if is_small else (64, 16)
    heads = hidden // head
    fields: dict[str, Any] = {
        "vocab_size": 8192 if is_small else 512,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 8 if is_small else 4,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": head,
        "max_position_embeddings": 1 << 17,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "hybrid":
        return "qwen3_5_text", {
            **fields,
            "full_attention_interval": 4,
            "linear_num_key_heads": max(heads // 2, 2),
            "linear_num_value_heads": heads,
            "linear_key_head_dim": head,
            "linear_value_head_dim": head,
        }
    return "qwen3", fields


PRESETS = {
    "tiny": ("hybrid", "tiny"),
    "tiny-dense": ("dense", "tiny"),
    "small": ("hybrid", "small"),
    "small-dense": ("dense", "small"),
}
"""Family and size by name: gated-delta layers with every fourth of full attention, or full attention alone."""
