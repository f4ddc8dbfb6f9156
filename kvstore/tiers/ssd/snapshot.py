"""A journal that begins with everything there is, to take the place of an older one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.tiers.ssd.frame import FrameKind
from kvstore.tiers.ssd.journal import Journal
from kvstore.tiers.ssd.parts import end_parts_of, parts_of
from kvstore.tiers.ssd.rows import SEGMENT, EndRows, NodeRows, RecordRows
from kvstore.tiers.ssd.tables import pack_tables

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.abc.files import Files
    from kvstore.clock import Deadline
    from kvstore.tiers.ssd.tables import SegmentKey

_END_FRAMES = 2
"""The frame that ends a snapshot is written twice: damage to one page must not make all of the snapshot doubtful."""


def write_snapshot(
    files: Files,
    number: int,
    directory_id: bytes,
    *,
    sequence: int,
    nodes: NodeRows,
    records: RecordRows,
    ends: EndRows,
    wall_us: int,
    segments: Mapping[int, SegmentKey],
    next_segment: int,
    deadline: Deadline,
) -> Journal:
    """A new journal that is complete and safe, its name included.

    Raises:
        OSError, DeadlineError: it is not, or perhaps not. Its file may be there, and may come back after a crash.
    """
    journal = Journal.create(files, number, directory_id, sequence=sequence)
    journal.wall_us = wall_us
    try:
        for part_ends in end_parts_of(ends):
            tables = pack_tables(NodeRows.empty(), RecordRows.empty(), (), {}, part_ends)
            journal.add(tables, FrameKind.SNAPSHOT, next_segment, deadline)
        for part_nodes, part_records in parts_of(nodes, records):
            named = {int(each): segments[int(each)] for each in np.unique(part_records.place[:, SEGMENT])}
            journal.add(pack_tables(part_nodes, part_records, (), named), FrameKind.SNAPSHOT, next_segment, deadline)
        # Its end says that all before it is there, also after a crash.
        journal.sync(deadline)
        for _ in range(_END_FRAMES):
            tables = pack_tables(NodeRows.empty(), RecordRows.empty(), (), segments)
            journal.add(tables, FrameKind.SNAPSHOT_END, next_segment, deadline)
        journal.sync(deadline)
        files.sync_names()
    except BaseException:
        journal.close()
        raise
    return journal
