"""Whole and sparse prefills of the same prompts, in two stores: a reader never gets what it did not ask for.

Values depend on every token before them and on which of these are held, so a record of another coverage is noticed
wherever it is served. `KVSTORE_STATEFUL_EXAMPLES=2000` looks much longer.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import kvstore
import kvstore.transfer
from kvstore import Coverage
from kvstore.errors import LeaseGoneError, PoolFullError, QuarantineFullError, TransferFullError, WriteError
from kvstore.spec import ReuseRule
from kvstore.testing.resources import leaves_nothing
from kvstore.testing.specs import check_lease, dense, hybrid, put_states, put_tokens, tensors_of
from tests.integration.transfer_nodes import WITHIN_S, address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.spec import ModelSpec
    from kvstore.store import Lease, Store, Writer

EXAMPLES = int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "25"))
STEPS = 30
BLOCK = 2
LIVE_MAX = 3

pytestmark = pytest.mark.timeout(900 if EXAMPLES <= 100 else 0)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    with leaves_nothing():
        yield


@dataclass
class Live:
    """A writer and the puts that it lacks: layer, and tokens, or a state's length with a start of -1."""

    writer: Writer
    ids: tuple[int, ...]
    todo: list[tuple[int, int, int]] = field(default_factory=list)


class SparseMachine(RuleBasedStateMachine):
    """Two stores; what lies in them is known only where nothing was evicted for want of room."""

    spec: ClassVar[ModelSpec]
    dram_bytes: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        opened = [kvstore.open(self.spec, dram=self.dram_bytes) for _ in range(2)]
        self.stores = [self.stack.enter_context(store) for store in opened]
        self.endpoints = [store.listen(address("memory")) for store in self.stores]
        self.writers: list[Live] = []
        self.leases: list[tuple[Lease, tuple[int, ...]]] = []
        self.written: list[tuple[tuple[int, ...], Coverage | None]] = [((0, 1, 0), None)]
        # Prompts that each store holds whole, unless something was evicted there since.
        self.whole: list[set[tuple[int, ...]]] = [set(), set()]
        self.evicted = [0, 0]

    def _draw(self, data: st.DataObject) -> tuple[tuple[int, ...], Coverage | None]:
        """A prompt that shares its beginning, and mostly its coverage, with an earlier one."""
        base, known = data.draw(st.sampled_from(self.written), label="base")
        kept = data.draw(st.one_of(st.just(len(base)), st.integers(0, len(base))), label="kept")
        more = tuple(data.draw(st.lists(st.integers(0, 1), min_size=kept == 0, max_size=3), label="more"))
        ids = (*base[:kept], *more)
        kind = data.draw(st.sampled_from(("whole", "known", "new")), label="coverage")
        if kind == "whole" or (kind == "known" and known is None):
            return ids, None
        masks = {}
        for layer, _ in tensors_of(self.spec, ReuseRule.ATTENTION)[:2]:
            mask = np.ones(len(ids), bool)
            if known is not None and kept:
                mask[:kept] = known.mask(layer)[:kept]
            if kind == "new" or more:
                mask[kept:] = data.draw(st.lists(st.booleans(), min_size=len(more), max_size=len(more)))
            if kind == "new" and kept:
                mask[data.draw(st.integers(0, kept - 1), label="gap")] = False
            masks[layer] = mask
        return ids, Coverage.of_masks(masks)

    def _accept_evictions(self) -> None:
        for number, store in enumerate(self.stores):
            evicted = store.statistics().evicted_records
            if evicted != self.evicted[number]:
                self.evicted[number] = evicted
                self.whole[number].clear()

    @precondition(lambda self: len(self.writers) < LIVE_MAX)
    @rule(data=st.data(), number=st.integers(0, 1))
    def begin_some(self, data: st.DataObject, number: int) -> None:
        self._begin(data, number)

    def _begin(self, data: st.DataObject, number: int) -> None:
        ids, coverage = self._draw(data)
        cut = data.draw(st.integers(0, len(ids)), label="cut")
        chunks = [(a, b) for a, b in ((0, cut), (cut, len(ids))) if a < b]
        puts = [(layer, a, b) for layer, _ in tensors_of(self.spec, ReuseRule.ATTENTION) for a, b in chunks]
        puts.extend((layer, -1, len(ids)) for layer, _ in tensors_of(self.spec, ReuseRule.STATE))
        # Hypothesis ends an example that has become too long in any draw: there must be none between a writer and
        # what remembers it.
        order = data.draw(st.permutations(puts), label="order")
        try:
            writer = self.stores[number].write(ids, coverage=coverage)
        except (PoolFullError, QuarantineFullError):
            return
        self.written.append((ids, coverage))
        self.writers.append(Live(writer, ids, order))

    @rule(data=st.data(), number=st.integers(0, 1))
    def write_whole(self, data: st.DataObject, number: int) -> None:
        """Begun, put and committed at once: an empty store shows little."""
        before = len(self.writers)
        self._begin(data, number)
        for live in self.writers[before:]:
            while live.todo:
                self._put(live)
            live.writer.commit()
            self._committed(live)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def put_some(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.writers))
        for _ in range(data.draw(st.integers(0, len(live.todo)))):
            self._put(live)

    @staticmethod
    def _put(live: Live) -> None:
        layer, start, stop = live.todo.pop()
        if start < 0:
            put_states(live.writer, stop, layer=layer)
        else:
            put_tokens(live.writer, start, stop, layer=layer)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def commit_early(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.writers))
        lacks = any(not live.writer.transaction.is_sealed(n) for n in range(len(live.writer.transaction.records)))
        try:
            live.writer.commit()
        except WriteError:
            assert lacks, "a complete writer may not commit"
            return
        assert not lacks, "an incomplete writer has committed"
        self._committed(live)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.writers))
        while live.todo:
            self._put(live)
        live.writer.commit()
        self._committed(live)

    def _committed(self, live: Live) -> None:
        self.writers.remove(live)
        number = next(n for n, store in enumerate(self.stores) if store is live.writer._store)
        self._accept_evictions()
        if live.writer.transaction.path.is_exact:
            self.whole[number].add(live.ids)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.writers))
        live.writer.abort()
        self.writers.remove(live)

    @rule(data=st.data(), number=st.integers(0, 1), keeps=st.booleans())
    def read_whole(self, data: st.DataObject, number: int, keeps: bool) -> None:
        ids, _ = data.draw(st.sampled_from(self.written))
        store = self.stores[number]
        match = store.match((*ids, 5))
        assert all(each.is_exact for each in match.candidates), "an exact reader was offered what is not whole"
        assert ids not in self.whole[number] or match.tokens == len(ids), "a whole prefill is not found"
        self._read(store, match, ids, None, keeps=keeps)

    @rule(data=st.data(), number=st.integers(0, 1), keeps=st.booleans())
    def read_any(self, data: st.DataObject, number: int, keeps: bool) -> None:
        ids, _ = data.draw(st.sampled_from(self.written))
        store = self.stores[number]
        match = store.match((*ids, 5), accept_coverage=True)
        assert match.tokens >= store.match((*ids, 5)).tokens
        assert ids not in self.whole[number] or match.is_exact, "what is whole does not come first"
        if match:
            tokens = data.draw(st.sampled_from([each.tokens for each in match.candidates]))
            match = match.at(tokens)
        self._read(store, match, ids, match.coverage(self.spec), keeps=keeps)

    @rule(data=st.data(), number=st.integers(0, 1))
    def read_named(self, data: st.DataObject, number: int) -> None:
        ids, coverage = data.draw(st.sampled_from(self.written))
        if coverage is not None:
            store = self.stores[number]
            match = store.match((*ids, 5), coverage=coverage.followed_by(Coverage(1)))
            for each in match.candidates:
                assert each.is_exact or each.path.coverage(self.spec) == coverage.first(each.tokens)
            self._read(store, match, ids, match.coverage(self.spec), keeps=False)

    def _read(
        self, store: Store, match: kvstore.Match, ids: tuple[int, ...], coverage: Coverage | None, *, keeps: bool
    ) -> None:
        if not match:
            return
        lease = store.read(match, verify=True)
        assert lease.tokens == match.tokens
        assert lease.coverage == coverage
        check_lease(lease, store.prompt(ids))
        if keeps and len(self.leases) < LIVE_MAX:
            self.leases.append((lease, ids))
        else:
            lease.release()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def read_again(self, data: st.DataObject) -> None:
        lease, ids = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        with lease:
            check_lease(lease, self.stores[0].prompt(ids))

    @rule(data=st.data(), number=st.integers(0, 1))
    def evict(self, data: st.DataObject, number: int) -> None:
        ids, coverage = data.draw(st.sampled_from(self.written))
        path = self.stores[number].prompt(ids, coverage=coverage).path
        node = data.draw(st.integers(0, len(path) - 1))
        self.stores[number].pool.evict(path.key(node), states_only=data.draw(st.booleans()))
        self._accept_evictions()

    @rule(data=st.data(), number=st.integers(0, 1))
    def send(self, data: st.DataObject, number: int) -> None:
        ids, _ = data.draw(st.sampled_from(self.written))
        match = self.stores[number].match((*ids, 5), accept_coverage=data.draw(st.booleans()))
        if not match:
            return
        other = 1 - number
        try:
            self.stores[number].send(match, self.endpoints[other].address).result(WITHIN_S)
        except (LeaseGoneError, TransferFullError):
            return
        self._accept_evictions()
        if match.is_exact:
            self.whole[other].add(ids[: match.tokens])
        found = self.stores[other].match((*ids, 5), accept_coverage=True)
        assert found.tokens >= match.tokens, "what was sent is not there"

    @invariant()
    def sound(self) -> None:
        for store in self.stores:
            store.pool.check()

    def teardown(self) -> None:
        with self.stack:
            for lease, _ in self.leases:
                lease.release()
            for live in self.writers:
                live.writer.abort()
            for store in self.stores:
                assert store.statistics().reserved_bytes == 0


def _case(spec: ModelSpec, dram_bytes: int, examples: int) -> type:
    members = {"spec": spec, "dram_bytes": dram_bytes}
    case = type(f"Sparse_{spec.model}_{dram_bytes}", (SparseMachine,), members).TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        settings.default,
        max_examples=max(1, examples),
        stateful_step_count=STEPS,
        suppress_health_check=list(HealthCheck),
    )
    return case  # type: ignore[no-any-return]


TestRoomyHybrid = _case(hybrid(BLOCK), 16 << 20, EXAMPLES)
TestTightHybrid = _case(hybrid(BLOCK), 120 << 10, EXAMPLES)
TestTightDense = _case(dense(BLOCK), 120 << 10, EXAMPLES // 2)
