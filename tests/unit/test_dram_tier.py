"""What the DRAM tier does beyond the conformance kit."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from kvstore.errors import StaleSlotError, StoreClosedError
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.tiers import DramTier

if TYPE_CHECKING:
    import mmap

PAGE = RECORD_ALIGN_BYTES


def test_slots_are_page_aligned() -> None:
    """As direct I/O needs them."""
    import numpy as np

    with closing(DramTier(64 * PAGE)) as tier:
        for size in (1, 3, 1, 5):
            slot = tier.allocate(size * PAGE)
            assert slot is not None
            assert np.frombuffer(tier.view(slot), np.uint8).ctypes.data % PAGE == 0


def test_memory_of_one_size_is_reused_under_a_new_generation() -> None:
    with closing(DramTier(4 * PAGE)) as tier:
        first = tier.allocate(PAGE)
        assert first is not None
        tier.free(first)
        second = tier.allocate(PAGE)
        assert second is not None
        assert second.index == first.index
        assert second.generation > first.generation
        with pytest.raises(StaleSlotError, match="match again"):
            tier.view(first)


def test_idle_memory_of_another_size_makes_room() -> None:
    """Mapped memory, idle slots included, never exceeds the capacity."""
    with closing(DramTier(8 * PAGE)) as tier:
        slots = [tier.allocate(PAGE) for _ in range(8)]
        for slot in slots:
            assert slot is not None
            tier.free(slot)
        large = tier.allocate(8 * PAGE)
        assert large is not None
        assert sum(len(space.memory) for space in tier._spaces.values()) == 8 * PAGE
        for slot in slots:
            assert slot is not None
            with pytest.raises(StaleSlotError):
                tier.view(slot)


def test_a_view_outlives_its_mapping() -> None:
    """Nothing is unmapped under a caller that still holds a view."""
    tier = DramTier(PAGE)
    slot = tier.allocate(PAGE)
    assert slot is not None
    view = tier.view(slot)
    view[:4] = b"kept"
    tier.close()
    assert view[:4] == b"kept"
    view[:4] = b"safe"


def test_a_machine_without_memory_is_a_full_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    with closing(DramTier(4 * PAGE)) as tier:
        assert tier.allocate(PAGE) is not None
        monkeypatch.setattr("kvstore.tiers.dram.mmap.mmap", refuse)
        assert tier.allocate(PAGE) is None
        assert tier.used_bytes == PAGE
        monkeypatch.undo()
        assert tier.allocate(PAGE) is not None


def test_closed() -> None:
    tier = DramTier(4 * PAGE)
    slot = tier.allocate(PAGE)
    assert slot is not None
    tier.close()
    assert tier.used_bytes == 0
    with pytest.raises(StoreClosedError):
        tier.allocate(PAGE)
    with pytest.raises(StaleSlotError):
        tier.view(slot)
