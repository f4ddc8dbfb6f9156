"""Many requests at random, over an engine with too little of everything, against the engine without kvstore.

`python -m tests.engines.vllm.soak --model window --rounds 200 --seed 5`; the matrix runs a few rounds of it.

Prompts form trees: each goes on from a beginning of another one, of any length. Pages are so few that requests are
preempted and the engine's own cache is evicted, memory and disk so small that the store evicts, and steps end anywhere.
Several run at once, some twice, for several tenants; some are aborted while they are loaded or decode. Where steps end
differs from the reference then, so what is asked for is the engine's own spread: between runs of the same prompts
without kvstore, together, alone, and in other steps. A run in which one load in a few is spoiled has to exceed it.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tests.engines.environment import BUILD, prepare
from tests.engines.matrix import Answer, Cell, distance, judge
from tests.engines.vllm.engine import Engine, EngineError, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.engines.environment import Environment

PROMPT_TOKENS = 900
AT_ONCE = 6
ROUNDS = 5
SPOILED_ROUNDS = 8
"""At most; a control ends when it is caught."""
ONE_IN = 2
"""Loads of the control of which one is spoiled."""
STEP_TOKENS = {"dense": 203, "window": 203, "hybrid": 301}
PAGES = {"dense": 14, "window": 20, "hybrid": 18}
COMPARED_TOKENS = {"dense": 200, "window": 200, "hybrid": 2}
"""Of each answer. In bfloat16 a hybrid model that decodes for long is far from itself; what is loaded shows at once."""
SALTS = ("", "tenant one", "tenant two")
CASES = ("soak", "soak, no async scheduling")


def options_of(model: str, *, is_async: bool) -> dict[str, Any]:
    """What an engine of the soak has otherwise than those of the matrix."""
    return {
        "max_num_batched_tokens": STEP_TOKENS[model],
        "num_gpu_blocks_override": PAGES[model],
        "async_scheduling": is_async,
    }


def settings_of(name: str, folder: Any, *, saves_decoded: bool) -> dict[str, Any]:
    """A store that evicts, from memory and from disk."""
    return {
        "weights": name,
        "dram": "6MiB",
        "ssd": [f"{folder}:32MiB"],
        "saves_decoded": saves_decoded,
    }


class Trees:
    """Requests whose prompts share beginnings of any length."""

    def __init__(self, seed: str) -> None:
        self._numbers = random.Random(seed)
        self._prompts: list[tuple[tuple[int, ...], str]] = []

    def round(self) -> list[Request]:
        """Requests that run together; some of them twice."""
        numbers = self._numbers
        requests: list[Request] = []
        while len(requests) < AT_ONCE:
            abort = numbers.choice((0, 1, 3)) if numbers.random() < 0.15 else None
            ids, salt = self._prompt()
            request = Request(
                ids,
                numbers.choice((1, 2, 8, 24, 140)) if abort is None else 24,
                salt=salt,
                abort_after=abort,
            )
            requests += [request] * (2 if numbers.random() < 0.2 else 1)
        return requests

    @property
    def forgets(self) -> bool:
        """Whether the engine's own cache is emptied before a round."""
        return self._numbers.random() < 0.6

    def _prompt(self) -> tuple[tuple[int, ...], str]:
        """Token ids and tenant."""
        numbers = self._numbers
        if len(self._prompts) < 2 or numbers.random() < 0.1:
            ids, salt = self._more(800), numbers.choice(SALTS)
        else:
            # Recent ones more often, and their ends: what is cached is there.
            parent, salt = self._prompts[-1 - min(int(numbers.expovariate(0.3)), len(self._prompts) - 1)]
            cut = len(parent) if numbers.random() < 0.5 else numbers.randrange(len(parent)) + 1
            if numbers.random() < 0.3:
                cut = max(1, cut // 128 * 128)
            ids = (parent[:cut] + self._more(numbers.choice((1, 10, 70, 260))))[:PROMPT_TOKENS]
            if numbers.random() < 0.1:
                salt = numbers.choice(SALTS)
        self._prompts.append((ids, salt))
        return ids, salt

    def _more(self, tokens: int) -> tuple[int, ...]:
        return tuple(self._numbers.randrange(3, 500) for _ in range(self._numbers.randrange(tokens) + 1))


@dataclass
class Sum:
    """What came of rounds."""

    answers: list[Answer] = field(default_factory=list)
    references: list[Answer] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    spread: float = 0.0
    faults: int = 0
    counts: dict[str, float] = field(default_factory=lambda: {"requests": 0, "cached": 0, "preemptions": 0})

    @property
    def difference(self) -> float:
        return distance(self.references, self.answers)

    def worst(self) -> str:
        """The request that differs most, to find it again."""
        number = max(range(len(self.answers)), key=lambda at: distance([self.references[at]], [self.answers[at]]))
        request = self.requests[number]
        return (
            f"request {number}: {len(request.ids)} tokens, {request.max_tokens} decoded, salt {request.salt!r}, "
            f"{self.answers[number].cached_tokens} cached"
        )


class Soak:
    """Rounds over one engine with kvstore, and one without.

    Args:
        plain: without kvstore; its pages are enough.
        engine: with kvstore.
        model: that both run.
    """

    def __init__(self, plain: Engine, engine: Engine, model: str, seed: str) -> None:
        self._plain = plain
        self._engine = engine
        self._model = model
        self._seed = f"{model} {seed}"

    def run(self, name: str, rounds: int, fault: str = "", said: Callable[[str], None] | None = None) -> Sum:
        """So many rounds of prompts that no other `name` has; with a fault until it shows."""
        trees = Trees(f"{self._seed} {name}")
        total = Sum()
        for number in range(rounds):
            requests = trees.round()
            ran = self._engine.generate(*requests, fault=fault, forgets=trees.forgets)
            kept = [at for at, request in enumerate(requests) if request.abort_after is None]
            asked = [Request(requests[at].ids, requests[at].max_tokens) for at in kept]
            reference = self._plain.generate(*asked).answers
            total.spread = max(total.spread, self._spread(asked, reference))
            total.answers += [self._cut(ran.answers[at]) for at in kept]
            total.references += map(self._cut, reference)
            total.requests += [requests[at] for at in kept]
            total.faults += ran.faults
            total.counts["requests"] += len(requests)
            total.counts["cached"] += sum(ran.cached_tokens)
            total.counts["preemptions"] += sum(map(_restarts, ran.steps))
            if said is not None:
                shown = f"{total.difference:.3g}, spread {total.spread:.3g}, faults {total.faults}"
                said(f"{name}, {number}: {shown}, cached {total.counts['cached']}")
            if fault and total.difference > 2 * total.spread and total.faults:
                break
        return total

    def _spread(self, requests: Sequence[Request], reference: Sequence[Answer]) -> float:
        """What the engine without kvstore says otherwise if it computes alone, or in other steps."""
        worst = 0.0
        for at, request in enumerate(requests):
            ends = tuple(range(97 + 13 * at, len(request.ids), 97 + 13 * at))
            alone = self._plain.generate(Request(request.ids, request.max_tokens, boundaries=ends))
            worst = max(worst, distance([self._cut(reference[at])], [self._cut(alone.answers[0])]))
        return worst

    def _cut(self, answer: Answer) -> Answer:
        count = COMPARED_TOKENS[self._model]
        return Answer(answer.tokens[:count], answer.logprobs[:count], answer.cached_tokens)

    def cell(
        self, engine: str, case: str, faults: Sequence[str], *, rounds: int = ROUNDS,
        said: Callable[[str], None] | None = None,
    ) -> Cell:  # fmt: skip
        """The soak as a cell: within the spread, with nothing left over, and its control caught."""
        total = self.run("all is well", rounds, said=said)
        counts = total.counts
        broken = [f"left: {leak}" for leak in self._engine.leaks()]
        broken += [] if counts["cached"] else ["nothing was cached"]
        counts["evicted"] = self._engine.ask("store")["evicted_records"]
        control = float("inf")
        for fault in faults:
            spoiled = self.run(fault, SPOILED_ROUNDS, f"{fault}/{ONE_IN}", said)
            control = min(control, spoiled.difference if spoiled.faults else 0.0)
        cell = judge(
            engine, self._model, case, reference=total.references, answers=total.answers, spread=total.spread,
            control=control, broken=broken, figures=counts,
        )  # fmt: skip
        if not cell.is_good and said is not None:
            said(total.worst())
        return cell


def _restarts(steps: Sequence[tuple[int, int]]) -> int:
    """How often a request lost its pages and began again."""
    return sum(begin < end for (_, end), (begin, _) in pairwise(steps))


def main() -> int:
    from tests.engines.vllm import cells

    parser = argparse.ArgumentParser(prog="python -m tests.engines.vllm.soak", description=__doc__)
    parser.add_argument("--model", action="append", choices=[model.name for model in cells.MODELS])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--case", action="append", choices=CASES)
    arguments = parser.parse_args()
    environment = prepare("vllm", insists=True)
    folder = BUILD / "soak"
    shutil.rmtree(folder, ignore_errors=True)
    bad = 0
    for cell in _all(environment, folder, arguments):
        print(cells_line(cell), flush=True)
        bad += not cell.is_good
    return 1 if bad else 0


def cells_line(cell: Cell) -> str:
    from tests.engines.report import line

    return line(cell)


def _all(environment: Environment, folder: Any, arguments: argparse.Namespace) -> Iterator[Cell]:
    from tests.engines.vllm import cells

    models = [model for model in cells.MODELS if not arguments.model or model.name in arguments.model]
    log = folder / "models.log"
    environment.run(cells.SCRIPT_OF_MODELS, [str(folder), *(model.name for model in models)], log=log, limit_s=300)
    for model in models:
        own = folder / f"run-{model.name}"
        with Engine(environment, "plain", own, model=folder / model.name, options=cells.options_of(model)) as plain:
            for case in arguments.case or CASES:
                begin = time.monotonic()
                is_async = case == CASES[0]
                settings = settings_of(f"{case} {arguments.seed}", own / f"ssd-{is_async}", saves_decoded=is_async)
                options = cells.options_of(model) | options_of(model.name, is_async=is_async)
                with Engine(
                    environment, f"soak-{is_async}", own, model=folder / model.name, options=options,
                    connector=cells.connector_of(settings),
                ) as engine:  # fmt: skip
                    soak = Soak(plain, engine, model.name, arguments.seed)
                    try:
                        yield soak.cell("vllm", case, model.faults, rounds=arguments.rounds, said=_say)
                    except EngineError as error:
                        print(error, file=sys.stderr)
                        raise
                _say(f"{model.name}, {case}: {time.monotonic() - begin:.0f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
