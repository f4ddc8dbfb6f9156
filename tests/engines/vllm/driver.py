"""One vLLM engine that does what it is told, line by line: runs in the engine's environment, started by `engine.py`.

A line on standard input is a JSON object with `do`; the answer is a line on standard output. What vLLM prints goes to
standard error. Nothing in here judges.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import nullcontext, suppress
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

LOGPROBS = 8
REQUEST_LIMIT_S = 240.0
SETTLED_S = 15.0


class Boundaries:
    """Cuts a request's prefill where the test wants it, and notes where every step of every request began and ended.

    Only for requests that run alone: the step's token budget is what is set.
    """

    def __init__(self, scheduler: Any) -> None:
        self.wanted: dict[str, list[int]] = {}
        self.steps: dict[str, list[tuple[int, int]]] = {}
        self.preempted_after: dict[str, list[int]] = {}
        self._scheduler = scheduler
        self._schedule = scheduler.schedule
        self._budget = scheduler.max_num_scheduled_tokens
        scheduler.schedule = self
        self._allocate = scheduler.kv_cache_manager.allocate_slots
        scheduler.kv_cache_manager.allocate_slots = self._allocate_unless_preempted
        self._is_preempting = False

    def _allocate_unless_preempted(self, request: Any, *arguments: Any, **options: Any) -> Any:
        """No pages for a request that is to be preempted: with it running last, the engine preempts that."""
        ahead = self.preempted_after.get(request.request_id)
        if ahead and request.num_output_tokens >= ahead[0] and request is self._scheduler.running[-1]:
            del ahead[0]
            self._is_preempting = True
            return None
        return self._allocate(request, *arguments, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        scheduler = self._scheduler
        before = {name: request.num_computed_tokens for name, request in scheduler.requests.items()}
        scheduler.max_num_scheduled_tokens = self._budget
        for name, computed in before.items():
            ahead = [end for end in self.wanted.get(name, ()) if end > computed]
            if ahead:
                scheduler.max_num_scheduled_tokens = min(self._budget, ahead[0] - computed)
        output = self._schedule(*arguments, **options)
        if self._is_preempting:
            # What it had computed would be found in the engine's own cache: other requests have taken those pages.
            self._is_preempting = False
            if len(scheduler.requests) == 1 and not scheduler.reset_prefix_cache():
                raise RuntimeError("the engine keeps pages of a request that it has preempted")
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            stop = request.num_computed_tokens  # the scheduler has counted the step already
            self.steps.setdefault(name, []).append((stop - count, stop))
        return output


class Driver:
    """The engine and what is done with it."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.has_tiers = False
        self.boundaries: Any = None
        self.stores: list[Any] = []
        self.faults: Any = None
        self.hooks: Any = None
        self.timers: Any = None
        self.has_ranks = False
        self._count = 0

    def do_open(self, model: str, options: dict[str, Any], connector: dict[str, Any] | None) -> dict[str, Any]:
        """Start the engine; with a connector, kvstore's faults and hooks are there to be switched on."""
        begin = time.monotonic()
        from vllm import LLM

        if connector is not None:
            import faults
            import timers
            from vllm.config import KVTransferConfig

            self.has_tiers = connector["kv_connector"] == "OffloadingConnector"
            if self.has_tiers:
                import tier_faults

                self.faults = tier_faults.Faults()
            else:
                self.faults = faults.Faults()
            self.stores = faults.note_stores()
            options = options | {"kv_transfer_config": KVTransferConfig(**connector)}
        self.has_ranks = options.get("tensor_parallel_size", 1) > 1
        if self.has_ranks:
            options = options | {"worker_extension_cls": "ranks.RankFaults"}
        self.llm = LLM(model=model, **options)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.boundaries = Boundaries(self.scheduler)
        if connector is not None:
            tiers = self._tiers()
            if tiers:
                self.hooks = tier_faults.Hooks(tiers[0])
            elif not self.has_tiers:
                self.hooks = faults.Hooks(self.scheduler.connector)
            if not self.has_ranks:
                self.timers = timers.Timers(self.scheduler.connector)
        if self.has_ranks:
            self.llm.collective_rpc("kvstore_open")
        return {"seconds": time.monotonic() - begin}

    def do_generate(
        self, requests: list[dict[str, Any]], fault: str = "", hook: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run requests to their ends, together.

        A request is `ids`, and optionally `salt`, `max_tokens`, `params` (kv_transfer_params), `boundaries` (lengths at
        which steps end; alone only), `abort_after` (tokens; 0: after the first step), `preempt_after` (decoded tokens,
        ascending, at which there are no pages for it).
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        if self.has_ranks:
            self.llm.collective_rpc("kvstore_begin", args=(fault,))
        elif self.faults is not None:
            self.faults.begin(fault)
        if self.hooks is not None:
            self.hooks.begin(hook, self.stores)
        names: list[str] = []
        answers: dict[str, dict[str, Any]] = {}
        begin = time.perf_counter()
        for request in requests:
            self._count += 1
            extra = {"kv_transfer_params": request["params"]} if request.get("params") else None
            sampling = SamplingParams(
                temperature=0, max_tokens=request.get("max_tokens", 8), ignore_eos=True, detokenize=False,
                logprobs=LOGPROBS, extra_args=extra,
            )  # fmt: skip
            prompt: dict[str, Any] = {"prompt_token_ids": request["ids"]}
            if request.get("salt"):
                prompt["cache_salt"] = request["salt"]
            name = engine.add_request(f"test-{self._count}", prompt, sampling)
            names.append(name)
            answers[f"test-{self._count}"] = {
                "request": request,
                "name": name,
                "seconds_to_first": None,
                "is_aborted": False,
            }
            if request.get("boundaries"):
                self.boundaries.wanted[name] = request["boundaries"]
            if request.get("preempt_after"):
                self.boundaries.preempted_after[name] = list(request["preempt_after"])
        until = time.monotonic() + REQUEST_LIMIT_S
        engine_steps = 0
        while engine.has_unfinished_requests():
            if time.monotonic() > until:
                engine.abort_request([name for name in names], internal=True)
                raise TimeoutError(f"requests did not end in {REQUEST_LIMIT_S:.0f} s")
            engine_steps += 1
            outputs = engine.step()
            for answer in answers.values():
                if answer["request"].get("abort_after") == 0 and "output" not in answer and not answer["is_aborted"]:
                    engine.abort_request([answer["name"]], internal=True)  # while it is loaded, or computed
                    answer["is_aborted"] = True
            for output in outputs:
                answer = answers[output.request_id]
                said = output.outputs[0]
                if answer["seconds_to_first"] is None and said.token_ids:
                    answer["seconds_to_first"] = time.perf_counter() - begin
                answer["output"] = output
                limit = answer["request"].get("abort_after")
                if limit is not None and len(said.token_ids) >= limit and not output.finished:
                    engine.abort_request([answer["name"]], internal=True)
        seconds = time.perf_counter() - begin
        settled = time.monotonic() + SETTLED_S
        for _ in range(3):  # what a connector tells its other half goes with a step
            engine.step()
        while self.scheduler.requests and time.monotonic() < settled:  # pages that were being loaded go with the load
            engine.step()
        shown = [self._shown(answer) for answer in answers.values()]
        return {
            "answers": shown,
            "seconds": seconds,
            "engine_steps": engine_steps,
            "faults": self._end_faults(),
            "hooks": 0 if self.hooks is None else self.hooks.end(),
        }

    def _end_faults(self) -> int:
        if self.has_ranks:
            return sum(self.llm.collective_rpc("kvstore_end"))
        return 0 if self.faults is None else int(self.faults.end())

    def _shown(self, answer: dict[str, Any]) -> dict[str, Any]:
        output = answer.get("output")
        said = None if output is None else output.outputs[0]
        logprobs = [] if said is None else said.logprobs or []
        return {
            "tokens": [] if said is None else list(said.token_ids),
            "logprobs": [{str(key): value.logprob for key, value in step.items()} for step in logprobs],
            "cached_tokens": 0 if output is None else output.num_cached_tokens or 0,
            "params": None if output is None else output.kv_transfer_params,
            "seconds_to_first": answer["seconds_to_first"],
            "steps": self.boundaries.steps.get(answer["name"], []),
        }

    def _tiers(self) -> list[Any]:
        """The engine's secondary tiers."""
        return list(self.scheduler.connector.connector_scheduler.manager.secondary_tiers) if self.has_tiers else []

    def do_reset(self, has_host: bool = False) -> dict[str, Any]:
        """Forget the engine's own prefix cache, and unless `has_host` its host memory, once that was stored."""
        if self.has_tiers:
            manager = self.scheduler.connector.connector_scheduler.manager
            until = time.monotonic() + REQUEST_LIMIT_S
            while manager.has_pending_work() and time.monotonic() < until:
                self.llm.llm_engine.step()
                time.sleep(0.001)
        return {"is_done": bool(self.llm.reset_prefix_cache(reset_connector=self.has_tiers and not has_host))}

    def do_engine(self) -> dict[str, Any]:
        """What the engine holds: pages in use besides the null page, requests."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return {
            "pages_used": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
            "requests": len(self.scheduler.requests),
        }

    def do_times(self) -> dict[str, Any]:
        """What was spent in the connector's methods since the last time this was asked."""
        return {"methods": self.timers.take()}

    def do_store(self, deadline_s: float = 10.0) -> dict[str, Any]:
        """Statistics of the store that lives here, and what is held; waits a while for it to become nothing."""
        import faults

        counted = [tier.statistics() for tier in self._tiers()]
        damaged = sum(each.missed.get("damaged", 0) for each in counted if each is not None)
        return faults.state_of(self.stores, deadline_s) | {"damaged_loads": damaged}

    def do_flush(self, may_lack: bool = False, deadline_s: float = 60.0) -> dict[str, Any]:
        """What was committed since the last flush is on disk; or, where it `may_lack` some, was evicted before."""
        from kvstore.errors import ShelfRefusedError

        for store in self.stores:
            with suppress(ShelfRefusedError) if may_lack else nullcontext():
                store.flush(deadline_s)
        return {"stores": len(self.stores)}

    def do_die_sending(self, frames: int) -> dict[str, Any]:
        """From here on: be killed before that frame of pieces is sent to another instance."""
        import faults

        faults.die_sending(frames)
        return {"frames": frames}

    def do_stored(self, ids: list[int], salt: str = "") -> dict[str, Any]:
        """How much of a prompt the store has."""
        return {"tokens": [store.match(ids, salt=salt.encode()).tokens for store in self.stores if not store.is_closed]}

    def do_layers(self, is_on: bool) -> dict[str, Any]:
        """Save by layer from here on, or at the end of steps."""
        import faults

        return {"workers": faults.save_by_layer(is_on)}

    def do_digests(self, ids: list[int], salt: str = "") -> dict[str, Any]:
        """Of everything that the store has at each resume point of a prompt."""
        import faults

        return {"digests": [faults.digests_of(store, ids, salt.encode()) for store in self.stores]}


def _leave_out_matrix_tiles() -> None:
    """Where a CPU has AMX, vLLM lays bfloat16 pages out for it, which kvstore refuses by name: have it do without."""
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False


def main() -> None:
    _leave_out_matrix_tiles()
    driver = Driver()
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "quit":
            break
        try:
            answer = getattr(driver, f"do_{do}")(**command)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        ANSWERS.write(json.dumps(answer) + "\n")
        ANSWERS.flush()
    for store in driver.stores:
        store.close()
    sys.stderr.flush()
    os._exit(0)  # a shutdown of the engine may hang


if __name__ == "__main__":
    main()
