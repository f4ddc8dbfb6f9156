"""What a write provides: names of records, and the chunk boundaries that each was computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES
from kvstore.spec import UNKNOWN_GRID, ReuseRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvstore.pool.path import NodePath, RecordName
    from kvstore.pool.rows import RecordNames
    from kvstore.record import RecordLayout
    from kvstore.spec import ChunkGrid, ModelSpec


def grid_digest(spec: ModelSpec, path: NodePath, node: int, group: int, grid: ChunkGrid | None) -> bytes:
    """Digest of the chunk boundaries on which a record of this node and group depends."""
    if grid is None:
        return UNKNOWN_GRID
    end_tokens = path.end_tokens(node)
    if spec.groups[group].rule is ReuseRule.ATTENTION:
        closing = grid.closing(end_tokens)
        return UNKNOWN_GRID if closing is None else grid.digest_at(closing)
    return grid.digest_at(end_tokens)


def name_table(
    spec: ModelSpec,
    path: NodePath,
    names: RecordNames,
    grid: ChunkGrid | None,
    grid_digests: Mapping[RecordName, bytes] | None,
) -> tuple[npt.NDArray[np.uint64], bytes]:
    """Names with the number of the digest that each record carries, shape [n, 6], and the digests.

    Raises:
        SpecError: a state ends at no chunk boundary.
    """
    table = np.zeros((len(names), 6), np.uint64)
    table[:, :5] = names.table
    if grid_digests:
        known: dict[bytes, int] = {}
        table[:, 5] = [known.setdefault(grid_digests[name], len(known)) for name in names]
        return table, b"".join(known)
    if grid is None:
        return table, UNKNOWN_GRID
    nodes = table[:, 0].astype(np.int64)
    ends = (nodes + 1) * path.block_tokens
    ends[nodes >= len(path.keys)] = path.tokens
    closing = np.searchsorted(np.array(grid.boundaries, np.int64), ends)
    for row in np.flatnonzero(np.isin(table[:, 1], spec.state_groups)).tolist():
        grid.digest_at(int(ends[row]))
    # Number 0 is the unknown grid, 1 the digest at 0, and so on.
    table[:, 5] = np.where(closing < len(grid.boundaries), closing + 2, 0)
    return table, UNKNOWN_GRID + grid.packed[1]


def clear_padding(layout: RecordLayout, memory: memoryview) -> None:
    """Zero a record that will be filled in part: its padding is stored, sent and checksummed."""
    memory[layout.header_bytes : layout.record_bytes] = bytes(layout.body_bytes)


def place_table(grids: Mapping[tuple[int, int, int], bytes]) -> tuple[npt.NDArray[np.uint64], bytes]:
    """Places with the number of the digest that a record there must carry, shape [n, 4], and the digests."""
    known: dict[bytes, int] = {}
    rows = [(*place, known.setdefault(digest, len(known))) for place, digest in grids.items()]
    assert all(len(digest) == KEY_BYTES for digest in known)
    return np.array(rows, np.uint64).reshape(-1, 4), b"".join(known)
