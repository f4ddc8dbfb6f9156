"""A prefill instance's sending: what a request has committed goes to the instance that will decode, while it runs."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import KVStoreError

if TYPE_CHECKING:
    from kvstore.adapters.paged import RequestIdentity
    from kvstore.adapters.vllm.opening import SchedulerStore

logger = logging.getLogger(__name__)

PUSH_THREADS = 4
"""Requests whose caches leave at once; further ones wait. The store's own sending has more threads for each."""
PUSH_DEADLINE_S = 60.0


class Push:
    """One request's way to another instance."""

    def __init__(self, token_ids: Any, identity: RequestIdentity, address: str) -> None:
        # A resume point ends before a prompt's last token, so one more is asked for; which one makes no difference.
        self.token_ids = np.append(np.asarray(token_ids, np.uint32), np.uint32(0))
        self.identity = identity
        self.address = address
        self.committed = 0
        self.sent = 0
        self.is_running = False


class Pushes:
    """Sends resume points as they are committed. Any thread."""

    def __init__(self, store: SchedulerStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(PUSH_THREADS, "kvstore-push")
        self._failures: Counter[str] = Counter()
        self._sent = 0

    def committed(self, push: Push, tokens: int) -> None:
        """A longer resume point is there: send it, or once what is under way has arrived."""
        with self._lock:
            if tokens <= push.committed:
                return
            push.committed = tokens
            if push.is_running:
                return
            push.is_running = True
        self._executor.submit(self._run, push)

    @property
    def failures(self) -> Counter[str]:
        """How often what went wrong, by the name of the error's class."""
        with self._lock:
            return self._failures.copy()

    @property
    def sent(self) -> int:
        """Resume points that have arrived."""
        with self._lock:
            return self._sent

    def close(self) -> None:
        """Begin nothing any more. What runs ends with the store."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self, push: Push) -> None:
        while True:
            with self._lock:
                tokens = push.committed
                if tokens <= push.sent:
                    push.is_running = False
                    return
            try:
                self._send(push, tokens)
            except Exception as error:
                if not isinstance(error, KVStoreError):
                    logger.exception("sending a request's cache to %s failed", push.address)
                with self._lock:
                    self._failures[type(error).__name__] += 1
            with self._lock:
                push.sent = tokens

    def _send(self, push: Push, tokens: int) -> None:
        store = self._store.get()
        if store is None:
            return
        identity = push.identity
        extras = tuple(each for each in identity.extras if each.position < tokens)
        match = store.match(push.token_ids[: tokens + 1], salt=identity.salt, adapter=identity.adapter, extras=extras)
        if match.tokens < tokens:
            return
        store.send(match, push.address, total_deadline_s=PUSH_DEADLINE_S).result(PUSH_DEADLINE_S)
        with self._lock:
            self._sent += 1
