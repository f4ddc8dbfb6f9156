"""Pages of SGLang's host pools in a store: what the backend's methods do, without SGLang's own types."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from kvstore.adapters.sglang.clearing import remove_all
from kvstore.adapters.sglang.counts import BackendCounts, BackendStatistics
from kvstore.adapters.sglang.hits import ALL_PAGES, PoolPages, Restorable, restorable
from kvstore.adapters.sglang.pools import ANCHOR, Form, HostPool, describe, page_keys, tensor_bytes
from kvstore.adapters.sglang.stores import BackendStore
from kvstore.clock import Deadline
from kvstore.errors import ConfigError, KVStoreError
from kvstore.foreign import ForeignNamespace
from kvstore.limits import FOREIGN_BATCH_OBJECTS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.adapters.sglang.config import BackendConfig
    from kvstore.adapters.sglang.pools import Indices
    from kvstore.adapters.sglang.position import Position
    from kvstore.foreign import ForeignStore

LOG = logging.getLogger("kvstore.sglang")
ENGINE = "sglang"
HASH_ALGORITHM = "sha256"
HASH_ROOT = b"sglang-cache-namespace-v1"
"""SGLang's page keys are a chain of SHA-256 over token ids, seeded by a digest of `extra_key` and `cache_salt` in this
domain, and by nothing if a request has neither: no process has a root of its own."""

_BATCH_PAGES = 128
"""Pages that are copied together by the pool at a time, where their bytes are not had in place."""
_LOG_EVERY_S = 10.0


class Asked(NamedTuple):
    """One pool whose presence is asked for: `PoolTransfer` without SGLang."""

    name: str
    policy: str
    window_pages: int


def objects_namespace(
    model: str, weights: str, version: str, groups: tuple[tuple[str, int], ...], chunk_bytes: int = 0
) -> ForeignNamespace:
    """The names of SGLang's pages.

    Args:
        model, weights: whose cache it is.
        version: of SGLang.
        groups: name and bytes of a page of each pool.
        chunk_bytes: of the store's records; 0: chosen from the sizes.

    Raises:
        SpecError: something is out of its limits.
    """
    return ForeignNamespace(
        model=model,
        weights=weights,
        engine=ENGINE,
        version=version,
        hash_algorithm=HASH_ALGORITHM,
        hash_root=HASH_ROOT,
        groups=groups,
        chunk_bytes=chunk_bytes,
    )


class PageStorage:
    """The backend of one rank. SGLang calls from several threads at once; so may anyone.

    Nothing here raises once pools are registered: what cannot be stored or read is False, and counted.

    Args:
        config: the settings.
        position: which rank this is.
        model: name of the model, unless the settings say another.
        version: of SGLang.
        is_zero_copy: whether SGLang asks for the anchor's pages by address (`interface_v1`).

    Raises:
        ConfigError: the model has no name.
    """

    def __init__(
        self, config: BackendConfig, position: Position, *, model: str | None, version: str, is_zero_copy: bool
    ) -> None:
        self.config = config
        self.position = position
        self.pools: dict[str, HostPool] = {}
        self._model = config.model or (model or "")
        if not self._model:
            raise ConfigError("SGLang does not say which model this is; set model among the backend's settings")
        self._version = version
        self._is_zero_copy = is_zero_copy
        self._salt = config.tenant.encode()
        self._counts = BackendCounts()
        self._lock = threading.Lock()
        self._store: BackendStore | None = None
        self._is_closed = False
        self._log_again_s = 0.0

    # Pools

    def register(self, name: str, pool: Any, *, kv_dtype: str = "") -> None:
        """Take a pool of SGLang's, under its name. One that is registered again is replaced.

        Raises:
            ConfigError: it cannot be stored, or what its bytes are is not known. Once the store is open, whatever the
            store has against it.
        """
        described = describe(
            name, pool, self.position, kv_dtype=self.config.kv_dtype or kv_dtype, is_zero_copy=self._is_zero_copy
        )
        with self._lock:
            self.pools[name] = described
            if self._store is not None:
                self._store.extend(self._groups())

    def open(self) -> None:
        """Open the store, now that the pools are known. Idempotent.

        Raises:
            ConfigError: no pool was registered, or the settings do not fit. Whatever `BackendStore` raises.
        """
        with self._lock:
            if self._store is not None or self._is_closed:
                return
            groups = self._groups()
            if not groups:
                raise ConfigError("SGLang has registered no host pool that has pages to store")
            namespace = objects_namespace(
                self._model, self.config.weights, self._version, groups, self.config.chunk_bytes
            )
            self._store = BackendStore(self.config, self.position, namespace)
        for pool in self.pools.values():
            LOG.info(
                "SGLang's pool %s: pages of %d bytes as %s, %s", pool.name, pool.size_bytes, pool.group, pool.facts
            )

    @property
    def objects(self) -> ForeignStore | None:
        """The store's objects; None before it is open, after it was closed, and as long as its owner is gone."""
        store = self._store
        return None if store is None or self._is_closed else store.current()

    def _groups(self) -> tuple[tuple[str, int], ...]:
        return tuple((pool.group, pool.size_bytes) for pool in self.pools.values() if pool.form is not Form.NONE)

    # Finding

    def count_prefix(self, keys: Sequence[str]) -> int:
        """How many of the first pages of the anchor are there."""
        anchor = self.pools.get(ANCHOR)
        found = 0 if anchor is None or anchor.form is Form.NONE else self._count(anchor, keys)
        self._counts.asked(len(keys), found)
        return found

    def restorable(self, keys: Sequence[str], asked: Sequence[Asked]) -> Restorable:
        """Lengths at which the anchor is there and every pool that is asked for has what its policy needs."""
        anchor = self.pools.get(ANCHOR)
        if anchor is None:
            pages = 0
        elif anchor.form is Form.NONE:  # its pages are what pools that are needed for each of them hold
            pages = len(keys) if any(each.policy == ALL_PAGES for each in asked) else 0
        else:
            pages = self._count(anchor, keys)
        present: list[PoolPages] = []
        for each in asked if pages else ():
            if each.name == ANCHOR:
                continue
            pool = self.pools.get(each.name)
            flags = [False] * pages
            if pool is not None and pool.form is not Form.NONE:
                if each.policy == ALL_PAGES:
                    count = self._count(pool, keys[:pages])
                    flags[:count] = [True] * count
                else:
                    flags = self._has(pool, keys[:pages])
            present.append(PoolPages(each.name, each.policy, flags, each.window_pages))
        try:
            answer = restorable(ANCHOR, pages, present)
        except ValueError as error:
            self._complain(str(error))
            answer = Restorable(0, (), {})
        self._counts.asked(len(keys), answer.pages)
        return answer

    def _count(self, pool: HostPool, keys: Sequence[str]) -> int:
        def count(foreign: ForeignStore, part: list[bytes]) -> int:
            return foreign.count_prefix(pool.group, part, salt=self._salt)

        found = 0
        for first in range(0, len(keys), FOREIGN_BATCH_OBJECTS_MAX):
            part = page_keys(keys[first : first + FOREIGN_BATCH_OBJECTS_MAX])
            counted = self._ask(count, part)
            found += counted or 0
            if counted != len(part):
                break
        return found

    def _has(self, pool: HostPool, keys: Sequence[str]) -> list[bool]:
        def has(foreign: ForeignStore, part: list[bytes]) -> list[bool]:
            return foreign.has(pool.group, part, salt=self._salt)

        found: list[bool] = []
        for first in range(0, len(keys), FOREIGN_BATCH_OBJECTS_MAX):
            part = page_keys(keys[first : first + FOREIGN_BATCH_OBJECTS_MAX])
            found += self._ask(has, part) or [False] * len(part)
        return found

    # Moving

    def write(self, name: str, keys: Sequence[str], indices: Indices | None) -> list[bool]:
        """Store pages of a pool; which of them are in the store now.

        Args:
            name: of the pool.
            keys: SGLang's page hashes.
            indices: the pages' slots in the pool.
        """
        pool = self._pool("not_written", name, keys, indices)
        if pool is None:
            return [False] * len(keys)
        if pool.form is Form.NONE:
            return [True] * len(keys)
        lacking = self._lacking(pool, keys)
        self._counts.present(len(keys) - len(lacking))
        answer = [True] * len(keys)
        moved = self._move(
            "written",
            pool,
            [keys[number] for number in lacking],
            lambda first, count: (self._sources(pool, indices, lacking[first : first + count]), lambda at: None),
        )
        for number, is_there in zip(lacking, moved, strict=True):
            answer[number] = is_there
        return answer

    def _lacking(self, pool: HostPool, keys: Sequence[str]) -> list[int]:
        """Which pages are worth writing. Pages come in the order of a prompt: if the first is new, all of them are."""
        if not keys or not self._has(pool, keys[:1])[0]:
            return list(range(len(keys)))
        return [number for number, is_there in enumerate(self._has(pool, keys)) if not is_there]

    def read(self, name: str, keys: Sequence[str], indices: Indices | None) -> list[bool]:
        """Copy pages into a pool; which of them have come. The others' slots may have been written in part.

        What hangs on the anchor's pages comes only where these are there.
        """
        pool = self._pool("not_read", name, keys, indices)
        if pool is None:
            return [False] * len(keys)
        if pool.form is Form.NONE:
            return [True] * len(keys)
        wanted = list(range(len(keys)))
        anchor = self.pools.get(ANCHOR)
        if name != ANCHOR and anchor is not None and anchor.form is not Form.NONE:
            anchored = self._has(anchor, keys)
            wanted = [number for number in wanted if anchored[number]]
            self._counts.failed("not_read", "anchor", len(keys) - len(wanted))
        answer = [False] * len(keys)
        came = self._move(
            "read", pool, [keys[number] for number in wanted], lambda first, count: self._targets(
                pool, indices, wanted[first : first + count]
            )
        )  # fmt: skip
        for number, has_come in zip(wanted, came, strict=True):
            answer[number] = has_come
        return answer

    def write_tensors(self, keys: Sequence[str], values: Sequence[Any]) -> list[bool]:
        """Store pages of the anchor that SGLang has copied together; which of them are in the store now."""
        return self._tensors("not_written", keys, values)

    def read_tensors(self, keys: Sequence[str], targets: Sequence[Any]) -> list[bool]:
        """Copy pages of the anchor into tensors of a page each; which of them have come."""
        return self._tensors("not_read", keys, targets)

    def _tensors(self, what: str, keys: Sequence[str], tensors: Sequence[Any]) -> list[bool]:
        anchor = self.pools.get(ANCHOR)
        if anchor is not None and anchor.form is Form.NONE:
            return [True] * len(keys)
        fitting = [
            anchor is not None
            and anchor.form is Form.FLAT
            and tensor is not None
            and tensor_bytes(tensor) == anchor.size_bytes
            for tensor in tensors
        ]
        answer = [False] * len(keys)
        wanted = [number for number, fits in enumerate(fitting) if fits and number < len(keys)]
        self._counts.failed(what, "indices", len(keys) - len(wanted))
        if anchor is None or not wanted:
            return answer
        memories = [tensors[number] for number in wanted]
        if what == "not_written":
            memories = [each.contiguous() for each in memories]
        moved = self._move(
            what.removeprefix("not_"), anchor, [keys[number] for number in wanted],
            lambda first, count: (memories[first : first + count], lambda number: None),
        )  # fmt: skip
        for number, is_there in zip(wanted, moved, strict=True):
            answer[number] = is_there
        return answer

    def _pool(self, what: str, name: str, keys: Sequence[str], indices: Indices | None) -> HostPool | None:
        """The pool, if the indices are those of so many of its pages, and it is used in the way it was registered."""
        pool = self.pools.get(name)
        if pool is None:
            self._complain(f"SGLang has registered no pool {name}")
        elif pool.form is not Form.NONE and not pool.are_pages(indices, len(keys)):
            slots = 0 if indices is None else len(indices)
            self._complain(f"SGLang's pool {name}: {slots} slots are not {len(keys)} pages of {pool.page_slots}")
        elif name == ANCHOR and pool.form is Form.FLAT:
            self._complain("SGLang asks for pages by address, but interface_v1 is not among the backend's settings")
        else:
            return pool
        self._counts.failed(what, "indices", len(keys))
        return None

    def _sources(self, pool: HostPool, indices: Any, numbers: Sequence[int]) -> list[Any]:
        if pool.form is Form.FLAT:
            return [pool.page(indices, number) for number in numbers]
        return self._places(pool, indices, numbers)

    def _places(self, pool: HostPool, indices: Any, numbers: Sequence[int]) -> list[Any]:
        """Where some pages lie; numbers ascend."""
        first, count = numbers[0], numbers[-1] - numbers[0] + 1
        regions = pool.regions(indices[first * pool.page_slots : (first + count) * pool.page_slots], count)
        return [regions[number - first] for number in numbers]

    def _targets(self, pool: HostPool, indices: Any, numbers: Sequence[int]) -> tuple[list[Any], Callable[[int], None]]:
        if pool.form is Form.FLAT:
            pages = [pool.empty_page() for _ in numbers]
            return pages, lambda at: pool.set_page(indices, numbers[at], pages[at])
        return self._places(pool, indices, numbers), lambda at: None

    def _move(
        self,
        what: str,
        pool: HostPool,
        keys: Sequence[str],
        memories_of: Callable[[int, int], tuple[list[Any], Callable[[int], None]]],
    ) -> list[bool]:
        """Write or read pages in batches, until the deadline of the call."""
        began_s = time.perf_counter()
        deadline = Deadline.after(self.config.call_deadline_s)
        answer: list[bool] = []

        def move(foreign: ForeignStore, part: list[bytes]) -> list[bool]:
            memories, finish = memories_of(len(answer), len(part))
            call = foreign.put if what == "written" else foreign.get
            moved = call(pool.group, part, memories, salt=self._salt, deadline_s=deadline.remaining_s())
            for number, has_moved in enumerate(moved):
                if has_moved:
                    finish(number)
            return moved

        for first in range(0, len(keys), _BATCH_PAGES):
            part = page_keys(keys[first : first + _BATCH_PAGES])
            moved = self._ask(move, part, failing=f"not_{what}")
            if moved is not None:
                self._counts.failed(f"not_{what}", "store", moved.count(False))
            answer += moved or [False] * len(part)
        pages = sum(answer)
        seconds = max(time.perf_counter() - began_s, 1e-9)
        self._counts.moved(what, pages, pages * pool.size_bytes / seconds / (1 << 30))
        return answer

    def _ask(self, work: Callable[[ForeignStore, list[bytes]], Any], part: list[bytes], *, failing: str = "") -> Any:
        """What the store answers; None if there is none, or it raises."""
        reason = "gone"
        try:
            foreign = self.objects
            if foreign is not None:
                return work(foreign, part)
        except KVStoreError as error:
            reason = "error"
            self._complain(f"{type(error).__name__}: {error}")
        if failing:
            self._counts.failed(failing, reason, len(part))
        return None

    # The backend itself

    def clear(self) -> bool:
        """Remove everything of this model and tenant from the store, also what other ranks and servers put there.

        The server's first rank does it for the others, where they share its store: SGLang asks all of them.

        Returns whether nothing is left: what is being read or written at the moment stays, and is tried again until
        the deadline of a call.
        """
        foreign, store = self.objects, self._store
        if foreign is None or store is None:
            return False
        if store.is_cleared_elsewhere:
            return True
        try:
            is_clear = remove_all(foreign.store, self._salt, Deadline.after(self.config.call_deadline_s))
        except KVStoreError as error:
            self._complain(f"the store was not cleared: {error}")
            return False
        if not is_clear:
            self._complain("the store was not cleared: something of it is in use all the time")
        return is_clear

    def flush(self, deadline_s: float | None = None) -> bool:
        """Wait until the pages that were written before are durable: there again after a restart. Whether they are.

        They are on their way as soon as they are written; this waits for nothing that could be hurried. Where another
        process owns the store, only that one can tell, and the answer is no.

        Args:
            deadline_s: `call_deadline_s` by default.
        """
        try:
            foreign = self.objects
            if foreign is None:
                return False
            foreign.store.flush(self.config.call_deadline_s if deadline_s is None else deadline_s)
        except KVStoreError as error:
            self._complain(f"not all pages are durable: {error}")
            return False
        return True

    def statistics(self) -> BackendStatistics:
        """Counters."""
        return self._counts.snapshot()

    def take_samples(self, what: str) -> list[tuple[int, float]]:
        """Pages and GB/s of each call since this was asked last; of `written` or `read`."""
        return self._counts.take_samples(what)

    def close(self) -> None:
        """Close the store. What is called afterwards finds nothing. Idempotent."""
        with self._lock:
            self._is_closed = True
            store, self._store = self._store, None
        if store is not None:
            store.close()

    def _complain(self, text: str) -> None:
        """Log what went wrong, not more often than every few seconds."""
        now_s = time.monotonic()
        if now_s >= self._log_again_s:
            self._log_again_s = now_s + _LOG_EVERY_S
            LOG.warning("%s", text)
