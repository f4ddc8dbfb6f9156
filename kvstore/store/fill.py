"""Which records of a write a layer's tokens go to, and what has arrived of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import copy_rows, crc32c_many
from kvstore.record.array_view import address_of
from kvstore.record.copy import check_array, state_plan, token_plan

if TYPE_CHECKING:
    from typing import Any

    import numpy.typing as npt

    from kvstore.errors import KVStoreError
    from kvstore.pool import Transaction, TransactionRecord
    from kvstore.record import RecordLayout
    from kvstore.record.array_view import ArrayView
    from kvstore.spec import CacheGroup, Shard


def host_view(
    array: Any, group: CacheGroup, tensor_index: int, shard: Shard, tokens: int, what: str, error: type[KVStoreError]
) -> ArrayView:
    """As `check_array`, for arrays that the native copy can walk.

    Raises:
        WriteError: another type.
        `error`: another shape, or rows and tokens that overlap.
    """
    view = check_array(array, group, tensor_index, shard, tokens, what, error)
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
    """The reserved records of one (group, span) of a transaction, by node of its path.

    Attributes:
        layout: the layout that they share: a writer has one shard, so one range of units per group.
        index: record number in the transaction, by node; -1 where nothing is reserved.
        address: address of each record, by node; 0 where nothing is reserved.
    """

    def __init__(self, layout: RecordLayout, nodes: int) -> None:
        self.layout = layout
        self.index = np.full(nodes, -1, np.int64)
        self.address = np.zeros(nodes, np.uint64)

    def add(self, number: int, record: TransactionRecord) -> None:
        self.index[record.name.node] = number
        self.address[record.name.node] = address_of(record.memory)


def spans_of(transaction: Transaction) -> dict[tuple[int, int], SpanRecords]:
    """The transaction's records by (group, span)."""
    spans: dict[tuple[int, int], SpanRecords] = {}
    for number, record in enumerate(transaction.records):
        name = (record.name.group, record.name.span)
        if name not in spans:
            spans[name] = SpanRecords(record.layout, len(transaction.path))
        spans[name].add(number, record)
    return spans


def gather_tokens(
    span: SpanRecords,
    layer: int,
    tensor: int,
    shard: Shard,
    view: ArrayView,
    start: int,
    stop: int,
    block_tokens: int,
) -> None:
    """Copy tokens `[start, stop)` of one tensor of one layer into the reserved blocks that they lie in."""
    nodes = np.arange(start // block_tokens, -(-stop // block_tokens))
    nodes = nodes[nodes < len(span.index)]
    nodes = nodes[span.index[nodes] >= 0]
    if not nodes.size:
        return
    first = np.maximum(nodes * block_tokens, start)
    last = np.minimum((nodes + 1) * block_tokens, stop)
    plan = token_plan(
        span.layout,
        layer,
        tensor,
        shard,
        view,
        span.address[nodes],
        first - nodes * block_tokens,
        first - start,
        last - first,
        into_records=True,
    )
    copy_rows(plan)


def gather_state(span: SpanRecords, layer: int, tensor: int, shard: Shard, view: ArrayView, node: int) -> None:
    """Copy one tensor of one layer's state, or of its window, into the record at a node."""
    layout = span.layout
    address = int(span.address[node])
    if layout.capacity_tokens:
        one = np.zeros(1, np.int64)
        records = np.array([address], np.uint64)
        counts = np.array([view.shape[1]], np.int64)
        copy_rows(token_plan(layout, layer, tensor, shard, view, records, one, one, counts, into_records=True))
    else:
        copy_rows(state_plan(layout, layer, tensor, shard, view, address, into_records=True))


def checksum_pieces(span: SpanRecords, transaction: Transaction, nodes: npt.NDArray[np.int64], pieces: range) -> None:
    """Checksum pieces where they lie and store the result in each record's checksum column."""
    layout = span.layout
    offsets = layout.piece_offsets[pieces.start : pieces.stop].astype(np.uint64)
    sizes = layout.piece_sizes[pieces.start : pieces.stop].astype(np.uint64)
    addresses = span.address[nodes][:, None] + offsets[None, :]
    computed = crc32c_many(addresses.ravel(), np.tile(sizes, len(nodes))).reshape(len(nodes), len(pieces))
    for node, checksums in zip(nodes.tolist(), computed, strict=True):
        record = transaction.records[span.index[node]]
        layout.checksums(record.memory)[pieces.start : pieces.stop] = checksums
