"""A directory of an SSD tier, as `kvstore inspect` and `kvstore verify` see it: read-only."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.cli.printing import print_table
from kvstore.errors import SsdDirectoryError
from kvstore.tiers.ssd.direct_files import DirectFiles
from kvstore.tiers.ssd.finding import Finding, find, own_manifest
from kvstore.tiers.ssd.manifest import DIRECTORY_VERSION, Manifest
from kvstore.tiers.ssd.rows import SEGMENT, SLOT_BYTES
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvstore.tiers.ssd.segment import Segment


@contextmanager
def opened_files(path: Path) -> Iterator[DirectFiles]:
    """The files of a directory.

    Raises:
        SsdDirectoryError: it cannot be opened.
    """
    try:
        files = DirectFiles(str(path))
    except OSError as error:
        raise SsdDirectoryError(f"{path} cannot be opened: {error.strerror or error}") from error
    try:
        yield files
    finally:
        files.close()


def manifest_of(files: DirectFiles) -> Manifest:
    """What the directory is of.

    Raises:
        SsdDirectoryError: it is no directory of an SSD tier.
    """
    manifest = own_manifest(files, None)
    if manifest is None:
        raise SsdDirectoryError(f"{files.directory} is no directory of an SSD tier: it has no manifest")
    return manifest


def describe_directory(path: Path) -> dict[str, Any]:
    """What lies in a directory, as plain values.

    Raises:
        SsdDirectoryError: it is none of an SSD tier, or cannot be read.
    """
    with opened_files(path) as files:
        manifest = manifest_of(files)
        # It may be one of several: what hangs on records of the others counts.
        finding = find(files, manifest, is_alone=False)
        return {
            "directory": str(path),
            "format_version": DIRECTORY_VERSION,
            "directory_id": manifest.directory_id.hex(),
            "model": manifest.spec.model,
            "fingerprint": manifest.spec.fingerprint.hex(),
            "nodes": len(finding.nodes),
            "records": len(finding.records),
            "record_bytes": int(finding.records.place[:, SLOT_BYTES].sum()),
            "salts": len({salt for _, salt in finding.nodes.roots}),
            "not_counted": asdict(finding.losses),
            "journals": [
                {
                    "name": str(scan.name),
                    "size_bytes": scan.size_bytes,
                    "frames": scan.frames,
                    "rows": scan.rows,
                    "damaged_pages": scan.damaged_pages,
                    "is_complete": scan.snapshot_sequence > 0,
                }
                for scan in finding.journals
            ],
            "segments": [_describe_segment(finding, segment) for _, segment in sorted(finding.segments.items())],
            "lost_segments": list(finding.lost_segments),
            "unnamed_segments": [str(name) for name in finding.unnamed],
            "files_of_others": list(finding.foreign),
        }


def _describe_segment(finding: Finding, segment: Segment) -> dict[str, Any]:
    spec = finding.manifest.spec
    group, span, start, stop = segment.record_class
    lives = finding.records.place[:, SEGMENT] == segment.name.number
    return {
        "name": str(segment.name),
        "group": spec.groups[group].name,
        "span": span,
        "units": {"start": start, "stop": stop, "count": spec.groups[group].unit_count},
        "size_bytes": segment.size_bytes,
        "is_sealed": segment.tail_bytes > 0,
        "records": int(np.count_nonzero(lives)),
        "record_bytes": int(finding.records.place[lives, SLOT_BYTES].sum()),
    }


def print_directory(document: dict[str, Any]) -> None:
    """Tables for people."""
    lost = document["not_counted"]
    summary = {
        "directory": document["directory"],
        "format version": str(document["format_version"]),
        "model": f"{document['model']}, fingerprint {document['fingerprint']}",
        "records": f"{document['records']} of {document['nodes']} nodes under {document['salts']} salts, "
        f"{format_bytes(document['record_bytes'])}; not verified, see kvstore verify",
        "not counted": ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lost.items() if count)
        or "none",
        "lost segments": ", ".join(map(str, document["lost_segments"])) or "none",
        "segments without records": ", ".join(document["unnamed_segments"]) or "none",
        "files of others": ", ".join(document["files_of_others"]) or "none",
    }
    print_table("directory of an SSD tier", ("field", "value"), list(summary.items()))
    print_table(
        "journals",
        ("name", "size", "batches", "rows", "damaged pages", "complete"),
        [
            (
                each["name"],
                format_bytes(each["size_bytes"]),
                str(each["frames"]),
                str(each["rows"]),
                str(each["damaged_pages"]),
                "yes" if each["is_complete"] else "no",
            )
            for each in document["journals"]
        ],
    )
    print_table(
        "segments",
        ("name", "group", "span", "units", "size", "sealed", "records", "live"),
        [
            (
                each["name"],
                each["group"],
                str(each["span"]),
                f"{each['units']['start']} to {each['units']['stop']} of {each['units']['count']}",
                format_bytes(each["size_bytes"]),
                "yes" if each["is_sealed"] else "no",
                str(each["records"]),
                f"{each['record_bytes'] / max(1, each['size_bytes']):.0%}",
            )
            for each in document["segments"]
        ],
    )
