"""What counters and subscribers cost: `python -m benchmarks.watching [--rounds N]`.

Three sides of one call in turn: nothing is counted (the counters are taken away), as ever, and with a subscriber to
everything. A ratio of 1 means that it costs nothing.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import kvstore
from benchmarks.paired import compare, report
from kvstore.pool import Pool
from kvstore.testing.specs import dense, hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.paired import Row

BLOCK_TOKENS = 16
PROMPT_TOKENS = 1600
MORE_TOKENS = 64
TIMES = 2000
THOUSAND = 1000.0


class NothingCounted:
    """Stands where the counters of a store's matches, reads and commits are."""

    def __init__(self) -> None:
        self.meters = self

    def matched(self, prompt: object, match: object, seconds: float) -> None: ...

    def loaded(self, seconds: float) -> None: ...

    def committed(self, seconds: float) -> None: ...


def _rows(case: str, store: kvstore.Store, call: Callable[[], object], times: int, rounds: int) -> list[Row]:
    def repeated() -> None:
        for _ in range(times):
            call()

    def uncounted() -> None:
        counters, nothing = store.observer, cast("Any", NothingCounted())
        store.observer = nothing
        try:
            repeated()
        finally:
            store.observer = counters

    def watched() -> None:
        with store.events():
            repeated()

    amount = times / THOUSAND
    return [
        compare(f"{case}, counted", amount, "k/s", repeated, "not counted", uncounted, rounds=rounds),
        compare(f"{case}, one subscriber", amount, "k/s", watched, "nobody listens", repeated, rounds=rounds),
    ]


def _write(store: kvstore.Store, token_ids: list[int]) -> None:
    with store.write(token_ids) as writer:
        put_all(writer)
        writer.commit()


def _lease(store: kvstore.Store, match: Any) -> None:
    store.read(match).release()


def _begin_and_commit(pool: Pool, store: kvstore.Store, prompt: kvstore.Prompt) -> None:
    """A write of 100 blocks that evicts as many, without the bytes: what the pool decides is all that is timed."""
    with store.write(prompt, resume_at=()) as writer:
        transaction = writer.transaction
        transaction.seal_all(range(len(transaction.records)), [0] * len(transaction.records))
        writer.commit()
    pool.evict(prompt.path.key(0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/watching.json"))
    arguments = parser.parse_args()
    rows: list[Row] = []
    token_ids = [(7 * number) % 1000 for number in range(PROMPT_TOKENS)]
    for make in (dense, hybrid):
        with kvstore.open(make(BLOCK_TOKENS), dram="64MiB") as store:
            _write(store, token_ids)
            hit = store.prompt([*token_ids, 1])
            partial_hit = store.prompt([*token_ids, *range(MORE_TOKENS)])
            pool = store.pool
            assert isinstance(pool, Pool)
            other = store.prompt([5, *token_ids])
            cases: list[tuple[str, Callable[[], object], int]] = [
                ("match, all found", partial(store.match, hit), TIMES),
                ("match, some missed", partial(store.match, partial_hit), TIMES),
                ("lease", partial(_lease, store, store.match(hit)), TIMES // 3),
                ("commit and evict 100 blocks", partial(_begin_and_commit, pool, store, other), TIMES // 40),
            ]
            for case, call, times in cases:
                rows += _rows(f"{make.__name__}: {case}", store, call, times, arguments.rounds)
    report("What counting and watching costs", rows, arguments.output)


if __name__ == "__main__":
    main()
