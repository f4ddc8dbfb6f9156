"""Receiving the pieces of a DATA frame where they belong, and checking them while they are in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import crc32c, crc32c_many
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, PeerGoneError, ProtocolError
from kvstore.transfer.link import SLICE_BYTES, slices

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy.typing as npt

    from kvstore.transfer.incoming import Arriving
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.messages import Exposure

    Checksums = npt.NDArray[np.uint32]


def receive_pieces(arriving: list[Arriving], link: FrameLink, after_slice: Callable[[int], None]) -> list[Checksums]:
    """Receive the pieces in order, straight into their records; the checksums of what arrived.

    Args:
        arriving: checked and reserved pieces, in the order of the table.
        link: where they come from.
        after_slice: called between slices with the bytes received since the last call.

    Raises:
        PeerGoneError: the stream ended or stopped first.
    """
    offsets = [part.target.layout.piece_offsets[part.ids] for part in arriving]
    sizes = [part.target.layout.piece_sizes[part.ids] for part in arriving]
    computed = [np.empty(len(part.ids), np.uint32) for part in arriving]
    pending = _Group()
    for number, part in enumerate(arriving):
        ends = np.cumsum(sizes[number])
        start = 0
        while start < len(part.ids):
            done = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, done + SLICE_BYTES - pending.size_bytes, "right"))
            if stop == start and not pending.size_bytes:
                size_bytes = int(ends[start]) - done
                computed[number][start] = _receive_large(
                    part, int(offsets[number][start]), size_bytes, link, after_slice
                )
                start += 1
                continue
            if stop > start:
                pending.add(part, number, start, stop, offsets[number][start:stop], sizes[number][start:stop])
                start = stop
            if start < len(part.ids):
                pending.receive(link, computed, after_slice)
    pending.receive(link, computed, after_slice)
    return computed


def get_pieces(
    arriving: list[Arriving],
    exposures: Mapping[int, Exposure],
    link: FrameLink,
    after_slice: Callable[[int], None],
) -> list[Checksums]:
    """Get the pieces from memory that the sender has exposed; the checksums of what arrived.

    Raises:
        ProtocolError: a record that was not exposed as a whole.
        PeerGoneError: the exposure has ended, or the peer is gone or stopped.
    """
    computed = []
    for part in arriving:
        layout = part.target.layout
        exposure = exposures.get(part.record)
        if exposure is None or exposure.size_bytes < layout.record_bytes:
            raise ProtocolError(f"pieces of record {part.record} are to be got, but its memory was not exposed")
        starts, sizes = layout.piece_offsets[part.ids], layout.piece_sizes[part.ids]
        for start, stop in _runs(starts, sizes):
            try:
                link.connection.get(
                    exposure.descriptor,
                    start,
                    part.target.memory[start:stop],
                    Deadline.after(link.progress_deadline_s),
                )
            except DeadlineError as error:
                raise PeerGoneError(f"{link.peer_address} let a get wait for {link.progress_deadline_s:g} s") from error
            after_slice(stop - start)
        computed.append(_checksums(part, starts, sizes))
    link.note_received()
    return computed


class _Group:
    """Pieces of up to `SLICE_BYTES` that are received in one call and then checksummed together."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.size_bytes = 0
        self._views: list[memoryview] = []
        self._addresses: list[npt.NDArray[np.int64]] = []
        self._sizes: list[npt.NDArray[np.int64]] = []
        self._places: list[tuple[int, int, int]] = []

    def add(
        self,
        part: Arriving,
        number: int,
        start: int,
        stop: int,
        offsets: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        memory = part.target.memory
        self._views.extend(memory[first:last] for first, last in _runs(offsets, sizes))
        self._addresses.append(offsets + part.target.address)
        self._sizes.append(sizes)
        self._places.append((number, start, stop))
        self.size_bytes += int(sizes.sum())

    def receive(self, link: FrameLink, computed: list[Checksums], after_slice: Callable[[int], None]) -> None:
        if not self._places:
            return
        link.receive_into(self._views)
        addresses = np.concatenate(self._addresses).astype(np.uint64)
        checksums = crc32c_many(addresses, np.concatenate(self._sizes).astype(np.uint64))
        taken = 0
        for number, start, stop in self._places:
            computed[number][start:stop] = checksums[taken : taken + stop - start]
            taken += stop - start
        after_slice(self.size_bytes)
        self._reset()


def _receive_large(
    part: Arriving, offset: int, size_bytes: int, link: FrameLink, after_slice: Callable[[int], None]
) -> int:
    """One piece of more than a slice."""
    checksum = 0
    for views in slices([part.target.memory[offset : offset + size_bytes]]):
        link.receive_into(views)
        for view in views:
            checksum = crc32c(view, checksum)
            after_slice(view.nbytes)
    return checksum


def _checksums(part: Arriving, offsets: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> Checksums:
    return crc32c_many((offsets + part.target.address).astype(np.uint64), sizes.astype(np.uint64))


def _runs(starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(start, stop) of each contiguous run of ranges in this order."""
    stops = starts + sizes
    breaks = np.flatnonzero(starts[1:] != stops[:-1]) + 1
    firsts = np.concatenate(([0], breaks))
    lasts = np.concatenate((breaks, [len(starts)])) - 1
    return list(zip(starts[firsts].tolist(), stops[lasts].tolist(), strict=True))
