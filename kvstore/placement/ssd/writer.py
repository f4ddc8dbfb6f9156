"""The thread that makes records durable: it takes what waits together, and cleans up when nothing does."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, ShelfRefusedError, StoreClosedError
from kvstore.limits import SSD_APPEND_ROWS_MAX, SSD_BUDGET_SAVE_S
from kvstore.placement.ssd.budget import save_state
from kvstore.placement.ssd.drive import NO_FILES
from kvstore.placement.ssd.keeping import Chunk, chunks_of
from kvstore.placement.ssd.places import slots_of
from kvstore.placement.ssd.quota import QuotaShare
from kvstore.placement.ssd.room import Room
from kvstore.placement.ssd.stripes import stripe
from kvstore.tiers.ssd.memory import keep_for_ever
from kvstore.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvstore.handle import Handle
    from kvstore.placement.ssd.budget import WriteBudget
    from kvstore.placement.ssd.drive import Drive
    from kvstore.placement.ssd.keeping import Keeping
    from kvstore.placement.ssd.options import SsdOptions
    from kvstore.placement.ssd.stock import Stock

UNSETTLED_POLL_S = 0.05


class Writer:
    """Owns the only thread that writes to the directories.

    Attributes:
        trouble: a defect of the tier itself that made a batch fail; empty without.
    """

    def __init__(self, stock: Stock, options: SsdOptions, budget: WriteBudget) -> None:
        self.trouble = ""
        self._stock = stock
        self._options = options
        self._budget = budget
        self._room = Room(stock, options.write_deadline_s)
        self._queue: deque[Keeping] = deque()
        self._queued_bytes = 0
        self._ends_wanted: list[Handle[None]] = []
        self._is_closing = False
        self._saved_s = time.monotonic()
        self._spent_bytes = self._written_bytes()
        self._thread = threading.Thread(target=self._run, name="kvstore-ssd", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # For any thread

    def put(self, keeping: Keeping) -> None:
        """Have it written. Under the stock's lock.

        Raises:
            ShelfRefusedError: too much waits, or no more may be written.
        """
        writable = [drive for drive in self._stock.drives if drive.may_write]
        if not writable:
            raise self._no_drive()
        capacity_bytes = sum(drive.capacity_bytes for drive in writable)
        if keeping.size_bytes > capacity_bytes * 3 // 4:
            raise ShelfRefusedError(
                "too large",
                f"{format_bytes(keeping.size_bytes)} are more than three quarters of the "
                f"{format_bytes(capacity_bytes)} that the SSD tier may hold; give it more, or write shorter prompts",
            )
        if len(keeping.path) > SSD_APPEND_ROWS_MAX:
            raise ShelfRefusedError(
                "too large",
                f"a prompt of {len(keeping.path)} blocks is more than the SSD tier takes, {SSD_APPEND_ROWS_MAX}; "
                "use larger blocks",
            )
        if self._queued_bytes and self._queued_bytes + keeping.size_bytes > self._options.queue_bytes:
            raise ShelfRefusedError(
                "queue",
                f"{format_bytes(self._queued_bytes)} wait to be written to the SSD tier, the limit is "
                f"{format_bytes(self._options.queue_bytes)}; the disks are slower than what comes in",
            )
        if not self._budget.allows(self._queued_bytes + keeping.size_bytes):
            raise ShelfRefusedError(
                "budget",
                f"{format_bytes(keeping.size_bytes)} would exceed the "
                f"{format_bytes(self._options.daily_bytes or 0)} that may be written to the SSD tier per day; "
                "raise write_bytes_per_day, or wait",
            )
        self._queue.append(keeping)
        self._queued_bytes += keeping.size_bytes
        self._stock.changed.notify_all()

    def put_ends(self, handle: Handle[None]) -> None:
        """Have all ends written of which the stock knows; it resolves once they outlive a crash. Under the lock."""
        self._ends_wanted.append(handle)
        self._stock.changed.notify_all()

    def close(self, deadline: Deadline) -> None:
        """Finish the batch that is being written; what waits fails. Not under the lock.

        Raises:
            DeadlineError: it does not end; its thread goes on for as long as that takes.
        """
        with self._stock.lock:
            self._is_closing = True
            self._stock.changed.notify_all()
        self._thread.join(deadline.remaining_s())
        if self._thread.is_alive():
            raise DeadlineError("a write to the SSD tier does not end")
        self._room.settle()
        if not self._room.has_settled:
            keep_for_ever(self._room)
            raise DeadlineError("what was begun to clean a segment does not end")

    def _no_drive(self) -> ShelfRefusedError:
        return self._read_only("no directory of the SSD tier can be written to")

    def _read_only(self, what: str) -> ShelfRefusedError:
        why = "; ".join(drive.trouble for drive in self._stock.drives if drive.trouble)
        return ShelfRefusedError("read only", f"{what}: {why}")

    # The thread

    def _run(self) -> None:
        stock = self._stock
        while True:
            with stock.lock:
                while not (self._queue or self._is_closing or self._wants_chores()):
                    stock.changed.wait(SSD_BUDGET_SAVE_S)
                if self._is_closing:
                    break
                batch = self._take()
            if batch:
                self._write_all(batch)
            self._tidy()
        with stock.lock:
            waiting, self._queue = list(self._queue), deque()
        for keeping in waiting:
            self._end(keeping, StoreClosedError("the SSD tier was closed before this was written"))
        self._tidy(is_last=True)

    def _tidy(self, *, is_last: bool = False) -> None:
        try:
            self._do_chores()
            self._settle_budget(is_last=is_last)
        except Exception as error:  # the thread goes on, and says so
            self.trouble = f"cleaning up failed with {type(error).__name__}: {error}"

    def _take(self) -> list[Keeping]:
        """What waits, as much as becomes durable together; at least one."""
        batch: list[Keeping] = []
        total_bytes = nodes = 0
        while self._queue:
            total_bytes += self._queue[0].size_bytes
            nodes += len(self._queue[0].path)
            if batch and (total_bytes > self._options.batch_bytes or nodes > SSD_APPEND_ROWS_MAX):
                break
            batch.append(self._queue.popleft())
        return batch

    def _end(self, keeping: Keeping, error: BaseException | None) -> None:
        with self._stock.lock:
            self._queued_bytes -= keeping.size_bytes
            if isinstance(error, ShelfRefusedError):
                self._stock.refused[error.reason] += 1
        if error is None:
            keeping.handle.resolve(keeping.kept_bytes)
        else:
            keeping.handle.fail(error)

    # Writing

    def _write_all(self, batch: Sequence[Keeping]) -> None:
        """Make all of these durable, or say of each why not."""
        begun: list[Keeping] = []
        share = QuotaShare(self._stock)
        with self._stock.lock:
            for keeping in batch:
                try:
                    keeping.begin(self._stock.index.native)
                    try:
                        share.add(keeping)
                    except BaseException:
                        self._stock.index.native.undo(keeping.writes)
                        raise
                    begun.append(keeping)
                    self._stock.prolong(keeping.path, keeping.ends.table)
                except Exception as error:
                    self._end(keeping, self._named(error))
        failure: BaseException | None = None
        try:
            for chunk in chunks_of(begun, self._options.batch_bytes):
                if self._is_closing and any(keeping.has_committed for keeping in begun):
                    raise StoreClosedError("the SSD tier was closed before all of this was written")
                self._write(chunk)
            self._write_ends(begun)
        except Exception as error:
            failure = self._named(error)
        for keeping in begun:
            try:
                self._finish(keeping, failure)
            except Exception as error:  # one that ends badly must not keep the others from ending
                self._end(keeping, self._named(error))

    def _write_ends(self, keepings: Sequence[Keeping]) -> None:
        """Make durable until when what was there already is wanted, also on drives that have taken no record."""
        others = [keeping for keeping in keepings if not len(keeping.missing)]
        if others:
            self._room.tell_forgotten(others)
        self._sync_ends()

    def _sync_ends(self) -> None:
        with self._stock.lock:
            if not self._stock.has_unsafe_ends:
                return
        for drive in self._stock.drives:
            if drive.may_write and drive.directory.has_rows_to_write:
                try:
                    drive.directory.sync(Deadline.after(self._options.write_deadline_s))
                except (OSError, DeadlineError) as error:
                    self._note(drive, error, {})
                    raise
                drive.has_forgotten = False
        self._note_ends_written()
        with self._stock.lock:
            is_safe = not self._stock.has_unsafe_ends
        if not is_safe and not all(drive.may_write for drive in self._stock.drives):
            raise self._read_only("what a directory of the SSD tier says of ends cannot be overruled")

    def _note_ends_written(self) -> None:
        """A drive that takes nothing any more is still read after a crash, and the shortest of all ends counts."""
        if all(drive.may_write and not drive.directory.has_rows_to_write for drive in self._stock.drives):
            with self._stock.lock:
                self._stock.ends_are_written()

    def _named(self, error: Exception) -> BaseException:
        """An error as the handle gives it. What nobody foresaw must not end the thread, and is not hidden."""
        if isinstance(error, KVStoreError) and not isinstance(error, DeadlineError):
            return error
        if not isinstance(error, (OSError, DeadlineError)):
            self.trouble = f"a batch failed with {type(error).__name__}: {error}"
        refused = ShelfRefusedError("failed", f"the SSD tier could not write: {type(error).__name__}: {error}")
        refused.__cause__ = error
        return refused

    def _finish(self, keeping: Keeping, failure: BaseException | None) -> None:
        stock = self._stock
        with stock.lock:
            native = stock.index.native
            try:
                lacks_some = keeping.plan(native).missing()[0].size > 0
            except ShelfRefusedError as error:
                failure, lacks_some = failure or error, True
            are_ends_safe = stock.are_ends_safe(keeping.path)
            if keeping.has_other_ends:
                stock.note_ends(keeping.path)
            if lacks_some and keeping.ends.last_us <= stock.now_us:
                failure = ShelfRefusedError("ended", "its time to live was over before it was written")
            elif failure is None and lacks_some:
                failure = ShelfRefusedError("damaged", "records before these were lost while they were written")
            elif failure is not None and not lacks_some and are_ends_safe:
                failure = None  # all of it was written before something else failed
            if keeping.has_committed or not len(keeping.missing):
                native.leave(keeping.writes)
                stock.freed(stock.index.let_go(keeping.writes))
            else:
                native.undo(keeping.writes)
        self._end(keeping, failure)

    def _write(self, chunk: Chunk) -> None:
        """Make the records of a chunk durable on whatever drives take them, and enter them into the index."""
        slots = np.zeros((len(chunk), 3), np.uint64)
        sizes = chunk.sizes
        left = np.arange(len(chunk))
        reasons: dict[int, str] = {}
        with ExitStack() as written:
            written.callback(self._stock.end_records)
            self._write_shares(chunk, slots, sizes, left, reasons, written)
            self._commit(chunk, slots)

    def _write_shares(
        self,
        chunk: Chunk,
        slots: npt.NDArray[np.uint64],
        sizes: npt.NDArray[np.int64],
        left: npt.NDArray[np.int64],
        reasons: dict[int, str],
        written: ExitStack,
    ) -> None:
        """Write what is left, elsewhere if a drive fails; what one has taken stays there until `written` is closed."""
        while left.size:
            drives = [drive for drive in self._stock.drives if drive.may_write and drive.number not in reasons]
            if not drives:
                raise self._refused(reasons)
            assigned = stripe(sizes[left], [drive.capacity_bytes for drive in drives])
            shares = [(drive, left[assigned == number]) for number, drive in enumerate(drives)]
            shares = [(drive, share) for drive, share in shares if share.size]
            if not self._have_room(chunk, shares, sizes, reasons):
                continue
            self._room.tell_forgotten(chunk.keepings, begins_records=left.size == len(chunk))
            failed = self._append(chunk, shares, slots, reasons)
            remaining = np.concatenate([np.empty(0, np.int64), *failed])
            taken = slots[np.setdiff1d(left, remaining)]
            if taken.size and remaining.size:
                # No index names these yet: room for the others is not made of them.
                with self._stock.lock:
                    self._stock.guard(taken)
                written.callback(self._stock.unguard, taken)
            left = remaining

    def _refused(self, reasons: dict[int, str]) -> ShelfRefusedError:
        if not reasons:
            return self._no_drive()
        reason = min(reasons.values())
        why = "; ".join(drive.trouble for drive in self._stock.drives if drive.trouble)
        return ShelfRefusedError(
            reason, f"no directory of the SSD tier could take a batch ({reason}){': ' + why if why else ''}"
        )

    def _have_room(
        self,
        chunk: Chunk,
        shares: Sequence[tuple[Drive, npt.NDArray[np.int64]]],
        sizes: npt.NDArray[np.int64],
        reasons: dict[int, str],
    ) -> bool:
        for drive, share in shares:
            try:
                if self._room.make(drive, int(sizes[share].sum()), len(share), chunk.classes):
                    continue
                reasons[drive.number] = "full"
                with self._stock.lock:
                    drive.note_no_room(int(sizes[share].sum()))
            except (OSError, DeadlineError) as error:
                self._note(drive, error, reasons)
            return False
        return True

    def _append(
        self,
        chunk: Chunk,
        shares: Sequence[tuple[Drive, npt.NDArray[np.int64]]],
        slots: npt.NDArray[np.uint64],
        reasons: dict[int, str],
    ) -> list[npt.NDArray[np.int64]]:
        """Write each drive's share, all drives at once; the shares that failed."""
        deadline = Deadline.after(self._options.write_deadline_s)
        whole_paths = self._stock.lists_whole_paths
        errors: dict[int, Exception] = {}

        def append(drive: Drive, share: npt.NDArray[np.int64]) -> None:
            try:
                nodes, records, addresses = chunk.rows(share, whole_paths=whole_paths)
                placed = drive.directory.append(nodes, records, addresses, deadline)
                slots[share] = slots_of(drive.number, placed.place, placed.metadata_crc32c)
            except Exception as error:
                errors[drive.number] = error
                while not drive.directory.has_settled():
                    time.sleep(UNSETTLED_POLL_S)  # its memory is not given back before

        _together([lambda drive=drive, share=share: append(drive, share) for drive, share in shares])  # type: ignore[misc]
        failed = []
        for drive, share in shares:
            error = errors.get(drive.number)
            if error is None:
                drive.has_forgotten = False
                with self._stock.lock:
                    drive.note_written()
            elif isinstance(error, (OSError, DeadlineError)):
                self._note(drive, error, reasons)
                failed.append(share)
            else:
                raise error
        return failed

    def _note(self, drive: Drive, error: OSError | DeadlineError, reasons: dict[int, str]) -> None:
        with self._stock.lock:
            drive.note_write_error(error)
        if not drive.may_write:
            reasons[drive.number] = "read only"
        else:
            number = error.errno if isinstance(error, OSError) else None
            is_full = number in (errno.ENOSPC, errno.EDQUOT)
            reasons[drive.number] = "full" if is_full else "files" if number in NO_FILES else "slow"

    def _commit(self, chunk: Chunk, slots: npt.NDArray[np.uint64]) -> None:
        stock = self._stock
        with stock.lock:
            for owner, keeping in enumerate(chunk.keepings):
                own = chunk.owners == owner
                if not own.any():
                    continue
                if stock.has_dropped_of(keeping.path):
                    continue  # its journal rows may stand before those that say so
                taken = keeping.commit(stock.index, chunk.numbers[own], slots[own])
                stock.add(slots[own][taken])
                stock.kept_bytes += int(slots[own][taken, 2].sum())

    # What else there is to do

    def _wants_chores(self) -> bool:
        stock = self._stock
        return bool(
            stock.lost_drives
            or stock.lost_segments
            or stock.has_forgotten
            or any(drive.has_forgotten and drive.may_write for drive in stock.drives)
            or stock.has_chores
            or self._ends_wanted
        )

    def _do_chores(self) -> None:
        stock = self._stock
        with stock.lock:
            stock.has_chores = False
            stock.lose()
            is_busy = bool(self._queue) and not self._is_closing
            wanted, self._ends_wanted = self._ends_wanted, []
        try:
            self._room.tell_forgotten()
        except Exception as failure:
            for handle in wanted:
                handle.fail(self._named(failure))
            raise
        if wanted:
            self._answer(wanted)
        for drive in stock.drives:
            if not drive.may_write:
                continue
            try:
                if drive.has_forgotten and not is_busy:
                    drive.directory.sync(Deadline.after(self._options.write_deadline_s))
                    drive.has_forgotten = False
                self._room.remove_dead(drive)
                self._room.rewrite_journal(drive)
            except (OSError, DeadlineError) as error:
                with stock.lock:
                    drive.note_write_error(error)
                drive.has_forgotten = False  # what waits in the directory goes with its next batch
        self._note_ends_written()

    def _answer(self, wanted: Sequence[Handle[None]]) -> None:
        """Whether what was told of ends outlives a crash."""
        error: BaseException | None = None
        try:
            self._sync_ends()
        except Exception as failure:
            error = self._named(failure)
        for handle in wanted:
            if error is None:
                handle.resolve(None)
            else:
                handle.fail(error)

    def _written_bytes(self) -> int:
        return sum(drive.directory.written_bytes for drive in self._stock.drives)

    def _settle_budget(self, *, is_last: bool = False) -> None:
        """Count what was written, and save it now and then."""
        written_bytes = self._written_bytes()
        with self._stock.lock:
            self._budget.spend(written_bytes - self._spent_bytes)
        self._spent_bytes = written_bytes
        if not self._budget.is_limited or not (is_last or time.monotonic() >= self._saved_s + SSD_BUDGET_SAVE_S):
            return
        self._saved_s = time.monotonic()
        for drive in self._stock.drives:
            if drive.may_write:
                try:
                    save_state(drive.files, self._budget.state())
                except (OSError, DeadlineError) as error:
                    with self._stock.lock:
                        drive.note_write_error(error)


def _together(calls: Sequence[Callable[[], None]]) -> None:
    """Run calls that raise nothing, each in a thread of its own but for the first."""
    threads: list[threading.Thread] = []
    own = [calls[0]]
    for call in calls[1:]:
        thread = threading.Thread(target=call, name="kvstore-ssd-append", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads: then one after the other
            own.append(call)
        else:
            threads.append(thread)
    for call in own:
        call()
    for thread in threads:
        thread.join()
