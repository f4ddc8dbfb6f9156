"""Reading a resume point: pinned, layer by layer."""

from __future__ import annotations

import time
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore._native import addresses_of, copy_rows
from kvstore.clock import Deadline
from kvstore.errors import LeaseError
from kvstore.limits import DEVICE_COPY_DEADLINE_S, LOAD_DEADLINE_S
from kvstore.record import Record, which_intact
from kvstore.record.array_view import ArrayView
from kvstore.record.copy import join_plans, plan_bytes, state_plan, token_plan
from kvstore.record.rows import local_rows, runs_of
from kvstore.record.threads import copy_threads
from kvstore.spec import ReuseRule
from kvstore.store.device_read import DeviceReads
from kvstore.store.devices import DeviceCopies, DeviceUse, check_device_tensor
from kvstore.store.fill import host_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

    import numpy.typing as npt

    from kvstore.placement.shelf import ShelfHold
    from kvstore.pool import BaseHold, BasePool, HandOver, HeldRecord, NodePath, Prompt, RecordArrays, RecordName
    from kvstore.record import RecordLayout
    from kvstore.spec import Coverage, DType, ModelSpec, Shard, TensorSpec
    from kvstore.store.devices import DeviceLane
    from kvstore.tiers.gpu.pages import Pages


class Lease:
    """A resume point that stays readable until released. Any thread; a context manager.

    Where copies to a device are under way at its release, the records are let go once these have ended.

    Attributes:
        spec: the model.
        shard: whose share is read.
        path: the resume point's prefix nodes.
    """

    def __init__(
        self,
        spec: ModelSpec,
        hold: BaseHold,
        shard: Shard,
        copied: Callable[[int, float], None],
        devices: DeviceCopies | None = None,
        *,
        wait_s: float = LOAD_DEADLINE_S,
    ) -> None:
        self.spec = spec
        self.shard = shard
        self.path: NodePath = hold.path
        self._hold = hold
        self._copied = copied
        self._devices = devices or DeviceCopies()
        self._device_use = DeviceUse()
        self._device_reads = DeviceReads()
        self._is_released = False
        self._wait_s = wait_s

    @property
    def records(self) -> tuple[HeldRecord, ...]:
        """The records of the resume point, by group, span and node; made when they are first looked at.

        Of a lease that was read layered, the bytes of a record are there once its layers are.
        """
        return self._hold.records

    @property
    def arrays(self) -> tuple[RecordArrays, npt.NDArray[np.uint64]]:
        """As `records`, as arrays, and the address of each one's first byte; waits for what is still being loaded."""
        self.wait()
        return self._hold.arrays

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __iter__(self) -> Iterator[LayerView]:
        """The layers in the order in which a model needs them."""
        return (self.layer(number) for number in self.spec.layers)

    @property
    def salt(self) -> bytes:
        """Whose prefix it is."""
        return self._hold.salt

    @property
    def tokens(self) -> int:
        """Length of the resume point."""
        return self.path.tokens

    @property
    def is_exact(self) -> bool:
        """Whether every layer holds every token; always so unless coverage was accepted."""
        return self.path.is_exact

    @cached_property
    def coverage(self) -> Coverage | None:
        """Which tokens each attention layer holds; None if all. What is not held is read as zeros."""
        return self.path.coverage(self.spec)

    @property
    def handover(self) -> HandOver | None:
        """The hand-over that waits here, if this is one; see `Store.accept`."""
        return self._hold.handover

    @property
    def size_bytes(self) -> int:
        """Bytes of the leased records, headers included."""
        return sum(record.layout.record_bytes for record in self.records)

    def layer(self, number: int) -> LayerView:
        """One layer's part; waits for this layer if the lease was read layered.

        Raises:
            LeaseError: the lease was released. SpecError: the model has no cache in this layer. LoadFailedError: a
            record was damaged in the tier that it came from, or could not be read; release the lease and match again.
            DeadlineError: the layer has not come within the `deadline_s` of the read.
        """
        self.check()
        view = LayerView(self, number)
        self._hold.wait_for(number, Deadline.after(self._wait_s))
        return view

    def wait(self) -> None:
        """Block until all layers are there, of a lease that was read layered; raises as `layer`."""
        self.check()
        self._hold.wait_for(None, Deadline.after(self._wait_s))

    def record(self, held: HeldRecord) -> Record:
        """A held record to look into. Its views and its Arrow form keep the lease alive."""
        self.wait()
        leased: Any = np.asarray(_LeasedMemory(self, np.frombuffer(held.memory, np.uint8)))
        return Record(held.layout, memoryview(leased))

    def copy_to_pages(
        self,
        pages: Pages,
        page_ids: Mapping[str, Any] | Any,
        *,
        tokens: slice | None = None,
        layers: Iterable[int] | None = None,
        first_token: int = 0,
        stream: Any = None,
        deadline_s: float = DEVICE_COPY_DEADLINE_S,
    ) -> None:
        """Copy the resume point into an engine's registered pages, layer by layer.

        When this returns the lease is needed no more, and whatever the stream is asked next sees the bytes; the device
        may still be copying.

        Args:
            page_ids: by name of the group: of attention and windows the ids of the pages of the prompt, -1 for those
                that nothing is copied into; of other states the id of the page that takes it. State groups that are not
                named are left out. A list instead holds the pages of every attention group.
            tokens: which tokens of attention groups are copied; all by default.
            layers: those that are copied; all that are registered by default.
            first_token: the token with which the first page of each list begins.
            stream: the copy begins behind what it was asked so far. None is the one that is current.

        Raises:
            LeaseError: the lease was released; too few pages, or a page twice; pages of another model or worker.
            SpecError: page ids that do not exist. DeadlineError, DeviceError: some pages may have been written.
        """
        from kvstore.store.paged import copy_to_pages

        copy_to_pages(
            self,
            pages,
            page_ids,
            tokens=tokens,
            layers=layers,
            first_token=first_token,
            stream=stream,
            deadline_s=deadline_s,
        )

    def verify(self) -> list[HeldRecord]:
        """Recompute every checksum; the records that are damaged.

        Raises:
            LeaseError: the lease was released, or expired meanwhile.
        """
        self.wait()
        by_layout: dict[RecordLayout, list[HeldRecord]] = {}
        for held in self.records:
            by_layout.setdefault(held.layout, []).append(held)
        damaged: set[RecordName] = set()
        for layout, records in by_layout.items():
            addresses = addresses_of([held.memory for held in records])
            intact = which_intact(layout, addresses, [held.header for held in records])
            damaged.update(records[number].name for number in np.flatnonzero(~intact).tolist())
        self.check()  # what is reused meanwhile is not damaged
        return [held for held in self.records if held.name in damaged] if damaged else []

    def check(self) -> None:
        """Raise `LeaseError` if the lease was released, `StoreClosedError` if its store was closed."""
        self._hold.check()
        if self._is_released:
            raise LeaseError("the lease was released, and only its copies to a device go on. Read the match again")

    def check_current(self) -> None:
        """As `check`; and raise `LeaseGoneError` if a record was found damaged since, by whomever."""
        self.wait()
        self._hold.pool.check_current(self._hold)

    def continues_in(self, pool: BasePool, prompt: Prompt) -> bool:
        """Whether this is a resume point of `prompt` in that very pool."""
        path = prompt.path
        blocks = len(self.path.keys)
        if self._hold.pool is not pool or self.path.root != path.root or self.tokens > len(prompt):
            return False
        if self.path.keys != path.keys[:blocks]:
            return False
        return not self.path.tail_ids or prompt.tail_key(blocks, self.tokens) == self.path.tail_key

    def release(self) -> None:
        """Let the records go. Idempotent; does not wait. Views handed out before must not be used afterwards."""
        self._is_released = True
        self._device_use.end(partial(_let_go, self._hold, self._device_reads.take_holds()))

    def __del__(self) -> None:
        hold = getattr(self, "_hold", None)
        reads = getattr(self, "_device_reads", None)
        if hold is None or reads is None or self._is_released:
            return
        holds = reads.take_holds()
        if holds or self._device_use.is_used:
            hold.pool.settle_later(partial(self._device_use.end, partial(_let_go, hold, holds)))
        else:
            hold.release_later()

    def columns(self, group: int, layer: int) -> list[_Column]:
        """The records of a group that a layer lies in."""
        return self._spans(group, self.spec.span_of_layer[group, layer])

    def _spans(self, group: int, span: int) -> list[_Column]:
        return self._columns.get((group, span), [])

    @cached_property
    def _columns(self) -> dict[tuple[int, int], list[_Column]]:
        """Records of one layout together, by (group, span)."""
        grouped: dict[RecordLayout, list[HeldRecord]] = {}
        for held in self.records:
            grouped.setdefault(held.layout, []).append(held)
        columns: dict[tuple[int, int], list[_Column]] = {}
        for layout, records in grouped.items():
            columns.setdefault((layout.group_index, layout.span.index), []).append(_Column(records))
        return columns

    def _account(self, size_bytes: int, seconds: float) -> None:
        self._copied(size_bytes, seconds)


def _let_go(hold: BaseHold, holds: Sequence[ShelfHold]) -> None:
    """End a lease: what it holds of the pool, and of tiers on devices."""
    for each in holds:
        each.release()
    hold.release()


class _Column:
    """Records of one class along the path, their addresses ready for a copy plan."""

    def __init__(self, records: list[HeldRecord]) -> None:
        self.layout: RecordLayout = records[0].layout
        self.records = records
        self.nodes = np.array([record.name.node for record in records], np.int64)
        self.valid = np.array([record.header.valid_tokens for record in records], np.int64)
        self.addresses = addresses_of([record.memory for record in records])


class LayerView:
    """One layer of a lease."""

    def __init__(self, lease: Lease, number: int) -> None:
        self._lease = lease
        self.number = number
        spec = lease.spec
        self._tensors: dict[str, tuple[int, int, TensorSpec]] = {
            tensor.name: (group, index, tensor)
            for group, cache_group in enumerate(spec.groups)
            if number in cache_group.layers
            for index, tensor in enumerate(cache_group.tensors)
        }
        if not self._tensors:
            spec.group_index(number, "")

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of this layer."""
        return tuple(self._tensors)

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which tokens the attention tensors of this layer hold, `[tokens]`; the others are read as zeros."""
        coverage = self._lease.coverage
        return np.ones(self._lease.tokens, np.bool_) if coverage is None else coverage.mask(self.number)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that a destination for `name` must have: `[rows, tokens, *inner]` or `[rows, *inner]`."""
        group, index, tensor = self._tensor(name)
        rows = local_rows(self._lease.spec.groups[group], index, self._lease.shard)
        return tensor.shape(rows, self._tokens(group))

    def dtype(self, name: str) -> DType:
        """Element type of `name` in the spec; `read` gives its storage type."""
        return self._tensor(name)[2].dtype

    def _tensor(self, name: str) -> tuple[int, int, TensorSpec]:
        found = self._tensors.get(name)
        if found is None:
            self._lease.spec.group_index(self.number, name)
            raise AssertionError("unreachable")
        return found

    def _tokens(self, group: int) -> int:
        cache_group = self._lease.spec.groups[group]
        if cache_group.rule is ReuseRule.ATTENTION:
            return self._lease.tokens
        return cache_group.valid_tokens(self._lease.spec.block_tokens, self._lease.tokens)

    def copy_to(self, *, stream: Any = None, **tensors: Any) -> None:
        """Copy tensors of this layer into the caller's arrays, which it may then change freely.

        Tensors of a device are there for what is asked of `stream` afterwards; this call does not wait for the device.
        Where the records lie in the device's own memory they are copied from there, else through page-locked memory.

        Args:
            stream: of the device: a torch.cuda.Stream, or a cudaStream_t as a number; None is the current one.
            tensors: writable arrays by the spec's tensor names, of the shape that `shape` gives: all on the host, or
                all on one device.

        Raises:
            LeaseError: the lease was released, or an array has the wrong shape or type or is read-only, or they lie on
            several devices. DeviceError: the device failed. DeadlineError: it hangs.
        """
        self._lease.check()
        lane = self._lease._devices.lane_of(tensors, stream, LeaseError)
        if lane is not None:
            self._copy_to_device(lane, stream, tensors)
            return
        plans = []
        for name, array in tensors.items():
            group, index, _ = self._tensor(name)
            what = f"the destination for {name!r} of layer {self.number}"
            cache_group = self._lease.spec.groups[group]
            view = host_view(array, cache_group, index, self._lease.shard, self._tokens(group), what, LeaseError)
            if not view.is_writable:
                raise LeaseError(f"{what} is read-only; pass an array that may be written")
            plans.append(self._plan(group, index, view))
        plan = join_plans(plans, 6)
        size_bytes = plan_bytes(plan)
        begin = time.perf_counter()
        copy_rows(plan, threads=copy_threads(size_bytes))
        # Released by another thread meanwhile, the slots may have been reused: what was copied is not trusted.
        self._lease.check()
        self._lease._account(size_bytes, time.perf_counter() - begin)

    def _copy_to_device(self, lane: DeviceLane, stream: Any, tensors: dict[str, Any]) -> None:
        asked = []
        for name, tensor in tensors.items():
            group, index, described = self._tensor(name)
            what = f"the destination for {name!r} of layer {self.number}"
            cache_group = self._lease.spec.groups[group]
            check_device_tensor(tensor, cache_group, index, self._lease.shard, self._tokens(group), what, LeaseError)
            shape = tuple(tensor.shape)
            size = described.dtype.itemsize
            strides = tuple(size * prod(shape[axis + 1 :]) for axis in range(len(shape)))
            asked.append((group, index, ArrayView(0, shape, strides, described.dtype, True, tensor)))
        begin = time.perf_counter()
        size_bytes = self._lease._device_reads.copy(self, lane, stream, asked)
        self._lease.check()
        self._lease._account(size_bytes, time.perf_counter() - begin)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A copy of one tensor, `[rows, tokens, *inner]` or `[rows, *inner]`, in the storage type.

        bfloat16 and float8 come as unsigned integers of their width.
        """
        array: npt.NDArray[Any] = np.empty(self.shape(name), self._tensor(name)[2].dtype.storage)
        self.copy_to(**{name: array})
        return array

    def blocks(self, name: str) -> list[npt.NDArray[Any]]:
        """Read-only views of an attention tensor where it lies, one per block: `[rows, tokens, *inner]`.

        States and windows have no views: engines update them in place, so `read` copies.

        Raises:
            LeaseError: the tensor belongs to a state, or its rows are spread over several records.
        """
        group, index, tensor = self._tensor(name)
        self._lease.check()
        columns = self._columns(group)
        rows = local_rows(self._lease.spec.groups[group], index, self._lease.shard)
        runs = runs_of(columns[0].layout, self.number, index, self._lease.shard) if len(columns) == 1 else ()
        in_order = [run.row for run in runs] == sorted(run.row for run in runs)
        if tensor.has_tokens is False or self._lease.spec.groups[group].rule is not ReuseRule.ATTENTION:
            raise LeaseError(f"{name!r} of layer {self.number} is a state; read() copies it")
        if sum(run.rows for run in runs) != rows or not in_order:
            raise LeaseError(f"{name!r} of layer {self.number} is spread over several records; read() joins it")
        views: list[npt.NDArray[Any]] = []
        for held in columns[0].records:
            whole = Record(held.layout, held.memory).tensor(self.number, name)
            first = (runs[0].offset - held.layout.pieces[held.layout.tensor_pieces(self.number, index)[0]].offset) // (
                tensor.row_bytes * held.layout.capacity_tokens
            )
            part = whole[first : first + rows, : held.header.valid_tokens]
            views.append(np.asarray(_LeasedMemory(self._lease, part)))
        return views

    def _columns(self, group: int) -> list[_Column]:
        for span in self._lease.spec.spans[group]:
            if self.number in span.layers:
                return self._lease._spans(group, span.index)
        raise AssertionError("the layer belongs to the group, so it lies in a span")

    def _plan(
        self, group: int, index: int, view: Any, addresses_of: Callable[[_Column], npt.NDArray[np.uint64]] | None = None
    ) -> npt.NDArray[np.uint64]:
        """How a tensor is copied out of the records.

        Args:
            addresses_of: where the records of a column lie; by default in host memory.
        """
        lease = self._lease
        block = lease.spec.block_tokens
        plans = []
        for column in self._columns(group):
            layout = column.layout
            addresses = column.addresses if addresses_of is None else addresses_of(column)
            if not layout.capacity_tokens:
                address = int(addresses[0])
                plans.append(state_plan(layout, self.number, index, lease.shard, view, address))
                continue
            is_attention = lease.spec.groups[group].rule is ReuseRule.ATTENTION
            view_tokens = column.nodes * block if is_attention else np.zeros_like(column.nodes)
            plans.append(
                token_plan(
                    layout,
                    self.number,
                    index,
                    lease.shard,
                    view,
                    addresses,
                    np.zeros_like(column.nodes),
                    view_tokens,
                    column.valid,
                )
            )
        return join_plans(plans, 6)


class _LeasedMemory:
    """What a view lies in. Every array made of the view, in whatever way, has this at its base: the lease lives on."""

    def __init__(self, lease: Lease, array: npt.NDArray[Any]) -> None:
        self.lease = lease
        self.__array_interface__ = {**array.__array_interface__, "data": (array.ctypes.data, True)}
