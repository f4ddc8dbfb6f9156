"""The records of one append: checked, and given places in segments."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import copy_rows
from kvstore.abc.files import FileOperation
from kvstore.errors import KVStoreError
from kvstore.keys import KEY_BYTES
from kvstore.limits import FILE_ALIGN_BYTES, OPEN_SEGMENTS_MAX, SALT_BYTES_MAX, SSD_APPEND_ROWS_MAX
from kvstore.record import record_layout
from kvstore.record.header import CHECKSUM_FIELD, CHECKSUM_PREFIX, FIELD_WIDTHS
from kvstore.spec import UnitRange
from kvstore.tiers.ssd.footer import head_bytes
from kvstore.tiers.ssd.rows import OFFSET, SEGMENT, SLOT_BYTES
from kvstore.tiers.ssd.segment import create_segment, head_row

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from kvstore.abc.files import Files
    from kvstore.record import RecordLayout
    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.rows import NodeRows, RecordRows
    from kvstore.tiers.ssd.segment import RecordClass, Segment

_KEY_FIELD = "kvstore.key"
_CHECKSUM_DIGITS = 8


@dataclass(frozen=True)
class ClassRows:
    """Those records of an append that are of one class."""

    layout: RecordLayout
    numbers: npt.NDArray[np.int64]


def check_rows(
    spec: ModelSpec, nodes: NodeRows, records: RecordRows, addresses: npt.NDArray[np.uint64] | None
) -> list[ClassRows]:
    """The records by class.

    Raises:
        ValueError: the rows contradict each other or the spec.
    """
    if addresses is not None and max(len(nodes), len(records)) > SSD_APPEND_ROWS_MAX:
        raise ValueError(
            f"{len(nodes)} nodes and {len(records)} records are too many for one append; it takes "
            f"{SSD_APPEND_ROWS_MAX} of each"
        )
    _check_nodes(nodes)
    count = len(records)
    lengths = {len(records.name), len(records.grids), len(records.cost_us), len(records.place)}
    if lengths != {count} or len(records.metadata_crc32c) != count or records.name.shape[1:] != (4,):
        raise ValueError("the columns of the record rows differ in length")
    if _are_outside(records.node, len(nodes)):
        raise ValueError(f"a record names a node that is none of the {len(nodes)} that were given")
    if _are_outside(records.grids, len(records.digests)):
        raise ValueError(f"a record names a grid that is none of the {len(records.digests)} that were given")
    if any(len(digest) != KEY_BYTES for digest in records.digests):
        raise ValueError(f"a grid's digest has {KEY_BYTES} bytes")
    if addresses is not None and (addresses.shape != (count,) or (addresses % FILE_ALIGN_BYTES).any()):
        raise ValueError(f"there is not one address that is a multiple of {FILE_ALIGN_BYTES} for each record")
    names, numbers = np.unique(records.name, axis=0, return_inverse=True)
    classes = []
    for number, name in enumerate(names.tolist()):
        layout = _layout(spec, tuple(name))
        rows = np.flatnonzero(numbers.reshape(-1) == number)
        if (records.place[rows, SLOT_BYTES] != layout.slot_bytes).any():
            raise ValueError(f"a record of class {name} has a slot of other than {layout.slot_bytes} bytes")
        classes.append(ClassRows(layout, rows))
    return classes


def read_checksums(
    classes: list[ClassRows], nodes: NodeRows, records: RecordRows, addresses: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint32]:
    """The metadata checksum that each sealed record carries, `[m]`.

    Raises:
        ValueError: what lies at an address is not sealed, or is not a record of its node.
    """
    checksums = np.zeros(len(records), np.uint32)
    for part in classes:
        keys = _field(part, addresses, _KEY_FIELD, 0, FIELD_WIDTHS[_KEY_FIELD])
        digits = _field(part, addresses, CHECKSUM_FIELD, len(CHECKSUM_PREFIX), _CHECKSUM_DIGITS)
        expected = nodes.keys[records.node[part.numbers]].tobytes().hex().encode()
        if keys.tobytes() != expected:
            raise ValueError("a record in memory does not carry the key of the node that it is given for")
        try:
            checksums[part.numbers] = np.frombuffer(bytes.fromhex(digits.tobytes().decode("ascii")), ">u4")
        except ValueError as error:
            raise ValueError("a record in memory has no metadata checksum; seal it first") from error
    return checksums


def _field(
    part: ClassRows, addresses: npt.NDArray[np.uint64], name: str, skip: int, width: int
) -> npt.NDArray[np.uint8]:
    """Bytes of a field of each record's header, `[n, width]`."""
    found = np.zeros((len(part.numbers), width), np.uint8)
    plan = np.empty((len(part.numbers), 6), np.uint64)
    plan[:, 0] = found.ctypes.data + np.arange(len(found), dtype=np.uint64) * np.uint64(width)
    plan[:, 1] = addresses[part.numbers] + np.uint64(part.layout.field_offsets[name] + skip)
    plan[:, 2:] = 1, width, width, width
    copy_rows(plan)
    return found


def _are_outside(numbers: npt.NDArray[np.int32], count: int) -> bool:
    """Whether a row refers to none of `count` others."""
    return bool(((numbers < 0) | (numbers >= count)).any())


def _check_nodes(nodes: NodeRows) -> None:
    count = len(nodes)
    if nodes.keys.shape != (count, KEY_BYTES) or nodes.parents.shape != (count, KEY_BYTES):
        raise ValueError(f"keys and parents of nodes are arrays of shape [n, {KEY_BYTES}]")
    if {len(nodes.end_tokens), len(nodes.tail_ids), len(nodes.root)} != {count}:
        raise ValueError("the columns of the node rows differ in length")
    if _are_outside(nodes.root, len(nodes.roots)):
        raise ValueError(f"a node names a root that is none of the {len(nodes.roots)} that were given")
    if any(len(key) != KEY_BYTES or len(salt) > SALT_BYTES_MAX for key, salt in nodes.roots):
        raise ValueError(f"a root has a key of {KEY_BYTES} bytes and a salt of at most {SALT_BYTES_MAX}")


def _layout(spec: ModelSpec, record_class: tuple[int, ...]) -> RecordLayout:
    group, span, start, stop = record_class
    try:
        layout = record_layout(spec, group, span, UnitRange(start, stop))
    except (KVStoreError, IndexError) as error:
        raise ValueError(f"the spec has no records of class {record_class}: {error}") from error
    if stop > spec.groups[group].unit_count:
        raise ValueError(f"the spec has no records of class {record_class}: the group has fewer units")
    return layout


@dataclass
class Staged:
    """Where the records of an append go, and what it takes to write them.

    Attributes:
        place: of each record, `[m, 3]`.
        operations: writes of heads and records, `[n, 5]`.
        files: numbers of the files that they go to, each once.
        ends: segments that are written to, and where they ended before.
        created: those that were made for it.
        retired: segments that are full and to be sealed afterwards.
        heads: memory of the heads.
    """

    place: npt.NDArray[np.uint64]
    operations: npt.NDArray[np.uint64]
    ends: dict[int, tuple[Segment, int]] = field(default_factory=dict)
    created: list[Segment] = field(default_factory=list)
    retired: list[Segment] = field(default_factory=list)
    heads: list[npt.NDArray[np.uint8]] = field(default_factory=list)

    @property
    def files(self) -> list[int]:
        return [segment.file for segment, _ in self.ends.values()]

    def roll_back(self) -> None:
        """Nothing of it counts, and nothing is under way: its space is free again."""
        for segment, end in self.ends.values():
            segment.end = end


class OpenSegments:
    """The segments that records are added to, one per class; the one used the longest ago gives way."""

    def __init__(self, files: Files, directory_id: bytes, segment_bytes: int, next_number: Callable[[], int]) -> None:
        self._files = files
        self._directory_id = directory_id
        self._segment_bytes = segment_bytes
        self._next_number = next_number
        self._by_class: OrderedDict[RecordClass, Segment] = OrderedDict()

    def stage(
        self, classes: list[ClassRows], records: RecordRows, addresses: npt.NDArray[np.uint64], staged: Staged
    ) -> None:
        """Give every record a place.

        Raises:
            OSError: a file could not be made. `staged` says what was done until then.
        """
        heads: list[tuple[int, ...]] = []
        parts: list[npt.NDArray[np.uint64]] = []
        for part in classes:
            slot_bytes = part.layout.slot_bytes
            left = part.numbers
            while len(left):
                segment = self._segment(part.layout, staged, heads)
                fitting = max(1, (self._segment_bytes - segment.end) // slot_bytes)
                taken, left = left[:fitting], left[fitting:]
                offsets = np.uint64(segment.end) + np.arange(len(taken), dtype=np.uint64) * np.uint64(slot_bytes)
                staged.place[taken, SEGMENT] = segment.name.number
                staged.place[taken, OFFSET] = offsets
                staged.place[taken, SLOT_BYTES] = slot_bytes
                rows = np.empty((len(taken), 5), np.uint64)
                rows[:, 0] = FileOperation.WRITE
                rows[:, 1] = segment.file
                rows[:, 2] = offsets
                rows[:, 3] = addresses[taken]
                rows[:, 4] = slot_bytes
                parts.append(rows)
                segment.end += len(taken) * slot_bytes
        staged.operations = _joined(np.concatenate([np.array(heads, np.uint64).reshape(-1, 5), *parts]))

    def _segment(self, layout: RecordLayout, staged: Staged, heads: list[tuple[int, ...]]) -> Segment:
        record_class = (layout.group_index, layout.span.index, layout.units.start, layout.units.stop)
        segment = self._by_class.get(record_class)
        is_full = segment is not None and segment.end + layout.slot_bytes > self._segment_bytes
        if segment is not None and is_full and segment.end > head_bytes(layout):
            staged.retired.append(self._by_class.pop(record_class))
            segment = None
        if segment is None:
            segment = create_segment(self._files, self._next_number(), layout, self._segment_bytes)
            staged.created.append(segment)
            self._by_class[record_class] = segment
        self._by_class.move_to_end(record_class)
        while len(self._by_class) > OPEN_SEGMENTS_MAX:
            staged.retired.append(self._by_class.popitem(last=False)[1])
        if segment.name.number not in staged.ends:
            staged.ends[segment.name.number] = (segment, segment.end)
            if segment.is_headless:
                head, row = head_row(segment, self._directory_id)
                staged.heads.append(head)
                heads.append(row)
        return segment

    def drop(self, segment: Segment) -> None:
        """Add nothing to a segment any more."""
        if self._by_class.get(segment.record_class) is segment:
            del self._by_class[segment.record_class]

    def take_all(self) -> list[Segment]:
        """All of them; none remains."""
        segments = list(self._by_class.values())
        self._by_class.clear()
        return segments


def _joined(operations: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The same writes, each of which goes on in file and memory where the one before it ends joined to that one."""
    if not len(operations):
        return operations
    before, after = operations[:-1], operations[1:]
    goes_on = before[:, 1] == after[:, 1]
    for column in (2, 3):
        goes_on &= before[:, column] + before[:, 4] == after[:, column]
    begins = np.flatnonzero(np.append(True, ~goes_on))
    joined = operations[begins]
    joined[:, 4] = np.add.reduceat(operations[:, 4], begins)
    return joined


def empty_staging(records: RecordRows) -> Staged:
    """Nothing placed yet."""
    return Staged(np.zeros((len(records), 3), np.uint64), np.empty((0, 5), np.uint64))
