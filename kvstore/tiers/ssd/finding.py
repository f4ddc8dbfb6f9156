"""What a directory holds, found out without changing anything in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import DeadlineError, KVStoreError, SsdDirectoryError
from kvstore.record import record_layout
from kvstore.spec import UnitRange
from kvstore.tiers.ssd.frame import FrameHead, FrameKind
from kvstore.tiers.ssd.journal import JournalScan, scan_journal
from kvstore.tiers.ssd.manifest import Manifest, read_manifest
from kvstore.tiers.ssd.names import LOCK, MANIFEST, FileName, parse_name
from kvstore.tiers.ssd.recover import Losses, recover
from kvstore.tiers.ssd.segment import Segment, find_segment
from kvstore.tiers.ssd.tables import TableCollector, Tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvstore.abc.files import Files
    from kvstore.record import RecordLayout
    from kvstore.spec import ModelSpec
    from kvstore.tiers.ssd.rows import EndRows, NodeRows, RecordRows

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """A directory as it was found.

    Attributes:
        manifest: whose it is.
        journals: its journals, the newest first.
        is_tidy: it has one journal, and that is complete.
        segments: that the journals name and that are there, open for reading, by number.
        lost_segments: numbers of those that the journals name and that are not there, or are other files.
        unnamed: segments that no journal names.
        foreign: names of files that are none of a directory's.
        next_segment: no segment of this number or above was ever made.
        nodes, records, ends: what counts.
        wall_us: the latest wall clock that a frame tells.
        losses: what does not.
        offsets: of all records that the journals name in segments that are not sealed, by segment, of those that do not
            count, too.
    """

    manifest: Manifest
    journals: tuple[JournalScan, ...]
    is_tidy: bool
    segments: dict[int, Segment]
    lost_segments: tuple[int, ...]
    unnamed: tuple[FileName, ...]
    foreign: tuple[str, ...]
    next_segment: int
    nodes: NodeRows
    records: RecordRows
    ends: EndRows
    wall_us: int
    losses: Losses
    offsets: dict[int, list[int]]

    @property
    def last_sequence(self) -> int:
        return max((scan.last_sequence for scan in self.journals), default=0)


@dataclass
class _Frames:
    found: list[tuple[FrameHead, bytes]] = field(default_factory=list)

    def take(self, head: FrameHead, payload: memoryview) -> None:
        self.found.append((head, bytes(payload)))


def own_manifest(files: Files, spec: ModelSpec | None) -> Manifest | None:
    """The manifest of a directory; None if it is empty, or was left while it was being made.

    Raises:
        SsdDirectoryError: it is none, is of another model than `spec` or a newer format, or cannot be read.
    """
    try:
        names = files.names()
        manifest = read_manifest(files) if MANIFEST in names else None
    except (OSError, DeadlineError) as error:
        raise SsdDirectoryError(f"{files.directory} cannot be read: {error}") from error
    if manifest is None:
        foreign = sorted(name for name in names if name not in (MANIFEST, LOCK) and parse_name(name) is None)
        if foreign:
            raise SsdDirectoryError(
                f"{files.directory} holds files of others ({', '.join(map(repr, foreign[:_NAMES_SHOWN]))}); give the "
                "store an empty directory"
            )
        if any(found is not None and not found.is_journal for found in map(parse_name, names)):
            raise SsdDirectoryError(
                f"the manifest of {files.directory} is missing or damaged, so nothing says what its segments are; "
                "restore it or empty the directory"
            )
        return None
    if spec is not None and manifest.spec.fingerprint != spec.fingerprint:
        raise SsdDirectoryError(
            f"{files.directory} is of model {manifest.spec.model!r}, fingerprint {manifest.spec.fingerprint.hex()}, "
            f"not of {spec.model!r}, fingerprint {spec.fingerprint.hex()}; give each model a directory of its own"
        )
    return manifest


def find(
    files: Files,
    manifest: Manifest,
    progress: Callable[[int, int], None] | None = None,
    *,
    is_alone: bool = True,
) -> Finding:
    """Read the journals, look for the segments that they name, and work out what counts.

    Args:
        progress: called with bytes done and bytes in all of the journal that is being read.
        is_alone: as `recover`.

    Raises:
        SsdDirectoryError: it cannot be read, or it has segments and no journal.
    """
    try:
        return _find(files, manifest, progress, is_alone=is_alone)
    except (OSError, DeadlineError) as error:
        raise SsdDirectoryError(f"{files.directory} cannot be read: {error}") from error


def _find(files: Files, manifest: Manifest, progress: Callable[[int, int], None] | None, *, is_alone: bool) -> Finding:
    parsed = {name: parse_name(name) for name in files.names() if name not in (MANIFEST, LOCK)}
    own = [name for name in parsed.values() if name is not None]
    journal_names = sorted((name for name in own if name.is_journal), key=lambda name: -name.number)
    segment_names = {(name.number, name.nonce): name for name in own if not name.is_journal}
    if segment_names and not journal_names:
        raise SsdDirectoryError(
            f"{files.directory} has segments but no journal that says what they hold; restore it or empty the directory"
        )
    tables, scans, wall_us = _read_journals(files, manifest, journal_names, progress)
    segments: dict[int, Segment] = {}
    lost = []
    for number, (nonce, record_class) in sorted(tables.segments.items()):
        name = segment_names.pop((number, nonce), None)
        layout = _layout(manifest.spec, record_class)
        segment = None
        if name is not None and layout is not None:
            segment = find_segment(files, name, layout, manifest.directory_id)
        if segment is None:
            lost.append(number)
        else:
            segments[number] = segment
    nodes, records, ends, losses = recover(tables, manifest.spec, segments, is_alone=is_alone)
    numbers = [name.number + 1 for name in own if not name.is_journal]
    return Finding(
        manifest=manifest,
        journals=scans,
        is_tidy=len(scans) == 1 and scans[0].snapshot_sequence > 0,
        segments=segments,
        lost_segments=tuple(lost),
        unnamed=tuple(segment_names.values()),
        foreign=tuple(sorted(name for name, found in parsed.items() if found is None)),
        next_segment=max([1, *numbers, *(scan.next_segment for scan in scans), *(n + 1 for n in tables.segments)]),
        nodes=nodes,
        records=records,
        ends=ends,
        wall_us=wall_us,
        losses=losses,
        offsets=_offsets(tables, segments),
    )


def _read_journals(
    files: Files,
    manifest: Manifest,
    names: list[FileName],
    progress: Callable[[int, int], None] | None,
) -> tuple[Tables, tuple[JournalScan, ...], int]:
    """The rows that count of all journals, and the latest wall clock of a frame.

    The newest that is complete replaces what the others say up to the end of its snapshot. What was appended to another
    one later counts: so it does not matter at which step a rewriting was given up.
    """
    base = 0
    scans: list[JournalScan] = []
    parts: list[tuple[JournalScan, list[tuple[FrameHead, bytes]]]] = []
    for name in names:
        frames = _Frames()
        scan = scan_journal(files, name, manifest.directory_id, frames.take, progress)
        scans.append(scan)
        parts.append((scan, frames.found))
        base = base or scan.snapshot_sequence
    counting = [
        (head, payload)
        for scan, found in parts
        for head, payload in found
        if scan.snapshot_sequence == base or (head.sequence > base and (head.kind is FrameKind.BATCH or not base))
    ]
    counting.sort(key=lambda each: each[0].sequence)
    collector = TableCollector()
    for head, payload in counting:
        collector.add(memoryview(payload), head.table_begins(), head.counts, head.sequence)
    wall_us = max((head.wall_us for _, found in parts for head, _ in found), default=0)
    return collector.tables(), tuple(scans), wall_us


def _layout(spec: ModelSpec, record_class: tuple[int, int, int, int]) -> RecordLayout | None:
    """The layout of a class; None if the spec has none such."""
    group, span, start, stop = record_class
    if group >= len(spec.groups) or span >= len(spec.spans[group]) or stop > spec.groups[group].unit_count:
        return None
    try:
        return record_layout(spec, group, span, UnitRange(start, stop))
    except KVStoreError:
        return None


def _offsets(tables: Tables, segments: Mapping[int, Segment]) -> dict[int, list[int]]:
    offsets = {}
    for number, segment in segments.items():
        if not segment.tail_bytes:
            is_its = (tables.record_segments == number) & (tables.record_nonces == segment.name.nonce)
            offsets[number] = np.unique(tables.records["offset"][is_its]).tolist()
    return offsets
