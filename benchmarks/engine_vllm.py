"""vLLM with kvstore and without: time to the first token, and what the adapter costs a request.

Two engines on one machine take turns, with prompts of the same lengths: one has kvstore as its connector, the other
has none. `cold`: nothing is stored; ours computes, and stores what it computed. `warm`: a document is stored, a
question is new, and the engines' own caches are empty: ours loads, the other computes again. `own cache`: the same with
the engines' own caches full, where kvstore has nothing to give and should cost nothing. Besides, the time that the
engine spends inside the connector's methods, by request: its scheduler and its forward pass wait for them, while loads
go on behind them.

    python -m benchmarks.engine_vllm [--model dense|window|hybrid] [--tokens N] [--rounds N] [--output FILE]

The models are those of `make test-engines`: tiny, random weights. A real one computes far longer for each byte.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path

from benchmarks.paired import Row, report
from kvstore.bench.rows import machine_and_commit, write_rows
from tests.engines.environment import BUILD, prepare
from tests.engines.vllm.cells import MODELS, SCRIPT_OF_MODELS, connector_of, options_of
from tests.engines.vllm.engine import Engine, Request

CASES = ("cold", "warm", "own cache")
QUESTION_TOKENS = 32

Spent = dict[str, list[dict[str, float]]]
"""Seconds by method of the connector, of each round of each case."""


def measure(
    ours: Engine, plain: Engine, tokens: int, rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], Spent]:
    """Seconds to the first token of both engines, by case and round, and seconds inside the connector's methods."""
    numbers = random.Random(1)
    seconds: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    spent: Spent = {case: [] for case in CASES}
    for number in range(rounds + 1):
        document = tuple(numbers.randrange(3, 500) for _ in range(tokens))
        questions = [tuple(numbers.randrange(3, 500) for _ in range(QUESTION_TOKENS)) for _ in CASES]
        for case, question in zip(CASES, questions, strict=True):
            request = Request((*document, *question), 1)
            both = []
            for engine in (ours, plain) if number % 2 else (plain, ours):
                if case != "own cache":
                    engine.forget()
                if engine is ours:
                    engine.ask("times")
                ran = engine.generate(request, forgets=False)
                both.append((engine is plain, ran.seconds_to_first[0]))
                if engine is ours and number:
                    methods = engine.ask("times")["methods"]
                    spent[case].append({name: took for name, (_, took) in methods.items()})
            if number:  # one round is not counted
                mine, theirs = (took for _, took in sorted(both))
                seconds[case].append((mine, theirs))
    return seconds, spent


def rows_of(model: str, seconds: dict[str, list[tuple[float, float]]]) -> list[Row]:
    """Prompts for each second until their first token."""
    rows = []
    for case, pairs in seconds.items():
        ratios = [theirs / mine for mine, theirs in pairs]
        mine, theirs = (statistics.median(1 / side for side in sides) for sides in zip(*pairs, strict=True))
        name = f"{model}, {case}"
        rows.append(Row(name, "1/s", mine, "no connector", theirs, statistics.median(ratios), min(ratios), len(pairs)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_vllm", description=__doc__)
    parser.add_argument("--model", action="append", choices=[model.name for model in MODELS])
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/engine_vllm.json"))
    arguments = parser.parse_args()
    environment = prepare("vllm", insists=True)
    folder = BUILD / "bench" / "vllm"
    shutil.rmtree(folder, ignore_errors=True)
    names = arguments.model or [model.name for model in MODELS]
    environment.run(SCRIPT_OF_MODELS, [str(folder / "models"), *names], log=folder / "models.log", limit_s=300)
    rows: list[Row] = []
    costs: dict[str, dict[str, float]] = {}
    for model in (model for model in MODELS if model.name in names):
        with ExitStack() as engines:
            place = folder / "models" / model.name
            options = options_of(model) | {"max_model_len": 2048}
            extra = {"weights": model.name, "dram": "1GiB"}
            ours, plain = (
                engines.enter_context(
                    Engine(environment, name, folder / model.name, model=place, options=options, connector=connector)
                )
                for name, connector in (("kvstore", connector_of(extra)), ("plain", None))
            )
            seconds, spent = measure(ours, plain, arguments.tokens, arguments.rounds)
        rows += rows_of(model.name, seconds)
        for case, pairs in seconds.items():
            mine, theirs = zip(*pairs, strict=True)
            print(
                f"{model.name}, {case}: first token after {1e3 * statistics.median(mine):.1f} ms "
                f"(min {1e3 * min(mine):.1f}) with kvstore, {1e3 * statistics.median(theirs):.1f} ms "
                f"(min {1e3 * min(theirs):.1f}) without"
            )
            every = sorted({name for each in spent[case] for name in each})
            each_us = {name: 1e6 * statistics.median(one.get(name, 0.0) for one in spent[case]) for name in every}
            totals = [1e6 * sum(one.values()) for one in spent[case]]
            each_us |= {"in all": statistics.median(totals), "in all, min": min(totals)}
            costs[f"{model.name}, {case}"] = each_us
            print("  in the connector's methods, µs: " + ", ".join(f"{name} {us:.0f}" for name, us in each_us.items()))
    report("vLLM: prompts a second until their first token", rows, arguments.output)
    write_rows(arguments.output, rows, (), machine_and_commit(), connector_us=costs)


if __name__ == "__main__":
    main()
