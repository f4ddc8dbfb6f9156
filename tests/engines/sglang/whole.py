"""SGLang's whole engine, in two processes over one store: the second finds what the first has computed."""

from __future__ import annotations

import json
import random
import select
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.environment import NotRunError, end, tail
from tests.engines.matrix import Answer, Cell, Verdict, distance, holds, judge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.engines.environment import Environment

ENGINE, MODEL = "sglang", "engine, dense"
HERE = Path(__file__).parent
MODELS = HERE.parent / "vllm" / "models.py"
START_LIMIT_S, ASK_LIMIT_S = 420.0, 120.0
PROMPT_TOKENS, PAGE_TOKENS, DECODED = 100, 16, 8
WHOLE_PAGES_TOKENS = PROMPT_TOKENS // PAGE_TOKENS * PAGE_TOKENS
QUICK_CASES = ("cold", "engine's own cache", "restarted, warm disk", "same bytes")
CASES = (*QUICK_CASES, "warm", "two tenants", "node killed")


class EngineError(Exception):
    """The engine answered with an error, or is gone."""


class Engine:
    """One engine process. A context manager that ends it, at once."""

    def __init__(
        self, environment: Environment, name: str, folder: Path, variables: Mapping[str, str], extra: dict[str, Any]
    ) -> None:
        self.log = folder / f"{name}.log"
        self._name = name
        self._process = environment.start(
            HERE / "inside" / "engine.py", (), log=self.log, variables=variables, is_talking=True
        )
        self._tell({"do": "open", "model": str(folder / "dense"), "extra": extra})
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
    """The cells of the whole engine. `variables` is what SGLang needs to run here."""

    def __init__(
        self, environment: Environment, folder: Path, variables: Mapping[str, str], *, is_quick: bool, seed: int
    ) -> None:
        self._environment = environment
        self._folder = folder
        self._is_quick = is_quick
        self._seed = seed
        self._resources = ExitStack()
        self._record, self._fault = folder / "record.jsonl", folder / "fault"
        path = f"{variables['PYTHONPATH']}:{HERE / 'inside'}"
        record = {"KVSTORE_TEST_RECORD": str(self._record), "KVSTORE_TEST_FAULT": str(self._fault)}
        self._variables = {**variables, **record, "PYTHONPATH": path}

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
                    yield Cell(ENGINE, MODEL, case, Verdict.BROKEN, reason=str(error))

    def _start(self, name: str, **settings: Any) -> Engine:
        extra = {
            "backend_name": "kvstore", "module_path": "recording", "class_name": "RecordingHiCache", "interface_v1": 1,
            "weights": f"dense {self._seed}", "prefetch_threshold": PAGE_TOKENS, "attach_again_s": 0.2, **settings,
        }  # fmt: skip
        return Engine(self._environment, name, self._folder, self._variables, extra)

    def _cells(self) -> Iterator[Cell]:
        log = self._folder / "models.log"
        self._environment.run(MODELS, [str(self._folder), "dense"], log=log, limit_s=300.0, variables=self._variables)
        sockets = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="kvstore-"))  # a short path
        socket = f"{sockets}/store.sock"
        owner = {"own_socket": socket, "dram": "64MiB", "ssd": [f"{self._folder / 'disk'}:128MiB"]}
        numbers = random.Random(self._seed)
        prompts = {
            name: [numbers.randrange(3, 500) for _ in range(PROMPT_TOKENS)] for name in ("one", "two", "three", "four")
        }
        cold, hit = {}, {}
        with self._start("first", **owner) as first:
            broken = []
            for name, ids in prompts.items():
                cold[name], from_storage = first.generate(ids)
                broken += [f"{cold[name].cached_tokens} tokens of an empty cache"] if cold[name].cached_tokens else []
                # The engine's own hit computes what a hit in the store leaves to compute: the reference for that.
                hit[name], from_storage = first.generate(ids)
                broken += [f"{from_storage} tokens came from the storage"] if from_storage else []
            yield holds(ENGINE, MODEL, "cold", broken)
            spread = distance(list(cold.values()), list(hit.values()))
            broken = (
                [] if all(each.cached_tokens == WHOLE_PAGES_TOKENS for each in hit.values()) else ["it did not hit"]
            )
            yield holds(ENGINE, MODEL, "engine's own cache", broken, {"cold differs by": spread})
            self._wait_for_pages(len(prompts) * (WHOLE_PAGES_TOKENS // PAGE_TOKENS))
        with ExitStack() as engines:
            second = engines.enter_context(self._start("second", **owner))
            yield self._found(second, "restarted, warm disk", prompts["one"], hit["one"], prompts["two"], hit["two"])
            yield self._same_bytes()
            if self._is_quick:
                return
            third = engines.enter_context(self._start("third", socket=socket))
            yield self._found(third, "warm", prompts["one"], hit["one"], prompts["two"], hit["two"])
            answer, from_storage = third.generate(prompts["three"], salt="somebody else")
            broken = [f"{from_storage} tokens of another tenant"] if from_storage or answer.cached_tokens else []
            own, from_storage = third.generate(prompts["three"])
            broken += [] if from_storage else ["its own tenant found nothing"]
            yield judge(
                ENGINE, MODEL, "two tenants", reference=[cold["three"], hit["three"]], answers=[answer, own],
                broken=broken, control=[hit["three"], cold["four"]],
            )  # fmt: skip
            second.kill()
            answer, from_storage = third.generate(prompts["four"])
            broken = [f"{from_storage} tokens came from a dead store"] if from_storage else []
            yield judge(
                ENGINE, MODEL, "node killed", reference=[cold["four"]], answers=[answer], broken=broken,
                control=[cold["three"]],
            )  # fmt: skip

    def _found(
        self, engine: Engine, case: str, ids: list[int], reference: Answer, other: list[int], others: Answer
    ) -> Cell:
        """A prompt that lies in the store, against the engine's own hit; the control has a page of another zeroed."""
        answer, from_storage = engine.generate(ids)
        broken = [] if from_storage == WHOLE_PAGES_TOKENS else [f"{from_storage} tokens came from the storage"]
        self._fault.touch()
        faulty, from_storage = engine.generate(other)
        self._fault.unlink()
        broken += [] if from_storage else ["the control read nothing"]
        cell = judge(
            ENGINE, MODEL, case, reference=[reference], answers=[answer], broken=broken,
            figures={"storage tokens": from_storage},
        )  # fmt: skip
        return Cell(**{**vars(cell), "control": distance([others], [faulty])})

    def _wait_for_pages(self, count: int) -> None:
        """Until so many pages have been saved: SGLang does it after it has answered."""
        until = time.monotonic() + ASK_LIMIT_S
        while len(self._recorded("set")) < count:
            if time.monotonic() > until:
                raise EngineError(f"{len(self._recorded('set'))} of {count} pages were saved\n{tail(self._record)}")
            time.sleep(0.1)

    def _recorded(self, call: str) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        lines = self._record.read_text().splitlines() if self._record.exists() else []
        for row in map(json.loads, lines):
            if row["call"] == call:
                found.setdefault(row["key"], set()).add(row["sha256"])
        return found

    def _same_bytes(self) -> Cell:
        """What one process wrote from its host pool and another read into its own."""
        written, read, faulty = (self._recorded(call) for call in ("set", "get", "get, faulty"))
        differing = sum(read[key] != written.get(key) for key in read)
        caught = sum(faulty[key] != written.get(key) for key in faulty)
        verdict = Verdict.DIFFERENT if differing else Verdict.EQUAL
        if not read:
            verdict = Verdict.BROKEN
        return Cell(ENGINE, MODEL, "same bytes", verdict, differing, control=caught, figures={"pages": len(read)})
