"""Conformance kit for tiers.

A test module of the implementer's own:

    class TestMine(TierConformance):
        @pytest.fixture
        def tier(self):
            with closing(MyTier(self.capacity_bytes)) as tier:
                yield tier

        def peek(self, tier, slot):
            return what lies in the slot, found in another way than by `tier.read`

A tier whose largest slot is smaller than its capacity says so by `largest_bytes`.

`peek` goes round the tier, so that the tier is not its own oracle; without it those cases are skipped.
Cases for views run where `supports_views` is true.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore.errors import RecordTooLargeError, StaleSlotError
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.testing.resources import Background

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvstore.abc import Slot, Tier

PAGE = RECORD_ALIGN_BYTES
TEST_S = 30.0


class TierConformance:
    """The cases; a subclass gives the tier, open and empty, with `capacity_bytes` of room.

    Attributes:
        capacity_bytes: the tier's room.
        largest_bytes: the largest slot that it gives, a divisor of the capacity; 8 pages or more.
    """

    capacity_bytes: ClassVar[int] = 64 * PAGE
    largest_bytes: ClassVar[int] = 64 * PAGE

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """The tier under test."""
        raise NotImplementedError("override the fixture `tier`")

    def peek(self, tier: Tier, slot: Slot) -> bytes | None:
        """The slot's bytes, not through the tier; None where there is no other way."""
        return None

    # Room

    def test_begins_empty(self, tier: Tier) -> None:
        assert tier.name
        assert tier.capacity_bytes == self.capacity_bytes
        assert (tier.used_bytes, tier.quarantined_bytes) == (0, 0)

    def test_every_byte_is_counted(self, tier: Tier) -> None:
        slots = [taken(tier, size * PAGE) for size in (1, 3, 2)]
        assert [slot.size_bytes for slot in slots] == [PAGE, 3 * PAGE, 2 * PAGE]
        assert tier.used_bytes == 6 * PAGE
        tier.free(slots[1])
        assert tier.used_bytes == 3 * PAGE
        for slot in (slots[0], slots[2]):
            tier.free(slot)
        assert tier.used_bytes == 0

    def test_full_is_none_and_changes_nothing(self, tier: Tier) -> None:
        slots = fill(tier, PAGE)
        assert len(slots) == self.capacity_bytes // PAGE
        assert len({slot.index for slot in slots}) == len(slots)
        assert tier.allocate(PAGE) is None
        assert tier.used_bytes == self.capacity_bytes
        tier.free(slots[7])
        assert tier.allocate(2 * PAGE) is None
        assert tier.allocate(PAGE) is not None

    def test_larger_than_the_tier(self, tier: Tier) -> None:
        with pytest.raises(RecordTooLargeError, match=str(self.capacity_bytes)):
            tier.allocate(self.capacity_bytes + PAGE)
        assert tier.used_bytes == 0
        assert tier.allocate(self.largest_bytes) is not None

    @pytest.mark.parametrize("size_bytes", [0, -PAGE, PAGE + 1, PAGE // 2])
    def test_sizes_that_no_slot_has(self, tier: Tier, size_bytes: int) -> None:
        with pytest.raises(ValueError, match="multiple"):
            tier.allocate(size_bytes)
        assert tier.used_bytes == 0

    def test_sizes_may_change_over_time(self, tier: Tier) -> None:
        """What was given back in one size is room for every other."""
        for size in (PAGE, 4 * PAGE, self.largest_bytes, 2 * PAGE, PAGE):
            slots = fill(tier, size)
            assert len(slots) == self.capacity_bytes // size
            for slot in slots:
                tier.free(slot)
            assert tier.used_bytes == 0

    # In bulk

    def test_all_in_one_call(self, tier: Tier) -> None:
        sizes = [size * PAGE for size in (2, 1, 3, 1, 2)]
        slots = tier.allocate_all(sizes)
        assert slots is not None
        assert [slot.size_bytes for slot in slots] == sizes
        assert len({slot.index for slot in slots}) == len(slots)
        assert tier.used_bytes == sum(sizes)
        for number, slot in enumerate(slots):
            tier.write(slot, memoryview(bytes([number + 1]) * slot.size_bytes))
        assert [read(tier, slot)[:1] for slot in slots] == [bytes([number + 1]) for number in range(len(slots))]
        tier.free_all(slots)
        assert tier.used_bytes == 0
        assert tier.allocate_all([]) == []

    def test_all_or_none(self, tier: Tier) -> None:
        slots = fill(tier, PAGE)
        tier.free_all(slots[:5])
        used = tier.used_bytes
        assert tier.allocate_all([PAGE] * 6) is None
        assert tier.used_bytes == used
        with pytest.raises(RecordTooLargeError):
            tier.allocate_all([PAGE, self.capacity_bytes + PAGE])
        assert tier.used_bytes == used
        assert tier.allocate_all([PAGE] * 5) is not None

    def test_pins_in_bulk(self, tier: Tier) -> None:
        slots = tier.allocate_all([PAGE] * 4)
        assert slots is not None
        tier.pin_all(slots)
        tier.free_all(slots)
        assert tier.quarantined_bytes == 4 * PAGE
        tier.unpin_all(slots[:3])
        assert (tier.quarantined_bytes, tier.used_bytes) == (PAGE, PAGE)
        tier.unpin_all(slots[3:])
        assert (tier.quarantined_bytes, tier.used_bytes) == (0, 0)

    def test_a_stale_slot_among_many_pins_none(self, tier: Tier) -> None:
        slots = tier.allocate_all([PAGE] * 4)
        assert slots is not None
        tier.free(slots[2])
        with pytest.raises(StaleSlotError):
            tier.pin_all(slots)
        tier.free_all([slots[0], slots[1], slots[3]])
        assert (tier.quarantined_bytes, tier.used_bytes) == (0, 0), "a pin was left behind"

    def test_a_stale_slot_among_many_is_not_freed_twice(self, tier: Tier) -> None:
        slots = tier.allocate_all([PAGE] * 3)
        assert slots is not None
        with pytest.raises(StaleSlotError):
            tier.free_all([slots[0], slots[0], slots[1]])
        assert tier.used_bytes == 2 * PAGE
        tier.free_all(slots[1:])
        assert tier.used_bytes == 0

    @pytest.mark.parametrize("seed", range(4))
    def test_would_fit_tells_what_happens(self, tier: Tier, seed: int) -> None:
        """Whatever lies there: the answer is what allocating after freeing gives, and asking changes nothing."""
        source = random.Random(seed)
        live: list[tuple[Slot, bytes]] = []
        pinned: list[Slot] = []
        answers = set()
        for _ in range(120):
            sizes = [source.choice((1, 2, 3, 5, 8)) * PAGE for _ in range(source.randrange(1, 8))]
            candidates = [slot for slot, _ in live if slot not in pinned]
            freeing = source.sample(candidates, source.randrange(min(8, len(candidates)) + 1))
            before = tier.used_bytes
            promised = tier.would_fit(sizes, freeing)
            assert tier.used_bytes == before
            tier.free_all(freeing)
            live = [(slot, content) for slot, content in live if slot not in freeing]
            slots = tier.allocate_all(sizes)
            assert (slots is not None) == promised, (sizes, freeing)
            answers.add(promised)
            for slot in slots or ():
                content = source.randbytes(16) * (slot.size_bytes // 16)
                tier.write(slot, memoryview(content))
                live.append((slot, content))
                if source.random() < 0.1:
                    tier.pin(slot)
                    pinned.append(slot)
            while pinned and source.random() < 0.4:
                tier.unpin(pinned.pop(source.randrange(len(pinned))))
        assert answers == {True, False}
        assert all(read(tier, slot) == content for slot, content in live)

    def test_what_fits_when_empty(self, tier: Tier) -> None:
        for sizes in ([PAGE] * 3, [PAGE] * (self.capacity_bytes // PAGE), [self.largest_bytes, PAGE], [5 * PAGE] * 20):
            promised = tier.fits_when_empty(sizes)
            slots = tier.allocate_all(sizes)
            assert (slots is not None) == promised, sizes
            assert tier.fits_when_empty(sizes) == promised
            tier.free_all(slots or ())
        assert not tier.fits_when_empty([PAGE] * (self.capacity_bytes // PAGE + 1))

    # Generations

    def test_a_freed_slot_is_stale_for_ever(self, tier: Tier) -> None:
        slot = taken(tier, PAGE)
        tier.free(slot)
        for again in range(3):
            for use in self._uses(tier, slot):
                with pytest.raises(StaleSlotError):
                    use()
            if again < 2:
                # The same place under a new descriptor makes the old one no better.
                successors = fill(tier, PAGE)
                assert all((next_.index, next_.generation) != (slot.index, slot.generation) for next_ in successors)
                for use in self._uses(tier, slot):
                    with pytest.raises(StaleSlotError):
                        use()
                for successor in successors:
                    tier.free(successor)
        assert tier.used_bytes == 0

    @staticmethod
    def _uses(tier: Tier, slot: Slot) -> list[Callable[[], object]]:
        uses: list[Callable[[], object]] = [
            lambda: tier.free(slot),
            lambda: tier.pin(slot),
            lambda: tier.write(slot, memoryview(b"late")),
            lambda: tier.read(slot, memoryview(bytearray(4))),
        ]
        if tier.supports_views:
            uses.append(lambda: tier.view(slot))
        return uses

    # Bytes

    def test_what_was_written_is_read(self, tier: Tier) -> None:
        slots = [taken(tier, size * PAGE) for size in (1, 2, 5)]
        contents = [random_bytes(slot.size_bytes, seed) for seed, slot in enumerate(slots)]
        for slot, content in zip(slots, contents, strict=True):
            tier.write(slot, memoryview(content))
        for slot, content in zip(slots, contents, strict=True):
            assert read(tier, slot) == content

    def test_parts(self, tier: Tier) -> None:
        slot = taken(tier, 2 * PAGE)
        expected = bytearray(random_bytes(2 * PAGE))
        tier.write(slot, memoryview(expected))
        for offset, size in ((0, 1), (PAGE - 3, 7), (2 * PAGE - 1, 1), (5, 0), (2 * PAGE, 0)):
            part = random_bytes(size, seed=offset)
            tier.write(slot, memoryview(part), offset)
            expected[offset : offset + size] = part
            into = bytearray(size)
            tier.read(slot, memoryview(into), offset)
            assert into == part
        assert read(tier, slot) == expected

    def test_buffers_of_wider_items_count_in_bytes(self, tier: Tier) -> None:
        slot = taken(tier, PAGE)
        content = random_bytes(PAGE)
        tier.write(slot, memoryview(content).cast("Q"))
        into = bytearray(PAGE)
        tier.read(slot, memoryview(into).cast("Q"))
        assert into == content

    @pytest.mark.parametrize(
        ("offset", "size"), [(0, PAGE + 1), (PAGE, 1), (-1, 1), (-1, 0), (PAGE - 1, 2), (1 << 40, 1)]
    )
    def test_ranges_outside_the_slot(self, tier: Tier, offset: int, size: int) -> None:
        slot, neighbour = taken(tier, PAGE), taken(tier, PAGE)
        content = random_bytes(PAGE)
        for each in (slot, neighbour):
            tier.write(each, memoryview(content))
        into = bytearray(size)
        with pytest.raises(ValueError, match="outside"):
            tier.write(slot, memoryview(b"x" * size), offset)
        with pytest.raises(ValueError, match="outside"):
            tier.read(slot, memoryview(into), offset)
        assert into == bytes(size)
        assert read(tier, slot) == read(tier, neighbour) == content

    def test_slots_do_not_overlap(self, tier: Tier) -> None:
        slots = fill(tier, 2 * PAGE)
        for number, slot in enumerate(slots):
            tier.write(slot, memoryview(bytes([number % 251 + 1]) * slot.size_bytes))
        for number, slot in enumerate(slots):
            assert read(tier, slot) == bytes([number % 251 + 1]) * slot.size_bytes

    def test_the_bytes_are_where_others_find_them(self, tier: Tier) -> None:
        slot = taken(tier, PAGE)
        content = random_bytes(PAGE)
        tier.write(slot, memoryview(content))
        found = self.peek(tier, slot)
        if found is None:
            pytest.skip("this tier's bytes can be seen through the tier only")
        assert found == content

    # Pins

    def test_a_pinned_slot_is_quarantined(self, tier: Tier) -> None:
        slots = fill(tier, PAGE)
        slot = slots[3]
        tier.pin(slot)
        tier.pin(slot)
        assert tier.quarantined_bytes == 0
        tier.free(slot)
        for pins in (2, 1):
            assert tier.quarantined_bytes == PAGE, f"returned with {pins} pins left"
            assert tier.used_bytes == self.capacity_bytes
            assert tier.allocate(PAGE) is None
            with pytest.raises(StaleSlotError):
                tier.pin(slot)
            tier.unpin(slot)
        assert tier.quarantined_bytes == 0
        assert tier.used_bytes == self.capacity_bytes - PAGE
        assert tier.allocate(PAGE) is not None

    def test_a_pin_that_ended_in_time_changes_nothing(self, tier: Tier) -> None:
        slot = taken(tier, PAGE)
        content = random_bytes(PAGE)
        tier.pin(slot)
        tier.write(slot, memoryview(content))
        tier.unpin(slot)
        assert read(tier, slot) == content
        tier.free(slot)
        assert (tier.used_bytes, tier.quarantined_bytes) == (0, 0)

    def test_unpin_without_pin(self, tier: Tier) -> None:
        slot = taken(tier, PAGE)
        with pytest.raises(StaleSlotError):
            tier.unpin(slot)

    # Views

    @pytest.fixture
    def view_tier(self, tier: Tier) -> Tier:
        if not tier.supports_views:
            pytest.skip("this tier has no views")
        return tier

    def test_no_views_is_said(self, tier: Tier) -> None:
        if tier.supports_views:
            pytest.skip("this tier has views")
        with pytest.raises(NotImplementedError, match="read and write"):
            tier.view(taken(tier, PAGE))

    def test_a_view_is_the_memory_itself(self, view_tier: Tier) -> None:
        slot = taken(view_tier, 2 * PAGE)
        view = view_tier.view(slot)
        assert (view.nbytes, view.readonly, view.format) == (2 * PAGE, False, "B")
        content = random_bytes(2 * PAGE)
        view_tier.write(slot, memoryview(content))
        assert view == content
        view[PAGE] ^= 0xFF
        assert read(view_tier, slot) == bytes(view)

    def test_views_of_many_are_those_of_each(self, view_tier: Tier) -> None:
        slots = [taken(view_tier, pages * PAGE) for pages in (1, 2, 1)]
        view_tier.pin_all(slots)
        for number, view in enumerate(view_tier.views(slots), 1):
            view[:] = bytes([number]) * view.nbytes
        contents = [bytes(view_tier.view(slot)) for slot in slots]
        assert contents == [bytes([number]) * slot.size_bytes for number, slot in enumerate(slots, 1)]
        view_tier.free(slots[1])
        with pytest.raises(StaleSlotError):
            view_tier.views(slots)
        view_tier.unpin_all(slots)

    def test_late_writes_into_a_quarantined_view_reach_nobody(self, view_tier: Tier) -> None:
        slot = taken(view_tier, PAGE)
        view_tier.pin(slot)
        view = view_tier.view(slot)
        view_tier.free(slot)
        others = fill(view_tier, PAGE)
        for other in others:
            view_tier.write(other, memoryview(bytes(PAGE)))
        view[:] = b"\xee" * PAGE
        assert all(read(view_tier, other) == bytes(PAGE) for other in others)
        view_tier.unpin(slot)

    # Threads and the end

    def test_many_threads(self, tier: Tier) -> None:
        def work(seed: int) -> None:
            source = random.Random(seed)
            live: list[tuple[Slot, bytes]] = []
            for _ in range(150):
                slot = tier.allocate(source.choice((1, 1, 2, 3)) * PAGE)
                if slot is not None:
                    content = source.randbytes(slot.size_bytes)
                    tier.pin(slot)
                    tier.write(slot, memoryview(content))
                    tier.unpin(slot)
                    live.append((slot, content))
                while live and (slot is None or source.random() < 0.4):
                    slot, content = live.pop(source.randrange(len(live)))
                    assert read(tier, slot) == content
                    tier.free(slot)
            for slot, content in live:
                assert read(tier, slot) == content
                tier.free(slot)

        threads = [Background(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
        for thread in threads:
            thread.result(TEST_S)
        assert (tier.used_bytes, tier.quarantined_bytes) == (0, 0)

    def test_close_twice(self, tier: Tier) -> None:
        taken(tier, PAGE)
        tier.close()
        tier.close()


def taken(tier: Tier, size_bytes: int) -> Slot:
    """A slot that must be had."""
    slot = tier.allocate(size_bytes)
    assert slot is not None, f"no slot of {size_bytes} bytes with {tier.used_bytes} of {tier.capacity_bytes} used"
    return slot


def fill(tier: Tier, size_bytes: int) -> list[Slot]:
    """Slots of one size until there is no room."""
    slots = []
    while (slot := tier.allocate(size_bytes)) is not None:
        slots.append(slot)
        assert len(slots) <= tier.capacity_bytes // size_bytes, "the tier gave more than it has"
    return slots


def read(tier: Tier, slot: Slot) -> bytes:
    """A slot's whole content."""
    into = bytearray(slot.size_bytes)
    tier.read(slot, memoryview(into))
    return bytes(into)


def random_bytes(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)
