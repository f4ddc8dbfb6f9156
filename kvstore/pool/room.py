"""The tier's space: reserving slots, and evicting enough for them or nothing at all. The pool holds its lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.abc import SlotRows
from kvstore.errors import (
    LeaseGoneError,
    PoolFullError,
    QuarantineFullError,
    QuotaError,
    StaleSlotError,
    WriteTooLargeError,
)
from kvstore.limits import QUARANTINE_FRACTION_MAX
from kvstore.pool.index import NODE_BYTES
from kvstore.pool.quotas import Quotas
from kvstore.pool.store_limits import StoreLimits

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.abc import Slot, Tier
    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.statistics import PoolStatistics


class Room:
    """What is used of a tier, and by what. Everything counts: slots, index, and what is only reserved.

    Where there are no quotas (`limits`), nobody need say whose the records are (`salt`).

    Attributes:
        reserved_bytes: slots of records that are being written.
        quotas: what each salt takes, and may.
    """

    def __init__(
        self, tier: Tier, index: PrefixIndex, statistics: PoolStatistics, limits: StoreLimits | None = None
    ) -> None:
        self._tier = tier
        self._index = index
        self._statistics = statistics
        self.quotas = Quotas(limits or StoreLimits(), index)
        self._reserved_records = 0
        self.reserved_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Bytes that can be reserved without evicting anything."""
        index_bytes = self._index.memory_bytes + self._reserved_records * self._index.record_bytes
        return self._tier.capacity_bytes - self._tier.used_bytes - index_bytes

    def check(self, sizes: list[int], new_nodes: int, salt: bytes = b"") -> None:
        """Refuse what could not be reserved whatever is evicted, before anything is made for it.

        Raises:
            WriteTooLargeError: it is more than the tier holds. QuotaTooSmallError: it is more than the salt may have.
            QuarantineFullError: dropped writers hold too much.
        """
        limit = int(self._tier.capacity_bytes * QUARANTINE_FRACTION_MAX)
        if self._tier.quarantined_bytes > limit:
            raise QuarantineFullError(
                f"{self._tier.quarantined_bytes} bytes wait for dropped writers, the limit is {limit}; "
                "wait until their copies have ended"
            )
        needed_bytes = sum(sizes) + len(sizes) * self._index.record_bytes + new_nodes * NODE_BYTES
        if needed_bytes > self._tier.capacity_bytes or not self._tier.fits_when_empty(sizes):
            raise WriteTooLargeError(
                f"{needed_bytes} bytes are needed and the {self._tier.name} tier has {self._tier.capacity_bytes}, in "
                "slabs of one record class each; "
                "write a shorter prompt or fewer checkpoints, or open the store with more memory"
            )
        try:
            self.quotas.check(salt, sizes, new_nodes)
        except QuotaError:
            self._statistics.quota_refusals += 1
            raise

    def reserve(self, sizes: list[int], salt: bytes = b"") -> SlotRows:
        """Pinned slots of these sizes; whatever has to be evicted for them is.

        Raises:
            PoolFullError: not enough may be evicted. QuotaError: not enough of that salt may. Nothing was changed.
        """
        self._make_room(sizes, salt)
        allocated = self._tier.allocate_all(sizes)
        if allocated is None:
            raise PoolFullError(f"the {self._tier.name} tier has no {len(sizes)} slots left; try again later")
        slots = SlotRows.of(allocated)
        try:
            self._tier.pin_all(slots)
        except BaseException:
            self._tier.free_all(slots)
            raise
        self._reserved_records += len(slots)
        self.reserved_bytes += slots.size_bytes
        self.quotas.reserve(salt, slots)
        return slots

    def keep_all(self, slots: SlotRows, salt: bytes = b"") -> None:
        """Reserved slots hold committed records now."""
        self._reserved_records -= len(slots)
        self.reserved_bytes -= slots.size_bytes
        self.quotas.unreserve(salt, slots)

    def give_back_all(self, slots: SlotRows, salt: bytes = b"") -> None:
        """Reserved slots are not needed; while one is pinned it stays in quarantine."""
        self.keep_all(slots, salt)
        self._tier.free_all(slots)

    def pin_all(self, slots: Iterable[Slot]) -> None:
        """Pin slots that somebody holds, all or none.

        Raises:
            LeaseGoneError: one of them has been freed.
        """
        try:
            self._tier.pin_all(slots)
        except StaleSlotError as error:
            raise LeaseGoneError(f"the resume point to continue from is not held any more: {error}") from error

    def unpin_all(self, slots: Iterable[Slot]) -> None:
        self._tier.unpin_all(slots)

    def _make_room(self, sizes: list[int], salt: bytes) -> None:
        """Evict until the salt's quota and the tier can take slots of these sizes, or change nothing."""
        over_bytes = self.quotas.over_bytes(salt, sizes)
        needed_bytes = sum(sizes) + len(sizes) * self._index.record_bytes
        lacking_bytes = needed_bytes - self.free_bytes
        if over_bytes <= 0 and lacking_bytes <= 0 and self._tier.would_fit(sizes):
            return
        native = self._index.native
        try:
            # Who is over its quota makes room of its own; what else the tier lacks may be anybody's.
            if over_bytes > 0:
                self._choose_own(sizes, salt, over_bytes)
            own_records = len(native.chosen_slots(native.chosen_count))
            self._choose(sizes, needed_bytes, lacking_bytes)
            victims = self._index.evict_chosen()
        except BaseException:
            native.drop_choice()
            raise
        self._statistics.quota_evicted_records += own_records
        self.freed(victims)

    def _choose_own(self, sizes: list[int], salt: bytes, over_bytes: int) -> None:
        """Choose victims of one salt that bring it back under its quota.

        Raises:
            QuotaError: there are not enough.
        """
        chosen_bytes = self._index.choose_in(salt, over_bytes)
        if chosen_bytes < over_bytes:
            self._statistics.quota_refusals += 1
            raise self.quotas.refuse(salt, sizes, chosen_bytes)

    def _choose(self, sizes: list[int], needed_bytes: int, lacking_bytes: int) -> None:
        """Choose victims beside those that are chosen until the tier can take slots of these sizes.

        Bytes alone do not decide: a tier may be unable to make one large slot of many small ones.

        Raises:
            PoolFullError: there are not enough.
        """
        native = self._index.native
        own_bytes = self._index.choose(0)
        if native.chosen_count and own_bytes >= lacking_bytes and self._would_fit(sizes, native.chosen_count):
            return
        target_bytes = max(lacking_bytes, own_bytes + 1)
        step_bytes = max(sizes, default=1)
        tried = 0
        while True:
            chosen_bytes = self._index.choose(target_bytes)
            if chosen_bytes >= lacking_bytes and self._would_fit(sizes, native.chosen_count):
                break
            if chosen_bytes < target_bytes:
                self._drop_ghosts(sizes, needed_bytes, lacking_bytes - chosen_bytes, chosen_bytes)
                break
            # Twice as many before each further look, so that looking stays cheap; too many are let off below.
            tried = native.chosen_count
            target_bytes = chosen_bytes + step_bytes
            step_bytes *= 2
        low, high = tried, native.chosen_count
        while tried and low + 1 < high:
            middle = (low + high) // 2
            if self._would_fit(sizes, middle):
                high = middle
            else:
                low = middle
        native.trim_choice(high)

    def _would_fit(self, sizes: Sequence[int], chosen: int) -> bool:
        """Whether the first so many of the chosen victims leave enough room."""
        return self._tier.would_fit(sizes, SlotRows(self._index.native.chosen_slots(chosen)))

    def _drop_ghosts(self, sizes: Sequence[int], needed_bytes: int, lacking_bytes: int, chosen_bytes: int) -> None:
        """All victims do not suffice: whether hints can make up for the rest.

        Raises:
            PoolFullError: they cannot.
        """
        native = self._index.native
        ghosts = -(-lacking_bytes // NODE_BYTES)
        if (
            ghosts <= 0
            or ghosts > native.ghost_count
            or not self._would_fit(sizes, native.chosen_count)
            or native.drop_ghosts(ghosts) < ghosts
        ):
            raise PoolFullError(
                f"{needed_bytes} bytes are needed and {self.free_bytes} are free; {chosen_bytes} more may be evicted "
                f"of {self._tier.capacity_bytes}, the rest is leased or being written; retry later, or open the "
                "store with more memory"
            )

    def freed(self, slots: SlotRows) -> int:
        """Records have left the index: free their slots; the bytes."""
        self._tier.free_all(slots)
        size_bytes = slots.size_bytes
        self._statistics.evicted_records += len(slots)
        self._statistics.evicted_bytes += size_bytes
        return size_bytes
