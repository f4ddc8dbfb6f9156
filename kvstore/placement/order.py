"""In which order the records of a resume point are loaded, and how many of them each layer waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.limits import LOAD_BATCH_BYTES
from kvstore.pool.rows import GROUP, NODE, SPAN

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.pool.rows import Rows
    from kvstore.spec import ModelSpec


@dataclass(frozen=True)
class LoadOrder:
    """Records in the order in which a model needs them: by their first layer, then along the path.

    Attributes:
        rows: numbers of the rows, in that order.
        count_by_layer: how many of them must be there before a layer can be read; a layer that is not named needs none.
        batch_ends: after how many of them what has come is verified: at each change of span, or earlier if a span is
            large.
    """

    rows: npt.NDArray[np.int64]
    count_by_layer: dict[int, int]
    batch_ends: list[int]

    @classmethod
    def of(cls, spec: ModelSpec, rows: Rows) -> LoadOrder:
        """Of records of a path."""
        position_by_layer = {layer: position for position, layer in enumerate(spec.layers)}
        groups, spans = rows.table[:, GROUP].astype(np.int64), rows.table[:, SPAN].astype(np.int64)
        first_layers = np.zeros(len(rows), np.int64)
        for group, span in np.unique(np.stack((groups, spans), axis=1), axis=0).tolist():
            needed = min(position_by_layer[layer] for layer in spec.spans[group][span].layers)
            first_layers[(groups == group) & (spans == span)] = needed
        order = np.lexsort((rows.table[:, NODE].astype(np.int64), spans, groups, first_layers))
        groups, spans = groups[order], spans[order]
        is_last = np.ones(len(order), np.bool_)
        is_last[:-1] = (groups[1:] != groups[:-1]) | (spans[1:] != spans[:-1])
        count_by_layer: dict[int, int] = {}
        for end in np.flatnonzero(is_last).tolist():
            for layer in spec.spans[int(groups[end])][int(spans[end])].layers:
                count_by_layer[layer] = end + 1
        sizes = np.array(rows.slot_sizes, np.int64)[order]
        return cls(order, count_by_layer, _batch_ends(sizes, is_last))


def _batch_ends(sizes: npt.NDArray[np.int64], is_last: npt.NDArray[np.bool_]) -> list[int]:
    ends: list[int] = []
    batch_bytes = 0
    for number, (size_bytes, is_end) in enumerate(zip(sizes.tolist(), is_last.tolist(), strict=True), start=1):
        batch_bytes += size_bytes
        if is_end or batch_bytes >= LOAD_BATCH_BYTES:
            ends.append(number)
            batch_bytes = 0
    return ends
