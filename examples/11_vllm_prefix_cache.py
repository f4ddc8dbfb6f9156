"""kvstore as the prefix cache of vLLM: `python examples/11_vllm_prefix_cache.py [MODEL]`.

Two questions about one document. Between them the engine forgets its own cache, as it does when others need the pages;
the second question finds the document in kvstore all the same, and so does an engine that is started again tomorrow.

MODEL is a folder or a name as for `vllm serve`; without one a tiny model with random weights is made.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

DOCUMENT_TOKENS, QUESTION_TOKENS = 512, 24


def tiny_model(folder: Path) -> str:
    """A Llama of four layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def main() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed")
        return
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else tiny_model(Path(folder) / "model")
        kvstore = KVTransferConfig(
            kv_connector="KVStoreConnector",
            kv_connector_module_path="kvstore.adapters.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "weights": f"{model}, seed 0",  # names the checkpoint: other weights, another cache
                "dram": "256MiB",
                "ssd": [f"{folder}/cache:1GiB"],
            },
        )
        engine = LLM(
            model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024,
            kv_cache_memory_bytes=64 << 20, kv_transfer_config=kvstore,
        )  # fmt: skip
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
        document = [3 + 37 * i % 500 for i in range(DOCUMENT_TOKENS)]
        for number in range(2):
            question = [3 + (11 + number) * i % 500 for i in range(QUESTION_TOKENS)]
            (output,) = engine.generate({"prompt_token_ids": document + question}, sampling, use_tqdm=False)
            tokens = list(output.outputs[0].token_ids)
            print(f"question {number + 1}: {output.num_cached_tokens} of {len(document + question)} tokens were cached")
            print(f"  and it says {tokens}", flush=True)
            engine.reset_prefix_cache()
        sys.stdout.flush()
    os._exit(0)  # whatever an engine still does in the background


if __name__ == "__main__":
    main()
