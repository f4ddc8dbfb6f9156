"""`kvstore verify`."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from kvstore.cli.ssd_directory import manifest_of, opened_files
from kvstore.errors import SsdDirectoryError
from kvstore.tiers.ssd.directory import SsdDirectory
from kvstore.tiers.ssd.rows import SLOT_BYTES
from kvstore.tiers.ssd.verify import bad_records, repair
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

SHOWN = 24
SOUND, DAMAGED, UNUSABLE = 0, 1, 2
"""Exit statuses."""


def run_verify(directories: Sequence[Path], *, as_json: bool, is_repairing: bool) -> int:
    """Verify and report each directory; the exit status."""
    status = SOUND
    documents = []
    for path in directories:
        try:
            document = verify_directory(path, is_repairing=is_repairing)
        except (SsdDirectoryError, OSError) as error:
            print(f"kvstore verify: {error}", file=sys.stderr)
            documents.append({"directory": str(path), "error": str(error)})
            status = UNUSABLE
            continue
        documents.append(document)
        if not as_json:
            _print(document)
        if not document["is_sound"] and not document["is_repaired"]:
            status = max(status, DAMAGED)
    if as_json:
        print(json.dumps(documents, indent=2))
    return status


def verify_directory(path: Path, *, is_repairing: bool) -> dict[str, Any]:
    """Check every record of a directory; what was found, as plain values.

    Nothing is changed unless it is repairing: then the directory is opened as its owner would, and bad records are
    forgotten.

    Raises:
        SsdDirectoryError: it is none of an SSD tier, cannot be read, or has an owner while repairing.
        OSError: what was found bad cannot be written down.
    """
    with opened_files(path) as files:
        spec = manifest_of(files).spec
        # It may be one of several: what hangs on records of the others is checked, and stays, all the same.
        directory = SsdDirectory.open(files, spec, capacity_bytes=1, is_read_only=not is_repairing, is_alone=False)
        try:
            _, records = directory.recovered
            total_bytes = int(records.place[:, SLOT_BYTES].sum())
            with _progress(str(path), total_bytes) as advance:
                bad = bad_records(directory, spec, advance)
            missing = directory.losses.without_segment
            is_sound = not bad and not directory.damaged_pages and not missing
            is_repaired = is_repairing and not is_sound
            if is_repaired:
                repair(directory, spec, bad)
            return {
                "directory": str(path),
                "model": spec.model,
                "records": len(records),
                "record_bytes": total_bytes,
                "not_counted": asdict(directory.losses),
                "damaged_journal_pages": directory.damaged_pages,
                "bad": [
                    {
                        "key": each.key.hex(),
                        "group": spec.groups[each.name[0]].name,
                        "span": each.name[1],
                        "units": list(each.name[2:]),
                        "segment": each.place[0],
                        "offset": each.place[1],
                        "reason": each.reason,
                    }
                    for each in bad
                ],
                "missing": missing,
                "is_sound": is_sound,
                "is_repaired": is_repaired,
            }
        finally:
            directory.close()


@contextmanager
def _progress(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=total_bytes)
        yield lambda size_bytes: progress.advance(task, size_bytes)


def _print(document: dict[str, Any]) -> None:
    bad = document["bad"]
    found = [f"{len(bad)} bad"] if bad or not document["missing"] else []
    found += [f"{document['missing']} missing"] if document["missing"] else []
    verdict = (
        "sound" if document["is_sound"] else " and ".join(found) + (", forgotten" if document["is_repaired"] else "")
    )
    print(
        f"{document['directory']}: {document['records']} records of {document['model']}, "
        f"{format_bytes(document['record_bytes'])}: {verdict}"
    )
    if document["missing"]:
        print(f"  {document['missing']} records are missing: their segment has gone, was cut, or is another file")
    for name, count in document["not_counted"].items():
        if count and name != "without_segment":
            print(f"  {count} rows of the journal do not count: {name.replace('_', ' ')}")
    if document["damaged_journal_pages"]:
        print(f"  {document['damaged_journal_pages']} pages of the journal are damaged and were skipped")
    for each in bad[:SHOWN]:
        print(
            f"  {each['reason']}: prefix {each['key'][:16]}, group {each['group']}, span {each['span']}, "
            f"segment {each['segment']} at {each['offset']}"
        )
    if len(bad) > SHOWN:
        print(f"  {len(bad) - SHOWN} more; --json shows all")
    if (bad or document["missing"]) and not document["is_repaired"]:
        print("  a store treats them as misses; kvstore verify --repair forgets them")
