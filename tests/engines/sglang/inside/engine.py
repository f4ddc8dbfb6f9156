"""One SGLang engine that does what it is told, line by line; the other end is `whole.py`.

A line on standard input is a JSON object with `do`; the answer is a line on standard output. What SGLang prints goes to
standard error.
"""

import json
import os
import sys
import time
import traceback

LOGPROBS = 8
STOP_LIMIT_S = 60.0


class Driver:
    def do_open(self, model, extra, ranks=1):
        import sglang

        began = time.monotonic()
        options = {
            "device": "cpu", "attention_backend": "torch_native", "sampling_backend": "pytorch",
            "grammar_backend": "none", "disable_cuda_graph": True, "disable_overlap_schedule": True,
            "skip_tokenizer_init": True, "skip_server_warmup": True, "dtype": "float32", "page_size": 16,
            "max_total_tokens": 4096, "max_running_requests": 4, "random_seed": 1, "watchdog_timeout": 1000,
            "enable_cache_report": True, "log_level": "info", "tp_size": ranks,
        }  # fmt: skip
        hierarchical = {
            "enable_hierarchical_cache": True, "hicache_ratio": 2.0, "hicache_write_policy": "write_through",
            "hicache_io_backend": "direct", "hicache_mem_layout": "layer_first",
            "hicache_storage_prefetch_policy": "wait_complete", "hicache_storage_backend": "dynamic",
            "hicache_storage_backend_extra_config": json.dumps(extra),
        }  # fmt: skip
        self.engine = sglang.Engine(model_path=model, served_model_name="tiny/engine", **options, **hierarchical)
        return {"seconds": time.monotonic() - began}

    def do_generate(self, ids, max_tokens, salt):
        began = time.monotonic()
        out = self.engine.generate(
            input_ids=ids, cache_salt=salt or None, return_logprob=True, top_logprobs_num=LOGPROBS,
            sampling_params={"temperature": 0, "max_new_tokens": max_tokens, "ignore_eos": True},
        )  # fmt: skip
        about = out["meta_info"]
        steps = [{str(token): logprob for logprob, token, *_ in step} for step in about["output_top_logprobs"]]
        details = about.get("cached_tokens_details") or {}
        return {
            "tokens": out["output_ids"], "logprobs": steps, "cached_tokens": about["cached_tokens"],
            "storage_tokens": details.get("storage", 0), "seconds": time.monotonic() - began,
        }  # fmt: skip

    def do_stop(self):
        """As SGLang's server ends when it is told to: schedulers leave their loops, and what they have is released."""
        from sglang.srt.managers.io_struct import ShutdownReq
        from sglang.srt.utils.cudacore_pyspy_dump_utils import collect_scheduler_processes

        async def tell():
            self.engine.tokenizer_manager._dispatch_to_scheduler(ShutdownReq())

        if self.engine.tokenizer_manager._subprocess_watchdog is not None:
            self.engine.tokenizer_manager._subprocess_watchdog.stop()  # they have not crashed
        began = time.monotonic()
        self.engine.loop.run_until_complete(tell())
        while collect_scheduler_processes():
            if time.monotonic() > began + STOP_LIMIT_S:
                raise RuntimeError(f"a scheduler has not ended in {STOP_LIMIT_S:.0f} s")
            time.sleep(0.05)
        seconds = time.monotonic() - began
        self.engine.shutdown()
        return {"seconds": seconds}

    def do_shutdown(self):
        """As a program that has made an `Engine` ends it: SGLang kills its schedulers."""
        began = time.monotonic()
        self.engine.shutdown()
        return {"seconds": time.monotonic() - began}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    driver = Driver()
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        try:
            answer = getattr(driver, f"do_{do}")(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        if do in ("stop", "shutdown"):
            break
    os._exit(0)


if __name__ == "__main__":
    main()
