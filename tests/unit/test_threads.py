"""Several threads on one store: whatever they do, what is read is right and the sums are."""

from __future__ import annotations

import random
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import LeaseGoneError, PoolFullError, StoreClosedError, WriteError
from kvstore.store import Store, open_store
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.specs import check_lease, hybrid, pure_state, put_all, put_states, put_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.spec import ModelSpec

WORK_S = 1.5
B = 4


def work(store: Store, seed: int, until_s: float) -> int:
    """Write and read prompts that overlap with those of the other threads; reads that were checked."""
    source = random.Random(seed)
    checked = 0
    while time.monotonic() < until_s:
        ids = [source.randrange(2) for _ in range(source.randrange(1, 24))]
        match = store.match([*ids, 0])
        if match:
            try:
                lease = store.read(match, verify=source.random() < 0.3)
            except LeaseGoneError:
                continue
            check_lease(lease, store.prompt(ids[: lease.tokens]))
            checked += 1
            if lease.tokens < len(ids) and source.random() < 0.5:
                try:
                    with store.write(ids, resume=lease) as writer:
                        put_all(writer, start=lease.tokens)
                        writer.commit()
                except PoolFullError:
                    pass
            if source.random() < 0.5:
                lease.release()
            continue
        try:
            with store.write(ids) as writer:
                put_tokens(writer, 0, len(ids))
                if source.random() < 0.2:
                    continue
                put_states(writer, len(ids))
                writer.commit()
        except PoolFullError:
            continue
        if source.random() < 0.1:
            store.pool.evict(store.prompt(ids).path.key(0), states_only=source.random() < 0.5)
    return checked


@pytest.mark.parametrize("dram", [200 << 10, 16 << 20], ids=["tight", "roomy"])
@pytest.mark.parametrize("make", [hybrid, pure_state])
def test_overlapping_prompts(make: type[ModelSpec], dram: int) -> None:
    with leaves_nothing(), open_store(make(B), dram=dram) as store:
        until_s = time.monotonic() + WORK_S
        threads = [Background(partial(work, store, seed, until_s)) for seed in range(4)]
        assert sum(thread.result(60) for thread in threads) > 0
        statistics = store.statistics()
        assert (statistics.reserved_bytes, statistics.quarantined_bytes, statistics.damaged_records) == (0, 0, 0)
        store.pool.check()


def test_one_writer_many_threads() -> None:
    """Layers and chunks from several threads, in any order."""
    ids = [number % 50 for number in range(100)]
    for seed in range(5):
        with open_store(hybrid(B), dram="4MiB") as store, store.write(ids, resume_at=(48, 100)) as writer:
            puts = [
                partial(put_tokens, writer, start, min(start + 7, 100), layer=layer)
                for layer in (1, 3)
                for start in range(0, 100, 7)
            ]
            puts += [partial(put_states, writer, at, layer=layer) for layer in (0, 2, 4) for at in (48, 100)]
            random.Random(seed).shuffle(puts)
            for thread in [Background(partial(call_all, puts[share::4])) for share in range(4)]:
                thread.result(30)
            writer.commit()
            for tokens in (48, 100):
                with store.read(store.match([*ids, 1]).at(tokens), verify=True) as lease:
                    check_lease(lease, writer.prompt)


def call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


class StopsAt:
    """A write listener that holds the putting thread in the middle of a put."""

    def __init__(self, pieces: int) -> None:
        self._left = pieces
        self.reached, self.go_on = threading.Event(), threading.Event()

    def pieces_whole(self, record: int, pieces: object) -> None:
        self._left -= 1
        if self._left == 0:
            self.reached.set()
            assert self.go_on.wait(30)

    def record_sealed(self, record: int, cost_us: int) -> None:
        pass

    def committed(self, upto_tokens: int, handover: object) -> None:
        pass

    def aborted(self, reason: str) -> None:
        pass


def test_an_abort_in_the_middle_of_a_put() -> None:
    """The put is refused in the end, and its bytes land in slots that wait for it."""
    ids = [number % 50 for number in range(64)]
    with open_store(hybrid(B), dram=1 << 20) as store:
        for round_number in range(20):
            writer = store.write(ids)
            stop = StopsAt(1 + 3 * round_number)
            writer.subscribe(stop)
            putting = Background(partial(put_all, writer))
            assert stop.reached.wait(30)
            writer.abort("the client is gone")
            assert store.statistics().quarantined_bytes == writer.size_bytes
            other = [51 + round_number, *ids[:10]]
            with store.write(other) as next_writer:
                put_all(next_writer)
                next_writer.commit()
            stop.go_on.set()
            with pytest.raises(WriteError, match="the client is gone"):
                putting.result(30)
            with store.read(store.match([*other, 1]), verify=True) as lease:
                check_lease(lease, next_writer.prompt)
            statistics = store.statistics()
            assert (statistics.reserved_bytes, statistics.quarantined_bytes) == (0, 0)
        assert statistics.aborts == 20
        store.pool.check()


def test_closing_while_others_work() -> None:
    with leaves_nothing():
        store = open_store(hybrid(B), dram=300 << 10)
        until_s = time.monotonic() + 20
        threads = [Background(partial(work, store, seed, until_s)) for seed in range(3)]
        time.sleep(0.2)
        store.close()
        for thread in threads:
            with pytest.raises(StoreClosedError):
                thread.result(30)
