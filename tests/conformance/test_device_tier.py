"""Device memory as a tier, on the host and on whatever device there is."""

from __future__ import annotations

import random
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from kvstore.errors import DeviceError, RecordTooLargeError
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.testing.lagging_device import LaggingDevice
from kvstore.testing.tier import TierConformance
from kvstore.tiers.gpu.slabs import DeviceTier
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Slot, Tier
    from kvstore.tiers.gpu.device import Device


pytest.importorskip("torch")
PAGE = RECORD_ALIGN_BYTES


@pytest.fixture(params=["cpu", "cuda", "lagging"])
def device(request: pytest.FixtureRequest) -> Device:
    return device_of(request.param)


def device_of(name: str) -> Device:
    import torch

    if name == "lagging":
        return LaggingDevice()
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return open_device(name)


class TestDeviceTier(TierConformance):
    largest_bytes = 8 * PAGE

    @pytest.fixture
    def tier(self, device: Device) -> Iterator[Tier]:
        with closing(DeviceTier(device, self.capacity_bytes, largest_slot_bytes=self.largest_bytes)) as tier:
            yield tier
            tier.check()

    def peek(self, tier: Tier, slot: Slot) -> bytes:
        assert isinstance(tier, DeviceTier)
        tier.pin(slot)
        begin = int(tier.locations([slot])[0])
        content = tier.memory[begin : begin + slot.size_bytes].cpu().numpy().tobytes()
        tier.unpin(slot)
        return bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_moving_together_keeps_every_byte(device: Device, seed: int) -> None:
    """Sizes take each other's space for a long time: bytes stay, and no size is starved by a few of another."""
    source = random.Random(seed)
    live: dict[Slot, bytes] = {}
    with closing(DeviceTier(device, 64 * PAGE, largest_slot_bytes=8 * PAGE)) as tier:
        for round_ in range(60):
            size = (1, 2, 5, 8)[round_ % 4] * PAGE
            while (slot := tier.allocate(size)) is not None:
                live[slot] = source.randbytes(64) * (size // 64)
                tier.write(slot, memoryview(live[slot]))
            for slot in source.sample(sorted(live), len(live) * 3 // 4):
                del live[slot]
                tier.free(slot)
            tier.check()
            for slot, content in live.items():
                into = bytearray(slot.size_bytes)
                tier.read(slot, memoryview(into))
                assert bytes(into) == content
        assert tier.relocated_bytes > 0


def test_a_pinned_slot_does_not_move(device: Device) -> None:
    with closing(DeviceTier(device, 16 * PAGE, largest_slot_bytes=8 * PAGE)) as tier:
        slots = [slot for _ in range(16) if (slot := tier.allocate(PAGE)) is not None]
        assert len(slots) == 16
        kept = [slots[0], slots[15]]
        for slot in slots[1:15]:
            tier.free(slot)
        tier.pin_all(kept)
        before = tier.locations(kept).tolist()
        assert tier.allocate(8 * PAGE) is None
        tier.unpin(kept[0])
        assert tier.allocate(8 * PAGE) is not None
        assert tier.locations(kept[1:]).tolist() == before[1:]


def test_one_record_must_fit(device: Device) -> None:
    with pytest.raises(RecordTooLargeError, match="more gpu="):
        DeviceTier(device, 4 * PAGE, largest_slot_bytes=8 * PAGE)


def test_a_device_with_too_little_memory_says_so() -> None:
    with pytest.raises(DeviceError, match="are left"):
        DeviceTier(LaggingDevice(capacity_bytes=PAGE), 16 * PAGE, largest_slot_bytes=PAGE)


def test_memory_that_somebody_else_still_uses() -> None:
    """What an allocator gives may be in use by work that this thread's stream was asked before."""

    class ReusingDevice(LaggingDevice):
        def empty(self, size_bytes: int) -> Any:
            memory = super().empty(size_bytes)
            self.stream_of(None).run(lambda: memory.fill_(0x11))
            return memory

    device = ReusingDevice()
    with closing(DeviceTier(device, 8 * PAGE, largest_slot_bytes=8 * PAGE)) as tier:
        slot = tier.allocate(PAGE)
        assert slot is not None
        tier.write(slot, memoryview(b"k" * PAGE))
        device.drain()
        into = bytearray(PAGE)
        tier.read(slot, memoryview(into))
        assert bytes(into) == b"k" * PAGE
