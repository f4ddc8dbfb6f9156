"""What the index knows of one prefix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.abc import Evictable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvstore.abc import Slot
    from kvstore.pool.path import HandOver, RecordPlace
    from kvstore.record import RecordHeader, RecordLayout
    from kvstore.spec import UnitRange


@dataclass(frozen=True)
class Entry:
    """One committed record: what it holds and where it lies."""

    layout: RecordLayout
    header: RecordHeader
    slot: Slot

    @property
    def units(self) -> UnitRange:
        return self.layout.units


@dataclass(eq=False)
class Root:
    """Where chains of one (fingerprint, salt, adapter) begin.

    Attributes:
        key: the root's key.
        salt: the tenant, for accounting.
        children: nodes of the first block.
        tails: tail nodes of prompts shorter than a block.
    """

    key: bytes
    salt: bytes
    children: dict[bytes, PrefixNode] = field(default_factory=dict)
    tails: dict[bytes, PrefixNode] = field(default_factory=dict)


@dataclass(eq=False)
class PrefixNode:
    """A prefix that ends at a block boundary, or in a tail.

    Attributes:
        key: prefix key.
        parent: the node before; None directly below the root.
        root: the chain's beginning.
        end_tokens: length of the prefix.
        tail_ids: the tail's token ids; None for a node at a block boundary.
        children: nodes one block further.
        tails: tail nodes below this one.
        attention, states: committed records, by (group, span). Several may stand side by side: other shard
            units, or other chunk boundaries.
        attention_holds, state_holds: leases and writers that rely on them.
        pending: running writers that will make this a resume point.
        reserved: running writers that rely on the node being there.
        had_states: states were here once; tells "evicted" from "never stored".
        handovers: what decode processes are to pick up here, oldest first, with the chunk grid digests of the records
            that each consists of.
        is_transient: a tail that exists for a hand-over only.
    """

    key: bytes
    parent: PrefixNode | None
    root: Root
    end_tokens: int
    tail_ids: tuple[int, ...] | None = None
    children: dict[bytes, PrefixNode] = field(default_factory=dict)
    tails: dict[bytes, PrefixNode] = field(default_factory=dict)
    attention: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    states: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    attention_holds: int = 0
    state_holds: int = 0
    pending: int = 0
    reserved: int = 0
    had_states: bool = False
    handovers: list[tuple[HandOver, Mapping[RecordPlace, bytes]]] = field(default_factory=list)
    is_transient: bool = False

    @property
    def handover(self) -> HandOver | None:
        """The hand-over that will be taken next."""
        return self.handovers[0][0] if self.handovers else None

    @property
    def is_tail(self) -> bool:
        return self.tail_ids is not None

    @property
    def is_ghost(self) -> bool:
        """No records, and nobody about to write any."""
        return not (self.attention or self.states or self.reserved)

    @property
    def is_leaf(self) -> bool:
        return not (self.children or self.tails)

    def below(self) -> Iterator[PrefixNode]:
        """Every node below this one, children before their parents."""
        stack = [(node, False) for node in (*self.children.values(), *self.tails.values())]
        while stack:
            node, is_expanded = stack.pop()
            if is_expanded or node.is_leaf:
                yield node
            else:
                stack.append((node, True))
                stack.extend((child, False) for child in (*node.children.values(), *node.tails.values()))

    def evictable(self, *, is_state: bool) -> Evictable:
        records = self.states if is_state else self.attention
        size_bytes = sum(entry.slot.size_bytes for entries in records.values() for entry in entries)
        return Evictable(self.key, is_state, size_bytes, self.end_tokens)
