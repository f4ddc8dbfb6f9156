"""One segment file: records of one class, one after the other, and nothing else."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc.files import FileOperation
from kvstore.clock import Deadline
from kvstore.limits import FILE_ALIGN_BYTES, SSD_RECOVERY_DEADLINE_S
from kvstore.tiers.ssd.footer import (
    SegmentStamp,
    head_bytes,
    pack_head,
    pack_tail,
    parse_head_stamp,
    parse_tail,
    tail_bytes_of,
)
from kvstore.tiers.ssd.moves import move, read, sync
from kvstore.tiers.ssd.names import FileName

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.abc.files import Files
    from kvstore.record import RecordLayout

RecordClass = tuple[int, int, int, int]
"""Group, span, first unit, unit after the last."""


@dataclass(eq=False)
class Segment:
    """A segment of an open directory.

    Attributes:
        name: of its file.
        layout: of its records.
        file: number of the open file.
        end: where the next record goes; with a tail, where the records end.
        tail_bytes: of the tail of a sealed one.
        is_open: records may be added.
        is_headless: the head is still to be written.
        offsets: of the records that count, while it is open.
    """

    name: FileName
    layout: RecordLayout
    file: int
    end: int
    tail_bytes: int = 0
    is_open: bool = False
    is_headless: bool = False
    offsets: list[int] = field(default_factory=list)

    @property
    def record_class(self) -> RecordClass:
        layout = self.layout
        return layout.group_index, layout.span.index, layout.units.start, layout.units.stop

    @property
    def size_bytes(self) -> int:
        return self.end + self.tail_bytes

    def stamp(self, directory_id: bytes) -> SegmentStamp:
        return SegmentStamp(directory_id, self.name.number, self.name.nonce)


def create_segment(files: Files, number: int, layout: RecordLayout, segment_bytes: int) -> Segment:
    """A new file, empty but as long as it may become. Its head goes with its first records.

    The length is a hole, which takes no room: a file system writes a file that does not grow from many places at once,
    and one that grows from one place after the other.

    Raises:
        OSError: it could not be made, and is not there.
    """
    name = FileName(number, int.from_bytes(os.urandom(8), "little"), is_journal=False)
    file = files.create(str(name))
    try:
        files.truncate(file, max(segment_bytes, head_bytes(layout) + layout.slot_bytes))
    except OSError:
        files.close_file(file)
        files.remove(str(name))
        raise
    return Segment(name, layout, file, head_bytes(layout), is_open=True, is_headless=True)


def head_row(segment: Segment, directory_id: bytes) -> tuple[npt.NDArray[np.uint8], tuple[int, int, int, int, int]]:
    """The head's memory, and the operation that writes it."""
    head = pack_head(segment.layout, segment.stamp(directory_id))
    return head, (FileOperation.WRITE, segment.file, 0, head.ctypes.data, head.nbytes)


def seal(files: Files, segments: Sequence[Segment], directory_id: bytes, deadline: Deadline) -> int:
    """Make them Arrow files that end, and take no more records; bytes written. Raises as `moves.move`.

    Whether it fails or not, nothing is added to them any more.
    """
    tails = []
    for segment in segments:
        segment.is_open = False
        offsets = np.array(sorted(segment.offsets), np.uint64)
        tails.append(pack_tail(segment.layout, segment.stamp(directory_id), offsets, segment.end))
    for segment in segments:
        if files.size(segment.file) > segment.end:
            # What lies there is none of its records, and would follow the footer.
            files.truncate(segment.file, segment.end)
    rows = [
        (FileOperation.WRITE, segment.file, segment.end, tail.ctypes.data, tail.nbytes)
        for segment, tail in zip(segments, tails, strict=True)
    ]
    move(files, rows, deadline, tails)
    sync(files, [segment.file for segment in segments], deadline)
    for segment, tail in zip(segments, tails, strict=True):
        segment.tail_bytes = tail.nbytes
        segment.offsets.clear()
        files.rest(segment.file)
    return sum(tail.nbytes for tail in tails)


def find_segment(files: Files, name: FileName, layout: RecordLayout, directory_id: bytes) -> Segment | None:
    """An existing file, open for reading; None if it is the file of another segment under this name.

    A damaged head alone is no reason: each record is checked when it is read.

    Raises:
        OSError, DeadlineError: it cannot be read.
    """
    file = files.open(str(name))
    stamp = SegmentStamp(directory_id, name.number, name.nonce)
    try:
        size_bytes = files.size(file)
        whole = size_bytes // FILE_ALIGN_BYTES * FILE_ALIGN_BYTES
        begin = head_bytes(layout)
        if whole < begin:
            files.close_file(file)
            return None
        found = parse_head_stamp(_read(files, file, begin - FILE_ALIGN_BYTES, FILE_ALIGN_BYTES))
        if found is not None and found != stamp:
            files.close_file(file)
            return None
        segment = Segment(name, layout, file, whole)
        if whole == size_bytes:
            tail_bytes = tail_bytes_of(_read(files, file, whole - FILE_ALIGN_BYTES, FILE_ALIGN_BYTES))
            if 0 < tail_bytes <= whole - begin:
                end = parse_tail(_read(files, file, whole - tail_bytes, tail_bytes), stamp)
                if end == whole - tail_bytes:
                    segment.end, segment.tail_bytes = end, tail_bytes
        files.rest(file)
        return segment
    except BaseException:
        files.close_file(file)
        raise


def _read(files: Files, file: int, offset: int, size_bytes: int) -> bytes:
    return read(files, file, offset, size_bytes, Deadline.after(SSD_RECOVERY_DEADLINE_S)).tobytes()
