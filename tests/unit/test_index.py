"""The prefix index: contiguity, ghosts, forgetting."""

from __future__ import annotations

import itertools

import pytest

from kvstore.abc import Slot
from kvstore.pool import LRUPolicy, NodePath, Prompt, RecordName
from kvstore.pool.index import PrefixIndex
from kvstore.pool.node import Entry, PrefixNode
from kvstore.record import RecordHeader, record_layout
from kvstore.spec import UNKNOWN_GRID, ModelSpec
from kvstore.spec.shard import UnitRange
from kvstore.testing.specs import dense, hybrid, pure_state

B = 4
_slots = itertools.count()


def entry(spec: ModelSpec, node: PrefixNode, group: int, units: UnitRange | None = None) -> Entry:
    layout = record_layout(spec, group, 0, units or spec.groups[group].all_units)
    parent = node.parent.key if node.parent else node.root.key
    header = RecordHeader(node.key, parent, node.end_tokens, 0, UNKNOWN_GRID)
    return Entry(layout, header, Slot(next(_slots), 0, layout.slot_bytes))


def path_of(spec: ModelSpec, *ids: int) -> NodePath:
    return Prompt.of(spec, ids).path


def fill(index: PrefixIndex, path: NodePath, states: tuple[int, ...] = (), *, has_attention: bool = True) -> None:
    """Commit a path's attention, and states at some of its nodes."""
    spec = index.spec
    nodes = index.ensure_path(path, b"")
    for number, node in enumerate(nodes):
        for group in spec.attention_groups if has_attention else ():
            index.add(node, group, 0, entry(spec, node, group))
            index.refresh_evictable(node, is_state=False)
        if number in states:
            for group in spec.state_groups:
                index.add(node, group, 0, entry(spec, node, group))
            index.refresh_evictable(node, is_state=True)
    index.release_path(nodes)
    index.check()


def evict(index: PrefixIndex, key: bytes, *, is_state: bool = False) -> list[tuple[bytes, bool]]:
    node = index.get(key)
    assert node is not None
    closure = index.closure(node.evictable(is_state=is_state))
    for member, of_state in closure:
        index.remove(member, is_state=of_state)
    index.check()
    return [(member.key, of_state) for member, of_state in closure]


def test_the_closure_lists_children_first_and_states_with_their_attention() -> None:
    index = PrefixIndex(hybrid(B), LRUPolicy())
    long, tail = path_of(index.spec, *range(12)), path_of(index.spec, *range(9))
    fill(index, long, (0, 2))
    fill(index, NodePath(tail.root, B, tail.keys, tail.tail_key, tail.tail_ids), (2,))
    order = evict(index, long.key(1))
    keys = [key for key, _ in order]
    assert set(keys) == {long.key(1), long.key(2), tail.key(2)}
    assert keys[-1] == long.key(1)
    assert (tail.key(2), True) in order
    assert (long.key(2), True) in order
    assert index.get(tail.key(2)) is None, "a tail leaves no ghost"
    first = index.get(long.key(0))
    assert first is not None
    assert first.states


def test_what_is_held_has_no_closure() -> None:
    index = PrefixIndex(hybrid(B), LRUPolicy())
    path = path_of(index.spec, *range(12))
    fill(index, path, (2,))
    nodes = [index.get(path.key(number)) for number in range(3)]
    for node in nodes[:2]:
        assert node is not None
        node.attention_holds += 1
    assert evict(index, path.key(0)) == []
    assert evict(index, path.key(1)) == []
    assert len(evict(index, path.key(2))) == 2


def test_records_of_other_units_are_found_together() -> None:
    index = PrefixIndex(dense(B), LRUPolicy())
    path = path_of(index.spec, *range(4))
    (node,) = index.ensure_path(path, b"")
    whole = RecordName(0, 0, 0, UnitRange(0, 2))
    left, right = entry(index.spec, node, 0, UnitRange(0, 1)), entry(index.spec, node, 0, UnitRange(1, 2))
    index.add(node, 0, 0, left)
    assert index.find(path, whole, None) is None
    assert index.find(path, RecordName(0, 0, 0, UnitRange(0, 1)), None) == [left]
    index.add(node, 0, 0, right)
    assert index.find(path, whole, None) == [left, right]
    assert index.find(path, whole, b"g" * 32) is None
    both = entry(index.spec, node, 0)
    index.add(node, 0, 0, both)
    assert index.find(path, whole, None) in ([both], [left, right])
    index.refresh_evictable(node, is_state=False)
    index.release_path([node])
    index.check()


def test_ghosts_stay_and_are_bounded() -> None:
    index = PrefixIndex(dense(B), LRUPolicy(), ghosts_max=5)
    path = path_of(index.spec, *range(12))
    fill(index, path)
    evict(index, path.key(0))
    assert (len(index), index.ghost_count) == (3, 3)
    assert not index._committed_bytes
    for seed in range(1, 10):
        other = path_of(index.spec, *range(100 * seed, 100 * seed + 12))
        fill(index, other)
        evict(index, other.key(0))
        assert len(index) == index.ghost_count <= 5
    assert index.drop_ghosts(99) == 5
    assert len(index) == 0
    assert not index._roots


def test_a_ghost_on_the_way_to_something_stays() -> None:
    """A model without attention has only ghosts above its states: they are no hints but the way there."""
    index = PrefixIndex(pure_state(B), LRUPolicy(), ghosts_max=3)
    paths = [path_of(index.spec, *range(100 * seed, 100 * seed + 20)) for seed in range(4)]
    for path in paths:
        fill(index, path, (4,), has_attention=False)
    assert index.ghost_count == 16
    for path in paths:
        assert all(index.get(path.key(number)) is not None for number in range(5))
    for path in paths:
        evict(index, path.key(4), is_state=True)
    assert index.ghost_count <= 3
    index.check()


def test_many_ghosts_on_the_way_cost_no_search() -> None:
    """Each retired node must not look at all others."""

    class Counting(dict):  # type: ignore[type-arg]
        looks = 0

        def get(self, *arguments: object) -> object:
            Counting.looks += 1
            return super().get(*arguments)

    index = PrefixIndex(pure_state(B), LRUPolicy(), ghosts_max=10)
    index._nodes = Counting()
    for seed in range(50):
        path = path_of(index.spec, *range(1000 * seed, 1000 * seed + 80))
        nodes = index.ensure_path(path, b"")
        index.add(nodes[-1], 0, 0, entry(index.spec, nodes[-1], 0))
        index.refresh_evictable(nodes[-1], is_state=True)
        index.release_path(nodes)
    assert Counting.looks < 50 * 20 * 10


def test_nodes_made_for_nothing_leave_no_ghosts() -> None:
    index = PrefixIndex(dense(B), LRUPolicy())
    short, long = path_of(index.spec, *range(4)), path_of(index.spec, *range(14))
    fill(index, short)
    made = index.count_missing(long)
    assert made == 3
    nodes = index.ensure_path(long, b"")
    index.release_path(nodes, made=made)
    assert (len(index), index.ghost_count) == (1, 0)
    index.check()


def test_a_forgotten_nodes_namesake_is_left_alone() -> None:
    index = PrefixIndex(dense(B), LRUPolicy())
    path = path_of(index.spec, 1, 2)
    fill(index, path)
    old = index.get(path.key(0))
    assert old is not None
    evict(index, path.key(0))
    fill(index, path)
    new = index.get(path.key(0))
    assert new is not old
    assert index.remove(old, is_state=False) == []
    index.check()
    assert index.get(path.key(0)) is new


def test_a_gap_is_noticed() -> None:
    """`check` must be able to fail."""
    index = PrefixIndex(dense(B), LRUPolicy())
    path = path_of(index.spec, *range(12))
    fill(index, path)
    middle = index.get(path.key(1))
    assert middle is not None
    index.remove(middle, is_state=False)
    with pytest.raises(AssertionError, match="contiguous"):
        index.check()
