"""Which records of a write a layer's tokens go to, and what has arrived of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import addresses_of, copy_rows_crc32c, crc32c_in_place
from kvstore.record.copy import CHECKSUM_BYTES, check_array, join_plans, plan_bytes, state_plan, token_plan
from kvstore.record.threads import copy_threads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    import numpy.typing as npt

    from kvstore.errors import KVStoreError
    from kvstore.pool import BaseTransaction, TransactionRecord
    from kvstore.record import RecordLayout
    from kvstore.record.array_view import ArrayView
    from kvstore.spec import CacheGroup, Shard

    Mask = npt.NDArray[np.bool_]
    Nodes = npt.NDArray[np.int64]


def host_view(
    array: Any, group: CacheGroup, tensor_index: int, shard: Shard, tokens: int, what: str, error: type[KVStoreError]
) -> ArrayView:
    """As `check_array`, for arrays that the native copy can walk.

    Raises:
        `error`: another type, another shape, or rows and tokens that overlap.
    """
    view = check_array(array, group, tensor_index, shard, tokens, what, error)
    if view.is_contiguous or 0 in view.shape:
        return view
    row_bytes = group.tensors[tensor_index].row_bytes
    outer = 2 if group.tensors[tensor_index].has_tokens else 1
    # The stride of an axis of one element is arbitrary (0 after `array[:, None]`), and nothing reads it.
    strides = [row_bytes if size == 1 else step for size, step in zip(view.shape[:outer], view.strides, strict=False)]
    extent = row_bytes
    for step, size in sorted(zip(strides, view.shape, strict=False)):
        if size > 1:
            if step < extent:
                raise error(f"{what} has rows or tokens that overlap; pass a contiguous tensor")
            extent = step * (size - 1) + extent
    return replace(view, strides=(*strides, *view.strides[outer:]))


class SpanRecords:
    """The reserved records of one (group, span) of a transaction that share a layout, by node of its path.

    Attributes:
        layout: theirs: a writer has one shard, so one range of units per group; sparse records have one of their own.
        index: record number in the transaction, by node; -1 where nothing is reserved.
        address: address of each record, by node; 0 where nothing is reserved.
    """

    def __init__(
        self,
        records: Sequence[tuple[int, TransactionRecord]],
        sizes: npt.NDArray[np.int64],
        held: Mapping[int, npt.NDArray[np.int64]],
    ) -> None:
        nodes = len(sizes)
        self.layout = records[0][1].layout
        self._sizes = sizes
        self._held = held
        self._left: dict[tuple[int, int], npt.NDArray[np.int64]] = {}
        self.index = np.full(nodes, -1, np.int64)
        self.address = np.zeros(nodes, np.uint64)
        own_nodes = [record.name.node for _, record in records]
        self.index[own_nodes] = [number for number, _ in records]
        self.address[own_nodes] = addresses_of([record.memory for _, record in records])

    def reserved(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Those of the nodes `[first, stop)` at which a record is reserved."""
        nodes: npt.NDArray[np.int64] = np.flatnonzero(self.index[first:stop] >= 0) + first
        return nodes

    def left(self, layer: int, tensor: int) -> npt.NDArray[np.int64]:
        """How many tokens of a layer's tensor each node still waits for, `[nodes]`; the caller counts them down."""
        left = self._left.get((layer, tensor))
        if left is None:
            left = self._left[layer, tensor] = self._held.get(layer, self._sizes).copy()
        return left

    def checksum_columns(self, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Addresses of the checksum columns of the records at nodes."""
        return self.address[nodes] + np.uint64(self.layout.checksum_offset)


def spans_of(transaction: BaseTransaction, masks: Mapping[int, Mask]) -> dict[tuple[int, int], list[SpanRecords]]:
    """The transaction's records by (group, span), those that share a layout together.

    Args:
        masks: which tokens of the prompt each layer holds, of layers that do not hold all.
    """
    path = transaction.path
    nodes = np.arange(len(path))
    sizes = np.minimum((nodes + 1) * path.block_tokens, path.tokens) - nodes * path.block_tokens
    held = {
        layer: np.bincount(np.flatnonzero(mask[: path.tokens]) // path.block_tokens, minlength=len(path))
        for layer, mask in masks.items()
    }
    grouped: dict[tuple[int, int], dict[RecordLayout, list[tuple[int, TransactionRecord]]]] = {}
    for number, record in enumerate(transaction.records):
        by_layout = grouped.setdefault((record.name.group, record.name.span), {})
        by_layout.setdefault(record.layout, []).append((number, record))
    return {
        name: [SpanRecords(records, sizes, held) for records in by_layout.values()]
        for name, by_layout in grouped.items()
    }


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of one layer in the records of a span.

    Attributes:
        span: the records.
        layer: model layer number.
        tensor: its index in the group.
    """

    span: SpanRecords
    layer: int
    tensor: int

    @property
    def pieces(self) -> range:
        """Its pieces in each record."""
        return self.span.layout.tensor_pieces(self.layer, self.tensor)


@dataclass(frozen=True)
class TensorPut(TensorPlace):
    """One tensor of one layer on its way into the records of a span.

    Attributes:
        view: where it lies.
    """

    view: ArrayView


class TokenBlocks:
    """The runs of tokens of a put in the reserved blocks of a span. Arrays of shape [n], by ascending node.

    Without a mask there is one run per block.

    Attributes:
        span: the records.
        nodes: of the path.
        records: their numbers in the transaction.
        offsets: where each run begins, counted from its block's begin.
        view_tokens: the same in the array that was put.
        counts: tokens of each run.
        is_filled: whether it fills its block: then it is checksummed while it is copied.
        are_all_filled: whether all of them do.

    Args:
        start, stop: the tokens of the put.
        mask: which of the prompt's tokens the layer holds, None for all; the array has these alone.
    """

    def __init__(
        self, span: SpanRecords, start: int, stop: int, block_tokens: int, path_tokens: int, mask: Mask | None
    ) -> None:
        self.span = span
        self._has_mask = mask is not None
        if mask is None:
            self.nodes = span.reserved(start // block_tokens, -(-stop // block_tokens))
            begin = self.nodes * block_tokens
            first = np.maximum(begin, start)
            self.offsets = first - begin
            self.view_tokens = first - start
            self.counts = np.minimum(np.minimum(begin + block_tokens, path_tokens), stop) - first
        else:
            tokens = np.flatnonzero(mask[start : min(stop, path_tokens)]) + start
            is_first = np.ones(len(tokens), np.bool_)
            is_first[1:] = (np.diff(tokens) != 1) | (tokens[1:] % block_tokens == 0)
            firsts = np.flatnonzero(is_first)
            nodes = tokens[firsts] // block_tokens
            is_reserved = span.index[nodes] >= 0
            self.nodes = nodes[is_reserved]
            self.offsets = (tokens[firsts] % block_tokens)[is_reserved]
            self.view_tokens = firsts[is_reserved]
            self.counts = np.diff(np.append(firsts, len(tokens)))[is_reserved]
        self.records = span.index[self.nodes]
        self.is_filled = self.counts == block_tokens
        self.are_all_filled = bool(self.is_filled.all())

    def arrived(self, left: npt.NDArray[np.int64]) -> tuple[Nodes, Nodes]:
        """Count the tokens down: the nodes that wait for nothing more, and those of them that are not checksummed."""
        if not self._has_mask:
            left[self.nodes] -= self.counts
            is_whole = left[self.nodes] == 0
            return self.nodes[is_whole], self.nodes[is_whole & ~self.is_filled]
        np.subtract.at(left, self.nodes, self.counts)
        is_whole = left[self.nodes] == 0
        return np.unique(self.nodes[is_whole]), np.unique(self.nodes[is_whole & ~self.is_filled])

    def gather_plan(self, put: TensorPut, shard: Shard) -> npt.NDArray[np.uint64]:
        """Plan that copies a tensor's tokens into these blocks, and checksums the pieces that it fills."""
        columns = self.span.checksum_columns(self.nodes)
        return token_plan(
            self.span.layout,
            put.layer,
            put.tensor,
            shard,
            put.view,
            self.span.address[self.nodes],
            self.offsets,
            self.view_tokens,
            self.counts,
            checksums=columns if self.are_all_filled else np.where(self.is_filled, columns, np.uint64(0)),
        )


def gather_tokens(puts: Sequence[tuple[TensorPut, TokenBlocks]], shard: Shard) -> None:
    """Copy tensors into the blocks that their tokens lie in: one native call.

    The pieces of filled blocks are checksummed on the way; others when the rest is there.
    """
    _gather([blocks.gather_plan(put, shard) for put, blocks in puts])


def gather_states(puts: Sequence[TensorPut], shard: Shard, node: int) -> None:
    """Copy tensors of one layer's states, or of its windows, into the records at a node and checksum their pieces."""
    plans = []
    padded = []
    for put in puts:
        layout = put.span.layout
        column = put.span.checksum_columns(np.array([node]))
        if not layout.capacity_tokens:
            address = int(put.span.address[node])
            plan = state_plan(layout, put.layer, put.tensor, shard, put.view, address, checksums=int(column[0]))
            plans.append(plan)
            continue
        valid = put.view.shape[1]
        is_filled = valid == layout.capacity_tokens
        nothing = np.zeros(1, np.int64)
        plans.append(
            token_plan(
                layout,
                put.layer,
                put.tensor,
                shard,
                put.view,
                put.span.address[[node]],
                nothing,
                nothing,
                np.array([valid]),
                checksums=column if is_filled else np.zeros(1, np.uint64),
            )
        )
        if not is_filled:
            padded.append((put, np.array([node])))
    _gather(plans)
    checksum_pieces(padded)


def _gather(plans: Sequence[npt.NDArray[np.uint64]]) -> None:
    plan = join_plans(plans, 7)
    copy_rows_crc32c(plan, threads=copy_threads(plan_bytes(plan)))


def checksum_pieces(puts: Sequence[tuple[TensorPlace, Nodes]]) -> None:
    """Checksum the pieces of tensors in the records at nodes where they lie, into the records' checksum columns."""
    plans = []
    for put, nodes in puts:
        layout = put.span.layout
        pieces = slice(put.pieces.start, put.pieces.stop)
        plan = np.empty((len(nodes), len(put.pieces), 3), np.uint64)
        plan[..., 0] = put.span.address[nodes][:, None] + layout.piece_offsets[pieces].astype(np.uint64)
        plan[..., 1] = layout.piece_sizes[pieces].astype(np.uint64)
        numbers = np.arange(put.pieces.start, put.pieces.stop, dtype=np.uint64)
        plan[..., 2] = put.span.checksum_columns(nodes)[:, None] + np.uint64(CHECKSUM_BYTES) * numbers
        plans.append(plan.reshape(-1, 3))
    plan = join_plans(plans, 3)
    if len(plan):
        crc32c_in_place(plan, threads=copy_threads(int(plan[:, 1].sum())))
