"""One pool, several processes: what one writes the others read, and whatever becomes of a process harms nobody."""

from __future__ import annotations

import gc
import os
import socket
import stat
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kvstore
from kvstore.attached import AttachedPool, Owner
from kvstore.attached.frames import HEADER_BYTES, Kind, frame, parse_header
from kvstore.attached.messages import Hello
from kvstore.attached.session import OUTGOING_BYTES_MAX
from kvstore.attached.transaction import AttachedTransaction
from kvstore.errors import (
    AttachError,
    JointCommitError,
    LeaseError,
    LeaseGoneError,
    OwnerGoneError,
    QuarantineFullError,
    QuotaTooSmallError,
    SpecError,
    StoreClosedError,
    TransferAbortedError,
    UnavailableError,
    WriteError,
)
from kvstore.pool import HandOver, Pool, StoreLimits, Transaction
from kvstore.spec import Shard
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.specs import check_lease, dense, hybrid, put_all, put_tokens
from kvstore.transfer import TransferObserver
from tests.attached.driver import Worker, WorkerError, eventually, socket_folder, workers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvstore.abc import Slot
    from kvstore.store import Store

SPEC = hybrid(16)
IDS = list(range(100))
DEADLINE_S = 60.0


@pytest.fixture
def path() -> Iterator[str]:
    # Around the whole test: what its variables still view keeps memory mapped, and that has descriptors.
    with leaves_nothing(), socket_folder() as folder:
        yield f"{folder}/pool.sock"


@contextmanager
def opened(path: str, dram: str = "32MiB", **options: Any) -> Iterator[Store]:
    """An owner that has every byte back at the end, unless the test closed it."""
    with kvstore.open(SPEC, dram=dram, socket=path, **options) as store:
        yield store
        if not store.is_closed:
            eventually(lambda: store.statistics().reserved_bytes + store.statistics().quarantined_bytes == 0)
            store.pool.check()


def owner_of(store: Store) -> Owner:
    assert store._owner is not None
    return store._owner


def check_read(store: Store, ids: list[int] = IDS, tokens: int | None = None) -> None:
    match = store.match([*ids, 0])
    assert match.tokens == (len(ids) if tokens is None else tokens)
    with store.read(match, verify=True) as lease:
        check_lease(lease, store.prompt(ids[: lease.tokens]))


def write(store: Store, ids: list[int] = IDS, **options: Any) -> None:
    with store.write(ids, **options) as writer:
        put_all(writer)
        writer.commit()


# What one process writes, the others read


def test_what_a_worker_writes_everybody_reads(path: str) -> None:
    with opened(path) as store, workers(path, 2) as (first, second):
        first.call("write", ids=IDS)
        assert second.call("read", ids=IDS) == len(IDS)
        check_read(store)
        write(store, [*IDS, *IDS])
        assert first.call("read", ids=[*IDS, *IDS]) == 2 * len(IDS)
        assert second.call("match", ids=[*IDS, 7]) == [len(IDS), 0]
        states = {state.pid: state for state in owner_of(store).processes()}
        assert states[first.pid].leases == states[second.pid].leases == 1
        assert first.call("statistics") == {"reserved": 0, "quarantined": 0}
        first.call("release")
        first.call("close")
        eventually(lambda: first.pid not in {state.pid for state in owner_of(store).processes()})


def test_each_worker_writes_its_own_shard(path: str) -> None:
    with opened(path) as store, workers(path, 2) as both:
        for rank, worker in enumerate(both):
            worker.call("write", ids=IDS, shard=(rank, 2))
        check_read(store)
        for rank, worker in enumerate(both):
            assert worker.call("read", ids=IDS, shard=(rank, 2)) == len(IDS)


def test_a_hand_over_between_workers(path: str) -> None:
    with opened(path) as store, workers(path, 2) as (prefill, decode):
        decode.post("accept", ids=IDS, deadline_s=DEADLINE_S)
        prefill.call("begin", ids=IDS)
        prefill.call("put")
        prefill.call("commit", first_token=17)
        assert decode.answer() == 17
        assert store.match([*IDS, 0]).tokens == len(IDS)


def test_a_worker_gives_a_prefix_its_time_to_live_and_its_salt_has_a_quota(path: str) -> None:
    now_s = [1000.0]
    limits = StoreLimits(quotas={b"small": "64KiB"}, lease_max_s=30)
    with (
        opened(path, limits=limits, clock=lambda: now_s[0]),
        kvstore.attach(path, deadline_s=DEADLINE_S) as attached,
    ):
        write(attached, ttl_s=10)
        with pytest.raises(QuotaTooSmallError, match="the quota of salt b'small' is 65536"):
            attached.write(IDS, salt=b"small")
        for refused in (lambda: attached.pin(attached.match([*IDS, 0])), lambda: attached.expire(IDS)):
            with pytest.raises(UnavailableError, match="process that owns the pool"):
                refused()
        now_s[0] += 9.9
        check_read(attached)
        now_s[0] += 0.1
        assert attached.match([*IDS, 0]).tokens == 0


def test_a_worker_that_holds_a_lease_for_too_long_loses_what_it_has(path: str) -> None:
    now_s = [1000.0]
    with (
        opened(path, limits=StoreLimits(lease_max_s=30), clock=lambda: now_s[0]) as store,
        kvstore.attach(path, deadline_s=DEADLINE_S) as attached,
    ):
        write(store)
        lease = attached.read(attached.match([*IDS, 0]))
        now_s[0] += 29.9
        check_lease(lease, store.prompt(IDS))
        assert attached.match([*IDS, 0]).tokens == len(IDS)
        check_lease(lease, store.prompt(IDS))
        now_s[0] += 0.2
        assert attached.match([*IDS, 0]).tokens == len(IDS)  # whatever the owner answers it has seen the end before
        with pytest.raises(LeaseGoneError, match="held a lease for longer than its owner bears"):
            check_lease(lease, store.prompt(IDS))
        assert store.statistics().expired_leases == 1
        check_read(attached)
        eventually(lambda: store.pool.evict(store.prompt(IDS).path.key(0)))


def test_in_one_process_too(path: str) -> None:
    """An attached store has the whole interface of the owner's own, whichever process it is in."""
    with opened(path) as store, kvstore.attach(path, spec=SPEC, deadline_s=DEADLINE_S) as attached:
        waiting = attached.when_ready([*IDS, 0], len(IDS))
        write(attached)
        assert waiting.result(DEADLINE_S).tokens == len(IDS)
        check_read(attached)
        longer = [*IDS, *range(50)]
        with attached.read(attached.match([*IDS, 0])) as lease:
            with attached.write(longer, resume=lease) as writer:
                put_all(writer, start=lease.tokens)
                writer.commit()
            assert lease.salt == b""
            blocks = lease.layer(1).blocks("keys")
            assert not blocks[0].flags.writeable
            with pytest.raises(ValueError, match="read-only"):
                blocks[0][0] = 0
        with pytest.raises(LeaseError, match="released"):
            lease.layer(1)
        check_read(attached, longer)
        check_read(store, longer)
        key = attached.prompt(IDS).path.key(0)
        assert attached.pool.evict(key) > 0
        assert not store.match([*IDS, 0])
        assert attached.match([*IDS, 0]).missing.reasons == store.match([*IDS, 0]).missing.reasons
        attached.pool.check()


def test_transfers_of_an_attached_store(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached, kvstore.open(SPEC) as far:
        address = far.listen("tcp://127.0.0.1:0").address
        with attached.write(IDS) as writer:
            streamed = writer.send(address)
            put_all(writer)
            writer.commit()
        streamed.result(DEADLINE_S)
        check_read(far)
        other = [5, *IDS]
        write(far, other)
        near = attached.listen("tcp://127.0.0.1:0").address
        far.send(far.match([*other, 0]), near).result(DEADLINE_S)
        check_read(attached, other)
        check_read(store, other)


def test_damage_is_found_and_forgotten_by_an_attached_reader(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        write(store)
        match = attached.match([*IDS, 0])
        with attached.read(match) as lease, store.read(store.match([*IDS, 0])) as own:
            records = [held for held in own.records if held.name.node == 2]
            records[0].memory[records[0].layout.header_bytes] ^= 1
            with pytest.raises(LeaseGoneError):
                attached.read(match, verify=True)
            with pytest.raises(LeaseGoneError):
                lease.check_current()
        assert store.statistics().damaged_records == 1
        assert not attached.match([*IDS, 0])


# All shards or none


def test_shards_become_visible_together(path: str) -> None:
    """Two workers, and the owner's own thread."""
    with opened(path) as store, workers(path, 2) as both:
        for rank, worker in enumerate(both):
            worker.call("begin", ids=IDS, shard=(rank, 4), joint="request-17")
            worker.call("put")
            worker.post("commit")
        writers = [store.write(IDS, shard=Shard(rank, 4), joint="request-17") for rank in (2, 3)]
        for writer in writers:
            put_all(writer)
        waiting = writers[0].commit_async()
        assert not waiting.done()
        assert not store.match([*IDS, 0])
        writers[1].commit(deadline_s=DEADLINE_S)
        waiting.result(DEADLINE_S)
        for worker in both:
            worker.answer()
        check_read(store)
        assert both[0].call("match", ids=[*IDS, 0]) == [len(IDS), 0]


def test_threads_of_one_process_commit_together() -> None:
    with kvstore.open(SPEC, dram="32MiB") as store:

        def party(rank: int) -> None:
            with store.write(IDS, shard=Shard(rank, 2), joint="threads") as writer:
                put_all(writer)
                with pytest.raises(WriteError, match="whole prompt"):
                    writer.commit(16)
                writer.commit(deadline_s=DEADLINE_S)

        for running in [Background(lambda rank=rank: party(rank)) for rank in range(2)]:  # type: ignore[misc]
            running.result(DEADLINE_S)
        check_read(store)
        store.pool.check()
        # The name is free again.
        store.write([1, *IDS], shard=Shard(0, 2), joint="threads").abort()


def check_nothing_came(store: Store) -> None:
    assert not store.match([*IDS, 0])
    eventually(lambda: store.statistics().reserved_bytes + store.statistics().quarantined_bytes == 0)
    assert store.statistics().committed_bytes == 0
    store.pool.check()


def test_a_party_that_aborts_fails_all(path: str) -> None:
    with opened(path) as store, workers(path, 2) as (first, second):
        for rank, worker in enumerate((first, second)):
            worker.call("begin", ids=IDS, shard=(rank, 4), joint="request")
            worker.call("put")
        first.post("commit")
        second.call("abort")
        with pytest.raises(WorkerError, match=r"party 1 of 4 gave up.*the test wants it so") as raised:
            first.answer()
        assert raised.value.kind == "JointCommitError"
        check_nothing_came(store)


def test_a_party_that_commits_while_another_gives_up_is_told_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the owner looks at what it has sealed, say."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        other = store.write(IDS, shard=Shard(1, 2), joint="request")
        accept_seal = Transaction.accept_seal

        def overtaken(self: Transaction, index: int, cost_us: int, *, verify: bool) -> None:
            other.abort("the test says so")
            accept_seal(self, index, cost_us, verify=verify)

        monkeypatch.setattr(Transaction, "accept_seal", overtaken)
        with attached.write(IDS, shard=Shard(0, 2), joint="request") as writer:
            put_all(writer)
            with pytest.raises(JointCommitError, match="party 1 of 2 gave up: the test says so"):
                writer.commit(deadline_s=DEADLINE_S)
        check_nothing_came(store)


def test_a_party_that_begins_while_another_gives_up_is_told_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        other = store.write(IDS, shard=Shard(1, 2), joint="request")
        begin = Pool.begin

        def overtaken(self: Pool, *arguments: Any, **options: Any) -> Transaction:
            transaction = begin(self, *arguments, **options)
            other.abort("the test says so")
            return transaction

        monkeypatch.setattr(Pool, "begin", overtaken)
        with pytest.raises(JointCommitError, match="party 1 of 2 gave up: the test says so"):
            attached.write(IDS, shard=Shard(0, 2), joint="request")
        check_nothing_came(store)


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_party_commits_once(path: str, is_attached: bool) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        with (attached if is_attached else store).write(IDS, shard=Shard(0, 2), joint="request") as writer:
            put_all(writer)
            waiting = writer.commit_async()
            with pytest.raises(WriteError, match="being committed already"):
                writer.commit_async()
            with store.write(IDS, shard=Shard(1, 2), joint="request") as other:
                put_all(other)
                other.commit(deadline_s=DEADLINE_S)
            waiting.result(DEADLINE_S)
        check_read(store)


def test_a_party_that_is_killed_fails_all(path: str) -> None:
    with opened(path) as store, workers(path, 1) as (worker,), kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        worker.call("begin", ids=IDS, shard=(0, 2), joint="request")
        worker.call("put")
        with attached.write(IDS, shard=Shard(1, 2), joint="request") as writer:
            put_all(writer)
            waiting = writer.commit_async()
            worker.kill()
            with pytest.raises(JointCommitError, match="party 0 of 2 gave up"):
                waiting.result(DEADLINE_S)
        check_nothing_came(store)


@pytest.mark.parametrize("is_attached", [False, True])
def test_a_party_that_waits_in_vain_fails_all(path: str, is_attached: bool) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        mine = attached if is_attached else store
        other = store.write(IDS, shard=Shard(1, 2), joint="request")
        with mine.write(IDS, shard=Shard(0, 2), joint="request") as writer:
            put_all(writer)
            with pytest.raises(JointCommitError, match=r"did not come within 0\.05 s"):
                writer.commit(deadline_s=0.05)
            assert not writer.transaction.is_open
        put_error = "party 0 of 2 gave up"
        with pytest.raises(WriteError, match=put_error):
            put_all(other)
        with pytest.raises(JointCommitError, match=put_error):
            other.commit()
        check_nothing_came(store)
        with pytest.raises(WriteError, match="party of a joint"):
            store.write(IDS, joint="alone").transaction.commit()
        gc.collect()


def test_a_party_that_comes_late_is_told(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        store.write(IDS, shard=Shard(0, 2), joint="request").abort("no reason")
        with pytest.raises(JointCommitError, match="no reason"):
            attached.write(IDS, shard=Shard(1, 2), joint="request")
        # All have been told: the name may be used again.
        first = store.write(IDS, shard=Shard(0, 2), joint="request")
        with pytest.raises(WriteError, match="there already"):
            attached.write(IDS, shard=Shard(0, 2), joint="request")
        with pytest.raises(WriteError, match="2 parties, not 4"):
            attached.write(IDS, shard=Shard(1, 4), joint="request")
        first.abort()
        check_nothing_came(store)


# Processes that stop, die or go astray


def test_a_stopped_worker_loses_what_it_holds(path: str) -> None:
    with opened(path, silence_s=2.0) as store, workers(path, 1) as (worker,):
        write(store)
        assert worker.call("read", ids=IDS) == len(IDS)
        worker.call("begin", ids=[7, *IDS])
        time.sleep(3.0)  # signs of life keep both, however long a worker computes
        worker.call("put")
        key = store.prompt(IDS).path.key(0)
        assert store.pool.evict(key) == 0, "a leased record was evicted"
        worker.stop()
        eventually(lambda: store.statistics().quarantined_bytes > 0)
        assert store.statistics().reserved_bytes == 0
        assert [state.leases for state in owner_of(store).processes()] == [0]
        assert store.pool.evict(key) > 0, "the lease of a stopped process did not end"
        store.pool.check()
        worker.go_on()
        with pytest.raises(WorkerError) as raised:
            worker.call("read_again", ids=IDS)
        assert raised.value.kind == "LeaseGoneError"
        with pytest.raises(WorkerError, match="silent") as raised:
            worker.call("commit")
        assert raised.value.kind == "WriteError"
        eventually(lambda: store.statistics().quarantined_bytes == 0)
        worker.call("write", ids=[7, *IDS])
        check_read(store, [7, *IDS])


def test_a_copy_that_was_overtaken_is_not_trusted(path: str) -> None:
    """The term ends between a copy and its check: what was copied may be another prefix's bytes."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        write(store)
        lease = attached.read(attached.match([*IDS, 0]))
        target = np.empty(lease.layer(1).shape("keys"), lease.layer(1).read("keys").dtype)
        (session,) = owner_of(store)._sessions
        session.later(lambda: session._requests.end_term("the test says so"))
        eventually(lambda: owner_of(store).processes()[0].leases == 0)
        with pytest.raises(LeaseGoneError, match="expired"):
            lease.layer(1).copy_to(keys=target)
        lease.release()
        check_read(attached)


def test_a_lease_that_ends_while_it_is_sent_commits_nothing_elsewhere(path: str) -> None:
    """What was sent may have been another prefix's bytes by then, with checksums that hold."""

    class Expiring(TransferObserver):
        def piece_sent(self, layer: int, size_bytes: int, start_s: float, end_s: float) -> None:
            session.later(lambda: session._requests.end_term("the test says so"))
            eventually(lambda: owner_of(store).processes()[0].leases == 0)

    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached, kvstore.open(SPEC) as far:
        write(store)
        (session,) = owner_of(store)._sessions
        sent = attached.send(attached.match([*IDS, 0]), far.listen("tcp://127.0.0.1:0").address, observer=Expiring())
        with pytest.raises(TransferAbortedError, match=r"not there any more: the lease of 100 tokens expired"):
            sent.result(DEADLINE_S)
        assert not far.match([*IDS, 0])
        eventually(lambda: far.statistics().reserved_bytes + far.statistics().quarantined_bytes == 0)
        check_read(attached)


def test_a_term_that_ends_while_a_writer_begins(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process learns of it before it knows of the writer; the owner must still be told that nothing moves."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        assert isinstance(attached.pool, AttachedPool)
        (session,) = owner_of(store)._sessions
        told = threading.Event()
        expired = attached.pool.expired

        def hear(term: int, reason: str) -> None:
            expired(term, reason)
            told.set()

        def begin_late(*arguments: Any) -> AttachedTransaction:
            session.later(session._expire)
            assert told.wait(DEADLINE_S)
            return AttachedTransaction(*arguments)

        monkeypatch.setattr(attached.pool, "expired", hear)
        monkeypatch.setattr("kvstore.attached.pool.AttachedTransaction", begin_late)
        writer = attached.write(IDS)
        with pytest.raises(WriteError, match="silent"):
            put_all(writer)
        eventually(lambda: store.statistics().quarantined_bytes == 0)
        assert owner_of(store).processes()[0].writers == 0


def test_damage_found_while_records_are_being_leased(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun for the process and it never heard of must not stay held for it."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        (session,) = owner_of(store)._sessions
        arena, key = session._requests._arena, store.prompt(IDS).path.key(0)
        locations = arena.locations

        def condemn_first(slots: Iterable[Slot]) -> Any:
            store.pool.condemn(key, is_state=False)
            return locations(slots)

        for ask in (lambda: attached.read(attached.match([*IDS, 0])), lambda: attached.write([*IDS, *IDS])):
            write(store)
            with monkeypatch.context() as patch:
                patch.setattr(arena, "locations", condemn_first)
                with pytest.raises(LeaseGoneError, match="found damaged"):
                    ask()
            (state,) = owner_of(store).processes()
            assert (state.leases, state.writers) == (0, 0)
            assert store.statistics().reserved_bytes == store.statistics().quarantined_bytes == 0


def test_what_is_reused_is_not_taken_for_damage(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        write(store)
        lease = attached.read(attached.match([*IDS, 0]))
        (session,) = owner_of(store)._sessions

        def reused(layout: object, addresses: object, headers: list[object]) -> Any:
            session.later(lambda: session._requests.end_term("the test says so"))
            eventually(lambda: owner_of(store).processes()[0].leases == 0)
            return np.zeros(len(headers), np.bool_)  # other bytes

        monkeypatch.setattr("kvstore.store.lease.which_intact", reused)
        with pytest.raises(LeaseGoneError, match="expired"):
            lease.verify()
        assert store.statistics().damaged_records == 0


def test_a_killed_worker_leaves_nothing(path: str) -> None:
    with opened(path) as store, workers(path, 1) as (worker,):
        write(store)
        worker.call("read", ids=IDS)
        worker.call("begin", ids=[7, *IDS])
        worker.call("move")
        assert store.statistics().reserved_bytes > 0
        worker.kill()
        eventually(lambda: not owner_of(store).processes())
        assert store.statistics().reserved_bytes == store.statistics().quarantined_bytes == 0
        assert store.pool.evict(store.prompt(IDS).path.key(0)) > 0


def test_a_lost_connection_of_a_living_worker_is_quarantined(path: str) -> None:
    """It has the memory mapped: until it has ended, or says so, it may still write there."""
    with opened(path, dram="1MiB") as store, workers(path, 1) as (worker,):
        reserved = worker.call("begin", ids=list(range(16 * 60)))
        worker.call("move")
        worker.call("break_connection")
        eventually(lambda: store.statistics().quarantined_bytes == reserved)
        assert store.statistics().reserved_bytes == 0
        with pytest.raises(QuarantineFullError, match="wait for dropped writers"):
            store.write(IDS)
        with pytest.raises(WorkerError) as raised:
            worker.call("put")
        assert raised.value.kind == "OwnerGoneError"
        assert worker.call("is_closed")
        assert [state.is_connected for state in owner_of(store).processes()] == [False]
        worker.kill()
        eventually(lambda: store.statistics().quarantined_bytes == 0)
        write(store)


def test_a_connection_that_ended_is_seen_before_it_is_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The word in shared memory says so at once: not that this process was silent."""
    with opened(path) as store:
        write(store)
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        assert isinstance(attached.pool, AttachedPool)
        lease = attached.read(attached.match([*IDS, 0]))
        reading = threading.Event()
        receive = attached.pool._connection._receive
        monkeypatch.setattr(attached.pool._connection, "_receive", lambda: reading.wait(DEADLINE_S) and receive())
        (session,) = owner_of(store)._sessions
        session.later(lambda: setattr(session, "_is_connected", False))
        eventually(lambda: not owner_of(store).processes())
        with pytest.raises(OwnerGoneError, match=r"parted from this process|connection broke"):
            lease.layer(1)
        reading.set()
        attached.close()


def test_what_a_worker_drops_comes_back(path: str) -> None:
    with opened(path, silence_s=1.0) as store, workers(path, 1) as (worker,):
        write(store)
        worker.call("read", ids=IDS)
        worker.call("begin", ids=[7, *IDS])
        worker.call("drop")
        eventually(lambda: (owner_of(store).processes()[0].leases, owner_of(store).processes()[0].writers) == (0, 0))
        assert store.statistics().reserved_bytes == 0


def test_a_worker_takes_its_leave_in_the_middle(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        write(store)
        lease = attached.read(attached.match([*IDS, 0]))
        writer = attached.write([7, *IDS])
        attached.close()
        assert attached.is_closed
        eventually(lambda: not owner_of(store).processes())
        assert store.statistics().reserved_bytes == store.statistics().quarantined_bytes == 0
        with pytest.raises(StoreClosedError):
            lease.layer(1)
        with pytest.raises(StoreClosedError):
            put_all(writer)


def test_a_forked_child_is_closed_and_the_parent_goes_on(path: str) -> None:
    with opened(path) as store, workers(path, 1) as (worker,):
        write(store)
        worker.call("read", ids=IDS)
        seen = worker.call("fork", ids=[*IDS, 0])
        assert seen == [True, "StoreClosedError", "StoreClosedError", len(IDS)]
        assert [state.leases for state in owner_of(store).processes()] == [1], "the child released its parent's lease"


def test_a_forked_child_of_the_owner_lets_go_of_the_socket(path: str) -> None:
    with opened(path) as store:
        child = os.fork()
        if child == 0:
            os._exit(0 if store.is_closed and owner_of(store)._listening.socket.fileno() < 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
            write(attached)


# Owners that stop, die and come back


def test_an_owner_that_dies_is_noticed_and_followed_by_another(path: str) -> None:
    program = "tests.attached.owner_program"
    owner = Worker(path, program=program)
    try:
        owner.started()
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        assert isinstance(attached.pool, AttachedPool)
        epoch = attached.pool.boot_epoch
        write(attached)
        lease = attached.read(attached.match([*IDS, 0]))
        writer = attached.write([7, *IDS])
        waiting = attached.accept(IDS)
        owner.kill()
        with pytest.raises(OwnerGoneError, match=f"{epoch:016x}"):
            waiting.result(DEADLINE_S)
        assert attached.is_closed
        for call in (lambda: lease.layer(1), lambda: put_all(writer), lambda: attached.match(IDS), attached.statistics):
            with pytest.raises(OwnerGoneError, match=f"{epoch:016x}"):
                call()
        attached.close()
        assert os.path.exists(path), "the remains that the next owner has to deal with"
        with pytest.raises(AttachError, match="no owner can be reached"):
            kvstore.attach(path)
        owner = Worker(path, program=program).started()
        with kvstore.attach(path, deadline_s=DEADLINE_S) as again:
            assert isinstance(again.pool, AttachedPool)
            assert again.pool.boot_epoch != epoch
            assert not again.match([*IDS, 0]), "what the dead owner's arena held is void"
            write(again)
            check_read(again)
    finally:
        owner.kill()


def test_a_stopped_owner_is_noticed_within_the_deadline(path: str) -> None:
    owner = Worker(path, program="tests.attached.owner_program")
    try:
        owner.started()
        first, second = kvstore.attach(path, deadline_s=DEADLINE_S), kvstore.attach(path, deadline_s=DEADLINE_S)
        writer = second.write(IDS, shard=Shard(0, 2), joint="request")
        put_all(writer)
        waiting = writer.commit_async()
        owner.stop()
        for store in (first, second):  # not before: a busy machine is slow to answer, too
            assert isinstance(store.pool, AttachedPool)
            store.pool.deadline_s = 0.5
        begin_s = time.monotonic()
        with pytest.raises(OwnerGoneError, match=r"did not answer MATCH within 0\.5 s"):
            first.match(IDS)
        assert time.monotonic() - begin_s < 20
        assert first.is_closed
        with pytest.raises(OwnerGoneError, match="sign of life"):  # nobody asked anything, yet it is noticed
            waiting.result(DEADLINE_S)
        with pytest.raises(OwnerGoneError, match=r"did not answer in time|takes no connections"):
            kvstore.attach(path, deadline_s=0.2)
        owner.go_on()
        with kvstore.attach(path, deadline_s=DEADLINE_S) as again:
            eventually(lambda: again.statistics().reserved_bytes == 0)
            write(again)
        assert owner.call("check") > 0
        first.close()
        second.close()
    finally:
        owner.kill()


def test_memory_goes_with_the_owner_and_what_is_dropped(path: str) -> None:
    """Without the garbage collector: the arena may be most of the machine's memory."""

    def hold_and_fail() -> weakref.ref[object]:
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        assert isinstance(attached.pool, AttachedPool)
        attached.pool.deadline_s = 0.3
        lease = attached.read(attached.match([*IDS, 0]))
        with owner_pool._lock:
            try:
                attached.match(IDS)
            except OwnerGoneError:
                attached.close()
        return weakref.ref(lease._hold)

    with opened(path) as store:
        write(store)
        owner_pool = store.pool
        assert isinstance(owner_pool, Pool)
        gc.collect()
        gc.disable()
        try:
            assert hold_and_fail()() is None
        finally:
            gc.enable()


def test_closing_the_owner_ends_every_process(path: str) -> None:
    with opened(path) as store:
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        write(attached)
        waiting = attached.accept([1, 2, 3])
        store.close()
        with pytest.raises(OwnerGoneError, match="closed the pool"):
            waiting.result(DEADLINE_S)
        attached.close()
        assert not os.path.exists(path)
        assert not os.path.exists(f"{path}.lock")


# The socket


def test_a_second_owner_is_refused(path: str) -> None:
    with opened(path) as store:
        with pytest.raises(AttachError, match="another owner serves"):
            kvstore.open(SPEC, dram="32MiB", socket=path)
        with kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
            write(attached)
        check_read(store)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with opened(path):
        assert os.path.exists(path)


def test_paths_that_cannot_be_used(path: str) -> None:
    with pytest.raises(AttachError, match="the limit is 103"):
        kvstore.open(SPEC, dram="32MiB", socket="/tmp/" + 120 * "x")
    with pytest.raises(AttachError, match="No such file"):
        kvstore.open(SPEC, dram="32MiB", socket="/nowhere/at/all")
    Path(path).write_text("precious")
    with pytest.raises(AttachError, match="is no socket"):
        kvstore.open(SPEC, dram="32MiB", socket=path)
    assert Path(path).read_text() == "precious"


def test_another_spec_is_refused_by_name(path: str) -> None:
    with opened(path), pytest.raises(SpecError) as raised:
        kvstore.attach(path, spec=dense(16), deadline_s=DEADLINE_S)
    assert SPEC.fingerprint.hex() in str(raised.value)
    assert dense(16).fingerprint.hex() in str(raised.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_refused_unless_they_are_named(path: str) -> None:
    def stranger() -> str:
        """What another user is told. A fork, since that user may not read this tree."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setgid(12345)
                os.setuid(12345)
                with kvstore.attach(path, deadline_s=DEADLINE_S) as store:
                    os.write(writer, f"attached {store.match([1, 2, 3]).tokens}".encode())
            except kvstore.KVStoreError as error:
                os.write(writer, str(error).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return said

    os.chmod(os.path.dirname(path), 0o755)
    with opened(path):
        refused = stranger()
        assert "user 12345 may not reach" in refused
        assert "allow_uids" in refused, "and not that there is no owner"
        os.chmod(path, 0o666)  # whatever became of the file's mode, credentials decide
        assert "user 12345 may not attach" in stranger()
    with opened(path, allow_uids=(12345,)):
        assert "attached 0" in stranger()


def test_nonsense_from_a_process_harms_nobody(path: str) -> None:
    with opened(path) as store:
        for sent in (b"GET / HTTP/1.1\r\n\r\n" * 3, frame(Kind.MATCH, 1, b""), frame(Kind.CHANGED, 1, b"")):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(DEADLINE_S)
                stranger.connect(path)
                stranger.sendall(sent)
                answer = b""
                while data := stranger.recv(4096):
                    answer += data
                assert parse_header(answer).kind is Kind.ERROR
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.connect(path)
            stranger.sendall(frame(Kind.HELLO, 1, Hello(os.getpid()).pack()))
            assert parse_header(stranger.recv(HEADER_BYTES)).kind is Kind.HELLO
            stranger.sendall(frame(Kind.BEGIN, 2, b"\xff" * 50))
            while stranger.recv(4096):
                pass
        eventually(lambda: not owner_of(store).processes())
        write(store)


def test_who_does_not_come_to_the_point_is_shown_the_door(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.attached.session.ATTACH_DEADLINE_S", 0.3)
    with opened(path) as store:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(path)
            hello = frame(Kind.HELLO, 1, Hello(os.getpid()).pack())

            def drip() -> None:
                for byte in hello:
                    stranger.sendall(bytes([byte]))
                    time.sleep(0.02)

            with pytest.raises(OSError, match=r"Broken pipe|reset"):
                drip()
        monkeypatch.undo()
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.settimeout(DEADLINE_S)
            stranger.connect(path)
            stranger.sendall(frame(Kind.HELLO, 1, bytes(1 << 20))[:100_000])
            assert parse_header(stranger.recv(HEADER_BYTES)).kind is Kind.ERROR
        eventually(lambda: not owner_of(store).processes())


def test_answers_wait_within_a_limit(path: str) -> None:
    """Many small requests with large answers, and nobody reads: the rest is done once they were read."""
    requests = 8000
    with opened(path) as store, socket.socket(socket.AF_UNIX) as stranger, stranger.makefile("rb") as answers:
        stranger.settimeout(DEADLINE_S)
        stranger.connect(path)
        stranger.sendall(frame(Kind.HELLO, 1, Hello(os.getpid()).pack()))
        answers.read(parse_header(answers.read(HEADER_BYTES)).size_bytes)
        (session,) = owner_of(store)._sessions
        sizes = []
        handle = session._handle

        def watch(*arguments: Any) -> None:
            handle(*arguments)
            sizes.append(len(session._outgoing))

        session._handle = watch  # type: ignore[method-assign]
        stranger.sendall(frame(Kind.STATISTICS, 2, b"") * requests)
        eventually(lambda: sizes and sizes[-1] > OUTGOING_BYTES_MAX)
        for _ in range(requests):
            answers.read(parse_header(answers.read(HEADER_BYTES)).size_bytes)
        assert len(sizes) == requests
        assert max(sizes) < OUTGOING_BYTES_MAX + 4096
        session._handle = handle  # type: ignore[method-assign]


def test_an_owner_without_threads_refuses_by_name_and_goes_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: object) -> None:
        raise RuntimeError("can't start new thread")

    with opened(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr("kvstore.attached.owner.Session.start", no_thread)
            with pytest.raises(AttachError, match="can't start new thread; raise its limits"):
                kvstore.attach(path, deadline_s=DEADLINE_S)
        eventually(lambda: not owner_of(store).processes())
        with kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
            write(attached)


def test_a_lock_that_is_a_link_is_not_followed(path: str) -> None:
    os.symlink(f"{path}.elsewhere", f"{path}.lock")
    with pytest.raises(AttachError, match=r"lock cannot be made"):
        kvstore.open(SPEC, dram="32MiB", socket=path)
    assert not os.path.exists(f"{path}.elsewhere")


def test_faults_of_the_process_itself_end_its_requests(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object) -> bool:
        raise KeyboardInterrupt

    def fault() -> None:
        raise LookupError("a fault")

    with opened(path) as store:
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        assert isinstance(attached.pool, AttachedPool)
        with monkeypatch.context() as patch:
            patch.setattr("kvstore.attached.connection._wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                attached.pool.request(Kind.MATCH, bytes(64 << 20))
        with pytest.raises(OwnerGoneError, match="interrupted in the middle"):
            attached.match(IDS)
        attached.close()
        attached = kvstore.attach(path, deadline_s=DEADLINE_S)
        waiting = attached.accept(IDS)
        monkeypatch.setattr(attached.pool, "changed", fault)
        write(store)
        with pytest.raises(OwnerGoneError, match="a fault"):
            waiting.result(DEADLINE_S)
        attached.close()


# A worker with a bug


def test_a_record_that_is_not_what_was_reserved_is_not_committed(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        writer = attached.write(IDS)
        put_all(writer)
        first, second = writer.transaction.records[:2]
        first.memory[: first.layout.record_bytes], kept = (
            bytes(second.memory[: first.layout.record_bytes]),
            bytes(first.memory),
        )
        with pytest.raises(WriteError, match=r"reserved were|not what was reserved"):
            writer.commit()
        assert not store.match([*IDS, 0])
        first.memory[:] = kept
        writer.commit()
        check_read(store)


def test_pieces_are_verified_on_request(path: str) -> None:
    with opened(path, verify=True) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        with attached.write(IDS) as writer:
            put_all(writer)
            record = writer.transaction.records[0]
            record.memory[record.layout.pieces[0].offset] ^= 1
            with pytest.raises(WriteError, match="damaged"):
                writer.commit()
        check_nothing_came(store)
        write(attached)
        check_read(store)


def test_a_party_whose_commit_is_refused_fails_all(path: str) -> None:
    with opened(path, verify=True) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        other = store.write(IDS, shard=Shard(1, 2), joint="request")
        put_all(other)
        waiting = other.commit_async()
        with attached.write(IDS, shard=Shard(0, 2), joint="request") as writer:
            put_all(writer)
            record = writer.transaction.records[0]
            record.memory[record.layout.pieces[0].offset] ^= 1
            with pytest.raises(WriteError, match="damaged"):
                writer.commit(deadline_s=DEADLINE_S)
        with pytest.raises(JointCommitError, match="party 0 of 2 gave up: its commit was refused"):
            waiting.result(DEADLINE_S)
        check_nothing_came(store)


def test_many_threads_share_a_connection(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        waiting = attached.accept(IDS)  # a wait does not keep others from working

        def work(number: int) -> None:
            for turn in range(5):
                ids = [number, turn, *IDS[:40]]
                write(attached, ids)
                check_read(attached, ids)

        for running in [Background(lambda number=number: work(number)) for number in range(4)]:  # type: ignore[misc]
            running.result(DEADLINE_S)
        with store.write(IDS) as writer:
            put_all(writer)
            writer.commit(handover=HandOver(3))
        with waiting.result(DEADLINE_S).lease as lease:
            check_lease(lease, attached.prompt(IDS))


def test_an_answer_is_read_by_whoever_waits_for_it(path: str) -> None:
    """Also when its thread was the first to read and another's answer comes first, or news that nobody asked for."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        connection = attached.pool._connection
        with connection._read_lock:  # somebody else reads: a request waits to be told
            assert connection._reader_epoll is not None
            waiting = Background(lambda: attached.statistics().commits)
            eventually(lambda: bool(connection._pending))
        assert waiting.result(DEADLINE_S) == 0
        changes: list[None] = []
        attached.pool.subscribe(lambda: changes.append(None))
        attached.statistics()  # answered after the owner has learnt of the subscription
        write(store)
        eventually(lambda: bool(changes))  # the connection's thread has the socket again
        assert attached.statistics().commits == 1


def test_an_owner_that_goes_ends_a_request_that_reads_for_itself(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        session = next(iter(owner_of(store)._sessions))
        session._requests.handle = lambda *_: time.sleep(0.05)  # type: ignore[assignment,method-assign,misc]
        asking = Background(attached.statistics)
        eventually(lambda: attached.pool._connection._read_lock.locked())
        owner_of(store).close()
        with pytest.raises(OwnerGoneError):
            asking.result(DEADLINE_S)


def test_a_commit_in_parts_by_a_worker(path: str) -> None:
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        with attached.write(IDS, resume_at=(len(IDS),)) as writer:
            put_tokens(writer, 0, 64)
            writer.commit(64)
            assert store.match([*IDS, 0]).missing.attention_tokens == 64
            with pytest.raises(WriteError, match="not complete"):
                writer.commit()
            put_tokens(writer, 64, len(IDS))
        eventually(lambda: store.statistics().reserved_bytes == 0)
        assert store.match([*IDS, 0]).missing.attention_tokens == 64


def test_what_is_in_flight_ends_before_its_space_is_reused(path: str) -> None:
    """An abort while bytes move: quarantine, until the worker says that nothing moves any more."""
    with opened(path) as store, kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
        writer = attached.write(IDS)
        moving = writer.transaction.moving()
        with moving:
            writer.abort()
            eventually(lambda: store.statistics().quarantined_bytes > 0)
            assert store.statistics().reserved_bytes == 0
        eventually(lambda: store.statistics().quarantined_bytes == 0)


def test_unread_answers_keep_nobody_else_waiting(path: str) -> None:
    """A process that asks and never reads does not keep the owner from others."""
    with opened(path) as store:
        with socket.socket(socket.AF_UNIX) as greedy:
            greedy.settimeout(0.2)
            greedy.connect(path)
            greedy.sendall(frame(Kind.HELLO, 1, Hello(os.getpid()).pack()))
            try:
                while True:
                    greedy.sendall(frame(Kind.STATISTICS, 2, b""))
            except TimeoutError:
                pass  # the owner takes no more from it
            with kvstore.attach(path, deadline_s=DEADLINE_S) as attached:
                write(attached)
        check_read(store)
