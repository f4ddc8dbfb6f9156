"""Shelves against the kit."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.testing.memory_shelf import MemoryShelf, ShelfMedium
from kvstore.testing.shelf import ShelfConformance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.placement.shelf import Shelf


class TestMemoryShelf(ShelfConformance):
    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        with closing(MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes)) as shelf:
            yield shelf


class TestDurableMemoryShelf(ShelfConformance):
    @pytest.fixture
    def medium(self) -> ShelfMedium:
        return ShelfMedium()

    @pytest.fixture
    def shelf(self, medium: ShelfMedium) -> Iterator[Shelf]:
        self.medium = medium
        with closing(MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes, medium=medium)) as shelf:
            yield shelf

    def reopen(self, shelf: Shelf) -> Shelf:
        shelf.close()
        return MemoryShelf(self.spec, capacity_bytes=self.capacity_bytes, medium=self.medium)
