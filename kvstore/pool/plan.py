"""What a write provides: names of records, and the chunk boundaries that each was computed with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES
from kvstore.spec import UNKNOWN_GRID, ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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


class RecordDigests(Mapping["RecordName", bytes]):
    """Chunk grid digests of records by name, kept as the number of each one's digest.

    Attributes:
        names: the records.
        numbers: which of `digests` each has, in the order of `names`.
        digests: some may be equal, and some may not occur.
    """

    def __init__(self, names: RecordNames, numbers: npt.NDArray[np.integer], digests: Sequence[bytes]) -> None:
        self.names = names
        self.numbers = numbers
        self.digests = digests

    @cached_property
    def _by_name(self) -> dict[RecordName, bytes]:
        return {name: self.digests[number] for name, number in zip(self.names, self.numbers.tolist(), strict=True)}

    def __getitem__(self, name: RecordName) -> bytes:
        return self._by_name[name]

    def __iter__(self) -> Iterator[RecordName]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.names)

    def distinct(self) -> tuple[npt.NDArray[np.uint64], list[bytes]]:
        """The numbers and digests with each digest that occurs once."""
        known: dict[bytes, int] = {}
        renumbered = np.zeros(len(self.digests), np.uint64)
        for number in np.unique(self.numbers).tolist():
            renumbered[number] = known.setdefault(self.digests[number], len(known))
        return renumbered[self.numbers], list(known)


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
    if isinstance(grid_digests, RecordDigests) and grid_digests.names is names and len(names):
        table[:, 5], distinct = grid_digests.distinct()
        return table, b"".join(distinct)
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
