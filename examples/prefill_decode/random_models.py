"""Hybrid models with random weights from a seed, sharpened so that a wrong cache shows in the output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCABULARY = {"demo": 8192, "tiny": 512}


def build_random_model(family: str, size: str, seed: int) -> Any:
    """A `transformers` model in evaluation mode, float32; equal arguments give equal weights everywhere."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = _fields(family, size)
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed + 1)
    names = {part for name, _ in model.named_parameters() for part in name.split(".")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _sharpen(name, parameter, generator, has_norms="q_norm" in names)
    return model.eval()


def _sharpen(name: str, parameter: torch.Tensor, generator: torch.Generator, *, has_norms: bool) -> None:
    """Weights as they are initialized hardly use the past, and a lost cache would change no token.

    Slow decay and strong writes make recurrent states count; peaked attention makes keys and values count.
    """
    module, leaf = name.split(".")[-2:]
    if leaf == "A_log":
        parameter.uniform_(0.01, 0.3, generator=generator).log_()
    elif leaf == "dt_bias":
        parameter.fill_(-3.0 if "linear_attn" in name else -1.0)
    elif module in ("in_proj_qkv", "in_proj_b"):
        parameter.mul_(2.0)
    elif "mamba" in name and module in ("in_proj", "out_proj"):
        parameter.mul_(3.0)
    elif module == "q_norm":
        parameter.fill_(2.0)
    elif module == "k_norm":
        parameter.fill_(1.0)
    elif module in ("v_proj", "o_proj"):
        parameter.mul_(4.0 if has_norms else 1.5)
    elif module in ("q_proj", "k_proj") and not has_norms:
        parameter.mul_(3.0)


def _fields(family: str, size: str) -> tuple[str, dict[str, Any]]:
    """Model type and configuration: `demo` prefills a thousand tokens a second on a core, `tiny` is for tests."""
    is_demo = size == "demo"
    hidden = 512 if is_demo else 64
    head = 64 if is_demo else 16
    heads = hidden // head
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY[size],
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 8 if is_demo else 4,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": head,
        "max_position_embeddings": 1 << 16,
        "initializer_range": 0.05 if is_demo else 0.2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "qwen3_5":
        return "qwen3_5_text", {
            **common,
            "tie_word_embeddings": True,
            "full_attention_interval": 4,
            "linear_num_key_heads": max(heads // 2, 2),
            "linear_num_value_heads": heads,
            "linear_key_head_dim": head,
            "linear_value_head_dim": head,
        }
    mamba = {
        "mamba_n_heads": 2 * heads,
        "mamba_d_head": head,
        "mamba_d_state": 64 if is_demo else 16,
        "mamba_n_groups": 1,
    }
    if family == "falcon_h1":
        layers = common["num_hidden_layers"] // 2
        return family, {**common, **mamba, "mamba_d_ssm": 2 * hidden, "num_hidden_layers": layers}
    assert family == "bamba"
    attention_layers = [layer for layer in range(common["num_hidden_layers"]) if layer % 4 == 3]
    return family, {**common, **mamba, "attn_layer_indices": attention_layers}
