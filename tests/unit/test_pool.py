"""The pool: room, eviction, holds, quarantine, damage, the budget."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.errors import (
    LeaseGoneError,
    PoolError,
    PoolFullError,
    QuarantineFullError,
    RecordTooLargeError,
    StoreClosedError,
    WriteError,
)
from kvstore.limits import QUARANTINE_FRACTION_MAX
from kvstore.pool import HandOver, LRUPolicy, NodePath, Pool, Prompt, RecordName, Transaction
from kvstore.pool.index import NODE_BYTES, RECORD_BYTES
from kvstore.record import record_layout
from kvstore.spec import ChunkGrid, Shard
from kvstore.spec.shard import UnitRange
from kvstore.store import Store, open_store
from kvstore.testing.resources import Background
from kvstore.testing.specs import check_lease, dense, hybrid, latent, pure_state, put_all, put_states, put_tokens
from kvstore.testing.store_machine import receive
from kvstore.tiers import ArenaTier

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from kvstore.abc import Evictable, Slot

B = 16
SLOT = 8192
"""A record of the small specs: a header page and a body page."""


def ids_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * number + 1000 * seed) % 100_000 for number in range(length)]


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None, **identity: Any) -> None:
    with store.write(ids, resume_at=resume_at, **identity) as writer:
        put_all(writer)
        writer.commit()


def room(blocks: int, *, nodes: int = 8) -> int:
    """DRAM for so many records, with the index that they need."""
    return blocks * (SLOT + RECORD_BYTES) + (nodes + 1) * NODE_BYTES  # and the root


# Room


def test_a_pool_too_small_for_one_record() -> None:
    for make in (dense, hybrid, pure_state):
        with pytest.raises(RecordTooLargeError, match="open the store with more memory"):
            open_store(make(B), dram=4096)
    open_store(dense(B), dram=room(1, nodes=1)).close()


def test_sizes_that_are_none() -> None:
    for size in ("", "8 GiB of it", "-1", 0, -5):
        with pytest.raises(ValueError, match="size"):
            open_store(dense(B), dram=size)


def test_a_prompt_larger_than_the_pool_is_refused_at_once() -> None:
    with open_store(dense(B), dram=room(4)) as store:
        with pytest.raises(PoolFullError, match="more memory") as error:
            store.write(range(1 << 17))
        assert not error.value.retryable
        statistics = store.statistics()
        assert (statistics.nodes, statistics.reserved_bytes, statistics.index_bytes) == (0, 0, 0)


def test_least_recently_used_goes_first() -> None:
    prompts = [ids_of(32, seed) for seed in range(4)]
    with open_store(dense(B), dram=room(6)) as store:
        for ids in prompts[:3]:
            write(store, ids)
        store.read(store.match([*prompts[0], 1])).release()
        write(store, prompts[3])
        assert [store.match([*ids, 1]).tokens for ids in prompts] == [32, 0, 32, 32]
        store.pool.check()


def test_leaves_go_before_what_they_hang_on() -> None:
    """Also when a prompt was committed in parts, and when another continued it: the deepest block goes first."""
    ids = ids_of(96)
    with open_store(dense(B), dram=room(6, nodes=12)) as store:
        with store.write(ids, resume_at=()) as writer:
            for end in range(16, 97, 16):
                put_tokens(writer, end - 16, end)
                writer.commit(end)
        write(store, ids_of(16, 1))
        assert store.match([*ids, 1]).tokens == 80
        write(store, ids_of(32, 2))
        assert store.match([*ids, 1]).tokens == 48


def test_evicting_attention_takes_everything_below() -> None:
    ids = ids_of(70)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids, (16, 32, 64, 70))
        write(store, [*ids[:32], 9, 9], (34,))
        path = store.prompt(ids).path
        assert store.pool.evict(path.key(1)) > 0
        store.pool.check()
        match = store.match([*ids, 1])
        assert [candidate.tokens for candidate in match.candidates] == [16]
        assert store.match([*ids[:32], 9, 9, 9]).tokens == 16
        assert store.pool.evict(path.key(0)) > 0
        statistics = store.statistics()
        assert (statistics.committed_bytes, dict(statistics.bytes_by_salt)) == (0, {})
        assert store.pool.evict(path.key(0)) == store.pool.evict(b"unknown") == 0


def test_evicting_states_leaves_attention() -> None:
    ids = ids_of(70)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids, (32, 70))
        assert store.pool.evict(store.prompt(ids).path.key(4), states_only=True) > 0
        match = store.match([*ids, 1])
        assert (match.tokens, match.missing.attention_tokens) == (32, 64)
        with store.write(ids) as writer:
            put_states(writer, 70)
            writer.commit()
        assert store.match([*ids, 1]).tokens == 70


def test_evict_enough_or_change_nothing() -> None:
    prompts = [ids_of(32, seed) for seed in range(3)]
    with open_store(dense(B), dram=room(6)) as store:
        for ids in prompts:
            write(store, ids)
        held = store.read(store.match([*prompts[1], 1]))
        before = store.statistics()
        with pytest.raises(PoolFullError, match="leased or being written"):
            store.write(ids_of(80, 9))
        after = store.statistics()
        assert (after.committed_bytes, after.evicted_records, after.nodes, after.ghosts) == (
            before.committed_bytes,
            0,
            before.nodes,
            0,
        )
        assert [store.match([*ids, 1]).tokens for ids in prompts] == [32, 32, 32]
        held.release()
        write(store, ids_of(80, 9))
        store.pool.check()


@pytest.mark.parametrize("needed", [1, 3, 4, 7, 11])
def test_what_the_tier_asks_for_is_evicted_and_no_more(needed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes alone do not decide: a tier in slabs may need more room than is lacking."""

    def would_fit(self: ArenaTier, sizes_bytes: Sequence[int], freeing: Sequence[Slot] = ()) -> bool:
        return len(freeing) >= needed

    with open_store(dense(B), dram="4MiB") as store:
        for seed in range(12):
            write(store, ids_of(16, seed))
        monkeypatch.setattr(ArenaTier, "would_fit", would_fit)
        store.write(ids_of(16, 100)).abort()
        assert store.statistics().evicted_records == needed
        store.pool.check()
        monkeypatch.setattr(ArenaTier, "would_fit", lambda *_: False)
        with pytest.raises(PoolFullError):
            store.write(ids_of(16, 101))
        monkeypatch.undo()
        assert store.statistics().evicted_records == needed
        store.pool.check()


def test_what_is_leased_or_written_stays() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram=room(12, nodes=16)) as store:
        write(store, ids)
        lease = store.read(store.match([*ids, 1]))
        key = store.prompt(ids).path.key
        assert store.pool.evict(key(0)) == store.pool.evict(key(2), states_only=True) == 0
        for seed in range(1, 20):
            write(store, ids_of(16, seed))
        assert store.statistics().evicted_records > 0
        assert lease.verify() == []
        check_lease(lease, store.prompt(ids))
        lease.release()
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids)
        with store.write([*ids[:32], 5, 6]):
            assert store.pool.evict(key(0)) == store.pool.evict(key(1)) == 0
            assert store.pool.evict(key(2)) > 0
        assert store.pool.evict(key(0)) > 0


def test_the_budget_counts_the_index_too() -> None:
    with open_store(pure_state(B), dram=400 << 10) as store:
        for seed in range(60):
            write(store, ids_of(300, seed))
            statistics = store.statistics()
            used = statistics.committed_bytes + statistics.index_bytes
            assert used <= statistics.capacity_bytes
            store.pool.check()
        assert statistics.evicted_records > 0
        assert store.match([*ids_of(300, 59), 1]).tokens == 300


def test_ghosts_do_not_crowd_out_records() -> None:
    """They are hints, bounded by a share of the capacity."""
    with open_store(dense(B), dram=1 << 20) as store:
        for seed in range(300):
            write(store, ids_of(80, seed))
        statistics = store.statistics()
        assert 0 < statistics.ghosts * NODE_BYTES <= (1 << 20) / 32
        assert statistics.committed_bytes > 0.7 * (1 << 20)
        store.pool.check()


def test_ghosts_of_an_aborted_giant_go_as_others_do() -> None:
    with open_store(dense(B), dram=1 << 20) as store:
        for _ in range(3):
            store.write(ids_of(1000)).abort()
        assert store.statistics().ghosts * NODE_BYTES <= (1 << 20) / 32
        store.pool.check()


def test_salts_are_accounted_apart() -> None:
    with open_store(dense(B), dram="4MiB") as store:
        write(store, ids_of(32), salt=b"a")
        write(store, ids_of(64), salt=b"b")
        assert dict(store.statistics().bytes_by_salt) == {b"a": 2 * SLOT, b"b": 4 * SLOT}
        store.pool.evict(store.prompt(ids_of(32), salt=b"a").path.key(0))
        assert dict(store.statistics().bytes_by_salt) == {b"b": 4 * SLOT}


# Transactions


def names(store: Store, nodes: range, units: UnitRange | None = None) -> list[RecordName]:
    group = store.spec.groups[0]
    return [RecordName(node, 0, 0, units or group.all_units) for node in nodes]


def seal(transaction: Transaction) -> None:
    for index, record in enumerate(transaction.records):
        with transaction.moving():
            record.memory[record.layout.header_bytes :] = bytes(record.slot.size_bytes - record.layout.header_bytes)
            transaction.seal(index)


def test_attention_that_would_hang_in_the_air() -> None:
    with open_store(dense(B), dram="4MiB") as store:
        path = store.prompt(ids_of(64)).path
        with pytest.raises(WriteError, match="block before it"):
            store.pool.begin(path, names(store, range(2, 4)), salt=b"")
        assert store.statistics().nodes == 0
        half = store.pool.begin(path, names(store, range(2), UnitRange(0, 1)), salt=b"")
        seal(half)
        half.commit()
        with pytest.raises(WriteError, match="block before it"):
            store.pool.begin(path, names(store, range(2, 3)), salt=b"")
        store.pool.begin(path, names(store, range(2, 3), UnitRange(0, 1)), salt=b"").abort("enough seen")
        store.pool.check()


def test_states_may_come_before_their_attention() -> None:
    """Workers of one prompt commit in any order; here the one that stores no attention is first."""
    ids = ids_of(32)
    with open_store(latent(B), dram="4MiB") as store:
        for index in (1, 0):
            assert not store.match([*ids, 1])
            with store.write(ids, shard=Shard(index, 2)) as writer:
                put_all(writer)
                writer.commit()
        assert store.match([*ids, 1]).tokens == 32
        store.pool.check()


def test_a_refused_allocation_leaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: ArenaTier, sizes_bytes: Sequence[int]) -> Any:
        raise MemoryError

    with open_store(dense(B), dram="4MiB") as store:
        monkeypatch.setattr(ArenaTier, "allocate_all", fails)
        with pytest.raises(MemoryError):
            store.write(ids_of(80))
        monkeypatch.undo()
        store.pool.check()
        statistics = store.statistics()
        assert (statistics.reserved_bytes, statistics.nodes) == (0, 0)
        write(store, ids_of(80))


def test_an_aborted_writer_whose_bytes_are_still_moving_is_quarantined() -> None:
    with open_store(dense(B), dram=room(8)) as store:
        ids = ids_of(64)
        writer = store.write(ids)
        begun, go_on = threading.Event(), threading.Event()

        def move() -> None:
            with writer.transaction.moving():
                begun.set()
                assert go_on.wait(30)
                for record in writer.transaction.records:
                    record.memory[:] = b"\xee" * len(record.memory)

        moving = Background(move)
        assert begun.wait(30)
        writer.abort("the request was cancelled")
        statistics = store.statistics()
        assert (statistics.quarantined_bytes, statistics.reserved_bytes) == (4 * SLOT, 0)
        with pytest.raises(QuarantineFullError, match="dropped writers") as error:
            store.write(ids_of(16, 2))
        assert error.value.retryable
        go_on.set()
        moving.result(30)
        assert store.statistics().quarantined_bytes == 0
        store.pool.check()
        write(store, ids)


def test_late_bytes_reach_no_other_record() -> None:
    """Below the limit others go on; what lands late lands in slots that nobody else has."""
    with open_store(dense(B), dram=room(20, nodes=20)) as store:
        writer = store.write(ids_of(32))
        assert 2 * SLOT < 20 * SLOT * QUARANTINE_FRACTION_MAX
        with writer.transaction.moving():
            writer.abort("cancelled")
            for seed in range(1, 30):
                write(store, ids_of(32, seed))
            for record in writer.transaction.records:
                record.memory[:] = b"\xee" * len(record.memory)
        served = 0
        for seed in range(1, 30):
            match = store.match([*ids_of(32, seed), 1])
            if match:
                served += 1
                with store.read(match, verify=True) as lease:
                    check_lease(lease, store.prompt(ids_of(32, seed)))
        assert served >= 7
        assert store.statistics().damaged_records == 0
        store.pool.check()


def test_a_dropped_transaction_is_given_back() -> None:
    with open_store(dense(B), dram="4MiB") as store:
        path = store.prompt(ids_of(64)).path
        store.pool.begin(path, names(store, range(4)), salt=b"")
        statistics = store.statistics()
        assert (statistics.reserved_bytes, statistics.aborts) == (0, 1)
        store.pool.check()


# Damage


def test_a_condemned_block_takes_what_it_made_reachable() -> None:
    ids = ids_of(70)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids, (16, 32, 70))
        lease = store.read(store.match([*ids, 1]))
        writer = store.write([*ids, *range(40)])
        put_all(writer)
        store.pool.condemn(store.prompt(ids).path.key(1), is_state=False)
        store.pool.check()
        assert store.match([*ids, 1]).tokens == 16
        check_lease(lease, store.prompt(ids))
        # What another had reserved on top of it is complete, and yet not reachable.
        writer.commit()
        store.pool.check()
        assert store.match([*ids, *range(40), 1]).tokens == 16
        lease.release()
        assert store.statistics().quarantined_bytes == 0
        write(store, [*ids, *range(40)])
        assert store.match([*ids, *range(40), 1]).tokens == 110
        assert store.statistics().damaged_records == 1


def test_nothing_is_built_on_what_was_found_damaged() -> None:
    """Or the damage would come back with a good checksum."""
    ids = ids_of(40)
    for node, is_state in ((0, False), (1, False), (2, False), (2, True)):
        with open_store(hybrid(B), dram="4MiB") as store:
            write(store, ids)
            with store.read(store.match([*ids, 1])) as lease:
                store.pool.condemn(store.prompt(ids).path.key(node), is_state=is_state)
                for _ in range(2):
                    with pytest.raises(LeaseGoneError, match="damaged"):
                        store.write([*ids, 1, 2], resume=lease)
                    write(store, ids)
            assert store.statistics().reserved_bytes == 0
            store.pool.check()


def test_only_the_damaged_record_is_condemned_and_not_its_successor() -> None:
    ids = ids_of(16)
    with open_store(dense(B), dram="4MiB") as store:
        write(store, ids)
        with store.read(store.match([*ids, 1])) as lease:
            key, old = store.prompt(ids).path.key(0), lease.records[0].slot
            store.pool.condemn(key, is_state=False, slot=old)
            write(store, ids)
            store.pool.condemn(key, is_state=False, slot=old)
        assert store.match([*ids, 1]).tokens == 16
        assert store.statistics().damaged_records == 1
        store.pool.check()


def test_a_forgotten_tail_that_is_written_anew() -> None:
    """The old lease's end must not touch the new tail."""
    ids = ids_of(20)
    with open_store(hybrid(B), dram="4MiB") as store:
        lease = arrived(store, ids, HandOver(7))
        store.pool.take_handover(store.prompt(ids).path)
        store.pool.condemn(store.prompt(ids).path.key(1), is_state=False)
        write(store, ids)
        lease.release()
        store.pool.check()
        with store.read(store.match([*ids, 1]), verify=True) as again:
            assert again.tokens == 20
            check_lease(again, store.prompt(ids))


# Handing over


def arrived(store: Store, ids: list[int], handover: HandOver | None) -> Any:
    """A prompt comes from another node; a lease on it."""
    prompt = store.prompt(ids)
    with open_store(store.spec, dram="4MiB") as source:
        write(source, ids)
        with source.read(source.match([*ids, 1])) as lease:
            transaction = store.pool.begin(
                prompt.path,
                [held.name for held in lease.records],
                salt=b"",
                resume_nodes=[len(prompt.path) - 1],
                is_transient=True,
            )
            receive(lease, transaction)
    transaction.commit(handover=handover)
    return store.read(store.match([*ids, 1]))


def test_a_hand_overs_tail_goes_with_it() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        lease = arrived(store, ids, HandOver(7, b"logits"))
        assert lease.handover == HandOver(7, b"logits")
        waiting = store.accept(ids)
        arrival = waiting.result(0.0)
        assert (arrival.handover, arrival.match.tokens) == (HandOver(7, b"logits"), 40)
        check_lease(lease, store.prompt(ids))
        lease.release()
        assert store.match([*ids, 1]).tokens == 40, "the arrival still holds it"
        check_lease(arrival.lease, store.prompt(ids))
        arrival.lease.release()
        match = store.match([*ids, 1])
        assert (match.tokens, match.missing.attention_tokens) == (0, 32)
        store.pool.check()


def test_a_hand_over_of_what_workers_wrote_on_different_grids() -> None:
    """It was complete before it came, if on no single grid; who takes it over must be able to read it."""
    ids = ids_of(40)
    with open_store(dense(B), dram="4MiB") as store:
        for index, grid in enumerate((ChunkGrid.every(8, upto=40), None)):
            with store.write(ids, shard=Shard(index, 2), grid=grid) as writer:
                put_all(writer)
                writer.commit()
        arrived(store, ids, HandOver(7)).release()
        arrival = store.accept(ids).result(0.0)
        with arrival.lease as lease:
            assert lease.tokens == 40
            check_lease(lease, store.prompt(ids))


def test_a_hand_overs_tail_stays_while_a_writer_builds_on_it() -> None:
    ids = ids_of(40)
    longer = [*ids, *range(20)]
    with open_store(hybrid(B), dram="4MiB") as store:
        arrived(store, ids, HandOver(7)).release()
        arrival = store.accept(ids).result(0.0)
        with arrival.lease as lease, store.write(longer, resume=lease) as writer:
            lease.release()
            assert store.match([*ids, 1]).tokens == 40
            put_all(writer, start=40)
            writer.commit()
        assert store.match([*ids, 1]).tokens == 0
        assert store.match([*longer, 1]).tokens == 60
        store.pool.check()


def test_the_tail_stays_until_the_hand_over_is_taken() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        arrived(store, ids, HandOver(7)).release()
        assert store.match([*ids, 1]).tokens == 40


def test_a_tail_that_was_there_before_stays() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids)
        lease = arrived(store, ids, HandOver(7))
        assert store.pool.take_handover(store.prompt(ids).path) == HandOver(7)
        lease.release()
        assert store.match([*ids, 1]).tokens == 40


def test_a_tail_that_somebody_stores_for_good_stays() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        lease = arrived(store, ids, HandOver(7))
        write(store, ids)
        store.pool.take_handover(store.prompt(ids).path)
        lease.release()
        assert store.match([*ids, 1]).tokens == 40


def test_a_hand_over_goes_with_its_records() -> None:
    """Or a later writer of the same prompt would seem to hand over what an earlier one did."""
    ids = ids_of(32)
    for make in (dense, hybrid, pure_state):
        with open_store(make(B), dram="4MiB") as store:
            with store.write(ids) as writer:
                put_all(writer)
                writer.commit(handover=HandOver(7, bytes(1000)))
            counted = store.statistics().index_bytes
            for states_only in (True, False):
                store.pool.evict(store.prompt(ids).path.key(1), states_only=states_only)
            assert store.statistics().index_bytes <= counted - 1000
            write(store, ids)
            assert store.pool.take_handover(store.prompt(ids).path) is None
            store.pool.check()


def test_accept_and_when_ready_wait() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        accepted, second, ready = store.accept(ids), store.accept(ids), store.when_ready([*ids, 1], 32)
        given_up = store.accept(ids)
        given_up.cancel("the client is gone")
        with store.write(ids, resume_at=(32, 40)) as writer:
            put_all(writer)
            assert not accepted.done()
            assert not ready.done()
            writer.commit(32)
            assert ready.result(0.0).tokens == 32
            assert not accepted.done()
            writer.commit(handover=HandOver(5))
        assert accepted.result(0.0).handover == HandOver(5)
        assert not second.done(), "each hand-over is taken once"
        with pytest.raises(Exception, match="the client is gone"):
            given_up.result(0.0)
        with store.read(accepted.result(0.0).match) as lease:
            assert lease.tokens == 40
    with pytest.raises(StoreClosedError):
        second.result(0.0)


def test_a_hand_over_can_be_awaited() -> None:
    import asyncio

    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:

        async def decode() -> int:
            handle = store.accept(ids)
            asyncio.get_running_loop().call_later(0.01, prefill)
            return (await asyncio.wait_for(handle, 30)).handover.first_token

        def prefill() -> None:
            with store.write(ids) as writer:
                put_all(writer)
                writer.commit(handover=HandOver(5))

        assert asyncio.run(decode()) == 5


# The end


def test_a_closed_store_says_so_everywhere() -> None:
    ids = ids_of(40)
    store = open_store(hybrid(B), dram="4MiB")
    write(store, ids)
    prompt = store.prompt(ids)
    match = store.match([*ids, 1])
    lease, writer, idle = store.read(match), store.write(ids_of(40, 1)), store.write(ids_of(40, 2))
    view = lease.layer(1).blocks("keys")[0]
    kept = view.copy()
    store.close()
    store.close()
    assert store.is_closed
    for use in (
        lambda: store.match(ids),
        lambda: store.read(match),
        lambda: store.write(ids),
        lambda: store.accept(ids).result(0.0),
        lambda: store.when_ready(ids, 1).result(0.0),
        store.check_open,
        lambda: lease.layer(1),
        lambda: lease.verify(),
        lambda: put_tokens(writer, 0, 40),
        lambda: writer.commit(),
        lambda: store.pool.evict(prompt.path.key(0)),
        lambda: store.pool.begin(prompt.path, [], salt=b""),
        lambda: store.pool.missing(prompt.path, []),
        lambda: store.pool.hold(prompt.path),
        lambda: store.pool.take_handover(prompt.path),
        lambda: store.pool.condemn(prompt.path.key(0), is_state=True),
    ):
        with pytest.raises(StoreClosedError, match="closed"):
            use()
    lease.release()
    writer.abort()
    with idle:
        pass
    assert (view == kept).all(), "memory that somebody still sees was taken away"
    statistics = store.statistics()
    assert (statistics.committed_bytes, statistics.nodes) == (0, 0)
    store.pool.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_after_a_fork_the_childs_store_is_closed() -> None:
    """Also if another thread held the locks at that moment."""
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids)
        lease = store.read(store.match([*ids, 1]))
        writer = store.write(ids_of(40, 1))
        locked, go_on = threading.Event(), threading.Event()

        def lock() -> None:
            with store.pool._lock, store._waiters._lock, store._lock, writer.transaction._lock:
                locked.set()
                go_on.wait(30)

        holder = Background(lock)
        assert locked.wait(30)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            seen = b""
            try:
                for use in (
                    lambda: store.match(ids),
                    lambda: store.write(ids),
                    lambda: store.accept(ids).result(0.0),
                    lambda: lease.layer(1),
                    lambda: put_tokens(writer, 0, 40),
                    lambda: writer.commit(),
                ):
                    try:
                        use()
                        seen += b"-"
                    except StoreClosedError:
                        seen += b"c"
                lease.release()
                writer.abort()
                store.close()
                seen += b"."
            finally:
                os.write(writing, seen)
                os._exit(0)
        go_on.set()
        holder.result(30)
        os.close(writing)
        import select

        ready, _, _ = select.select([reading], [], [], 30)
        seen = os.read(reading, 100) if ready else b"hangs"
        os.close(reading)
        if not ready:
            os.kill(child, 9)
        os.waitpid(child, 0)
        assert seen == b"cccccc."
        check_lease(lease, store.prompt(ids))
        lease.release()
        writer.abort()
        assert store.match([*ids, 1]).tokens == 40
        store.pool.check()


def test_a_tier_without_views_is_refused() -> None:
    class Blind(ArenaTier):
        @property
        def supports_views(self) -> bool:
            return False

    with pytest.raises(NotImplementedError, match="has no views"):
        Pool(dense(B), Blind(1 << 20))


def test_an_old_match_is_taken_whole_or_not_at_all() -> None:
    ids = ids_of(40)
    with open_store(hybrid(B), dram="4MiB") as store:
        write(store, ids)
        match = store.match([*ids, 1])
        store.pool.evict(store.prompt(ids).path.key(2), states_only=True)
        with pytest.raises(LeaseGoneError, match="match again") as error:
            store.read(match)
        assert error.value.retryable
        write(store, ids)
        with store.read(match) as lease:
            check_lease(lease, store.prompt(ids))
        strict = store.match([*ids, 1], grid=ChunkGrid.every(40, upto=41))
        assert not strict


def test_statistics_add_up() -> None:
    with open_store(hybrid(B), dram=300 << 10) as store:
        for seed in range(12):
            ids = ids_of(20 + seed, seed)
            store.match(ids)
            with store.write(ids, salt=bytes([seed % 3])) as writer:
                put_all(writer)
                if seed % 4:
                    writer.commit()
            statistics = store.statistics()
            assert sum(statistics.bytes_by_salt.values()) == statistics.committed_bytes
            total = statistics.committed_bytes + statistics.reserved_bytes + statistics.quarantined_bytes
            assert total + statistics.index_bytes <= statistics.capacity_bytes
        assert (statistics.commits, statistics.aborts, statistics.matches, statistics.hits) == (9, 3, 12, 0)
        assert record_layout(store.spec, 0, 0, store.spec.groups[0].all_units).slot_bytes == SLOT


# A tier that fails


class FailingTier(ArenaTier):
    """Fails once, in the call after so many."""

    calls_left: int | None = None

    def _count(self) -> None:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                self.calls_left = None
                raise OSError("injected")

    def allocate_all(self, sizes_bytes: Sequence[int]) -> list[Slot] | None:
        self._count()
        return super().allocate_all(sizes_bytes)

    def pin_all(self, slots: Iterable[Slot]) -> None:
        self._count()
        super().pin_all(slots)

    def views(self, slots: Iterable[Slot]) -> list[memoryview]:
        slots = list(slots)
        for _ in slots:
            self._count()
        return super().views(slots)


def test_a_tier_that_fails_costs_nothing() -> None:
    tier = FailingTier(room(20))
    store = Store(Pool(hybrid(B), tier))
    write(store, ids_of(40), resume_at=(40,))
    before = store.statistics()
    longer, failures = ids_of(72), 0
    for calls in range(40):
        hit = store.match(longer)
        tier.calls_left = calls
        try:
            with store.read(hit) as lease:
                store.write(longer, resume=lease).abort("enough")
        except OSError:
            failures += 1
        tier.calls_left = None
        store.pool.check()
        after = store.statistics()
        assert (after.reserved_bytes, after.quarantined_bytes) == (0, 0)
        assert after.committed_bytes == before.committed_bytes
    assert 5 < failures < 40
    key = store.prompt(longer).path.key(0)
    assert store.pool.evict(key) > 0, "something is still held"
    store.close()


def test_a_handover_that_cannot_be_held_still_waits() -> None:
    tier = FailingTier(room(20))
    pool = Pool(dense(B), tier)
    prompt = Prompt.of(pool.spec, ids_of(20))
    names = [RecordName(node, 0, 0, UnitRange(0, 2)) for node in range(2)]
    transaction = pool.begin(prompt.path, names, salt=b"", is_transient=True)
    transaction.seal_all([0, 1], [0, 0])
    transaction.commit(handover=HandOver(7))
    tier.calls_left = 0
    with pytest.raises(OSError, match="injected"):
        pool.accept_handover(prompt.path)
    accepted = pool.accept_handover(prompt.path)
    assert accepted is not None
    assert accepted[0] == HandOver(7)
    accepted[2].release()
    pool.check()
    pool.close()


def test_a_path_without_nodes_is_refused() -> None:
    with open_store(dense(B), dram=room(4)) as store:
        path = store.prompt(ids_of(B)).path
        with pytest.raises(WriteError, match="without tokens"):
            store.pool.begin(NodePath(path.root, B, ()), [], salt=b"")
        store.pool.check()
        assert store.statistics().index_bytes == 0


# A policy that fails


class FailingPolicy(LRUPolicy):
    """Raises in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self._method = method

    def _fail_in(self, method: str) -> None:
        if method == self._method:
            raise RuntimeError("a mistake of the policy's")

    def insert(self, item: Evictable) -> None:
        self._fail_in("insert")
        super().insert(item)

    def access(self, item: Evictable) -> None:
        self._fail_in("access")
        super().access(item)

    def remove(self, item: Evictable) -> None:
        self._fail_in("remove")
        super().remove(item)

    def ranked(self) -> Iterator[Evictable]:
        self._fail_in("ranked")
        return super().ranked()


@pytest.mark.parametrize("method", ["insert", "access", "remove", "ranked"])
def test_a_policy_that_fails_is_named_and_breaks_nothing(method: str) -> None:
    store = Store(Pool(dense(B), ArenaTier(room(12)), eviction=FailingPolicy(method)))
    for seed in range(2):
        write(store, ids_of(40, seed))
        prompt = store.prompt(ids_of(40, seed))
        with store.read(store.match([*ids_of(40, seed), 0])) as lease:
            check_lease(lease, prompt)
    assert store.pool.evict(store.prompt(ids_of(40, 1)).path.key(2)) > 0

    def fill() -> None:
        for seed in range(2, 10):
            write(store, ids_of(40, seed))

    with pytest.raises(PoolError, match="FailingPolicy failed with RuntimeError: a mistake"):
        fill()
    store.pool.check()
    assert store.statistics().reserved_bytes == 0
    assert store.match([*ids_of(40), 0]).tokens == 40
    store.close()


def test_a_tail_for_a_handover_goes_with_the_last_who_relied_on_it() -> None:
    pool = Pool(dense(B), ArenaTier(room(20)))
    prompt = Prompt.of(pool.spec, ids_of(20))
    names = [RecordName(node, 0, 0, UnitRange(0, 2)) for node in range(2)]
    transaction = pool.begin(prompt.path, names, salt=b"", is_transient=True)
    transaction.seal_all([0, 1], [0, 0])
    transaction.commit(handover=HandOver(7))
    other = pool.begin(prompt.path, names, salt=b"")
    accepted = pool.accept_handover(prompt.path)
    assert accepted is not None
    accepted[2].release()
    assert pool.match(Prompt.of(pool.spec, [*ids_of(20), 0])).tokens == 20, "what a writer relies on has gone"
    other.abort("enough")
    assert pool.match(Prompt.of(pool.spec, [*ids_of(20), 0])).tokens == B
    pool.check()
    pool.close()
