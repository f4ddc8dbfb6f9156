"""Between a caller's memory and the records of objects: one native copy for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import copy_rows, copy_rows_crc32c
from kvstore.record.threads import copy_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.foreign.regions import Region
    from kvstore.record import RecordLayout

    Places = Sequence[tuple[int, int]]
    """Chunk of the object, and address of its record."""

_CHECKSUM_BYTES = 4


def runs_of(regions: Sequence[Region], start: int, size_bytes: int) -> list[tuple[int, int]]:
    """Where a part of an object lies in the caller's memory: addresses and bytes, in order."""
    runs = []
    for address, region_bytes in regions:
        if start < region_bytes:
            run_bytes = min(region_bytes - start, size_bytes)
            runs.append((address + start, run_bytes))
            size_bytes -= run_bytes
            if not size_bytes:
                return runs
            start = 0
        else:
            start -= region_bytes
    return runs


def copy_in(objects: Sequence[tuple[Sequence[Region], int, Places]], layout: RecordLayout) -> None:
    """Copy objects into records and checksum these.

    Args:
        objects: memory, bytes, and the records that are filled.
        layout: of the records.
    """
    chunk_bytes = layout.pieces[0].size_bytes
    piece, checksum = layout.pieces[0].offset, layout.checksum_offset
    zeros = np.zeros(0, np.uint8)
    entries: list[tuple[int, int, int, int, int, int, int]] = []
    total_bytes = 0
    for regions, size_bytes, places in objects:
        for chunk, address in places:
            held_bytes = min(chunk_bytes, size_bytes - chunk * chunk_bytes)
            to, column = address + piece, address + checksum
            for source, run_bytes in runs_of(regions, chunk * chunk_bytes, held_bytes):
                entries.append((to, source, 1, run_bytes, run_bytes, run_bytes, column))
                to += run_bytes
            if held_bytes < chunk_bytes:
                padding = chunk_bytes - held_bytes
                if not zeros.size:
                    zeros = np.zeros(chunk_bytes, np.uint8)
                entries.append((to, zeros.ctypes.data, 1, padding, padding, padding, column))
            total_bytes += chunk_bytes
    if entries:
        copy_rows_crc32c(np.array(entries, np.uint64), threads=copy_threads(total_bytes))


def copy_out(
    objects: Sequence[tuple[Sequence[Region], int, Places]], layout: RecordLayout, *, verify: bool
) -> list[bool]:
    """Copy objects out of their records; which of them are sound, as far as that was looked at.

    Args:
        objects: memory, bytes, and all records of each.
        verify: compare each record's checksum with what was copied.
    """
    chunk_bytes = layout.pieces[0].size_bytes
    piece, checksum = layout.pieces[0].offset, layout.checksum_offset
    count = sum(len(places) for _, _, places in objects)
    found: npt.NDArray[np.uint32] = np.empty(count, np.uint32)
    column = found.ctypes.data
    entries: list[tuple[int, ...]] = []
    padded: list[tuple[int, int]] = []
    total_bytes = 0
    for regions, size_bytes, places in objects:
        for chunk, address in places:
            held_bytes = min(chunk_bytes, size_bytes - chunk * chunk_bytes)
            source = address + piece
            for to, run_bytes in runs_of(regions, chunk * chunk_bytes, held_bytes):
                entries.append((to, source, 1, run_bytes, run_bytes, run_bytes, column))
                source += run_bytes
            if held_bytes < chunk_bytes and verify:
                padded.append((len(entries), chunk_bytes - held_bytes))
                entries.append((0, source, 1, padded[-1][1], padded[-1][1], padded[-1][1], column))
            column += _CHECKSUM_BYTES
            total_bytes += held_bytes
    if not entries:
        return [True] * len(objects)
    plan = np.array(entries, np.uint64)
    threads = copy_threads(total_bytes)
    if not verify:
        copy_rows(np.ascontiguousarray(plan[:, :6]), threads=threads)
        return [True] * len(objects)
    # What stands behind an object's end counts in its checksum; it is copied to where nobody looks.
    unread = np.empty(sum(size for _, size in padded), np.uint8)
    at = unread.ctypes.data
    for number, size_bytes in padded:
        plan[number, 0] = at
        at += size_bytes
    copy_rows_crc32c(plan, threads=threads)
    return _as_recorded(objects, found, checksum)


def _as_recorded(
    objects: Sequence[tuple[Sequence[Region], int, Places]], found: npt.NDArray[np.uint32], checksum: int
) -> list[bool]:
    recorded = np.empty_like(found)
    addresses = np.array([address for _, _, places in objects for _, address in places], np.uint64)
    plan = np.empty((len(found), 6), np.uint64)
    plan[:, 0] = recorded.ctypes.data + _CHECKSUM_BYTES * np.arange(len(found), dtype=np.uint64)
    plan[:, 1] = addresses + np.uint64(checksum)
    plan[:, 2] = 1
    plan[:, 3:] = _CHECKSUM_BYTES
    copy_rows(plan)
    is_sound = recorded == found
    if is_sound.all():
        return [True] * len(objects)
    ends = np.cumsum([len(places) for _, _, places in objects])
    return [bool(each.all()) for each in np.split(is_sound, ends[:-1])]
