"""Which rows of a worker's tensor lie in which piece: the geometry of gather, scatter and resharding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from kvstore.record.layout import record_layout

if TYPE_CHECKING:
    from kvstore.record.layout import RecordLayout
    from kvstore.spec import CacheGroup, ModelSpec, Shard, UnitRange


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of one piece and where they lie in a worker's own tensor.

    Attributes:
        piece: piece id in the record.
        offset: bytes of the run's first row from the start of the record.
        row: the run's first row in the worker's tensor.
        rows: number of rows.
    """

    piece: int
    offset: int
    row: int
    rows: int


def local_rows(group: CacheGroup, tensor_index: int, shard: Shard) -> int:
    """Rows of a worker's own tensor: its units of each segment, in order."""
    segments = group.tensors[tensor_index].segments
    return sum(len(shard.units_of(segment)) * segment.unit_rows for segment in segments)


def runs_of(layout: RecordLayout, layer: int, tensor_index: int, shard: Shard) -> tuple[RowRun, ...]:
    """The pieces of one tensor of one layer that both the record and the worker hold."""
    return _runs(
        layout.spec, layout.group_index, layout.span.index, layout.units, layer, tensor_index, shard, layout.is_sparse
    )


@lru_cache(maxsize=65536)
def _runs(
    spec: ModelSpec,
    group_index: int,
    span_index: int,
    units: UnitRange,
    layer: int,
    tensor_index: int,
    shard: Shard,
    is_sparse: bool,
) -> tuple[RowRun, ...]:
    layout = record_layout(spec, group_index, span_index, units, is_sparse)
    tensor = layout.group.tensors[tensor_index]
    first_row: dict[tuple[int, int], int] = {}
    row = 0
    for number, segment in enumerate(tensor.segments):
        for unit in shard.units_of(segment):
            first_row[number, unit] = row
            row += segment.unit_rows
    runs = []
    for piece_id in layout.tensor_pieces(layer, tensor_index):
        piece = layout.pieces[piece_id]
        local = first_row.get((piece.segment, piece.unit))
        if local is not None:
            runs.append(RowRun(piece_id, piece.offset, local, piece.rows))
    return tuple(runs)
