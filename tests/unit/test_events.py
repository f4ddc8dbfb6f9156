"""Event streams: what is told, in which order, and what becomes of whoever does not listen."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import threading
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.errors import DeadlineError, StoreClosedError
from kvstore.events import Block, Event, EventStream, Hit, Missed, MissReason, Removed, RemovedWhy, Stored
from kvstore.limits import EVENT_BLOCKS_MAX, EVENTS_CAPACITY_MAX
from kvstore.pool import HandOver
from kvstore.spec import ChunkGrid, ReuseRule, Shard
from kvstore.store import open_store
from kvstore.testing.specs import dense, hybrid, put_all, tensors_of

if TYPE_CHECKING:
    from kvstore.store import Store

B = 16
IDS = [(7 * number) % 1000 for number in range(70)]


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None, **more: Any) -> None:
    with store.write(ids, resume_at=resume_at, **more) as writer:
        put_all(writer)
        writer.commit()


def readable(stream: EventStream) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


def missed(store: Store, ids: list[int], **how: Any) -> tuple[int, MissReason]:
    with store.events(kinds=(Missed,)) as stream:
        store.match(ids, **how)
        (event,) = stream.take()
    assert isinstance(event, Missed)
    return event.matched_tokens, event.reason


def test_stored_names_each_block_with_its_parent() -> None:
    with open_store(hybrid(B), dram="8MiB") as store, store.events() as stream:
        write(store, IDS, (32, 70), salt=b"tenant")
        (event,) = stream.take()
        assert isinstance(event, Stored)
        path = store.prompt(IDS, salt=b"tenant").path
        assert (event.sequence, event.tier, event.salt, event.tokens) == (1, "dram", b"tenant", 70)
        attention = [block for block in event.blocks if not block.is_state]
        assert [(block.key, block.parent, block.end_tokens) for block in attention] == [
            (path.key(number), path.parent(number), path.end_tokens(number)) for number in range(5)
        ]
        states = {(block.key, block.end_tokens) for block in event.blocks if block.is_state}
        assert states == {(path.key(1), 32), (path.key(4), 70)}
        assert set(event.keys) == set(path.node_keys)
        assert event.size_bytes == store.statistics().committed_bytes
        assert isinstance(event.blocks[0], Block)


def test_hits_and_misses() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (32, 64))
        with store.events(kinds=(Hit, Missed)) as stream:
            store.match(IDS)
            store.match(IDS[:65])
            store.match([1, 2, 3], salt=b"other")
            hit, short, whole, nothing = stream.take()
        path = store.prompt(IDS).path
        assert isinstance(hit, Hit)
        assert (hit.key, hit.tokens, hit.asked_tokens, hit.tier) == (path.key(3), 64, 69, "dram")
        assert hit.size_bytes == store.match(IDS).best.size_bytes  # type: ignore[union-attr]
        assert isinstance(short, Missed)
        assert (short.key, short.matched_tokens, short.reason) == (path.key(4), 64, MissReason.NEVER_STORED)
        assert isinstance(whole, Hit), "a match that found all that could be found missed nothing"
        assert isinstance(nothing, Missed)
        assert (nothing.salt, nothing.asked_tokens, nothing.matched_tokens) == (b"other", 2, 0)


def test_why_there_is_no_more() -> None:
    """Each obstacle is named, and by its own name."""
    with open_store(hybrid(B), dram="8MiB") as store:
        assert missed(store, IDS) == (0, MissReason.NEVER_STORED)
        writer = store.write(IDS, resume_at=(64,), grid=ChunkGrid.every(32, upto=70))
        put_all(writer)
        assert missed(store, IDS) == (0, MissReason.PENDING)
        writer.commit()
        key = store.prompt(IDS).path.key
        assert missed(store, IDS, salt=b"other") == (0, MissReason.NEVER_STORED), "another tenant's prompt is revealed"
        assert missed(store, IDS, grid=ChunkGrid.every(16, upto=70)) == (0, MissReason.OTHER_CHUNKS)
        assert missed(store, [*IDS, 1]) == (64, MissReason.NEVER_STORED)
        store.pool.evict(key(3), states_only=True)
        assert missed(store, IDS) == (0, MissReason.EVICTED)
        store.pool.evict(key(0))
        assert missed(store, IDS) == (0, MissReason.EVICTED)
        write(store, [7, *IDS], (32,))
        assert missed(store, [7, *IDS]) == (32, MissReason.NO_CHECKPOINT)
        write(store, IDS, (32,))
        store.pool.condemn(key(1), is_state=True)
        assert missed(store, IDS[:40]) == (0, MissReason.DAMAGED)
        store.pool.condemn(key(0), is_state=False)
        assert missed(store, IDS) == (0, MissReason.DAMAGED)
        assert "damaged" in store.match(IDS).missing.reasons[0]
        write(store, IDS, (32,))
        store.pool.evict(key(0))
        assert missed(store, IDS) == (0, MissReason.EVICTED), "what was stored anew is not damaged"


def test_another_shard() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (64,), shard=Shard(0, 2))
        assert missed(store, IDS, shard=Shard(0, 2)) == (64, MissReason.NEVER_STORED)
        assert missed(store, IDS, shard=Shard(1, 2)) == (0, MissReason.OTHER_SHARD)
        assert "of another shard" in store.match(IDS, shard=Shard(1, 2)).missing.reasons[0]


@pytest.mark.parametrize("is_state", [False, True])
def test_removed_says_why(is_state: bool) -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (32, 64))
        key = store.prompt(IDS).path.key(1)
        with store.events(kinds=(Removed,)) as stream:
            store.pool.evict(key, states_only=is_state)
            (event,) = stream.take()
        assert isinstance(event, Removed)
        assert (event.why, event.tier) == (RemovedWhy.DROPPED, "dram")
        below = {(store.prompt(IDS).path.key(number), False) for number in (1, 2, 3)} - {(key, is_state)}
        states = {(store.prompt(IDS).path.key(number), True) for number in (1, 3)}
        gone = {(key, True)} if is_state else below | states | {(key, False)}
        assert {(block.key, block.is_state) for block in event.blocks} == gone
        with store.events(kinds=(Removed,)) as stream:
            store.pool.condemn(store.prompt(IDS).path.key(0), is_state=False)
            (event,) = stream.take()
        assert isinstance(event, Removed)
        assert event.why is RemovedWhy.DAMAGED


def test_a_handed_over_tail_goes() -> None:
    with open_store(hybrid(B), dram="8MiB") as store, store.events(kinds=(Removed,)) as stream:
        path = store.prompt(IDS).path
        with store.write(IDS, resume_at=(70,)) as source:
            put_all(source)
            names = [record.name for record in source.transaction.records]
            memories = {record.name: bytes(record.memory) for record in source.transaction.records}
        transaction = store.pool.begin(path, names, salt=b"", resume_nodes=[len(path) - 1], is_transient=True)
        with transaction.moving():
            for number, record in enumerate(transaction.records):
                record.memory[:] = memories[record.name]
                transaction.seal(number)
        transaction.commit(handover=HandOver(5))
        assert not stream.take()
        store.accept(IDS).result(30.0).lease.release()
        (event,) = stream.take()
        assert isinstance(event, Removed)
        assert (event.why, event.keys) == (RemovedWhy.HANDED_OVER, (path.tail_key, path.tail_key))


def test_eviction_in_bulk_comes_in_few_events() -> None:
    """Thousands of nodes that make room for one prompt are told of by arrays, cut to pieces of a bounded size."""
    blocks = EVENT_BLOCKS_MAX + 400
    with open_store(dense(1), dram=blocks * (8192 + 600)) as store:
        with store.write(list(range(blocks))) as writer:
            put_all(writer)
            writer.commit()
        with store.events(kinds=(Removed, Stored)) as stream:
            with store.write([5] * blocks) as writer:
                put_all(writer)
                writer.commit()
            events = [event for event in stream.take() if isinstance(event, Removed)]
        evicted = [block for event in events for block in event.blocks]
        assert len(evicted) > EVENT_BLOCKS_MAX
        assert all(event.why is RemovedWhy.EVICTED and len(event.blocks) <= EVENT_BLOCKS_MAX for event in events)
        assert len(events) <= 1 + len(evicted) // EVENT_BLOCKS_MAX
        assert len({block.key for block in evicted}) == len(evicted)


def test_who_is_slow_loses_the_oldest_and_knows_it() -> None:
    with open_store(dense(B), dram="8MiB") as store, store.events(capacity=4, kinds=(Missed,)) as stream:
        for number in range(10):
            store.match([number, 1])
        assert (stream.dropped, len(stream)) == (6, 4)
        assert [event.sequence for event in stream.take()] == [7, 8, 9, 10]
        store.match([1, 2])
        (event,) = stream.take()
        assert (event.sequence, stream.dropped) == (11, 6)
        assert store.metrics().dropped_events == 6


def test_contents_and_what_follows_meet_without_gap() -> None:
    """Writers commit while somebody subscribes: each block comes once, in the contents or in the stream."""
    with open_store(dense(1), dram="32MiB") as store:
        stop = threading.Event()
        written: list[bytes] = []

        def fill(seed: int) -> None:
            for number in range(60):
                ids = [seed, number]
                write(store, ids)
                written.extend(store.prompt(ids).path.keys)
            stop.set()

        threads = [threading.Thread(target=fill, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        seen = []
        while not stop.is_set():
            with store.events(contents=True, kinds=(Stored,)) as stream:
                seen.append(stream)
                stop.wait(0.002)
        last = store.events(contents=True, kinds=(Stored,))
        for thread in threads:
            thread.join()
        events = [event for event in last.take() if isinstance(event, Stored)]
        keys = [key for event in (*last.contents, *events) for key in event.keys]
        assert sorted(keys) == sorted(set(written))


def test_waiting_with_a_deadline() -> None:
    with open_store(dense(B), dram="8MiB") as store, store.events(kinds=(Missed,)) as stream:
        with pytest.raises(DeadlineError, match=r"no event came within 0\.01 s"):
            stream.next(0.01)
        thread = threading.Thread(target=store.match, args=([1, 2],))
        thread.start()
        event = stream.next(30.0)
        thread.join()
        assert isinstance(event, Missed)
        store.match([3, 4])
        each = stream.each(0.01)
        assert isinstance(next(each), Missed)
        with pytest.raises(DeadlineError):
            next(each)


def test_a_descriptor_that_says_when() -> None:
    with open_store(dense(B), dram="8MiB") as store:
        stream = store.events(kinds=(Missed,))
        assert not readable(stream)
        store.match([1, 2])
        store.match([1, 2])
        assert readable(stream)
        stream.next(1.0)
        assert readable(stream)
        stream.take()
        assert not readable(stream)
        store.match([1, 2])
        assert readable(store.events(kinds=(Stored,))) is False
        stream.close()
        assert readable(stream)
        assert len(list(stream.each(1.0))) == 1
        assert readable(stream), "the end is not to be missed"


def test_asyncio() -> None:
    async def listen(stream: EventStream, count: int) -> list[Event]:
        found: list[Event] = []
        async for event in stream:
            found.append(event)
            if len(found) == count:
                break
        return found

    async def run() -> None:
        with open_store(dense(B), dram="8MiB") as store:
            streams = [store.events(kinds=(Missed,)) for _ in range(2)]
            tasks = [asyncio.create_task(listen(stream, 3)) for stream in streams]
            for number in range(3):
                await asyncio.sleep(0)
                await asyncio.to_thread(store.match, [number, 1])
            results = await asyncio.wait_for(asyncio.gather(*tasks), 30.0)
            assert [[event.sequence for event in found] for found in results] == [[1, 2, 3], [1, 2, 3]]
            rest = asyncio.create_task(listen(streams[0], 9))
            await asyncio.sleep(0)
            store.close()
            assert await asyncio.wait_for(rest, 30.0) == []

    asyncio.run(run())


def test_closing_the_store_ends_the_streams() -> None:
    store = open_store(hybrid(B), dram="8MiB")
    write(store, IDS, (64,))
    stream = store.events(kinds=(Removed,))
    waiting = threading.Thread(target=store.close)
    waiting.start()
    event = stream.next(30.0)
    waiting.join()
    assert isinstance(event, Removed)
    assert (event.why, len(event.blocks)) == (RemovedWhy.CLOSED, 5)
    assert stream.next(0.0) is None
    assert stream.is_ended
    with pytest.raises(StoreClosedError):
        store.events()


def test_nobody_listens_and_nothing_is_noted() -> None:
    """Streams that were closed or dropped leave the pool as it was."""
    with open_store(dense(B), dram="8MiB") as store:
        store.events().close()
        stream = store.events()
        del stream
        gc.collect()
        write(store, IDS)  # whoever is gone is noticed now
        native = store.pool._index.native  # type: ignore[attr-defined]
        write(store, [1, *IDS])
        assert native.change_count == 0
        assert store.pool._index._watchers == ()  # type: ignore[attr-defined]
        assert store.metrics().streams == 0
        assert not store.observer._wants_use or store.match([9, 9]).tokens == 0
        assert not store.observer._wants_use


@pytest.mark.parametrize("capacity", [0, -1, EVENTS_CAPACITY_MAX + 1])
def test_a_capacity_out_of_range(capacity: int) -> None:
    with open_store(dense(B), dram="8MiB") as store, pytest.raises(ValueError, match="1 to 1048576 events"):
        store.events(capacity)


def test_kinds_that_are_none() -> None:
    with open_store(dense(B), dram="8MiB") as store:
        for kinds in ((), (Event,), (int,)):
            with pytest.raises(ValueError, match="Stored, Removed, Hit, Missed"):
                store.events(kinds=kinds)  # type: ignore[arg-type]


def test_after_a_fork_the_childs_stream_has_ended() -> None:
    with open_store(dense(B), dram="8MiB") as store, store.events(kinds=(Missed,)) as stream:
        stream.fileno()
        store.match([1, 2])
        child = os.fork()
        if child == 0:
            ok = stream.is_ended and stream.take() == [] and stream.next(0.0) is None and readable(stream)
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(stream.take()) == 1
        assert not readable(stream)


def test_a_policy_that_ranks_and_a_listener_hear_the_same() -> None:
    from kvstore.pool import LRUPolicy

    spec = hybrid(B)
    with open_store(spec, dram="8MiB", eviction=LRUPolicy()) as store, store.events(kinds=(Stored,)) as stream:
        write(store, IDS, (64,))
        (event,) = stream.take()
        assert isinstance(event, Stored)
        assert len(event.blocks) == 4 + 1
        assert tensors_of(spec, ReuseRule.STATE)
