"""Records on their way out of an engine's pages into host memory."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import copy_rows_crc32c
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.limits import DEVICE_COPY_DEADLINE_S
from kvstore.placement.shelf import ShelfLoad
from kvstore.pool.rows import GROUP
from kvstore.record import seal_rows
from kvstore.record.copy import CHECKSUM_BYTES
from kvstore.record.threads import copy_threads
from kvstore.tiers.gpu.packing import PagePlaces, packings_of_records
from kvstore.tiers.gpu.page_copies import CopyPart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future

    import numpy.typing as npt

    from kvstore.placement.gpu.page_table import Location
    from kvstore.pool.rows import Rows
    from kvstore.record import RecordLayout
    from kvstore.tiers.gpu.page_copies import PageCopier
    from kvstore.tiers.gpu.pages import Pages

    Numbers = npt.NDArray[np.int64]
    Addresses = npt.NDArray[np.uint64]


class PageLoad(ShelfLoad):
    """Gathers records on the device, brings them to the host, and writes checksums and framing: their first crossing.

    Args:
        locations: of each of `numbers`.
        loaded: told the bytes that have arrived. failed: told why the device did not do what it should.
    """

    def __init__(
        self,
        pages: Pages,
        copier: PageCopier,
        rows: Rows,
        numbers: Numbers,
        locations: Sequence[Location],
        addresses: Addresses,
        loaded: Callable[[int], None],
        failed: Callable[[str], None],
    ) -> None:
        self._pages = pages
        self._copier = copier
        self._rows = rows
        self._numbers = numbers
        self._locations = locations
        self._addresses = addresses
        self._loaded = loaded
        self._failed = failed
        self._changed = threading.Condition()
        self._arrived = 0
        self._has_ended = False
        self._is_cancelled = False
        self._future: Future[None] | None = None

    def begin(self, submit: Callable[[Callable[[], None]], Future[None]]) -> None:
        """For the shelf: let a thread do it."""
        self._future = submit(self._run)

    def _run(self) -> None:
        try:
            marks = {id(mark): mark for location in self._locations if (mark := location.settled()) is not None}
            deadline = Deadline.after(DEVICE_COPY_DEADLINE_S)
            self._copier.out_of_pages(self._parts(), list(marks.values()), deadline)
        except Exception as error:  # what cannot be read is a miss, and a sentence in the statistics
            self._failed(f"{type(error).__name__}: {error}")
        finally:
            self._end()

    def _end(self) -> None:
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def _parts(self) -> Iterator[CopyPart]:
        """Records of one class that follow one another, as many as staging takes."""
        layouts, classes = self._rows.classes
        classes = classes[self._numbers]
        at = 0
        while at < len(self._numbers) and not self._is_cancelled:
            layout = layouts[classes[at]]
            one = packings_of_records(layout, self._pages.shard, 1)
            image_bytes = next(iter(one.values())).image_bytes
            same = classes[at:] == classes[at]
            run = len(same) if same.all() else int(np.argmin(same))
            count = max(1, min(run, self._copier.staging_bytes // image_bytes))
            yield self._part(layout, at, count)
            at += count

    def _part(self, layout: RecordLayout, first: int, count: int) -> CopyPart:
        packings = packings_of_records(layout, self._pages.shard, count)
        image_bytes = next(iter(packings.values())).image_bytes
        group = int(self._rows.table[self._numbers[first], GROUP])
        page_tokens = self._pages.layout.group(group).page_tokens
        capacity = layout.capacity_tokens or 1
        chosen = self._locations[first : first + count]
        places = PagePlaces.join([each.places(page_tokens, capacity) for each in chosen])
        return CopyPart(
            count * image_bytes,
            partial(self._pages.pack, group, packings, places),
            partial(self._arrive, layout, first, count, image_bytes),
        )

    def _arrive(
        self, layout: RecordLayout, first: int, count: int, image_bytes: int, host: npt.NDArray[np.uint8]
    ) -> None:
        """Packed bodies are on the host: copy them into their slots, checksummed on the way, and frame them."""
        members = self._numbers[first : first + count]
        addresses = self._addresses[first : first + count]
        pieces = len(layout.pieces)
        offsets = layout.piece_offsets.astype(np.uint64)
        plan = np.empty((count, pieces, 7), np.uint64)
        images = np.uint64(host.ctypes.data) + np.arange(count, dtype=np.uint64) * np.uint64(image_bytes)
        plan[..., 0] = addresses[:, None] + offsets
        plan[..., 1] = images[:, None] + offsets - np.uint64(layout.header_bytes)
        plan[..., 2] = 1
        plan[..., 3:6] = layout.piece_sizes.astype(np.uint64)[:, None]
        columns = np.uint64(layout.checksum_offset) + CHECKSUM_BYTES * np.arange(pieces, dtype=np.uint64)
        plan[..., 6] = addresses[:, None] + columns
        copy_rows_crc32c(plan.reshape(-1, 7), threads=copy_threads(count * layout.body_bytes))
        digests, fields = self._rows.framing
        seal_rows(layout, np.ascontiguousarray(addresses), digests[members].data, fields[members])
        self._loaded(count * layout.slot_bytes)
        with self._changed:
            self._arrived = first + count
            self._changed.notify_all()

    def wait(self, count: int, deadline: Deadline) -> Sequence[int]:
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_ended or self._arrived >= count, deadline.remaining_s()):
                raise DeadlineError(
                    f"{self._arrived} of the first {count} records have arrived from the engine's pages by the "
                    "deadline; the load goes on"
                )
            return range(min(self._arrived, count), count)

    def cancel(self) -> None:
        self._is_cancelled = True
        if self._future is not None and self._future.cancel():
            self._end()
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended)
