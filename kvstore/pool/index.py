"""The prefix index: which records are there, for which prefix (docs/architecture.md, "Index").

Not thread-safe: the pool calls it under its lock.

Invariant: attention presence is contiguous from the root. A node that has attention records has a parent
that has them (or is the first of its chain), for the same units; evicting a node's attention takes along
everything below it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kvstore.errors import WriteError
from kvstore.limits import GHOSTS_MAX
from kvstore.pool.node import Entry, PrefixNode, Root
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvstore.abc import Evictable, EvictionPolicy
    from kvstore.pool.path import HandOver, NodePath, RecordName, RecordPlace
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
        self._roots: dict[bytes, Root] = {}
        self._ghosts: set[bytes] = set()
        # The ghosts that nothing hangs on, in the order in which they became so: only these can be forgotten.
        self._idle_ghosts: OrderedDict[bytes, None] = OrderedDict()
        self._evictables: dict[tuple[bytes, bool], Evictable] = {}
        self._entries = 0
        self._committed_bytes = 0
        self._bytes_by_salt: dict[bytes, int] = {}
        self._payload_bytes = 0

    @property
    def memory_bytes(self) -> int:
        """Memory of the index itself (estimated), and of the hand-over payloads that wait in it."""
        return len(self._nodes) * NODE_BYTES + self._entries * ENTRY_BYTES + self._payload_bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of waiting hand-over payloads."""
        return self._payload_bytes

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

    def root_tails(self, key: bytes) -> dict[bytes, PrefixNode]:
        """Tail nodes directly below a root: prompts shorter than a block."""
        root = self._roots.get(key)
        return root.tails if root is not None else {}

    def find(self, path: NodePath, name: RecordName, grid: bytes | None) -> list[Entry] | None:
        """The committed records that hold a name's units, one if one does; under `grid` only those computed so.

        Several are found where workers of another number wrote their shares.
        """
        node = self._nodes.get(path.key(name.node))
        if node is None:
            return None
        records = node.attention if self._is_attention(name.group) else node.states
        found: list[Entry] = []
        lacking = set(range(name.units.start, name.units.stop))
        for entry in records.get((name.group, name.span), ()):
            if grid is not None and entry.header.grid != grid:
                continue
            if entry.units.covers(name.units):
                return [entry]
            held = lacking.intersection(range(entry.units.start, entry.units.stop))
            if held:
                found.append(entry)
                lacking -= held
        return None if lacking else found

    def _is_attention(self, group: int) -> bool:
        return self.spec.groups[group].rule is ReuseRule.ATTENTION

    def count_missing(self, path: NodePath) -> int:
        """Nodes of the path that `ensure_path` would make."""
        return sum(path.key(number) not in self._nodes for number in range(len(path)))

    def ensure_path(self, path: NodePath, salt: bytes) -> list[PrefixNode]:
        """The path's nodes, made where they are missing, each marked as relied upon."""
        self._check_path(path)
        root = self._roots.setdefault(path.root, Root(path.root, salt))
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
            self._ghosts.discard(key)
            self._idle_ghosts.pop(key, None)
            nodes.append(node)
            parent = node
        return nodes

    def _check_path(self, path: NodePath) -> None:
        """A key names one prefix: a path that puts it elsewhere was not made by hashing tokens.

        Raises:
            WriteError: a key stands twice, or at another length, parent or root than it is known at.
        """
        keys = [path.key(number) for number in range(len(path))]
        known = [self._nodes.get(key) for key in keys]
        wrong = len(set(keys)) != len(keys) or any(
            node is not None
            and (
                node.end_tokens != path.end_tokens(number)
                or node.root.key != path.root
                or (node.parent.key if node.parent else path.root) != path.parent(number)
                or (node.tail_ids or ()) != (path.tail_ids if path.is_tail(number) else ())
            )
            for number, node in enumerate(known)
        )
        if wrong:
            raise WriteError("a prefix key of this path names another prefix; compute the keys as docs/keys.md says")

    def _siblings_of(self, node: PrefixNode) -> dict[bytes, PrefixNode]:
        owner = node.parent or node.root
        return owner.tails if node.is_tail else owner.children

    def release_path(self, nodes: list[PrefixNode], *, made: int = 0) -> None:
        """A writer no longer relies on these nodes; those without records become ghosts.

        Args:
            made: that many of the last nodes were made for nothing: they leave no ghosts.
        """
        for number in range(len(nodes) - 1, -1, -1):
            node = nodes[number]
            node.reserved -= 1
            if number >= len(nodes) - made and node.is_ghost and node.is_leaf:
                self._forget(node)
            else:
                self._retire(node)

    def add(self, node: PrefixNode, group: int, span: int, entry: Entry) -> None:
        """A committed record appears."""
        records = node.attention if self._is_attention(group) else node.states
        records.setdefault((group, span), []).append(entry)
        if not self._is_attention(group):
            node.had_states = True
        self._entries += 1
        self._account(node, entry.slot.size_bytes)

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
        if node.state_holds if item.is_state else node.attention_holds:
            return []  # who holds something below a node holds the node too, so most searches end here
        if item.is_state:
            return [(node, True)]
        closure = [(member, is_state) for member in (*node.below(), node) for is_state in (True, False)]
        for member, is_state in closure:
            if member.state_holds if is_state else member.attention_holds:
                return []
        return [(member, is_state) for member, is_state in closure if (member.states if is_state else member.attention)]

    def remove(self, node: PrefixNode, *, is_state: bool) -> list[Entry]:
        """Forget a node's states or its attention; the caller frees the slots.

        Whoever removes attention removes everything below first (`closure` lists it in that order).
        """
        if self._nodes.get(node.key) is not node:
            return []  # forgotten since, and perhaps made anew
        records = node.states if is_state else node.attention
        removed = [entry for entries in records.values() for entry in entries]
        records.clear()
        self._entries -= len(removed)
        for entry in removed:
            self._account(node, -entry.slot.size_bytes)
        self.refresh_evictable(node, is_state=is_state)
        while self.take_handover(node) is not None:
            pass
        self._retire(node)
        return removed

    def add_handover(self, node: PrefixNode, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        """Another hand-over waits at a node; all go with the first of the node's records."""
        node.handovers.append((handover, grids))
        self._payload_bytes += len(handover.payload)

    def take_handover(self, node: PrefixNode) -> tuple[HandOver, Mapping[RecordPlace, bytes]] | None:
        """The oldest hand-over that waits at a node, which it leaves."""
        if not node.handovers:
            return None
        handover, grids = node.handovers.pop(0)
        self._payload_bytes -= len(handover.payload)
        return handover, grids

    def _retire(self, node: PrefixNode) -> None:
        """Make a node without records a ghost; forget old ghosts beyond the limit."""
        if not node.is_ghost or self._nodes.get(node.key) is not node:
            return
        if node.is_tail:
            self._forget(node)
            return
        self._ghosts.add(node.key)
        if node.is_leaf:
            self._idle_ghosts[node.key] = None
        self.drop_ghosts(len(self._ghosts) - self._ghosts_max)

    def drop_ghosts(self, count: int) -> int:
        """Forget up to `count` ghosts that nothing hangs on, old ones first; how many went."""
        dropped = 0
        while dropped < count and self._idle_ghosts:
            key, _ = self._idle_ghosts.popitem(last=False)
            self._forget(self._nodes[key])
            dropped += 1
        return dropped

    def _forget(self, node: PrefixNode) -> None:
        del self._nodes[node.key]
        self._ghosts.discard(node.key)
        self._idle_ghosts.pop(node.key, None)
        self._siblings_of(node).pop(node.key)
        if node.parent is not None:
            if node.parent.is_leaf and node.parent.key in self._ghosts:
                self._idle_ghosts[node.parent.key] = None
        elif not (node.root.children or node.root.tails):
            self._roots.pop(node.root.key, None)

    def check(self) -> None:
        """Assert every invariant; for tests and debug builds (it walks the whole index)."""
        entries = 0
        committed = 0
        payload = 0
        for node in self._nodes.values():
            assert min(node.attention_holds, node.state_holds, node.reserved, node.pending) >= 0
            assert self._siblings_of(node).get(node.key) is node
            assert node.parent is None or self._nodes.get(node.parent.key) is node.parent
            assert (node.key in self._ghosts) == (node.is_ghost and not node.is_tail)
            assert (node.key in self._idle_ghosts) == (node.key in self._ghosts and node.is_leaf)
            assert not (node.is_ghost and (node.is_tail or node.handover)), "a tail or a hand-over outlived its records"
            payload += sum(len(handover.payload) for handover, _ in node.handovers)
            if node.parent is not None:
                for name, records in node.attention.items():
                    above = [entry.units for entry in node.parent.attention.get(name, ())]
                    for entry in records:
                        assert units_within(entry.units, above), "attention is not contiguous from the root"
            for is_state, table in ((False, node.attention), (True, node.states)):
                assert ((node.key, is_state) in self._evictables) == bool(table)
                for listed in table.values():
                    entries += len(listed)
                    committed += sum(entry.slot.size_bytes for entry in listed)
                    assert listed, "an empty list of records stayed behind"
                    assert all(entry.header.key == node.key for entry in listed)
        assert entries == self._entries
        assert payload == self._payload_bytes
        assert committed == self._committed_bytes == sum(self._bytes_by_salt.values())


def units_within(units: UnitRange, ranges: list[UnitRange]) -> bool:
    """Whether ranges together hold every unit."""
    if any(held.covers(units) for held in ranges):
        return True
    return all(any(unit in held for held in ranges) for unit in range(units.start, units.stop))
