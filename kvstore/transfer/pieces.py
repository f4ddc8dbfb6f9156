"""Piece ids of one record as memory: contiguous ranges of bytes and of ids, layers."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import PieceLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvstore.record import RecordLayout
    from kvstore.transfer.messages import Rows

    Ids = npt.NDArray[np.int64]


@lru_cache(maxsize=1024)
def piece_layers(layout: RecordLayout) -> npt.NDArray[np.int64]:
    """Model layer of each piece."""
    return np.array([piece.layer for piece in layout.pieces], np.int64)


@lru_cache(maxsize=1024)
def pieces_bytes(layout: RecordLayout) -> int:
    """Bytes of all pieces of a record."""
    return int(layout.piece_sizes.sum())


@lru_cache(maxsize=1024)
def piece_layout(layout: RecordLayout) -> PieceLayout:
    """Where the pieces lie, for native code."""
    offsets, sizes = layout.piece_offsets.astype(np.uint64), layout.piece_sizes.astype(np.uint32)
    return PieceLayout(offsets, sizes, layout.checksum_offset)


def contiguous_runs(layout: RecordLayout, ids: Ids) -> Iterator[tuple[int, int]]:
    """(start, stop) byte ranges of a record that hold these pieces, in this order, neighbours joined."""
    starts = layout.piece_offsets[ids]
    stops = starts + layout.piece_sizes[ids]
    breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
    firsts = np.concatenate(([0], breaks))
    lasts = np.concatenate((breaks, [len(ids)])) - 1
    yield from zip(starts[firsts].tolist(), stops[lasts].tolist(), strict=True)


def id_ranges(ids: Ids) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of consecutive ids; `ids` ascend."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    for run in np.split(ids, breaks):
        if len(run):
            yield int(run[0]), len(run)


def observe_layers(
    callback: Callable[[int, int, float, float], None], layout: RecordLayout, ids: Ids, start_s: float, end_s: float
) -> None:
    """Tell an observer, once per layer, how many bytes of it these pieces are."""
    layers = piece_layers(layout)[ids]
    sizes = layout.piece_sizes[ids]
    for layer in np.unique(layers).tolist():
        callback(layer, int(sizes[layers == layer].sum()), start_s, end_s)


def split_rows(rows: Rows) -> list[tuple[int, Ids]]:
    """(record, piece ids) of each run of rows of one record."""
    if not len(rows):
        return []
    records = rows["record"]
    edges = [0, *(np.flatnonzero(np.diff(records.astype(np.int64))) + 1).tolist(), len(rows)]
    return [(int(records[start]), rows["piece"][start:stop].astype(np.int64)) for start, stop in pairwise(edges)]
