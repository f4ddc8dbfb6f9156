"""Tiny models with random weights, one or more of every family that kvstore knows.

Hidden size 64, 2 to 6 layers, 128 token ids: each builds and runs in milliseconds. Random weights as
they are initialized make a weak test, since a recurrent state hardly counts in what comes out;
`build_tiny` sharpens them so that losing one shows in the logits.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

VOCABULARY = 128

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 4096,
}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_DEEPSEEK_EXPERTS = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
_GATED_DELTA = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def tiny_config(model_type: str, **fields: Any) -> Any:
    """A tiny configuration of any model type; `fields` go over the common ones."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **{**_BASE, **fields})


def build_tiny(model: str | Any, dtype: str | torch.dtype = "float32", seed: int = 0) -> Any:
    """A model in evaluation mode, of a name in `TINY` or a configuration; equal seeds give equal weights.

    Weights are sharpened: recurrences forget slowly and attention is peaked.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = TINY[model]() if isinstance(model, str) else model
    element_type = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = AutoModelForCausalLM.from_config(config, dtype=element_type)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                _sharpen(name.rpartition(".")[2], name, parameter)
    return built.eval()


def _sharpen(leaf: str, name: str, parameter: torch.Tensor) -> None:
    if leaf == "A_log":
        parameter.uniform_(0.01, 0.3).log_()
    elif leaf == "dt_bias":
        parameter.fill_(-1.0)
    elif "q_norm" in name or "k_norm" in name:
        parameter.fill_(2.0)


def cache_argument(config: Any) -> str:
    """Name under which the model's forward pass takes the cache."""
    return "cache_params" if config.model_type == "mamba2" else "past_key_values"


def _config(model_type: str, **fields: Any) -> Callable[[], Any]:
    return partial(tiny_config, model_type, **fields)


TINY: dict[str, Callable[[], Any]] = {
    "llama": _config("llama", num_hidden_layers=2),
    "llama_no_grouping": _config("llama", num_hidden_layers=2, num_key_value_heads=4),
    "qwen3": _config("qwen3", num_hidden_layers=2, head_dim=32),
    "mistral": _config("mistral", num_hidden_layers=2, sliding_window=16),
    "gemma3": _config("gemma3_text", num_hidden_layers=6, head_dim=16, sliding_window=16),
    "gemma4": _config(
        "gemma4_text",
        num_hidden_layers=6,
        layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2,
        head_dim=16,
        global_head_dim=32,
        sliding_window=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "gpt_oss": _config(
        "gpt_oss", num_hidden_layers=2, head_dim=16, sliding_window=16, num_local_experts=2, num_experts_per_tok=1
    ),
    "deepseek_v2": _config("deepseek_v2", **_LATENT, **_DEEPSEEK_EXPERTS),
    "deepseek_v3": _config("deepseek_v3", **_LATENT, **_DEEPSEEK_EXPERTS),
    "qwen3_5": _config("qwen3_5_text", **_GATED_DELTA),
    "qwen3_5_moe": _config("qwen3_5_moe_text", **_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_next": _config("qwen3_next", **_GATED_DELTA, **_EXPERTS, shared_expert_intermediate_size=32),
    "olmo_hybrid": _config(
        "olmo_hybrid",
        num_hidden_layers=4,
        linear_num_value_heads=4,
        linear_num_key_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=24,
    ),
    "bamba": _config("bamba", **_MAMBA2, num_hidden_layers=3, attn_layer_indices=[1], mamba_n_groups=1),
    "bamba_groups": _config("bamba", **_MAMBA2, num_hidden_layers=3, attn_layer_indices=[1], mamba_n_groups=2),
    "granite_hybrid": _config(
        "granitemoehybrid",
        **_MAMBA2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_hidden_layers=3,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
    ),
    "nemotron_h": _config(
        "nemotron_h",
        layers_block_type=["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
        head_dim=16,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
    ),
    "falcon_h1": _config("falcon_h1", **_MAMBA2, num_hidden_layers=2, head_dim=16, mamba_d_ssm=128, mamba_n_groups=1),
    "lfm2": _config("lfm2", num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"]),
    "lfm2_moe": _config(
        "lfm2_moe", **_EXPERTS, num_hidden_layers=3, layer_types=["conv", "full_attention", "conv"], num_dense_layers=1
    ),
    "kimi_linear": _config(
        "kimi_linear",
        **{**_LATENT, "q_lora_rank": None},
        num_hidden_layers=4,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
        linear_num_heads=4,
        linear_head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "mamba2": _config("mamba2", num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=1),
}
"""Configuration of each tiny model, by name; every call makes a new one."""
