"""A store with a small memory and a tier on disk, used at random until its process is killed or the power goes off."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, LeaseGoneError, PoolFullError, ShelfRefusedError
from kvstore.placement.ssd import stock
from kvstore.placement.tiered import TieredPool
from kvstore.testing.specs import check_lease, dense, hybrid, pure_state, put_all, windowed
from tests.crash.ledger import Point, without

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.spec import ModelSpec
    from kvstore.store import Store
    from tests.crash.ledger import Teller

BLOCK_TOKENS = 4
TEST_S = 30.0
SPECS: dict[str, ModelSpec] = {
    "hybrid": hybrid(BLOCK_TOKENS),
    "state": pure_state(BLOCK_TOKENS),
    "windowed": windowed(BLOCK_TOKENS),
    "dense": dense(BLOCK_TOKENS),
}
PROMPTS = 32
DRAM_BYTES = 512 << 10
"""A few prompts."""


def prompt(number: int) -> tuple[tuple[int, ...], bytes]:
    """Token ids and salt: families that share their beginnings, most with a tail, some of another salt."""
    family, member = divmod(number, 4)
    stem = tuple(range(1000 * family, 1000 * family + 5 + 3 * family % 11))
    own = tuple(range(500_000 + 100 * number, 500_000 + 100 * number + 1 + (7 * number) % 13))
    ids = stem if member == 0 else (*stem, *own)
    return ids, b"tenant" if family % 4 == 3 else b""


class Workload:
    """Random steps on an open store.

    Args:
        teller: is told what becomes durable.
        seed: of the steps; what threads make of them is up to the machine.
    """

    def __init__(self, store: Store, teller: Teller, seed: int) -> None:
        self._store = store
        self._teller = teller
        self._random = random.Random(seed)
        self._committed: set[Point] = set()
        self._since = teller.moment()
        self.verified = 0

    def step(self) -> None:
        names = ("write", "read", "flush", "look", "evict", "evict_here", "expire")
        (name,) = self._random.choices(names, (40, 25, 12, 8, 5, 8, 2))
        getattr(self, f"_{name}")(self._random.randrange(PROMPTS))
        self._teller.did(name)

    def _write(self, number: int) -> None:
        ids, salt = prompt(number)
        try:
            with self._store.write(ids, salt=salt) as writer:
                put_all(writer)
                self._since = min(self._since, self._teller.moment()) if self._committed else self._teller.moment()
                writer.commit()
        except PoolFullError:  # what is there is being kept
            return
        path = self._store.prompt(ids, salt=salt).path
        self._committed.add(Point.of(number, len(ids), path))

    def _read(self, number: int) -> None:
        ids, salt = prompt(number)
        match = self._store.match((*ids, 7), salt=salt)
        if match:
            try:
                with self._store.read(match, deadline_s=TEST_S, layered=self._random.random() < 0.3) as lease:
                    check_lease(lease, self._store.prompt(ids[: lease.tokens], salt=salt))
                    self.verified += 1
            except (LeaseGoneError, PoolFullError):
                return

    def _look(self, number: int) -> None:
        """What a match says is durable."""
        ids, salt = prompt(number)
        since = self._teller.moment()
        match = self._store.match((*ids, 7), salt=salt)
        points = [Point.of(number, each.tokens, each.path) for each in match.candidates if each.is_durable]
        self._teller.durable(points, since)

    def _flush(self, _number: int) -> None:
        """What was committed before is durable once it returns."""
        try:
            self._store.flush(TEST_S)
        except (ShelfRefusedError, DeadlineError):
            # Something of it is not kept, nobody says what.
            self._committed.clear()
            return
        self._teller.durable(self._committed, self._since)
        self._committed.clear()

    def _evict(self, number: int) -> None:
        ids, salt = prompt(number)
        path = self._store.prompt(ids, salt=salt).path
        key = path.key(self._random.randrange(len(path)))
        states_only = bool(self._store.spec.state_groups) and self._random.random() < 0.4
        self._committed = without(self._committed, [(key, states_only)])
        self._store.pool.evict(key, states_only=states_only)

    def _evict_here(self, number: int) -> None:
        """From memory: what was not kept yet is not going to be, and flush says so."""
        ids, salt = prompt(number)
        assert isinstance(self._store.pool, TieredPool)
        self._store.pool.evict_here(self._store.prompt(ids, salt=salt).path.key(0))

    def _expire(self, number: int) -> None:
        ids, salt = prompt(number)
        path = self._store.prompt(ids, salt=salt).path
        self._committed = without(self._committed, [(path.key(node), False) for node in range(len(path))])
        self._store.expire(ids, salt=salt)


@contextmanager
def telling(teller: Teller) -> Iterator[None]:
    """While this lasts, every tier on disk says what it is going to drop before it does."""
    original = stock.Stock.forget

    def forget(self: stock.Stock, keys: Sequence[bytes], are_states: Sequence[bool]) -> None:
        teller.dropping(keys, are_states)
        original(self, keys, are_states)

    stock.Stock.forget = forget  # type: ignore[method-assign]
    try:
        yield
    finally:
        stock.Stock.forget = original  # type: ignore[method-assign]


def verified_points(store: Store) -> set[Point]:
    """Every resume point of every prompt that a store finds, read and compared byte by byte."""
    found: set[Point] = set()
    for number in range(PROMPTS):
        ids, salt = prompt(number)
        match = store.match((*ids, 7), salt=salt)
        for candidate in match.candidates:
            asked = store.match((*ids[: candidate.tokens], 7), salt=salt)
            assert asked.tokens == candidate.tokens, f"prompt {number}: {candidate.tokens} found, then {asked.tokens}"
            with store.read(asked, deadline_s=TEST_S) as lease:
                assert lease.tokens == candidate.tokens
                check_lease(lease, store.prompt(ids[: lease.tokens], salt=salt))
            found.add(Point.of(number, candidate.tokens, candidate.path))
    return found
