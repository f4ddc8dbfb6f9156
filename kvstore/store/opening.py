"""Opening a store: on memory of this process, or on that of another one."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.attached import AttachedPool, Owner
from kvstore.errors import AttachError, SpecError
from kvstore.limits import ATTACH_DEADLINE_S, ATTACHED_SILENCE_S
from kvstore.pool import Pool
from kvstore.record import largest_slot_bytes, slot_sizes_bytes
from kvstore.store.arguments import check_deadline, check_limits, check_spec, socket_path
from kvstore.store.store import Store
from kvstore.tiers import ArenaTier
from kvstore.units import parse_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable

    from kvstore.abc import CheckpointPolicy, EvictionPolicy
    from kvstore.placement.gpu.page_shelf import PageShelf
    from kvstore.placement.gpu.slab_shelf import GpuOptions, SlabShelf
    from kvstore.placement.shelf import Shelf
    from kvstore.placement.ssd.options import AnySsd
    from kvstore.pool import StoreLimits
    from kvstore.spec import ModelSpec
    from kvstore.tiers.gpu.pages import Pages

DRAM_DEFAULT = "1GiB"


def open_store(
    spec: ModelSpec,
    *,
    gpu: int | str | GpuOptions | Pages | None = None,
    dram: int | str = DRAM_DEFAULT,
    ssd: AnySsd | None = None,
    eviction: EvictionPolicy | None = None,
    checkpoints: CheckpointPolicy | None = None,
    limits: StoreLimits | None = None,
    socket: str | os.PathLike[str] | None = None,
    arena: str | None = None,
    allow_uids: Iterable[int] = (),
    silence_s: float = ATTACHED_SILENCE_S,
    verify: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Store:
    """Open a store in this process; also `kvstore.open`.

    Args:
        spec: the model whose cache is kept.
        gpu: an engine's own paged tensors, `kvstore.Pages`, as a tier: `store.pages.note` says what lies in them. Or,
            for an embedder without a paged cache, bytes of device memory for records, `"2GiB"`; `GpuOptions` names the
            device. Needs torch.
        dram: bytes of host memory for records, headers and an estimate of the index: `"8GiB"`. All of it is
            allocated here.
        ssd: directories for a tier on disk, which is there again after a crash: `"/var/cache/kv:200GiB"`, a list of
            such, one for each drive, or `SsdOptions`.
        eviction: ranks what may go; least recently used by default.
        checkpoints: suggests where to take states; a halving ladder by default.
        limits: what each salt may take, and how long leases and writers may last (docs/limits.md); none by default.
        socket: path of a Unix socket at which other processes of this host attach, with `kvstore.attach`.
        arena: name of the shared memory in `/dev/shm`; by default it has none, and goes with the last process.
        allow_uids: users that may attach besides this process's own and root. They can read and write the arena.
        silence_s: an attached process that is silent for longer loses its leases and writers.
        verify: recompute the checksum of every piece that an attached process wrote before it is committed.
        clock: seconds, by which records, pins, leases and writers end; for tests and simulations.

    Raises:
        ArenaError: there is too little memory, or another owner has the arena's name. RecordTooLargeError: not even
        one record fits. AttachError: another owner serves the socket, or it cannot be made; or there is none, and an
        argument says how processes attach.
        ValueError: `dram` or `gpu` is not a size. SpecError: `spec` is none, or the pages are of another, lack a layer,
        or hold no whole records. UnavailableError, DeviceError: there is no such device, or it has too little memory.
        ConfigError: `ssd` names no directory and capacity, or `limits` are none. SsdDirectoryError: a directory of it
        is another process's, another model's, of a newer format, or cannot be used.
    """
    check_spec(spec)
    check_limits(limits)
    path = None if socket is None else socket_path(socket)
    allow_uids = tuple(allow_uids)
    is_owner_told = bool(allow_uids) or silence_s != ATTACHED_SILENCE_S or verify
    if path is None and is_owner_told:
        raise AttachError("allow_uids=, silence_s= and verify= are for attached processes; pass socket= as well")
    sizes = slot_sizes_bytes(spec)
    tier = ArenaTier(parse_bytes(dram), name=arena, largest_slot_bytes=largest_slot_bytes(spec), slot_sizes_bytes=sizes)
    with ExitStack() as undoing:
        undoing.callback(tier.close)
        shelves: list[Shelf] = []  # the fastest first
        of_shelves = None if limits is None else limits.of_shelves()
        slabs, pages = _open_gpu(spec, gpu, tier, of_shelves)
        for on_device in (slabs, pages):
            if on_device is not None:
                undoing.callback(on_device.close)
                shelves.append(on_device)
        if ssd is not None:
            from kvstore.placement.ssd import open_ssd

            shelves.append(open_ssd(spec, ssd, clock=clock, limits=of_shelves))
            undoing.callback(shelves[-1].close)
        if shelves:
            from kvstore.placement.tiered import TieredPool

            pool: Pool = TieredPool(
                spec, tier, shelves, eviction=eviction, checkpoints=checkpoints, limits=limits, clock=clock
            )
        else:
            pool = Pool(spec, tier, eviction=eviction, checkpoints=checkpoints, limits=limits, clock=clock)
        undoing.pop_all()
        undoing.callback(pool.close)
        owner = None
        if path is not None:
            owner = Owner(pool, tier, path, allow_uids=allow_uids, silence_s=silence_s, verify=verify)
        store = Store(pool, owner, pages=pages)
        if slabs is not None:
            store.devices.add(slabs.device, slabs)
        undoing.pop_all()
    return store


def _open_gpu(
    spec: ModelSpec, gpu: int | str | GpuOptions | Pages | None, tier: ArenaTier, limits: StoreLimits | None
) -> tuple[SlabShelf | None, PageShelf | None]:
    """The tier on a device, of one kind or the other."""
    if gpu is None:
        return None, None
    from kvstore.placement.gpu.page_shelf import PageShelf
    from kvstore.placement.gpu.slab_shelf import GpuOptions, open_slabs
    from kvstore.tiers.gpu.pages import Pages

    if isinstance(gpu, Pages):
        if gpu.spec != spec:
            raise SpecError(
                f"the pages are registered for model {gpu.spec.model!r} with another spec than the store's; open the "
                "store with the spec that Pages was given"
            )
        return None, PageShelf(gpu)
    options = gpu if isinstance(gpu, GpuOptions) else GpuOptions(gpu)
    return open_slabs(spec, options, arena_memory=tier.memory, limits=limits), None


def attach_store(
    socket: str | os.PathLike[str], *, spec: ModelSpec | None = None, deadline_s: float = ATTACH_DEADLINE_S
) -> Store:
    """A store on the pool of another process of this host; also `kvstore.attach`.

    It has the interface of the owner's own. Bytes move between this process and the arena directly; the owner only
    decides. While this process holds a lease or has a writer open, a thread tells the owner that it lives; stopped for
    longer than the owner bears (10 s by default), it loses them, with `LeaseGoneError` and `WriteError`.

    Args:
        socket: the path that the owner opened its store with.
        spec: the model that is expected; by default whatever the owner serves.
        deadline_s: an owner that does not answer for so long is taken for gone.

    Raises:
        AttachError: no owner listens there, or it refuses this process. OwnerGoneError: it does not answer.
        SpecError: it serves another spec; the message names both fingerprints.
    """
    if spec is not None:
        check_spec(spec)
    check_deadline(deadline_s)
    return Store(AttachedPool(socket_path(socket), spec=spec, deadline_s=deadline_s))
