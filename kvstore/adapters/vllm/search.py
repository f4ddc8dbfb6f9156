"""Looking for a request's cache without keeping the engine waiting.

What lies in memory is found at once. What lies on disk, or on another instance, is brought into memory in the
background, and until then the engine is told to ask again. Every wait has a deadline; after it the request is computed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.adapters.vllm.handover import Source
from kvstore.errors import DeadlineError, KVStoreError, LeaseGoneError, StoreClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.adapters.vllm.opening import SchedulerStore
    from kvstore.handle import Handle
    from kvstore.pool import Match, Prompt
    from kvstore.store import Lease, Store

logger = logging.getLogger(__name__)

SEARCH_THREADS = 8
"""Each brings what one request needs from disk; further requests wait for a thread, within their deadline."""
AT_ONCE_S = 0.002
"""How long a question to another process is waited for before the engine is told to ask again."""
PUSH_WAIT_S = 2.0
"""How long what another instance sends is waited for before it is fetched."""
MEMORY_TIER = "dram"


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        tokens: length of the resume point; 0 for a miss.
        lease: holds it until the request has loaded it; None for a miss.
        tier: where it lay.
    """

    tokens: int = 0
    lease: Lease | None = None
    tier: str = ""

    def release(self) -> None:
        if self.lease is not None:
            self.lease.release()


class Searches:
    """Begins searches in the scheduler's store. One thread calls.

    Args:
        store: the scheduler's.
        prepare_deadline_s, fetch_deadline_s: how long a request waits for a disk, and for another instance.

    Attributes:
        failures: how often what went wrong, by the name of the error's class.
    """

    def __init__(
        self,
        store: SchedulerStore,
        *,
        prepare_deadline_s: float,
        fetch_deadline_s: float,
        push_wait_s: float = PUSH_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.prepare_deadline_s = prepare_deadline_s
        self.fetch_deadline_s = fetch_deadline_s
        self.push_wait_s = push_wait_s
        self.clock = clock
        self.failures: Counter[str] = Counter()
        self._executor = ThreadPoolExecutor(SEARCH_THREADS, "kvstore-search")

    def begin(self, prompt: Prompt, source: Source | None = None) -> Search:
        """Look for the longest resume point of a prompt, short of its last token.

        Args:
            source: another instance that has it.
        """
        return Search(self, prompt, source)

    def submit(self, store: Store, prompt: Prompt) -> Future[Found]:
        """For `Search`: look and read in the background."""
        return self._executor.submit(find, store, prompt, self.prepare_deadline_s)

    def ask(self, what: Callable[[], Handle[Any]]) -> Future[Handle[Any]]:
        """For `Search`: ask an owner in the background, since one that is stopped does not answer."""
        return self._executor.submit(what)

    def failed(self, store: Store | None, error: Exception) -> None:
        """For `Search`: something went wrong, which is a miss."""
        self.failures[type(error).__name__] += 1
        if store is not None:
            self.store.failed(store, error)

    def close(self) -> None:
        """Begin nothing any more. What runs ends by its deadlines, or with the store."""
        self._executor.shutdown(wait=False, cancel_futures=True)


class Search:
    """One request's search. `poll` until it answers; then use the lease, or `drop` it."""

    def __init__(self, searches: Searches, prompt: Prompt, source: Source | None) -> None:
        self._searches = searches
        self.prompt = prompt
        self._source = source
        self._began_s = searches.clock()
        self._handle: Handle[Any] | None = None
        self._handle_until_s = 0.0
        self._asking: Future[Handle[Any]] | None = None
        self._future: Future[Found] | None = None
        self._future_until_s = 0.0
        self._found: Found | None = None
        self.ended_s = 0.0

    def poll(self) -> Found | None:
        """What was found; None as long as it is being prepared. Waits `AT_ONCE_S` at most."""
        if self._found is None:
            store = self._searches.store.get()
            try:
                self._found = self._advance(store) if store is not None else self._given_up()
            except Exception as error:
                # Not KVStoreError alone: whatever is wrong with a cache is a miss to the engine.
                if not isinstance(error, KVStoreError):
                    logger.exception("looking for the cache of a request failed")
                self._searches.failed(store, error)
                self._found = self._given_up()
            if self._found is not None:
                self.ended_s = self._searches.clock()
        return self._found

    def is_stale(self, miss_kept_s: float) -> bool:
        """Whether it missed so long ago that it is worth while to look again."""
        return (
            self._found is not None and not self._found.tokens and self._searches.clock() - self.ended_s > miss_kept_s
        )

    def take(self) -> Found:
        """What was found, whose lease is the caller's from here on."""
        found = self.poll() or Found()
        self._found = Found()
        return found

    def drop(self) -> None:
        """It is not wanted any more: end what runs for it, and its lease."""
        if self._handle is not None:
            self._handle.cancel("the request does not wait for it any more")
            self._handle = None
        self._give_up_asking()
        if self._future is not None:
            _release_later(self._future)
            self._future = None
        found, self._found = self._found, Found()
        if found is not None:
            found.release()

    def _given_up(self) -> Found:
        self.drop()
        return Found()

    def _advance(self, store: Store) -> Found | None:
        if self._source is not None and not self._has_come(store, self._source):
            return None
        if self._future is None:
            if self._searches.store.is_local:
                found = find_in_memory(store, self.prompt)
                if found is not None:
                    return found
            self._future = self._searches.submit(store, self.prompt)
            self._future_until_s = self._searches.clock() + self._searches.prepare_deadline_s
            if not self._searches.store.is_local:
                _wait(self._future, AT_ONCE_S)
        return self._prepared(self._future, store)

    def _has_come(self, store: Store, source: Source) -> bool:
        """Whether what another instance has is here, or is not to be waited for any more."""
        try:
            if self._handle is None:
                self._handle = self._asked(store, source)
            is_late = self._handle is None or not self._handle.done()
            if is_late and self._searches.clock() < self._handle_until_s:
                return False
            handle, self._handle = self._handle, None
            if handle is None:
                self._give_up_asking()
            elif is_late:
                handle.cancel("the request does not wait for it any more")
            if is_late and source.is_pushed:
                # It did not come by itself.
                self._source = Source(source.address, source.tokens)
                return self._has_come(store, self._source)
            self._source = None
            if is_late:
                raise DeadlineError(f"{source.address} sent nothing within {self._searches.fetch_deadline_s:g} s")
            assert handle is not None
            handle.result(0.0)
        except StoreClosedError:
            raise
        except KVStoreError as error:
            # What is here already may serve nevertheless.
            self._source = None
            self._searches.failed(store, error)
        return True

    def _asked(self, store: Store, source: Source) -> Handle[Any] | None:
        """What waits for what is sent, or fetches it; None as long as another process has not answered."""
        searches = self._searches
        wait_s = searches.push_wait_s if source.is_pushed else searches.fetch_deadline_s
        self._handle_until_s = self._began_s + wait_s
        if searches.store.is_local:
            return _ask(store, self.prompt, source, wait_s)
        if self._asking is None:
            prompt = self.prompt
            self._asking = searches.ask(lambda: _ask(store, prompt, source, wait_s))
            _wait(self._asking, AT_ONCE_S)
        if not self._asking.done():
            return None
        asking, self._asking = self._asking, None
        return asking.result()

    def _give_up_asking(self) -> None:
        asking, self._asking = self._asking, None
        if asking is not None:
            _cancel_later(asking)

    def _prepared(self, future: Future[Found], store: Store) -> Found | None:
        if future.done():
            self._future = None
            return future.result()
        if self._searches.clock() < self._future_until_s:
            return None
        self._future = None
        _release_later(future)
        self._searches.failed(
            store, DeadlineError(f"preparing took longer than {self._searches.prepare_deadline_s:g} s")
        )
        return (find_in_memory(store, self.prompt, is_all=False) if self._searches.store.is_local else None) or Found()


def find_in_memory(store: Store, prompt: Prompt, *, is_all: bool = True) -> Found | None:
    """What lies in memory of a prompt; None if something deeper lies elsewhere and `is_all`.

    Raises:
        KVStoreError: the store is closed, or cannot be read.
    """
    match = store.match(prompt)
    if not match:
        return Found()
    if match.tier != MEMORY_TIER:
        if is_all:
            return None
        in_memory = [each.tokens for each in match.candidates if each.tier == MEMORY_TIER]
        if not in_memory:
            return Found()
        match = match.at(in_memory[0])
    try:
        return _found(store.read(match), match)
    except LeaseGoneError:
        return None if is_all else Found()


def find(store: Store, prompt: Prompt, deadline_s: float) -> Found:
    """Match and read, bringing into memory what lies elsewhere. Blocks; for a thread.

    Raises:
        KVStoreError: there is nothing that can be read.
    """
    for attempt in (1, 2):
        match = store.match(prompt)
        if not match:
            return Found()
        try:
            return _found(store.read(match, deadline_s=deadline_s), match)
        except StoreClosedError:
            raise
        except LeaseGoneError:
            # Evicted in between: what is there now may do.
            if attempt == 2:
                raise
    return Found()


def _found(lease: Lease, match: Match) -> Found:
    # The store may have fallen back to a shorter resume point.
    return Found(lease.tokens, lease, match.tier or "")


def _ask(store: Store, prompt: Prompt, source: Source, wait_s: float) -> Handle[Any]:
    """Wait for what is sent, or fetch it."""
    if source.is_pushed:
        return store.when_ready(prompt, min(source.tokens, len(prompt) - 1))
    return store.fetch(prompt, source.address, total_deadline_s=wait_s)


def _wait(future: Future[Any], seconds: float) -> None:
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    done.wait(seconds)


def _cancel_later(asking: Future[Handle[Any]]) -> None:
    """End what a question that nobody waits for may still begin."""

    def cancel(ended: Future[Handle[Any]]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            ended.result().cancel("the request does not wait for it any more")

    if not asking.cancel():
        asking.add_done_callback(cancel)


def _release_later(future: Future[Found]) -> None:
    """Let go of what a search that nobody waits for may still find."""

    def release(ended: Future[Found]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            ended.result().release()

    if not future.cancel():
        future.add_done_callback(release)
