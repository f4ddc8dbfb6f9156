"""Recovery's arrays against the same rules written down plainly; frames and tables there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.record import record_layout
from kvstore.spec import UnitRange
from kvstore.testing.specs import hybrid, pure_state
from kvstore.tiers.ssd.frame import HEAD_BYTES, FrameKind, has_payload, pack_frame, parse_head
from kvstore.tiers.ssd.names import FileName
from kvstore.tiers.ssd.recover import recover
from kvstore.tiers.ssd.rows import NodeRows, RecordRows
from kvstore.tiers.ssd.segment import Segment
from kvstore.tiers.ssd.tables import TableCollector, pack_tables
from tests.ssd.contents import Node, names_of, node_rows, path_of

if TYPE_CHECKING:
    from kvstore.spec import ModelSpec

DIRECTORY_ID = bytes(range(16))
GRIDS = (b"a" * 32, b"b" * 32)
SLOTS = 1 << 12


@dataclass(frozen=True)
class Row:
    """One record row of the journal."""

    sequence: int
    node: Node
    name: tuple[int, int, int, int]
    grid: int
    segment: int


@dataclass(frozen=True)
class Forgotten:
    sequence: int
    key: bytes
    is_state: bool


def tree(spec: ModelSpec) -> list[Node]:
    """Two prompts that share a block, and one under another salt."""
    nodes: dict[bytes, Node] = {}
    for tokens, salt in (([*range(8), 50, 51, 52, 53, 54], b""), ([*range(4), 60, 61, 62, 63], b""), (range(9), b"x")):
        nodes.update((node.key, node) for node in path_of(spec, tokens, salt))
    return list(nodes.values())


def classes_of(spec: ModelSpec) -> list[tuple[int, int, int, int]]:
    """Whole and halved shard units of every group."""
    found = []
    for group, each in enumerate(spec.groups):
        half = each.unit_count // 2
        found += [(group, 0, *units) for units in ((0, each.unit_count), (0, half), (half, each.unit_count))]
    return found


def segments_of(spec: ModelSpec, missing: set[int]) -> dict[int, Segment]:
    """One per class, numbered from 1."""
    found = {}
    for number, (group, span, start, stop) in enumerate(classes_of(spec), 1):
        layout = record_layout(spec, group, span, UnitRange(start, stop))
        if number not in missing:
            found[number] = Segment(FileName(number, 1000 + number, False), layout, 0, layout.slot_bytes * SLOTS)
    return found


def pack(spec: ModelSpec, rows: list[Row], forgotten: list[Forgotten], sequence: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    nodes = list(dict.fromkeys(row.node for row in rows))
    everything = segments_of(spec, set())
    named = {row.segment: (1000 + row.segment, everything[row.segment].record_class) for row in rows}
    records = RecordRows(
        np.array([nodes.index(row.node) for row in rows], np.int32),
        np.array([row.name for row in rows], np.uint16).reshape(-1, 4),
        np.array([row.grid for row in rows], np.int32),
        GRIDS,
        np.array([row.sequence for row in rows], np.uint64),
        np.array(
            [(row.segment, 4096 * (1 + row.sequence), everything[row.segment].layout.slot_bytes) for row in rows],
            np.uint64,
        ).reshape(-1, 3),
        np.array([row.sequence for row in rows], np.uint32),
    )
    return pack_tables(node_rows(nodes), records, [(each.key, each.is_state) for each in forgotten], named)


def expected(spec: ModelSpec, rows: list[Row], forgotten: list[Forgotten], missing: set[int]) -> set[Row]:
    """The rules of docs/format.md, one after the other."""
    parents = {row.node.key: row.node.parent for row in rows}

    def chain(key: bytes) -> list[bytes] | None:
        found = []
        roots = {row.node.root[0] for row in rows}
        while key not in roots:
            if key not in parents:
                return None
            found.append(key)
            key = parents[key]
        return found

    def is_forgotten(row: Row) -> bool:
        above = chain(row.node.key) or []
        return any(
            each.sequence > row.sequence
            and (each.key == row.node.key if each.is_state else each.key in above)
            and (not each.is_state or row.name[0] in spec.state_groups)
            for each in forgotten
        )

    latest: dict[tuple[bytes, tuple[int, int, int, int], int], Row] = {}
    for row in rows:
        if row.segment not in missing and chain(row.node.key) is not None and not is_forgotten(row):
            latest[row.node.key, row.name, row.grid] = row
    kept = set(latest.values())

    def has_chain(key: bytes, group: int, span: int, unit: int) -> bool:
        return all(
            any(
                row.node.key == each and row.name[:2] == (group, span) and row.name[2] <= unit < row.name[3]
                for row in kept
            )
            for each in chain(key) or []
        )

    while True:
        cut = {
            row
            for row in kept
            if row.name[0] in spec.attention_groups
            and not all(has_chain(row.node.key, *row.name[:2], unit) for unit in range(row.name[2], row.name[3]))
        }
        if not cut:
            break
        kept -= cut
    attention = [(group, span) for group in spec.attention_groups for span in range(len(spec.spans[group]))]
    return {
        row
        for row in kept
        if row.name[0] in spec.attention_groups
        or all(
            any(has_chain(row.node.key, *each, unit) for unit in range(spec.groups[each[0]].unit_count))
            for each in attention
        )
    }


@pytest.mark.parametrize("spec", [hybrid(4), pure_state(4)], ids=lambda spec: spec.model)
@settings(max_examples=40)
@given(data=st.data())
def test_recovery_follows_the_rules(spec: ModelSpec, data: st.DataObject) -> None:
    nodes, classes = tree(spec), classes_of(spec)
    missing = data.draw(st.sets(st.integers(1, len(classes)), max_size=2))
    rows: list[Row] = []
    forgotten: list[Forgotten] = []
    collector = TableCollector()
    for sequence in range(1, data.draw(st.integers(1, 6)) + 1):
        places = st.tuples(st.integers(0, len(nodes) - 1), st.integers(0, len(classes) - 1), st.integers(0, 1))
        batch = [
            Row(sequence, nodes[node], classes[number], grid, number + 1)
            # Whole units of attention more often, or no chain would be long.
            for node, number, grid in data.draw(st.lists(places, max_size=14))
        ]
        if data.draw(st.booleans()):
            batch += [Row(sequence, node, classes[0], 0, 1) for node in nodes if not node.tail_ids or sequence % 2]
        names = data.draw(st.lists(st.tuples(st.integers(0, len(nodes) - 1), st.booleans()), max_size=2))
        lost = [Forgotten(sequence, nodes[node].key, is_state) for node, is_state in names]
        frame = pack_frame(
            pack(spec, batch, lost, sequence),
            directory_id=DIRECTORY_ID,
            journal=1,
            nonce=2,
            sequence=sequence,
            offset=0,
            kind=FrameKind.BATCH,
            next_segment=1,
        )
        head = parse_head(frame[:HEAD_BYTES].tobytes())
        assert head is not None
        assert has_payload(frame.data, head, 0)
        payload = frame.data[HEAD_BYTES : HEAD_BYTES + head.payload_bytes]
        collector.add(payload, head.table_begins(), head.counts, head.sequence)
        rows += batch
        forgotten += lost
    tables = collector.tables()
    assert tables.contradicting == 0
    found_nodes, found, _, losses = recover(tables, spec, segments_of(spec, missing))
    wanted = {
        (row.node.key, *row.name, GRIDS[row.grid], row.sequence, row.segment)
        for row in expected(spec, rows, forgotten, missing)
    }
    names = names_of(found_nodes, found)
    assert {
        (*name, found.digests[grid], int(checksum), int(place[0]))
        for name, grid, checksum, place in zip(
            names, found.grids.tolist(), found.metadata_crc32c, found.place, strict=True
        )
    } == wanted
    assert len(names) == len(wanted)
    assert losses.contradicting == 0
    by_key = {node.key: node for node in nodes}
    for number, key in enumerate(key.tobytes() for key in found_nodes.keys):
        node = by_key[key]
        assert found_nodes.end_tokens[number] == node.end_tokens
        assert tuple(found_nodes.tail_ids[number].tolist()) == node.tail_ids
        assert found_nodes.roots[found_nodes.root[number]] == node.root
        assert found_nodes.parents[number].tobytes() == node.parent


def test_keys_that_begin_alike_are_told_apart() -> None:
    """Eight equal first bytes are no equal keys, whatever it took somebody to find them."""
    spec = pure_state(4)
    root = path_of(spec, range(4))[0].root
    alike = [bytes(8) + bytes([number]) * 24 for number in (3, 1, 2)]
    nodes = [Node(key, root[0], 4, (), root) for key in alike]
    nodes.append(Node(b"c" * 32, alike[1], 8, (), root))
    name = (0, 0, 0, spec.groups[0].unit_count)
    layout = record_layout(spec, 0, 0, spec.groups[0].all_units)
    rows = [Row(1, node, name, 0, 1) for node in nodes]
    collector = TableCollector()
    frame = pack_frame(
        pack(spec, rows, [Forgotten(1, alike[2], True)], 1), directory_id=DIRECTORY_ID, journal=1, nonce=2, sequence=1,
        offset=0, kind=FrameKind.BATCH, next_segment=1,
    )  # fmt: skip
    head = parse_head(frame[:HEAD_BYTES].tobytes())
    assert head is not None
    collector.add(frame.data[HEAD_BYTES:], head.table_begins(), head.counts, 1)
    segment = Segment(FileName(1, 1001, False), layout, 0, layout.slot_bytes * SLOTS)
    found_nodes, found, _, _ = recover(collector.tables(), spec, {1: segment})
    assert {name[0] for name in names_of(found_nodes, found)} == {node.key for node in nodes}


def test_nodes_that_contradict_each_other_are_left_out() -> None:
    spec = pure_state(4)
    nodes = path_of(spec, range(12))
    name = (0, 0, 0, spec.groups[0].unit_count)
    layout = record_layout(spec, 0, 0, spec.groups[0].all_units)
    wrong = [
        Node(nodes[1].key, nodes[1].parent, 9, (), nodes[1].root),
        Node(nodes[1].key, nodes[2].key, 8, (), nodes[1].root),
        Node(nodes[1].key, nodes[1].key, 8, (), nodes[1].root),
        Node(nodes[1].key, nodes[1].parent, 8, (), (nodes[1].root[0], b"another")),
    ]
    for bad in wrong:
        rows = [Row(1, node, name, 0, 1) for node in (nodes[0], bad, nodes[2])]
        collector = TableCollector()
        frame = pack_frame(
            pack(spec, rows, [], 1), directory_id=DIRECTORY_ID, journal=1, nonce=2, sequence=1, offset=0,
            kind=FrameKind.BATCH, next_segment=1,
        )  # fmt: skip
        head = parse_head(frame[:HEAD_BYTES].tobytes())
        assert head is not None
        collector.add(frame.data[HEAD_BYTES:], head.table_begins(), head.counts, 1)
        segment = Segment(FileName(1, 1001, False), layout, 0, layout.slot_bytes * SLOTS)
        found_nodes, found, _, losses = recover(collector.tables(), spec, {1: segment})
        assert [name[0] for name in names_of(found_nodes, found)] == [nodes[0].key]
        assert losses.unreachable == 2


def test_a_frame_that_is_too_large_is_refused() -> None:
    spec = pure_state(4)
    node = path_of(spec, range(4))[0]
    many = NodeRows.empty()
    tables = pack_tables(many, RecordRows.empty(), [(node.key, False)] * (1 << 20), {})
    with pytest.raises(ValueError, match="append fewer records at a time"):
        pack_frame(
            tables, directory_id=DIRECTORY_ID, journal=1, nonce=2, sequence=1, offset=0, kind=FrameKind.BATCH,
            next_segment=1,
        )  # fmt: skip
