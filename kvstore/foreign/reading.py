"""Objects out of a pool: what is in memory in one go, what must be loaded a few at a time."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, LeaseGoneError, LoadFailedError, PoolError
from kvstore.foreign.copying import copy_out
from kvstore.foreign.writing import WHOLE_CHUNK
from kvstore.limits import FOREIGN_LOADS_MAX
from kvstore.pool.rows import NODE
from kvstore.record import record_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.clock import Deadline
    from kvstore.foreign.asking import AskedObject
    from kvstore.foreign.objects import ObjectPaths
    from kvstore.foreign.statistics import ForeignCounts
    from kvstore.pool import BaseHold, BasePool, NodePath


class ObjectReader:
    """Finds, holds and copies objects. Any thread.

    Args:
        pool: where they are.
        counts: what is counted.
        verify: check what lies in memory against its checksums.
    """

    def __init__(self, pool: BasePool, counts: ForeignCounts, *, verify: bool) -> None:
        self._pool = pool
        self._counts = counts
        self._verify = verify
        self._layout = record_layout(pool.spec, 0, 0, WHOLE_CHUNK)

    def has(self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths) -> None:
        """Say in `answer` which of some objects are there, in whichever tier."""
        found = self._pool.stored([paths.path(each.name, each.size_bytes) for each in part])
        for each, is_there in zip(part, found, strict=True):
            answer[each.number] = is_there

    def get(self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths, deadline: Deadline) -> None:
        """Copy some objects to where they go, and say in `answer` which of them have come."""
        rest = self._get_together(part, answer, paths)
        width = FOREIGN_LOADS_MAX if self._pool.may_load else max(len(rest), 1)
        for first in range(0, len(rest), width):
            self._get_some(rest[first : first + width], answer, paths, deadline)

    def _get_together(
        self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths
    ) -> Sequence[AskedObject]:
        """Those that are in memory, in one go; returns the others."""
        asked = [paths.path(each.name, each.size_bytes) for each in part]
        hold = self._pool.hold_flat(asked)
        if hold is None:
            return part
        try:
            there = [number for number, places in enumerate(hold.places) if places is not None]
            filled = [(part[number].regions, part[number].size_bytes, hold.places[number] or []) for number in there]
            are_sound = copy_out(filled, self._layout, verify=self._verify)
            hold.check()  # closed meanwhile, its memory is nobody's
            loaded, loaded_bytes = 0, 0
            for number, is_sound in zip(there, are_sound, strict=True):
                each = part[number]
                if is_sound:
                    answer[each.number] = True
                    loaded, loaded_bytes = loaded + 1, loaded_bytes + each.size_bytes
                else:
                    self._counts.missed("damaged")
                    for node, slot in hold.slots_of(number):
                        self._pool.condemn(asked[number].key(node), is_state=False, slot=slot)
            self._counts.count(loaded=loaded, loaded_bytes=loaded_bytes)
        finally:
            hold.release()
        if len(there) == len(part):
            return ()
        return [each for each, places in zip(part, hold.places, strict=True) if places is None]

    def _get_some(
        self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths, deadline: Deadline
    ) -> None:
        with ExitStack() as held:
            holds: list[tuple[AskedObject, BaseHold]] = []
            for each in part:
                reached = self.hold(paths.path(each.name, each.size_bytes), deadline, layered=True)
                if isinstance(reached, str):
                    self._counts.missed(reached)
                else:
                    held.callback(reached.release)
                    holds.append((each, reached))
            self.copy(holds, answer, deadline)

    def hold(self, path: NodePath, deadline: Deadline, *, layered: bool) -> BaseHold | str:
        """A hold on an object, or why it is missed."""
        try:
            return self._pool.hold(path, layered=layered, deadline=deadline)
        except LeaseGoneError as error:
            return _why_gone(error)
        except PoolError:
            return "full"
        except DeadlineError:
            return "late"

    def copy(self, holds: Sequence[tuple[AskedObject, BaseHold]], answer: list[bool], deadline: Deadline) -> None:
        """Copy what is held to where it goes, and say what has come."""
        filled, loaded = [], []
        for each, hold in holds:
            try:
                hold.wait_for(None, deadline)
                arrays, addresses = hold.arrays
            except LeaseGoneError as error:
                self._counts.missed(_why_gone(error))
                continue
            except DeadlineError:
                self._counts.missed("late")
                continue
            chunks = arrays.names.table[:, NODE].tolist()
            filled.append((each.regions, each.size_bytes, list(zip(chunks, addresses.tolist(), strict=True))))
            loaded.append((each, hold))
        are_sound = copy_out(filled, self._layout, verify=self._verify)
        for (each, hold), is_sound in zip(loaded, are_sound, strict=True):
            try:
                hold.check()  # released or expired meanwhile, its slots may have been reused
            except LeaseGoneError:
                self._counts.missed("absent")
                continue
            if is_sound:
                answer[each.number] = True
                self._counts.count(loaded=1, loaded_bytes=each.size_bytes)
            else:
                self._counts.missed("damaged")
                for record in hold.records:
                    self._pool.condemn(hold.path.key(record.name.node), is_state=False, slot=record.slot)


def _why_gone(error: LeaseGoneError) -> str:
    return "damaged" if isinstance(error, LoadFailedError) else "absent"
