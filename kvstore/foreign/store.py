"""Objects under an engine's own keys, over a store of kvstore."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    LeaseGoneError,
    LoadFailedError,
    OwnerGoneError,
    PoolError,
    SpecError,
    WriteError,
)
from kvstore.foreign.copying import copy_in, copy_out
from kvstore.foreign.namespace import check_size
from kvstore.foreign.objects import ObjectPaths
from kvstore.foreign.regions import regions_of, size_of
from kvstore.foreign.statistics import ForeignCounts, ForeignStatistics
from kvstore.foreign.workers import Workers
from kvstore.handle import Handle
from kvstore.limits import (
    FOREIGN_BATCH_BYTES,
    FOREIGN_BATCH_OBJECTS_MAX,
    FOREIGN_CLOSE_DEADLINE_S,
    FOREIGN_LOADS_MAX,
    FOREIGN_SALTS_MAX,
    FOREIGN_THREADS_DEFAULT,
    FOREIGN_WAITING_MAX,
    LOAD_DEADLINE_S,
)
from kvstore.pool.rows import NODE, RecordNames
from kvstore.record import record_layout
from kvstore.spec import UnitRange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType
    from typing import Any

    from kvstore.foreign.namespace import ForeignNamespace, GroupHasher
    from kvstore.foreign.regions import Memory, Region
    from kvstore.pool import BaseHold, BaseTransaction, NodePath
    from kvstore.store import Store

_WHOLE_CHUNK = UnitRange(0, 1)


class _Object(NamedTuple):
    """What is asked for: where it is in the answer, its name in the store, its size, and the caller's memory."""

    number: int
    name: bytes
    size_bytes: int
    regions: Sequence[Region]


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
        self._layout = record_layout(store.spec, 0, 0, _WHOLE_CHUNK)
        self._verify = verify
        self._counts = ForeignCounts()
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
        return self._answer(objects, self._counts.refused, self._put_part, self._paths_of(salt), ttl_s, deadline)

    def remove(self, group: str | Sequence[str], keys: Sequence[bytes], *, salt: bytes = b"") -> list[bool]:
        """Remove objects of their groups' sizes from every tier; which of them were there and were not in use.

        Raises:
            SpecError, StoreClosedError: as `put`.
        """
        paths = self._paths_of(salt)
        objects = self._objects(group, keys, None)

        def remove(part: Sequence[_Object], answer: list[bool]) -> None:
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

        def look(part: Sequence[_Object], answer: list[bool]) -> None:
            for each in part:
                answer[each.number] = self._is_there(paths, each)

        found = self._guarded(objects, _uncounted, look)
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

        def look(part: Sequence[_Object], answer: list[bool]) -> None:
            for each in part:
                answer[each.number] = self._is_there(paths, each)
                if not answer[each.number]:
                    return

        count = sum(self._guarded(objects, _uncounted, look))
        self._counts.count(looked_up=min(count + 1, len(objects)), found=count)
        return count

    def _is_there(self, paths: ObjectPaths, each: _Object) -> bool:
        prompt = paths.prompt(each.name, each.size_bytes)
        return self._pool.match(prompt, cap_tokens=len(prompt)).tokens == len(prompt)

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
        return self._answer(objects, self._counts.missed, self._get_part, self._paths_of(salt), deadline)

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

        def hold(part: Sequence[_Object], answer: list[bool]) -> None:
            for each in part:
                reached = self._hold(paths.path(each.name, each.size_bytes), deadline, layered=False)
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
        return ForeignHold(self, objects, found, holds)

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
            lambda: self._answer(objects, self._counts.refused, self._put_part, paths, ttl_s, deadline),
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
            lambda: self._answer(objects, self._counts.missed, self._get_part, paths, deadline),
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
            handle.resolve(ForeignHold(self, objects, [False] * len(objects), {}))
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
    ) -> list[_Object]:
        count = len(keys)
        if count > FOREIGN_BATCH_OBJECTS_MAX:
            raise WriteError(f"{count} objects in one call are over the limit of {FOREIGN_BATCH_OBJECTS_MAX}")
        groups = [group] * count if isinstance(group, str) else list(group)
        if len({count, len(groups), *(len(each) for each in (memories, sizes_bytes) if each is not None)}) > 1:
            raise WriteError(f"{count} keys need as many groups, memories and sizes")
        objects = []
        for number, (name, key) in enumerate(zip(groups, keys, strict=True)):
            hasher = self._hashers.get(name)
            if hasher is None:
                raise SpecError(f"this namespace has no group {name!r}; it has {', '.join(self._hashers)}")
            regions: Sequence[Region] = ()
            if memories is not None:
                regions = regions_of(memories[number], is_written=is_written)
                size_bytes = size_of(regions)
            else:
                size_bytes = self.namespace.sizes[name] if sizes_bytes is None else sizes_bytes[number]
            check_size(size_bytes, f"an object of group {name!r}")
            objects.append(_Object(number, hasher.name(key), size_bytes, regions))
        return objects

    def _guarded(
        self,
        objects: Sequence[_Object],
        count: Callable[[str, int], None],
        work: Callable[[Sequence[_Object], list[bool]], None],
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
        objects: Sequence[_Object],
        count: Callable[[str, int], None],
        work: Callable[..., None],
        *arguments: Any,
    ) -> list[bool]:
        def in_parts(whole: Sequence[_Object], answer: list[bool]) -> None:
            for part in _parts(whole):
                work(part, answer, *arguments)

        return self._guarded(objects, count, in_parts)

    def _put_part(
        self,
        part: Sequence[_Object],
        answer: list[bool],
        paths: ObjectPaths,
        ttl_s: float | None,
        deadline: Deadline,
    ) -> None:
        if deadline.has_passed:
            self._counts.refused("late", len(part))
            return
        begun: list[tuple[_Object, BaseTransaction]] = []
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
        self, each: _Object, paths: ObjectPaths, ttl_s: float | None, *, may_fail: bool
    ) -> BaseTransaction | None:
        path = paths.path(each.name, each.size_bytes)
        names = RecordNames.of_spans(range(len(path)), 0, 1, _WHOLE_CHUNK)
        try:
            return self._pool.begin(path, names, salt=paths.salt, ttl_s=ttl_s)
        except PoolError:
            if may_fail:
                self._counts.refused("full")
            return None

    def _commit(self, begun: list[tuple[_Object, BaseTransaction]], answer: list[bool]) -> None:
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

    def _fill(self, begun: Sequence[tuple[_Object, BaseTransaction]]) -> None:
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

    def _get_part(self, part: Sequence[_Object], answer: list[bool], paths: ObjectPaths, deadline: Deadline) -> None:
        width = FOREIGN_LOADS_MAX if self._pool.may_load else len(part)
        for first in range(0, len(part), width):
            self._get_some(part[first : first + width], answer, paths, deadline)

    def _get_some(self, part: Sequence[_Object], answer: list[bool], paths: ObjectPaths, deadline: Deadline) -> None:
        with ExitStack() as held:
            holds: list[tuple[_Object, BaseHold]] = []
            for each in part:
                reached = self._hold(paths.path(each.name, each.size_bytes), deadline, layered=True)
                if isinstance(reached, str):
                    self._counts.missed(reached)
                else:
                    held.callback(reached.release)
                    holds.append((each, reached))
            self.copy(holds, answer, deadline)

    def _hold(self, path: NodePath, deadline: Deadline, *, layered: bool) -> BaseHold | str:
        """A hold on an object, or why it is missed."""
        try:
            return self._pool.hold(path, layered=layered, deadline=deadline)
        except LeaseGoneError as error:
            return _why_gone(error)
        except PoolError:
            return "full"
        except DeadlineError:
            return "late"

    def copy(self, holds: Sequence[tuple[_Object, BaseHold]], answer: list[bool], deadline: Deadline) -> None:
        """For `ForeignHold`: copy what is held to where it goes, and say what has come."""
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


class ForeignHold:
    """Objects that stay where they are until released. Any thread; a context manager.

    Attributes:
        found: which of those that were asked for are held.
    """

    def __init__(
        self, store: ForeignStore, objects: Sequence[_Object], found: list[bool], holds: dict[int, BaseHold]
    ) -> None:
        self.found = tuple(found)
        self._store = store
        self._objects = objects
        self._holds = holds

    def __enter__(self) -> ForeignHold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def get(self, memories: Sequence[Memory | None], *, deadline_s: float = LOAD_DEADLINE_S) -> list[bool]:
        """Copy objects into the caller's memory; which of them have come.

        Args:
            memories: one for each object that was asked for; None for those that are not wanted.
            deadline_s: for what is still being loaded.

        Raises:
            WriteError: memory of another size than the object has, or none. LeaseError: the hold was released.
        """
        if len(memories) != len(self._objects):
            raise WriteError(f"{len(memories)} memories were given for {len(self._objects)} objects")
        wanted = []
        for each, memory in zip(self._objects, memories, strict=True):
            hold = self._holds.get(each.number)
            if memory is None or hold is None:
                continue
            regions = regions_of(memory, is_written=True)
            if size_of(regions) != each.size_bytes:
                raise WriteError(f"an object of {each.size_bytes} bytes was given memory of {size_of(regions)}")
            wanted.append((each._replace(regions=regions), hold))
        answer = [False] * len(self._objects)
        try:
            self._store.copy(wanted, answer, Deadline.after(deadline_s))
        except OwnerGoneError:
            answer = [False] * len(self._objects)
        return answer

    def release(self) -> None:
        """Let them go. Idempotent."""
        holds, self._holds = self._holds, {}
        for hold in holds.values():
            hold.release()


def _parts(objects: Sequence[_Object]) -> Iterator[Sequence[_Object]]:
    """Objects that are stored or loaded together: what is under way keeps its memory."""
    first, size_bytes = 0, 0
    for number, each in enumerate(objects):
        if number > first and size_bytes + each.size_bytes > FOREIGN_BATCH_BYTES:
            yield objects[first:number]
            first, size_bytes = number, 0
        size_bytes += each.size_bytes
    if first < len(objects):
        yield objects[first:]


def _uncounted(reason: str, count: int) -> None:
    """Of questions, that nothing could answer them is not counted."""


def _why_gone(error: LeaseGoneError) -> str:
    return "damaged" if isinstance(error, LoadFailedError) else "absent"
