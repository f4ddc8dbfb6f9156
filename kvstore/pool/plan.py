"""What a write has to reserve: pure functions over the index. The pool holds its lock."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvstore.errors import WriteError
from kvstore.pool.path import RecordName
from kvstore.pool.search import attention_grid
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import UNKNOWN_GRID, ReuseRule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.node import Entry
    from kvstore.pool.path import NodePath
    from kvstore.record import RecordLayout
    from kvstore.spec import ChunkGrid, ModelSpec


@dataclass(frozen=True)
class Reservation:
    """A record that is missing: its name, its metadata but for the cost, and where its pieces go."""

    name: RecordName
    header: RecordHeader
    layout: RecordLayout


@dataclass(frozen=True)
class WritePlan:
    """What to reserve, and what is there already."""

    reservations: tuple[Reservation, ...]
    held: tuple[tuple[RecordName, Entry], ...]

    @property
    def slot_sizes(self) -> list[int]:
        return [item.layout.slot_bytes for item in self.reservations]


def grid_digest(spec: ModelSpec, path: NodePath, node: int, group: int, grid: ChunkGrid | None) -> bytes:
    """Digest of the chunk boundaries on which a record of this node and group depends."""
    if grid is None:
        return UNKNOWN_GRID
    end_tokens = path.end_tokens(node)
    if spec.groups[group].rule is ReuseRule.ATTENTION:
        return attention_grid(grid, end_tokens) or UNKNOWN_GRID
    return grid.digest_at(end_tokens)


def find_records(index: PrefixIndex, path: NodePath, name: RecordName, digest: bytes) -> list[Entry] | None:
    """Committed records that cover a name. A writer that does not know its grid takes any."""
    return index.find(path, name, None if digest == UNKNOWN_GRID else digest)


def plan_write(
    index: PrefixIndex, path: NodePath, names: Sequence[RecordName], digest_of: Callable[[RecordName], bytes]
) -> WritePlan:
    """Sort the records that a writer provides into missing ones and those that are there.

    Raises:
        WriteError: attention records would not be contiguous from the root.
    """
    spec = index.spec
    reservations: list[Reservation] = []
    held: list[tuple[RecordName, Entry]] = []
    for name in names:
        digest = digest_of(name)
        entries = find_records(index, path, name, digest)
        if entries is None:
            layout = record_layout(spec, name.group, name.span, name.units)
            reservations.append(Reservation(name, _header(spec, path, name, digest), layout))
        else:
            held.extend((replace(name, units=entry.units), entry) for entry in entries)
    _check_contiguous(index, path, names)
    return WritePlan(tuple(reservations), tuple(held))


def _header(spec: ModelSpec, path: NodePath, name: RecordName, digest: bytes) -> RecordHeader:
    end_tokens = path.end_tokens(name.node)
    return RecordHeader(
        key=path.key(name.node),
        parent=path.parent(name.node),
        end_tokens=end_tokens,
        valid_tokens=spec.groups[name.group].valid_tokens(spec.block_tokens, end_tokens),
        grid=digest,
    )


def _check_contiguous(index: PrefixIndex, path: NodePath, names: Sequence[RecordName]) -> None:
    named = set(names)
    for name in names:
        if name.node == 0 or index.spec.groups[name.group].rule is not ReuseRule.ATTENTION:
            continue
        above = RecordName(name.node - 1, name.group, name.span, name.units)
        if above not in named and index.find(path, above, None) is None:
            raise WriteError(
                f"attention up to {path.end_tokens(name.node)} tokens cannot be written: the block before it is "
                "neither stored nor part of this write; write from the resume point that was matched"
            )


def clear_padding(layout: RecordLayout, memory: memoryview, valid_tokens: int) -> None:
    """Zero a record that will be filled in part: its padding is stored, sent and checksummed."""
    if layout.capacity_tokens and valid_tokens < layout.capacity_tokens:
        memory[layout.header_bytes : layout.record_bytes] = bytes(layout.body_bytes)
