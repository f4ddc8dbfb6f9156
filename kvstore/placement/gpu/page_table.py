"""Which records lie in which pages of an engine. Not thread-safe: the shelf calls it under its lock."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from kvstore.limits import PAGE_LOCATIONS_MAX
from kvstore.tiers.gpu.packing import PagePlaces

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    from kvstore.abc import Slot, SlotRows
    from kvstore.tiers.gpu.device import Mark

LOCATION_BYTES = 640
"""Memory of one location besides its pages: its objects, and their places in tables."""
PAGE_ENTRY_BYTES = 240
"""Memory of one page of a location: its number, and its place in a table."""


@dataclass(eq=False)
class Location:
    """Where the records of one node and group lie: in these pages.

    Attributes:
        pages: their ids, in order.
        start: the first token, counted from the begin of the first page.
        tokens: how many; 0 for a state, which is a whole page.
        ready: what has filled the pages ends before this mark; None once that is known to have ended.
        pins: how many holds name it.
        is_gone: the engine wants its pages back, or its records have left the index: no hold names it any more.
    """

    pages: npt.NDArray[np.int64]
    start: int
    tokens: int
    ready: Mark | None = None
    pins: int = 0
    is_gone: bool = False

    def places(self, page_tokens: int, places: int) -> PagePlaces:
        """Its tokens in an image of so many places."""
        if not self.tokens:
            return PagePlaces.of_states(self.pages)
        return PagePlaces.of_tokens(self.pages, page_tokens, self.start, self.start + self.tokens, places)

    def settled(self) -> Mark | None:
        """The mark to wait for before the pages are read, if there is still one."""
        if self.ready is not None and self.ready.is_done():
            self.ready = None
        return self.ready


def block_location(
    page_ids: npt.NDArray[np.int64], page_tokens: int, start: int, stop: int, ready: Mark | None
) -> Location:
    """Where tokens `[start, stop)` of a prompt lie whose pages, from its first token on, are these."""
    first, last = start // page_tokens, -(-stop // page_tokens)
    return Location(page_ids[first:last].copy(), start - first * page_tokens, stop - start, ready)


@dataclass(eq=False)
class _Entry:
    """The records of one node and group, a record for each span.

    Attributes:
        key, is_state: the node, and of which kind its records are.
        pool: name of the numbering of its pages.
        records: how many are in the index.
        locations: where they lie: in each of these.
    """

    key: bytes
    is_state: bool
    pool: str
    records: int
    locations: list[Location] = field(default_factory=list)


class PageTable:
    """Entries by slot, and locations by page."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._numbers = count()
        self._by_page: dict[tuple[str, int], dict[Location, int]] = {}
        self._locations = 0
        self._page_entries = 0

    @property
    def memory_bytes(self) -> int:
        return self._locations * LOCATION_BYTES + self._page_entries * PAGE_ENTRY_BYTES

    @property
    def record_count(self) -> int:
        """Records that are in the index."""
        return sum(entry.records for entry in self._entries.values())

    @property
    def pages(self) -> int:
        """Pages that something lies in."""
        return len(self._by_page)

    def add(self, pool: str, key: bytes, *, is_state: bool, records: int, location: Location) -> int:
        """Records of a node appear in a location; the index of their slots, which no other record ever has."""
        index = next(self._numbers)
        entry = self._entries[index] = _Entry(key, is_state, pool, records)
        self._link(index, entry, location)
        return index

    def add_location(self, slot: Slot, location: Location) -> None:
        """The records of a slot lie in another place as well; not noted if that is known, or there are many."""
        entry = self._entries[slot.index]
        is_known = any(
            each.start == location.start and np.array_equal(each.pages, location.pages) for each in entry.locations
        )
        if not is_known and len(entry.locations) < PAGE_LOCATIONS_MAX:
            self._link(slot.index, entry, location)

    def _link(self, index: int, entry: _Entry, location: Location) -> None:
        entry.locations.append(location)
        self._locations += 1
        for page in set(location.pages.tolist()):
            self._by_page.setdefault((entry.pool, page), {})[location] = index
            self._page_entries += 1

    def _unlink(self, pool: str, location: Location) -> None:
        self._locations -= 1
        for page in set(location.pages.tolist()):
            members = self._by_page[pool, page]
            del members[location]
            self._page_entries -= 1
            if not members:
                del self._by_page[pool, page]

    def pin(self, slot: Slot) -> Location:
        """The location to read the records of a slot from; it stays until `unpin`."""
        location = self._entries[slot.index].locations[0]
        location.pins += 1
        return location

    def unpin(self, pool: str, location: Location) -> None:
        location.pins -= 1
        if location.is_gone and not location.pins:
            self._unlink(pool, location)

    def locations_in(self, pool: str, page_ids: Iterable[int]) -> dict[Location, int]:
        """What lies in any of these pages, with the number of its entry."""
        found: dict[Location, int] = {}
        for page in page_ids:
            found.update(self._by_page.get((pool, page), {}))
        return found

    def drop_location(self, index: int, location: Location) -> tuple[bytes, bool] | None:
        """A place is not there any more. If it is the last one of its records: their node, and whether they are states.

        Whoever calls then removes these from the index.
        """
        if location.is_gone:
            return None
        entry = self._entries[index]
        if len(entry.locations) == 1:
            return entry.key, entry.is_state
        entry.locations.remove(location)
        self._leave(entry.pool, location)
        return None

    def freed(self, slots: SlotRows) -> None:
        """Records have left the index."""
        for slot in slots:
            entry = self._entries[slot.index]
            entry.records -= 1
            if not entry.records:
                del self._entries[slot.index]
                for location in entry.locations:
                    self._leave(entry.pool, location)

    def _leave(self, pool: str, location: Location) -> None:
        location.is_gone = True
        if not location.pins:
            self._unlink(pool, location)

    def check(self) -> None:
        """Assert that the tables agree with each other; for tests."""
        expected: set[tuple[str, int, int]] = set()
        for entry in self._entries.values():
            assert entry.records > 0
            assert 1 <= len(entry.locations) <= PAGE_LOCATIONS_MAX
            for location in entry.locations:
                assert not location.is_gone
                expected.update((entry.pool, page, id(location)) for page in location.pages.tolist())
        linked = {(pool, page, id(location)) for (pool, page), found in self._by_page.items() for location in found}
        # What is gone and still held stays known, so that whoever wants its pages waits.
        gone = [location for found in self._by_page.values() for location in found if location.is_gone]
        assert all(location.pins for location in gone)
        assert {each for each in linked if each[2] not in set(map(id, gone))} == expected
