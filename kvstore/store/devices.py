"""A store's copies to and from tensors of devices: streams, staging, and what is let go once a device is done."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import DeviceError, KVStoreError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.tiers.gpu.device import never_free
from kvstore.tiers.gpu.staging import StagingRing
from kvstore.tiers.gpu.streams import Afterwards
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvstore.placement.gpu.slab_shelf import SlabShelf
    from kvstore.spec import CacheGroup, Shard
    from kvstore.tiers.gpu.device import Device, Mark


@dataclass(frozen=True)
class DeviceStatistics:
    """What was copied to and from tensors of one device.

    Attributes:
        read_bytes: into tensors of readers; `resident_bytes` of them from the device's own memory.
        put_bytes: from tensors of writers.
        waiting: leases and puts that end when the device has come so far.
        overdue: those of them that have waited past the deadline (`kvstore.limits.DEVICE_COPY_DEADLINE_S`).
    """

    device: str
    read_bytes: int
    resident_bytes: int
    put_bytes: int
    waiting: int
    overdue: int


class DeviceWay:
    """One direction between the host and a device. Any thread.

    Attributes:
        stream: of our own.
        ring: staging buffers.
    """

    def __init__(self, device: Device) -> None:
        self.stream = device.stream()
        self.ring = StagingRing(device)


class DeviceLane:
    """Between a store and one device. Any thread.

    Attributes:
        device: which.
        shelf: a tier in its memory, if there is one.
        puts, reads: the way from it, and the way there. Each has its own, since a put stays behind the kernels that
            compute it, and a read of somebody else must not.
        landings: puts whose bytes are on their way to the host.
        releases: leases that end once their copies have.
    """

    def __init__(self, device: Device, shelf: SlabShelf | None = None) -> None:
        self.device = device
        self.shelf = shelf
        self.puts = DeviceWay(device)
        self.reads = DeviceWay(device)
        self.landings = Afterwards("kvstore-gpu-landing")
        self.releases = Afterwards("kvstore-gpu-release")
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._resident_bytes = 0
        self._put_bytes = 0

    def account(self, *, read_bytes: int = 0, resident_bytes: int = 0, put_bytes: int = 0) -> None:
        """Count what was copied."""
        with self._lock:
            self._read_bytes += read_bytes
            self._resident_bytes += resident_bytes
            self._put_bytes += put_bytes

    def statistics(self) -> DeviceStatistics:
        with self._lock:
            return DeviceStatistics(
                self.device.name,
                self._read_bytes,
                self._resident_bytes,
                self._put_bytes,
                self.landings.waiting_count + self.releases.waiting_count,
                self.landings.overdue_count + self.releases.overdue_count,
            )


class DeviceCopies:
    """The devices that tensors of a store's callers lie on; each is opened when the first tensor of it comes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: list[DeviceLane] = []

    def add(self, device: Device, shelf: SlabShelf | None = None) -> DeviceLane:
        """Copy to and from tensors of this device, with its tier if it has one."""
        lane = DeviceLane(device, shelf)
        with self._lock:
            self._lanes.append(lane)
        return lane

    def lane_of(self, tensors: Mapping[str, Any], stream: Any, error: type[KVStoreError]) -> DeviceLane | None:
        """The device that all of these lie on; None for arrays on the host.

        Raises:
            `error`: they lie on several, or a stream was given for arrays on the host.
            UnavailableError: the device is of a kind that is not supported.
        """
        found = {name: self._lane(tensor) for name, tensor in tensors.items()}
        lanes = set(found.values())
        if len(lanes) > 1:
            places = ", ".join(
                f"{name!r} on {'the host' if lane is None else lane.device.name}" for name, lane in found.items()
            )
            raise error(f"tensors of one call lie on one device, and these do not: {places}; call once for each device")
        lane = lanes.pop() if lanes else None
        if lane is None and stream is not None:
            raise error("stream= is for tensors of a device, and these arrays are on the host; leave it out")
        return lane

    def _lane(self, tensor: Any) -> DeviceLane | None:
        device = getattr(tensor, "device", None)
        if device is None or not hasattr(tensor, "data_ptr"):
            return None
        with self._lock:
            for lane in self._lanes:
                if lane.device.holds(tensor):
                    return lane
        if device.type != "cuda":
            return None  # of the host; or of another kind, which whoever looks at the array refuses by name
        opened = open_device(str(device))
        with self._lock:
            for lane in self._lanes:
                if lane.device.holds(tensor):
                    return lane
            self._lanes.append(DeviceLane(opened))
            return self._lanes[-1]

    def statistics(self) -> tuple[DeviceStatistics, ...]:
        """Of each device."""
        with self._lock:
            lanes = tuple(self._lanes)
        return tuple(lane.statistics() for lane in lanes)

    def close(self) -> None:
        """Wait until no copy is under way; raises as `wait`."""
        self.wait(Deadline.after(DEVICE_COPY_DEADLINE_S))

    def wait(self, deadline: Deadline) -> None:
        """Block until every put has landed, and every lease that ended has let its records go.

        Raises:
            DeadlineError: a device is busy or hangs.
        """
        with self._lock:
            lanes = tuple(self._lanes)
        for lane in lanes:
            lane.landings.wait(deadline, f"a put from {lane.device.name}")
            lane.releases.wait(deadline, f"a copy to {lane.device.name}")

    def forget(self) -> None:
        """After a fork, in the child: devices and threads are the parent's."""
        self._lock = threading.Lock()
        for lane in self._lanes:
            lane.landings.forget()
            lane.releases.forget()
            never_free((lane.puts, lane.reads))
        self._lanes = []


class DeviceUse:
    """The copies of one lease that devices may not have finished. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: list[tuple[DeviceLane, Mark]] = []
        self._asking = 0
        self._has_ended = False
        self._release: Callable[[], None] | None = None

    @property
    def is_used(self) -> bool:
        """Whether there were any that may not have ended."""
        return bool(self._marks)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Copies are being asked for: the end waits until they are known."""
        with self._lock:
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
            self._end_if_asked()

    def add(self, lane: DeviceLane, mark: Mark) -> None:
        """The lease's records are read up to this mark."""
        with self._lock:
            self._marks = [(each, known) for each, known in self._marks if not _is_over(known)]
            self._marks.append((lane, mark))

    def end(self, release: Callable[[], None]) -> None:
        """Call `release` when all copies have ended; at once if they have. Later calls do nothing."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
            self._release = release
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        with self._lock:
            release = self._release
            if release is None or self._asking:
                return
            self._release = None
            left = [(lane, mark) for lane, mark in self._marks if not _is_over(mark)]
            self._marks = []
        if not left:
            release()
            return
        # A device that has failed reads nothing any longer, so the records are let go in any case.
        left[0][0].releases.add([mark for _, mark in left], lambda error: release())


def _is_over(mark: Mark) -> bool:
    try:
        return mark.is_done()
    except DeviceError:
        return True


def check_device_tensor(
    tensor: Any, group: CacheGroup, index: int, shard: Shard, tokens: int, what: str, error: type[KVStoreError]
) -> None:
    """As `kvstore.record.copy.check_array`, of a tensor on a device.

    Raises:
        `error`: another type or shape, or it is no plain tensor.
    """
    from kvstore.record.rows import local_rows

    described = group.tensors[index]
    found = str(tensor.dtype).removeprefix("torch.")
    if found != described.dtype.label:
        raise error(f"{what} has type {found}, the spec says {described.dtype.label}; convert it, or correct the spec")
    if str(tensor.layout) != "torch.strided" or tensor.is_neg():
        raise error(f"{what} is sparse or lazily negated; pass a plain tensor, such as .to_dense().resolve_neg()")
    expected = described.shape(local_rows(group, index, shard), tokens)
    if tuple(tensor.shape) != expected:
        axes = "[rows, tokens, *inner]" if described.has_tokens else "[rows, *inner]"
        raise error(f"{what} has shape {list(tensor.shape)}, expected {list(expected)} ({axes})")
