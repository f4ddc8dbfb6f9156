"""Records for an SSD directory whose every byte follows from their names, so that a reader needs no copy to compare."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.keys import KeyChain, root_key
from kvstore.record import Record, RecordHeader, record_layout
from kvstore.tiers.ssd.memory import aligned
from kvstore.tiers.ssd.rows import NodeRows, RecordRows, TailIds

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from kvstore.spec import ModelSpec, UnitRange
    from kvstore.tiers.ssd.directory import SsdDirectory

WAIT_S = 30.0
Name = tuple[bytes, int, int, int, int]
"""Key, group, span, first unit, unit after the last."""


def deadline() -> Deadline:
    return Deadline.after(WAIT_S)


@dataclass(frozen=True)
class Node:
    """One prefix node."""

    key: bytes
    parent: bytes
    end_tokens: int
    tail_ids: tuple[int, ...]
    root: tuple[bytes, bytes]


def path_of(spec: ModelSpec, tokens: Sequence[int], salt: bytes = b"") -> list[Node]:
    """The nodes of a prompt, its tail included."""
    root = root_key(spec.fingerprint, salt=salt)
    chain = KeyChain(root, spec.block_tokens)
    chain.extend(tokens)
    nodes = []
    parent = root
    for number, key in enumerate(chain.block_keys):
        nodes.append(Node(key, parent, (number + 1) * spec.block_tokens, (), (root, salt)))
        parent = key
    tail = chain.tail_key()
    if tail is not None:
        nodes.append(Node(tail, parent, len(tokens), tuple(chain.tail_ids.tolist()), (root, salt)))
    return nodes


def node_rows(nodes: Sequence[Node]) -> NodeRows:
    roots = list(dict.fromkeys(node.root for node in nodes))
    return NodeRows(
        np.frombuffer(b"".join(node.key for node in nodes), np.uint8).reshape(-1, 32),
        np.frombuffer(b"".join(node.parent for node in nodes), np.uint8).reshape(-1, 32),
        np.array([node.end_tokens for node in nodes], np.uint32),
        TailIds.of([np.array(node.tail_ids, np.uint32) for node in nodes]),
        np.array([roots.index(node.root) for node in nodes], np.int32),
        tuple(roots),
    )


def grid_of(node: Node) -> bytes:
    return sha256(b"grid" + node.root[1]).digest()


def cost_of(node: Node) -> int:
    return int.from_bytes(node.key[:3], "little")


def record_of(spec: ModelSpec, node: Node, group: int, span: int, units: UnitRange) -> npt.NDArray[np.uint8]:
    """The slot of a record, sealed; the rest of the slot is zero."""
    layout = record_layout(spec, group, span, units)
    slot = aligned(layout.slot_bytes)
    seed = sha256(node.key + bytes((group, span, units.start, units.stop))).digest()
    values = np.random.default_rng(np.frombuffer(seed, np.uint64)).integers(0, 256, layout.record_bytes, np.uint8)
    for piece in layout.pieces:
        slot[piece.offset : piece.offset + piece.size_bytes] = values[piece.offset : piece.offset + piece.size_bytes]
    record = Record(layout, slot.data)
    record.checksums[:] = record.compute_checksums()
    valid = spec.groups[group].valid_tokens(spec.block_tokens, node.end_tokens)
    record.seal(RecordHeader(node.key, node.parent, node.end_tokens, valid, grid_of(node), cost_of(node)))
    return slot


@dataclass(frozen=True)
class Load:
    """What one append takes, with its memory."""

    nodes: NodeRows
    records: RecordRows
    addresses: npt.NDArray[np.uint64]
    slots: tuple[npt.NDArray[np.uint8], ...]
    names: tuple[Name, ...]


def load_of(spec: ModelSpec, nodes: Sequence[Node], names: Iterable[tuple[int, int, int, UnitRange]]) -> Load:
    """Records (number of the node, group, span, units), with all of these nodes."""
    names = list(names)
    slots = tuple(record_of(spec, nodes[node], group, span, units) for node, group, span, units in names)
    digests = list(dict.fromkeys(grid_of(node) for node in nodes))
    records = RecordRows(
        np.array([node for node, *_ in names], np.int32),
        np.array([(group, span, units.start, units.stop) for _, group, span, units in names], np.uint16).reshape(-1, 4),
        np.array([digests.index(grid_of(nodes[node])) for node, *_ in names], np.int32),
        tuple(digests),
        np.array([cost_of(nodes[node]) for node, *_ in names], np.uint64),
        np.array([(0, 0, len(slot)) for slot in slots], np.uint64).reshape(-1, 3),
        np.zeros(len(names), np.uint32),
    )
    return Load(
        node_rows(nodes),
        records,
        np.array([slot.ctypes.data for slot in slots], np.uint64),
        slots,
        tuple((nodes[node].key, group, span, units.start, units.stop) for node, group, span, units in names),
    )


def whole_names(
    spec: ModelSpec, nodes: Sequence[Node], *, start: int = 0, states_at: Sequence[int] = (-1,)
) -> list[tuple[int, int, int, UnitRange]]:
    """All attention of the nodes from `start` on, and the states at some of them."""
    states = {range(len(nodes))[at] for at in states_at}
    return [
        (node, group, span.index, spec.groups[group].all_units)
        for node in range(start, len(nodes))
        for group in range(len(spec.groups))
        for span in spec.spans[group]
        if group in spec.attention_groups or node in states
    ]


def whole_load(spec: ModelSpec, nodes: Sequence[Node], *, start: int = 0, states_at: Sequence[int] = (-1,)) -> Load:
    """The records of `whole_names`."""
    return load_of(spec, nodes, whole_names(spec, nodes, start=start, states_at=states_at))


def append(directory: SsdDirectory, load: Load) -> RecordRows:
    return directory.append(load.nodes, load.records, load.addresses, deadline())


def names_of(nodes: NodeRows, records: RecordRows) -> list[Name]:
    keys = nodes.keys[records.node]
    return [(key.tobytes(), *map(int, name)) for key, name in zip(keys, records.name, strict=True)]


def read_slots(directory: SsdDirectory, records: RecordRows) -> list[bytes | OSError]:
    """The bytes of each record as they lie there, or why they cannot be read."""
    slots = [aligned(int(size)) for size in records.place[:, 2]]
    batch = directory.read(records.place, np.array([slot.ctypes.data for slot in slots], np.uint64))
    batch.wait(len(slots), deadline())
    errors = batch.errors()
    return [errors.get(number, slot.tobytes()) for number, slot in enumerate(slots)]


def check_recovered(spec: ModelSpec, directory: SsdDirectory) -> set[Name]:
    """Every record that was recovered is byte for byte what its name says; their names."""
    nodes, records = directory.recovered
    names = names_of(nodes, records)
    assert len(set(names)) == len(names)
    keys = [key.tobytes() for key in nodes.keys]
    assert len(set(keys)) == len(keys)
    for number, found in enumerate(read_slots(directory, records)):
        node = int(records.node[number])
        root = nodes.roots[int(nodes.root[node])]
        end_tokens = int(nodes.end_tokens[node])
        what = Node(keys[node], nodes.parents[node].tobytes(), end_tokens, tuple(nodes.tail_ids[node].tolist()), root)
        group, span, start, stop = names[number][1:]
        expected = record_of(spec, what, group, span, type(spec.groups[group].all_units)(start, stop))
        assert found == expected.tobytes()
        assert records.digests[int(records.grids[number])] == grid_of(what)
        assert int(records.cost_us[number]) == cost_of(what)
        parent = nodes.parents[node].tobytes()
        assert parent == root[0] or keys.index(parent) < node
    return set(names)
