"""SGLang's whole engine, in two processes over one store: the second finds what the first has computed."""

from __future__ import annotations

import json
import os
import random
import select
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.environment import NotRunError, end, tail
from tests.engines.matrix import Answer, Cell, Verdict, distance, holds, judge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.engines.environment import Environment

ENGINE, MODEL, PARALLEL = "sglang", "engine, dense", "engine, tensor parallel"
HERE = Path(__file__).parent
MODELS = HERE.parent / "vllm" / "models.py"
START_LIMIT_S, ASK_LIMIT_S = 420.0, 120.0
PROMPT_TOKENS, PAGE_TOKENS, DECODED = 100, 16, 8
PAGES = PROMPT_TOKENS // PAGE_TOKENS
WHOLE_PAGES_TOKENS = PAGES * PAGE_TOKENS
QUICK_CASES = ("cold", "engine's own cache", "restarted, warm disk", "same bytes")
CASES = (*QUICK_CASES, "warm", "two tenants", "node killed", "restarted after a kill", "shut down at once")
PROMPTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
QUICK_PROMPTS = PROMPTS[:2]


def expected(is_quick: bool) -> list[tuple[str, str]]:
    """Models and cases that are reported."""
    if is_quick:
        return [(MODEL, case) for case in QUICK_CASES]
    return [(MODEL, case) for case in CASES] + [(PARALLEL, case) for case in QUICK_CASES]


class EngineError(Exception):
    """The engine answered with an error, or is gone."""


class Engine:
    """One engine process. A context manager that ends it, at once."""

    def __init__(
        self,
        environment: Environment,
        name: str,
        folder: Path,
        variables: Mapping[str, str],
        ranks: int,
        extra: dict[str, Any],
    ) -> None:
        self.log = folder / f"{name}.log"
        self._name = name
        self._process = environment.start(
            HERE / "inside" / "engine.py", (), log=self.log, variables=variables, is_talking=True
        )
        self._tell({"do": "open", "model": str(folder / "dense"), "ranks": ranks, "extra": extra})
        self._answer(START_LIMIT_S)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()

    def generate(self, ids: list[int], *, salt: str = "") -> tuple[Answer, int]:
        """The answer, and how many tokens the engine says came from the storage."""
        self._tell({"do": "generate", "ids": ids, "max_tokens": DECODED, "salt": salt})
        said = self._answer(ASK_LIMIT_S)
        steps = tuple({int(token): logprob for token, logprob in step.items()} for step in said["logprobs"])
        return Answer(tuple(said["tokens"]), steps, said["cached_tokens"]), said["storage_tokens"]

    def stop(self) -> None:
        """As SGLang's server ends when it is told to."""
        self._tell({"do": "stop"})
        self._answer(ASK_LIMIT_S)
        self.kill()

    def shut_down(self) -> None:
        """As a program ends the engine that it has made."""
        self._tell({"do": "shutdown"})
        self._answer(ASK_LIMIT_S)
        self.kill()

    def kill(self) -> None:
        """It and all its processes, as a crash would. Idempotent."""
        end(self._process)

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            raise EngineError(f"{self._name} did not answer in {limit_s:.0f} s\n{tail(self.log)}")
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise EngineError(f"{self._name}: {answer['error']}\n{tail(self.log)}")
        return answer


class Whole:
    """The cells of the whole engine.

    Args:
        variables: what SGLang needs to run here.
        is_quick: only those that CI runs.
        ranks: tensor-parallel processes of each engine.
    """

    def __init__(
        self,
        environment: Environment,
        folder: Path,
        variables: Mapping[str, str],
        *,
        is_quick: bool,
        seed: int,
        ranks: int = 1,
    ) -> None:
        self._environment = environment
        self._folder = folder
        self._model = MODEL if ranks == 1 else PARALLEL
        self._ranks = ranks
        self._is_quick = is_quick
        self._seed = seed
        self._resources = ExitStack()
        self._record, self._fault = folder / "record.jsonl", folder / "fault"
        path = f"{variables['PYTHONPATH']}:{HERE / 'inside'}"
        record = {"KVSTORE_TEST_RECORD": str(self._record), "KVSTORE_TEST_FAULT": str(self._fault)}
        # Which cores a rank may use: SGLang asks for it where ranks outnumber the machine's memory nodes.
        cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
        binding = {"SGLANG_CPU_OMP_THREADS_BIND": cores} if ranks > 1 else {}
        self._variables = {**variables, **record, **binding, "PYTHONPATH": path}

    def cells(self) -> Iterator[Cell]:
        done = set()
        try:
            with self._resources:
                for cell in self._cells():
                    done.add(cell.case)
                    yield cell
        except (EngineError, NotRunError) as error:
            for case in QUICK_CASES if self._is_quick else CASES:
                if case not in done:
                    yield Cell(ENGINE, self._model, case, Verdict.BROKEN, reason=str(error))

    def _start(self, name: str, **settings: Any) -> Engine:
        extra = {
            "backend_name": "kvstore", "module_path": "recording", "class_name": "RecordingHiCache", "interface_v1": 1,
            "weights": f"dense {self._seed}", "prefetch_threshold": PAGE_TOKENS, "attach_again_s": 0.2, **settings,
        }  # fmt: skip
        return Engine(self._environment, name, self._folder, self._variables, self._ranks, extra)

    def _cells(self) -> Iterator[Cell]:
        log = self._folder / "models.log"
        self._environment.run(MODELS, [str(self._folder), "dense"], log=log, limit_s=300.0, variables=self._variables)
        sockets = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-"))  # a short path
        socket = f"{sockets}/store.sock"
        owner = {"own_socket": socket, "dram": "64MiB", "ssd": [f"{self._folder / 'disk'}:128MiB"]}
        numbers = random.Random(self._seed)
        prompts = {name: [numbers.randrange(3, 500) for _ in range(PROMPT_TOKENS)] for name in PROMPTS}
        names = QUICK_PROMPTS if self._is_quick else PROMPTS
        cold, hit = {}, {}
        with self._start("first", **owner) as first:
            broken = []
            for name in names:
                cold[name], from_storage = first.generate(prompts[name])
                # The engine's own hit computes what a hit in the store leaves to compute: the reference for that.
                hit[name], from_storage = first.generate(prompts[name])
                broken += [f"{from_storage} tokens came from the storage"] if from_storage else []
            found = max(each.cached_tokens for each in cold.values())
            least = min(each.cached_tokens for each in hit.values())
            verdict = Verdict.DIFFERENT if found else Verdict.EQUAL
            yield Cell(ENGINE, self._model, "cold", verdict, found, control=least)
            spread = distance(list(cold.values()), list(hit.values()))
            broken += [] if least == WHOLE_PAGES_TOKENS else ["it did not hit"]
            yield holds(ENGINE, self._model, "engine's own cache", broken, {"cold differs by": spread})
            self._wait_for_pages(len(names) * PAGES)
            first.stop()
        with ExitStack() as engines:
            second = engines.enter_context(self._start("second", **owner))
            yield self._found(second, "restarted, warm disk", prompts["one"], hit["one"], prompts["two"], hit["two"])
            yield self._same_bytes()
            if self._is_quick:
                return
            late = {name: [numbers.randrange(3, 500) for _ in range(PROMPT_TOKENS)] for name in ("kill", "shutdown")}
            saved = len(self._keys("set"))
            cold["kill"], _ = second.generate(late["kill"])
            hit["kill"], _ = second.generate(late["kill"])
            self._wait_for_pages(saved + PAGES)
            third = engines.enter_context(self._start("third", socket=socket))
            yield self._found(third, "warm", prompts["one"], hit["one"], prompts["two"], hit["two"])
            yield self._tenants(third, prompts, cold, hit)
            second.kill()
            answer, from_storage = third.generate(prompts["four"])
            broken = [f"{from_storage} tokens came from a dead store"] if from_storage else []
            with self._faulty(do="claim"):
                faulty, claimed = third.generate(prompts["five"])
            broken += [] if claimed else ["the control claimed nothing"]
            cell = judge(ENGINE, self._model, "node killed", reference=[cold["four"]], answers=[answer], broken=broken)
            yield replace(cell, control=distance([cold["five"]], [faulty]))
            third.kill()
            fourth = engines.enter_context(self._start("fourth", **owner))
            case = "restarted after a kill"
            yield self._found(fourth, case, late["kill"], hit["kill"], prompts["six"], hit["six"])
            yield self._shut_down_at_once(fourth, owner, late["shutdown"])

    def _found(
        self, engine: Engine, case: str, ids: list[int], reference: Answer, other: list[int], others: Answer
    ) -> Cell:
        """A prompt that lies in the store, against the engine's own hit; the control has a page of another zeroed."""
        answer, from_storage = engine.generate(ids)
        broken = [] if from_storage == WHOLE_PAGES_TOKENS else [f"{from_storage} tokens came from the storage"]
        with self._faulty(do="zero"):
            faulty, read = engine.generate(other)
        broken += [] if read else ["the control read nothing"]
        cell = judge(
            ENGINE, self._model, case, reference=[reference], answers=[answer], broken=broken,
            figures={"storage tokens": from_storage},
        )  # fmt: skip
        return replace(cell, control=distance([others], [faulty]))

    def _tenants(
        self, engine: Engine, prompts: dict[str, list[int]], cold: dict[str, Answer], hit: dict[str, Answer]
    ) -> Cell:
        """Somebody else finds nothing of a prompt that is there; the control is given the pages of somebody else."""
        before = self._keys("set")
        answer, from_storage = engine.generate(prompts["three"], salt="somebody else")
        broken = [f"{from_storage} tokens of another tenant"] if from_storage or answer.cached_tokens else []
        self._wait_for_pages(len(before) + PAGES)
        theirs = [key for key in self._keys("set") if key not in before]
        own, from_storage = engine.generate(prompts["three"])
        broken += [] if from_storage == WHOLE_PAGES_TOKENS else [f"its own tenant found {from_storage} tokens"]
        with self._faulty(do="plant", keys=theirs):
            faulty, planted = engine.generate(prompts["seven"])
        broken += [] if planted == WHOLE_PAGES_TOKENS else [f"{planted} tokens were planted"]
        cell = judge(
            ENGINE,
            self._model,
            "two tenants",
            reference=[cold["three"], hit["three"]],
            answers=[answer, own],
            broken=broken,
        )
        return replace(cell, control=distance([hit["seven"]], [faulty]))

    def _shut_down_at_once(self, engine: Engine, owner: dict[str, Any], ids: list[int]) -> Cell:
        """SGLang kills its schedulers right after the pages are in the store: what reached the disk is right."""
        saved = len(self._keys("set"))
        cold, _ = engine.generate(ids)
        hit, _ = engine.generate(ids)
        self._wait_for_pages(saved + PAGES)
        engine.shut_down()
        with self._start("fifth", **owner) as last:
            answer, from_storage = last.generate(ids)
        broken = [] if from_storage == answer.cached_tokens else ["tokens came from elsewhere"]
        # Fewer pages leave other chunks to compute: equal bits are asked for where the engine has computed the same.
        reference = {0: [cold], WHOLE_PAGES_TOKENS: [hit]}.get(from_storage)
        figures = {"storage tokens": float(from_storage)}
        if reference is None:
            return holds(ENGINE, self._model, "shut down at once", broken, figures)
        return judge(
            ENGINE,
            self._model,
            "shut down at once",
            reference=reference,
            answers=[answer],
            broken=broken,
            figures=figures,
        )

    @contextmanager
    def _faulty(self, **fault: Any) -> Iterator[None]:
        """What the engines read meanwhile is wrong, in a way of `recording`."""
        self._fault.write_text(json.dumps(fault))
        try:
            yield
        finally:
            self._fault.unlink()

    def _wait_for_pages(self, count: int) -> None:
        """Until so many pages have been saved: SGLang does it after it has answered."""
        until = time.monotonic() + ASK_LIMIT_S
        while (saved := sum(len(ranks) for ranks in self._keys("set").values())) < count * self._ranks:
            if time.monotonic() > until:
                raise EngineError(f"{saved} of {count * self._ranks} pages were saved\n{tail(self._record)}")
            time.sleep(0.05)

    def _keys(self, call: str) -> dict[str, set[str]]:
        """Names of the pages that a call moved, in their order, and under each, digests of what which rank moved."""
        found: dict[str, set[str]] = {}
        lines = self._record.read_text().splitlines(keepends=True) if self._record.exists() else []
        for row in (json.loads(line) for line in lines if line.endswith("\n")):  # the last one may be half written
            if row["call"] == call:
                found.setdefault(row["key"], set()).add(f"{row['rank']} {row['sha256']}")
        return found

    def _same_bytes(self) -> Cell:
        """What one process wrote from its host pool and another read into its own."""
        written, read, faulty = (self._keys(call) for call in ("set", "get", "get, faulty"))
        differing = sum(read[key] != written.get(key) for key in read)
        caught = sum(faulty[key] != written.get(key) for key in faulty)
        verdict = Verdict.DIFFERENT if differing else Verdict.EQUAL
        if not read:
            verdict = Verdict.BROKEN
        return Cell(ENGINE, self._model, "same bytes", verdict, differing, control=caught, figures={"pages": len(read)})
