"""The SSD tier against the kit of shelves, over one directory and over several."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

import pytest

from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.testing.forgetful_disk import ForgetfulDisk
from kvstore.testing.shelf import ShelfConformance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.placement.shelf import Shelf
    from kvstore.placement.ssd import SsdShelf


class TestSsdShelf(ShelfConformance):
    drives: ClassVar[int] = 1

    def open(self) -> SsdShelf:
        share_bytes = self.capacity_bytes // self.drives
        options = SsdOptions(tuple(SsdPlace(name, share_bytes) for name in self.disks))
        return open_ssd(self.spec, options, make_files=lambda place, _: self.disks[place.path].files())

    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        self.disks = {f"disk {number}": ForgetfulDisk(seed=number) for number in range(self.drives)}
        with closing(self.open()) as shelf:
            yield shelf

    def reopen(self, shelf: Shelf) -> Shelf:
        shelf.close()
        return self.open()


class TestStripedSsdShelf(TestSsdShelf):
    drives: ClassVar[int] = 2
