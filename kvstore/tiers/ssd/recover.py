"""What the rows of a journal leave: records that are there, and reachable from the root. Arrays throughout.

Walks along chains of prefixes are made by pointer jumping: after k rounds every node has looked at 2^k ancestors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES
from kvstore.limits import FILE_ALIGN_BYTES, PROMPT_TOKENS_MAX
from kvstore.tiers.ssd.footer import head_bytes
from kvstore.tiers.ssd.rows import ENDLESS_US, EndRows, NodeRows, RecordRows, TailIds

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.segment import RecordClass, Segment
    from kvstore.tiers.ssd.tables import Tables

_ROUNDS_MAX = PROMPT_TOKENS_MAX.bit_length() + 1
_BITS = 64


@dataclass(frozen=True)
class Losses:
    """Rows of the journal that do not count, by reason.

    Attributes:
        contradicting: rows that contradict each other or the spec.
        without_segment: records whose segment is missing, too short or another one, and that no other row names.
        forgotten: records that were evicted on purpose.
        replaced: records that a later row names again.
        unreachable: records whose ancestors, or whose attention, are missing.
    """

    contradicting: int
    without_segment: int
    forgotten: int
    replaced: int
    unreachable: int


def recover(
    tables: Tables, spec: ModelSpec, segments: Mapping[int, Segment], *, is_alone: bool = True
) -> tuple[NodeRows, RecordRows, EndRows, Losses]:
    """The nodes and records that count, each once: parents before children, and records in the order of their rows.

    And until when the nodes are wanted, of those of which something says so.

    Args:
        is_alone: no other directory holds what records here depend on, so what cannot be reached does not count.
    """
    contradicting = tables.contradicting
    nodes = _Nodes(tables, spec)
    records = tables.records
    node = nodes.numbers[records["node"]]

    is_there, is_sane = _which_are_there(tables, segments)
    contradicting += int((~is_sane).sum())
    is_known = node < len(nodes)
    is_alive = is_known & _which_are_remembered(tables, nodes, node, spec)
    is_good = is_sane & is_there & is_alive

    # Of records of one name and grid the last one counts.
    grids, digests = _unique_keys(tables.digests)
    classes, class_numbers = _classes(tables.record_names)
    identity = np.stack((node, class_numbers, grids[records["grid"]] if len(grids) else node), axis=1)
    chosen = np.flatnonzero(is_good)
    latest = chosen[_last_of_rows(identity[chosen], tables.record_sequences[chosen])]
    reachable = latest
    if is_alone:
        reachable = latest[_which_are_reachable(nodes, node[latest], class_numbers[latest], classes, spec)]

    order = reachable[np.argsort(tables.record_sequences[reachable], kind="stable")]
    kept_nodes = nodes.with_ancestors(node[order])
    renumbered = np.zeros(len(nodes) + 1, np.int64)
    renumbered[kept_nodes] = np.arange(len(kept_nodes))
    used, grid = np.unique(grids[records["grid"][order]] if len(order) else np.empty(0, np.int64), return_inverse=True)
    place = np.empty((len(order), 3), np.uint64)
    place[:, 0] = tables.record_segments[order]
    place[:, 1] = records["offset"][order]
    place[:, 2] = records["slot_bytes"][order]
    rows = RecordRows(
        renumbered[node[order]].astype(np.int32),
        tables.record_names[order].astype(np.uint16),
        grid.astype(np.int32).reshape(-1),
        tuple(digests[used].tobytes()[at : at + KEY_BYTES] for at in range(0, len(used) * KEY_BYTES, KEY_BYTES)),
        records["cost_us"][order].astype(np.uint64),
        place,
        records["metadata_crc32c"][order].astype(np.uint32),
    )
    gone = np.flatnonzero(is_sane & is_alive & ~is_there)
    is_replaced = _are_among(identity[gone], identity[latest])
    losses = Losses(
        contradicting=contradicting,
        without_segment=int((~is_replaced).sum()),
        forgotten=int((is_sane & is_known & ~is_alive).sum()),
        replaced=len(chosen) - len(latest) + int(is_replaced.sum()),
        unreachable=len(latest) - len(reachable) + int((is_sane & ~is_known).sum()),
    )
    return nodes.rows(kept_nodes), rows, _ends(tables, nodes, renumbered, kept_nodes), losses


def _ends(
    tables: Tables, nodes: _Nodes, renumbered: npt.NDArray[np.int64], kept_nodes: npt.NDArray[np.int64]
) -> EndRows:
    """The last row of each node that counts, without what was forgotten since."""
    if not len(tables.ends):
        return EndRows.empty()
    keys = np.ascontiguousarray(tables.ends["key"])
    found = nodes.find(keys)
    is_kept = np.zeros(len(nodes) + 1, np.bool_)
    is_kept[kept_nodes] = True
    attention, states = _forget_sequences(tables, nodes)
    # In the order of their sequences, so that of one node the last assignment counts.
    latest = np.full(len(nodes) + 1, -1, np.int64)
    latest[found] = np.arange(len(found))
    chosen = latest[:-1][is_kept[:-1] & (latest[:-1] >= 0)]
    chosen = chosen[tables.end_sequences[chosen] >= attention[found[chosen]]]
    chosen = chosen[np.argsort(renumbered[found[chosen]], kind="stable")]
    ends_us = tables.ends["ends_us"][chosen].copy()
    ends_us[tables.end_sequences[chosen] < states[found[chosen]], 1] = ENDLESS_US
    return EndRows(keys[chosen], ends_us)


def _are_among(rows: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which rows are also among others."""
    if not len(rows):
        return np.zeros(0, np.bool_)
    _, numbers = np.unique(np.concatenate((others, rows)), axis=0, return_inverse=True)
    return np.isin(numbers.reshape(-1)[len(others) :], numbers.reshape(-1)[: len(others)])


class _Nodes:
    """Each node once, in the order of their ends, so that parents stand before children.

    Attributes:
        numbers: of each node row of the tables; `len(self)` for those that lead to no root.
        parent: of each node, `[n + 1]`; `n` for a root's, and for itself.
        keys: of each node.
    """

    def __init__(self, tables: Tables, spec: ModelSpec) -> None:
        rows = tables.nodes
        unique, first = _first_of_each(np.ascontiguousarray(rows["key"]))
        order = np.argsort(rows["end_tokens"][first], kind="stable")
        first = first[order]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        self.keys = np.ascontiguousarray(rows["key"][first])
        self._first = first
        self._tables = tables
        self._sorted = _SortedKeys(self.keys)
        count = len(first)

        parents = np.ascontiguousarray(rows["parent"][first])
        root_keys = np.frombuffer(b"".join(key for key, _ in tables.roots), np.uint8).reshape(-1, KEY_BYTES)
        is_first_block = np.zeros(count, np.bool_)
        if len(root_keys) and count:
            is_first_block = (root_keys[np.minimum(rows["root"][first], len(root_keys) - 1)] == parents).all(axis=1)
        found = self._sorted.find(parents)
        parent = np.where(is_first_block, count, found)
        is_orphan = ~is_first_block & (found == count)
        ends = rows["end_tokens"][first].astype(np.int64)
        tails = tables.tails.lengths[first] if count else np.empty(0, np.int64)
        begins = np.where(is_first_block, 0, np.append(ends, 0)[parent])
        is_sound = np.where(tails > 0, ends == begins + tails, ends == begins + spec.block_tokens)
        is_sound &= (tails < spec.block_tokens) & (ends <= PROMPT_TOKENS_MAX) & (begins % spec.block_tokens == 0)
        is_sound &= is_first_block | (np.append(rows["root"][first], 0)[parent] == rows["root"][first])
        self.parent = np.append(np.where(is_orphan | ~is_sound, count, parent), count)
        self.is_rooted = self.and_ancestors(np.append(is_sound & ~is_orphan, True).astype(np.uint64))[:-1] > 0
        numbers = place[unique]
        self.numbers = np.where(self.is_rooted[numbers], numbers, count) if count else numbers

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Numbers of nodes by key; `len(self)` where there is none."""
        return self._sorted.find(keys)

    def and_ancestors(self, bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The bits, `[n + 1]`, that a node and all of its ancestors have. The last row must have all."""
        bits, pointer = bits.copy(), self.parent
        for _ in range(_ROUNDS_MAX):
            if (pointer == len(self)).all():
                break
            bits &= bits[pointer]
            pointer = pointer[pointer]
        return bits

    def most_of_ancestors(self, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The greatest value, `[n + 1]`, of a node and all of its ancestors. The last row must have the least."""
        values, pointer = values.copy(), self.parent
        for _ in range(_ROUNDS_MAX):
            if (pointer == len(self)).all():
                break
            values = np.maximum(values, values[pointer])
            pointer = pointer[pointer]
        return values

    def with_ancestors(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """These nodes and all of their ancestors, ascending."""
        is_needed = np.zeros(len(self) + 1, np.bool_)
        is_needed[numbers] = True
        pointer = self.parent
        for _ in range(_ROUNDS_MAX):
            if (pointer == len(self)).all():
                break
            is_needed[pointer[is_needed]] = True
            pointer = pointer[pointer]
        return np.flatnonzero(is_needed[:-1])

    def rows(self, numbers: npt.NDArray[np.int64]) -> NodeRows:
        """Those of these numbers."""
        at = self._first[numbers]
        rows = self._tables.nodes
        everything = NodeRows(
            rows["key"],
            rows["parent"],
            rows["end_tokens"].astype(np.uint32),
            self._tables.tails,
            rows["root"].astype(np.int32),
            self._tables.roots,
        )
        if not len(at):
            return NodeRows.empty()
        taken = everything.taken(at)
        return NodeRows(
            np.ascontiguousarray(taken.keys), np.ascontiguousarray(taken.parents), taken.end_tokens,
            TailIds.of(taken.tail_ids), taken.root, taken.roots,
        )  # fmt: skip


class _SortedKeys:
    """Finds 32-byte keys by their first 8 bytes, which seldom agree for digests, and compares the rest."""

    def __init__(self, keys: npt.NDArray[np.uint8]) -> None:
        self._keys = keys
        words = _first_words(keys)
        self._order = np.argsort(words, kind="stable")
        self._words = words[self._order]

    def find(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        found = np.full(len(keys), len(self._keys), np.int64)
        if not len(self._keys):
            return found
        words = _first_words(keys)
        at = np.searchsorted(self._words, words)
        left = np.arange(len(keys))
        while len(left):
            position = np.minimum(at[left], len(self._words) - 1)
            left_here = self._words[position] == words[left]
            left_here &= at[left] < len(self._words)
            left, position = left[left_here], position[left_here]
            is_equal = (self._keys[self._order[position]] == keys[left]).all(axis=1)
            found[left[is_equal]] = self._order[position[is_equal]]
            left = left[~is_equal]
            at[left] += 1
        return found


def _first_words(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


def _first_of_each(keys: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of each key the number of its value, and where each value stands first."""
    words = keys.view(np.uint64).reshape(-1, KEY_BYTES // 8)
    order = np.argsort(words[:, 0], kind="stable")
    ordered = words[order]
    is_same_word = ordered[1:, 0] == ordered[:-1, 0]
    is_same = (ordered[1:] == ordered[:-1]).all(axis=1)
    if (is_same_word & ~is_same).any():
        # Somebody has looked for keys that begin alike: order by all of their bytes.
        order = np.lexsort(words.T[::-1])
        ordered = words[order]
        is_same = (ordered[1:] == ordered[:-1]).all(axis=1)
    begins = np.append(True, ~is_same)[: len(order)]
    numbers = np.empty(len(keys), np.int64)
    numbers[order] = np.cumsum(begins) - 1
    return numbers, order[begins]


def _unique_keys(keys: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    if not len(keys):
        return np.empty(0, np.int64), keys
    numbers, first = _first_of_each(np.ascontiguousarray(keys))
    return numbers, keys[first]


def _classes(names: npt.NDArray[np.uint16]) -> tuple[list[RecordClass], npt.NDArray[np.int64]]:
    """Each record class, and the number of each record's."""
    words = np.ascontiguousarray(names, dtype="<u2").view(np.uint64).reshape(-1)
    values, numbers = np.unique(words, return_inverse=True)
    classes = [tuple(row) for row in values.view("<u2").reshape(-1, 4).tolist()]
    return classes, numbers.reshape(-1).astype(np.int64)


def _which_are_there(
    tables: Tables, segments: Mapping[int, Segment]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each record row: whether its segment holds so much, and whether it may lie there at all."""
    numbers, which = np.unique(tables.record_segments, return_inverse=True)
    which = which.reshape(-1)
    table = np.zeros((len(numbers), 4), np.uint64)
    names = np.zeros((len(numbers), 4), np.uint16)
    is_there = np.zeros(len(numbers), np.bool_)
    for row, number in enumerate(numbers.tolist()):
        segment = segments.get(number)
        if segment is not None:
            is_there[row] = True
            table[row] = segment.name.nonce, head_bytes(segment.layout), segment.end, segment.layout.slot_bytes
            names[row] = segment.record_class
    records = tables.records
    offset, slot_bytes = records["offset"], records["slot_bytes"].astype(np.uint64)
    nonce, begin, end, expected_bytes = table[which].T
    is_same = is_there[which] & (nonce == tables.record_nonces)
    is_sane = ~is_same | (
        (offset % FILE_ALIGN_BYTES == 0)
        & (offset >= begin)
        & (offset < 1 << 62)
        & (slot_bytes == expected_bytes)
        & (names[which] == tables.record_names).all(axis=1)
    )
    return is_same & (offset + slot_bytes <= end), is_sane


def _which_are_remembered(
    tables: Tables, nodes: _Nodes, node: npt.NDArray[np.int64], spec: ModelSpec
) -> npt.NDArray[np.bool_]:
    """Of each record row: whether it was written after its node, or one above, was last forgotten."""
    if not len(tables.forgets):
        return np.ones(len(node), np.bool_)
    attention, states = _forget_sequences(tables, nodes)
    forgotten = attention[node]
    is_state_record = np.isin(tables.record_names[:, 0], spec.state_groups)
    forgotten = np.maximum(forgotten, np.where(is_state_record, states[node], -1))
    # What is forgotten in a frame counts before the records of the same frame.
    return tables.record_sequences >= forgotten


def _forget_sequences(tables: Tables, nodes: _Nodes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """When each node, or one above, was last forgotten, and when its states were, `[n + 1]`; -1 for never."""
    forgets = tables.forgets
    attention = np.full(len(nodes) + 1, -1, np.int64)
    states = attention.copy()
    if len(forgets):
        found = nodes.find(np.ascontiguousarray(forgets["key"]))
        is_state = forgets["is_state"] != 0
        # Sequences ascend, and of equal places the last assignment counts.
        attention[found[~is_state]] = tables.forget_sequences[~is_state]
        states[found[is_state]] = tables.forget_sequences[is_state]
        attention[-1] = states[-1] = -1
        attention = nodes.most_of_ancestors(attention)
    return attention, states


def _last_of_rows(identity: npt.NDArray[np.int64], sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each row of `identity` stands with the highest sequence."""
    order = np.lexsort((sequences, *identity.T))
    ordered = identity[order]
    is_last = np.append((ordered[1:] != ordered[:-1]).any(axis=1), True)[: len(order)]
    last: npt.NDArray[np.int64] = order[is_last]
    return last


def _which_are_reachable(
    nodes: _Nodes,
    node: npt.NDArray[np.int64],
    class_numbers: npt.NDArray[np.int64],
    classes: list[RecordClass],
    spec: ModelSpec,
) -> npt.NDArray[np.bool_]:
    """Attention whose every shard unit is there from the root on, and states with some attention of every span."""
    intervals = _intervals(classes, spec)
    is_kept = np.ones(len(node), np.bool_)
    reached: list[npt.NDArray[np.uint64]] = []
    while True:
        is_cut = np.zeros(len(node), np.bool_)
        reached = []
        for begin in range(0, len(intervals), _BITS):
            present = np.zeros(len(nodes) + 1, np.uint64)
            masks = [_mask(each, intervals[begin : begin + _BITS]) for each in classes]
            for number, mask in enumerate(masks):
                if mask:
                    present[node[is_kept & (class_numbers == number)]] |= np.uint64(mask)
            present[-1] = np.iinfo(np.uint64).max
            whole = nodes.and_ancestors(present)
            reached.append(whole)
            of_class = np.array(masks, np.uint64)[class_numbers]
            is_cut |= (whole[node] & of_class) != of_class
        if not (is_kept & is_cut).any():
            break
        # Units that only such a record had are missing further down.
        is_kept &= ~is_cut
    has_attention = np.ones(len(nodes) + 1, np.bool_)
    for group in spec.attention_groups:
        for span in range(len(spec.spans[group])):
            is_any = np.zeros(len(nodes) + 1, np.bool_)
            for begin, whole in zip(range(0, len(intervals), _BITS), reached, strict=True):
                part = intervals[begin : begin + _BITS]
                mask = sum(1 << bit for bit, each in enumerate(part) if each[:2] == (group, span))
                is_any |= (whole & np.uint64(mask)) != 0
            has_attention &= is_any
    is_state = np.array([each[0] in spec.state_groups for each in classes], np.bool_)[class_numbers]
    return is_kept & (~is_state | has_attention[node])


def _intervals(classes: list[RecordClass], spec: ModelSpec) -> list[RecordClass]:
    """Attention's shard units, cut wherever a class begins or ends."""
    cuts: dict[tuple[int, int], set[int]] = {}
    for group, span, start, stop in classes:
        if group in spec.attention_groups:
            cuts.setdefault((group, span), set()).update((start, stop))
    return [
        (group, span, start, stop)
        for (group, span), found in sorted(cuts.items())
        for start, stop in zip(sorted(found), sorted(found)[1:], strict=False)
    ]


def _mask(record_class: RecordClass, intervals: list[RecordClass]) -> int:
    group, span, start, stop = record_class
    return sum(
        1 << bit
        for bit, each in enumerate(intervals)
        if each[:2] == (group, span) and start <= each[2] and each[3] <= stop
    )
