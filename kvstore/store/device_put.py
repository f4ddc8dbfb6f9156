"""Tensors of a device on their way into reserved records: through page-locked memory, checksummed as they land."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, DeviceError, KVStoreError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.record.array_view import ArrayView
from kvstore.tiers.gpu.staging import StagingBuffer, mark_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.pool import BaseTransaction
    from kvstore.spec import DType
    from kvstore.store.devices import DeviceLane
    from kvstore.tiers.gpu.device import Stream


@dataclass(frozen=True)
class TensorRange:
    """A tensor of a device, or the part of one that goes through one staging buffer.

    Attributes:
        tensor: where it is; any strides.
        dtype: what it holds.
        landed: takes it from host memory, where it is contiguous, into records. Raises `KVStoreError`.
    """

    tensor: Any
    dtype: DType
    landed: Callable[[ArrayView], None]


def token_parts(start: int, stop: int, block_tokens: int, token_bytes: int, part_bytes: int) -> list[tuple[int, int]]:
    """Ranges of tokens of at most so many bytes, or of one block; cut between blocks, whose checksums are then free."""
    blocks = max(1, part_bytes // max(1, token_bytes * block_tokens))
    step = blocks * block_tokens
    cuts = [start, *range(start // step * step + step, stop, step), stop]
    return list(pairwise(cuts))


class DevicePuts:
    """The puts of one writer that have not landed. Any thread.

    While one is under way, bytes count as moving in the transaction's slots: after an abort they stay in quarantine.

    Args:
        abort: ends the writer, for a reason. Held weakly, since the writer holds this.
    """

    def __init__(self, transaction: BaseTransaction, abort: Callable[[str], None]) -> None:
        self._transaction = transaction
        self._abort_writer = WeakMethod(abort)
        self._changed = threading.Condition()
        self._under_way = 0
        self._then: list[Callable[[], None]] = []

    def begin(self, lane: DeviceLane, callers: Stream, ranges: Sequence[TensorRange]) -> None:
        """Bring tensors to the host, behind what their computer's stream was asked before. Does not wait for them.

        What that stream is asked afterwards may overwrite them.

        Raises:
            DeadlineError: no staging buffer became free. DeviceError: the device failed. The writer was aborted: what
            it had claimed will not come.
        """
        if not ranges:
            return
        deadline = Deadline.after(DEVICE_COPY_DEADLINE_S)
        try:
            computed = callers.mark()
            lane.puts.stream.wait(computed)
            for each in ranges:
                self._begin(lane, each, deadline)
        except (DeviceError, DeadlineError) as error:
            self._abort(f"a tensor of {lane.device.name} could not be copied: {error}")
            raise
        finally:
            copied = mark_of(lane.puts.stream)
            if copied is not None:
                callers.wait(copied)

    def _abort(self, reason: str) -> None:
        abort = self._abort_writer()
        if abort is not None:
            abort(reason)

    def _begin(self, lane: DeviceLane, each: TensorRange, deadline: Deadline) -> None:
        tensor, size_bytes = each.tensor, each.tensor.nbytes
        is_of_ring = size_bytes <= lane.puts.ring.buffer_bytes
        buffer = lane.puts.ring.take(deadline) if is_of_ring else StagingBuffer(lane.device.staging(size_bytes))
        moving = ExitStack()
        if is_of_ring:
            moving.callback(lane.puts.ring.give, buffer)
        with ExitStack() as undoing:
            undoing.push(moving)
            moving.enter_context(self._transaction.moving())
            shape = tuple(tensor.shape)

            def copy() -> None:
                staged = buffer.tensor[:size_bytes].view(tensor.dtype).view(shape)
                staged.copy_(tensor, non_blocking=True)

            lane.puts.stream.uses(tensor)
            try:
                lane.puts.stream.run(copy)
            except BaseException:
                # Part of it may be on its way: the buffer and the slots stay until it is not.
                mark = mark_of(lane.puts.stream)
                if mark is not None:
                    undoing.pop_all()
                    lane.landings.add([mark], lambda error: moving.close())
                raise
            mark = lane.puts.stream.mark()
            undoing.pop_all()
        with self._changed:
            self._under_way += 1
        lane.account(put_bytes=size_bytes)
        strides = tuple(each.dtype.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
        view = ArrayView(buffer.address, shape, strides, each.dtype, True, buffer)

        def landed(error: DeviceError | None) -> None:
            self._land(each, view, moving, error)

        lane.landings.add([mark], landed)

    def _land(self, each: TensorRange, view: ArrayView, moving: ExitStack, error: KVStoreError | None) -> None:
        """On the thread of the landings. What goes wrong ends the writer: nobody waits for this call."""
        try:
            if error is None and self._transaction.is_open:
                each.landed(view)
        except KVStoreError as failed:
            error = failed
        finally:
            moving.close()
        if error is not None:
            self._abort(f"a tensor of a device did not arrive: {error}")
        with self._changed:
            self._under_way -= 1
            is_last = not self._under_way
            then, self._then = (self._then, []) if is_last else ([], self._then)
            self._changed.notify_all()
        for action in then:
            action()

    def wait(self, deadline_s: float) -> None:
        """Block until everything has landed.

        Raises:
            DeadlineError: it has not by then.
        """
        deadline = Deadline.after(deadline_s)
        with self._changed:
            while self._under_way:
                if deadline.has_passed:
                    raise DeadlineError(
                        f"{self._under_way} tensors have not come from their device within {deadline_s:g} s; it is "
                        "busy or hangs. Commit later, or abort"
                    )
                self._changed.wait(min(deadline.remaining_s(), 1.0))

    def when_landed(self, action: Callable[[], None]) -> bool:
        """Call `action` once everything has landed; False, and it is not called, if it has."""
        with self._changed:
            if self._under_way:
                self._then.append(action)
            return bool(self._under_way)
