"""Tiny models with random weights, made in the engine's environment: `python models.py FOLDER NAME ...`.

Weights as a library draws them make a weak oracle: a state that is wiped changes hardly a bit. These are wider, and the
states of linear attention forget slowly, so that what was read long ago still shows in the next token's logprobs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

SEED = 7
WEIGHT_STD = 0.15
IDS: dict[str, int] = {"bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, int] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def config_of(name: str) -> Any:
    """Sizes that the engine's CPU kernels take; linear attention needs heads of 128."""
    if name == "dense":
        return transformers.LlamaConfig(**SIZES, **IDS, head_dim=32)
    if name == "window":
        kinds = ["sliding_attention", "full_attention"] * 2
        return transformers.Gemma3TextConfig(**SIZES, **IDS, head_dim=32, sliding_window=64, layer_types=kinds)
    if name in ("hybrid", "hybrid over ranks"):
        is_split = name == "hybrid over ranks"
        key_heads = 2 if is_split else 1  # ranks have whole heads each
        # Ranks round otherwise than one does: all experts, so that no other expert is chosen because of that.
        chosen = 4 if is_split else 2
        linear = {f"linear_{what}_head_dim": 128 for what in ("key", "value")}
        heads = {
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": 2 * key_heads,
            "linear_conv_kernel_dim": 4,
        }
        experts = {"num_experts": 4, "num_experts_per_tok": chosen, "moe_intermediate_size": 64}
        shared = {"shared_expert_intermediate_size": 64}
        return transformers.Qwen3NextConfig(**SIZES, **IDS, **linear, **heads, **experts, **shared, head_dim=128)
    raise ValueError(f"no such model: {name}")


def make(name: str, folder: Path) -> None:
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name)).to(torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in parameter_name:
                parameter.normal_(0, WEIGHT_STD)
        if name == "window":  # whose embedding is the last layer too: it would say again and again what it read
            model.model.embed_tokens.weight.mul_(0.1)
            model.model.norm.weight.fill_(6.0)
        for layer in model.model.layers:
            linear = getattr(layer, "linear_attn", None)
            if linear is not None:
                linear.A_log.copy_(torch.log(torch.empty_like(linear.A_log).uniform_(0.01, 0.3)))
                linear.dt_bias.fill_(-3.0)
    model.save_pretrained(folder / name)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        make(each, Path(sys.argv[1]))
