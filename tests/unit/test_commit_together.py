"""Several writers whose records become visible in one step: the workers of one prompt, each with its shard."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import JointCommitError, KVStoreError, LeaseGoneError, StoreClosedError, WriteError
from kvstore.pool import HandOver
from kvstore.spec import ChunkGrid, Shard
from kvstore.store import Store, Writer, open_store
from kvstore.testing.resources import Background
from kvstore.testing.specs import check_lease, dense, hybrid, put_all, put_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

B = 16
IDS = [(11 * number) % 1000 for number in range(40)]
SHARDS = (Shard(0, 2), Shard(1, 2))


@pytest.fixture
def store() -> Iterator[Store]:
    with open_store(hybrid(B), dram="4MiB") as store:
        yield store
        if not store.is_closed:
            store.pool.check()


def writers_of(store: Store, ids: list[int] = IDS) -> list[Writer]:
    return [store.write(ids, shard=shard) for shard in SHARDS]


def commit(store: Store, writers: list[Writer], handover: HandOver | None = None) -> None:
    store.pool.commit_together(
        [(writer.transaction, None, handover if number == 0 else None) for number, writer in enumerate(writers)]
    )


def test_all_shards_appear_in_one_step(store: Store) -> None:
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((store.match([*IDS, 1]).tokens, store.statistics().commits))

    writers = writers_of(store)
    for writer in writers:
        put_all(writer)
    store.pool.subscribe(look)
    commit(store, writers)
    store.pool.unsubscribe(look)
    assert seen == [(40, 2)], "there was a moment in between"
    for shard in (Shard(), *SHARDS):
        with store.read(store.match([*IDS, 1], shard=shard), verify=True) as lease:
            assert lease.tokens == 40
            check_lease(lease, store.prompt(IDS))
    assert store.statistics().reserved_bytes == 0


def test_one_that_is_incomplete_keeps_all_back(store: Store) -> None:
    writers = writers_of(store)
    put_all(writers[0])
    put_tokens(writers[1], 0, 40)
    for order in (writers, writers[::-1]):
        with pytest.raises(WriteError, match="not complete"):
            commit(store, order)
        assert store.statistics().committed_bytes == 0
        assert all(writer.transaction.is_open for writer in writers)
        assert not store.match([*IDS, 1], shard=SHARDS[0])
    writers[1].abort()
    with pytest.raises(WriteError, match="has ended"):
        commit(store, writers)
    assert store.statistics().committed_bytes == 0
    commit(store, writers[:1])
    assert store.match([*IDS, 1], shard=SHARDS[0]).tokens == 40


def test_what_is_no_joint_commit(store: Store) -> None:
    writers = writers_of(store)
    with open_store(hybrid(B), dram="4MiB") as other:
        for wrong in ([writers[0], writers[0]], [writers[0], other.write(IDS)]):
            with pytest.raises(WriteError, match="each transaction once, all of one pool"):
                commit(store, wrong)
    for writer in writers:
        put_all(writer)
    with pytest.raises(WriteError, match="whole prompt"):
        store.pool.commit_together([(writers[0].transaction, 32, HandOver(1)), (writers[1].transaction, 32, None)])
    assert all(writer.transaction.is_open for writer in writers)
    store.pool.commit_together([])
    for writer in writers:
        writer.abort()


def test_parts_of_prompts(store: Store) -> None:
    """Each with a length of its own; what was committed in parts ends with the last of them."""
    writers = [store.write(IDS, shard=shard, resume_at=(32, 40)) for shard in SHARDS]
    for writer in writers:
        put_all(writer)
    store.pool.commit_together([(writers[0].transaction, 32, None), (writers[1].transaction, None, None)])
    assert (store.match([*IDS, 1]).tokens, store.match([*IDS, 1]).pending_tokens) == (32, 40)
    assert [writer.transaction.is_open for writer in writers] == [True, False]
    writers[0].commit()
    assert store.match([*IDS, 1]).tokens == 40


def test_writers_of_the_same_records(store: Store) -> None:
    """The first in the list wins; the other's records are given back, and nothing is in quarantine."""
    first, second = store.write(IDS), store.write(IDS)
    for writer in (first, second):
        put_all(writer)
    size_bytes = first.size_bytes
    commit(store, [first, second])
    statistics = store.statistics()
    assert (statistics.committed_bytes, statistics.reserved_bytes, statistics.quarantined_bytes) == (size_bytes, 0, 0)
    assert store.match([*IDS, 1]).tokens == 40


def test_damage_that_one_builds_on_ends_all(store: Store) -> None:
    with store.write(IDS) as writer:
        put_all(writer)
        writer.commit()
    longer = [*IDS, *range(500, 530)]
    with store.read(store.match(longer)) as lease:
        writers = [store.write(longer, resume=lease), store.write([1, 2, 3])]
    put_all(writers[0], start=40)
    put_all(writers[1])
    store.pool.condemn(writer.prompt.path.key(2), is_state=True)
    with pytest.raises(LeaseGoneError, match="damaged"):
        commit(store, writers)
    assert not any(each.transaction.is_open for each in writers)
    assert not store.match([1, 2, 3, 4])
    assert store.statistics().reserved_bytes == 0


def test_a_hand_over_of_all_shards(store: Store) -> None:
    for grids in ((None, None), (ChunkGrid((16, 40)), ChunkGrid((16, 40))), (None, ChunkGrid((8, 40)))):
        ids = [*IDS, *([7] * len(str(grids)))]
        writers = [
            store.write(ids, shard=shard, grid=None if grid is None else ChunkGrid((*grid.boundaries, len(ids))))
            for shard, grid in zip(SHARDS, grids, strict=True)
        ]
        for writer in writers:
            put_all(writer)
        waiting = store.accept(ids)
        assert not waiting.done()
        commit(store, writers, HandOver(5, b"logits"))
        arrival = waiting.result(30)
        assert arrival.handover == HandOver(5, b"logits")
        with arrival.lease as lease:
            check_lease(lease, store.prompt(ids))


def test_joint_commits_of_several_threads_in_any_order_do_not_lock_each_other() -> None:
    with open_store(dense(B), dram="8MiB") as store:
        for round_number in range(30):
            writers = writers_of(store, [round_number, *IDS])
            for writer in writers:
                put_all(writer)
            threads = [Background(partial(commit, store, order)) for order in (writers, writers[::-1])]
            ended = 0
            for thread in threads:
                try:
                    thread.result(30)
                except WriteError:
                    ended += 1
            assert ended == 1, "one commits, the other finds that it was done"
            assert store.match([round_number, *IDS, 1]).tokens == 41
        store.pool.check()


def test_a_closed_store_says_so(store: Store) -> None:
    writers = writers_of(store)
    for writer in writers:
        put_all(writer)
    store.close()
    with pytest.raises(StoreClosedError):
        commit(store, writers)


def test_a_party_that_begins_while_another_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.write(range(32), shard=Shard(0, 2), joint="both")
    begin = store.pool._begin  # type: ignore[attr-defined]

    def slow_begin(*arguments: object) -> object:
        transaction = begin(*arguments)
        first.abort("a worker died")
        return transaction

    monkeypatch.setattr(store.pool, "_begin", slow_begin)
    with pytest.raises(JointCommitError, match="a worker died"):
        store.write(range(32), shard=Shard(1, 2), joint="both")
    assert store.statistics().reserved_bytes == 0, "what the late party had reserved stays"
    store.pool.check()


def test_parties_that_write_different_prompts_fail_together(store: Store) -> None:
    """Otherwise each would commit something of which no reader ever finds all shards."""
    first = store.write(IDS, shard=SHARDS[0], joint="request")
    put_all(first)
    with pytest.raises(WriteError, match="writes another prompt"):
        store.write([*IDS[:-1], 1], shard=SHARDS[1], joint="request")
    with pytest.raises(KVStoreError, match="writes another prompt"):
        first.commit(deadline_s=10.0)
    statistics = store.statistics()
    assert (statistics.reserved_bytes, statistics.quarantined_bytes, statistics.committed_bytes) == (0, 0, 0)
