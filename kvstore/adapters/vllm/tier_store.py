"""The store behind the secondary tier: opened here, or attached to and looked for again when it is gone."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import kvstore
from kvstore.errors import DeadlineError, KVStoreError
from kvstore.foreign import ForeignStore
from kvstore.limits import FOREIGN_CLOSE_DEADLINE_S

if TYPE_CHECKING:
    from kvstore.adapters.vllm.tier_config import TierConfig
    from kvstore.foreign import ForeignNamespace
    from kvstore.store import Store

LOG = logging.getLogger("kvstore.vllm")


class TierStore:
    """Gives out the foreign store while there is one. Any thread.

    Args:
        config: the tier's settings.
        namespace: whose rows are kept.

    Raises:
        KVStoreError: the store cannot be opened, or attached to, at first.
    """

    def __init__(self, config: TierConfig, namespace: ForeignNamespace) -> None:
        self._config = config
        self._namespace = namespace
        self._lock = threading.Lock()
        self._is_looking = False
        self._is_closed = False
        self._looked_s = time.monotonic()
        self._current: ForeignStore | None = None
        self._old: list[ForeignStore] = []
        store = self._open()
        try:
            self._current = ForeignStore(store, namespace, verify=config.verify, threads=config.threads)
        except BaseException:
            store.close()
            raise

    @property
    def is_own(self) -> bool:
        """Whether this process owns the store: then finding something in it takes microseconds."""
        return not self._config.socket

    def _open(self) -> Store:
        config = self._config
        if config.socket:
            return kvstore.attach(config.socket, spec=self._namespace.spec)
        return kvstore.open(
            self._namespace.spec, dram=config.dram, ssd=list(config.ssd) or None, socket=config.own_socket or None
        )

    def current(self) -> ForeignStore | None:
        """The store; None while it is gone, and then it is looked for, by another thread."""
        found = self._current
        if found is not None and not found.store.is_closed:
            return found
        with self._lock:
            is_due = time.monotonic() - self._looked_s >= self._config.attach_again_s
            if self.is_own or self._is_closed or self._is_looking or not is_due:
                return None
            self._is_looking = True
        threading.Thread(target=self._look, name="kvstore-tier-attach", daemon=True).start()
        return None

    def _look(self) -> None:
        try:
            store = self._open()
        except KVStoreError as error:
            LOG.warning("the store at %s is still gone: %s", self._config.socket, error)
            store = None
        gone: list[ForeignStore] = []
        with self._lock:
            self._looked_s = time.monotonic()
            self._is_looking = False
            if store is not None and not self._is_closed:
                if self._current is not None:
                    self._old.append(self._current)
                gone = list(self._old)
                self._current = ForeignStore(
                    store, self._namespace, verify=self._config.verify, threads=self._config.threads
                )
                store = None
                LOG.info("the store at %s is there again", self._config.socket)
        if store is not None:
            store.close()
        for each in gone:
            self._part_from(each)

    def _part_from(self, gone: ForeignStore) -> None:
        """Of a store whose owner has gone: its memory stays mapped, and thereby taken, until it is closed."""
        try:
            gone.close(FOREIGN_CLOSE_DEADLINE_S)
        except DeadlineError as error:
            LOG.warning("what is left of the store at %s still moves: %s", self._config.socket, error)
            return
        gone.store.close()
        with self._lock:
            if gone in self._old:
                self._old.remove(gone)

    def close(self, deadline_s: float = FOREIGN_CLOSE_DEADLINE_S) -> None:
        """End what runs, then close the store. Idempotent.

        Raises:
            DeadlineError: something still moves, and uses the engine's memory.
        """
        with self._lock:
            self._is_closed = True
            current, self._current = self._current, None
            stores, self._old = [*self._old, *([] if current is None else [current])], []
        for each in stores:
            each.close(deadline_s)
            each.store.close()
