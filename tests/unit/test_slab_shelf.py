"""A tier of device slabs beyond the conformance kit: what is asked of the device, and when."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, ShelfRefusedError, UnavailableError
from kvstore.limits import DEVICE_KEEPS_MAX
from kvstore.placement.gpu.slab_shelf import GpuOptions, SlabShelf, open_slabs
from kvstore.spec import WHOLE
from kvstore.store import Store, open_store
from kvstore.testing import shelf as shelf_kit
from kvstore.testing.lagging_device import LaggingDevice, LaggingStream
from kvstore.testing.resources import Background, leaves_nothing
from kvstore.testing.specs import hybrid
from kvstore.tiers.gpu.staging import RecordCopies, RecordMover, StagingRing
from tests.shelf_cases import write

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvstore.pool import Hold
    from kvstore.pool.rows import Rows

torch = pytest.importorskip("torch")

SPEC = hybrid(4)
TEST_S = 30.0
CAPACITY_BYTES = 2 << 20


@pytest.fixture
def source() -> Iterator[Store]:
    with open_store(SPEC, dram="8MiB") as store:
        yield store


@pytest.fixture
def device() -> LaggingDevice:
    return LaggingDevice()


@pytest.fixture(params=["pinned", "staged"])
def shelf(request: pytest.FixtureRequest, device: LaggingDevice, source: Store) -> Iterator[SlabShelf]:
    memory = source.pool._tier.memory if request.param == "pinned" else None  # type: ignore[attr-defined]
    with closing(SlabShelf(SPEC, device, CAPACITY_BYTES, arena_memory=memory)) as shelf:
        yield shelf
        device.is_held = False
        shelf.check()


def found(shelf: SlabShelf, source: Store, ids: Sequence[int]) -> int:
    return shelf.find(shelf_kit.query_of(SPEC, source.prompt((*ids, 0)))).tokens


class Landing(shelf_kit.Landing):
    """Host memory for all records of a hold."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, np.arange(len(rows)))

    def holds(self, number: int, original: Hold) -> bool:
        return bytes(self.record(number)) == bytes(original.placed.memories[number])


def test_nothing_is_found_before_it_is_there(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    device.is_held = True
    original = write(source, range(21))
    handle = shelf.keep(original.path, original.salt, original.placed)
    with pytest.raises(DeadlineError):
        handle.result(0.02)
    assert found(shelf, source, range(21)) == 0
    assert shelf.hold(original.path, shard=WHOLE) is None
    shelf.check()
    device.is_held = False
    assert handle.result(TEST_S) == original.placed.slots.size_bytes
    assert found(shelf, source, range(21)) == 21


def test_nothing_is_read_before_it_has_arrived(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    original = write(source, range(21))
    shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    hold = shelf.hold(original.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    device.is_held = True
    load = hold.load(np.arange(len(hold.rows)), landing.addresses)
    with pytest.raises(DeadlineError, match="0 of"):
        load.wait(1, Deadline.after(0.02))
    assert all(landing.is_untouched(number) for number in range(len(hold.rows)))
    device.is_held = False
    assert list(load.wait(len(hold.rows), Deadline.after(TEST_S))) == []
    assert all(landing.holds(number, original) for number in range(len(hold.rows)))
    hold.release()


def test_no_place_is_reused_while_a_load_reads_it(shelf: SlabShelf, source: Store) -> None:
    """Condemned, and the shelf filled with others: what is on its way arrives as it was."""
    original = write(source, range(40))
    shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    hold = shelf.hold(original.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    reading = shelf._out._stream
    assert isinstance(reading, LaggingStream)
    reading.is_held = True
    load = hold.load(np.arange(len(hold.rows)), landing.addresses)
    until = Deadline.after(TEST_S)
    while not reading.queue:
        until.check("the load to be asked of the device")
    shelf.condemn(original.path.key(0), is_state=False)
    assert found(shelf, source, range(40)) == 0
    assert shelf._tier.quarantined_bytes == original.placed.slots.size_bytes
    for number in range(1, 30):
        other = write(source, range(1000 * number, 1000 * number + 40))
        shelf.keep(other.path, other.salt, other.placed).result(TEST_S)
        other.release()
        shelf.check()
    assert shelf.statistics().evicted_records > len(hold.rows)
    assert reading.queue
    assert all(landing.is_untouched(number) for number in range(len(hold.rows)))
    reading.is_held = False
    assert list(load.wait(len(hold.rows), Deadline.after(TEST_S))) == []
    assert all(landing.holds(number, original) for number in range(len(hold.rows)))
    hold.release()
    assert shelf._tier.quarantined_bytes == 0


def test_a_release_ends_loads_first(shelf: SlabShelf, source: Store) -> None:
    original = write(source, range(21))
    shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    hold = shelf.hold(original.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    reading = shelf._out._stream
    assert isinstance(reading, LaggingStream)
    reading.is_held = True
    hold.load(np.arange(len(hold.rows)), landing.addresses)
    until = Deadline.after(TEST_S)
    while not reading.queue:
        until.check("the load to be asked of the device")
    releasing = Background(hold.release)
    assert shelf.evict(original.path.key(0)) == 0
    assert releasing.is_running, "it returned while the device could still write"
    reading.is_held = False
    releasing.result(TEST_S)
    assert not reading.queue
    assert shelf.evict(original.path.key(0)) > 0


def test_cancel_returns_when_nothing_moves(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    original = write(source, range(21))
    shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    hold = shelf.hold(original.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    device.is_held = True
    load = hold.load(np.arange(len(hold.rows)), landing.addresses)
    until = Deadline.after(TEST_S)
    while not device.waiting:
        until.check("the load to be asked of the device")
    cancelling = Background(load.cancel)
    with pytest.raises(DeadlineError):
        load.wait(1, Deadline.after(0.05))
    assert cancelling.is_running, "it returned while the device could still write"
    device.is_held = False
    cancelling.result(TEST_S)
    assert device.waiting == 0
    failed = set(load.wait(len(hold.rows), Deadline.after(TEST_S)))
    assert all(landing.holds(number, original) for number in range(len(hold.rows)) if number not in failed)
    hold.release()


def test_both_ways_at_once(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    """What goes to the device and what comes from it wait for each other nowhere."""
    first, second = write(source, range(21)), write(source, range(100, 121))
    shelf.keep(first.path, first.salt, first.placed).result(TEST_S)
    hold = shelf.hold(first.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    device.is_held = True
    load = hold.load(np.arange(len(hold.rows)), landing.addresses)
    handle = shelf.keep(second.path, second.salt, second.placed)
    until = Deadline.after(TEST_S)
    while sum(bool(stream.queue) for stream in device.streams) < 2:
        until.check("both streams to have work")
    device.is_held = False
    handle.result(TEST_S)
    assert list(load.wait(len(hold.rows), Deadline.after(TEST_S))) == []
    hold.release()


def test_a_failed_device(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    """It is said, nothing is served from it, and nothing hangs."""
    first, second = write(source, range(21)), write(source, range(100, 121))
    shelf.keep(first.path, first.salt, first.placed).result(TEST_S)
    hold = shelf.hold(first.path, shard=WHOLE)
    assert hold is not None
    landing = Landing(hold.rows)
    device.failure = "the device fell off the bus"
    handle = shelf.keep(second.path, second.salt, second.placed)
    with pytest.raises(ShelfRefusedError, match="off the bus") as refused:
        handle.result(TEST_S)
    assert refused.value.reason == "device"
    load = hold.load(np.arange(len(hold.rows)), landing.addresses)
    assert set(load.wait(len(hold.rows), Deadline.after(TEST_S))) == set(range(len(hold.rows)))
    load.cancel()
    hold.release()
    assert shelf.hold(first.path, shard=WHOLE) is None
    assert found(shelf, source, range(21)) == 0
    assert "off the bus" in shelf.statistics().trouble
    with pytest.raises(ShelfRefusedError, match="takes nothing more"):
        shelf.keep(second.path, second.salt, second.placed).result(TEST_S)
    shelf.check()


def test_too_many_at_once_are_refused(shelf: SlabShelf, device: LaggingDevice, source: Store) -> None:
    shelf._keeps = DEVICE_KEEPS_MAX
    original = write(source, range(21))
    with pytest.raises(ShelfRefusedError) as refused:
        shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    assert refused.value.reason == "busy"
    assert shelf.statistics().refused == {"busy": 1}
    shelf._keeps = 0


def test_pinning_is_said_and_undone(source: Store, device: LaggingDevice) -> None:
    memory = source.pool._tier.memory  # type: ignore[attr-defined]
    with closing(SlabShelf(SPEC, device, CAPACITY_BYTES, arena_memory=memory)) as shelf:
        assert len(device.pinned) == 1
        assert shelf.statistics().trouble == ""
    assert device.pinned == []
    refusing = LaggingDevice(may_pin=False)
    with closing(SlabShelf(SPEC, refusing, CAPACITY_BYTES, arena_memory=memory)) as shelf:
        assert "staging buffers: this device was told to refuse" in shelf.statistics().trouble
        original = write(source, range(21))
        assert shelf.keep(original.path, original.salt, original.placed).result(TEST_S) > 0


def test_closing_ends_what_moves(source: Store, device: LaggingDevice) -> None:
    with leaves_nothing():
        shelf = SlabShelf(SPEC, device, CAPACITY_BYTES)
        original = write(source, range(21))
        device.is_held = True
        handles = [shelf.keep(original.path, original.salt, original.placed) for _ in range(3)]
        closing_ = Background(shelf.close)
        device.is_held = False
        closing_.result(TEST_S)
        for handle in handles:
            assert handle.done()
        assert shelf.statistics().committed_bytes == 0
        original.release()


@pytest.mark.parametrize("buffer_bytes", [1 << 10, 1 << 14])
@pytest.mark.parametrize("is_pinned", [True, False])
def test_records_of_any_size_move_either_way(is_pinned: bool, buffer_bytes: int) -> None:
    """Larger than a staging buffer, smaller, in any order, next to each other and not."""
    device = LaggingDevice()
    source = np.random.default_rng(5)
    sizes = source.integers(1, 9, 40) * 512
    host = source.integers(0, 256, int(sizes.sum()), np.uint8)
    arena = host.copy()
    order = source.permutation(len(sizes))
    begins = (sizes.cumsum() - sizes)[order]
    offsets = sizes[order].cumsum() - sizes[order]
    memory = device.empty(int(sizes.sum()))
    pinned = memoryview(arena) if is_pinned else None
    mover = RecordMover(device, memory, StagingRing(device, buffer_bytes), pinned)
    copies = RecordCopies(offsets, begins + arena.ctypes.data, sizes[order])
    assert mover.is_straight(copies) == is_pinned
    assert mover.copy_in(copies, lambda: False)
    arena[:] = 0
    counts: list[int] = []

    def landed(count: int) -> None:
        counts.append(count)
        for number in order[:count].tolist():
            begin = int((sizes.cumsum() - sizes)[number])
            assert (arena[begin : begin + sizes[number]] == host[begin : begin + sizes[number]]).all()

    assert mover.copy_out(copies, lambda: False, landed)
    assert (arena == host).all()
    assert counts[-1] == len(sizes)
    assert counts == sorted(counts)
    arena[:] = 7
    assert not mover.copy_out(copies, lambda: True, landed)
    assert (arena == 7).all()


def test_options(source: Store) -> None:
    with closing(open_slabs(SPEC, GpuOptions("2MiB", "cpu"))) as shelf:
        assert shelf.statistics().capacity_bytes == 2 << 20
        assert (shelf.name, shelf.is_durable) == ("gpu", False)
    with pytest.raises(UnavailableError, match="no device"):
        open_slabs(SPEC, GpuOptions("2MiB", "nonsense"))
    with pytest.raises(UnavailableError, match="not supported"):
        open_slabs(SPEC, GpuOptions("2MiB", "meta"))
    if not torch.cuda.is_available():
        with pytest.raises(UnavailableError, match="finds no CUDA"):
            open_slabs(SPEC, GpuOptions("2MiB"))


def test_torch_is_imported_on_use() -> None:
    program = (
        "import sys, kvstore, kvstore.placement.gpu.slab_shelf, kvstore.store.devices\n"
        "assert 'torch' not in sys.modules\n"
        "sys.modules['torch'] = None\n"
        "try: kvstore.placement.gpu.slab_shelf.open_device('cuda')\n"
        "except kvstore.errors.UnavailableError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "kvstore[torch]" in ended.stdout


def test_a_forked_child_touches_nothing(source: Store, device: LaggingDevice) -> None:
    shelf = SlabShelf(SPEC, device, CAPACITY_BYTES)
    original = write(source, range(21))
    shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    shelf.close_in_child()  # as in the child; the memory is still there for the parent
    assert shelf.memory is not None
    assert shelf.hold(original.path, shard=WHOLE) is None
    with pytest.raises(ShelfRefusedError):
        shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
    shelf.close()
