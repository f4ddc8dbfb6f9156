"""One directory of an SSD tier: segments with records, and the journal that says which records exist."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc.files import FileOperation
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, SsdDirectoryError
from kvstore.keys import KEY_BYTES
from kvstore.limits import SEGMENT_BYTES_MIN, SEGMENT_FRACTION, SEGMENTS_MAX, SSD_SETTLE_S
from kvstore.tiers.ssd.finding import find, own_manifest
from kvstore.tiers.ssd.frame import FrameKind
from kvstore.tiers.ssd.lock import DirectoryLock
from kvstore.tiers.ssd.moves import OperationsError, UnsettledError, move, sync
from kvstore.tiers.ssd.names import FileName, parse_name
from kvstore.tiers.ssd.opening import ensure_made, find_and_settle, segment_keys
from kvstore.tiers.ssd.parts import check_fits, frames_with_ends
from kvstore.tiers.ssd.rows import OFFSET, SEGMENT, SLOT_BYTES, EndRows, NodeRows, RecordRows
from kvstore.tiers.ssd.segment import Segment, seal
from kvstore.tiers.ssd.snapshot import write_snapshot
from kvstore.tiers.ssd.staging import OpenSegments, Staged, check_rows, empty_staging, read_checksums
from kvstore.tiers.ssd.tables import pack_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.abc.files import FileBatch, Files
    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.finding import Finding
    from kvstore.tiers.ssd.journal import Journal
    from kvstore.tiers.ssd.recover import Losses

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors that end by themselves once something is removed or the journal is rewritten."""


@dataclass(frozen=True)
class SegmentUsage:
    """One segment file.

    Attributes:
        number: which one; never used again.
        record_class: group, span, first unit, unit after the last of the records in it.
        size_bytes: of the file as far as it is in use: its head, records and, once sealed, the tail.
        is_sealed: nothing is added to it any more.
    """

    number: int
    record_class: tuple[int, int, int, int]
    size_bytes: int
    is_sealed: bool


class SsdDirectory:
    """The records of one model spec in one directory. It knows no index, and evicts nothing by itself.

    `append`, `forget`, `sync`, `remove_segments`, `rewrite_journal` and `close` are for one thread at a time; `read`
    and the properties for any.

    Attributes:
        recovered: what was there when it was opened: the nodes and records that the journal names and whose segments
            are there, without what `forget` named, each record once, contiguous from the root. Not verified.
        recovered_ends: until when the nodes are wanted, of those of which the journal says so.
        wall_us: the latest wall clock that the journal tells, microseconds since 1970; 0 where it tells none.
        losses: what the journal names and was not recovered, by reason.
        damaged_pages: pages of the journal that were skipped.
        segment_bytes: size from which on a segment takes no more records.
        is_abandoned: it was given up when it was closed, see `abandon`.
    """

    def __init__(
        self,
        files: Files,
        spec: ModelSpec,
        finding: Finding,
        journal: Journal | None,
        lock: DirectoryLock | None,
        segment_bytes: int,
    ) -> None:
        self._files = files
        self._spec = spec
        self._directory_id = finding.manifest.directory_id
        self._journal = journal
        self._lock = lock
        self._segments: dict[int, Segment] = finding.segments
        self._next_segment = finding.next_segment
        self._forgotten: list[tuple[bytes, bool]] = []
        self._ends: list[EndRows] = []
        self._to_seal: list[Segment] = []
        self._unsettled: UnsettledError | None = None
        self._trouble = ""
        self._record_bytes_written = 0
        self._other_bytes_written = 0
        self._is_closed = False
        self.is_abandoned = False
        self._fixed_bytes = sum(scan.size_bytes for scan in finding.journals) if journal is None else 0
        self.segment_bytes = segment_bytes
        self._open = OpenSegments(files, self._directory_id, self.segment_bytes, self._take_number)
        self.recovered: tuple[NodeRows, RecordRows] = (finding.nodes, finding.records)
        self.recovered_ends: EndRows = finding.ends
        self.wall_us = finding.wall_us
        self.losses: Losses = finding.losses
        self.damaged_pages = sum(scan.damaged_pages for scan in finding.journals)

    @classmethod
    def open(
        cls,
        files: Files,
        spec: ModelSpec,
        *,
        capacity_bytes: int,
        segment_bytes: int | None = None,
        is_read_only: bool = False,
        is_alone: bool = True,
    ) -> SsdDirectory:
        """Take the directory, or make an empty one of it, and recover what it holds.

        The directory exists. `files` becomes this object's to close, unless this raises. With `is_read_only` nothing in
        the directory is changed: no lock is taken, nothing is sealed, removed or made. Files that lie in no directory
        of this machine (tests have such) need no lock.

        Args:
            capacity_bytes: what it is meant to hold; decides how large a segment becomes. Nothing is refused by it.
            segment_bytes: how large instead; a segment holds one record at least.
            is_alone: no other directory holds what records here depend on. Otherwise `recovered` need not be contiguous
                by itself, and each append must be given the nodes of whole paths.

        Raises:
            SsdDirectoryError: another process has it (the message names its pid), it is of another model or a newer
                format, it holds files of others, or it cannot be read or written. In the first three cases nothing was
                changed.
        """
        if segment_bytes is None:
            segment_bytes = max(SEGMENT_BYTES_MIN, int(capacity_bytes * SEGMENT_FRACTION))
        if is_read_only:
            manifest = own_manifest(files, spec)
            if manifest is None:
                raise SsdDirectoryError(
                    f"{files.directory} is no directory of an SSD tier; open it once for writing, which makes it one"
                )
            return cls(files, spec, find(files, manifest, is_alone=is_alone), None, None, segment_bytes)
        # Before a lock file is left in a directory of others.
        own_manifest(files, spec)
        lock = DirectoryLock(files.directory) if os.path.isdir(files.directory) else None
        try:
            finding, journal = find_and_settle(files, ensure_made(files, spec), is_alone=is_alone)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return cls(files, spec, finding, journal, lock, segment_bytes)

    def append(
        self, nodes: NodeRows, records: RecordRows, addresses: npt.NDArray[np.uint64], deadline: Deadline
    ) -> RecordRows:
        """Write records and make them durable; the same rows with `place` and `metadata_crc32c` filled in.

        Rows of `forget` that wait go with it, and count before these records. Records may be there already: the newer
        ones count from then on.

        Args:
            nodes: the nodes of all records, and those between them and what was given before. At most
                `SSD_APPEND_ROWS_MAX`, as of records.
            addresses: where each record's slot lies, `[m]`, aligned to `FILE_ALIGN_BYTES`, sealed; must stay as it is
                until this returns or raises, see `has_settled`.

        Raises:
            OSError: it could not be written; nothing of it counts. The directory remains usable where that may help
                (a full disk), else `trouble` says why nothing is written to it any more.
            DeadlineError: as `OSError`. What had not ended is named by `has_settled`.
            ValueError: the rows contradict each other or the spec, or no frame of the journal takes one of them.
                Nothing was written.
        """
        journal = self._writable_journal()
        classes = check_rows(self._spec, nodes, records, addresses)
        check_fits(nodes, records)
        records = replace(records, metadata_crc32c=read_checksums(classes, nodes, records, addresses))
        staged = empty_staging(records)
        try:
            self._open.stage(classes, records, addresses, staged)
            self._write_records(staged, deadline)
        except (OSError, DeadlineError) as error:
            self._give_up_records(staged, error)
            raise
        placed = replace(records, place=staged.place)
        named = {number: (segment.name.nonce, segment.record_class) for number, (segment, _) in staged.ends.items()}
        self._add_to_journal(journal, nodes, placed, named, deadline)
        self._count(staged)
        self._seal_retired()
        return placed

    def has_settled(self) -> bool:
        """Whether every write that a failed call had begun has ended; until then its memory must not be given away."""
        unsettled = self._unsettled
        if unsettled is None:
            return True
        try:
            unsettled.batch.wait(unsettled.count, Deadline.after(0))
        except DeadlineError:
            return False
        self._unsettled = None
        return True

    def read(self, places: npt.NDArray[np.uint64], addresses: npt.NDArray[np.uint64]) -> FileBatch:
        """Begin to read whole slots into memory, urgently.

        Args:
            places: `RecordRows.place` of each, `[m, 3]`.
            addresses: where each goes, `[m]`, aligned to `FILE_ALIGN_BYTES`.

        Raises:
            FileNotFoundError: there is no such segment.
            ValueError: a place or an address is not aligned.
        """
        numbers, which = np.unique(places[:, SEGMENT], return_inverse=True)
        files = np.empty(len(numbers), np.uint64)
        for row, number in enumerate(numbers.tolist()):
            segment = self._segments.get(number)
            if segment is None:
                raise FileNotFoundError(errno.ENOENT, f"there is no segment {number}", self._files.directory)
            files[row] = segment.file
        operations = np.empty((len(places), 5), np.uint64)
        operations[:, 0] = FileOperation.READ
        operations[:, 1] = files[which.reshape(-1)]
        operations[:, 2] = places[:, OFFSET]
        operations[:, 3] = addresses
        operations[:, 4] = places[:, SLOT_BYTES]
        return self._files.submit(operations, is_urgent=True)

    def is_short(self, number: int) -> bool:
        """Whether somebody has cut a segment's file; also if it has gone."""
        segment = self._segments.get(number)
        try:
            return segment is None or self._files.size(segment.file) < segment.end
        except OSError:
            return False

    def forget(self, keys: Sequence[bytes], are_states: Sequence[bool]) -> None:
        """Records that were evicted on purpose shall not come back: a node's states, or its attention with all below.

        Rows of the next `append` or `sync`; a crash before may bring them back. With `trouble` this does nothing.
        """
        if len(keys) != len(are_states) or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"each name that is forgotten is a key of {KEY_BYTES} bytes and whether it is of states")
        if not self._trouble and self._journal is not None:
            self._forgotten.extend(zip(keys, map(bool, are_states), strict=True))

    def note_ends(self, ends: EndRows, wall_us: int) -> None:
        """Until when nodes are wanted, whether they are there already or come with the next `append`.

        Rows of the next `append` or `sync`; with `trouble` this does nothing.

        Args:
            wall_us: what the clock shows by which they are given.
        """
        self.wall_us = max(self.wall_us, wall_us)
        if not self._trouble and self._journal is not None:
            self._journal.wall_us = self.wall_us
            if len(ends):
                self._ends.append(ends)

    @property
    def has_rows_to_write(self) -> bool:
        """Whether rows of `forget` or `note_ends` wait, or were not taken because of `trouble`."""
        return bool(self._forgotten or self._ends or self._trouble)

    def sync(self, deadline: Deadline) -> None:
        """Write the rows of `forget` and `note_ends` that wait. Raises as `append`; they wait on then."""
        journal = self._writable_journal()
        if self.has_rows_to_write:
            self._add_to_journal(journal, NodeRows.empty(), RecordRows.empty(), {}, deadline)

    def segments(self) -> list[SegmentUsage]:
        """Every segment that is there, by number, those of which no record counts included."""
        return [
            SegmentUsage(number, segment.record_class, segment.size_bytes, not segment.is_open)
            for number, segment in sorted(self._segments.copy().items())
        ]

    def remove_segments(self, numbers: Sequence[int]) -> None:
        """Remove segments' files, which nobody reads: the caller's duty. Their records no longer count, crash or not.

        Raises:
            FileNotFoundError: there is none of a number; nothing was removed. OSError: one cannot be removed; those
                before it were.
        """
        self._writable_journal()
        for number in numbers:
            if number not in self._segments:
                raise FileNotFoundError(errno.ENOENT, f"there is no segment {number}", self._files.directory)
        is_any_gone = False
        try:
            for number in numbers:
                segment = self._segments[number]
                self._files.remove(str(segment.name))
                is_any_gone = True
                self._open.drop(segment)
                self._to_seal = [each for each in self._to_seal if each is not segment]
                del self._segments[number]
                self._files.close_file(segment.file)
        finally:
            if is_any_gone:
                self._files.sync_names()

    def rewrite_journal(
        self, nodes: NodeRows, records: RecordRows, deadline: Deadline, ends: EndRows | None = None
    ) -> None:
        """Replace the journal by one that holds just these rows, all of them with places.

        Rows of `note_ends` that wait stay behind it.

        A crash at any moment leaves one or the other. Rows of `forget` that wait are dropped: what they name is not
        among these.

        Raises:
            OSError, DeadlineError: the old journal goes on to count. As `append`.
            ValueError: the rows contradict each other, the spec or the segments. Nothing was written.
        """
        old = self._writable_journal()
        check_rows(self._spec, nodes, records, None)
        missing = set(np.unique(records.place[:, SEGMENT]).tolist()) - set(self._segments)
        if missing:
            raise ValueError(f"records name segments that are not there: {sorted(missing)[:3]}")
        number = 1 + max(old.name.number, *(name.number for name in self._journal_names()))
        try:
            journal = write_snapshot(
                self._files,
                number,
                self._directory_id,
                sequence=old.sequence,
                nodes=nodes,
                records=records,
                ends=ends or EndRows.empty(),
                wall_us=self.wall_us,
                segments=segment_keys(self._segments),
                next_segment=self._next_segment,
                deadline=deadline,
            )
        except (OSError, DeadlineError) as error:
            self._note(error, is_sync=False)
            # It may be complete all the same: what is appended to the old one has to come after it.
            old.sequence += len(nodes) + len(records) + len(ends or ()) + 3
            self._remove_failed_journal(number)
            raise
        self._journal = journal
        self._other_bytes_written += old.written_bytes
        self._forgotten.clear()
        old.close()
        try:
            self._files.remove(str(old.name))
            self._files.sync_names()
        except OSError as error:
            # The new one says that it counts no more.
            self._note(error, is_sync=False)

    @property
    def trouble(self) -> str:
        """Why nothing is written any more, in a sentence; empty while it works."""
        return self._trouble

    @property
    def journal_bytes(self) -> int:
        """Size of the journal."""
        return self._journal.end if self._journal is not None else self._fixed_bytes

    @property
    def journal_rows(self) -> int:
        """Record and forget rows in the journal: with more than twice as many as records live, rewriting pays."""
        return self._journal.rows if self._journal is not None else 0

    @property
    def used_bytes(self) -> int:
        """Bytes of segments and journal, dead records included."""
        return self.journal_bytes + sum(segment.size_bytes for segment in self._segments.copy().values())

    @property
    def written_bytes(self) -> int:
        """All that was written since `open`: records, heads, tails, journals."""
        journal_bytes = self._journal.written_bytes if self._journal is not None else 0
        return self._record_bytes_written + self._other_bytes_written + journal_bytes

    def close(self) -> None:
        """Seal what is open, write what waits, let go of the directory. Idempotent; raises nothing that a disk does."""
        if self._is_closed:
            return
        if self._journal is not None and not self._trouble:
            try:
                self.sync(Deadline.after(SSD_SETTLE_S))
            except (OSError, DeadlineError) as error:
                self._note(error, is_sync=False)
            self._to_seal.extend(self._open.take_all())
            self._seal_retired()
        if not self.has_settled():
            self.abandon()
            return
        self._is_closed = True
        self._files.close()
        if self._lock is not None:
            self._lock.close()

    def abandon(self) -> None:
        """Instead of `close`, where the drive does not answer: nothing is waited for, and nothing of it is given back.

        The directory stays locked until this process ends, since what was begun may yet be written.
        """
        if not self._is_closed:
            self._is_closed = self.is_abandoned = True
            self._files.abandon()

    # Steps of an append

    def _writable_journal(self) -> Journal:
        if self._is_closed:
            raise SsdDirectoryError(f"{self._files.directory} was closed")
        if self._journal is None:
            raise OSError(errno.EROFS, "it was opened read-only", self._files.directory)
        if self._trouble:
            raise OSError(errno.EROFS, self._trouble, self._files.directory)
        return self._journal

    def _take_number(self) -> int:
        if len(self._segments) >= SEGMENTS_MAX:
            raise OSError(errno.ENOSPC, f"it has {SEGMENTS_MAX} segments, which is the limit", self._files.directory)
        self._next_segment += 1
        return self._next_segment - 1

    def _write_records(self, staged: Staged, deadline: Deadline) -> None:
        """Bytes first, then their safety, then that of the names of new files."""
        move(self._files, staged.operations, deadline, staged.heads)
        self._record_bytes_written += int(staged.operations[:, 4].sum())
        try:
            sync(self._files, staged.files, deadline)
            if staged.created:
                self._files.sync_names()
        except OSError as error:
            self._note(error, is_sync=True)
            raise

    def _give_up_records(self, staged: Staged, error: OSError | DeadlineError) -> None:
        """No journal names them: their space is free again, unless a write may still land there."""
        self._note(error, is_sync=False)
        self._to_seal.extend(segment for segment in staged.retired if segment not in staged.created)
        if isinstance(error, UnsettledError):
            for segment, _ in staged.ends.values():
                self._open.drop(segment)
                segment.is_open = False
            return
        staged.roll_back()
        if isinstance(error, OperationsError) and error.errno not in _FULL:
            # The disk has a bad place there.
            bad = {int(staged.operations[number, 1]) for number in error.numbers if number < len(staged.operations)}
            for segment, _ in staged.ends.values():
                if segment.file in bad:
                    self._open.drop(segment)
                    segment.is_open = False
        for segment in staged.created:
            self._open.drop(segment)
            self._remove_file(segment.name, segment.file)

    def _add_to_journal(
        self,
        journal: Journal,
        nodes: NodeRows,
        records: RecordRows,
        segments: dict[int, tuple[int, tuple[int, int, int, int]]],
        deadline: Deadline,
    ) -> None:
        """Write and sync a batch, in several frames if one cannot take it.

        If that fails some of them may come back after a crash: what they name is there.
        """
        frames = frames_with_ends(nodes, records, self._forgotten, EndRows.join(self._ends))
        end, rows = journal.end, journal.rows
        try:
            for (part_nodes, part_records, forgotten), part_ends in frames:
                named = {int(number): segments[int(number)] for number in np.unique(part_records.place[:, SEGMENT])}
                tables = pack_tables(part_nodes, part_records, forgotten, named, part_ends)
                journal.add(tables, FrameKind.BATCH, self._next_segment, deadline)
                # Each by itself: whoever opens it next relies on no more than the last frame being unsafe.
                try:
                    journal.sync(deadline)
                except OSError as error:
                    self._note(error, is_sync=True)
                    raise
        except OSError as error:
            journal.rewind(end, rows)
            self._note(error, is_sync=error.errno not in _FULL)
            raise
        self._forgotten.clear()
        self._ends.clear()

    def _count(self, staged: Staged) -> None:
        for number, (segment, _) in staged.ends.items():
            segment.is_headless = False
            self._segments[number] = segment
            at = staged.place[:, SEGMENT] == number
            segment.offsets.extend(staged.place[at, OFFSET].tolist())
        self._to_seal.extend(staged.retired)

    def _seal_retired(self) -> None:
        """The records are safe whether or not their file gets its tail; what fails is tried again when it is opened."""
        segments, self._to_seal = self._to_seal, []
        for segment in segments:
            segment.is_open = False
        self._seal([segment for segment in segments if not segment.is_headless])

    def _seal(self, segments: Sequence[Segment]) -> None:
        if self._trouble:
            return
        try:
            self._other_bytes_written += seal(self._files, segments, self._directory_id, Deadline.after(SSD_SETTLE_S))
        except (OSError, DeadlineError) as error:
            if isinstance(error, OSError) and not isinstance(error, TimeoutError) and len(segments) > 1:
                for segment in segments:
                    self._seal([segment])
            else:
                self._note(error, is_sync=False)

    def _note(self, error: OSError | DeadlineError, *, is_sync: bool) -> None:
        """What an error says about the directory. After a failed sync nobody knows what is safe."""
        if self._trouble:
            return
        if isinstance(error, UnsettledError):
            self._unsettled = error
            self._trouble = f"{self._files.directory} does not answer: {error}; nothing more is written to it"
        elif isinstance(error, DeadlineError):
            return
        elif is_sync or error.errno in (errno.EROFS, errno.EBADF, errno.ENODEV, errno.ENXIO):
            self._trouble = f"{self._files.directory} cannot be written: {error}; mend the disk and open it again"

    def _journal_names(self) -> list[FileName]:
        return [name for name in map(parse_name, self._files.names()) if name is not None and name.is_journal]

    def _remove_failed_journal(self, number: int) -> None:
        try:
            for name in self._journal_names():
                if name.number == number:
                    self._files.remove(str(name))
        except OSError as error:
            self._note(error, is_sync=False)

    def _remove_file(self, name: FileName, file: int) -> None:
        try:
            self._files.close_file(file)
            self._files.remove(str(name))
        except OSError as error:
            # It holds nothing that counts, and goes when the directory is next opened.
            self._note(error, is_sync=False)
