"""Filling an index in one step, and asking it what lies where; what the C++ tests do not see is how arguments cross."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore._native import PrefixIndex
from kvstore.pool import NodePath, Prompt
from kvstore.pool.index import needs_of
from kvstore.spec import WHOLE
from kvstore.testing.specs import hybrid

SPEC = hybrid(4)
IDS = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def path() -> NodePath:
    return Prompt.of(SPEC, IDS).path


def packed_nodes() -> tuple[Any, ...]:
    chain = path()
    keys = b"".join(chain.key(node) for node in range(3))
    parents = b"".join(chain.parent(node) for node in range(3))
    numbers = np.array([[4, 0, 0, 0], [8, 0, 0, 0], [9, 0, 0, 1]], np.uint64)
    return keys, parents, numbers, np.array([9], np.uint32).tobytes(), [(chain.root, b"salt")]


def records() -> np.ndarray[Any, Any]:
    """Attention of each node, the states of the last: columns of `kvstore.pool.rows`."""
    rows = [[node, 0, 0, 0, 2, node, node, 8192, 7, 0] for node in range(3)]
    rows += [[2, group, 0, 0, SPEC.groups[group].unit_count, 9, group, 4096, 0, 0] for group in SPEC.state_groups]
    return np.array(rows, np.uint64)


def empty() -> PrefixIndex:
    return PrefixIndex([False, True, True], 100, True)


def test_a_prompt_with_a_tail_is_restored_and_surveyed() -> None:
    index = empty()
    taken = index.restore(4, packed_nodes(), records(), bytes(32))
    assert taken == b"\1" * 5
    assert index.check() == ""
    assert index.collect(path().packed, needs_of(SPEC, WHOLE), None) is not None
    found = index.match(path().packed, np.array(IDS, np.uint32), 9, needs_of(SPEC, WHOLE), None, 8, [])
    assert found.candidates == [(2, 9, path().tail_key)]
    nodes, (table, digests) = index.survey(0, 0)
    assert nodes[0] == packed_nodes()[0]
    assert nodes[1] == packed_nodes()[1]
    assert nodes[2].tolist() == packed_nodes()[2].tolist()
    assert nodes[3:] == packed_nodes()[3:]
    assert sorted(table.tolist()) == sorted(records().tolist())
    assert digests == bytes(32)
    again = empty()
    assert again.restore(4, nodes, table, digests) == taken
    assert again.bytes_by_salt == index.bytes_by_salt == {b"salt": 3 * 8192 + 2 * 4096}


def test_what_leaves_is_named_once() -> None:
    index = empty()
    index.watch(True)
    index.restore(4, packed_nodes(), records(), bytes(32))
    assert index.take_changes()[0] == b"", "what was kept elsewhere is no change"
    freed = index.condemn_all((1 << 64) - 1, 9)
    assert freed.tolist() == [[9, 1, 4096], [9, 2, 4096]]
    keys, _, table, _ = index.take_changes()
    assert (keys, table[:, :2].tolist()) == (path().key(2), [[0, 1]])
    node = index.find(path().key(0))
    assert node is not None
    assert len(index.evict(node, False)) == 3
    keys, _, table, _ = index.take_changes()
    assert sorted(keys[at : at + 32] for at in (0, 32, 64)) == sorted(path().key(node) for node in range(3))
    assert table[:, :2].tolist() == [[0, 0]] * 3
    assert index.take_changes()[0] == b""


def test_records_move() -> None:
    index = empty()
    index.restore(4, packed_nodes(), records(), bytes(32))
    moves = np.array([[0, 0, 8192, 5, 6, 8192], [1, 1, 8192, 5, 7, 4096], [4, 4, 8192, 5, 8, 8192]], np.uint64)
    keys = b"".join(path().key(node) for node in range(3))
    assert index.relocate(keys, moves) == b"\1\0\0", "another size, or no such slot"
    node = index.find(path().key(0))
    assert node is not None
    assert index.has_slot(node, False, 5, 6, 8192)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda nodes, rows: ((nodes[0][:-1], *nodes[1:]), rows), ValueError),
        (lambda nodes, rows: ((nodes[0], nodes[1][32:], *nodes[2:]), rows), ValueError),
        (lambda nodes, rows: ((*nodes[:2], nodes[2][:2], *nodes[3:]), rows), ValueError),
        (lambda nodes, rows: ((*nodes[:3], b"", nodes[4]), rows), IndexError),
        (lambda nodes, rows: ((*nodes[:4], []), rows), IndexError),
        (lambda nodes, rows: (nodes[:4], rows), ValueError),
        (lambda nodes, rows: (nodes, rows[:, :9]), ValueError),
        (lambda nodes, rows: (nodes, rows.astype(np.int64)), TypeError),
        (lambda nodes, rows: (nodes, rows + np.uint64(3)), IndexError),
    ],
)
def test_arguments_are_checked(change: Any, error: type[Exception]) -> None:
    nodes, rows = change(packed_nodes(), records())
    index = empty()
    with pytest.raises(error):
        index.restore(4, nodes, np.ascontiguousarray(rows), bytes(32))
    assert len(index) == 0


def test_only_an_empty_index_is_filled() -> None:
    index = empty()
    index.restore(4, packed_nodes(), records(), bytes(32))
    with pytest.raises(ValueError, match="empty index"):
        index.restore(4, packed_nodes(), records(), bytes(32))
    with pytest.raises(ValueError, match="at least one token"):
        empty().restore(0, packed_nodes(), records(), bytes(32))
