"""What the shelf has: its index, and where on the drives each record lives."""

from __future__ import annotations

import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvstore.abc import SlotRows
from kvstore.errors import StoreClosedError
from kvstore.events.changes import IS_STATE
from kvstore.keys import KEY_BYTES
from kvstore.limits import SSD_UNSAFE_ENDS_MAX
from kvstore.placement.ends import are_plain, live_longer, packed_keys
from kvstore.placement.ssd.clock import JournalClock
from kvstore.placement.ssd.drive import LOG
from kvstore.placement.ssd.places import (
    DRIVE_MASK,
    WHOLE_INDEX,
    drives_of,
    segment_index,
    segments_of,
)
from kvstore.placement.ssd.rows import pack
from kvstore.pool.index import PrefixIndex
from kvstore.pool.rows import SLOT, SLOT_BYTES
from kvstore.pool.store_limits import StoreLimits
from kvstore.tiers.ssd.rows import EndRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvstore.events import Changes
    from kvstore.placement.ssd.drive import Drive
    from kvstore.pool.path import NodePath
    from kvstore.spec import ModelSpec


class Stock:
    """The index and the drives. Whoever calls holds `lock`; the directories are used without it.

    Attributes:
        index: which records are here; the index of a slot names drive and segment (`kvstore.placement.ssd.places`).
        drives: those that could be opened.
        changed: told when there may be something to do for the thread that writes.
        refused: how often something was not taken, by reason.
        lost_segments, lost_drives: what is to leave the index, by the thread that writes.
        has_chores: whether there may be segments in which nothing lives.
        knows_ends: whether a journal may have rows of ends.
        guarded: how many times something stays on the drives that is in no index (yet).
        clock: by which a journal says when something ends.
        limits: what each salt may take.
        now_us: the latest moment at which somebody asked for what has ended.
    """

    def __init__(
        self,
        spec: ModelSpec,
        drives: Sequence[Drive],
        clock: JournalClock | None = None,
        limits: StoreLimits | None = None,
    ) -> None:
        self.spec = spec
        self.drives = tuple(drives)
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.limits = limits or StoreLimits()
        self.index = PrefixIndex(spec, has_quotas=self.limits.has_quotas)
        self._removed: list[Changes] = []
        self.index.watch("ssd", partial(_note_removed, self._removed))
        self.is_closed = False
        self.refused: Counter[str] = Counter()
        self.kept_bytes = 0
        self.loaded_bytes = 0
        self.evicted_records = 0
        self.damaged_records = 0
        self.expired_records = 0
        self.clock = clock or JournalClock()
        self.now_us = 0
        self.recovered_records = 0
        self.lost_segments: set[int] = set()
        self.lost_drives: set[int] = set()
        self.has_chores = True
        self.knows_ends = False
        self.guarded = 0
        self._forgotten_keys: list[bytes] = []
        self._forgotten_states: list[bool] = []
        self._dropped: set[tuple[bytes, bool]] | None = None
        """What was dropped since records that are being written may stand in a journal; None while none are."""
        self._other_ends: dict[bytes, None] = {}
        self._told_ends: set[bytes] = set()
        """Nodes of whose ends, or dropping, the directories were told and may not have written them yet."""
        self._may_any_end_be_unsafe = False
        self._tells_all_ends = False

    @property
    def lists_whole_paths(self) -> bool:
        """Whether a directory is told all nodes of a path with each record.

        Otherwise a node's ancestors have attention in the same directory, and were told with that.
        """
        return len(self.drives) > 1 or not self.spec.attention_groups

    def check_open(self) -> None:
        if self.is_closed:
            raise StoreClosedError("the SSD tier is closed; open the store again")

    # Coming and going

    def restore(self, *, is_whole: bool = True) -> None:
        """Fill the empty index with what the drives recovered, as far as it hangs together.

        Args:
            is_whole: whether all drives are here. Otherwise what hangs on the others stays where it is, out of the
                index, until they are: it was promised to be there again.
        """
        nodes, (table, digests) = pack([drive.directory.recovered for drive in self.drives])
        taken = self.index.native.restore(self.spec.block_tokens, nodes, table, digests)
        is_taken = np.frombuffer(taken, np.bool_)
        self.add(table[is_taken, SLOT : SLOT_BYTES + 1])
        self.recovered_records = int(is_taken.sum())
        if not is_whole and not is_taken.all():
            self.guard(table[~is_taken, SLOT : SLOT_BYTES + 1])
        ends = EndRows.join([drive.directory.recovered_ends for drive in self.drives])
        self.knows_ends = len(ends) > 0
        self.index.native.restore_ends(ends.keys.tobytes(), self.clock.to_moments(ends.ends_us))
        self.expire(self.clock.moment_us)
        LOG.info(
            "the SSD tier in %s has %d records, and %d that nothing leads to",
            ", ".join(f"{drive.files.directory} ({drive.files.engine})" for drive in self.drives),
            self.recovered_records,
            len(is_taken) - self.recovered_records,
        )

    def add(self, slots: npt.NDArray[np.uint64]) -> None:
        """Records came into the index."""
        drives, segments = drives_of(slots), segments_of(slots)
        for drive in self.drives:
            own = drives == drive.number
            drive.add(segments[own], slots[own, 2])

    def freed(self, slots: SlotRows, *, may_return: bool = False) -> int:
        """Records left the index; their bytes.

        Args:
            may_return: when the tier is opened again: what could not be read may be there then.
        """
        table = slots.table
        drives, segments = drives_of(table), segments_of(table)
        for drive in self.drives:
            own = drives == drive.number
            drive.subtract(segments[own], table[own, 2])
        self.index.tell()
        if may_return:
            # What the journals say of their ends may be there then, too, and is to be overruled.
            self._tells_all_ends = self._tells_all_ends or self.index.native.life_bytes > 0
        else:
            for changes in self._removed:
                self.forget(changes.keys, changes.table[:, IS_STATE].astype(bool).tolist())
        self._removed.clear()
        if len(table):
            self.has_chores = True
            self.changed.notify_all()
        return slots.size_bytes

    def moved(self, before: npt.NDArray[np.uint64], after: npt.NDArray[np.uint64]) -> None:
        """Records lie elsewhere."""
        drives, segments = drives_of(before), segments_of(before)
        for drive in self.drives:
            own = drives == drive.number
            drive.subtract(segments[own], before[own, 2])
        self.add(after)

    def lose(self) -> None:
        """What lay on a lost drive or in a lost segment leaves the index, with all that only it made reachable."""
        ranges = [(DRIVE_MASK, segment_index(number, 0)) for number in self.lost_drives]
        ranges += [(WHOLE_INDEX, index) for index in self.lost_segments]
        self.lost_drives.clear()
        self.lost_segments.clear()
        for mask, value in ranges:
            lost = SlotRows(self.index.native.condemn_all(mask, value))
            self.damaged_records += len(lost)
            self.freed(lost, may_return=True)

    # Time to live

    def expire(self, now_us: int) -> int:
        """Forget what has ended by now; how many records."""
        self.now_us = max(self.now_us, now_us)
        freed = self.index.expire(now_us, even_written=True)
        self.index.native.take_expired()
        self.expired_records += len(freed)
        self.evicted_records += len(freed)
        self.freed(freed)
        return len(freed)

    def prolong(self, path: NodePath, ends: npt.NDArray[np.uint64]) -> None:
        """What is here of a path is wanted until then at least."""
        keys = packed_keys(path)
        before = self.index.native.ends_of(keys)
        self.index.native.prolong(keys, ends)
        is_other = (self.index.native.ends_of(keys) != before).any(axis=1)
        self._other_ends.update({path.key(node): None for node in np.flatnonzero(is_other).tolist()})

    def live_longer(self, path: NodePath, ends: npt.NDArray[np.uint64]) -> bool:
        """Whether something that is here of a path is wanted for longer than is known."""
        return live_longer(ends, self.index.native.ends_of(packed_keys(path)))

    def note_ends(self, path: NodePath) -> None:
        """Until when a path's nodes are wanted has changed: for the journals."""
        self._other_ends.update(dict.fromkeys(path.node_keys))
        self.changed.notify_all()

    def ends_with(self, path: NodePath, ends: npt.NDArray[np.uint64]) -> EndRows:
        """What the journals must know before a path's records are there, which are wanted until `ends`."""
        known = self.index.native.ends_of(packed_keys(path))
        wanted = np.maximum(known, ends)
        is_other = (wanted != known).any(axis=1) & ~(are_plain(wanted) & are_plain(known))
        is_other |= self._tells_all_ends
        keys = np.frombuffer(packed_keys(path), np.uint8).reshape(-1, KEY_BYTES)
        return EndRows(keys[is_other], self.clock.to_wall(wanted[is_other]))

    def take_ends(self) -> EndRows:
        """Of all nodes whose ends have changed, for the directories' journals."""
        return self.ends_of_keys(b"".join(self._take_other_ends()))

    def _take_other_ends(self) -> dict[bytes, None]:
        taken, self._other_ends = self._other_ends, {}
        self._told_ends.update(taken)
        if len(self._told_ends) > SSD_UNSAFE_ENDS_MAX:
            self._told_ends.clear()
            self._may_any_end_be_unsafe = True
        return taken

    def ends_are_written(self) -> None:
        """What the directories were told outlives a crash."""
        self._told_ends.clear()
        self._may_any_end_be_unsafe = False

    @property
    def has_unsafe_ends(self) -> bool:
        """Whether something may have an earlier or a later end after a crash."""
        return bool(self._other_ends or self._told_ends or self._may_any_end_be_unsafe)

    def are_ends_safe(self, path: NodePath) -> bool:
        """Whether all nodes of a path have the same ends after a crash."""
        if self._may_any_end_be_unsafe:
            return False
        return not self.has_unsafe_ends or not any(
            key in self._other_ends or key in self._told_ends for key in path.node_keys
        )

    def ends_of_keys(self, packed: bytes, *, with_plain: bool = True) -> EndRows:
        """Until when nodes are wanted, as the journals have it; those that are here."""
        keys = np.frombuffer(packed, np.uint8).reshape(-1, KEY_BYTES)
        ends = self.index.native.ends_of(packed)
        chosen = (ends != 0).any(axis=1) & (with_plain | ~are_plain(ends))
        return EndRows(keys[chosen], self.clock.to_wall(ends[chosen]))

    # What shall not come back

    def forget(self, keys: Sequence[bytes], are_states: Sequence[bool]) -> None:
        """Note for the journals that these nodes' attention or states were dropped."""
        self._forgotten_keys.extend(keys)
        self._forgotten_states.extend(are_states)
        if self.knows_ends:
            # What comes there again has none of the ends that any journal has.
            self._other_ends.update(dict.fromkeys(keys))
        if self._dropped is not None:
            self._dropped.update(zip(keys, are_states, strict=True))

    @property
    def has_forgotten(self) -> bool:
        """Whether something was dropped, or has another end, of which the directories do not know."""
        return bool(self._forgotten_keys or self._other_ends)

    def begin_records(self) -> None:
        """Records are going to stand in the journals, behind whatever was dropped so far."""
        self._dropped = set()

    def end_records(self) -> None:
        """They are in the index, or given up. Takes the lock itself."""
        with self.lock:
            self._dropped = None

    def has_dropped_of(self, path: NodePath) -> bool:
        """Whether something of a path was dropped since `begin_records`: a journal may have that behind its records."""
        if not self._dropped:
            return False
        keys = path.node_keys
        return (keys[-1], True) in self._dropped or any((key, False) in self._dropped for key in keys)

    def take_forgotten(self) -> tuple[list[bytes], list[bool]]:
        """For the directories' journals."""
        taken = self._forgotten_keys, self._forgotten_states
        self._forgotten_keys, self._forgotten_states = [], []
        return taken

    # Holding

    def pin(self, slots: npt.NDArray[np.uint64]) -> None:
        """The segments of these records stay until `unpin`."""
        for number, segments in self._segments(slots):
            self.drives[number].pin(segments)

    def unpin(self, slots: npt.NDArray[np.uint64]) -> None:
        for number, segments in self._segments(slots):
            if self.drives[number].unpin(segments):
                self.has_chores = True
                self.changed.notify_all()

    def guard(self, slots: npt.NDArray[np.uint64]) -> None:
        """These are in no index (yet): their segments and their rows in the journals stay until `unguard`."""
        self.pin(slots)
        self.guarded += 1

    def unguard(self, slots: npt.NDArray[np.uint64]) -> None:
        """They are in the index, or given up. Takes the lock itself."""
        with self.lock:
            self.guarded -= 1
            self.unpin(slots)

    def _segments(self, slots: npt.NDArray[np.uint64]) -> list[tuple[int, npt.NDArray[np.uint64]]]:
        drives, segments = drives_of(slots), segments_of(slots)
        return [(number, np.unique(segments[drives == number])) for number in np.unique(drives).tolist()]

    def check(self) -> None:
        """Assert that what lives on the drives is what the index says; for tests."""
        self.index.check()
        _, (table, _) = self.index.native.survey(0, 0)
        slots = table[:, SLOT : SLOT_BYTES + 1]
        drives, segments = drives_of(slots), segments_of(slots)
        assert int(slots[:, 2].sum()) == self.index.native.committed_bytes
        for drive in self.drives:
            own = drives == drive.number
            live: Counter[int] = Counter()
            for segment, size in zip(segments[own].tolist(), slots[own, 2].tolist(), strict=True):
                live[segment] += size
            assert live == drive.live_bytes, (live, drive.live_bytes)
            assert drive.live_records == int(own.sum())


def _note_removed(removed: list[Changes], _: str, changes: Changes) -> bool:
    if changes.why is not None:
        removed.append(changes)
    return True
