"""Reuse a prompt's prefix with a transformers model: `python examples/02_prefix_reuse.py`.

Two questions about one document. The second finds the document's cache in the store and computes only
what is new; its logits are bit for bit those of a run without a store.
"""

from __future__ import annotations

import os

# A small model computes in bursts; idle workers that spin only take cores from others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvstore
from kvstore.adapters.transformers import CachedModel

CHUNK_TOKENS = 64


def build_model() -> torch.nn.Module:
    """A small hybrid model: three gated-delta layers and one of attention, with random weights."""
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=32, linear_value_head_dim=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    return model


def main() -> None:
    model = build_model()
    spec = kvstore.ModelSpec.from_transformers(
        model.config, weights="example, seed 0", block_tokens=16, dtype=torch.float32
    )
    document = torch.randint(0, 512, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    questions = [[7, 8, 9], [10, 11]]

    with kvstore.open(spec, dram="64MiB") as store, kvstore.open(spec, dram="64MiB") as empty:
        cached = CachedModel(model, store, chunk_tokens=CHUNK_TOKENS)
        for question in questions:
            answer = cached.generate(document + question, max_new_tokens=8, keep_logits=True)
            assert answer.prefilled is not None
            if answer.prefilled.error is not None:
                print("the store did not help:", answer.prefilled.error)
            match = answer.prefilled.match
            print(
                f"{answer.prompt_tokens} tokens, resumed at {answer.resumed_tokens}, "
                f"first token after {answer.ttft_s * 1e3:.0f} ms, tokens {answer.tokens}"
            )
            if match is not None:
                print(f"  not deeper because {match.missing.reasons[0]}")
        alone = CachedModel(model, empty, chunk_tokens=CHUNK_TOKENS).generate(
            document + questions[-1], max_new_tokens=8, keep_logits=True
        )
    assert answer.resumed_tokens == 256
    assert answer.logits is not None
    assert alone.logits is not None
    assert torch.equal(answer.logits, alone.logits), "reuse must not change a bit"
    print("the logits equal those of a run without reuse, bit for bit")


if __name__ == "__main__":
    main()
