"""Writing a prompt's cache while it is computed."""

from __future__ import annotations

import operator
import threading
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvstore.errors import DeadlineError, KVStoreError, WriteError
from kvstore.handle import Handle
from kvstore.limits import DEVICE_COPY_DEADLINE_S, JOINT_COMMIT_DEADLINE_S, TRANSFER_PRIORITY_DEFAULT
from kvstore.spec import ReuseRule
from kvstore.store.device_put import DevicePuts, TensorRange, token_parts
from kvstore.store.devices import check_device_tensor
from kvstore.store.fill import (
    TensorPlace,
    TensorPut,
    TokenBlocks,
    checksum_pieces,
    gather_states,
    gather_tokens,
    host_view,
    spans_of,
)
from kvstore.store.intervals import IntervalSet

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

    import numpy.typing as npt

    from kvstore.abc import TransportOptions
    from kvstore.pool import BaseTransaction, HandOver, Prompt
    from kvstore.record.array_view import ArrayView
    from kvstore.spec import Coverage, ModelSpec, Shard
    from kvstore.store.devices import DeviceLane
    from kvstore.store.lease import Lease
    from kvstore.store.store import Store
    from kvstore.tiers.gpu.pages import Pages
    from kvstore.transfer import TransferObserver, TransferReport


class WriteListener(Protocol):
    """Who follows a writer: a stream to another node. Called by the thread that puts; must not block."""

    def pieces_whole(self, record: int, pieces: npt.NDArray[np.int64]) -> None:
        """Pieces of a record of the transaction are filled and checksummed."""

    def record_sealed(self, record: int, cost_us: int) -> None:
        """A record is complete."""

    def committed(self, upto_tokens: int, handover: HandOver | None) -> None:
        """Everything up to a length is visible here."""

    def aborted(self, reason: str) -> None:
        """The writer gave up."""


class Writer:
    """A prompt's cache on its way into the store: any order, any thread, visible only once committed.

    Leaving the `with` block without `commit` gives everything back.

    Attributes:
        spec: the model.
        shard: whose share is written.
        prompt: what is written.
        resume_at: lengths at which this writer stores states.
        coverage: which tokens of each layer will be put; None if all.
        transaction: the reserved records.
    """

    def __init__(
        self,
        store: Store,
        prompt: Prompt,
        transaction: BaseTransaction,
        resume_at: tuple[int, ...],
        shard: Shard,
        coverage: Coverage | None = None,
    ) -> None:
        self.prompt = prompt
        self.resume_at = resume_at
        self.transaction = transaction
        self._store = store
        self.spec: ModelSpec = store.spec
        self.shard = shard
        self._lock = threading.RLock()
        self.coverage = coverage
        self._masks = {} if coverage is None else {layer: coverage.mask(layer) for layer, _ in coverage.layers}
        self._spans = spans_of(transaction, self._masks)
        self._claimed: dict[tuple[int, int, int], IntervalSet] = {}
        self._claimed_states: set[tuple[int, int, int, int]] = set()
        self._whole_pieces = np.zeros(len(transaction.records), np.int64)
        self._costs_s = np.zeros(len(transaction.records))
        self._listeners: list[WriteListener] = []
        own = weakref.ref(self)

        def expired(reason: str) -> None:
            writer = own()
            if writer is not None:
                writer._aborted(reason)

        transaction.on_expiry = expired
        self._device_puts = DevicePuts(transaction, self.abort)
        # Records, and the pieces that became whole in each of them at once.
        self._whole: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []

    def __del__(self) -> None:
        transaction = getattr(self, "transaction", None)
        if transaction is not None and transaction.is_open:
            self._store.pool.settle_later(partial(self.abort, "the writer was dropped without a commit"))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.transaction.is_open:
            self.abort("the with block was left without a commit" if error is None else f"{type(error).__name__}")

    @property
    def size_bytes(self) -> int:
        """Bytes reserved by this writer, headers included."""
        return sum(record.slot.size_bytes for record in self.transaction.records)

    def put(self, layer: int, *, tokens: slice, cost_s: float = 0.0, stream: Any = None, **tensors: Any) -> None:
        """Store attention tensors of one layer for a range of tokens. One native call copies all of them.

        All arrays are checked before the first is copied: after an error nothing has been put. Blocks that the
        store has already are skipped. The arrays may be reused when this returns; tensors of a device, by what is
        asked of `stream` afterwards. These are on their way then, and `commit` waits for them. This call waits only
        while all staging buffers are in use.

        Args:
            layer: model layer number.
            tokens: the range, counted from the start of the prompt; no step. Of a layer that does not hold all of
                them (`coverage=`), the arrays have those that it holds alone, in their order.
            cost_s: seconds of prefill that these tokens of this layer took, if known.
            stream: of the device that computed them: a torch.cuda.Stream, or a cudaStream_t as a number; None is the
                current one.
            tensors: arrays by the spec's tensor names, each `[rows, tokens, *inner]`: all on the host, or all on one
                device.

        Raises:
            WriteError: a range twice, outside or overlapping; a wrong shape or type; the writer has ended.
            SpecError: the layer has no such tensor. DeviceError: the device failed. DeadlineError: it hangs.
        """
        start, stop = self._range(tokens)
        mask = self._masks.get(layer)
        count = stop - start if mask is None else int(np.count_nonzero(mask[start:stop]))
        lane = self._store.devices.lane_of(tensors, stream, WriteError)
        if lane is not None:
            self._put_from_device(lane, stream, layer, start, stop, count, cost_s, tensors)
            return
        with self.transaction.moving():
            checked = []
            for name, array in tensors.items():
                group, index = self._tensor(layer, name, ReuseRule.ATTENTION)
                what = f"{name!r} of layer {layer}, tokens {start} to {stop},"
                view = host_view(array, self.spec.groups[group], index, self.shard, count, what, WriteError)
                checked.append((group, index, view, what))
            self._claim(layer, [(group, index, what) for group, index, _, what in checked], start, stop)
            if count:
                self._put_tokens(self._reserved(layer, checked), start, stop, cost_s / max(1, len(checked)))

    def _put_from_device(
        self,
        lane: DeviceLane,
        stream: Any,
        layer: int,
        start: int,
        stop: int,
        count: int,
        cost_s: float,
        tensors: dict[str, Any],
    ) -> None:
        checked = []
        with self.transaction.moving():
            for name, tensor in tensors.items():
                group, index = self._tensor(layer, name, ReuseRule.ATTENTION)
                what = f"{name!r} of layer {layer}, tokens {start} to {stop},"
                check_device_tensor(tensor, self.spec.groups[group], index, self.shard, count, what, WriteError)
                checked.append((group, index, tensor, what))
            callers = lane.device.stream_of(stream)
            self._claim(layer, [(group, index, what) for group, index, _, what in checked], start, stop)
            if not count:
                return
            ranges = []
            part_bytes = lane.puts.ring.buffer_bytes
            for group, index, tensor, what in checked:
                described = self.spec.groups[group].tensors[index]
                # What holds a part of the tokens only has them closed up; it is not cut.
                parts = (
                    token_parts(start, stop, self.spec.block_tokens, tensor.nbytes // count, part_bytes)
                    if layer not in self._masks
                    else [(start, stop)]
                )
                for first, end in parts:
                    if not self._lacks(layer, group, first, end):
                        continue
                    part = tensor if len(parts) == 1 else tensor[:, first - start : end - start]

                    def landed(
                        view: ArrayView,
                        group: int = group,
                        index: int = index,
                        first: int = first,
                        end: int = end,
                        what: str = what,
                    ) -> None:
                        share_s = cost_s / len(checked) * (end - first) / (stop - start)
                        self._put_tokens(self._reserved(layer, [(group, index, view, what)]), first, end, share_s)

                    ranges.append(TensorRange(part, described.dtype, landed))
            self._device_puts.begin(lane, callers, ranges)

    def _lacks(self, layer: int, group: int, first: int, stop: int) -> bool:
        """Whether anything of a range of tokens is reserved here: else the store has it."""
        block = self.spec.block_tokens
        spans = self._spans.get((group, self.spec.span_of_layer[group, layer]), ())
        return any(span.reserved(first // block, -(-stop // block)).size for span in spans)

    def put_state(self, layer: int, *, at: int, cost_s: float = 0.0, stream: Any = None, **tensors: Any) -> None:
        """Store state tensors of one layer after exactly `at` tokens.

        Args:
            layer: model layer number.
            at: the length, one of `resume_at`.
            cost_s: seconds of prefill that having this state saves, if known.
            stream: as for `put`.
            tensors: arrays by the spec's tensor names: `[rows, *inner]`; of a window `[rows, valid, *inner]`,
                the last `min(at, window)` tokens, oldest first. On the host or on a device, as for `put`.

        Raises:
            WriteError: not a checkpoint of this writer, or as `put`. SpecError, DeviceError, DeadlineError: as `put`.
        """
        node = self.transaction.path.node_at(at)
        if at not in self.resume_at or node is None:
            lengths = ", ".join(str(length) for length in self.resume_at) or "none"
            raise WriteError(f"this writer takes no states at {at} tokens; its resume_at is: {lengths}")
        lane = self._store.devices.lane_of(tensors, stream, WriteError)
        with self.transaction.moving():
            checked: list[tuple[int, int, Any, str]] = []
            for name, array in tensors.items():
                group, index = self._tensor(layer, name, ReuseRule.STATE)
                valid = self.spec.groups[group].valid_tokens(self.spec.block_tokens, at)
                what = f"{name!r} of layer {layer} at {at} tokens"
                if lane is None:
                    view = host_view(array, self.spec.groups[group], index, self.shard, valid, what, WriteError)
                    checked.append((group, index, view, what))
                else:
                    check_device_tensor(array, self.spec.groups[group], index, self.shard, valid, what, WriteError)
                    checked.append((group, index, array, what))
            callers = None if lane is None else lane.device.stream_of(stream)
            with self._lock:
                for group, index, _, what in checked:
                    if (layer, group, index, at) in self._claimed_states:
                        raise WriteError(f"{what} was put before; each state is put once")
                self._claimed_states.update((layer, group, index, at) for group, index, _, _ in checked)
            share_s = cost_s / max(1, len(checked))
            if lane is None or callers is None:
                self._put_states(layer, checked, node, share_s)
                return
            ranges = []
            for group, index, tensor, what in checked:

                def landed(view: ArrayView, group: int = group, index: int = index, what: str = what) -> None:
                    self._put_states(layer, [(group, index, view, what)], node, share_s)

                ranges.append(TensorRange(tensor, self.spec.groups[group].tensors[index].dtype, landed))
            self._device_puts.begin(lane, callers, ranges)

    def _put_states(self, layer: int, checked: list[tuple[int, int, ArrayView, str]], node: int, cost_s: float) -> None:
        """Copy states that have been claimed; report their pieces. `cost_s` is that of each tensor."""
        puts = [put for put in self._reserved(layer, checked) if put.span.index[node] >= 0]
        gather_states(puts, self.shard, node)
        with self._lock:
            for put in puts:
                self._costs_s[put.span.index[node]] += cost_s
                self._pieces_arrived(put, put.span.index[[node]])

    def put_pages(
        self,
        pages: Pages,
        page_ids: Mapping[str, Any] | Any,
        *,
        tokens: slice,
        layers: Iterable[int] | None = None,
        first_token: int = 0,
        cost_s: float = 0.0,
        stream: Any = None,
        deadline_s: float = DEVICE_COPY_DEADLINE_S,
    ) -> None:
        """As `put`, out of an engine's registered pages; they may be reused when this returns.

        Blocks that the store has already are not copied. After an error part of the layers may have been put.

        Args:
            page_ids: ids of the pages of the prompt, by name for each attention group, or one list for all.
            tokens: the range, counted from the start of the prompt; no step.
            layers: those that are put; all that are registered by default.
            first_token: the token with which the first page of each list begins.
            cost_s: seconds of prefill that these tokens took, if known.
            stream: whose work fills the pages: they are read behind it. None is the one that is current.

        Raises:
            WriteError: as `put`; too few pages, or pages of another model or worker. SpecError: page ids that do not
                exist. DeadlineError, DeviceError: the device did not copy them.
        """
        from kvstore.store.paged import put_pages

        put_pages(
            self,
            pages,
            page_ids,
            *self._range(tokens),
            layers=layers,
            first_token=first_token,
            cost_s=cost_s,
            stream=stream,
            deadline_s=deadline_s,
        )

    def put_state_pages(
        self,
        pages: Pages,
        page_ids: Mapping[str, Any],
        *,
        at: int,
        layers: Iterable[int] | None = None,
        first_token: int = 0,
        cost_s: float = 0.0,
        stream: Any = None,
        deadline_s: float = DEVICE_COPY_DEADLINE_S,
    ) -> None:
        """As `put_state`, out of an engine's registered pages; they may be reused when this returns.

        Args:
            page_ids: by name of each state group that is put: the id of the page that holds the state; of a window the
                ids of the pages of the prompt, -1 where the engine has given one up: zeros are put for its tokens.
            at: the length, one of `resume_at`.
            layers, first_token, cost_s, stream: as `put_pages`.

        Raises:
            WriteError, SpecError, DeadlineError, DeviceError: as `put_state` and `put_pages`.
        """
        from kvstore.store.paged import put_state_pages

        put_state_pages(
            self,
            pages,
            page_ids,
            at=at,
            layers=layers,
            first_token=first_token,
            cost_s=cost_s,
            stream=stream,
            deadline_s=deadline_s,
        )

    def first_reserved(self, group: int, start: int, stop: int) -> int:
        """The first of the tokens `[start, stop)` whose block this writer has to fill in a group; `stop` if none."""
        block = self.spec.block_tokens
        nodes: list[int] = [
            node * block
            for (number, _), spans in self._spans.items()
            if number == group
            for span in spans
            for node in span.reserved(start // block, -(-stop // block))[:1].tolist()
        ]
        return max(start, min(nodes, default=stop))

    def _range(self, tokens: slice) -> tuple[int, int]:
        try:
            start = operator.index(tokens.start or 0)
            stop = len(self.prompt) if tokens.stop is None else operator.index(tokens.stop)
        except (AttributeError, TypeError) as error:
            raise WriteError(f"tokens={tokens!r} is no range of tokens; pass slice(start, end)") from error
        if tokens.step not in (None, 1):
            raise WriteError(f"tokens={tokens} has a step; put each run of consecutive tokens by itself")
        if not 0 <= start < stop <= len(self.prompt):
            raise WriteError(f"tokens {start} to {stop} are not a range within the prompt's {len(self.prompt)} tokens")
        return start, stop

    def _tensor(self, layer: int, name: str, rule: ReuseRule) -> tuple[int, int]:
        index = self.spec.group_index(layer, name)
        group = self.spec.groups[index]
        if group.rule is not rule:
            method = "put" if group.rule is ReuseRule.ATTENTION else "put_state"
            raise WriteError(
                f"{name!r} of layer {layer} belongs to {group.rule.value} group {group.name!r}: use {method}"
            )
        return index, next(i for i, tensor in enumerate(group.tensors) if tensor.name == name)

    def _claim(self, layer: int, tensors: list[tuple[int, int, str]], start: int, stop: int) -> None:
        """Claim a range of several tensors, (group, index, what) each, or of none."""
        with self._lock:
            claims = []
            for group, tensor, what in tensors:
                claimed = self._claimed.setdefault((layer, group, tensor), IntervalSet())
                overlap = claimed.overlap(start, stop)
                if overlap is not None:
                    raise WriteError(f"{what} overlap tokens {overlap[0]} to {overlap[1]}, which were put before")
                claims.append(claimed)
            for claimed in claims:
                claimed.add(start, stop)

    def _reserved(self, layer: int, checked: list[tuple[int, int, ArrayView, str]]) -> list[TensorPut]:
        """Those of a put's tensors that lie in a span of which anything is reserved."""
        return [
            TensorPut(span, layer, index, view)
            for group, index, view, _ in checked
            for span in self._spans.get((group, self.spec.span_of_layer[group, layer]), ())
        ]

    def _put_tokens(self, puts: list[TensorPut], start: int, stop: int, cost_s: float) -> None:
        """Copy tokens that have been claimed; checksum and report the pieces that are whole now."""
        block, end = self.spec.block_tokens, self.transaction.path.tokens
        mask = self._masks.get(puts[0].layer) if puts else None
        # The tensors of a layer mostly lie in one span.
        spans = {id(put.span): put.span for put in puts}
        blocks_of = {known: TokenBlocks(span, start, stop, block, end, mask) for known, span in spans.items()}
        placed = [(put, blocks_of[id(put.span)]) for put in puts]
        gather_tokens(placed, self.shard)
        arrived = []
        with self._lock:
            for put, blocks in placed:
                if cost_s:
                    np.add.at(self._costs_s, blocks.records, blocks.counts / put.view.shape[1] * cost_s)
                arrived.append((put, *blocks.arrived(put.span.left(put.layer, put.tensor))))
        # A piece becomes whole by one put only, so no other thread checksums or counts it.
        checksum_pieces([(put, unsummed) for put, _, unsummed in arrived if unsummed.size])
        with self._lock:
            for put, whole, _ in arrived:
                self._pieces_arrived(put, put.span.index[whole])

    def _pieces_arrived(self, put: TensorPlace, records: npt.NDArray[np.int64]) -> None:
        """The pieces of one tensor in records are whole and checksummed: report them, seal what is complete."""
        pieces = put.pieces
        if not records.size or not pieces:
            return
        ids = np.arange(pieces.start, pieces.stop)
        self._whole_pieces[records] += len(pieces)
        self._whole.append((records, ids))
        complete = records[self._whole_pieces[records] == len(put.span.layout.pieces)].tolist()
        if self._listeners:
            for record in records.tolist():
                for listener in self._listeners:
                    listener.pieces_whole(record, ids)
        if not complete:
            return
        costs_us = [round(cost_s * 1e6) for cost_s in self._costs_s[complete].tolist()]
        self.transaction.seal_all(complete, costs_us)
        for record, cost_us in zip(complete, costs_us, strict=True):
            for listener in self._listeners:
                listener.record_sealed(record, cost_us)

    def subscribe(self, listener: WriteListener) -> None:
        """Report to `listener` what is whole by now, and from here on everything that becomes so."""
        with self._lock:
            for records, pieces in self._whole:
                for record in records.tolist():
                    listener.pieces_whole(record, pieces)
            for record in range(len(self.transaction.records)):
                if self.transaction.is_sealed(record):
                    listener.record_sealed(record, round(self._costs_s[record] * 1e6))
            self._listeners.append(listener)

    def resume_from(self, lease: Lease) -> None:
        """For `Store.write`: the first block begins with the tail that the lease ends in; it counts as filled."""
        block = self.spec.block_tokens
        start = lease.tokens // block * block
        if start == lease.tokens:
            return
        with self.transaction.moving():
            for group in self.spec.attention_groups:
                for layer in self.spec.groups[group].layers:
                    mask = self._masks.get(layer)
                    held = slice(None) if mask is None else mask[start : lease.tokens]
                    for index, tensor in enumerate(self.spec.groups[group].tensors):
                        spans = self._spans.get((group, self.spec.span_of_layer[group, layer]), ())
                        span = next((span for span in spans if span.index[start // block] >= 0), None)
                        if span is None:
                            continue
                        array = lease.layer(layer).read(tensor.name)[:, start:][:, held]
                        what = f"{tensor.name!r} of layer {layer} in the tail"
                        self._claim(layer, [(group, index, what)], start, lease.tokens)
                        if not array.shape[1]:
                            continue
                        view = host_view(
                            array, self.spec.groups[group], index, self.shard, array.shape[1], what, WriteError
                        )
                        self._put_tokens([TensorPut(span, layer, index, view)], start, lease.tokens, 0.0)

    def fill_uncovered(self) -> None:
        """For `Store.write`: pieces of which no token will come are whole: zeros, as everything that is not held."""
        with self.transaction.moving():
            for (group, _), spans in self._spans.items():
                for span in spans:
                    for layer in span.layout.span.layers:
                        if layer not in self._masks or self.spec.groups[group].rule is not ReuseRule.ATTENTION:
                            continue
                        for index in span.layout.columns:
                            place = TensorPlace(span, layer, index)
                            nodes = np.flatnonzero((span.index >= 0) & (span.left(layer, index) == 0))
                            checksum_pieces([(place, nodes)])
                            with self._lock:
                                self._pieces_arrived(place, span.index[nodes])

    def send(
        self,
        address: str,
        *,
        is_transient: bool = False,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
    ) -> Handle[TransferReport]:
        """Stream the prompt's resume point to another node while it is written; call it before the first `put`.

        Args:
            is_transient: at the receiver the prompt's tail disappears once its hand-over was claimed.
            address, transport, total_deadline_s, priority, observer: as `Store.send`.

        Raises:
            WriteError: the writer has ended. Otherwise as `Store.send`.
        """
        from kvstore.transfer import send_writer

        return send_writer(
            self,
            address,
            is_transient=is_transient,
            transport=transport,
            total_deadline_s=total_deadline_s,
            priority=priority,
            observer=observer,
            sender=self._store.own_sender(),
        )

    def commit(
        self,
        upto_tokens: int | None = None,
        *,
        handover: HandOver | None = None,
        deadline_s: float = JOINT_COMMIT_DEADLINE_S,
    ) -> None:
        """Make what was written visible, all or nothing. With a length, only what ends there or before.

        A party of a joint commit waits here for the others, and commits its whole prompt. What was put from a device
        is waited for.

        Args:
            deadline_s: how long a party waits; then it gives up, and with it all parties. And how long a device is
                waited for.

        Raises:
            WriteError: something within the range was not put, or the writer has ended; or a hand-over whose prompt's
            end is no checkpoint. JointCommitError: a party gave up, died or was late; nothing became visible.
            DeadlineError: a device hangs; the writer stays open.
        """
        self._device_puts.wait(deadline_s)
        if self.transaction.joint is not None:
            if upto_tokens is not None and upto_tokens < self.transaction.path.tokens:
                raise WriteError("a party of a joint commit commits its whole prompt, not a part of it")
            self._commit_jointly(handover, deadline_s)
            return
        self._check_handover(handover)
        self._commit(upto_tokens, handover)

    def _commit(self, upto_tokens: int | None, handover: HandOver | None) -> None:
        meters = self._store.observer.meters
        began_s = time.perf_counter()
        try:
            self.transaction.commit(upto_tokens, handover)
        except KVStoreError as error:
            meters.refused(error)
            raise
        meters.committed(time.perf_counter() - began_s)
        self._committed(upto_tokens, handover)

    def _commit_jointly(self, handover: HandOver | None, deadline_s: float) -> None:
        waiting = self.commit_async(handover=handover)
        try:
            waiting.result(deadline_s)
        except DeadlineError:
            waiting.cancel(f"the other parties did not come within {deadline_s:g} s")
            # Whether the others came in the last moment is known soon; giving up ends the wait in any case.
            waiting.result(JOINT_COMMIT_DEADLINE_S)

    def commit_async(self, *, handover: HandOver | None = None) -> Handle[None]:
        """As `commit` of the whole prompt, without waiting: a party of a joint commit may have to wait for the others.

        The handle resolves when everything is visible. `cancel()` gives up, and fails all parties.

        Raises:
            WriteError: as `commit`.
        """
        self._check_handover(handover)
        joint = self.transaction.joint
        what = f"the joint commit {joint.name!r}" if joint is not None else "the commit"
        handle: Handle[None] = Handle(what, self.abort)
        if self._device_puts.when_landed(partial(self._commit_landed, handover, handle)):
            return handle
        self._commit_into(handover, handle)
        return handle

    def _commit_landed(self, handover: HandOver | None, handle: Handle[None]) -> None:
        """What was put from a device has landed."""
        try:
            self._commit_into(handover, handle)
        except KVStoreError as error:
            handle.fail(error)

    def _commit_into(self, handover: HandOver | None, handle: Handle[None]) -> None:
        if self.transaction.joint is None:
            self._commit(None, handover)
            handle.resolve(None)
            return

        def ended(error: BaseException | None) -> None:
            if error is None:
                self._committed(None, handover)
                handle.resolve(None)
            else:
                self._aborted(str(error))
                handle.fail(error)

        self.transaction.commit_jointly(handover, ended)

    def _check_handover(self, handover: HandOver | None) -> None:
        if handover is not None and len(self.prompt) not in self.resume_at:
            raise WriteError(
                f"a hand-over waits at the prompt's end, {len(self.prompt)} tokens, which is not in resume_at; add it"
            )

    def _committed(self, upto_tokens: int | None, handover: HandOver | None) -> None:
        upto = self.transaction.path.tokens if upto_tokens is None else upto_tokens
        for listener in tuple(self._listeners):
            listener.committed(upto, handover)

    def abort(self, reason: str = "aborted by the caller") -> None:
        """Give everything that was not committed back. Idempotent."""
        if not self.transaction.is_open:
            return
        self.transaction.abort(reason)
        self._aborted(reason)

    def _aborted(self, reason: str) -> None:
        # Without the lock: a put that is under way holds it, and this must not wait for that.
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.aborted(reason)
