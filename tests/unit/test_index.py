"""The prefix index: contiguity, ghosts, forgetting, what a writer and a reader are told."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvstore._native import HeldRows, PrefixIndex, WriteSet
from kvstore.pool import LRUPolicy, NodePath, Prompt, RecordName, RecordNames
from kvstore.pool.index import NODE_BYTES, RECORD_BYTES, needs_of
from kvstore.pool.index import PrefixIndex as PoolIndex
from kvstore.pool.plan import name_table
from kvstore.spec import WHOLE, ChunkGrid, ModelSpec, ReuseRule, Shard
from kvstore.spec.shard import UnitRange
from kvstore.testing.specs import dense, hybrid, pure_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.abc import Evictable

B = 4
SLOT_BYTES = 8192
_slots = itertools.count()


def make(spec: ModelSpec, *, ghosts_max: int = 1000, keeps_order: bool = True) -> PrefixIndex:
    return PrefixIndex([group.rule is ReuseRule.STATE for group in spec.groups], ghosts_max, keeps_order)


def path_of(spec: ModelSpec, *ids: int) -> NodePath:
    return Prompt.of(spec, ids).path


def names_of(
    spec: ModelSpec,
    path: NodePath,
    states: tuple[int, ...] = (),
    units: UnitRange | None = None,
    *,
    attention: bool = True,
) -> list[RecordName]:
    names = []
    for index, group in enumerate(spec.groups):
        nodes = states if group.rule is ReuseRule.STATE else range(len(path)) if attention else ()
        names += [RecordName(node, index, 0, units or group.all_units) for node in nodes]
    return names


def plan(
    index: PrefixIndex,
    spec: ModelSpec,
    path: NodePath,
    names: list[RecordName],
    grid: ChunkGrid | None = None,
    **how: bool,
) -> WriteSet:
    return index.plan(path.packed, *name_table(spec, path, RecordNames.of(names), grid, None), **how)


def begin(
    index: PrefixIndex,
    spec: ModelSpec,
    path: NodePath,
    names: list[RecordName],
    grid: ChunkGrid | None = None,
    salt: bytes = b"",
    **how: bool,
) -> WriteSet:
    writes = plan(index, spec, path, names, grid, **how)
    assert not writes.is_wrong_path
    assert writes.gap_node is None
    index.enter(writes, path.packed, salt, [], [])
    count = len(writes.missing()[0])
    writes.set_slots(np.array([(next(_slots), 0, SLOT_BYTES) for _ in range(count)], np.uint64).reshape(-1, 3))
    return writes


def commit(index: PrefixIndex, writes: WriteSet, *, is_lossy: bool = False) -> list[int]:
    count = len(writes.missing()[0])
    ready = np.arange(count, dtype=np.uint64)
    return index.commit(writes, ready, np.zeros(count, np.uint64), is_lossy=is_lossy)


def fill(
    index: PrefixIndex, spec: ModelSpec, path: NodePath, states: tuple[int, ...] = (), *, attention: bool = True
) -> None:
    """Commit a path's attention, and states at some of its nodes."""
    writes = begin(index, spec, path, names_of(spec, path, states, attention=attention))
    assert commit(index, writes) == []
    index.leave(writes)
    assert not len(index.let_go(writes))
    check(index)


def check(index: PrefixIndex) -> None:
    assert index.check() == ""


def node_of(index: PrefixIndex, path: NodePath, number: int) -> int:
    node = index.find(path.key(number))
    assert node is not None
    return node


def evict(index: PrefixIndex, path: NodePath, number: int, *, is_state: bool = False) -> int:
    slots = index.evict(node_of(index, path, number), is_state)
    check(index)
    return len(slots)


def hold(index: PrefixIndex, spec: ModelSpec, path: NodePath, shard: Shard = WHOLE) -> HeldRows | None:
    held = index.collect(path.packed, needs_of(spec, shard), None)
    if held is not None:
        index.hold(held)
    return held


def test_evicting_takes_what_lies_below_and_leaves_what_lies_above() -> None:
    spec = hybrid(B)
    index = make(spec)
    long, tail = path_of(spec, *range(12)), path_of(spec, *range(9))
    fill(index, spec, long, (0, 2))
    fill(index, spec, tail, (2,))
    groups = len(spec.state_groups)
    assert evict(index, long, 1) == 3 + 2 * groups
    assert index.find(tail.key(2)) is None, "a tail leaves no ghost"
    assert not index.holds_records(node_of(index, long, 2))
    assert index.holds_records(node_of(index, long, 0))
    assert evict(index, long, 0, is_state=True) == groups


def test_what_is_held_is_not_evicted() -> None:
    spec = hybrid(B)
    index = make(spec)
    path = path_of(spec, *range(12))
    fill(index, spec, path, (1, 2))
    held = hold(index, spec, path.prefix(2))
    assert held is not None
    assert [evict(index, path, 0), evict(index, path, 1), evict(index, path, 1, is_state=True)] == [0, 0, 0]
    assert evict(index, path, 2) > 0
    assert not len(index.release(held))
    assert evict(index, path, 0) > 0
    assert (index.record_count, index.committed_bytes) == (0, 0)


def test_records_of_other_units_are_found_together() -> None:
    spec = dense(B)
    index = make(spec)
    path = path_of(spec, *range(4))
    for part in (UnitRange(0, 1), UnitRange(1, 2)):
        assert len(plan(index, spec, path, names_of(spec, path)).missing()[0]) == 1
        assert hold(index, spec, path) is None
        writes = begin(index, spec, path, names_of(spec, path, units=part))
        commit(index, writes)
        index.leave(writes)
        index.let_go(writes)
    whole = plan(index, spec, path, names_of(spec, path))
    assert (len(whole.missing()[0]), whole.held()[0][:, 3:5].tolist()) == (0, [[0, 1], [1, 2]])
    held = hold(index, spec, path)
    assert held is not None
    assert held.rows()[0][:, 3:5].tolist() == [[0, 1], [1, 2]]
    index.release(held)
    check(index)


def test_another_grid_is_another_record() -> None:
    spec = dense(B)
    index = make(spec)
    path, grid = path_of(spec, *range(8)), ChunkGrid((4, 8))
    fill(index, spec, path)
    assert len(plan(index, spec, path, names_of(spec, path)).missing()[0]) == 0
    writes = begin(index, spec, path, names_of(spec, path), grid)
    assert len(writes.missing()[0]) == 2
    assert commit(index, writes) == []
    index.leave(writes)
    index.let_go(writes)
    check(index)
    for wanted, is_there in ((ChunkGrid((4, 8)), True), (ChunkGrid((8,)), False), (None, True)):
        held = index.collect(path.packed, needs_of(spec, WHOLE), None if wanted is None else wanted.packed)
        assert (held is not None) == is_there
    evict(index, path, 0)
    assert index.memory_bytes == 3 * NODE_BYTES, "the grids' digests went with their records"


def test_a_lossy_record_stands_beside_an_exact_one_and_never_for_it() -> None:
    spec = dense(B)
    index = make(spec)
    path = path_of(spec, *range(8))
    writes = begin(index, spec, path, names_of(spec, path), is_lossy=True)
    assert commit(index, writes, is_lossy=True) == []
    index.leave(writes)
    index.let_go(writes)
    check(index)
    exact = needs_of(spec, WHOLE)
    groups = [(0, False, 1, [0, 1])]
    lossy = type(exact)(groups, accepts_lossy=True)
    assert index.collect(path.packed, exact, None) is None
    assert index.collect(path.packed, lossy, None) is not None
    assert len(plan(index, spec, path, names_of(spec, path), is_lossy=True).missing()[0]) == 0
    second = [name for name in names_of(spec, path) if name.node == 1]
    assert plan(index, spec, path, second).gap_node == 1, "an exact block hangs on no lossy one"
    fill(index, spec, path.prefix(1))
    assert index.collect(path.prefix(1).packed, exact, None) is not None
    assert index.collect(path.packed, exact, None) is None
    assert index.collect(path.packed, lossy, None) is not None
    assert index.record_count == 3


def test_ghosts_stay_and_are_bounded() -> None:
    spec = dense(B)
    index = make(spec, ghosts_max=5)
    path = path_of(spec, *range(12))
    fill(index, spec, path)
    evict(index, path, 0)
    assert (len(index), index.ghost_count) == (3, 3)
    assert not index.committed_bytes
    for seed in range(1, 10):
        other = path_of(spec, *range(100 * seed, 100 * seed + 12))
        fill(index, spec, other)
        evict(index, other, 0)
        assert len(index) == index.ghost_count <= 5
    assert index.drop_ghosts(99) == 5
    assert (len(index), index.memory_bytes) == (0, 0), "the root is still there"
    check(index)


def test_a_ghost_on_the_way_to_something_stays() -> None:
    """A model without attention has only ghosts above its states: they are no hints but the way there."""
    spec = pure_state(B)
    index = make(spec, ghosts_max=3)
    paths = [path_of(spec, *range(100 * seed, 100 * seed + 20)) for seed in range(4)]
    for path in paths:
        fill(index, spec, path, (4,), attention=False)
    assert index.ghost_count == 16
    for path in paths:
        assert all(index.find(path.key(number)) is not None for number in range(5))
    for path in paths:
        evict(index, path, 4, is_state=True)
    assert index.ghost_count <= 3


def test_nodes_made_for_nothing_leave_no_ghosts() -> None:
    spec = dense(B)
    index = make(spec)
    short, long = path_of(spec, *range(4)), path_of(spec, *range(14))
    fill(index, spec, short)
    writes = begin(index, spec, long, names_of(spec, long))
    assert writes.new_nodes == 3
    assert len(index) == 4
    index.undo(writes)
    assert (len(index), index.ghost_count) == (1, 0)
    check(index)


def test_a_forgotten_nodes_namesake_is_left_alone() -> None:
    """Who held a tail that was found damaged lets go of it, and not of the one that was written anew."""
    spec = dense(B)
    index = make(spec)
    path = path_of(spec, 1, 2)
    fill(index, spec, path)
    old = hold(index, spec, path)
    assert old is not None
    assert len(index.condemn(node_of(index, path, 0), False)) == 1
    check(index)
    assert index.find(path.key(0)) is None
    fill(index, spec, path)
    index.set_transient(node_of(index, path, 0), True)
    assert not len(index.release(old))
    check(index)
    assert index.holds_records(node_of(index, path, 0))
    new = hold(index, spec, path)
    assert new is not None
    assert len(index.release(new)) == 1, "a tail without a hand-over goes with its last reader"
    check(index)


def test_a_key_names_one_prefix() -> None:
    spec = dense(B)
    index = make(spec)
    path, other = path_of(spec, *range(12)), path_of(spec, *range(50, 62))
    fill(index, spec, path)
    keys = path.keys
    tail = path_of(spec, *range(10))
    fill(index, spec, tail)
    assert tail.tail_key is not None
    for wrong in (
        NodePath(path.root, B, (keys[0], keys[2])),
        NodePath(path.root, B, (other.keys[0], keys[1])),
        NodePath(path.root, B, (keys[0], keys[0])),
        NodePath(path.root, B, (other.keys[0], other.keys[0])),
        NodePath(b"r" * 32, B, keys),
        NodePath(path.root, B, (path.root,)),
        NodePath(keys[0], B, (other.keys[0],)),
        NodePath(path.root, B, (*keys[:2], tail.tail_key)),
        NodePath(path.root, B, tail.keys, tail.tail_key, (1, 2)),
        NodePath(path.root, B, tail.keys, keys[2], tail.tail_ids),
    ):
        assert plan(index, spec, wrong, []).is_wrong_path, wrong
        if wrong.tail_ids != (1, 2):  # the key is the right one
            assert index.collect(wrong.packed, needs_of(spec, WHOLE), None) is None
    assert not plan(index, spec, tail, []).is_wrong_path


def test_a_gap_is_noticed() -> None:
    """`check` must be able to fail."""
    spec = dense(B)
    index = make(spec)
    path = path_of(spec, *range(12))
    fill(index, spec, path)
    index.remove_unchecked(node_of(index, path, 1), False)
    assert "contiguous" in index.check()


def test_arguments_that_are_none() -> None:
    spec = dense(B)
    index = make(spec)
    path = path_of(spec, *range(8))
    name = RecordName(5, 0, 0, UnitRange(0, 2))
    with pytest.raises(IndexError):
        plan(index, spec, path, [name])
    with pytest.raises(ValueError, match="32 bytes"):
        index.collect((b"short", B, b"", None, b""), needs_of(spec, WHOLE), None)
    with pytest.raises(ValueError, match="at least one token"):
        index.collect((path.root, 0, b"", None, b""), needs_of(spec, WHOLE), None)
    with pytest.raises(IndexError, match="no such node"):
        index.evict(7, False)
    writes = plan(index, spec, path, [])
    with pytest.raises(IndexError):
        _ = writes.last_node
    assert index.find(b"short") is None
    assert index.find(path.root) is None


def test_memory_is_what_the_allocator_gave() -> None:
    spec = dense(B)
    index = make(spec)
    for seed in range(40):
        fill(index, spec, path_of(spec, *range(1000 * seed, 1000 * seed + 4 * 250)))
    assert index.memory_bytes == 10_001 * NODE_BYTES + 10_000 * RECORD_BYTES
    chunk_bytes = 1024 * (NODE_BYTES + RECORD_BYTES)
    assert index.allocated_bytes <= index.memory_bytes + chunk_bytes


class Recording(LRUPolicy):
    """Counts the steps in which it is told of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.asked = 0

    def insert_all(self, items: Sequence[Evictable]) -> None:
        self.steps.append(f"insert {len(items)}")
        super().insert_all(items)

    def access_all(self, items: Sequence[Evictable]) -> None:
        self.steps.append(f"access {len(items)}")
        super().access_all(items)


def test_a_policy_is_told_in_bulk_and_asked_ahead() -> None:
    spec, policy = dense(B), Recording()
    index = PoolIndex(spec, policy)
    path = path_of(spec, *range(400))
    writes = begin(index.native, spec, path, names_of(spec, path))
    ready = np.arange(100, dtype=np.uint64)
    assert index.commit(writes, ready, np.zeros(100, np.uint64)) == []
    assert policy.steps == ["insert 100", "access 100"]
    index.native.leave(writes)
    index.let_go(writes)
    index.look_ahead()
    assert index.native.pushed_count == 100
    target = 10 * (SLOT_BYTES + RECORD_BYTES)
    assert index.choose(target) == target
    assert index.native.pushed_count == 90, "victims were there before they were needed"
    assert len(index.evict_chosen()) == 10
    assert index.native.find(path.key(89)) is not None
    held = index.native.collect(path.prefix(90).packed, needs_of(spec, WHOLE), None)
    assert held is not None
    index.hold(held)
    assert index.choose(target) == 0, "all that is left is held, and was used since it was named"
    index.native.drop_choice()
    index.release(held)
    index.check()


def test_the_order_of_use_is_that_of_the_policy_in_python() -> None:
    """Both evict the same, whatever has happened before."""
    spec = hybrid(B)
    native, pushed = PoolIndex(spec, None), PoolIndex(spec, LRUPolicy())
    random = np.random.default_rng(3)
    for _ in range(120):
        ids = [int(each) for each in random.integers(0, 2, random.integers(1, 30))]
        path = path_of(spec, *ids)
        action = random.random()
        evicted = []
        for index in (native, pushed):
            if action < 0.5:
                names = names_of(spec, path, (len(path) - 1,))
                writes = begin(index.native, spec, path, names)
                count = len(writes.missing()[0])
                index.commit(writes, np.arange(count, dtype=np.uint64), np.zeros(count, np.uint64))
                index.native.leave(writes)
                index.let_go(writes)
            elif action < 0.8:
                held = index.native.collect(path.packed, needs_of(spec, WHOLE), None)
                if held is not None:
                    index.hold(held)
                    index.release(held)
            else:
                index.choose(5 * SLOT_BYTES)
                evicted.append(len(index.evict_chosen()))
            index.check()
        assert len(set(evicted)) <= 1
        known = [{key: index.native.find(key) is not None for key in path.keys} for index in (native, pushed)]
        assert known[0] == known[1]
        assert native.native.committed_bytes == pushed.native.committed_bytes
