"""Between the arrays of an SSD directory and those of the native index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES
from kvstore.placement.ssd.places import checksums_of, places_of, slots_of
from kvstore.pool.rows import COST_US, DIGEST, GROUP, NODE, SLOT, SLOT_BYTES, STOP
from kvstore.tiers.ssd.rows import NodeRows, RecordRows, TailIds

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeAlias

    import numpy.typing as npt

    PackedNodes: TypeAlias = tuple[bytes, bytes, npt.NDArray[np.uint64], bytes, list[tuple[bytes, bytes]]]
    PackedRecords: TypeAlias = tuple[npt.NDArray[np.uint64], bytes]


def pack(found: Sequence[tuple[NodeRows, RecordRows]]) -> tuple[PackedNodes, PackedRecords]:
    """What several drives have, as `PrefixIndex.restore` takes it; drives are numbered in their order."""
    roots: dict[tuple[bytes, bytes], int] = {}
    digests: dict[bytes, int] = {}
    numbers: list[npt.NDArray[np.uint64]] = []
    tables: list[npt.NDArray[np.uint64]] = []
    tails: list[npt.NDArray[np.uint32]] = []
    first_node = first_id = 0
    for drive, (nodes, records) in enumerate(found):
        own_roots = np.array([roots.setdefault(root, len(roots)) for root in nodes.roots] or [0], np.uint64)
        own_digests = np.array([digests.setdefault(each, len(digests)) for each in records.digests] or [0], np.uint64)
        own_tails = TailIds.of(nodes.tail_ids)
        lengths = own_tails.lengths.astype(np.uint64)
        begins = own_tails.ends.astype(np.uint64) - lengths + np.uint64(first_id)
        numbers.append(np.stack((nodes.end_tokens.astype(np.uint64), own_roots[nodes.root], begins, lengths), axis=1))
        tails.append(own_tails.ids)
        table = np.zeros((len(records), DIGEST + 1), np.uint64)
        table[:, NODE] = records.node.astype(np.uint64) + np.uint64(first_node)
        table[:, GROUP : STOP + 1] = records.name
        table[:, SLOT : SLOT_BYTES + 1] = slots_of(drive, records.place, records.metadata_crc32c)
        table[:, COST_US] = records.cost_us
        table[:, DIGEST] = own_digests[records.grids]
        tables.append(table)
        first_node += len(nodes)
        first_id += len(own_tails.ids)
    keys = b"".join(nodes.keys.tobytes() for nodes, _ in found)
    parents = b"".join(nodes.parents.tobytes() for nodes, _ in found)
    tail_ids = np.concatenate([np.empty(0, np.uint32), *tails]).astype(np.uint32).tobytes()
    nodes_table = np.concatenate([np.empty((0, 4), np.uint64), *numbers])
    records_table = np.concatenate([np.empty((0, DIGEST + 1), np.uint64), *tables])
    return (keys, parents, nodes_table, tail_ids, list(roots)), (records_table, b"".join(digests))


def unpack(nodes: PackedNodes, records: PackedRecords) -> tuple[NodeRows, RecordRows]:
    """What a survey of one drive found, as its directory takes it."""
    keys, parents, numbers, tail_ids, roots = nodes
    table, digests = records
    node_rows = NodeRows(
        np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES),
        np.frombuffer(parents, np.uint8).reshape(-1, KEY_BYTES),
        numbers[:, 0].astype(np.uint32),
        TailIds(np.frombuffer(tail_ids, np.uint32), (numbers[:, 2] + numbers[:, 3]).astype(np.int64)),
        numbers[:, 1].astype(np.int32),
        tuple(roots),
    )
    slots = table[:, SLOT : SLOT_BYTES + 1]
    record_rows = RecordRows(
        table[:, NODE].astype(np.int32),
        table[:, GROUP : STOP + 1].astype(np.uint16),
        table[:, DIGEST].astype(np.int32),
        tuple(digests[at : at + KEY_BYTES] for at in range(0, len(digests), KEY_BYTES)),
        table[:, COST_US].copy(),
        places_of(slots),
        checksums_of(slots),
    )
    return node_rows, record_rows


def part(
    nodes: NodeRows, records: RecordRows, chosen: npt.NDArray[np.int64], *, whole_paths: bool
) -> tuple[NodeRows, RecordRows]:
    """Some of the records, with the nodes that they are of, and with `whole_paths` all nodes above these."""
    used = np.unique(records.node[chosen])
    if whole_paths:
        used = _with_ancestors(nodes, used)
    numbers = np.zeros(len(nodes), np.int32)
    numbers[used] = np.arange(len(used), dtype=np.int32)
    node_rows = NodeRows(
        nodes.keys[used],
        nodes.parents[used],
        nodes.end_tokens[used],
        TailIds.of(nodes.tail_ids).taken(used.astype(np.int64)),
        nodes.root[used],
        nodes.roots,
    )
    record_rows = RecordRows(
        numbers[records.node[chosen]],
        records.name[chosen],
        records.grids[chosen],
        records.digests,
        records.cost_us[chosen],
        records.place[chosen],
        records.metadata_crc32c[chosen],
    )
    return node_rows, record_rows


def _with_ancestors(nodes: NodeRows, used: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Numbers of these nodes and of all above them, ascending. Parents stand before their children."""
    by_key = {nodes.keys[number].tobytes(): number for number in range(len(nodes))}
    is_used = np.zeros(len(nodes), np.bool_)
    is_used[used] = True
    for number in range(len(nodes) - 1, -1, -1):
        parent = by_key.get(nodes.parents[number].tobytes()) if is_used[number] else None
        if parent is not None:
            is_used[parent] = True
    return np.flatnonzero(is_used).astype(np.int32)
