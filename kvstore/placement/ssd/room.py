"""Room on a drive: dead segments go, half-dead ones are cleaned, and what was used longest ago is dropped.

Cleaning a segment writes what lives in it anew. Only segments of which at least half is dead are cleaned, so it never
writes more than it frees, and no byte is freed twice: all that is written stays below twice what was kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError
from kvstore.keys import KEY_BYTES
from kvstore.limits import FILE_ALIGN_BYTES, KIB, MIB, SEGMENTS_MAX, SSD_APPEND_ROWS_MAX, SSD_CLEAN_BYTES
from kvstore.placement.ssd.places import DRIVE_MASK, WHOLE_INDEX, checksums_of, segment_index, slots_of
from kvstore.placement.ssd.rows import part, unpack
from kvstore.pool.rows import SLOT, SLOT_BYTES
from kvstore.tiers.ssd.rows import EndRows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvstore.abc.files import FileBatch
    from kvstore.placement.ssd.drive import Drive
    from kvstore.placement.ssd.keeping import Keeping
    from kvstore.placement.ssd.stock import Stock
    from kvstore.tiers.ssd.directory import SegmentUsage
    from kvstore.tiers.ssd.rows import NodeRows, RecordRows

JOURNAL_BYTES_PER_RECORD = 256
"""Journal of a record and its node, at most, but for long tails."""
APPEND_BYTES = 32 * KIB
"""Framing of a batch in the journal, padding included, and as much again for its schema."""
CLASS_BYTES = 32 * KIB
"""Head and footer of a segment that a batch may begin or end."""
JOURNAL_SLACK_BYTES_MAX = 1 * MIB
"""A journal that is no larger than twice what it must be, and this, is left as it is."""
STEPS_MAX = 10_000
"""Segments removed, cleaned and evictions for one batch: more means that something does not go on."""


class Room:
    """Makes room. For the thread that writes alone; takes the stock's lock for what it decides.

    Args:
        write_deadline_s: for each write.
    """

    def __init__(self, stock: Stock, write_deadline_s: float) -> None:
        self._stock = stock
        self._write_deadline_s = write_deadline_s
        self._unsettled: list[tuple[int, Callable[[], bool], npt.NDArray[np.uint8]]] = []
        """Memory that drives (by number) may still read or write, and whether they have ended."""

    def make(self, drive: Drive, record_bytes: int, records: int, classes: int) -> bool:
        """Have room on a drive for a batch of records; False if it cannot be had: what is there is held.

        Raises:
            OSError, DeadlineError: the drive failed meanwhile.
        """
        needed_bytes = record_bytes + records * JOURNAL_BYTES_PER_RECORD + APPEND_BYTES + classes * CLASS_BYTES
        for _ in range(STEPS_MAX):
            lacking_bytes = self._used_bytes(drive) + needed_bytes - drive.limit_bytes
            # Each class may begin a segment, and cleaning takes some.
            has_too_many = len(drive.directory.segments()) + 2 * classes > SEGMENTS_MAX
            if lacking_bytes <= 0 and not has_too_many:
                return True
            if self.remove_dead(drive) or self.rewrite_journal(drive):
                continue
            # What is moved may begin a segment for each that it ends: that helps bytes, not numbers.
            if not has_too_many and self._clean(drive):
                continue
            if not self._evict(max(lacking_bytes, self._segment_bytes(drive) // 4)):
                return False
        return False

    def _used_bytes(self, drive: Drive) -> int:
        """What is used, and what rewriting the journal and cleaning a segment must find free."""
        rewriting_bytes = drive.live_records * JOURNAL_BYTES_PER_RECORD + APPEND_BYTES
        return drive.directory.used_bytes + rewriting_bytes + self._segment_bytes(drive) // 2

    @staticmethod
    def _segment_bytes(drive: Drive) -> int:
        """The largest segment that could have to be cleaned."""
        return max((usage.size_bytes for usage in drive.directory.segments() if usage.is_sealed), default=0)

    def _evict(self, target_bytes: int) -> bool:
        """Drop what was used longest ago; whether there was anything that may be dropped."""
        stock = self._stock
        with stock.lock:
            stock.index.choose(target_bytes)
            freed = stock.index.evict_chosen()
            stock.evicted_records += len(freed)
            stock.freed(freed)
            return len(freed) > 0

    def remove_dead(self, drive: Drive) -> bool:
        """Remove the segments in which nothing lives and nobody reads; whether there were any.

        Raises:
            OSError: one could not be removed.
        """
        with self._stock.lock:
            dead = [
                usage.number
                for usage in drive.directory.segments()
                if usage.is_sealed and not drive.live_bytes.get(usage.number) and not drive.pins.get(usage.number)
            ]
        drive.directory.remove_segments(dead)
        return bool(dead)

    # The journal

    def rewrite_journal(self, drive: Drive) -> bool:
        """Rewrite a journal of which more than half is dead; whether it was."""
        if self._stock.guarded:
            return False  # it would name what is in the index alone
        directory = drive.directory
        least_bytes = max(drive.live_records * JOURNAL_BYTES_PER_RECORD // 2, drive.rewritten_bytes)
        slack_bytes = min(JOURNAL_SLACK_BYTES_MAX, drive.capacity_bytes // 16)
        if directory.journal_bytes <= 2 * least_bytes + slack_bytes:
            return False
        with self._stock.lock:
            survey = self._stock.index.native.survey(DRIVE_MASK, segment_index(drive.number, 0), in_order=True)
            ends = self._stock.ends_of_keys(survey[0][0], with_plain=False)
        nodes, records = unpack(*survey)
        directory.rewrite_journal(nodes, records, Deadline.after(self._write_deadline_s), ends)
        drive.rewritten_bytes = directory.journal_bytes
        drive.has_forgotten = False
        return True

    # Cleaning

    def _clean(self, drive: Drive) -> bool:
        """Move what lives in the deadest segment elsewhere, and remove it; whether there is one that it pays for."""
        self.settle()
        if any(number == drive.number for number, _, _ in self._unsettled):
            return False  # it has not even answered what it was asked before
        usage = self._deadest(drive)
        if usage is None:
            return False
        with self._stock.lock:
            survey = self._stock.index.native.survey(WHOLE_INDEX, segment_index(drive.number, usage.number))
        nodes, records = unpack(*survey)
        slots = survey[1][0][:, SLOT : SLOT_BYTES + 1]
        ends = np.cumsum(slots[:, 2].astype(np.int64))
        pieces = (ends - slots[:, 2].astype(np.int64)) // SSD_CLEAN_BYTES
        for piece in np.unique(pieces).tolist():
            self._move_all(drive, nodes, records, slots, np.flatnonzero(pieces == piece))
        self.remove_dead(drive)
        return True

    def settle(self) -> None:
        """Let go of memory in which nothing moves any more."""
        self._unsettled = [each for each in self._unsettled if not each[1]()]

    @property
    def has_settled(self) -> bool:
        """Whether no memory is left in which something may move."""
        return not self._unsettled

    def _deadest(self, drive: Drive) -> SegmentUsage | None:
        """The sealed segment of which the largest part is dead, if that is at least half and it can be moved."""
        with self._stock.lock:
            live = dict(drive.live_bytes)
        room_bytes = drive.limit_bytes - drive.directory.used_bytes
        best: SegmentUsage | None = None
        best_part = 0.5
        for usage in drive.directory.segments():
            live_bytes = live.get(usage.number, 0)
            dead_part = 1 - live_bytes / max(1, usage.size_bytes)
            is_movable = live_bytes + APPEND_BYTES + CLASS_BYTES <= room_bytes
            if usage.is_sealed and live_bytes and dead_part >= best_part and is_movable:
                best, best_part = usage, dead_part
        return best

    def _move_all(
        self,
        drive: Drive,
        nodes: NodeRows,
        records: RecordRows,
        slots: npt.NDArray[np.uint64],
        chosen: npt.NDArray[np.int64],
    ) -> None:
        """As `_move`, in so many parts that an append takes the nodes of each."""
        kept_nodes, _ = part(nodes, records, chosen, whole_paths=self._stock.lists_whole_paths)
        if len(kept_nodes) <= SSD_APPEND_ROWS_MAX or len(chosen) == 1:
            self._move(drive, nodes, records, slots, chosen)
            return
        for half in np.array_split(chosen, 2):
            self._move_all(drive, nodes, records, slots, half)

    def _move(
        self,
        drive: Drive,
        nodes: NodeRows,
        records: RecordRows,
        slots: npt.NDArray[np.uint64],
        chosen: npt.NDArray[np.int64],
    ) -> None:
        """Write some records of a segment anew; those that cannot be read leave the index."""
        memory, addresses = _memory(slots[chosen, 2])
        places = np.ascontiguousarray(records.place[chosen])
        batch = drive.directory.read(places, addresses)
        try:
            batch.wait(len(chosen), Deadline.after(self._write_deadline_s))
        except DeadlineError:
            batch.cancel()
            self._unsettled.append((drive.number, partial(_has_ended, batch, len(chosen)), memory))
            raise
        is_good = np.ones(len(chosen), np.bool_)
        is_good[list(batch.errors())] = False
        good = chosen[is_good]
        kept_nodes, kept_records = part(nodes, records, good, whole_paths=self._stock.lists_whole_paths)
        deadline = Deadline.after(self._write_deadline_s)
        self.tell_forgotten()
        try:
            placed = drive.directory.append(kept_nodes, kept_records, addresses[is_good], deadline)
        except DeadlineError:
            self._unsettled.append((drive.number, drive.directory.has_settled, memory))
            raise
        after = slots_of(drive.number, placed.place, placed.metadata_crc32c)
        # A record whose header has changed on the disk says something else than it did when it was kept.
        is_same = checksums_of(after) == checksums_of(slots[good])
        bad = np.concatenate((chosen[~is_good], good[~is_same]))
        self._relocate(nodes, records, slots, good[is_same], after[is_same])
        self._condemn(nodes, records, slots, bad)

    def _relocate(
        self,
        nodes: NodeRows,
        records: RecordRows,
        slots: npt.NDArray[np.uint64],
        chosen: npt.NDArray[np.int64],
        after: npt.NDArray[np.uint64],
    ) -> None:
        stock = self._stock
        keys = nodes.keys[records.node[chosen]].tobytes()
        with stock.lock:
            moves = np.concatenate((slots[chosen], after), axis=1)
            is_moved = np.frombuffer(stock.index.native.relocate(keys, moves), np.bool_)
            stock.moved(slots[chosen][is_moved], after[is_moved])
            # What was dropped meanwhile stands behind its dropping in the journal: it is to be dropped once more.
            gone = np.flatnonzero(~is_moved)
            groups = records.name[chosen, 0]
            stock.forget(
                [keys[at * KEY_BYTES : (at + 1) * KEY_BYTES] for at in gone.tolist()],
                [int(groups[at]) in stock.spec.state_groups for at in gone.tolist()],
            )

    def _condemn(
        self, nodes: NodeRows, records: RecordRows, slots: npt.NDArray[np.uint64], bad: npt.NDArray[np.int64]
    ) -> None:
        stock = self._stock
        with stock.lock:
            for number in bad.tolist():
                key = nodes.keys[records.node[number]].tobytes()
                is_state = int(records.name[number, 0]) in stock.spec.state_groups
                node = stock.index.native.find(key)
                if node is not None and stock.index.native.has_slot(node, is_state, *slots[number].tolist()):
                    stock.damaged_records += 1
                    stock.freed(stock.index.condemn(node, is_state=is_state))

    # Journals hear of what was dropped

    def tell_forgotten(self, keepings: Sequence[Keeping] = (), *, begins_records: bool = False) -> None:
        """Give the directories what was dropped; it stands before whatever they are given next.

        And until when nodes are wanted: those of which that has changed, and those of `keepings`, which come next.

        Args:
            begins_records: no records that come with those of `keepings` stand in a journal yet.
        """
        with self._stock.lock:
            if begins_records:
                self._stock.begin_records()
            keys, are_states = self._stock.take_forgotten()
            ends = EndRows.join(
                [self._stock.take_ends(), *(self._stock.ends_with(each.path, each.told()) for each in keepings)]
            )
            self._stock.knows_ends = self._stock.knows_ends or len(ends) > 0
        for drive in self._stock.drives:
            if drive.may_write:
                drive.directory.note_ends(ends, self._stock.clock.wall_us)
                drive.directory.forget(keys, are_states)
                drive.has_forgotten = drive.has_forgotten or bool(keys or len(ends))


def _has_ended(batch: FileBatch, count: int) -> bool:
    try:
        batch.wait(count, Deadline.after(0.0))
    except DeadlineError:
        return False
    return True


def _memory(sizes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint64]]:
    """Memory for slots of these sizes, and where each begins."""
    ends = np.cumsum(sizes, dtype=np.uint64)
    memory = np.zeros(int(ends[-1]) + FILE_ALIGN_BYTES, np.uint8)
    begin = -memory.ctypes.data % FILE_ALIGN_BYTES
    return memory, ends - sizes + np.uint64(memory.ctypes.data + begin)
