"""Multi-head and grouped-query attention, over everything or over a window, and latent attention.

Shapes are those of `transformers/cache_utils.py` (`DynamicLayer`, `DynamicSlidingWindowLayer`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.errors import UnsupportedModelError
from kvstore.spec.families.mechanism import Mechanism, read_count
from kvstore.spec.group import ReuseRule
from kvstore.spec.shard import Segment
from kvstore.spec.tensor import TensorSpec

if TYPE_CHECKING:
    from kvstore.spec.dtypes import DType


def full_attention(config: Any, dtype: DType) -> Mechanism:
    """Keys and values `[kv heads, tokens, head dim]` of every token."""
    return Mechanism("attention", ReuseRule.ATTENTION, _heads(config, dtype))


def sliding_attention(config: Any, dtype: DType) -> Mechanism:
    """Keys and values `[kv heads, min(tokens, window - 1), head dim]` of the last tokens."""
    return _window(config, dtype, "sliding_window")


def chunked_attention(config: Any, dtype: DType) -> Mechanism:
    """As a sliding window of the chunk's size; only the mask differs."""
    return _window(config, dtype, "attention_chunk_size")


def latent_attention(config: Any, dtype: DType) -> Mechanism:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), cached while compressed.

    The `keys` are the latent `[1, tokens, kv_lora_rank]`, the `values` the rotated part of the key
    `[1, tokens, qk_rope_head_dim]`: their widths differ. Every rank needs both whole.
    """
    latent = (Segment("latent", units=1, unit_rows=1, replicated=True),)
    rank, rope = read_count(config, "kv_lora_rank"), read_count(config, "qk_rope_head_dim")
    return Mechanism(
        "attention",
        ReuseRule.ATTENTION,
        (
            TensorSpec("keys", dtype, latent, (rank,), has_tokens=True),
            TensorSpec("values", dtype, latent, (rope,), has_tokens=True),
        ),
    )


def _window(config: Any, dtype: DType, name: str) -> Mechanism:
    window = read_count(config, name)
    if window < 2:
        raise UnsupportedModelError(
            f"model type {config.model_type!r}: {name}={window} leaves nothing to cache for the next token; "
            "a window has at least 2 tokens"
        )
    return Mechanism("window", ReuseRule.STATE, _heads(config, dtype), window_tokens=window - 1)


def _heads(config: Any, dtype: DType) -> tuple[TensorSpec, TensorSpec]:
    heads = (Segment("heads", units=read_count(config, "num_key_value_heads", "num_attention_heads"), unit_rows=1),)
    if getattr(config, "head_dim", None) is None:
        dim = read_count(config, "hidden_size") // read_count(config, "num_attention_heads")
    else:
        dim = read_count(config, "head_dim")
    return (
        TensorSpec("keys", dtype, heads, (dim,), has_tokens=True),
        TensorSpec("values", dtype, heads, (dim,), has_tokens=True),
    )
