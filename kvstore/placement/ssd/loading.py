"""Records on their way from the drives into host memory, and holding them in place meanwhile."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, LoadFailedError
from kvstore.placement.shelf import ShelfHold, ShelfLoad
from kvstore.placement.ssd.drive import NO_FILES
from kvstore.placement.ssd.places import drives_of, places_of, segments_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvstore._native import HeldRows
    from kvstore.abc.files import FileBatch
    from kvstore.placement.ssd.drive import Drive
    from kvstore.pool.path import NodePath
    from kvstore.pool.rows import Rows

CANCEL_SLICE_S = 5.0
"""How long one wait for what a drive has begun takes; there is another one until all of it has ended."""


class _Reads:
    """What was asked of one drive at once.

    Attributes:
        positions: of the records in the order asked for, ascending.
    """

    def __init__(self, drive: Drive, positions: npt.NDArray[np.int64], batch: FileBatch) -> None:
        self.drive = drive
        self.positions = positions
        self._batch = batch
        self._has_ended = np.zeros(len(positions), np.bool_)
        self._is_told = np.zeros(len(positions), np.bool_)

    def wait_first(self, count: int, deadline: Deadline) -> npt.NDArray[np.int64]:
        """Block until the first `count` reads have ended; the numbers of all that have and were not told before.

        Raises:
            DeadlineError: they have not, whatever else has. What has ended is told by the next call.
        """
        while missing := count - int(self._has_ended[:count].sum()):
            ended = self._batch.wait(int(self._has_ended.sum()) + missing, deadline)
            self._has_ended[ended] = True
            if not self._has_ended[:count].all():
                deadline.check("reads of records that are needed first")
        told = np.flatnonzero(self._has_ended & ~self._is_told)
        self._is_told[told] = True
        return told

    def errors(self) -> dict[int, OSError]:
        return dict(self._batch.errors())

    def stop(self) -> None:
        self._batch.cancel()

    def wait_ended(self, deadline: Deadline | None) -> None:
        """A drive that hangs still owns the memory: without a deadline there is no way but to wait."""
        while True:
            slice_ = Deadline.after(CANCEL_SLICE_S)
            try:
                self._batch.wait(len(self.positions), slice_ if deadline is None else slice_.earlier(deadline))
                return
            except DeadlineError:
                if deadline is not None and deadline.has_passed:
                    raise


class SsdLoad(ShelfLoad):
    """Reads of one load, on all drives at once. Made by `SsdHold.load`.

    Args:
        slots: of the records, in the order asked for, `[n, 3]`.
        arrived: told of the bytes that have arrived.
        failed: told of each position that failed, with the error.
    """

    def __init__(
        self,
        drives: Sequence[Drive],
        slots: npt.NDArray[np.uint64],
        addresses: npt.NDArray[np.uint64],
        arrived: Callable[[int], None],
        failed: Callable[[int, OSError], None],
    ) -> None:
        self._slots = slots
        self._arrived = arrived
        self._tell_failed = failed
        self._lock = threading.Lock()
        self._failed: set[int] = set()
        self._parts: list[_Reads] = []
        places = places_of(slots)
        numbers = drives_of(slots)
        try:
            for drive in drives:
                own = np.flatnonzero(numbers == drive.number)
                if own.size:
                    self._begin(drive, own, places, addresses)
        except BaseException:
            self.cancel()  # nobody else knows what the drives before have begun
            raise

    def _begin(
        self,
        drive: Drive,
        positions: npt.NDArray[np.int64],
        places: npt.NDArray[np.uint64],
        addresses: npt.NDArray[np.uint64],
    ) -> None:
        """Ask a drive; if one segment is not there, for the others."""
        try:
            batch = drive.directory.read(
                np.ascontiguousarray(places[positions]), np.ascontiguousarray(addresses[positions])
            )
            self._parts.append(_Reads(drive, positions, batch))
        except OSError as error:
            if error.errno in NO_FILES:
                # Nothing is wrong with what lies there.
                self.cancel()
                raise LoadFailedError(
                    f"the SSD tier could not open a segment: {error}; raise the limit of open files (ulimit -n)"
                ) from error
            segments = segments_of(self._slots[positions])
            numbers = np.unique(segments)
            if len(numbers) > 1:
                for number in numbers:
                    self._begin(drive, positions[segments == number], places, addresses)
                return
            for position in positions.tolist():
                self._fail(position, error)

    def _fail(self, position: int, error: OSError) -> None:
        if position not in self._failed:
            self._failed.add(position)
            if error.errno != errno.ECANCELED:
                self._tell_failed(position, error)

    def wait(self, count: int, deadline: Deadline) -> Sequence[int]:
        for reads in self._parts:
            first = int(np.searchsorted(reads.positions, count))
            if first:
                self._settle(reads, first, deadline)
        with self._lock:
            return sorted(position for position in self._failed if position < count)

    def _settle(self, reads: _Reads, first: int, deadline: Deadline) -> None:
        new = reads.wait_first(first, deadline)
        if not new.size:
            return
        errors = reads.errors()
        with self._lock:
            for number in new.tolist():
                if number in errors:
                    self._fail(int(reads.positions[number]), errors[number])
        good = [number for number in new.tolist() if number not in errors]
        self._arrived(int(self._slots[reads.positions[good], 2].sum()))

    def cancel(self) -> None:
        self.end(None)

    def end(self, deadline: Deadline | None) -> None:
        """As `cancel`, no longer than until a deadline. Raises `DeadlineError`: something still moves."""
        for reads in self._parts:
            reads.stop()
        for reads in self._parts:
            reads.wait_ended(deadline)


class SsdHold(ShelfHold):
    """Records whose segments stay until `release`. Made by `SsdShelf.hold`.

    Args:
        make_load: begins to load the records of these numbers.
        let_go: ends the hold.
    """

    def __init__(
        self,
        path: NodePath,
        salt: bytes,
        held: HeldRows,
        rows: Rows,
        make_load: Callable[[SsdHold, npt.NDArray[np.int64], npt.NDArray[np.uint64]], SsdLoad],
        let_go: Callable[[SsdHold], None],
    ) -> None:
        self.path = path
        self.salt = salt
        self.rows = rows
        self.held = held
        self._make_load = make_load
        self._let_go = let_go
        self._lock = threading.Lock()
        self._loads: list[SsdLoad] = []
        self._is_released = False

    def load(self, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> SsdLoad:
        with self._lock:
            load = self._make_load(self, np.asarray(numbers, np.int64), np.asarray(addresses, np.uint64))
            self._loads.append(load)
            return load

    def end_loads(self, deadline: Deadline | None = None) -> None:
        """Cancel what still runs. Raises `DeadlineError`: it still moves then."""
        if not self._lock.acquire(timeout=-1 if deadline is None else deadline.remaining_s()):
            raise DeadlineError("a load from the SSD tier does not begin")
        try:
            for load in self._loads:
                load.end(deadline)
            self._loads.clear()
        finally:
            self._lock.release()

    def release(self) -> None:
        with self._lock:
            if self._is_released:
                return
            self._is_released = True
        self.end_loads()
        self._let_go(self)
