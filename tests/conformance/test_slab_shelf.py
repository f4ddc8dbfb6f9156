"""Device slabs as a shelf: on the host, on CUDA, and on a device that lags, with page-locked memory and without."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.placement.gpu.slab_shelf import SlabShelf
from kvstore.testing.lagging_device import LaggingDevice
from kvstore.testing.shelf import ShelfConformance
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.placement.shelf import Shelf
    from kvstore.store import Store


pytest.importorskip("torch")


class TestOnTheHost(ShelfConformance):
    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        with closing(SlabShelf(self.spec, open_device("cpu"), self.capacity_bytes)) as shelf:
            yield shelf


@pytest.mark.gpu
class TestOnCuda(ShelfConformance):
    """Through the ring of staging buffers: the memory of a case's own is not page-locked."""

    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device here")
        with closing(SlabShelf(self.spec, open_device("cuda"), self.capacity_bytes)) as shelf:
            yield shelf


class TestOnCudaPinned(TestOnCuda):
    """Straight from the arena, which is page-locked."""

    @pytest.fixture
    def shelf(self, source: Store) -> Iterator[Shelf]:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch finds no CUDA device here")
        memory = source.pool._tier.memory  # type: ignore[attr-defined]
        with closing(SlabShelf(self.spec, open_device("cuda"), self.capacity_bytes, arena_memory=memory)) as shelf:
            assert shelf.pinning is not None
            assert shelf.pinning.is_pinned, shelf.pinning.why_not
            yield shelf


class TestLagging(ShelfConformance):
    """Nothing is there before it was waited for."""

    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        with closing(SlabShelf(self.spec, LaggingDevice(), self.capacity_bytes)) as shelf:
            yield shelf


class TestLaggingPinned(ShelfConformance):
    @pytest.fixture
    def shelf(self, source: Store) -> Iterator[Shelf]:
        memory = source.pool._tier.memory  # type: ignore[attr-defined]
        with closing(SlabShelf(self.spec, LaggingDevice(), self.capacity_bytes, arena_memory=memory)) as shelf:
            yield shelf
