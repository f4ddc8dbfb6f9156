"""The two roads from vLLM to kvstore on the same work: its connector, and a tier behind vLLM's own offloading.

Four engines on one machine take turns with the same prompts: `connector` has kvstore's own connector, `tier` has vLLM's
tiered offloading with kvstore behind its host memory, `offloading` has the same without kvstore, `plain` has nothing.

- `cold`: nothing is stored; the prompt is computed, and stored.
- `warm`: a document was stored, the question is new, and the engine's pages are empty. `tier` has lost its host memory,
  too, so that all comes from kvstore; `offloading` has kept it, since it has nothing else.
- `restarted`: the first two were ended and started again, with what lies on disk.

Of each: time to the first token, tokens that were not computed again, bytes that a prompt takes in the store, and the
time that the engine spends inside the connector's methods, which scheduler and forward pass wait for.

    python -m benchmarks.engine_offloading [--model dense|window|hybrid] [--tokens N] [--rounds N] [--output FILE]

The models are those of `make test-engines`: tiny, random weights. A real one computes far longer for each byte.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.paired import Row, report
from kvstore.bench.rows import machine_and_commit, write_rows
from tests.engines.environment import BUILD, prepare
from tests.engines.vllm.cells import MODELS, SCRIPT_OF_MODELS, connector_of, options_of
from tests.engines.vllm.engine import Engine, Request
from tests.engines.vllm.tier_cells import offloading_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.engines.environment import Environment
    from tests.engines.vllm.cells import Model

SIDES = ("connector", "tier", "offloading", "plain")
CASES = ("cold", "warm")
COMPARED = (("connector", "plain"), ("tier", "offloading"), ("connector", "tier"))
QUESTION_TOKENS = 32
HOST_BYTES = 256 << 20


@dataclass
class Side:
    """What was measured of one engine, by case: a value for each round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cached: dict[str, list[int]] = field(default_factory=dict)
    spent_us: dict[str, list[float]] = field(default_factory=dict)
    stored_bytes: list[int] = field(default_factory=list)


class Comparison:
    """The engines of one model."""

    def __init__(self, environment: Environment, folder: Path, model: Model, place: Path, tokens: int) -> None:
        self._environment = environment
        self._folder = folder
        self._options = options_of(model) | {"max_model_len": 2048}
        self._place = place
        self._tokens = tokens
        self._numbers = random.Random(1)
        self.sides = {name: Side() for name in SIDES}

    def _connector(self, side: str) -> dict[str, Any] | None:
        settings = {"weights": "random", "dram": "512MiB", "ssd": [f"{self._folder / side}-ssd:1GiB"]}
        if side == "connector":
            return connector_of(settings)
        if side == "plain":
            return None
        return offloading_of(settings if side == "tier" else None, HOST_BYTES)

    def start(self, engines: ExitStack, sides: Sequence[str]) -> dict[str, Engine]:
        """Start engines, all at once."""
        started = {
            side: engines.enter_context(
                Engine(
                    self._environment, side, self._folder, model=self._place, options=self._options,
                    connector=self._connector(side),
                )
            )
            for side in sides
        }  # fmt: skip
        for engine in started.values():
            engine.wait_until_ready()
        return started

    def _ids(self, count: int) -> tuple[int, ...]:
        return tuple(self._numbers.randrange(3, 500) for _ in range(count))

    def _ask(self, side: str, engine: Engine, case: str, ids: tuple[int, ...], *, is_counted: bool) -> None:
        engine.ask("reset", has_host=side == "offloading")
        if side != "plain":
            engine.ask("times")
        ran = engine.generate(Request(ids, 1), forgets=False)
        if not is_counted:
            return
        own = self.sides[side]
        own.seconds.setdefault(case, []).append(ran.seconds_to_first[0])
        own.cached.setdefault(case, []).append(ran.cached_tokens[0])
        if side != "plain":
            methods = engine.ask("times")["methods"]
            own.spent_us.setdefault(case, []).append(1e6 * sum(took for _, took in methods.values()))

    def measure(self, engines: dict[str, Engine], rounds: int) -> list[tuple[int, ...]]:
        """Cold and warm; the documents that are stored then."""
        documents = []
        for number in range(rounds + 1):
            documents.append(self._ids(self._tokens))
            questions = [self._ids(QUESTION_TOKENS) for _ in CASES]
            order = [*engines][number % len(engines) :] + [*engines][: number % len(engines)]
            for case, question in zip(CASES, questions, strict=True):
                for side in order:
                    before = self._stored(side, engines[side]) if case == "cold" else 0
                    self._ask(side, engines[side], case, (*documents[-1], *question), is_counted=number > 0)
                    if case == "cold" and number and side in ("connector", "tier"):
                        engines[side].ask("reset", has_host=False)
                        self.sides[side].stored_bytes.append(self._stored(side, engines[side]) - before)
        return documents

    def _stored(self, side: str, engine: Engine) -> int:
        return int(engine.ask("store")["stored_bytes"]) if side in ("connector", "tier") else 0

    def measure_restarted(self, engines: dict[str, Engine], documents: Sequence[tuple[int, ...]]) -> None:
        """What lies on disk; each document is read once."""
        for number, document in enumerate(documents):
            question = self._ids(QUESTION_TOKENS)
            for side in engines if number % 2 else reversed(engines):
                self._ask(side, engines[side], "restarted", (*document, *question), is_counted=number > 0)

    def rows(self, model: str) -> list[Row]:
        """Prompts for each second until their first token, of the sides that are compared."""
        rows = []
        for ours, theirs in COMPARED:
            for case in self.sides[ours].seconds.keys() & self.sides[theirs].seconds.keys():
                pairs = list(zip(self.sides[ours].seconds[case], self.sides[theirs].seconds[case], strict=True))
                ratios = [other / own for own, other in pairs]
                mine, others = (statistics.median(1 / each for each in side) for side in zip(*pairs, strict=True))
                name = f"{model}, {case}, {ours}"
                rows.append(Row(name, "1/s", mine, theirs, others, statistics.median(ratios), min(ratios), len(pairs)))
        return sorted(rows, key=lambda row: row.case)

    def figures(self) -> dict[str, dict[str, float]]:
        """By side and case: milliseconds to the first token, tokens reused, µs in the connector, bytes of a prompt."""
        found = {}
        for name, side in self.sides.items():
            for case, seconds in side.seconds.items():
                found[f"{name}, {case}"] = {
                    "first token, ms": 1e3 * statistics.median(seconds),
                    "least, ms": 1e3 * min(seconds),
                    "tokens reused": statistics.median(side.cached[case]),
                    "in the connector, us": statistics.median(side.spent_us.get(case, [0.0])),
                    "least, us": min(side.spent_us.get(case, [0.0])),
                    "stored, bytes": statistics.median(side.stored_bytes or [0]) if case == "cold" else 0,
                }
        return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_offloading", description=__doc__)
    parser.add_argument("--model", action="append", choices=[model.name for model in MODELS])
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/engine_offloading.json"))
    arguments = parser.parse_args()
    environment = prepare("vllm", insists=True)
    folder = BUILD / "bench" / "offloading"
    shutil.rmtree(folder, ignore_errors=True)
    names = arguments.model or [model.name for model in MODELS]
    environment.run(SCRIPT_OF_MODELS, [str(folder / "models"), *names], log=folder / "models.log", limit_s=300)
    rows: list[Row] = []
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for model in (model for model in MODELS if model.name in names):
        place = folder / "models" / model.name
        comparison = Comparison(environment, folder / model.name, model, place, arguments.tokens)
        with ExitStack() as running:
            engines = comparison.start(running, SIDES)
            documents = comparison.measure(engines, arguments.rounds)
            for side in ("connector", "tier"):
                engines[side].ask("reset", has_host=False)
                engines[side].ask("flush")
        with ExitStack() as running:
            engines = comparison.start(running, ("connector", "tier"))
            comparison.measure_restarted(engines, documents)
        rows += comparison.rows(model.name)
        figures[model.name] = comparison.figures()
        for case, said in figures[model.name].items():
            print(f"{model.name}, {case}: " + ", ".join(f"{name} {value:.1f}" for name, value in said.items()))
    report("vLLM: prompts a second until their first token", rows, arguments.output)
    write_rows(arguments.output, rows, (), machine_and_commit(), figures=figures)


if __name__ == "__main__":
    main()
