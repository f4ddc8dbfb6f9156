"""Making a directory, and bringing one that was found into the state in which records can be added."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, SsdDirectoryError
from kvstore.limits import SSD_RECOVERY_DEADLINE_S
from kvstore.tiers.ssd.finding import find, own_manifest
from kvstore.tiers.ssd.footer import head_bytes
from kvstore.tiers.ssd.journal import Journal
from kvstore.tiers.ssd.manifest import Manifest, write_manifest
from kvstore.tiers.ssd.names import MANIFEST, parse_name
from kvstore.tiers.ssd.rows import EndRows, NodeRows, RecordRows
from kvstore.tiers.ssd.segment import seal
from kvstore.tiers.ssd.snapshot import write_snapshot

if TYPE_CHECKING:
    from kvstore.abc.files import Files
    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.finding import Finding
    from kvstore.tiers.ssd.segment import Segment
    from kvstore.tiers.ssd.tables import SegmentKey


def ensure_made(files: Files, spec: ModelSpec) -> Manifest:
    """The manifest, made if there is none. The lock is held.

    Raises:
        SsdDirectoryError: as `own_manifest`, or it cannot be made.
    """
    manifest = own_manifest(files, spec)
    if manifest is not None:
        return manifest
    deadline = Deadline.after(SSD_RECOVERY_DEADLINE_S)
    manifest = Manifest(os.urandom(16), spec)
    try:
        # What a creation left that did not come to its end: no manifest, so no record.
        for name in files.names():
            if name == MANIFEST or parse_name(name) is not None:
                files.remove(name)
        _empty_journal(files, manifest, deadline).close()
        # The manifest comes last: where there is one, there is a journal.
        write_manifest(files, manifest, deadline)
        files.sync_names()
    except (OSError, DeadlineError) as error:
        with suppress(OSError):
            files.remove(MANIFEST)
        raise SsdDirectoryError(f"{files.directory} cannot be made a directory of an SSD tier: {error}") from error
    return manifest


def find_and_settle(files: Files, manifest: Manifest, *, is_alone: bool) -> tuple[Finding, Journal]:
    """What is there, and the journal to go on with; whatever a crash left half-done is brought to an end.

    Raises:
        SsdDirectoryError: it cannot be read or written.
    """
    finding = find(files, manifest, is_alone=is_alone)
    deadline = Deadline.after(SSD_RECOVERY_DEADLINE_S)
    try:
        journal = _settled_journal(files, finding, deadline)
        for name in finding.unnamed:
            files.remove(str(name))
        for number, segment in list(finding.segments.items()):
            if not segment.tail_bytes:
                _settle_segment(files, finding, number, segment, deadline)
        files.sync_names()
    except (OSError, DeadlineError) as error:
        raise SsdDirectoryError(
            f"{files.directory} cannot be written: {error}; open it read-only, or mend the disk"
        ) from error
    return finding, journal


def _settled_journal(files: Files, finding: Finding, deadline: Deadline) -> Journal:
    directory_id = finding.manifest.directory_id
    if not finding.journals:
        return _empty_journal(files, finding.manifest, deadline)
    if finding.is_tidy:
        scan = finding.journals[0]
        file = files.open(str(scan.name), may_write=True)
        journal = Journal(files, file, scan.name, directory_id, end=scan.end, sequence=scan.last_sequence + 1)
        journal.rows = scan.rows
        journal.wall_us = finding.wall_us
        # It may have been written and not been made safe; from here on it is counted upon.
        journal.renew(scan.last_frame_bytes, deadline)
        return journal
    journal = write_snapshot(
        files,
        finding.journals[0].name.number + 1,
        directory_id,
        sequence=finding.last_sequence + 1,
        nodes=finding.nodes,
        records=finding.records,
        ends=finding.ends,
        wall_us=finding.wall_us,
        segments=segment_keys(finding.segments),
        next_segment=finding.next_segment,
        deadline=deadline,
    )
    for scan in finding.journals:
        files.remove(str(scan.name))
    return journal


def segment_keys(segments: dict[int, Segment]) -> dict[int, SegmentKey]:
    """What a frame says about segments."""
    return {number: (segment.name.nonce, segment.record_class) for number, segment in segments.items()}


def _empty_journal(files: Files, manifest: Manifest, deadline: Deadline) -> Journal:
    return write_snapshot(
        files,
        1,
        manifest.directory_id,
        sequence=1,
        nodes=NodeRows.empty(),
        records=RecordRows.empty(),
        ends=EndRows.empty(),
        wall_us=0,
        segments={},
        next_segment=1,
        deadline=deadline,
    )


def _settle_segment(files: Files, finding: Finding, number: int, segment: Segment, deadline: Deadline) -> None:
    """Seal a segment that was open, behind the last record that the journal names."""
    slot_bytes = segment.layout.slot_bytes
    offsets = [offset for offset in finding.offsets[number] if offset + slot_bytes <= segment.end]
    files.close_file(segment.file)
    if not offsets:
        del finding.segments[number]
        files.remove(str(segment.name))
        return
    segment.file = files.open(str(segment.name), may_write=True)
    segment.offsets = offsets
    segment.end = max(head_bytes(segment.layout), offsets[-1] + slot_bytes)
    seal(files, [segment], finding.manifest.directory_id, deadline)
