"""Quotas: what one salt may take, whose records make room for it, and what it is told when they do not."""

from __future__ import annotations

from typing import Any

import pytest

from kvstore.errors import ConfigError, PoolFullError, QuotaError, QuotaTooSmallError
from kvstore.pool import LRUPolicy, StoreLimits
from kvstore.pool.index import NODE_BYTES, RECORD_BYTES
from kvstore.store import Store, open_store
from kvstore.testing.specs import dense, put_all

B = 16
SLOT = 8192
LINKS = 16
"""Bytes that a node takes more where each salt has an order of use of its own."""


def ids_of(blocks: int, seed: int) -> list[int]:
    return [(7 * number + 1000 * seed) % 100_000 for number in range(blocks * B)]


def write(store: Store, ids: list[int], **identity: Any) -> None:
    with store.write(ids, **identity) as writer:
        put_all(writer)
        writer.commit()


def is_there(store: Store, ids: list[int], salt: bytes = b"") -> bool:
    return store.match([*ids, 0], salt=salt).tokens == len(ids)


def share(blocks: int) -> int:
    """What prompts of so many blocks in all take of a quota."""
    return blocks * (SLOT + RECORD_BYTES + NODE_BYTES + LINKS)


@pytest.mark.parametrize("policy", [None, LRUPolicy])
def test_a_salt_over_its_quota_makes_room_of_its_own(policy: type[LRUPolicy] | None) -> None:
    limits = StoreLimits(quota=share(4))
    with open_store(dense(B), dram="4MiB", limits=limits, eviction=policy() if policy else None) as store:
        write(store, ids_of(2, 9), salt=b"oldest of all, and of another")
        for seed in range(2):
            write(store, ids_of(2, seed), salt=b"busy")
        assert is_there(store, ids_of(2, 0), b"busy")  # and is used last by this
        with store.read(store.match([*ids_of(2, 0), 0], salt=b"busy")):
            pass
        write(store, ids_of(2, 2), salt=b"busy")
        assert is_there(store, ids_of(2, 9), b"oldest of all, and of another")
        assert [is_there(store, ids_of(2, seed), b"busy") for seed in range(3)] == [True, False, True]
        statistics = store.statistics()
        assert statistics.quota_evicted_records == statistics.evicted_records == 2
        assert statistics.quota_refusals == 0
        store.pool.check()


def test_what_is_leased_is_not_evicted_for_a_quota_and_the_error_says_so() -> None:
    with open_store(dense(B), dram="4MiB", limits=StoreLimits(quota=share(2))) as store:
        write(store, ids_of(2, 0), salt=b"tenant-7")
        with store.read(store.match([*ids_of(2, 0), 0], salt=b"tenant-7")):
            with pytest.raises(QuotaError, match=r"salt b'tenant-7' has \d+ of its quota of \d+ .*leased") as caught:
                store.write(ids_of(1, 1), salt=b"tenant-7")
            assert caught.value.retryable
            assert isinstance(caught.value, PoolFullError)  # who knows of no quotas goes on without caching
        assert is_there(store, ids_of(2, 0), b"tenant-7")
        write(store, ids_of(1, 1), salt=b"tenant-7")
        assert store.statistics().quota_refusals == 1
        store.pool.check()


def test_reservations_count_until_they_are_given_back() -> None:
    with open_store(dense(B), dram="4MiB", limits=StoreLimits(quota=share(3))) as store:
        with store.write(ids_of(2, 0)):
            with pytest.raises(QuotaError, match=r"the empty salt has .* reserved by open writers"):
                store.write(ids_of(2, 1))
            write(store, ids_of(2, 1), salt=b"another has its own")
        write(store, ids_of(2, 1))
        store.pool.check()


def test_a_write_larger_than_the_quota_is_refused_for_good() -> None:
    limits = StoreLimits(quota=share(1), quotas={b"large": share(3), b"free": None})
    with open_store(dense(B), dram="4MiB", limits=limits) as store:
        with pytest.raises(QuotaTooSmallError, match=r"the quota of the empty salt is \d+; write a shorter") as caught:
            store.write(ids_of(2, 0))
        assert not caught.value.retryable
        assert not len(store.pool._index.native)
        write(store, ids_of(3, 0), salt=b"large")
        with pytest.raises(QuotaTooSmallError):
            store.write(ids_of(4, 1), salt=b"large")
        write(store, ids_of(40, 0), salt=b"free")
        assert store.statistics().quota_refusals == 2


def test_a_refusal_by_the_tier_changes_nothing_of_the_salt() -> None:
    """The quota could be met by evicting, the tier's room could not: then nothing goes."""
    with open_store(dense(B), dram=share(6), limits=StoreLimits(quota=share(3))) as store:
        write(store, ids_of(2, 0), salt=b"small")
        write(store, ids_of(2, 1))
        with store.read(store.match([*ids_of(2, 1), 0])), store.write(ids_of(1, 5), salt=b"third"):
            with pytest.raises(PoolFullError) as caught:
                store.write(ids_of(3, 2), salt=b"small")
            assert not isinstance(caught.value, QuotaError)
            assert is_there(store, ids_of(2, 0), b"small")
            assert store.statistics().evicted_records == 0
            store.pool.check()
        write(store, ids_of(3, 2), salt=b"small")
        assert not is_there(store, ids_of(2, 0), b"small")


def test_ghosts_are_nobodys() -> None:
    with open_store(dense(B), dram="4MiB", limits=StoreLimits(quota=share(2))) as store:
        for seed in range(50):
            write(store, ids_of(2, seed))
        assert store.statistics().ghosts > 0
        assert store.pool._room.quotas.held_bytes(b"") == share(2)
        store.pool.check()


@pytest.mark.parametrize(
    "wrong",
    [
        {"quota": "many"},
        {"quota": 0},
        {"quotas": {"text": 5}},
        {"quotas": 5},
        {"quotas": {b"x": -1}},
        {"pinned_fraction": 2},
        {"lease_max_s": 0},
        {"writer_max_s": "long"},
        {"lease_max_s": float("inf")},
    ],
)
def test_limits_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        StoreLimits(**wrong)


def test_limits_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kvstore.StoreLimits; pass StoreLimits\(quota="):
        open_store(dense(B), dram="4MiB", limits={"quota": 5})  # type: ignore[arg-type]
