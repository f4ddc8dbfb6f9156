"""Copy plans between a worker's tensors and records: one native call moves all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.record.array_view import view_array
from kvstore.record.rows import local_rows, runs_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    import numpy.typing as npt

    from kvstore.errors import KVStoreError
    from kvstore.record.array_view import ArrayView
    from kvstore.record.layout import RecordLayout
    from kvstore.spec import CacheGroup, Shard


def check_array(
    array: Any, group: CacheGroup, tensor_index: int, shard: Shard, tokens: int, what: str, error: type[KVStoreError]
) -> ArrayView:
    """View a worker's tensor after checking type and shape.

    Raises:
        WriteError: another type.
        `error`: the shape is not `[rows, tokens, *inner]` (or `[rows, *inner]`), the inner axes have gaps, or
            rows or tokens overlap.
    """
    tensor = group.tensors[tensor_index]
    view = view_array(array, tensor.dtype, what)
    expected = tensor.shape(local_rows(group, tensor_index, shard), tokens)
    if view.shape != expected:
        raise error(f"{what} has shape {list(view.shape)}, expected {list(expected)} ({_axes(tensor.has_tokens)})")
    outer = 2 if tensor.has_tokens else 1
    if not view.is_contiguous_from(outer):
        raise error(f"{what} has gaps in its inner axes, or another order of them; pass a contiguous tensor")
    steps = zip(view.shape[:outer], view.strides[:outer], strict=True)
    if any(size > 1 and stride < tensor.row_bytes for size, stride in steps):
        raise error(f"{what} repeats, overlaps or reverses its rows or tokens; pass a contiguous tensor")
    return view


def _axes(has_tokens: bool) -> str:
    return "[rows, tokens, *inner]" if has_tokens else "[rows, *inner]"


def token_plan(
    layout: RecordLayout,
    layer: int,
    tensor_index: int,
    shard: Shard,
    view: ArrayView,
    records: npt.NDArray[np.uint64],
    record_tokens: npt.NDArray[np.int64],
    view_tokens: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    *,
    into_records: bool,
) -> npt.NDArray[np.uint64]:
    """Plan for a tensor with a token axis over many records of one class.

    Args:
        view: the worker's `[rows, tokens, *inner]`.
        records: address of each record.
        record_tokens: first token within each record.
        view_tokens: first token within the view, for each record.
        counts: tokens to copy, for each record.
        into_records: gather (True) or scatter (False).
    """
    tensor = layout.group.tensors[tensor_index]
    row_bytes = tensor.row_bytes
    row_stride, token_stride = view.strides[0], view.strides[1]
    offsets: list[int] = []
    rows: list[int] = []
    for run in runs_of(layout, layer, tensor_index, shard):
        for step in range(run.rows):
            offsets.append(run.offset + step * layout.capacity_tokens * row_bytes)
            rows.append(run.row + step)
    in_record = (
        records.astype(np.int64)[:, None] + np.array(offsets, np.int64)[None, :] + (record_tokens * row_bytes)[:, None]
    )
    in_view = view.address + np.array(rows, np.int64)[None, :] * row_stride + (view_tokens * token_stride)[:, None]
    plan = np.empty((*in_record.shape, 6), np.int64)
    target, source = (0, 1) if into_records else (1, 0)
    plan[..., target] = in_record
    plan[..., source] = in_view
    plan[..., 2] = counts[:, None]
    plan[..., 3] = row_bytes
    plan[..., 4 + target] = row_bytes
    plan[..., 4 + source] = token_stride
    return plan.reshape(-1, 6).astype(np.uint64)


def state_plan(
    layout: RecordLayout,
    layer: int,
    tensor_index: int,
    shard: Shard,
    view: ArrayView,
    record: int,
    *,
    into_records: bool,
) -> npt.NDArray[np.uint64]:
    """Plan for a tensor without a token axis and one record at an address."""
    row_bytes = layout.group.tensors[tensor_index].row_bytes
    target, source = (0, 1) if into_records else (1, 0)
    plan = []
    for run in runs_of(layout, layer, tensor_index, shard):
        row = [0, 0, run.rows, row_bytes, 0, 0]
        row[target] = record + run.offset
        row[source] = view.address + run.row * view.strides[0]
        row[4 + target] = row_bytes
        row[4 + source] = view.strides[0]
        plan.append(row)
    return np.array(plan, np.int64).reshape(-1, 6).astype(np.uint64)


def join_plans(plans: Sequence[npt.NDArray[np.uint64]]) -> npt.NDArray[np.uint64]:
    """Several plans as one."""
    return np.concatenate(plans) if plans else np.empty((0, 6), np.uint64)
