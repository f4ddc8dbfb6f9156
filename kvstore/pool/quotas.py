"""What each salt takes of a pool, and what it may. The pool holds its lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.errors import QuotaError, QuotaTooSmallError
from kvstore.pool.index import RECORD_BYTES
from kvstore.pool.store_limits import shown_salt

if TYPE_CHECKING:
    from kvstore.abc import SlotRows
    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.store_limits import StoreLimits


class Quotas:
    """Committed records, reservations and their share of the index, by salt.

    Ghosts, and what waits in quarantine for dropped writers, are nobody's: they have limits of their own.
    """

    def __init__(self, limits: StoreLimits, index: PrefixIndex) -> None:
        self._limits = limits
        self._index = index
        self._reserved: dict[bytes, int] = {}

    def reserve(self, salt: bytes, slots: SlotRows) -> None:
        """Slots are reserved for records of a salt."""
        self._set(salt, self.reserved_bytes(salt) + _share(slots))

    def unreserve(self, salt: bytes, slots: SlotRows) -> None:
        """They hold committed records from now on, or are given back."""
        self._set(salt, self.reserved_bytes(salt) - _share(slots))

    def _set(self, salt: bytes, size_bytes: int) -> None:
        if size_bytes:
            self._reserved[salt] = size_bytes
        else:
            self._reserved.pop(salt, None)

    def reserved_bytes(self, salt: bytes) -> int:
        return self._reserved.get(salt, 0)

    def held_bytes(self, salt: bytes) -> int:
        """All that counts against a salt's quota."""
        return self._index.native.share_of(salt) + self.reserved_bytes(salt)

    def check(self, salt: bytes, sizes: list[int], new_nodes: int) -> None:
        """Refuse what no eviction makes room for.

        Raises:
            QuotaTooSmallError: it is more than the whole quota.
        """
        quota_bytes = self._limits.quota_of(salt)
        # One of the nodes may be the root, which is nobody's.
        needed_bytes = _needed(sizes) + max(0, new_nodes - 1) * self._index.native.node_share_bytes
        if quota_bytes is not None and needed_bytes > quota_bytes:
            raise QuotaTooSmallError(
                f"{needed_bytes} bytes are needed and the quota of {shown_salt(salt)} is {quota_bytes}; write a "
                "shorter prompt or fewer checkpoints, or open the store with a larger quota (kvstore.StoreLimits)"
            )

    def over_bytes(self, salt: bytes, sizes: list[int]) -> int:
        """By how much a salt would be over its quota with records of these sizes; 0 if it would not.

        The nodes of the writer exist already.
        """
        quota_bytes = self._limits.quota_of(salt)
        if quota_bytes is None or not sizes:
            return 0
        return max(0, self.held_bytes(salt) + _needed(sizes) - quota_bytes)

    def refuse(self, salt: bytes, sizes: list[int], chosen_bytes: int) -> QuotaError:
        """What a writer is told when its salt's own records that may be evicted do not make enough room."""
        held_bytes = self.held_bytes(salt)
        return QuotaError(
            f"{_needed(sizes)} bytes are needed and {shown_salt(salt)} has {held_bytes} of its quota of "
            f"{self._limits.quota_of(salt)} ({self.reserved_bytes(salt)} of them reserved by open writers); "
            f"{chosen_bytes} of these may be evicted, the rest is leased, pinned or being written; retry later, end "
            "leases, pins or writers, or open the store with a larger quota (kvstore.StoreLimits)"
        )

    def check_reserved(self, reserved_bytes: int) -> None:
        """Assert that what the salts have reserved is what the pool has; for tests."""
        records = sum(self._reserved.values()) - reserved_bytes
        assert records >= 0, "a salt's reservations are miscounted"
        assert records % RECORD_BYTES == 0, "a salt's reserved records are miscounted"


def _needed(sizes: list[int]) -> int:
    return sum(sizes) + len(sizes) * RECORD_BYTES


def _share(slots: SlotRows) -> int:
    return slots.size_bytes + len(slots) * RECORD_BYTES
