"""Objects into a pool: a batch at once where there is room for all of it, else one after the other."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.errors import PoolError
from kvstore.foreign.copying import copy_in
from kvstore.pool.rows import NODE, RecordNames
from kvstore.record import record_layout
from kvstore.spec import UnitRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.clock import Deadline
    from kvstore.foreign.asking import AskedObject
    from kvstore.foreign.objects import ObjectPaths
    from kvstore.foreign.statistics import ForeignCounts
    from kvstore.pool import BasePool, BaseTransaction

WHOLE_CHUNK = UnitRange(0, 1)


class ObjectWriter:
    """Stores objects. Any thread.

    Args:
        pool: where they go.
        counts: what is counted.
    """

    def __init__(self, pool: BasePool, counts: ForeignCounts) -> None:
        self._pool = pool
        self._counts = counts
        self._layout = record_layout(pool.spec, 0, 0, WHOLE_CHUNK)

    def put(
        self,
        part: Sequence[AskedObject],
        answer: list[bool],
        paths: ObjectPaths,
        ttl_s: float | None,
        deadline: Deadline,
    ) -> None:
        """Store some objects, and say in `answer` which of them are in the store now."""
        if deadline.has_passed:
            self._counts.refused("late", len(part))
        elif not self._put_together(part, answer, paths, ttl_s):
            self._put_apart(part, answer, paths, ttl_s)

    def _put_together(
        self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths, ttl_s: float | None
    ) -> bool:
        """All of them, or nothing: then the answer is False."""
        try:
            write = self._pool.begin_flat(
                [paths.path(each.name, each.size_bytes) for each in part], salt=paths.salt, ttl_s=ttl_s
            )
        except PoolError:
            return False
        if write is None:
            return False
        try:
            filled = [
                (each.regions, each.size_bytes, places)
                for each, places in zip(part, write.places, strict=True)
                if places
            ]
            copy_in(filled, self._layout)
            write.commit()
        finally:
            write.abort()
        for each in part:
            answer[each.number] = True
        self._counts.count(
            stored=len(filled), stored_bytes=sum(each[1] for each in filled), present=len(part) - len(filled)
        )
        return True

    def _put_apart(
        self, part: Sequence[AskedObject], answer: list[bool], paths: ObjectPaths, ttl_s: float | None
    ) -> None:
        begun: list[tuple[AskedObject, BaseTransaction]] = []
        try:
            for each in part:
                transaction = self._begin(each, paths, ttl_s, may_fail=not begun)
                if transaction is None and begun:
                    # What this batch has reserved cannot make room before it was committed.
                    self._commit(begun, answer)
                    transaction = self._begin(each, paths, ttl_s, may_fail=True)
                if transaction is not None:
                    begun.append((each, transaction))
            self._commit(begun, answer)
        finally:
            for _, transaction in begun:
                transaction.abort("the objects of its batch could not all be stored")

    def _begin(
        self, each: AskedObject, paths: ObjectPaths, ttl_s: float | None, *, may_fail: bool
    ) -> BaseTransaction | None:
        path = paths.path(each.name, each.size_bytes)
        names = RecordNames.of_spans(range(len(path)), 0, 1, WHOLE_CHUNK)
        try:
            return self._pool.begin(path, names, salt=paths.salt, ttl_s=ttl_s)
        except PoolError:
            if may_fail:
                self._counts.refused("full")
            return None

    def _commit(self, begun: list[tuple[AskedObject, BaseTransaction]], answer: list[bool]) -> None:
        """Fill and commit, and leave nothing begun."""
        self._fill(begun)
        while begun:
            each, transaction = begun[-1]
            is_new = len(transaction.reserved_arrays[1]) > 0
            transaction.commit()
            begun.pop()
            answer[each.number] = True
            if is_new:
                self._counts.count(stored=1, stored_bytes=each.size_bytes)
            else:
                self._counts.count(present=1)

    def _fill(self, begun: Sequence[tuple[AskedObject, BaseTransaction]]) -> None:
        with ExitStack() as moving:
            filled = []
            for each, transaction in begun:
                arrays, addresses = transaction.reserved_arrays
                if len(addresses):
                    moving.enter_context(transaction.moving())
                    chunks = arrays.names.table[:, NODE].tolist()
                    filled.append((each.regions, each.size_bytes, list(zip(chunks, addresses.tolist(), strict=True))))
            copy_in(filled, self._layout)
            for _, transaction in begun:
                count = len(transaction.reserved_arrays[1])
                transaction.seal_all(range(count), [0] * count)
