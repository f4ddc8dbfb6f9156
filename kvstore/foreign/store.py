"""Objects under an engine's own keys, over a store of kvstore."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import OwnerGoneError, SpecError
from kvstore.foreign.asking import AskedObject, asked_objects, in_parts
from kvstore.foreign.holding import ForeignHold
from kvstore.foreign.objects import ObjectPaths
from kvstore.foreign.reading import ObjectReader
from kvstore.foreign.statistics import ForeignCounts, ForeignStatistics
from kvstore.foreign.workers import Workers
from kvstore.foreign.writing import ObjectWriter
from kvstore.handle import Handle
from kvstore.limits import (
    FOREIGN_CLOSE_DEADLINE_S,
    FOREIGN_SALTS_MAX,
    FOREIGN_THREADS_DEFAULT,
    FOREIGN_WAITING_MAX,
    LOAD_DEADLINE_S,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Any

    from kvstore.foreign.namespace import ForeignNamespace, GroupHasher
    from kvstore.foreign.regions import Memory
    from kvstore.pool import BaseHold
    from kvstore.store import Store


class ForeignStore:
    """Puts, finds and gets objects: opaque bytes under an engine's key. Any thread; a context manager.

    An object is there whole or not at all. One that cannot be stored, or is not found any more, is a `False` in the
    answer and a count by reason in `statistics`, never an exception: a full store, a store whose owner has gone,
    damaged bytes. Misuse raises.

    Each call comes in two forms: one that does it in this thread, and `*_async`, which has it done by one of a few
    threads and returns a `Handle` at once. The caller's memory must stay where it is until either has ended.

    Args:
        store: opened with `namespace.spec`, or attached to one that was. It stays the caller's to close.
        namespace: whose keys are meant.
        verify: check what lies in memory against its checksums while it is copied out. What comes from a disk is
            checked in any case.
        threads: that store what was asked for asynchronously, and as many more that find and load.
        waiting_max: asynchronous calls that wait for either; more are declined: every answer in them is False.

    Raises:
        SpecError: the store was opened with another spec.
    """

    def __init__(
        self,
        store: Store,
        namespace: ForeignNamespace,
        *,
        verify: bool = True,
        threads: int = FOREIGN_THREADS_DEFAULT,
        waiting_max: int = FOREIGN_WAITING_MAX,
    ) -> None:
        if store.spec.fingerprint != namespace.spec.fingerprint:
            raise SpecError(
                f"the store holds {store.spec.model!r} in its own form, not objects of {namespace.model!r} in chunks "
                f"of {namespace.chunk_bytes} bytes; open it with ForeignNamespace.spec"
            )
        self.store = store
        self.namespace = namespace
        self._pool = store.pool
        self._counts = ForeignCounts()
        self._writer = ObjectWriter(self._pool, self._counts)
        self._reader = ObjectReader(self._pool, self._counts, verify=verify)
        # Each way has its own, so that neither waits behind the other.
        self._readers = Workers("kvstore-foreign-read", threads, waiting_max)
        self._writers = Workers("kvstore-foreign-write", threads, waiting_max)
        self._lock = threading.Lock()
        self._hashers: dict[str, GroupHasher] = {name: namespace.hasher(name) for name in namespace.sizes}
        self._paths: dict[bytes, ObjectPaths] = {}

    def __enter__(self) -> ForeignStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Writing

    def put(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        memories: Sequence[Memory],
        *,
        salt: bytes = b"",
        ttl_s: float | None = None,
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> list[bool]:
        """Store objects; which of them are in the store now, be it that they were before.

        Args:
            group: one of the namespace's groups, for all keys or for each.
            keys: the engine's.
            memories: where each object's bytes are: bytes, an array, a CPU tensor, a `Region`, or several of them that
                are taken one after the other. An object may have another size than its group says; who looks for it
                names that size, too.
            salt: whose objects they are, for quotas and for keeping tenants apart.
            ttl_s: how long they are wanted; None: while there is room.
            deadline_s: objects that have not been begun by then are not stored.

        Raises:
            SpecError: a group that the namespace does not have, a key or size that is none. WriteError: memory that is
            none. StoreClosedError: the store was closed.
        """
        deadline = Deadline.after(deadline_s)
        objects = self._objects(group, keys, memories, is_written=False)
        return self._answer(objects, self._counts.refused, self._writer.put, self._paths_of(salt), ttl_s, deadline)

    def remove(self, group: str | Sequence[str], keys: Sequence[bytes], *, salt: bytes = b"") -> list[bool]:
        """Remove objects of their groups' sizes from every tier; which of them were there and were not in use.

        Raises:
            SpecError, StoreClosedError: as `put`.
        """
        paths = self._paths_of(salt)
        objects = self._objects(group, keys, None)

        def remove(part: Sequence[AskedObject], answer: list[bool]) -> None:
            for each in part:
                answer[each.number] = self._pool.evict(paths.path(each.name, each.size_bytes).keys[0]) > 0

        removed = self._guarded(objects, _uncounted, remove)
        self._counts.count(removed=sum(removed))
        return removed

    # Finding

    def has(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        *,
        sizes_bytes: Sequence[int] | None = None,
        salt: bytes = b"",
    ) -> list[bool]:
        """Which objects are there, in whichever tier. They may be gone a moment later: `hold` keeps them.

        Args:
            group, keys, salt: as `put`.
            sizes_bytes: of each object; by default those of their groups.

        Raises:
            SpecError, StoreClosedError: as `put`.
        """
        objects = self._objects(group, keys, None, sizes_bytes=sizes_bytes)
        paths = self._paths_of(salt)

        found = self._guarded(objects, _uncounted, lambda part, answer: self._reader.has(part, answer, paths))
        self._counts.count(looked_up=len(found), found=sum(found))
        return found

    def count_prefix(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        *,
        sizes_bytes: Sequence[int] | None = None,
        salt: bytes = b"",
    ) -> int:
        """How many of the first objects are there, up to the first that is not."""
        objects = self._objects(group, keys, None, sizes_bytes=sizes_bytes)
        paths = self._paths_of(salt)

        def look(part: Sequence[AskedObject], answer: list[bool]) -> None:
            # Most prefixes are not there at all: the first question costs as little as that needs.
            self._reader.has(part[:1], answer, paths)
            if answer[:1] == [True]:
                self._reader.has(part[1:], answer, paths)

        found = self._guarded(objects, _uncounted, look)
        count = (*found, False).index(False)
        self._counts.count(looked_up=min(count + 1, len(objects)), found=count)
        return count

    # Reading

    def get(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        memories: Sequence[Memory],
        *,
        salt: bytes = b"",
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> list[bool]:
        """Copy objects into the caller's memory; which of them are there. What is not may have been written in part.

        Args:
            group, keys, salt: as `put`.
            memories: as `put`, writable; their sizes say which objects are meant.
            deadline_s: for loading from other tiers.

        Raises:
            SpecError, WriteError, StoreClosedError: as `put`.
        """
        deadline = Deadline.after(deadline_s)
        objects = self._objects(group, keys, memories, is_written=True)
        return self._answer(objects, self._counts.missed, self._reader.get, self._paths_of(salt), deadline)

    def hold(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        *,
        sizes_bytes: Sequence[int] | None = None,
        salt: bytes = b"",
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> ForeignHold:
        """Keep what is there of some objects from being evicted, until it was copied and the hold is released.

        What lies in another tier is loaded now.

        Raises:
            SpecError, StoreClosedError: as `put`.
        """
        deadline = Deadline.after(deadline_s)
        objects = self._objects(group, keys, None, sizes_bytes=sizes_bytes)
        paths = self._paths_of(salt)
        holds: dict[int, BaseHold] = {}

        def hold(part: Sequence[AskedObject], answer: list[bool]) -> None:
            for each in part:
                reached = self._reader.hold(paths.path(each.name, each.size_bytes), deadline, layered=False)
                if isinstance(reached, str):
                    self._counts.missed(reached)
                else:
                    holds[each.number] = reached
                    answer[each.number] = True

        try:
            found = self._guarded(objects, self._counts.missed, hold)
        except BaseException:
            for each in holds.values():
                each.release()
            raise
        return ForeignHold(self._reader, objects, found, holds)

    # Without waiting

    def put_async(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        memories: Sequence[Memory],
        *,
        salt: bytes = b"",
        ttl_s: float | None = None,
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> Handle[list[bool]]:
        """As `put`, by another thread. `cancel()` has effect until that has begun."""
        deadline = Deadline.after(deadline_s)
        objects = self._objects(group, keys, memories, is_written=False)
        paths = self._paths_of(salt)
        return self._later(
            self._writers,
            f"storing {len(objects)} objects",
            objects,
            self._counts.refused,
            lambda: self._answer(objects, self._counts.refused, self._writer.put, paths, ttl_s, deadline),
        )

    def get_async(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        memories: Sequence[Memory],
        *,
        salt: bytes = b"",
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> Handle[list[bool]]:
        """As `get`, by another thread. `cancel()` has effect until that has begun."""
        deadline = Deadline.after(deadline_s)
        objects = self._objects(group, keys, memories, is_written=True)
        paths = self._paths_of(salt)
        return self._later(
            self._readers,
            f"loading {len(objects)} objects",
            objects,
            self._counts.missed,
            lambda: self._answer(objects, self._counts.missed, self._reader.get, paths, deadline),
        )

    def has_async(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        *,
        sizes_bytes: Sequence[int] | None = None,
        salt: bytes = b"",
    ) -> Handle[list[bool]]:
        """As `has`, by another thread."""
        self._objects(group, keys, None, sizes_bytes=sizes_bytes)
        return self._later(
            self._readers,
            f"looking for {len(keys)} objects",
            keys,
            _uncounted,
            lambda: self.has(group, keys, sizes_bytes=sizes_bytes, salt=salt),
        )

    def hold_async(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        *,
        sizes_bytes: Sequence[int] | None = None,
        salt: bytes = b"",
        deadline_s: float = LOAD_DEADLINE_S,
    ) -> Handle[ForeignHold]:
        """As `hold`, by another thread. Who does not take the result must release it all the same."""
        objects = self._objects(group, keys, None, sizes_bytes=sizes_bytes)
        handle = self._readers.submit(
            f"holding {len(keys)} objects",
            lambda: self.hold(group, keys, sizes_bytes=sizes_bytes, salt=salt, deadline_s=deadline_s),
        )
        if handle is None:
            self._counts.missed("busy", len(objects))
            handle = Handle("holding objects")
            handle.resolve(ForeignHold(self._reader, objects, [False] * len(objects), {}))
        return handle

    def _later(
        self,
        workers: Workers,
        what: str,
        objects: Sequence[object],
        count: Callable[[str, int], None],
        work: Callable[[], list[bool]],
    ) -> Handle[list[bool]]:
        handle = workers.submit(what, work)
        if handle is None:
            count("busy", len(objects))
            handle = Handle(what)
            handle.resolve([False] * len(objects))
        return handle

    # The namespace itself

    def statistics(self) -> ForeignStatistics:
        """Counters."""
        return self._counts.snapshot()

    def drain(self, deadline_s: float = FOREIGN_CLOSE_DEADLINE_S) -> None:
        """Wait until all that was asked for asynchronously has ended.

        Raises:
            DeadlineError: not by then; it goes on.
        """
        deadline = Deadline.after(deadline_s)
        self._writers.drain(deadline.remaining_s())
        self._readers.drain(deadline.remaining_s())

    def close(self, deadline_s: float = FOREIGN_CLOSE_DEADLINE_S) -> None:
        """End what was asked for asynchronously: what has not begun fails. The store stays open. Idempotent.

        Raises:
            DeadlineError: something still runs, and may still write to its caller's memory.
        """
        deadline = Deadline.after(deadline_s)
        with ExitStack() as closing:
            closing.callback(lambda: self._readers.close(deadline.remaining_s()))
            self._writers.close(deadline.remaining_s())

    # Inside

    def _paths_of(self, salt: bytes) -> ObjectPaths:
        with self._lock:
            paths = self._paths.get(salt)
            if paths is None:
                while len(self._paths) >= FOREIGN_SALTS_MAX:
                    self._paths.pop(next(iter(self._paths)))
                paths = ObjectPaths(self.store.spec.fingerprint, self.namespace.chunk_bytes, salt)
                self._paths[salt] = paths
            return paths

    def _objects(
        self,
        group: str | Sequence[str],
        keys: Sequence[bytes],
        memories: Sequence[Memory] | None,
        *,
        sizes_bytes: Sequence[int] | None = None,
        is_written: bool = False,
    ) -> list[AskedObject]:
        return asked_objects(
            self._hashers, self.namespace.sizes, group, keys, memories, sizes_bytes=sizes_bytes, is_written=is_written
        )

    def _guarded(
        self,
        objects: Sequence[AskedObject],
        count: Callable[[str, int], None],
        work: Callable[[Sequence[AskedObject], list[bool]], None],
    ) -> list[bool]:
        """An answer for each object, False for all that an owner that has gone leaves without."""
        answer = [False] * len(objects)
        try:
            work(objects, answer)
        except OwnerGoneError:
            count("gone", answer.count(False))
        return answer

    def _answer(
        self,
        objects: Sequence[AskedObject],
        count: Callable[[str, int], None],
        work: Callable[..., None],
        *arguments: Any,
    ) -> list[bool]:
        def each_part(whole: Sequence[AskedObject], answer: list[bool]) -> None:
            for part in in_parts(whole):
                work(part, answer, *arguments)

        return self._guarded(objects, count, each_part)


def _uncounted(reason: str, count: int) -> None:
    """Of questions, that nothing could answer them is not counted."""
