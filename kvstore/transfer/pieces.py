"""Piece ids of one record as memory: contiguous ranges of bytes and of ids, layers."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from kvstore.record import RecordLayout

    Ids = npt.NDArray[np.int64]


@lru_cache(maxsize=1024)
def piece_layers(layout: RecordLayout) -> npt.NDArray[np.int64]:
    """Model layer of each piece."""
    return np.array([piece.layer for piece in layout.pieces], np.int64)


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
