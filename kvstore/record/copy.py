"""Copy plans between a worker's tensors and records: one native call moves all of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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

CHECKSUM_BYTES = 4


def check_array(
    array: Any, group: CacheGroup, tensor_index: int, shard: Shard, tokens: int, what: str, error: type[KVStoreError]
) -> ArrayView:
    """View a worker's tensor after checking type and shape.

    Raises:
        `error`: another type, or a shape that is not `[rows, tokens, *inner]` (or `[rows, *inner]`); the inner axes
            have gaps, or rows or tokens overlap.
    """
    tensor = group.tensors[tensor_index]
    view = view_array(array, tensor.dtype, what, error)
    expected = tensor.shape(local_rows(group, tensor_index, shard), tokens)
    if view.shape != expected:
        raise error(f"{what} has shape {list(view.shape)}, expected {list(expected)} ({_axes(tensor.has_tokens)})")
    if view.is_contiguous or 0 in view.shape:  # strides of an array without elements mean nothing
        return view
    outer = 2 if tensor.has_tokens else 1
    if not view.is_contiguous_from(outer):
        raise error(f"{what} has gaps in its inner axes, or another order of them; pass a contiguous tensor")
    steps = zip(view.shape[:outer], view.strides[:outer], strict=True)
    if any(size > 1 and stride < tensor.row_bytes for size, stride in steps):
        raise error(f"{what} repeats, overlaps or reverses its rows or tokens; pass a contiguous tensor")
    return view


def _axes(has_tokens: bool) -> str:
    return "[rows, tokens, *inner]" if has_tokens else "[rows, *inner]"


@dataclass(frozen=True)
class RowSteps:
    """The rows that a worker and a record share of one tensor of one layer, one by one. Arrays of shape [rows].

    Attributes:
        pieces: the piece that each lies in.
        offsets: bytes from the start of the record.
        rows: number in the worker's tensor.
        is_row_per_piece: no piece has several of them.
    """

    pieces: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    is_row_per_piece: bool


@lru_cache(maxsize=8192)
def row_steps(layout: RecordLayout, layer: int, tensor_index: int, shard: Shard) -> RowSteps:
    """The rows of one tensor with a token axis."""
    tensor = layout.group.tensors[tensor_index]
    runs = runs_of(layout, layer, tensor_index, shard)
    row_stride = layout.capacity_tokens * tensor.row_bytes
    steps = [(run.piece, run.offset + step * row_stride, run.row + step) for run in runs for step in range(run.rows)]
    pieces, offsets, rows = np.array(steps, np.int64).reshape(-1, 3).T
    return RowSteps(pieces, offsets, rows, len(steps) == len(runs))


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
    checksums: npt.NDArray[np.uint64] | None = None,
) -> npt.NDArray[np.uint64]:
    """Plan for a tensor with a token axis over many records of one class.

    Entries follow the source's addresses as far as they can: reading in order is what makes a large copy fast.

    Args:
        view: the worker's `[rows, tokens, *inner]`.
        records: address of each record.
        record_tokens: first token within each record.
        view_tokens: first token within the view, for each record.
        counts: tokens to copy, for each record.
        checksums: gather into the records (else scatter from them), in the form of `copy_rows_crc32c`: the address
            of each record's checksum column, or 0 where this copy does not fill its pieces.
    """
    steps = row_steps(layout, layer, tensor_index, shard)
    row_bytes = layout.group.tensors[tensor_index].row_bytes
    row_stride, token_stride = view.strides[0], view.strides[1]
    in_record = records.astype(np.int64)[:, None] + steps.offsets + (record_tokens * row_bytes)[:, None]
    in_view = view.address + steps.rows * row_stride + (view_tokens * token_stride)[:, None]
    if checksums is None:
        return _entries((in_view, in_record), counts[:, None], row_bytes, (token_stride, row_bytes)).reshape(-1, 6)
    stored = checksums.astype(np.int64)[:, None]
    places = np.where(stored, stored + CHECKSUM_BYTES * steps.pieces, 0)
    plan = _entries((in_record, in_view), counts[:, None], row_bytes, (row_bytes, token_stride), places)
    if row_stride > token_stride and steps.is_row_per_piece:
        # The rows of a piece stay together; where each is a piece, those of all records may follow one another.
        plan = plan.transpose(1, 0, 2)
    return np.ascontiguousarray(plan).reshape(-1, 7)


def state_plan(
    layout: RecordLayout,
    layer: int,
    tensor_index: int,
    shard: Shard,
    view: ArrayView,
    record: int,
    *,
    checksums: int | None = None,
) -> npt.NDArray[np.uint64]:
    """Plan for a tensor without a token axis and one record at an address. `checksums` as for `token_plan`."""
    row_bytes = layout.group.tensors[tensor_index].row_bytes
    runs = runs_of(layout, layer, tensor_index, shard)
    pieces, offsets, rows, counts = np.array(
        [(run.piece, run.offset, run.row, run.rows) for run in runs], np.int64
    ).reshape(-1, 4).T  # fmt: skip
    in_record = record + offsets
    in_view = view.address + rows * view.strides[0]
    if checksums is None:
        return _entries((in_view, in_record), counts, row_bytes, (view.strides[0], row_bytes))
    places = checksums + CHECKSUM_BYTES * pieces
    return _entries((in_record, in_view), counts, row_bytes, (row_bytes, view.strides[0]), places)


def _entries(
    addresses: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    rows: npt.NDArray[np.int64],
    row_bytes: int,
    strides: tuple[int, int],
    checksums: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.uint64]:
    """Entries of `copy_rows`, or with checksums of `copy_rows_crc32c`; destination first."""
    plan = np.empty((*addresses[0].shape, 6 if checksums is None else 7), np.int64)
    plan[..., 0], plan[..., 1] = addresses
    plan[..., 2] = rows
    plan[..., 3] = row_bytes
    plan[..., 4], plan[..., 5] = strides
    if checksums is not None:
        plan[..., 6] = checksums
    # Addresses of user space and sizes are far below 2^63: the bits are those of unsigned integers.
    return plan.view(np.uint64)


def join_plans(plans: Sequence[npt.NDArray[np.uint64]], columns: int) -> npt.NDArray[np.uint64]:
    """Several plans as one."""
    if len(plans) == 1:
        return plans[0]
    return np.concatenate(plans) if plans else np.empty((0, columns), np.uint64)


def plan_bytes(plan: npt.NDArray[np.uint64]) -> int:
    """How much a plan copies."""
    return int((plan[:, 2] * plan[:, 3]).sum())
