"""A vLLM engine as a process that is told what to do; the other end is `driver.py`."""

from __future__ import annotations

import json
import select
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.engines.environment import NotRunError, end, tail
from tests.engines.matrix import Answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.engines.environment import Environment

DRIVER = Path(__file__).parent / "driver.py"
START_LIMIT_S = 420.0
ASK_LIMIT_S = 300.0

VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # scheduler and worker in the driver's process
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
}


class EngineError(Exception):
    """The engine answered with an error, or is gone."""


@dataclass(frozen=True)
class Request:
    """What an engine is asked to do; see `driver.py`."""

    ids: tuple[int, ...]
    max_tokens: int = 8
    salt: str = ""
    boundaries: tuple[int, ...] = ()
    params: dict[str, Any] | None = None
    abort_after: int | None = None
    preempt_after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ran:
    """What came of requests.

    Attributes:
        steps: for each request the steps that computed something of it, as (start, stop).
        params: what the engine's connector returned with each.
        faults, hooks: how often the fault that was switched on, or the hook, did something.
    """

    answers: tuple[Answer, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]
    params: tuple[dict[str, Any] | None, ...]
    seconds_to_first: tuple[float, ...]
    seconds: float
    faults: int
    hooks: int

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        """How much of each prompt was not computed.

        `num_cached_tokens` says so, too, except after a hand-over, where vLLM reports what the prefill instance had
        found.
        """
        return tuple(steps[0][0] if steps else 0 for steps in self.steps)

    @property
    def preemptions(self) -> int:
        """How often a request lost its pages and began again."""
        return sum(begin < end for steps in self.steps for (_, end), (begin, _) in pairwise(steps))


class Engine:
    """One process; begins to start when made, and is ready when first asked. A context manager that ends it."""

    def __init__(
        self, environment: Environment, name: str, folder: Path, *, model: Path, options: dict[str, Any],
        connector: dict[str, Any] | None = None, variables: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.log = folder / f"{name}.log"
        self._process = environment.start(
            DRIVER, (), log=self.log, variables=VARIABLES | (variables or {}), is_talking=True
        )
        self._tell({"do": "open", "model": str(model), "options": options, "connector": connector})
        self._is_ready = False
        self.start_s = 0.0

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(command) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError(f"{self.name} is gone\n{tail(self.log, 8)}") from None

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        until = time.monotonic() + limit_s
        while not select.select([self._process.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
            if time.monotonic() > until:
                raise EngineError(f"{self.name} did not answer in {limit_s:.0f} s\n{tail(self.log, 8)}")
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended with status {self._process.wait(30)}\n{tail(self.log, 8)}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}\n{tail(self.log, 8)}")
        return answer

    def wait_until_ready(self) -> None:
        """Wait for the engine to have started.

        Raises:
            NotRunError: it did not.
        """
        if not self._is_ready:
            try:
                self.start_s = self._answer(START_LIMIT_S)["seconds"]
            except EngineError as error:
                raise NotRunError(str(error)) from error
            self._is_ready = True

    def ask(self, do: str, **values: Any) -> dict[str, Any]:
        self.wait_until_ready()
        self._tell({"do": do, **values})
        return self._answer(ASK_LIMIT_S)

    def begin(self, *requests: Request, fault: str = "", hook: dict[str, Any] | None = None) -> None:
        """Ask for requests without waiting; `finish` has what came of them."""
        self.wait_until_ready()
        listed = [
            {key: value for key, value in vars(request).items() if value not in (None, "", ())} for request in requests
        ]
        self._tell({"do": "generate", "requests": listed, "fault": fault, "hook": hook})

    def finish(self) -> Ran:
        done = self._answer(ASK_LIMIT_S)
        answers = done["answers"]
        return Ran(
            tuple(map(_answer_of, answers)),
            tuple(tuple((start, stop) for start, stop in each["steps"]) for each in answers),
            tuple(each["params"] for each in answers),
            tuple(each["seconds_to_first"] or float("nan") for each in answers),
            done["seconds"],
            done["faults"],
            done["hooks"],
        )

    def generate(
        self, *requests: Request, fault: str = "", hook: dict[str, Any] | None = None, forgets: bool = True
    ) -> Ran:
        """Run requests together.

        Args:
            forgets: the engine's own prefix cache is emptied first, so that what is found comes from kvstore.
        """
        if forgets:
            self.forget()
        self.begin(*requests, fault=fault, hook=hook)
        return self.finish()

    def forget(self) -> None:
        if not self.ask("reset")["is_done"]:
            raise EngineError(f"{self.name} cannot empty its prefix cache: something still uses pages")

    def leaks(self) -> list[str]:
        """What is held although no request runs; empty if all is well."""
        engine, found = self.ask("engine"), self.ask("store")
        left = {**found["held"], **{key: engine[key] for key in ("pages_used", "requests")}}
        return [f"{name} {value}" for name, value in left.items() if value]

    def kill(self) -> None:
        end(self._process)

    def has_died(self, limit_s: float) -> bool:
        """Whether it ends by itself within a time."""
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def quit(self) -> None:
        """End it in an orderly way, with its store closed; by force if that takes long."""
        try:
            if self._process.poll() is None:
                self._tell({"do": "quit"})
                self._process.wait(60)
        except (EngineError, subprocess.TimeoutExpired):
            pass
        end(self._process)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _answer_of(shown: dict[str, Any]) -> Answer:
    logprobs = tuple({int(key): value for key, value in step.items()} for step in shown["logprobs"])
    return Answer(tuple(shown["tokens"]), logprobs, shown["cached_tokens"])


def ends_of(steps: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Where the steps of a request ended."""
    return tuple(stop for _, stop in steps)
