"""One vLLM instance computes a prompt, another decodes: `python examples/12_vllm_prefill_decode.py [MODEL]`.

Each instance is a process of its own with a store of its own; between machines nothing changes but the address. The
little program in the middle does what a proxy does: it asks the first for one token, and passes the prompt, this token
and the first one's `kv_transfer_params` on to the second.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PROMPT_TOKENS, DECODED_TOKENS = 600, 8
ANY_LOOPBACK = "tcp://127.0.0.1:*"


def serve(connection: Connection, model: str) -> None:
    """An instance: ids, a number of tokens and parameters in; tokens, parameters and what was not computed out."""
    from vllm import LLM, SamplingParams
    from vllm.config import KVTransferConfig

    kvstore = KVTransferConfig(
        kv_connector="KVStoreConnector",
        kv_connector_module_path="kvstore.adapters.vllm.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "weights": f"{model}, seed 0",
            "dram": "256MiB",
            "listen": ["tcp://127.0.0.1:0"],
            "peers": [ANY_LOOPBACK],  # whose hand-overs are taken
        },
    )
    engine = LLM(
        model, skip_tokenizer_init=True, enforce_eager=True, max_model_len=1024,
        kv_cache_memory_bytes=64 << 20, kv_transfer_config=kvstore,
    )  # fmt: skip
    connection.send("ready")
    while (request := connection.recv()) is not None:
        ids, max_tokens, params = request
        sampling = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
            extra_args={"kv_transfer_params": params},
        )  # fmt: skip
        (output,) = engine.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        connection.send((list(output.outputs[0].token_ids), output.kv_transfer_params, output.num_cached_tokens))
    os._exit(0)


class Instance:
    """The proxy's end of an instance."""

    def __init__(self, model: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, model))
        self._process.start()
        other.close()

    def ask(self, ids: list[int], max_tokens: int, params: dict[str, Any]) -> Any:
        self._connection.send((ids, max_tokens, params))
        return self._connection.recv()

    def wait(self) -> None:
        self._connection.recv()

    def end(self) -> None:
        self._connection.send(None)
        self._process.join(30)
        self._process.kill()


def main() -> None:
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed")
        return
    with tempfile.TemporaryDirectory() as folder:
        if len(sys.argv) > 1:
            model = sys.argv[1]
        else:
            model = importlib.import_module("11_vllm_prefix_cache").tiny_model(Path(folder) / "model")
        prefill, decode = Instance(model), Instance(model)
        prefill.wait()
        decode.wait()
        prompt = [3 + 37 * i % 500 for i in range(PROMPT_TOKENS)]
        first, params, _ = prefill.ask(prompt, 1, {"do_remote_decode": True})
        print(f"one instance computed {params['kvstore']['tokens']} tokens and sampled {first}")
        params.pop("remote_prefill_cached_tokens", None)  # vLLM would report it as what the second one had
        tokens, _, taken_over = decode.ask(prompt + first, DECODED_TOKENS, params)
        print(f"the other took over {taken_over} tokens and went on with {tokens}")
        whole, *_ = prefill.ask(prompt, 1 + DECODED_TOKENS, {})
        print("which is what one instance says alone" if first + tokens == whole else f"but one alone says {whole}")
        prefill.end()
        decode.end()


if __name__ == "__main__":
    main()
