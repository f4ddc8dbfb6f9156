"""The journal of a directory: one file, or several while one takes the place of another."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.limits import FILE_ALIGN_BYTES, JOURNAL_BYTES_MAX, JOURNAL_FRAME_BYTES_MAX, SSD_RECOVERY_DEADLINE_S
from kvstore.tiers.ssd.frame import (
    FORGETS,
    HEAD_BYTES,
    RECORDS,
    FrameKind,
    has_payload,
    magic_pages,
    pack_frame,
    parse_head,
)
from kvstore.tiers.ssd.moves import read, sync, write
from kvstore.tiers.ssd.names import FileName

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc.files import Files
    from kvstore.tiers.ssd.frame import FrameHead

_WINDOW_BYTES = 2 * JOURNAL_FRAME_BYTES_MAX


@dataclass(frozen=True)
class JournalScan:
    """What was found in one journal file.

    Attributes:
        name: of the file.
        size_bytes: of the file.
        end: offset behind the last good frame.
        last_frame_bytes: of the last good frame.
        last_sequence: of the last good frame; 0 without one.
        snapshot_sequence: of the frame that ends the snapshot; 0 if none does.
        next_segment: no segment before it is to be made any more.
        frames: good ones.
        rows: record and forget rows in them.
        damaged_pages: pages before `end` that belong to no good frame.
    """

    name: FileName
    size_bytes: int
    end: int
    last_frame_bytes: int
    last_sequence: int
    snapshot_sequence: int
    next_segment: int
    frames: int
    rows: int
    damaged_pages: int


def scan_journal(
    files: Files,
    name: FileName,
    directory_id: bytes,
    take: Callable[[FrameHead, memoryview], None],
    progress: Callable[[int, int], None] | None = None,
) -> JournalScan:
    """Read a journal from its begin to its end; `take` gets every good frame with its payload.

    Whatever is damaged is skipped up to the next page at which a good frame begins.

    Raises:
        OSError, DeadlineError: the file cannot be read.
    """
    file = files.open(str(name))
    try:
        size_bytes = files.size(file)
        if size_bytes > JOURNAL_BYTES_MAX:
            raise OSError(
                errno.EFBIG, f"the journal has {size_bytes} bytes, the limit is {JOURNAL_BYTES_MAX}", str(name)
            )
        return _Scanner(name, directory_id, take).scan(_windows(files, file, size_bytes, progress), size_bytes)
    finally:
        files.close_file(file)


def _windows(
    files: Files, file: int, size_bytes: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[int, memoryview]]:
    """Overlapping parts of a file, so that any frame lies wholly in one of them."""
    whole = size_bytes // FILE_ALIGN_BYTES * FILE_ALIGN_BYTES
    at = 0
    while at < whole:
        size = min(_WINDOW_BYTES, whole - at)
        yield at, read(files, file, at, size, Deadline.after(SSD_RECOVERY_DEADLINE_S)).data
        if progress is not None:
            progress(min(at + size, whole), whole)
        at = at + size if at + size == whole else at + size - JOURNAL_FRAME_BYTES_MAX


class _Scanner:
    def __init__(self, name: FileName, directory_id: bytes, take: Callable[[FrameHead, memoryview], None]) -> None:
        self._name = name
        self._directory_id = directory_id
        self._take = take
        self._end = 0
        self._last_frame_bytes = 0
        self._last_sequence = 0
        self._snapshot_sequence = 0
        self._next_segment = 0
        self._frames = 0
        self._rows = 0
        self._good_pages = 0

    def scan(self, windows: Iterator[tuple[int, memoryview]], size_bytes: int) -> JournalScan:
        for begin, view in windows:
            for at in magic_pages(view).tolist():
                if begin + at >= self._end:
                    self._try(view, at, begin + at)
        return JournalScan(
            self._name,
            size_bytes,
            self._end,
            self._last_frame_bytes,
            self._last_sequence,
            self._snapshot_sequence,
            self._next_segment,
            self._frames,
            self._rows,
            self._end // FILE_ALIGN_BYTES - self._good_pages,
        )

    def _try(self, view: memoryview, at: int, offset: int) -> None:
        head = parse_head(bytes(view[at : at + HEAD_BYTES]))
        if (
            head is None
            or (head.directory_id, head.journal, head.nonce)
            != (self._directory_id, self._name.number, self._name.nonce)
            or head.offset != offset
            # A frame of an append that failed, which others have overtaken.
            or head.sequence <= self._last_sequence
            or not has_payload(view, head, at)
        ):
            return
        payload = view[at + HEAD_BYTES : at + HEAD_BYTES + head.payload_bytes]
        self._end = offset + head.frame_bytes
        self._last_frame_bytes = head.frame_bytes
        self._last_sequence = head.sequence
        self._next_segment = max(self._next_segment, head.next_segment)
        self._frames += 1
        self._rows += head.counts[RECORDS] + head.counts[FORGETS]
        self._good_pages += head.frame_bytes // FILE_ALIGN_BYTES
        if head.kind is FrameKind.SNAPSHOT_END and not self._snapshot_sequence:
            self._snapshot_sequence = head.sequence
        self._take(head, payload)


class Journal:
    """The journal that a directory writes to. One thread at a time.

    Attributes:
        name: of its file.
        end: where the next frame goes.
        sequence: the next frame's.
        rows: record and forget rows in it.
        written_bytes: since it was made or opened.
        wall_us: what its next frames tell of the wall clock.
    """

    def __init__(
        self, files: Files, file: int, name: FileName, directory_id: bytes, *, end: int, sequence: int
    ) -> None:
        self._files = files
        self._file = file
        self._directory_id = directory_id
        self.name = name
        self.end = end
        self.sequence = sequence
        self.rows = 0
        self.written_bytes = 0
        self.wall_us = 0

    @classmethod
    def create(cls, files: Files, number: int, directory_id: bytes, *, sequence: int) -> Journal:
        """A new file, without a snapshot yet. Raises `OSError`."""
        name = FileName(number, int.from_bytes(os.urandom(8), "little"), is_journal=True)
        return cls(files, files.create(str(name)), name, directory_id, end=0, sequence=sequence)

    def add(self, tables: Sequence[npt.NDArray[Any]], kind: FrameKind, next_segment: int, deadline: Deadline) -> None:
        """Write a frame, not yet safe. Whether or not it fails, its sequence number is used up.

        Raises:
            ValueError: the frame would be too large; nothing was written.
            OSError, DeadlineError: as `kvstore.tiers.ssd.moves.move`; the next frame goes to the same place.
        """
        frame = self._pack(tables, kind, next_segment)
        self.sequence += 1
        self.written_bytes += frame.nbytes
        write(self._files, self._file, self.end, frame, deadline)
        self.end += frame.nbytes
        self.rows += len(tables[RECORDS]) + len(tables[FORGETS])

    def _pack(self, tables: Sequence[npt.NDArray[Any]], kind: FrameKind, next_segment: int) -> npt.NDArray[np.uint8]:
        frame = pack_frame(
            tables,
            directory_id=self._directory_id,
            journal=self.name.number,
            nonce=self.name.nonce,
            sequence=self.sequence,
            offset=self.end,
            kind=kind,
            next_segment=next_segment,
            wall_us=self.wall_us,
        )
        if self.end + frame.nbytes > JOURNAL_BYTES_MAX:
            raise OSError(
                errno.EFBIG, f"the journal would exceed {JOURNAL_BYTES_MAX} bytes; rewrite it", str(self.name)
            )
        return frame

    def renew(self, frame_bytes: int, deadline: Deadline) -> None:
        """Write the last frame once more and make it safe, after somebody else wrote it.

        If their sync failed, the system may have taken the frame for safe since; a sync alone would not help then.
        Raises as `move`.
        """
        offset = self.end - frame_bytes
        frame = read(self._files, self._file, offset, frame_bytes, deadline)
        write(self._files, self._file, offset, frame, deadline)
        self.sync(deadline)

    def sync(self, deadline: Deadline) -> None:
        """Make what was added safe. Raises as `move`."""
        sync(self._files, [self._file], deadline)

    def rewind(self, end: int, rows: int) -> None:
        """Forget frames that were added and could not be made safe."""
        self.end, self.rows = end, rows

    def close(self) -> None:
        """Close the file."""
        self._files.close_file(self._file)
