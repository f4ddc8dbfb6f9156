"""Bringing a resume point from a shelf into the pool: reserve, load in layer order, verify, commit."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, LoadFailedError, StoreClosedError, WriteError
from kvstore.limits import LOAD_PROGRESS_DEADLINE_S
from kvstore.placement.order import LoadOrder
from kvstore.pool.held import PlacedRows
from kvstore.pool.plan import RecordDigests
from kvstore.pool.rows import COST_US, DIGEST, GROUP, NODE, SLOT, SLOT_BYTES, SPAN, START, Rows
from kvstore.record.seal import which_intact_rows
from kvstore.spec import ReuseRule

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.placement.shelf import Shelf, ShelfHold, ShelfLoad
    from kvstore.pool.path import NodePath
    from kvstore.pool.pool import Pool
    from kvstore.pool.transaction import Transaction

WANTED_POLL_S = 0.05
"""How soon a load that nobody wants any more notices."""


class Load:
    """One resume point on its way from a shelf into the pool's tier. Any thread.

    A thread of its own waits for the bytes, verifies them in bulk while later ones still come, and commits. Who wants
    the records joins; when nobody does any more it is given up, unless somebody asked for it to go on.

    Attributes:
        path: of the resume point.
        shelf: where it comes from.
        size_bytes: slots that are loaded; what the pool had already is not.

    Args:
        held: the records on the shelf; ended with the load.
        ended: told when it has ended, from its thread.

    Raises:
        PoolFullError, QuarantineFullError, StoreClosedError: as `Pool.begin`; nothing was changed.
    """

    def __init__(self, pool: Pool, shelf: Shelf, held: ShelfHold, ended: Callable[[Load], None]) -> None:
        self.path: NodePath = held.path
        self.shelf = shelf
        self.salt = held.salt
        self.damaged_records = 0
        self.seconds = 0.0
        self._pool = pool
        self._held = held
        self._ended = ended
        rows = held.rows
        names = rows.record_names
        self._transaction: Transaction = pool.begin(
            held.path,
            names,
            salt=held.salt,
            grid_digests=RecordDigests(names, rows.table[:, DIGEST].astype(np.int64), rows.digests),
            resume_nodes=[len(held.path) - 1],
        )
        self._transaction.ends_of = shelf.ends_of
        reserved = self._transaction.placed
        self._row_numbers = names.positions_of(reserved.rows.record_names)
        """Of each reserved record, its row on the shelf."""
        self._order = LoadOrder.of(pool.spec, reserved.rows)
        self.size_bytes = reserved.slots.size_bytes
        self._changed = threading.Condition()
        self._sound = 0
        self._error: KVStoreError | None = None
        self._is_over = False
        self._wanted = 0
        self._goes_on = False
        self._is_given_up = False
        self._has_stopped = False
        self._thread = threading.Thread(target=self._run, name=f"kvstore-load-{shelf.name}", daemon=True)

    def start(self) -> None:
        """Begin. Once. If there can be no thread for it, it has failed by then."""
        try:
            self._thread.start()
        except RuntimeError as error:
            self._finish(
                LoadFailedError(
                    f"{self.path.tokens} tokens cannot be loaded from the {self.shelf.name} tier: {error}; "
                    "raise the limit of threads of this process"
                )
            )

    # Who wants it

    def pinned(self) -> ExitStack | None:
        """One more wants the records, which stay where they are until the stack is closed; None once it is over."""
        with ExitStack() as undoing:
            if not self.join():
                return None
            undoing.callback(self.leave)
            try:
                undoing.enter_context(self._transaction.moving())
            except WriteError:
                return None
            return undoing.pop_all()

    def join(self) -> bool:
        """One more wants it, and `leave`s it once; False if it has stopped since nobody did, which cannot be undone."""
        with self._changed:
            if self._has_stopped:
                return False
            self._wanted += 1
            return True

    def leave(self) -> None:
        """One wants it no more. Does not wait; if nobody else comes by then, it stops at its next look."""
        with self._changed:
            self._wanted -= 1

    def go_on(self) -> None:
        """It is to go on even if nobody waits for it: it will be asked for again."""
        with self._changed:
            self._goes_on = True

    def give_up(self) -> None:
        """End it as soon as nothing moves, whoever wants it. Does not wait; see `wait_for_end`."""
        with self._changed:
            self._is_given_up = True

    def wait_for_end(self, deadline_s: float | None) -> None:
        """Until its thread has ended; None for however long that takes."""
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(deadline_s)

    # What has come

    @property
    def is_over(self) -> bool:
        return self._is_over

    @property
    def goes_on(self) -> bool:
        """Whether somebody asked for it to go on, who will come back."""
        return self._goes_on

    @property
    def error(self) -> KVStoreError | None:
        """Why it failed, once it has."""
        return self._error

    def wait(self, layer: int | None, deadline: Deadline) -> None:
        """Block until a layer's records have come and are sound; of None, until all are committed.

        Raises:
            LoadFailedError: they have not, or are not. StoreClosedError: the pool was closed. DeadlineError: the
            deadline passed; it goes on.
        """
        count = None if layer is None else self._order.count_by_layer.get(layer, 0)

        def has_come() -> bool:
            return self._is_over or (count is not None and self._sound >= count)

        with self._changed:
            if not self._changed.wait_for(has_come, deadline.remaining_s()):
                raise DeadlineError(
                    f"{self._sound} of {len(self._order.rows)} records of {self.path.tokens} tokens have been loaded "
                    f"from the {self.shelf.name} tier, the deadline has passed; loading goes on, read again"
                )
            error = self._error
        if error is not None:
            raise type(error)(str(error)) from error

    def placed(self) -> PlacedRows:
        """All records of the resume point where they lie in memory, loaded already or not, by group, span and node."""
        there, reserved = self._transaction.placed_held, self._transaction.placed
        table = np.concatenate((there.rows.table, reserved.rows.table))
        new = slice(len(there.rows), None)
        table[new, SLOT : SLOT_BYTES + 1] = reserved.slots.table
        table[new, COST_US] = self._held.rows.table[self._row_numbers, COST_US]
        table[new, DIGEST] += np.uint64(len(there.rows.digests))
        digests = b"".join((*there.rows.digests, *reserved.rows.digests))
        order = np.lexsort(table[:, [START, NODE, SPAN, GROUP]].T)
        rows = Rows(self._pool.spec, self.path, table[order], digests)
        memories = [*there.memories, *reserved.memories]
        return PlacedRows(rows, rows.slots(), [memories[number] for number in order.tolist()])

    # The thread

    def _run(self) -> None:
        began_s = time.perf_counter()
        error: KVStoreError | None = None
        try:
            with self._transaction.moving():
                self._bring()
            self.seconds = time.perf_counter() - began_s
            self._transaction.commit()
        except KVStoreError as failure:
            error = failure
        except Exception as failure:  # a fault of ours or of a shelf must not leave readers waiting
            error = LoadFailedError(f"loading from the {self.shelf.name} tier failed: {failure!r}")
            error.__cause__ = failure
        self._finish(error)

    def _finish(self, error: KVStoreError | None) -> None:
        """Give back what is not needed any more."""
        try:
            if error is not None:
                self._transaction.abort(str(error))
            self._held.release()
        finally:
            self._end(error)

    def _end(self, error: KVStoreError | None) -> None:
        if error is not None and not isinstance(error, StoreClosedError | LoadFailedError):
            error = LoadFailedError(str(error))
        self._error = error
        self._ended(self)  # first, so that who waited finds it counted
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _bring(self) -> None:
        """Load and verify everything that is lacking.

        Raises:
            LoadFailedError: a record did not come or is damaged, nobody wants it any more, or nothing moves.
        """
        rows = self._order.rows
        if not len(rows):
            return
        self._check_wanted()  # who gave it up before it had a thread has not waited for its end
        shelf_numbers = self._row_numbers[rows]
        load = self._held.load(shelf_numbers, self._transaction.placed.addresses[rows])
        try:
            begin = 0
            for end in self._order.batch_ends:
                failed = self._wait_for(load, end)
                bad = sorted({*failed, *self._unsound(begin, end, failed)})
                if bad:
                    self._condemn(bad)
                self._take(begin, end)
                begin = end
        finally:
            load.cancel()

    def _wait_for(self, load: ShelfLoad, count: int) -> list[int]:
        """Until so many have come, as long as it is wanted and something moves; those that failed."""
        last_arrived, quiet = self._sound, Deadline.after(LOAD_PROGRESS_DEADLINE_S)
        while True:
            self._check_wanted()
            try:
                return list(load.wait(count, quiet.earlier(Deadline.after(WANTED_POLL_S))))
            except DeadlineError:
                pass
            arrived = self._arrived(load, last_arrived, count)
            if arrived > last_arrived:
                last_arrived, quiet = arrived, Deadline.after(LOAD_PROGRESS_DEADLINE_S)
            elif quiet.has_passed:
                raise LoadFailedError(
                    f"nothing has come from the {self.shelf.name} tier for {LOAD_PROGRESS_DEADLINE_S:g} s; it is "
                    "overloaded, or its device hangs"
                )

    @staticmethod
    def _arrived(load: ShelfLoad, arrived: int, count: int) -> int:
        """How many have come by now, at least `arrived`: asked for at doubling distances."""
        step, now = 1, Deadline.after(0.0)
        while arrived + step <= count:
            try:
                load.wait(arrived + step, now)
            except DeadlineError:
                break
            arrived += step
            step *= 2
        return arrived

    def _check_wanted(self) -> None:
        with self._changed:
            self._has_stopped = self._is_given_up or not (self._wanted or self._goes_on)
        if self._has_stopped:
            raise LoadFailedError("loading was given up: nobody wanted the records any more; match again")

    def _unsound(self, begin: int, end: int, failed: list[int]) -> list[int]:
        """Positions of records that are not what their rows on the shelf say."""
        positions = np.setdiff1d(np.arange(begin, end), failed)
        numbers = self._order.rows[positions]
        placed = self._transaction.placed
        layouts, classes = placed.rows.classes
        digests, fields = placed.rows.framing
        fields[:, 2] = self._held.rows.table[self._row_numbers, COST_US]
        bad: list[int] = []
        for number in np.unique(classes[numbers]).tolist():
            of_class = classes[numbers] == number
            chosen = numbers[of_class]
            intact = which_intact_rows(layouts[number], placed.addresses[chosen], digests[chosen].data, fields[chosen])
            bad.extend(positions[of_class][~intact].tolist())
        return bad

    def _condemn(self, bad: list[int]) -> None:
        """Damaged records, and such as cannot be read, leave the shelf with all that they made reachable."""
        rows, spec = self._held.rows, self._pool.spec
        self._check_wanted()  # what was cancelled is not damaged
        slots = rows.slots()
        for position in bad:
            number = int(self._row_numbers[self._order.rows[position]])
            node, group = (int(value) for value in rows.table[number, [NODE, GROUP]])
            is_state = spec.groups[group].rule is ReuseRule.STATE
            self.shelf.condemn(self.path.key(node), is_state=is_state, slot=slots[number])
        self.damaged_records = len(bad)
        raise LoadFailedError(
            f"{len(bad)} records of {self.path.tokens} tokens in the {self.shelf.name} tier are damaged or cannot be "
            "read; they were forgotten there. Match again"
        )

    def _take(self, begin: int, end: int) -> None:
        """Records that came are sound."""
        numbers = self._order.rows[begin:end]
        costs_us = self._held.rows.table[self._row_numbers[numbers], COST_US]
        self._transaction.seal_all(numbers, costs_us)  # type: ignore[arg-type]  # arrays are sequences here
        with self._changed:
            self._sound = end
            self._changed.notify_all()
