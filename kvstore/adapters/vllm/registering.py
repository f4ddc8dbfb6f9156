"""The engine's pages as a worker of the connector uses them: registered, behind the engine's work, in its order."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, DeviceError, SpecError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.tiers.gpu.torch_device import open_device

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kvstore.adapters.paged import EngineGroup, PagedMapping
    from kvstore.adapters.vllm.metadata import LoadOrder, SaveOrder
    from kvstore.spec import ModelSpec, Shard
    from kvstore.store import Lease, Writer
    from kvstore.tiers.gpu.device import Device, Mark, Stream

logger = logging.getLogger(__name__)


class EnginePages:
    """One worker's pages. Any thread.

    Args:
        mapping: of the engine's groups; registered here.
        tensors: the engine's own, by its names of the layers. Their first axis is that of pages, which may be smaller
            than those of its tables.
        page_count: pages that its tables may name.

    Raises:
        SpecError: as `PagedMapping.register`, or the tensors lie on several devices.
    """

    def __init__(self, mapping: PagedMapping, tensors: Mapping[str, Any], page_count: int) -> None:
        mapping.register(tensors)
        self._mapping = mapping
        self._tensors = dict(tensors)
        self._page_count = page_count
        names = {str(_parts(tensors[name])[0].device) for group in mapping.groups for name in group.names}
        if len(names) != 1:
            raise SpecError(f"the engine's pages lie on several devices: {', '.join(sorted(names))}")
        self._device: Device = open_device(names.pop())
        layers = [pair for group in mapping.groups for pair in zip(group.layers, group.names, strict=True)]
        self._names = tuple(name for _, name in sorted(layers))

    @property
    def spec(self) -> ModelSpec:
        return self._mapping.spec

    @property
    def shard(self) -> Shard:
        return self._mapping.shard

    @property
    def groups(self) -> tuple[EngineGroup, ...]:
        return self._mapping.groups

    @property
    def table_count(self) -> int:
        """Tables of pages that a request has."""
        return len({group.index for group in self._mapping.groups})

    @property
    def names(self) -> tuple[str, ...]:
        """What the engine calls the layers that have pages here, in the order of the model's layers."""
        return self._names

    def marks(self) -> tuple[Mark, ...]:
        """A mark behind everything that this thread has asked of the device so far."""
        return (self._device.stream_of(None).mark(),)

    def stream(self) -> Any:
        """A stream of its own, as a torch stream; None where the device is the host."""
        return _stream_on(self._device)

    def load(
        self,
        lease: Lease,
        order: LoadOrder,
        stream: Any,
        after: Sequence[Mark],
        deadline: Deadline,
    ) -> None:
        """Fill the pages of an order, and wait until they hold it. After an error nothing moves there any longer.

        Args:
            stream: from `stream`, of this thread.
            after: what the pages may still be used by.

        Raises:
            LeaseError, SpecError: as `PagedMapping.load`. DeviceError, DeadlineError: the device failed, or was late.
        """
        asked = self._device.stream_of(stream)
        try:
            for mark in after:
                asked.wait(mark)
            asked.run(lambda: self._clear_rests(order))
            self._mapping.load(lease, order.tables, order.start, stream=stream, deadline_s=deadline.remaining_s())
            asked.mark().wait(deadline, f"loading {order.tokens} tokens")
        except BaseException:
            # The engine gives the pages to another request as soon as it hears of the failure.
            _settle(asked)
            raise

    def clear_rests(self, order: LoadOrder) -> None:
        """For `load_layer`: ask the engine's stream to zero what an order leaves of the pages that it fills."""
        self._device.stream_of(None).run(lambda: self._clear_rests(order))

    def load_layer(
        self, lease: Lease, order: LoadOrder, name: str, stream: Any, after: Sequence[Mark], deadline: Deadline
    ) -> Mark:
        """Fill one layer's pages of an order, behind its `clear_rests`. After an error call `settle`.

        Args:
            name: the engine's, of the layer.
            stream, after: as `load`.

        Returns:
            A mark behind which the pages hold it.

        Raises:
            LeaseError, SpecError, DeviceError, DeadlineError: as `PagedMapping.load`.
        """
        asked = self._device.stream_of(stream)
        for mark in after:
            asked.wait(mark)
        deadline_s = deadline.remaining_s()
        self._mapping.load(lease, order.tables, order.start, names=(name,), stream=stream, deadline_s=deadline_s)
        return asked.mark()

    def wait_in_forward(self, mark: Mark) -> None:
        """What the engine's stream is asked from here on begins behind a mark."""
        self._device.stream_of(None).wait(mark)

    def settle(self, stream: Any) -> None:
        """Wait until nothing that a thread's stream was asked moves any longer."""
        _settle(self._device.stream_of(stream))

    def pages_filled(self, order: LoadOrder) -> set[int]:
        """The pages that an order fills, where there is one table."""
        return {page for pages in self._mapping.pages_filled(order.tables, order.start, order.tokens) for page in pages}

    def _clear_rests(self, order: LoadOrder) -> None:
        """Zero the pages that the load fills in part.

        Attention kernels multiply what lies behind the last token by zero, and what somebody else's state left there
        may be no number. vLLM zeroes new pages for the same reason, but not those that a load is to fill.
        """
        for group in self._mapping.groups:
            if group.is_state:
                continue
            first = max(order.start, group.first_needed(order.tokens))
            columns = group.columns(first, order.tokens)
            partial = {order.tokens // group.page_tokens} if order.tokens % group.page_tokens else set()
            if group.is_window and first % group.page_tokens:
                partial.add(first // group.page_tokens)
            for column in partial.intersection(columns):
                if column == order.start // group.page_tokens and order.start % group.page_tokens:
                    continue  # tokens of the engine's own begin it
                self._clear(group, order.tables[group.index][column])

    def _clear(self, group: EngineGroup, page: int) -> None:
        """Zero one page of a table in all layers of its group."""
        for name in group.names:
            for tensor in _parts(self._tensors[name]):
                parts = tensor.shape[0] // self._page_count
                tensor[page * parts : (page + 1) * parts].zero_()

    def save(
        self,
        writer: Writer,
        order: SaveOrder,
        *,
        cost_s: float,
        deadline: Deadline,
        names: Collection[str] | None = None,
        stream: Any = None,
        after: Sequence[Mark] = (),
    ) -> None:
        """Put what a step has left of a request: tokens to the writer's end, states and windows at its checkpoints.

        Args:
            names: the engine's names of the layers; all by default.
            stream: from `stream`, of this thread; by default the engine's, whose work fills the pages.
            after: what has filled them, where that is another stream.
        """
        stop = len(writer.prompt)
        lengths = [length for length in writer.resume_at if length != stop]
        at = stop if stop in writer.resume_at else None
        if after:
            asked = self._device.stream_of(stream)
            for mark in after:
                asked.wait(mark)
        self._mapping.save(
            writer,
            order.tables,
            0,
            stop,
            at=at,
            names=names,
            cost_s=cost_s,
            stream=stream,
            deadline_s=deadline.remaining_s(),
        )
        for length in lengths:  # of windows, whose tokens lie in their pages still
            self._mapping.save(
                writer,
                order.tables,
                stop,
                stop,
                at=length,
                names=names,
                stream=stream,
                deadline_s=deadline.remaining_s(),
            )


def _parts(given: Any) -> Sequence[Any]:
    return given if isinstance(given, (list, tuple)) else (given,)


def _stream_on(device: Device) -> Any:
    if not device.needs_pinning:
        return None
    import torch

    cuda: Any = torch.cuda
    return cuda.Stream(device=torch.device(device.name))


def _settle(stream: Stream) -> None:
    """Wait until nothing that a stream was asked moves any longer, however long a device takes that hangs."""
    while True:
        try:
            stream.mark().wait(Deadline.after(DEVICE_COPY_DEADLINE_S), "a load that failed")
        except DeadlineError as error:
            logger.warning("its pages are kept: %s", error)
        except DeviceError:
            return  # a device that failed moves nothing
        else:
            return
