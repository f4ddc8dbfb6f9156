"""Blocks that appeared in an index or left it in one step, packed: thousands of them cost one array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from kvstore.events.why import RemovedWhy

KEY_BYTES = 32
IS_ADDED, IS_STATE, END_TOKENS, SIZE_BYTES, SALT = range(5)
"""Columns of a table of changes."""


@dataclass(frozen=True)
class Block:
    """What a node of the index has of one kind.

    Attributes:
        key: prefix key of the node (docs/keys.md).
        parent: that of the node before; the root key for the first.
        end_tokens: length of the prefix.
        is_state: the states at exactly this length, rather than the attention of its last block.
        size_bytes: of the records, headers included.
    """

    key: bytes
    parent: bytes
    end_tokens: int
    is_state: bool
    size_bytes: int


@dataclass(frozen=True)
class Changes:
    """Blocks of one salt that appeared, or that left for one reason. Nothing is unpacked before it is looked at.

    Attributes:
        salt: whose they are.
        why: why they left; None for those that appeared.
        packed_keys, packed_parents: 32 bytes for each.
        table: `[blocks, 5]`: is added, is state, end tokens, bytes, number of the salt.
    """

    salt: bytes
    why: RemovedWhy | None
    packed_keys: bytes
    packed_parents: bytes
    table: npt.NDArray[np.uint64] = field(compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def keys(self) -> tuple[bytes, ...]:
        """Prefix key of each; one that appears twice names the attention and the states of its node."""
        return tuple(_cut(self.packed_keys))

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        rows = zip(self.keys, _cut(self.packed_parents), self.table.tolist(), strict=True)
        return tuple(
            Block(key, parent, row[END_TOKENS], bool(row[IS_STATE]), row[SIZE_BYTES]) for key, parent, row in rows
        )

    @property
    def size_bytes(self) -> int:
        return int(self.table[:, SIZE_BYTES].sum())

    def parts(self, blocks_max: int) -> Iterator[Changes]:
        """The same in pieces of so many blocks at most, in order."""
        if len(self) <= blocks_max:
            yield self
            return
        for start in range(0, len(self), blocks_max):
            stop = min(start + blocks_max, len(self))
            keys, parents = (
                packed[start * KEY_BYTES : stop * KEY_BYTES] for packed in (self.packed_keys, self.packed_parents)
            )
            yield Changes(self.salt, self.why, keys, parents, self.table[start:stop])


Tell: TypeAlias = Callable[[str, Changes], bool]
"""Told of each change of a tier, by its name, under the lock that orders them: it must not wait. False: no more."""


def _cut(packed: bytes) -> Iterator[bytes]:
    return (packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES))


def unpacked(taken: tuple[bytes, bytes, npt.NDArray[np.uint64], list[bytes]], why: RemovedWhy | None) -> list[Changes]:
    """What the native index noted, by salt: what appeared first, then what left, each in order.

    Args:
        taken: as `kvstore._native.PrefixIndex.take_changes` gives it.
        why: for what left.
    """
    keys, parents, table, salts = taken
    if not len(table):
        return []
    groups = table[:, SALT] * 2 + (1 - table[:, IS_ADDED])
    if (groups == groups[0]).all():
        return [Changes(salts[0], None if table[0, IS_ADDED] else why, keys, parents, table)]
    packed: list[Any] = [np.frombuffer(each, np.uint8).reshape(-1, KEY_BYTES) for each in (keys, parents)]
    found = []
    for group in np.unique(groups).tolist():
        chosen = groups == group
        own_keys, own_parents = (each[chosen].tobytes() for each in packed)
        found.append(Changes(salts[group // 2], why if group % 2 else None, own_keys, own_parents, table[chosen]))
    return found


def in_order(taken: tuple[bytes, bytes, npt.NDArray[np.uint64], list[bytes]]) -> list[Changes]:
    """What an index holds, parents before their children."""
    keys, parents, table, salts = taken
    order = np.argsort(table[:, END_TOKENS], kind="stable")
    sorted_keys, sorted_parents = (
        np.frombuffer(each, np.uint8).reshape(-1, KEY_BYTES)[order].tobytes() for each in (keys, parents)
    )
    return unpacked((sorted_keys, sorted_parents, table[order], salts), None)
