"""Opening an SSD tier: its directories, each with the files that move its bytes."""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from kvstore.errors import SsdDirectoryError
from kvstore.limits import SEGMENT_BYTES_MIN, SEGMENT_FRACTION, SSD_SEGMENT_FRACTION_MAX
from kvstore.placement.ssd.drive import LOG, Drive
from kvstore.placement.ssd.options import SsdOptions
from kvstore.placement.ssd.shelf import SsdShelf
from kvstore.tiers.ssd.directory import SsdDirectory

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc.files import Files
    from kvstore.placement.ssd.options import AnySsd, SsdPlace
    from kvstore.pool import StoreLimits
    from kvstore.spec import ModelSpec

_DRIVE_ERRORS = (errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENODEV, errno.ENXIO)
"""What a drive says that has failed or is full: the others go on without it."""


def open_ssd(
    spec: ModelSpec,
    ssd: AnySsd,
    *,
    make_files: Callable[[SsdPlace, SsdOptions], Files] | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: Callable[[], float] = time.time,
    limits: StoreLimits | None = None,
) -> SsdShelf:
    """Open an SSD tier, made where there is none yet. The last part of each path is made if it is missing.

    A drive that has failed is left out if there are others; `ShelfStatistics.trouble` names it.

    Args:
        ssd: `/dir:200GiB`, several of them, or `SsdOptions`.
        make_files: what moves the bytes of a directory; the best engine of this machine by default.
        clock, now, limits: as `SsdShelf` has them.

    Raises:
        ConfigError: no such options. SsdDirectoryError: a directory is another process's, another model's, of a newer
        format, or none can be used.
    """
    options = SsdOptions.of(ssd)
    drives: list[Drive] = []
    left_out: list[str] = []
    try:
        for place in options.places:
            try:
                drives.append(_open_drive(spec, place, options, make_files or _direct_files, len(drives)))
            except SsdDirectoryError as error:
                if not _is_of_drive(error):
                    raise
                left_out.append(f"{place.path}: left out, since it could not be opened: {error}")
                LOG.error("%s", left_out[-1])
        if not drives:
            raise SsdDirectoryError(f"no directory of the SSD tier can be used: {'; '.join(left_out)}")
        return SsdShelf(spec, drives, options, left_out=left_out, clock=clock, now=now, limits=limits)
    except BaseException:
        for drive in drives:
            drive.directory.close()
        raise


def _open_drive(
    spec: ModelSpec,
    place: SsdPlace,
    options: SsdOptions,
    make_files: Callable[[SsdPlace, SsdOptions], Files],
    number: int,
) -> Drive:
    try:
        files = make_files(place, options)
    except OSError as error:
        raise SsdDirectoryError(f"{place.path} cannot be opened: {error}") from error
    try:
        directory = SsdDirectory.open(
            files,
            spec,
            capacity_bytes=place.capacity_bytes,
            segment_bytes=segment_bytes(place.capacity_bytes),
            is_alone=len(options.places) == 1,
        )
    except BaseException:
        files.close()
        raise
    return Drive(number, directory, files, place.capacity_bytes)


def segment_bytes(capacity_bytes: int) -> int:
    """How large segments are: space comes back by whole ones, so a small directory has small ones."""
    least_bytes = min(SEGMENT_BYTES_MIN, int(capacity_bytes * SSD_SEGMENT_FRACTION_MAX))
    return max(least_bytes, int(capacity_bytes * SEGMENT_FRACTION))


def _is_of_drive(error: BaseException) -> bool:
    """Whether it says something about the drive rather than about what the directory is."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _DRIVE_ERRORS


def _direct_files(place: SsdPlace, options: SsdOptions) -> Files:
    from kvstore.tiers.ssd.direct_files import DirectFiles

    if not os.path.isdir(place.path):
        os.mkdir(place.path, 0o700)
    return DirectFiles(place.path, engine=options.engine)
