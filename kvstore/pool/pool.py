"""The pool: one tier, one index, one policy, under one lock.

Decisions are made under the lock; bytes move outside of it, in slots that are pinned.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.errors import (
    LeaseGoneError,
    PinLimitError,
    StaleSlotError,
)
from kvstore.events import RemovedWhy
from kvstore.limits import PROMPT_TOKENS_MAX
from kvstore.pool.flat import FlatPool
from kvstore.pool.held import PlacedRows
from kvstore.pool.hold import Hold
from kvstore.pool.index import RECORD_BYTES, needs_of
from kvstore.pool.pins import Pin
from kvstore.pool.plan import place_table
from kvstore.pool.rows import Rows
from kvstore.pool.seam import EVICT_ROOT_MOST
from kvstore.pool.search import Query, answer, joined, search
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore._native import HeldRows
    from kvstore.abc import Slot
    from kvstore.clock import Deadline
    from kvstore.events import Changes
    from kvstore.pool.lifetimes import Lasting
    from kvstore.pool.match import Match
    from kvstore.pool.path import HandOver, NodePath, RecordPlace
    from kvstore.pool.prompt import Prompt
    from kvstore.pool.seam import BaseHold
    from kvstore.spec import ChunkGrid, Shard


class Pool(FlatPool):
    """Records of one model spec in one tier. Any thread may call any method.

    Args:
        spec: the model.
        tier: where records lie; the pool closes it.
        eviction: ranks what may go; least recently used by default.
        checkpoints: suggests where to take states.
        limits: quotas and the like; none by default.
        clock: seconds, by which records, pins, leases and writers end.

    Attributes:
        limits: as given.
    """

    # Reading

    def match(
        self,
        prompt: Prompt,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        cap_tokens: int | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        if self._dropped or self._lifetimes.is_due:
            self._settle()
        cap = len(prompt) - 1 if cap_tokens is None else min(cap_tokens, len(prompt))
        exact = prompt.exact
        gone = self._index.gone
        queries = [Query(self.spec, exact, exact.path, cap, shard, grid, gone=gone)]
        if exact is not prompt:
            queries.append(Query(self.spec, prompt, prompt.path, cap, shard, grid, gone=gone))
        with self._lock:
            self._check_open()
            native, sparse = self._index.native, self._index.sparse
            if accept_coverage:
                paths = [exact.path, *sparse.variants(exact, self._index.is_stored)]
                queries = [Query(self.spec, exact, path, cap, shard, grid, sparse, gone=gone) for path in paths]
            findings = [search(native, query) for query in queries]
            self._statistics.matches += 1
            self._statistics.hits += any(found.tokens > 0 for found in findings)

        suggest = self._suggest(len(prompt))
        if len(queries) == 1 and not accept_coverage:
            return answer(queries[0], findings[0], self._tier.name, suggest)
        with self._lock:  # the coverages of tails are looked up when the answers are made
            return joined([answer(*each, self._tier.name, suggest) for each in zip(queries, findings, strict=True)])

    def _suggest(self, prompt_tokens: int) -> Callable[[int, Sequence[int]], tuple[int, ...]]:
        """Checkpoints for a prompt, from a resume point's length and known branch points."""

        def suggest(resume_tokens: int, branch_points: Sequence[int]) -> tuple[int, ...]:
            with self._lock:
                return self._checkpoints.suggest(prompt_tokens, resume_tokens, branch_points, self.spec.block_tokens)

        return suggest

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
        layered: bool = False,
        deadline: Deadline | None = None,
    ) -> BaseHold:
        return self.hold_now(path, shard=shard, grid=grid, grids=grids)

    @property
    def may_load(self) -> bool:
        return False

    def hold_now(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        """As `hold`, without loading anything: `LeaseGoneError` unless all of it lies in this pool's own tier."""
        return self.hold_here(path, shard=shard, grid=grid, grids=grids)

    def hold_here(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: Mapping[RecordPlace, bytes] | None = None,
    ) -> Hold:
        """As `hold_now`, which this pool does for itself: nobody else has asked for it."""
        self._settle()
        if grid is not None and grids is None and self.spec.state_groups:
            grid.digest_at(path.tokens)  # states exist at boundaries only
        with self._lock:
            self._check_open()
            held = self._index.native.collect(
                path.packed,
                needs_of(self.spec, shard),
                None if grid is None else grid.packed,
                None if grids is None else place_table(grids),
            )
            if held is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            return self._make_hold(path, held)

    def _make_hold(self, path: NodePath, held: HeldRows) -> Hold:
        rows = Rows(self.spec, path, *held.rows())
        slots = rows.slots()
        with ExitStack() as undoing:
            self._room.pin_all(slots)
            undoing.callback(self._room.unpin_all, slots)
            self._index.hold(held)
            undoing.callback(lambda: self._room.freed(self._index.release(held)))
            waiting = self._index.handovers(held.last_node)
            handover = waiting[0][0] if waiting else None
            placed = PlacedRows(rows, slots, self._views(slots))
            hold = Hold(self, path, self._index.native.salt(held.last_node), held, placed, handover, self._losses)
            undoing.pop_all()
        self._lifetimes.add_hold(hold)
        return hold

    def check_current(self, hold: BaseHold) -> None:
        if not isinstance(hold, Hold):
            raise LeaseGoneError("the lease is of another store")
        with self._lock:
            self._check_open()
            if hold.losses == self._losses:
                return
            try:
                self._views(hold.placed.slots)
            except StaleSlotError as error:
                raise LeaseGoneError(
                    f"the resume point of {hold.path.tokens} tokens was found damaged since it was leased, or its time "
                    "to live was over; match again"
                ) from error
            hold.losses = self._losses

    def release(self, hold: Hold) -> None:
        """End a hold; for `Hold` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._lifetimes.remove_hold(hold)
            self._room.unpin_all(hold.placed.slots)
            self._room.freed(self._index.release(hold.held))
        self._notify()

    def limit_hold(self, hold: Lasting) -> None:
        """From now on the longest lease counts for it, until `no_longer_held`."""
        with self._lock:
            self._lifetimes.add_hold(hold)

    def no_longer_held(self, hold: Lasting) -> None:
        """It was ended."""
        with self._lock:
            self._lifetimes.remove_hold(hold)

    def exempt(self, hold: Hold) -> None:
        """A hold that somebody else ends when it lasts for too long."""
        with self._lock:
            self._lifetimes.remove_hold(hold)
            hold.ends_s = math.inf

    def pin(
        self, path: NodePath, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None, ttl_s: float | None = None
    ) -> Pin:
        self._settle()
        with self._lock:
            self._check_open()
            held = self._index.native.collect(
                path.packed, needs_of(self.spec, shard), None if grid is None else grid.packed
            )
            if held is None:
                raise LeaseGoneError(
                    f"the resume point of {path.tokens} tokens was evicted since it was matched; match again"
                )
            salt = self._index.native.salt(held.last_node)
            slots = Rows(self.spec, path, *held.rows()).slots()
            try:
                self._pins.check(salt, slots)
            except PinLimitError:
                self._statistics.pin_refusals += 1
                raise
            self._index.hold(held)
            pin = Pin(self, path, salt, held, slots, self._lifetimes.in_s(ttl_s))
            self._pins.add(salt, slots)
            self._lifetimes.add_pin(pin)
            return pin

    def unpin(self, pin: Pin) -> None:
        """End a pin; for `Pin` itself."""
        with self._lock:
            if self.is_closed:
                return
            self._lifetimes.remove_pin(pin)
            self._pins.remove(pin.salt, pin.slots)
            self._room.freed(self._index.release(pin.held))
        self._notify()

    def expire(self, path: NodePath, ttl_s: float | None, *, after_tokens: int | None = None) -> int:
        self._settle()
        with self._lock:
            self._check_open()
            ends_at_us = self._lifetimes.moment_us(ttl_s)
            after = PROMPT_TOKENS_MAX if after_tokens is None else after_tokens
            tokens = self._set_end(path, ends_at_us, after)
            self._lifetimes.look()
        self._settle()  # what has ended at once makes room at once
        return tokens

    def _set_end(self, path: NodePath, ends_at_us: int, after_tokens: int) -> int:
        """Under the lock: a prompt is wanted until then; the length of its deepest prefix that is stored."""
        return self._index.native.set_end(path.packed, ends_at_us, after_tokens)

    def ends_of(self, path: NodePath) -> npt.NDArray[np.uint64]:
        """Until when the nodes of a path are wanted, as `kvstore.placement.ends.Ends.table` has it."""
        with self._lock:
            return self._index.native.ends_of(b"".join(path.node_keys))

    def accept_handover(self, path: NodePath) -> tuple[HandOver, Mapping[RecordPlace, bytes], Hold] | None:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            waiting = self._index.handovers(node) if node is not None else []
            if node is None or not waiting:
                return None
            places = place_table(waiting[0][1])
            held = self._index.native.collect(path.packed, needs_of(self.spec, WHOLE), None, places)
            if held is None:
                return None
            hold = self._make_hold(path, held)  # which may fail, and then the hand-over still waits
            taken = self._index.take_handover(node)
            assert taken is not None
            return (*taken, hold)

    def return_handover(self, path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes]) -> None:
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            if node is not None and self._index.native.holds_records(node):
                self._index.add_handover(node, handover, grids)

    def take_handover(self, path: NodePath) -> HandOver | None:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._end_of(path)
            taken = self._index.take_handover(node) if node is not None else None
            return taken[0] if taken is not None else None

    # Removing

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        self._settle()
        with self._lock:
            self._check_open()
            node = self._index.native.find(key)
            if node is None:
                return 0
            freed = self._index.evict(node, states_only=states_only)
            freed_bytes = self._room.freed(freed) + len(freed) * RECORD_BYTES
        self._notify()
        return freed_bytes

    def evict_root(self, root: bytes, most: int = EVICT_ROOT_MOST) -> int:
        firsts = self._first_keys(root)
        for key in firsts[:most]:
            self.evict(key)
        return len(self._first_keys(root)) if firsts else 0

    def _first_keys(self, root: bytes) -> list[bytes]:
        """Keys of the blocks that hang on a root, in any tier."""
        found: dict[bytes, None] = {}
        for _, changes in self.watch(_tell_nothing):
            parents, size = changes.packed_parents, len(root)
            at = parents.find(root)
            while at >= 0:
                if at % size == 0:
                    found[changes.packed_keys[at : at + size]] = None
                at = parents.find(root, at + 1)
        return list(found)

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        with self._lock:
            self._check_open()
            node = self._index.native.find(key)
            if node is None:
                return
            if slot is not None and not self._index.native.has_slot(
                node, is_state, slot.index, slot.generation, slot.size_bytes
            ):
                return
            self._statistics.damaged_records += 1
            self._damages += 1
            self._index.remember_gone(key, RemovedWhy.DAMAGED, is_state=is_state)
            self._losses += 1
            self._room.freed(self._index.condemn(node, is_state=is_state))
        self._notify()


def _tell_nothing(tier: str, changes: Changes) -> bool:
    """Of changes after the moment that was asked for."""
    return False
