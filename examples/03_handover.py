"""Prefill in one store, decode from another: `python examples/03_handover.py`.

The two stores would be in two processes on two machines; here they share one, and loopback TCP. What
must not fail silently is shown too: a decode node that is not there.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import kvstore
from kvstore.adapters.transformers import CachedModel

CHUNK_TOKENS = 64
DEADLINE_S = 30.0


def build_model() -> torch.nn.Module:
    """A small model whose layers have attention and a Mamba-2 state side by side, with random weights."""
    config = AutoConfig.for_model(
        "falcon_h1",
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16,
        mamba_n_groups=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-untyped-call]
    return model


def main() -> None:
    model = build_model()
    spec = kvstore.ModelSpec.from_transformers(
        model.config, weights="example, seed 0", block_tokens=16, dtype=torch.float32
    )
    prompt = torch.randint(0, 512, (200,), generator=torch.Generator().manual_seed(1)).tolist()

    with kvstore.open(spec, dram="64MiB") as prefill_store, kvstore.open(spec, dram="64MiB") as decode_store:
        prefill = CachedModel(model, prefill_store, chunk_tokens=CHUNK_TOKENS)
        decode = CachedModel(model, decode_store, chunk_tokens=CHUNK_TOKENS)

        address = decode_store.listen("tcp://127.0.0.1:0").address
        handed = prefill.hand_over(prompt, address)  # layers leave while the next ones compute
        answer = decode.resume(prompt, max_new_tokens=8, deadline_s=DEADLINE_S)
        report = handed.wait(DEADLINE_S)
        print(f"handed over {report.tokens} tokens, {report.total_bytes} bytes; decoded {answer.tokens}")
        print(f"  committed {report.exposed_s * 1e3:.1f} ms after the last layer was computed")

        lost = prefill.hand_over(prompt[::-1], "tcp://127.0.0.1:1")
        try:
            lost.wait(DEADLINE_S)
        except kvstore.KVStoreError as error:
            fallback = prefill.continue_from(lost.prefilled, max_new_tokens=8)
            print(f"nobody took the second prompt ({type(error).__name__}); decoded here: {fallback.tokens}")

        same = prefill.generate(prompt, max_new_tokens=8)
    assert answer.tokens == same.tokens
    print(f"the prefill node itself decodes the same tokens, resuming at {same.resumed_tokens}")


if __name__ == "__main__":
    main()
