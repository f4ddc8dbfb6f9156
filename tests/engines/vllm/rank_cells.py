"""The cells of tensor parallelism: two ranks in processes of their own, one rank, and a node that both attach to."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.engines.environment import NotRunError
from tests.engines.matrix import Answer, Cell, distance, holds, judge, not_run
from tests.engines.vllm.engine import Engine, EngineError, Ran, Request, ends_of
from tests.engines.vllm.node import ServedNode
from tests.engines.vllm.ranks import RANK_KINDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.engines.environment import Environment

RANKS = 2
CASES = (
    "two ranks, warm",
    "two ranks write, one reads",
    "one rank writes, two read",
    "two ranks, node killed",
    "two ranks, node back",
    "two ranks, node stopped",
    "two ranks, one killed in a save",
)
FOUND_LIMIT_S = 60.0
STEPS_LIMIT_S = 60.0
SPREADS = 2.0
"""What splitting changes is measured on few prompts. Others, and a cache of both, may be so many times as far off."""


@dataclass(frozen=True)
class Tools:
    """What the matrix of a model has for all cells.

    Attributes:
        start: an engine, by name and connector, with environment variables and options of its own.
        connector: a `--kv-transfer-config` of settings.
        pair: a case's prefix, and a prompt that goes on from it.
        reference: what an engine without kvstore says, on steps that end at given lengths.
    """

    environment: Environment
    start: Callable[..., Engine]
    connector: Callable[[dict[str, Any]], dict[str, Any]]
    pair: Callable[[str], tuple[Request, Request]]
    reference: Callable[..., tuple[Answer, ...]]


class RankCells:
    """Of one model."""

    def __init__(self, tools: Tools, model: str, faults: Sequence[str], folder: Path, weights: str) -> None:
        self._tools = tools
        self._model = model
        self._faults = faults
        self._weights = weights
        self._spec_file = folder / "ranks.json"
        ssd = f"{folder / 'ranks'}-ssd:256MiB"
        self.node = ServedNode(
            tools.environment, "ranks", folder, "--spec", str(self._spec_file), "--dram", "96MiB", "--ssd", ssd,
            "--listen", "tcp://127.0.0.1:0",
        )  # fmt: skip
        self._plain_two: Engine
        self._spread = 0.0

    def _start(self, name: str, ranks: int, *, has_store: bool = True) -> Engine:
        settings = {
            "weights": self._weights,
            "socket": self.node.socket,
            "spec_file": str(self._spec_file),
            "attach_again_s": 0.2,
        }
        connector = self._tools.connector(settings) if has_store else None
        if ranks == 1:
            return self._tools.start(name, connector)
        cpus = sorted(os.sched_getaffinity(0))
        if len(cpus) < ranks:
            raise NotRunError(f"{ranks} ranks need {ranks} processors, and there are {len(cpus)}")
        bound = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus[:ranks]))}
        return self._tools.start(name, connector, variables=bound, tensor_parallel_size=ranks)

    def cells(self) -> Iterator[Cell]:
        try:
            two = self._start("two-ranks", RANKS)
            two.wait_until_ready()  # without a node
        except NotRunError as error:  # too few processors or devices, most often
            for case in CASES:
                yield not_run("vllm", self._model, case, str(error))
            return
        self.node.start()
        self._plain_two = self._start("plain-two-ranks", RANKS, has_store=False)
        self._plain_two.wait_until_ready()  # ranks that wait for one another too long while it starts save nothing
        self._find(two, "found")
        control = self._control(two, two, "two warm", RANKS)
        ran, reference, broken = self._warm(two, two, "two warm", RANKS)
        yield self._judged("two ranks, warm", ran, reference, control, broken)

        one = self._start("one-rank", 1)
        one.wait_until_ready()
        control = self._control(one, two, "one two", RANKS)
        ran, reference, broken = self._warm(one, two, "one two", RANKS)
        mixed = self._judged("one rank writes, two read", ran, reference, control, broken, self._spread)
        ran, reference, broken = self._warm(two, one, "two one", 1)
        faults = [self._fault(two, one, f"two one, {kind}", kind, 1) for kind in self._faults]
        yield self._judged("two ranks write, one reads", ran, reference, min(faults), broken, self._spread)
        yield mixed
        yield from self._node_cells(two)
        yield self._killed(two, one)
        for engine in (one, self._plain_two):
            engine.quit()
        self.node.kill()

    # Runs

    def _reference(self, request: Request, ends: Sequence[int], ranks: int) -> tuple[Answer, ...]:
        """Of one rank or two; how far these are apart is the spread."""
        by_one = self._tools.reference(request, ends)
        by_two = self._tools.reference(request, ends, self._plain_two)
        self._spread = max(self._spread, distance(by_one, by_two))
        return by_one if ranks == 1 else by_two

    def _warm(
        self, first: Engine, then: Engine, case: str, ranks: int, fault: str = ""
    ) -> tuple[Ran, tuple[Answer, ...], list[str]]:
        prefix, full = self._tools.pair(case)
        cold = first.generate(prefix)
        broken = ["something was cached"] if cold.cached_tokens[0] else []
        ran = then.generate(full, fault=fault)
        return ran, self._reference(full, _ends(cold, ran), ranks), broken

    def _fault(self, first: Engine, then: Engine, case: str, kind: str, ranks: int) -> float:
        ran, reference, _ = self._warm(first, then, case, ranks, kind)
        return distance(reference, ran.answers) if ran.faults else 0.0

    def _control(self, first: Engine, then: Engine, case: str, ranks: int) -> float:
        """The least that ranks which read each other's share, or one whose share stays blank, change."""
        return min(self._fault(first, then, f"{case}, {kind}", kind, ranks) for kind in RANK_KINDS)

    def _judged(
        self, case: str, ran: Ran, reference: tuple[Answer, ...], control: float | None, broken: Sequence[str],
        spread: float = 0.0,
    ) -> Cell:  # fmt: skip
        cached = ran.cached_tokens[0]
        missed = [] if cached >= 512 else [f"{cached} tokens cached"]
        return judge(
            "vllm", self._model, case, reference=reference, answers=ran.answers, control=control,
            spread=SPREADS * spread, broken=[*broken, *missed], figures={"cached": cached},
        )  # fmt: skip

    def _find(self, engine: Engine, case: str) -> None:
        """Until the engine has found the node, and saves again.

        Raises:
            EngineError: it does not.
        """
        until = time.monotonic() + FOUND_LIMIT_S
        for number in range(1000):
            prefix, _ = self._tools.pair(f"{case}, {number}")
            engine.generate(prefix)
            if any(engine.ask("stored", ids=[*prefix.ids, 0])["tokens"]):
                return
            if time.monotonic() > until:
                break
            time.sleep(0.2)
        raise EngineError("the engine does not find the node")

    # What goes

    def _node_cells(self, two: Engine) -> Iterator[Cell]:
        """The node is killed, comes back, is stopped: an engine of two ranks goes on, and finds it again."""
        prefix, full = self._tools.pair("node killed")
        two.generate(prefix)
        self.node.kill()
        yield self._alone(two, full, "two ranks, node killed")
        self.node.start()
        self._find(two, "node back")
        ran, reference, broken = self._warm(two, two, "node back", RANKS)
        yield self._judged("two ranks, node back", ran, reference, None, broken)

        prefix, full = self._tools.pair("node stopped")
        two.generate(prefix)
        self.node.stop()
        try:
            cell = self._alone(two, full, "two ranks, node stopped")
        finally:
            self.node.go_on()
        self._find(two, "node goes on")
        yield cell

    def _alone(self, two: Engine, full: Request, case: str) -> Cell:
        ran = two.generate(full)
        reference = self._reference(full, ends_of(ran.steps[0]), RANKS)
        broken = [f"{ran.cached_tokens[0]} tokens came from somewhere"] if ran.cached_tokens[0] else []
        broken += [f"it took {ran.seconds:.0f} s"] if ran.seconds > STEPS_LIMIT_S else []
        broken += [f"left: {leak}" for leak in two.leaks()]
        return judge(
            "vllm", self._model, case, reference=reference, answers=ran.answers, broken=broken,
            figures={"seconds": round(ran.seconds, 2)},
        )  # fmt: skip

    def _killed(self, two: Engine, one: Engine) -> Cell:
        """A rank is killed between what it has put and its commit: nothing becomes visible, and nothing is kept."""
        prefix, full = self._tools.pair("rank killed")
        one.generate(self._tools.pair("before the kill")[0])  # one is attached
        self._find(one, "one attached")
        broken = []
        begin = time.monotonic()
        try:
            two.generate(prefix, fault="killed")
            broken.append("no rank was killed")
        except EngineError as error:  # vLLM ends an engine that has lost a worker
            broken += [] if "RuntimeError" in str(error) or "EngineDead" in str(error) else [str(error)]
        seconds = time.monotonic() - begin
        with suppress(EngineError):
            two.kill()
        broken += [f"{each} tokens are visible" for each in one.ask("stored", ids=full.ids)["tokens"] if each]
        broken += [f"left: {leak}" for leak in one.leaks()]
        ran = one.generate(full)
        reference = self._reference(full, ends_of(ran.steps[0]), 1) if not ran.cached_tokens[0] else ()
        broken += [f"it differs by {distance(reference, ran.answers)}"] if distance(reference, ran.answers) else []
        return holds(
            "vllm", self._model, "two ranks, one killed in a save", broken, figures={"seconds": round(seconds, 2)}
        )


def _ends(cold: Ran, ran: Ran) -> tuple[int, ...]:
    """Where the steps ended that computed what was loaded, and those that went on from there."""
    loaded = ran.cached_tokens[0]
    before = tuple(end for end in ends_of(cold.steps[0]) if end < loaded)
    return (*before, loaded, *ends_of(ran.steps[0])) if loaded else ends_of(ran.steps[0])
