"""kvstore below SGLang's hierarchical cache: `python examples/13_sglang_hicache.py [MODEL]`.

Two questions about one document. Between them the engine forgets what it has on the GPU and in its own host memory; the
second question finds the document in kvstore all the same, and so would another server at the same socket.

MODEL is a folder or a name as for `sglang serve`; without one a tiny model with random weights is made.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import kvstore

DOCUMENT_TOKENS, QUESTION_TOKENS, PAGE_TOKENS = 512, 24, 16


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
    if importlib.util.find_spec("sglang") is None:
        print("skipped: SGLang is not installed")
        return
    import sglang
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = sys.argv[1] if len(sys.argv) > 1 else tiny_model(Path(folder) / "model")
        backend = {
            "backend_name": "kvstore", "module_path": "kvstore.adapters.sglang", "class_name": "KVStoreHiCache",
            "interface_v1": 1,  # pages are copied from where they lie
            "weights": f"{model}, seed 0",  # names the checkpoint: other weights, another cache
            "dram": "256MiB",
            "ssd": [f"{folder}/cache:1GiB"],
            "own_socket": f"{folder}/store.sock",  # other servers of this host may attach here
        }  # fmt: skip
        on_cpu = {"device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch",
                  "disable_cuda_graph": True, "disable_overlap_schedule": True}  # fmt: skip
        engine = sglang.Engine(
            model_path=model, skip_tokenizer_init=True, grammar_backend="none", page_size=PAGE_TOKENS,
            max_total_tokens=4096, enable_cache_report=True, log_level="warning", skip_server_warmup=True,
            enable_hierarchical_cache=True, hicache_ratio=2.0, hicache_write_policy="write_through",
            hicache_io_backend="direct", hicache_mem_layout="page_first_direct",
            hicache_storage_prefetch_policy="wait_complete", hicache_storage_backend="dynamic",
            hicache_storage_backend_extra_config=json.dumps(backend),
            **({} if torch.cuda.is_available() else on_cpu),
        )  # fmt: skip
        store = kvstore.attach(f"{folder}/store.sock")
        pages = (DOCUMENT_TOKENS + QUESTION_TOKENS) // PAGE_TOKENS
        document = [3 + 37 * i % 500 for i in range(DOCUMENT_TOKENS)]
        for number in range(2):
            question = [3 + (11 + number) * i % 500 for i in range(QUESTION_TOKENS)]
            output = engine.generate(
                input_ids=document + question,
                sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
            )
            found = (output["meta_info"].get("cached_tokens_details") or {}).get("storage", 0)
            print(f"question {number + 1}: {found} of {len(document + question)} tokens came from kvstore")
            print(f"  and it says {output['output_ids']}", flush=True)
            until = time.monotonic() + 60  # SGLang saves after it has answered
            while store.statistics().nodes < pages and time.monotonic() < until:
                time.sleep(0.1)
            engine.flush_cache()
        store.close()
        engine.shutdown()
    os._exit(0)  # whatever an engine still does in the background


if __name__ == "__main__":
    main()
