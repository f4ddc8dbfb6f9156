"""The prefix index: which records are there, for which prefix (docs/architecture.md, "Index").

Not thread-safe: the pool calls it under its lock.

Invariant: attention presence is contiguous from the root. A node that has attention records has a parent
that has them (or is the first of its chain), for the same units; evicting a node's attention takes along
everything below it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvstore.limits import GHOSTS_MAX
from kvstore.pool.node import Entry, PrefixNode, Root
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.abc import Evictable, EvictionPolicy
    from kvstore.pool.path import NodePath, RecordName
    from kvstore.spec import ModelSpec, UnitRange

NODE_BYTES = 1300
"""Python memory of one node with its dictionaries, counted against the budget."""
ENTRY_BYTES = 900
"""Python memory of one entry with its header and slot."""


class PrefixIndex:
    """Nodes by prefix key; keys are unique over all chains, since each covers its whole prefix."""

    def __init__(self, spec: ModelSpec, policy: EvictionPolicy, ghosts_max: int = GHOSTS_MAX) -> None:
        self.spec = spec
        self._policy = policy
        self._ghosts_max = ghosts_max
        self._nodes: dict[bytes, PrefixNode] = {}
        self._tops: dict[bytes, dict[bytes, PrefixNode]] = {}
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._evictables: dict[tuple[bytes, bool], Evictable] = {}
        self._entries = 0
        self._committed_bytes = 0
        self._bytes_by_salt: dict[bytes, int] = {}

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of the index itself."""
        return len(self._nodes) * NODE_BYTES + self._entries * ENTRY_BYTES

    @property
    def committed_bytes(self) -> int:
        """Slot bytes of all committed records."""
        return self._committed_bytes

    @property
    def bytes_by_salt(self) -> dict[bytes, int]:
        """Committed slot bytes of each salt that has any."""
        return {salt: size for salt, size in self._bytes_by_salt.items() if size}

    @property
    def ghost_count(self) -> int:
        return len(self._ghosts)

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[PrefixNode]:
        return iter(self._nodes.values())

    def get(self, key: bytes) -> PrefixNode | None:
        return self._nodes.get(key)

    def siblings(self, path: NodePath, nodes: int) -> tuple[dict[bytes, PrefixNode], dict[bytes, PrefixNode]]:
        """Children and tails of the path's prefix of `nodes` whole blocks (0: of the root)."""
        if nodes == 0:
            top = self._tops.get(path.root, {})
            whole = {key: node for key, node in top.items() if not node.is_tail}
            return whole, {key: node for key, node in top.items() if node.is_tail}
        parent = self._nodes.get(path.keys[nodes - 1])
        return (parent.children, parent.tails) if parent is not None else ({}, {})

    def find(self, path: NodePath, name: RecordName, grid: bytes | None) -> Entry | None:
        """The committed record of a name whose units cover it; under `grid` only one computed so."""
        node = self._nodes.get(path.key(name.node))
        if node is None:
            return None
        records = node.attention if self._is_attention(name.group) else node.states
        for entry in records.get((name.group, name.span), ()):
            if entry.units.covers(name.units) and (grid is None or entry.header.grid == grid):
                return entry
        return None

    def _is_attention(self, group: int) -> bool:
        return self.spec.groups[group].rule is ReuseRule.ATTENTION

    def ensure_path(self, path: NodePath, salt: bytes) -> list[PrefixNode]:
        """The path's nodes, made where they are missing, each marked as relied upon."""
        root = Root(path.root, salt)
        nodes: list[PrefixNode] = []
        parent: PrefixNode | None = None
        for number in range(len(path)):
            key = path.key(number)
            node = self._nodes.get(key)
            if node is None:
                tail_ids = path.tail_ids if path.is_tail(number) else None
                node = PrefixNode(key, parent, root, path.end_tokens(number), tail_ids)
                self._nodes[key] = node
                self._siblings_of(node)[key] = node
            node.reserved += 1
            self._ghosts.pop(key, None)
            nodes.append(node)
            parent = node
        return nodes

    def _siblings_of(self, node: PrefixNode) -> dict[bytes, PrefixNode]:
        if node.parent is None:
            return self._tops.setdefault(node.root.key, {})
        return node.parent.tails if node.is_tail else node.parent.children

    def release_path(self, nodes: list[PrefixNode]) -> None:
        """A writer no longer relies on these nodes; those without records become ghosts."""
        for node in reversed(nodes):
            node.reserved -= 1
            self._retire(node)

    def add(self, node: PrefixNode, group: int, span: int, entry: Entry) -> None:
        """A committed record appears."""
        records = node.attention if self._is_attention(group) else node.states
        records.setdefault((group, span), []).append(entry)
        if not self._is_attention(group):
            node.had_states = True
        self._entries += 1
        self._account(node, entry.slot.size_bytes)
        self._ghosts.pop(node.key, None)

    def _account(self, node: PrefixNode, size_bytes: int) -> None:
        self._committed_bytes += size_bytes
        salt = node.root.salt
        self._bytes_by_salt[salt] = self._bytes_by_salt.get(salt, 0) + size_bytes

    def refresh_evictable(self, node: PrefixNode, *, is_state: bool) -> None:
        """Tell the policy what the node holds now."""
        name = (node.key, is_state)
        known = self._evictables.pop(name, None)
        if known is not None:
            self._policy.remove(known)
        if node.states if is_state else node.attention:
            item = node.evictable(is_state=is_state)
            self._evictables[name] = item
            self._policy.insert(item)

    def touch(self, nodes: list[PrefixNode]) -> None:
        """A hit used these nodes, root first: the last one's states, and the attention of all."""
        if nodes and (item := self._evictables.get((nodes[-1].key, True))) is not None:
            self._policy.access(item)
        for node in reversed(nodes):
            if (item := self._evictables.get((node.key, False))) is not None:
                self._policy.access(item)

    def ranked(self) -> Iterator[Evictable]:
        """What the policy would evict, first victim first."""
        return self._policy.ranked()

    def closure(self, item: Evictable) -> list[tuple[PrefixNode, bool]]:
        """(node, is_state) of everything that goes when `item` goes; empty if something of it is held."""
        node = self._nodes[item.key]
        if item.is_state:
            return [] if node.state_holds else [(node, True)]
        closure = [(member, is_state) for member in (*node.below(), node) for is_state in (True, False)]
        for member, is_state in closure:
            if member.state_holds if is_state else member.attention_holds:
                return []
        return [(member, is_state) for member, is_state in closure if (member.states if is_state else member.attention)]

    def remove(self, node: PrefixNode, *, is_state: bool) -> list[Entry]:
        """Forget a node's states or its attention; the caller frees the slots.

        Whoever removes attention removes everything below first (`closure` lists it in that order).
        """
        records = node.states if is_state else node.attention
        removed = [entry for entries in records.values() for entry in entries]
        records.clear()
        self._entries -= len(removed)
        for entry in removed:
            self._account(node, -entry.slot.size_bytes)
        self.refresh_evictable(node, is_state=is_state)
        if is_state:
            node.handover = None
        self._retire(node)
        return removed

    def _retire(self, node: PrefixNode) -> None:
        """Make a node without records a ghost; forget the oldest ghosts beyond the limit."""
        if not node.is_ghost or node.key not in self._nodes:
            return
        if node.is_tail:
            self._forget(node)
            return
        self._ghosts[node.key] = None
        self.drop_ghosts(len(self._ghosts) - self._ghosts_max)

    def drop_ghosts(self, count: int) -> int:
        """Forget up to `count` of the oldest ghosts that nothing hangs on; how many went."""
        dropped = 0
        for _ in range(len(self._ghosts)):
            if dropped >= count:
                break
            key, _unused = self._ghosts.popitem(last=False)
            node = self._nodes[key]
            if node.is_leaf:
                self._forget(node)
                dropped += 1
            else:
                self._ghosts[key] = None
        return dropped

    def _forget(self, node: PrefixNode) -> None:
        del self._nodes[node.key]
        self._ghosts.pop(node.key, None)
        siblings = self._siblings_of(node)
        siblings.pop(node.key, None)
        if node.parent is None and not siblings:
            self._tops.pop(node.root.key, None)

    def check(self) -> None:
        """Assert every invariant; for tests and debug builds (it walks the whole index)."""
        entries = 0
        committed = 0
        for node in self._nodes.values():
            assert node.attention_holds >= 0 and node.state_holds >= 0 and node.reserved >= 0 and node.pending >= 0
            assert self._siblings_of(node).get(node.key) is node
            assert node.parent is None or self._nodes.get(node.parent.key) is node.parent
            assert (node.key in self._ghosts) == (node.is_ghost and not node.is_tail)
            if node.parent is not None:
                for name, records in node.attention.items():
                    above = [entry.units for entry in node.parent.attention.get(name, ())]
                    for entry in records:
                        assert _units_within(entry.units, above), "attention is not contiguous from the root"
            for is_state, table in ((False, node.attention), (True, node.states)):
                assert ((node.key, is_state) in self._evictables) == bool(table)
                for listed in table.values():
                    entries += len(listed)
                    committed += sum(entry.slot.size_bytes for entry in listed)
                    assert listed, "an empty list of records stayed behind"
        assert entries == self._entries
        assert committed == self._committed_bytes == sum(self._bytes_by_salt.values())


def _units_within(units: UnitRange, ranges: list[UnitRange]) -> bool:
    return all(any(unit in held for held in ranges) for unit in range(units.start, units.stop))
