"""Write-behind: what the pool commits is kept on the shelves behind the writer's back."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections import OrderedDict, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, LeaseGoneError, ShelfRefusedError
from kvstore.handle import Handle
from kvstore.limits import KEEP_AGAIN_S, KEEP_QUEUE_MAX, KEPT_KNOWN_MAX
from kvstore.placement.ends import Ends, live_longer
from kvstore.placement.losses import UntoldLosses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import TypeAlias

    import numpy as np
    import numpy.typing as npt

    from kvstore.placement.shelf import Shelf
    from kvstore.pool import Hold, NodePath
    from kvstore.pool.path import RecordPlace
    from kvstore.spec import ChunkGrid, Shard

    WantedKey: TypeAlias = tuple[bytes, Shard, ChunkGrid | None, int | None]

LOG = logging.getLogger("kvstore.placement")

NOT_LOST = frozenset(("sparse", "transient", "ended"))
"""Reasons for which a resume point is not kept by design: `flush` does not speak of them."""


@dataclass(frozen=True)
class KeepStatistics:
    """What was kept on shelves.

    Attributes:
        waiting: resume points that wait to be kept.
        pinned_bytes: records that stay in the pool while they are being kept.
        kept: resume points that were taken by a shelf; `kept_bytes` of them were lacking there.
        dropped: resume points that were not kept, by reason: the shelf's, or `evicted` (from the pool before their
            turn), `queue` (too many waited), `failed`.
    """

    waiting: int = 0
    pinned_bytes: int = 0
    kept: int = 0
    kept_bytes: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """A resume point that is to be kept, and which of the variants that may be there of it.

    Attributes:
        path, shard: whose share of what.
        grid, grids: of which chunk boundaries, as `kvstore.pool.BasePool.hold` takes them; without either, whichever.
    """

    path: NodePath
    shard: Shard
    grid: ChunkGrid | None = None
    grids: Mapping[RecordPlace, bytes] | None = None

    @cached_property
    def key(self) -> WantedKey:
        """What tells it from others."""
        grids = None if self.grids is None else hash(frozenset(self.grids.items()))
        return self.path.key(len(self.path) - 1), self.shard, self.grid, grids


@dataclass(frozen=True)
class _Offer:
    number: int
    wanted: Wanted
    moment: int
    """Of `UntoldLosses`, when it came."""


@dataclass(frozen=True)
class _Answer:
    """What the shelves said of a resume point.

    Attributes:
        lost_records: of all shelves before they were asked: while that stays, they have what they said they have.
        again: when it may be offered again to those that refused it; None: all have it.
    """

    lost_records: int
    again: Deadline | None


@dataclass(frozen=True)
class _Keeping:
    """An offer that shelves are taking; its records are pinned until all of them have."""

    offer: _Offer
    lost_records: int
    hold: Hold
    ends: Ends
    handles: Sequence[tuple[Shelf, Handle[int]]]
    size_bytes: int


class Keeper:
    """One thread offers resume points to the shelves, oldest first. Any thread may call.

    No call but `flush` waits for bytes to move.

    Args:
        hold: holds a resume point in the pool's own tier until it is released, however long that takes; raises
            `LeaseGoneError`.
        ends_of: until when the nodes of a path are wanted there.
        shelves: each is offered everything.
        pinned_bytes_max: what may be pinned at once; a single resume point may be more.
    """

    def __init__(
        self,
        hold: Callable[[Wanted], Hold],
        ends_of: Callable[[NodePath], npt.NDArray[np.uint64]],
        shelves: Sequence[Shelf],
        pinned_bytes_max: int,
    ) -> None:
        self._hold = hold
        self._ends_of = ends_of
        self._ends_lock = threading.RLock()
        self._shelves = tuple(shelves)
        self._pinned_bytes_max = pinned_bytes_max
        self._changed = threading.Condition()
        self._queue: deque[_Offer] = deque()
        self._queued: dict[WantedKey, _Offer] = {}
        self._begun: dict[WantedKey, _Offer | None] = {}
        """What shelves are being asked for, and who came with the same meanwhile: it may have gone in between."""
        self._answers: OrderedDict[WantedKey, _Answer] = OrderedDict()
        self._keeping: list[_Keeping] = []
        self._last_number = 0
        self._busy: dict[int, int] = {}
        """Offers by number that are not over, and the moment (of `_losses`) at which each was last committed."""
        self._pinned_bytes = 0
        self._kept = 0
        self._kept_bytes = 0
        self._dropped: dict[str, int] = {}
        self._losses = UntoldLosses()
        self._is_stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="kvstore-keeper", daemon=True)
        self._thread.start()

    # Offering

    def offer(self, wanted: Wanted, *, is_committed: bool = False, may_live_longer: bool = False) -> None:
        """A resume point is in the pool: keep what the shelves lack of it.

        Args:
            is_committed: just now; who waits for `flush` must not be told what shelves said of it before.
            may_live_longer: than the shelves know, also where they have all of it.
        """
        key = wanted.key
        lost_records = self._lost_records()
        with self._changed:
            if self._is_stopping:
                return
            waiting = self._queued.get(key) or self._begun.get(key)
            if waiting is not None:
                if is_committed:
                    self._busy[waiting.number] = self._losses.moment
                return
            if key in self._begun:
                if not is_committed:
                    return
            elif not may_live_longer and self._is_answered(key, lost_records, is_committed=is_committed):
                return
            offer = _Offer(self._last_number + 1, wanted, self._losses.moment)
            self._last_number = offer.number
            self._busy[offer.number] = offer.moment
            if key in self._begun:
                self._begun[key] = offer
            else:
                self._put(offer)

    def _is_answered(self, key: WantedKey, lost_records: int, *, is_committed: bool) -> bool:
        answer = self._answers.get(key)
        if answer is None:
            return False
        if answer.again is None:
            return answer.lost_records == lost_records
        return not is_committed and not answer.again.has_passed

    def _lost_records(self) -> int:
        return sum(shelf.lost_records for shelf in self._shelves)

    def _put(self, offer: _Offer) -> None:
        """With the lock."""
        self._queue.append(offer)
        self._queued[offer.wanted.key] = offer
        if len(self._queue) > KEEP_QUEUE_MAX:
            dropped = self._queue.popleft()
            del self._queued[dropped.wanted.key]
            self._drop(dropped, "queue")
        os.eventfd_write(self._wake, 1)

    def refuse(self, reason: str) -> None:
        """Count a resume point that by design is not offered."""
        with self._changed:
            self._count_dropped(reason)

    def _drop(self, offer: _Offer, reason: str) -> None:
        """With the lock."""
        self._lose(offer, reason)
        self._over(offer)

    def _over(self, offer: _Offer) -> None:
        """Nobody is asked for it any more, but for who came meanwhile; with the lock."""
        again = self._begun.pop(offer.wanted.key, None)
        if again is not None:
            self._put(again)
        del self._busy[offer.number]
        self._changed.notify_all()

    def _lose(self, offer: _Offer, reason: str) -> None:
        self._count_dropped(reason)
        if reason not in NOT_LOST:
            self._losses.lose(reason, offer.moment, self._busy[offer.number])

    def _count_dropped(self, reason: str) -> None:
        self._dropped[reason] = self._dropped.get(reason, 0) + 1

    # The thread

    def _run(self) -> None:
        while True:
            self._reap()
            with self._changed:
                if self._is_stopping and not self._keeping:
                    return
                may_begin = bool(self._queue) and self._has_room() and not self._is_stopping
                offer = self._queue.popleft() if may_begin else None
                if offer is not None:
                    del self._queued[offer.wanted.key]
                    self._begun[offer.wanted.key] = None
            if offer is None or not self._tried(offer):
                self._wait()

    def _has_room(self) -> bool:
        return not self._pinned_bytes or self._pinned_bytes < self._pinned_bytes_max

    def _tried(self, offer: _Offer) -> bool:
        """As `_begin`, which must not end this thread whatever happens in a tier."""
        try:
            return self._begin(offer)
        except Exception as error:
            if not isinstance(error, KVStoreError):
                LOG.exception("%d tokens could not be kept in other tiers", offer.wanted.path.tokens)
            with self._changed:
                self._drop(offer, "evicted" if isinstance(error, LeaseGoneError) else "failed")
            return True

    def _begin(self, offer: _Offer) -> bool:
        """Have the shelves take it; False if there is no room to pin it now."""
        lost_records = self._lost_records()
        ends = Ends(self._ends_of(offer.wanted.path))
        lacking = [shelf for shelf in self._shelves if not _has(shelf, offer.wanted, ends)]
        if not lacking:
            self._done(offer, lost_records, 0, 0)
            return True
        hold = self._hold(offer.wanted)
        size_bytes = hold.placed.slots.size_bytes
        with self._changed:
            fits = not self._pinned_bytes or self._pinned_bytes + size_bytes <= self._pinned_bytes_max
            if fits:
                self._pinned_bytes += size_bytes
            else:
                again = self._begun.pop(offer.wanted.key)
                if again is not None:
                    self._busy[offer.number] = self._busy.pop(again.number)  # this one's turn is still to come
                self._queue.appendleft(offer)
                self._queued[offer.wanted.key] = offer
        if not fits:
            _release(hold)
            return False
        with self._ends_lock:
            ends.table = self._ends_of(offer.wanted.path)
            handles = [(shelf, _keep(shelf, offer.wanted.path, hold, ends)) for shelf in lacking]
            self._keeping.append(_Keeping(offer, lost_records, hold, ends, handles, size_bytes))
        return True

    @contextmanager
    def changing_ends(self) -> Iterator[None]:
        """While the pool and then the shelves are told other ends: what is being kept gets those of the pool."""
        with self._ends_lock:
            yield

    def note_ends(self) -> None:
        """The pool's ends have changed; inside of `changing_ends`, before the shelves hear of it."""
        for keeping in tuple(self._keeping):
            keeping.ends.table = self._ends_of(keeping.offer.wanted.path)

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for keeping in self._keeping:
            unanswered = next((handle for _, handle in keeping.handles if not handle.done()), None)
            if unanswered is None:
                return  # it has ended since the last look
            poll.register(unanswered.fileno(), select.POLLIN)
        if any(descriptor == self._wake for descriptor, _ in poll.poll()):
            os.eventfd_read(self._wake)

    def _reap(self) -> None:
        """End what all shelves have answered."""
        ended = [each for each in self._keeping if all(handle.done() for _, handle in each.handles)]
        for keeping in ended:
            self._keeping.remove(keeping)
            _release(keeping.hold)
            kept_bytes, refusals = 0, 0
            for shelf, handle in keeping.handles:
                try:
                    kept_bytes += handle.result(0.0)
                except Exception as error:  # whatever a shelf says: the others' and the next ones' turn comes
                    refusals += 1
                    reason = error.reason if isinstance(error, ShelfRefusedError) else "failed"
                    with self._changed:
                        if shelf.is_durable:
                            self._lose(keeping.offer, reason)
                        else:
                            self._count_dropped(reason)
            with self._changed:
                self._pinned_bytes -= keeping.size_bytes
                self._kept += len(keeping.handles) > refusals
            self._done(keeping.offer, keeping.lost_records, kept_bytes, refusals)

    def _done(self, offer: _Offer, lost_records: int, kept_bytes: int, refusals: int) -> None:
        with self._changed:
            again = Deadline.after(KEEP_AGAIN_S) if refusals else None
            self._answers[offer.wanted.key] = _Answer(lost_records, again)
            self._answers.move_to_end(offer.wanted.key)
            while len(self._answers) > KEPT_KNOWN_MAX:
                self._answers.popitem(last=False)
            self._kept_bytes += kept_bytes
            self._over(offer)

    # The rest

    def flush(self, deadline: Deadline) -> None:
        """Wait until everything that was offered before has been taken or refused.

        Raises:
            DeadlineError: not by then. ShelfRefusedError: some of what was offered before is not kept, which no call
            has told that ended before this one began.
        """
        with self._changed, self._losses.flushing() as end:
            last = self._last_number

            def is_over() -> bool:
                return self._is_stopping or not any(number <= last for number in self._busy)

            if not self._changed.wait_for(is_over, deadline.remaining_s()):
                left = sum(number <= last for number in self._busy)
                raise DeadlineError(
                    f"{left} resume points are still to be kept in other tiers; the deadline has passed, and it goes on"
                )
            lost = end()
            if self._is_stopping and self._busy:
                lost["closed"] = len(self._busy)
        if lost:
            reasons = ", ".join(f"{count} {reason!r}" for reason, count in sorted(lost.items()))
            raise ShelfRefusedError(
                next(iter(sorted(lost))),
                f"not all resume points that were committed since the last flush could be kept: {reasons}; see "
                "docs/tiers.md for what each reason asks for",
            )

    def statistics(self) -> KeepStatistics:
        """A copy."""
        with self._changed:
            waiting = len(self._queue) + sum(again is not None for again in self._begun.values())
            return KeepStatistics(waiting, self._pinned_bytes, self._kept, self._kept_bytes, dict(self._dropped))

    def stop(self, deadline_s: float) -> None:
        """Give what waits so long to be kept, then begin nothing more.

        What shelves are taking must have ended before the pool's memory goes: close them between this and `join`.
        """
        deadline = Deadline.after(deadline_s)
        with self._changed:
            self._changed.wait_for(lambda: not self._busy, deadline.remaining_s())
            self._is_stopping = True
            self._changed.notify_all()
            os.eventfd_write(self._wake, 1)

    def join(self, deadline_s: float) -> None:
        """Wait for the thread; after `stop`, and after the shelves were closed."""
        self._thread.join(deadline_s)
        if not self._thread.is_alive():
            os.close(self._wake)

    def close_in_child(self) -> None:
        """After a fork, in the child."""
        self._changed = threading.Condition()
        self._is_stopping = True
        os.close(self._wake)


def _keep(shelf: Shelf, path: NodePath, hold: Hold, ends: Ends) -> Handle[int]:
    """As `Shelf.keep`, which must not end this thread whatever happens there."""
    try:
        return shelf.keep(path, hold.salt, hold.placed, ends)
    except Exception as error:
        failed: Handle[int] = Handle(f"keeping {path.tokens} tokens in the {shelf.name} tier")
        failed.fail(
            ShelfRefusedError("failed", f"the {shelf.name} tier failed to take {path.tokens} tokens: {error!r}")
        )
        return failed


def _release(hold: Hold) -> None:
    """As `Hold.release`, which tells whoever listens to the pool: what they raise is none of this thread's."""
    try:
        hold.release()
    except Exception:
        LOG.exception("a listener of the pool failed")


def _has(shelf: Shelf, wanted: Wanted, ends: Ends) -> bool:
    """Whether a shelf has all of it, for as long as it is wanted."""
    held = shelf.hold(wanted.path, shard=wanted.shard, grid=wanted.grid, grids=wanted.grids)
    if held is None:
        return False
    held.release()
    return not live_longer(ends.table, shelf.ends_of(wanted.path))
