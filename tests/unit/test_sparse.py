"""Sparse and pruned prefill: written, found by those who accept it, read, and never taken for a whole one."""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore import Coverage
from kvstore.errors import ChecksumError, LeaseGoneError, SpecError, WriteError
from kvstore.pool import HandOver
from kvstore.record import Record, read_record_stream, write_record_stream
from kvstore.spec import ChunkGrid, ReuseRule, Shard
from kvstore.testing.specs import (
    check_lease,
    dense,
    hybrid,
    latent,
    put_all,
    put_states,
    put_tokens,
    spans,
    tensors_of,
    token_values,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.spec import ModelSpec
    from kvstore.store import Store, Writer

B = 4
IDS = tuple(range(18))
MORE = (*IDS, 99)
HELD = np.array([1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 0], bool)
COVERAGE = Coverage.of_masks({1: HELD, 3: np.arange(18) < 8})


def open_store(spec: ModelSpec | None = None, **options: Any) -> Store:
    return kvstore.open(spec or hybrid(B), dram="8MiB", **options)


@contextmanager
def roles(tmp_path: Any, *, is_attached: bool) -> Iterator[Store]:
    """The store that tests work on: the owner's own, or that of a process that is attached to it."""
    if not is_attached:
        with open_store() as store:
            yield store
            store.pool.check()
        return
    path = str(tmp_path / "socket")
    with open_store(socket=path) as owner, kvstore.attach(path) as store:
        yield store
        owner.pool.check()


@pytest.fixture(params=[False, True], ids=["owner", "attached"])
def store(tmp_path: Any, request: pytest.FixtureRequest) -> Iterator[Store]:
    with roles(tmp_path, is_attached=request.param) as store:
        yield store


def write(store: Store, ids: tuple[int, ...] = IDS, coverage: Coverage | None = COVERAGE, **options: Any) -> int:
    """Write and commit a prompt; how many records it took."""
    with store.write(ids, coverage=coverage, **{"resume_at": (8, len(ids)), **options}) as writer:
        put_all(writer)
        writer.commit()
        return len(writer.transaction.records)


def check_found(store: Store, match: kvstore.Match, ids: tuple[int, ...] = IDS) -> None:
    with store.read(match, verify=True) as lease:
        assert lease.tokens == match.tokens
        assert lease.is_exact == match.is_exact
        check_lease(lease, store.prompt(ids))


def test_only_those_who_accept_coverage_find_it(store: Store) -> None:
    write(store)
    assert not store.match(MORE)
    assert not store.match(MORE, coverage=Coverage.of_ranges(19, {1: [(0, 8)]}))
    for options in ({"accept_coverage": True}, {"coverage": COVERAGE.followed_by(Coverage(1))}):
        match = store.match(MORE, **options)  # type: ignore[arg-type]
        assert [(each.tokens, each.is_exact) for each in match.candidates] == [(18, False), (8, False)]
        assert match.coverage(store.spec) == COVERAGE
        assert match.at(8).coverage(store.spec) == COVERAGE.first(8)
        for tokens in (18, 8):
            check_found(store, match.at(tokens))


def test_what_is_not_held_is_read_as_zeros(store: Store) -> None:
    write(store)
    with store.read(store.match(MORE, accept_coverage=True)) as lease:
        assert lease.coverage == COVERAGE
        prompt = store.prompt(IDS, coverage=COVERAGE)
        for layer, mask in ((1, HELD), (3, np.arange(18) < 8)):
            view = lease.layer(layer)
            assert view.mask.tolist() == mask.tolist()
            keys = np.full(view.shape("keys"), 7, np.float32)
            view.copy_to(keys=keys)
            assert not keys[:, ~mask].any()
            expected = token_values(store.spec, prompt, layer, "keys", 0, 18)
            assert keys[:, mask].tobytes() == expected[:, mask].tobytes()


def test_blocks_before_the_first_gap_are_whole_and_shared(store: Store) -> None:
    """A block that every layer holds, after blocks that every layer holds, is what a whole prefill writes."""
    late = Coverage.of_ranges(18, {1: [(0, 13)]})
    write(store, coverage=late)
    match = store.match(MORE)
    assert (match.tokens, match.is_exact) == (8, True)
    check_found(store, match)
    assert write(store, coverage=None) < write(store, ids=tuple(range(50, 68)), coverage=None)


def test_a_whole_prefill_is_written_beside_a_sparse_one(store: Store) -> None:
    write(store)
    whole_records = write(store, coverage=None)
    assert whole_records > 0
    match = store.match(MORE)
    assert (match.tokens, match.is_exact) == (18, True)
    check_found(store, match)
    accepting = store.match(MORE, accept_coverage=True)
    assert accepting.is_exact
    assert [each.is_exact for each in accepting.candidates] == [True, False, True, False]


def test_a_sparse_prefill_of_what_is_there_whole_writes_nothing(store: Store) -> None:
    write(store, coverage=None)
    assert write(store) == 0
    match = store.match(MORE, accept_coverage=True)
    assert all(each.is_exact for each in match.candidates)
    assert store.match(MORE, coverage=COVERAGE.followed_by(Coverage(1))).is_exact


def test_a_sparse_prefill_is_written_if_a_part_of_the_whole_one_was_evicted(store: Store) -> None:
    write(store, coverage=None)
    store.pool.evict(store.prompt(IDS).path.key(2))
    assert write(store) > 0
    assert not store.match(MORE).tokens > 8
    assert store.match(MORE, accept_coverage=True).tokens == 18


def test_coverages_do_not_mix(store: Store) -> None:
    """Each coverage has records of its own from the block on in which it differs."""
    other = Coverage.of_masks({1: HELD, 3: np.arange(18) < 12})
    first = write(store)
    assert 0 < write(store, coverage=other) < first
    found = store.match(MORE, accept_coverage=True)
    deepest = [each for each in found.candidates if each.tokens == 18]
    assert {each.path.coverage(store.spec) for each in deepest} == {COVERAGE, other}
    for coverage in (COVERAGE, other):
        match = store.match(MORE, coverage=coverage.followed_by(Coverage(1)))
        assert match.coverage(store.spec) == coverage
        check_found(store, match)
    assert write(store) == 0


def test_pieces_of_which_nothing_is_held_need_no_put(store: Store) -> None:
    nothing = Coverage.of_ranges(18, {1: [], 3: []})
    with store.write(IDS, coverage=nothing) as writer:
        assert all(writer.transaction.is_sealed(number) for number in range(5))
        put_states(writer, 18)
        writer.commit()
    with store.read(store.match(MORE, accept_coverage=True), verify=True) as lease:
        assert not lease.layer(1).read("keys").any()
        check_lease(lease, store.prompt(IDS))


@pytest.mark.parametrize("seed", range(4))
def test_any_order_and_any_chunks(store: Store, seed: int) -> None:
    source = random.Random(seed)
    masks = {layer: np.array([source.random() < 0.6 for _ in IDS]) for layer in (1, 3)}
    coverage = Coverage.of_masks(masks)
    with store.write(IDS, coverage=coverage) as writer:
        puts = []
        for layer in (1, 3):
            ends = [0, *sorted(source.sample(range(1, 18), 4)), 18]
            puts.extend((layer, start, stop) for start, stop in pairwise(ends))
        source.shuffle(puts)
        for layer, start, stop in puts:
            put_tokens(writer, start, stop, layer=layer)
        put_states(writer, 18)
        writer.commit()
    match = store.match(MORE, accept_coverage=True)
    assert match.coverage(store.spec) == coverage
    check_found(store, match)


def test_what_was_promised_must_come(store: Store) -> None:
    with store.write(IDS, coverage=COVERAGE) as writer:
        put_states(writer, 18)
        put_tokens(writer, 0, 18, layer=1)
        put_tokens(writer, 0, 7, layer=3)
        with pytest.raises(WriteError, match="not complete"):
            writer.commit()
        put_tokens(writer, 7, 18, layer=3)
        writer.commit()
    check_found(store, store.match(MORE, accept_coverage=True))


def test_arrays_have_the_held_tokens_alone(store: Store) -> None:
    with store.write(IDS, coverage=COVERAGE) as writer:
        values = {name: token_values(store.spec, writer.prompt, 1, name, 0, 18) for name in ("keys", "values")}
        with pytest.raises(WriteError, match=r"shape \[2, 18, 4\], expected \[2, 10, 4\]"):
            writer.put(1, tokens=slice(0, 18), **values)
        put_tokens(writer, 0, 18, layer=1)
        with pytest.raises(WriteError, match="put before"):
            put_tokens(writer, 1, 3, layer=1)
        with pytest.raises(WriteError, match="put before"):
            put_tokens(writer, 12, 16, layer=1)


def test_without_a_declared_coverage_nothing_may_lack(store: Store) -> None:
    with store.write(IDS) as writer:
        put_states(writer, 18)
        put_tokens(writer, 0, 18, layer=1)
        put_tokens(writer, 0, 17, layer=3)
        with pytest.raises(WriteError, match="not complete"):
            writer.commit()


@pytest.mark.parametrize("end", [8, 18], ids=["at a block", "in a tail"])
def test_a_sparse_write_continues_a_whole_prefix(store: Store, end: int) -> None:
    write(store, IDS[:end], None, resume_at=(end,))
    ids = tuple(range(27))
    coverage = Coverage(end).followed_by(Coverage.of_ranges(27 - end, {3: [(2, 5)]}))
    with store.read(store.match([*ids, 1])) as lease:
        assert lease.tokens == end
        with store.write(ids, resume=lease, coverage=coverage) as writer:
            put_tokens(writer, end, 27)
            put_states(writer, 27)
            writer.commit()
    assert store.match([*ids, 1]).tokens == end
    match = store.match([*ids, 1], accept_coverage=True)
    assert (match.tokens, match.coverage(store.spec)) == (27, coverage)
    check_found(store, match, ids)


@pytest.mark.parametrize("end", [8, 18], ids=["at a block", "in a tail"])
def test_a_write_continues_a_sparse_prefix(store: Store, end: int) -> None:
    write(store, IDS[:end], COVERAGE.first(end), resume_at=(end,))
    ids = tuple(range(27))
    coverage = COVERAGE.first(end).followed_by(Coverage.of_ranges(27 - end, {1: [(2, 5)]}))
    with store.read(store.match([*ids, 1], accept_coverage=True)) as lease:
        assert (lease.tokens, lease.coverage) == (end, COVERAGE.first(end))
        with pytest.raises(WriteError, match="beginning of this prompt"):
            store.write(ids, resume=lease)
        with store.write(ids, resume=lease, coverage=coverage) as writer:
            put_tokens(writer, end, 27)
            put_states(writer, 27)
            writer.commit()
    match = store.match([*ids, 1], accept_coverage=True)
    assert (match.tokens, match.coverage(store.spec)) == (27, coverage)
    check_found(store, match, ids)
    assert not store.match([*ids, 1])


def test_a_sparse_tail_is_found_in_a_longer_prompt(store: Store) -> None:
    write(store, IDS[:6], COVERAGE.first(6), resume_at=(6,))
    assert not store.match(MORE)
    for options in ({"accept_coverage": True}, {"coverage": COVERAGE.followed_by(Coverage(1))}):
        match = store.match(MORE, **options)  # type: ignore[arg-type]
        assert (match.tokens, match.is_exact) == (6, False)
        check_found(store, match)


def test_a_tail_that_lacks_tokens_after_whole_blocks(store: Store) -> None:
    coverage = Coverage.of_ranges(18, {1: [(0, 17)]})
    write(store, coverage=coverage)
    assert store.match(MORE).tokens == 8
    match = store.match(MORE, accept_coverage=True)
    assert [(each.tokens, each.is_exact) for each in match.candidates] == [(18, False), (8, True)]
    check_found(store, match)


def test_a_strict_reader_finds_a_sparse_prefix_on_its_grid(store: Store) -> None:
    grid = ChunkGrid((8, 18))
    write(store, grid=grid)
    more = ChunkGrid((8, 18, 19))
    assert store.match(MORE, grid=more, accept_coverage=True).tokens == 18
    assert store.match(MORE, grid=ChunkGrid((4, 19)), accept_coverage=True).tokens == 0
    assert not store.match(MORE, grid=more)


def test_a_hand_over_is_accepted_with_its_coverage(store: Store) -> None:
    waiting = store.accept(IDS)
    with store.write(IDS, coverage=COVERAGE) as writer:
        put_all(writer)
        writer.commit(handover=HandOver(7, b"logits"))
    accepting = store.accept(IDS, accept_coverage=True)
    arrival = accepting.result(20)
    assert not waiting.done()
    waiting.cancel()
    assert (arrival.handover.first_token, arrival.match.tokens, arrival.match.is_exact) == (7, 18, False)
    with arrival.lease as lease:
        assert lease.coverage == COVERAGE
        check_lease(lease, store.prompt(IDS))


def test_a_wait_is_answered_by_a_sparse_prefix_if_accepted(store: Store) -> None:
    exact, accepting = store.when_ready(MORE, 18), store.when_ready(MORE, 18, accept_coverage=True)
    write(store)
    assert accepting.result(20).tokens == 18
    assert not exact.done()
    exact.cancel()


@pytest.mark.parametrize("make", [dense, hybrid, latent, spans])
def test_every_kind_of_model(make: Any) -> None:
    spec = make(2)
    ids = (1, 2, 3, 4, 5)
    layers = [layer for layer, _ in tensors_of(spec, ReuseRule.ATTENTION)]
    coverage = Coverage.of_ranges(5, {layers[0]: [(1, 4)], layers[-1]: [(4, 5)]})
    with kvstore.open(spec, dram="64MiB") as store:
        write(store, ids, coverage, resume_at=(5,))
        assert not store.match([*ids, 1])
        match = store.match([*ids, 1], accept_coverage=True)
        assert (match.tokens, match.coverage(spec)) == (5, coverage)
        check_found(store, match, ids)
        store.pool.check()


def test_shards_of_a_sparse_prompt_are_read_by_another_count() -> None:
    with open_store() as store:
        writers: list[Writer] = [
            store.write(IDS, coverage=COVERAGE, shard=Shard(index, 2), joint="sparse") for index in range(2)
        ]
        handles = []
        for writer in writers:
            put_all(writer)
            handles.append(writer.commit_async())
        for handle in handles:
            handle.result(20)
        check_found(store, store.match(MORE, accept_coverage=True))
        store.pool.check()


def test_no_bytes_of_a_slots_last_owner_are_read() -> None:
    """Uncovered tokens are zero wherever a record lands."""
    with kvstore.open(dense(B), dram="160KiB") as store:
        for turn in range(12):
            ids = tuple(range(100 * turn, 100 * turn + 8))
            coverage = Coverage.of_ranges(8, {0: [(0, 1)], 2: []}) if turn % 2 else None
            write(store, ids, coverage, resume_at=(8,))
            check_found(store, store.match([*ids, 1], accept_coverage=True), ids)
        assert store.statistics().evicted_records > 0
        store.pool.check()


def test_a_damaged_coverage_is_noticed() -> None:
    with open_store() as store:
        write(store)
        match = store.match(MORE, accept_coverage=True)
        with store.read(match) as lease:
            held = next(record for record in lease.records if record.layout.is_sparse)
            memory = store.pool._tier.views([held.slot])[0]  # type: ignore[attr-defined]
            held.layout.coverage(memory)[0] ^= 1
            assert [each.name for each in lease.verify()] == [held.name]
            with pytest.raises(ChecksumError):
                Record(held.layout, held.memory).header()
        with pytest.raises(LeaseGoneError):
            store.read(match, verify=True)
        assert store.statistics().damaged_records > 0


def test_a_sparse_record_stands_alone() -> None:
    """Written out, it is an Arrow stream that says which tokens it holds."""
    with open_store() as store:
        write(store)
        with store.read(store.match(MORE, accept_coverage=True)) as lease:
            held = next(record for record in lease.records if record.layout.is_sparse)
            found = read_record_stream(write_record_stream(lease.record(held)))
            assert found.fields.coverage == "tokens"
            assert found.coverage == bytes([0b1001, 0b1111])


def test_coverage_is_checked_before_anything_is_done() -> None:
    with open_store() as store:
        with pytest.raises(SpecError, match=r"kvstore\.Coverage"):
            store.write(IDS, coverage={1: [True]})  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="the prompt has 18"):
            store.write(IDS, coverage=Coverage.of_ranges(4, {1: []}))
        with pytest.raises(SpecError, match="no attention"):
            store.match(IDS, coverage=Coverage.of_ranges(18, {0: []}))
        with pytest.raises(WriteError, match="coverage already"):
            store.write(store.prompt(IDS), coverage=COVERAGE)


def test_hints_of_evicted_nodes_are_dropped() -> None:
    with open_store() as store:
        write(store)
        index = store.pool._index  # type: ignore[attr-defined]
        assert len(index.sparse) == 5
        path = store.prompt(IDS, coverage=COVERAGE).path
        store.pool.evict(path.key(0))
        assert not store.match(MORE, accept_coverage=True)
        assert len(index.sparse) == 4
        for _ in range(3):
            write(store)
            store.pool.evict(path.key(0))
        store.match(MORE, accept_coverage=True)
        assert len(index.sparse) == 4


def test_hints_are_bounded() -> None:
    with kvstore.open(dense(B), dram="256KiB") as store:
        index = store.pool._index  # type: ignore[attr-defined]
        for turn in range(100):
            ids = tuple(range(100 * turn, 100 * turn + 4))
            write(store, ids, Coverage.of_ranges(4, {0: []}), resume_at=(4,))
        assert 0 < index.sparse.memory_bytes <= (256 << 10) / 32
        assert len(index.sparse) < 100
        store.pool.check()
