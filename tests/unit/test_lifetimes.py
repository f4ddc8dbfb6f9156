"""What ends by itself: records, pins, leases and writers. The clock is the test's."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvstore.errors import LeaseError, LeaseGoneError, PinLimitError, PoolFullError, QuarantineFullError, WriteError
from kvstore.pool import Pool, StoreLimits
from kvstore.pool.endings import STALE_MAX, Endings
from kvstore.pool.index import LASTING_US, NODE_BYTES, RECORD_BYTES
from kvstore.pool.lifetimes import US_PER_S
from kvstore.store import Store, open_store
from kvstore.testing.specs import check_lease, dense, hybrid, put_all, put_tokens

if TYPE_CHECKING:
    from kvstore.spec import ModelSpec

B = 16
SLOT = 8192


class FakeClock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def opened(clock: FakeClock, *, spec: ModelSpec | None = None, dram: int | str = "4MiB", **limits: Any) -> Store:
    return open_store(spec or dense(B), dram=dram, limits=StoreLimits(**limits), clock=clock)


def ids_of(blocks: float, seed: int = 0) -> list[int]:
    return [(7 * number + 1000 * seed) % 100_000 for number in range(int(blocks * B))]


def write(store: Store, ids: list[int], **arguments: Any) -> None:
    with store.write(ids, **arguments) as writer:
        put_all(writer)
        writer.commit()


def found(store: Store, ids: list[int], **identity: Any) -> int:
    return store.match([*ids, 0], **identity).tokens


# Time to live


def test_a_prefix_is_matched_until_its_time_is_over_and_then_its_space_is_there_again(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(3), ttl_s=60)
        clock.advance(59.999)
        assert found(store, ids_of(3)) == 3 * B
        clock.advance(0.001)
        assert found(store, ids_of(3)) == 0
        statistics = store.statistics()
        assert statistics.committed_bytes == 0
        assert statistics.expired_records == 3
        store.pool.check()


def test_the_time_begins_with_the_commit_and_is_exact_in_every_call(clock: FakeClock) -> None:
    with opened(clock) as store:
        with store.write(ids_of(2), ttl_s=10) as writer:
            clock.advance(100)
            put_all(writer)
            writer.commit()
        match = store.match([*ids_of(2), 0])
        clock.advance(10)
        with pytest.raises(LeaseGoneError):
            store.read(match)
        with pytest.raises(LeaseGoneError):
            store.pin(match)
        with store.write(ids_of(2)) as writer:
            assert len(writer.transaction.records) == 2


def test_what_is_shared_lives_as_long_as_the_longest_lived_prefix(clock: FakeClock) -> None:
    common = ids_of(2)
    with opened(clock) as store:
        write(store, [*common, *ids_of(1, 1)], ttl_s=10)
        write(store, [*common, *ids_of(1, 2)], ttl_s=20)
        write(store, ids_of(1), ttl_s=30)
        clock.advance(10)
        assert found(store, [*common, *ids_of(1, 1)]) == 2 * B
        assert found(store, [*common, *ids_of(1, 2)]) == 3 * B
        clock.advance(10)
        assert found(store, [*common, *ids_of(1, 2)]) == B
        write(store, ids_of(1))  # for good, though nothing of it is new
        clock.advance(1000)
        assert found(store, common) == B
        store.pool.check()


def test_a_write_never_shortens_a_life(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(2), ttl_s=100)
        write(store, ids_of(2), ttl_s=1)
        clock.advance(99)
        assert found(store, ids_of(2)) == 2 * B
        clock.advance(1)
        assert found(store, ids_of(2)) == 0


def test_a_states_life_is_its_own(clock: FakeClock) -> None:
    """A checkpoint ends with the prompts that wanted it, the attention below it with whoever goes on from there."""
    ids = ids_of(4)
    with opened(clock, spec=hybrid(B)) as store:
        write(store, ids[: 2 * B], resume_at=(2 * B,), ttl_s=10)
        write(store, ids, resume_at=(4 * B,))
        assert [candidate.tokens for candidate in store.match([*ids, 0]).candidates] == [4 * B, 2 * B]
        clock.advance(10)
        assert [candidate.tokens for candidate in store.match([*ids, 0]).candidates] == [4 * B]
        store.pool.check()


def test_chunks_that_were_committed_before_their_writer_gave_up_end_too(clock: FakeClock) -> None:
    with opened(clock) as store:
        with store.write(ids_of(3), ttl_s=10) as writer:
            put_tokens(writer, 0, 2 * B)
            writer.commit(2 * B)
        assert found(store, ids_of(2)) == 2 * B
        clock.advance(10)
        assert found(store, ids_of(2)) == 0


def test_a_running_writer_keeps_what_it_goes_on_from(clock: FakeClock) -> None:
    with opened(clock) as store:
        for end in ("commit", "abort"):
            write(store, ids_of(2), ttl_s=10)
            with store.read(store.match([*ids_of(2), 0])) as lease, store.write(ids_of(3), resume=lease) as writer:
                clock.advance(10)
                assert found(store, ids_of(2)) == 2 * B  # shared with what is being written
                put_tokens(writer, 2 * B, 3 * B)
                if end == "commit":
                    writer.commit()
            assert found(store, ids_of(3)) == (3 * B if end == "commit" else 0)
            store.expire(ids_of(3), after_tokens=0)
            assert found(store, ids_of(3)) == 0
            store.pool.check()


def test_who_reads_when_the_time_is_over_may_finish(clock: FakeClock) -> None:
    with opened(clock, dram=4 * (SLOT + RECORD_BYTES + NODE_BYTES)) as store:
        write(store, ids_of(3), ttl_s=10)
        prompt = store.prompt(ids_of(3))
        with store.read(store.match([*ids_of(3), 0])) as lease:
            clock.advance(10)
            assert found(store, ids_of(3)) == 0
            check_lease(lease, prompt)
            with pytest.raises(QuarantineFullError):
                store.write(ids_of(3, 1))  # the space is given back with the lease
            check_lease(lease, prompt)
            store.pool.check()
        write(store, ids_of(3, 1))


@pytest.mark.parametrize("ttl_s", [0, 5])
def test_a_prompt_is_not_wanted_any_more(clock: FakeClock, ttl_s: float) -> None:
    system, first, second = ids_of(1), [*ids_of(1), *ids_of(1, 1)], [*ids_of(1), *ids_of(1, 1), *ids_of(1, 2)]
    with opened(clock) as store:
        for prompt in (system, first, second):
            write(store, prompt)
        assert store.expire(second, ttl_s) == 3 * B
        clock.advance(ttl_s)
        assert found(store, second) == 2 * B  # the first turn was written for itself
        write(store, second)
        assert store.expire(second, ttl_s, after_tokens=B) == 3 * B
        clock.advance(ttl_s)
        assert found(store, second) == B
        assert store.expire(system, ttl_s) == B
        clock.advance(ttl_s)
        assert found(store, system) == 0
        assert store.expire(system) == 0
        store.pool.check()


def test_a_life_may_be_prolonged_and_lifted(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(2), ttl_s=10)
        store.expire(ids_of(2), 50)
        clock.advance(40)
        assert found(store, ids_of(2)) == 2 * B
        store.expire(ids_of(2), None)
        clock.advance(1000)
        assert found(store, ids_of(2)) == 2 * B


def test_ends_are_told_to_other_tiers(clock: FakeClock) -> None:
    told: list[tuple[bytes, bool]] = []
    with opened(clock, spec=hybrid(B)) as store:
        assert isinstance(store.pool, Pool)
        store.pool.subscribe_expired(told.extend)
        path = store.prompt(ids_of(3)).path
        write(store, ids_of(3), ttl_s=10)
        at = int(clock.now_s + 10) * US_PER_S
        assert store.pool.ends_of(path).tolist() == [[at, 0, 0], [at, 0, 0], [at, at, at]]
        write(store, ids_of(1))
        lasting = [LASTING_US] * 3
        assert store.pool.ends_of(path).tolist() == [lasting, [at, 0, 0], [at, at, at]]
        clock.advance(10)
        assert not told
        assert found(store, ids_of(3)) == B
        assert {(path.key(1), False)} <= set(told) <= {(path.key(n), s) for n in (1, 2) for s in (False, True)}


@pytest.mark.parametrize("ttl_s", [0, -1, math.inf, math.nan, "long", True, 1e12])
def test_times_to_live_that_are_none(clock: FakeClock, ttl_s: Any) -> None:
    with opened(clock) as store:
        with pytest.raises(WriteError, match="no time to live"):
            store.write(ids_of(1), ttl_s=ttl_s)
        with pytest.raises(WriteError, match="no length"):
            store.expire(ids_of(1), after_tokens=-1)


def test_many_short_lives_leave_nothing_behind(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(1), ttl_s=1e6)
        native = store.pool._index.native
        before = native.allocated_bytes
        for _ in range(500):
            write(store, ids_of(1), ttl_s=1e6)  # each a little later than the one before
            clock.advance(1)
        store.pool.check()
        assert native.allocated_bytes < before + (1 << 15)
        clock.advance(1e6)
        assert found(store, ids_of(1)) == 0
        assert store.statistics().committed_bytes == 0


# Pins


def test_what_is_pinned_is_not_evicted_and_its_memory_is_not_pinned(clock: FakeClock) -> None:
    with opened(clock, dram=4 * (SLOT + RECORD_BYTES + NODE_BYTES), pinned_fraction=0.6) as store:
        write(store, ids_of(2))
        with store.pin(store.match([*ids_of(2), 0])) as pin:
            assert pin.tokens == 2 * B
            assert store.statistics().pins == 1
            assert store.statistics().pinned_bytes == pin.size_bytes == 2 * SLOT
            for seed in range(1, 6):
                write(store, ids_of(1, seed))
            assert found(store, ids_of(2)) == 2 * B
            assert not store.pool.evict(store.prompt(ids_of(2)).path.key(0))
            assert store.statistics().quarantined_bytes == 0
        assert pin.is_closed
        pin.close()
        assert (store.statistics().pins, store.statistics().pinned_bytes) == (0, 0)
        assert store.pool.evict(store.prompt(ids_of(2)).path.key(0))
        store.pool.check()


def test_pins_end_at_their_time_or_when_they_are_dropped(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(2))
        match = store.match([*ids_of(2), 0])
        store.pin(match, ttl_s=10)  # nobody keeps it, and it goes on
        pin = store.pin(match)
        gc.collect()
        assert store.statistics().pins == 2
        clock.advance(10)
        assert store.statistics().pins == 1
        del pin
        gc.collect()
        assert store.statistics().pins == 0
        assert store.statistics().pinned_bytes == 0
        assert store.pool.evict(store.prompt(ids_of(2)).path.key(0))


def test_what_pins_share_counts_once_and_too_much_is_refused(clock: FakeClock) -> None:
    limits: dict[str, Any] = {"quota": 10 * SLOT, "pinned_fraction": 0.3}
    with opened(clock, dram=40 * SLOT, **limits) as store:
        common = ids_of(2)
        longer = [*common, *ids_of(1, 1)]
        write(store, longer)
        pins = [store.pin(store.match([*ids, 0])) for ids in (common, longer, longer)]
        assert store.statistics().pinned_bytes == 3 * SLOT
        write(store, ids_of(1, 2))
        with pytest.raises(PinLimitError, match=r"the limit is 24576, 0.3 of the quota of the empty salt; close"):
            store.pin(store.match([*ids_of(1, 2), 0]))
        write(store, ids_of(1, 2), salt=b"another")
        with store.pin(store.match([*ids_of(1, 2), 0], salt=b"another")):
            pass
        pins[1].close()
        assert store.statistics().pinned_bytes == 3 * SLOT
        pins[2].close()
        assert store.statistics().pinned_bytes == 2 * SLOT
        store.pin(store.match([*ids_of(1, 2), 0])).close()
        assert store.statistics().pin_refusals == 1


def test_pins_of_all_salts_together_are_limited(clock: FakeClock) -> None:
    with opened(clock, dram=10 * SLOT, pinned_fraction=0.25) as store:
        write(store, ids_of(3))
        with pytest.raises(PinLimitError, match=r"0.25 of the tier; close"):
            store.pin(store.match([*ids_of(3), 0]))
        with pytest.raises(LeaseError, match="the match is a miss"):
            store.pin(store.match(ids_of(1, 5)))


def test_a_pin_is_no_life(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(2), ttl_s=10)
        with store.pin(store.match([*ids_of(2), 0])):
            clock.advance(10)
            assert found(store, ids_of(2)) == 0
            assert store.statistics().committed_bytes == 0
            store.pool.check()
        store.pool.check()


def test_a_closed_store_has_no_pins(clock: FakeClock) -> None:
    store = opened(clock)
    write(store, ids_of(1))
    pin = store.pin(store.match([*ids_of(1), 0]))
    store.close()
    assert pin.is_closed
    pin.close()


# Leases and writers that are held for too long


def test_a_lease_that_is_held_for_too_long_is_gone(clock: FakeClock) -> None:
    with opened(clock, lease_max_s=30) as store:
        write(store, ids_of(2))
        lease = store.read(store.match([*ids_of(2), 0]))
        layer = lease.layer(0)
        clock.advance(29.9)
        check_lease(lease, store.prompt(ids_of(2)))
        clock.advance(0.1)
        with pytest.raises(LeaseGoneError, match=r"held for longer than the 30 s .*lease_max_s"):
            layer.read("keys")
        with pytest.raises(LeaseGoneError):
            lease.check()
        lease.release()
        assert store.statistics().expired_leases == 1
        assert store.pool.evict(store.prompt(ids_of(2)).path.key(0))
        store.pool.check()


def test_a_copy_that_the_end_overtakes_is_not_trusted(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    import kvstore.store.lease

    real = kvstore.store.lease.copy_rows
    with opened(clock, dram=3 * (SLOT + RECORD_BYTES + NODE_BYTES), lease_max_s=30) as store:
        write(store, ids_of(2))
        lease = store.read(store.match([*ids_of(2), 0]))
        target = np.empty(lease.layer(0).shape("keys"), lease.layer(0).read("keys").dtype)

        def overtaken(*arguments: Any, **options: Any) -> None:
            clock.advance(30)
            write(store, ids_of(2, 1))  # which takes the very slots
            real(*arguments, **options)

        monkeypatch.setattr(kvstore.store.lease, "copy_rows", overtaken)
        with pytest.raises(LeaseGoneError):
            lease.layer(0).copy_to(keys=target)


def test_the_space_of_a_forgotten_lease_is_there_for_who_needs_it(clock: FakeClock) -> None:
    with opened(clock, dram=3 * (SLOT + RECORD_BYTES + NODE_BYTES), lease_max_s=30) as store:
        write(store, ids_of(2))
        lease = store.read(store.match([*ids_of(2), 0]))
        with pytest.raises(PoolFullError):
            store.write(ids_of(2, 1))
        clock.advance(30)
        write(store, ids_of(2, 1))
        with pytest.raises(LeaseGoneError):
            lease.check()


def test_a_writer_that_is_open_for_too_long_is_aborted(clock: FakeClock) -> None:
    reasons: list[str] = []

    class Listener:
        def pieces_whole(self, record: int, pieces: Any) -> None: ...
        def record_sealed(self, record: int, cost_us: int) -> None: ...
        def committed(self, upto_tokens: int, handover: Any) -> None: ...
        def aborted(self, reason: str) -> None:
            reasons.append(reason)

    with opened(clock, writer_max_s=30) as store:
        late, later = store.write(ids_of(2)), store.write(ids_of(2, 1))
        late.subscribe(Listener())
        put_all(late)
        put_all(later)
        clock.advance(30)
        with pytest.raises(WriteError, match=r"open for longer than the 30 s .*writer_max_s"):
            late.commit()
        assert len(reasons) == 1
        statistics = store.statistics()  # any call ends the other one
        assert statistics.expired_writers == 2
        assert (statistics.reserved_bytes, statistics.committed_bytes) == (0, 0)
        with pytest.raises(WriteError):
            put_all(later)
        store.pool.check()


def test_what_a_late_writer_still_moves_stays_in_quarantine(clock: FakeClock) -> None:
    with opened(clock, writer_max_s=30) as store:
        writer = store.write(ids_of(2))
        with writer.transaction.moving():
            clock.advance(30)
            assert store.statistics().quarantined_bytes == 2 * SLOT
            with pytest.raises(WriteError), writer.transaction.moving():
                raise AssertionError("bytes move after the end")
        assert store.statistics().quarantined_bytes == 0
        store.pool.check()


def test_a_dropped_writer_is_not_kept_alive_by_its_end(clock: FakeClock) -> None:
    with opened(clock, writer_max_s=30) as store:
        writer = store.write(ids_of(2))
        del writer
        gc.collect()
        assert store.statistics().reserved_bytes == 0
        clock.advance(30)
        assert store.statistics().expired_writers == 0


def test_without_a_maximum_nothing_ends(clock: FakeClock) -> None:
    with opened(clock) as store:
        write(store, ids_of(2))
        with store.read(store.match([*ids_of(2), 0])) as lease, store.write(ids_of(2, 1)) as writer:
            clock.advance(1e9)
            check_lease(lease, store.prompt(ids_of(2)))
            put_all(writer)
            writer.commit()


# What ends when


def test_endings_come_in_order_and_do_not_pile_up() -> None:
    endings: Endings[int] = Endings()
    for number in range(10):
        endings.add(number, float(10 - number))
    endings.remove(3)
    endings.remove(3)
    assert endings.take_due(4.0) == [9, 8, 7, 6]
    assert endings.next_s == 5.0
    for number in range(100, 2000):
        endings.add(number, 1e6)
        endings.remove(number)
    assert len(endings._heap) <= 2 * len(endings) + STALE_MAX + 1
    assert endings.take_due(1e7) == [5, 4, 2, 1, 0]
    assert endings.next_s == math.inf
