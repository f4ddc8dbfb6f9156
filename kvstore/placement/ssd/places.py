"""Where a record lies, as the slot of an index: drive, segment, offset, and the checksum of its metadata.

A segment's number is never used again, so a slot names one record for ever.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore.limits import FILE_ALIGN_BYTES

_DRIVE_SHIFT = np.uint64(48)
_CHECKSUM_SHIFT = np.uint64(32)
_SEGMENT_MASK = np.uint64((1 << 48) - 1)
_OFFSET_MASK = np.uint64((1 << 32) - 1)

WHOLE_INDEX = (1 << 64) - 1
"""Mask of a slot's index under which it names one segment."""
DRIVE_MASK = 0xFFFF << 48
"""Mask of a slot's index under which it names a drive."""


def segment_index(drive: int, segment: int) -> int:
    """What the slots of one segment have as their index."""
    return drive << 48 | segment


def slots_of(
    drive: int, places: npt.NDArray[np.uint64], metadata_crc32c: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint64]:
    """Slots `[n, 3]` of records at these places (segment, offset, slot bytes) of a drive."""
    slots = np.empty_like(places)
    slots[:, 0] = places[:, 0] | np.uint64(drive) << _DRIVE_SHIFT
    slots[:, 1] = places[:, 1] // np.uint64(FILE_ALIGN_BYTES)
    slots[:, 1] |= metadata_crc32c.astype(np.uint64) << _CHECKSUM_SHIFT
    slots[:, 2] = places[:, 2]
    return slots


def drives_of(slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The drive of each slot, `[n]`."""
    return (slots[:, 0] >> _DRIVE_SHIFT).astype(np.int64)


def segments_of(slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The segment of each slot, `[n]`."""
    return slots[:, 0] & _SEGMENT_MASK


def places_of(slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Segment, offset and slot bytes of each, `[n, 3]`."""
    offsets = (slots[:, 1] & _OFFSET_MASK) * np.uint64(FILE_ALIGN_BYTES)
    return np.stack((segments_of(slots), offsets, slots[:, 2]), axis=1)


def checksums_of(slots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Checksums of the records' metadata, `[n]`."""
    return (slots[:, 1] >> _CHECKSUM_SHIFT).astype(np.uint32)
