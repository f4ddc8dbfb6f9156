"""How a worker comes by its store: the owner's very own where it lives in the owner's process, else an attached one.

The scheduler's half opens a store and says so with `share`; where a worker runs in the same process it uses that one.
Workers in processes of their own attach at the socket, when they are first told its path. An owner that has gone is
looked for again from time to time; meanwhile there is no store, which to an engine is a miss.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING

from kvstore.errors import KVStoreError, SpecError, StoreClosedError
from kvstore.store import attach_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.spec import ModelSpec
    from kvstore.store import Store

    Attach = Callable[[str, ModelSpec, float], Store]

logger = logging.getLogger(__name__)

OWNER_DEADLINE_S = 2.0
"""How long a step of the engine waits for the owner's answer. Who is stopped is waited for once, and then is gone."""

_LOCK = threading.Lock()
_SHARED: dict[str, Store] = {}


def share(socket: str, store: Store) -> None:
    """Let workers of this process use a store that it owns, under the path of its socket. `withdraw` ends it."""
    with _LOCK:
        _SHARED[socket] = store


def withdraw(socket: str, store: Store) -> None:
    """End `share`; nothing happens if another store has been shared there since."""
    with _LOCK:
        if _SHARED.get(socket) is store:
            del _SHARED[socket]


def shared(socket: str) -> Store | None:
    """The store that this process owns at a socket, if there is one and it is open."""
    with _LOCK:
        store = _SHARED.get(socket)
    return None if store is None or store.is_closed else store


def _forget_in_child() -> None:
    global _LOCK
    _LOCK = threading.Lock()
    _SHARED.clear()  # a forked child's stores are closed


os.register_at_fork(after_in_child=_forget_in_child)


def _attach(socket: str, spec: ModelSpec, deadline_s: float) -> Store:
    return attach_store(socket, spec=spec, deadline_s=deadline_s)


class StoreAccess:
    """A worker's store. Any thread.

    Args:
        spec: the model; a store of another one is refused.
        again_s: how often an owner that has gone is looked for.
        deadline_s: how long an owner may take to answer before it is taken for gone.
        attach: for tests.
        clock: for tests.

    Attributes:
        why_not: why there is no store, for the log; empty while there is one, or none was wanted yet.
        refused: that is because the one that was found last has another model.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        again_s: float,
        deadline_s: float = OWNER_DEADLINE_S,
        attach: Attach = _attach,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._again_s = again_s
        self._deadline_s = deadline_s
        self._attach = attach
        self._clock = clock
        self._lock = threading.Lock()
        self._attaching: threading.Thread | None = None
        self._is_early = False
        self._socket = ""
        self._store: Store | None = None
        self._is_attached = False
        self._try_at_s = 0.0
        self._is_closed = False
        self._logged = ""
        self.why_not = ""
        self.refused: SpecError | None = None

    @property
    def is_gone(self) -> bool:
        """Whether a store was wanted and is not there."""
        return bool(self.why_not)

    def begin(self, socket: str) -> None:
        """Attach already, in the background: the first `get` at this path has less to wait for, or nothing."""
        with self._lock:
            if socket and not self._socket and not self._is_closed:
                self._socket, self._is_early = socket, True
                self._start()

    def get(self, socket: str) -> Store | None:
        """The store at a socket, or None for the time being.

        The first time at a path it is waited for here, until the deadline if its owner is stopped.
        When it has been lost it is attached to by a thread, at most every `again_s`, and this call does not wait.
        """
        if not socket:
            return None
        with self._lock:
            store = self._store
            is_new, is_early, self._is_early = socket != self._socket, self._is_early, False
            if store is not None and not is_new and not store.is_closed:
                return store
            if self._is_closed:
                return None
            if is_new:
                self._drop()
                self._socket, self.why_not, self._try_at_s = socket, "", self._clock()
            elif store is not None:
                self._lost("its owner has closed it, or has gone")
            own = shared(socket)
            if own is not None and own.spec.fingerprint == self._spec.fingerprint:
                self._store, self._is_attached, self.why_not = own, False, ""
                return own
            if self._attaching is not None:
                is_new = False  # what is under way has been begun for this path, or for another one
            elif self._clock() < self._try_at_s:
                return None
            else:
                self._start()
            attaching = self._attaching
        if attaching is None or not (is_new or is_early):
            return None
        attaching.join(self._deadline_s)
        with self._lock:
            return self._store if self._socket == socket else None

    def _start(self) -> None:
        """Attach by a thread. Under the lock."""
        self._attaching = threading.Thread(
            target=self._run, args=(self._socket,), name="kvstore-worker-attach", daemon=True
        )
        self._attaching.start()

    def _run(self, socket: str) -> None:
        store, why_not, refused = None, "", None
        try:
            store = self._attach(socket, self._spec, self._deadline_s)
        except (KVStoreError, OSError) as error:
            why_not = f"{type(error).__name__}: {error}"
            refused = error if isinstance(error, SpecError) else None
        with self._lock:
            self._attaching = None
            if self._is_closed or socket != self._socket:
                if store is not None:
                    store.close()
                return
            if store is None and self._is_early:
                self._socket, self._is_early = "", False  # nobody has asked yet; who asks tries for himself
                return
            self._store, self._is_attached, self.why_not = store, store is not None, why_not
            self.refused = refused
            self._log(socket, why_not)
            if store is None:
                self._try_at_s = self._clock() + self._again_s

    def _log(self, socket: str, why_not: str) -> None:
        """What is new: it is tried again and again."""
        before, self._logged = self._logged, why_not
        if why_not and why_not != before:
            logger.warning("nothing is cached: no store at %s: %s", socket, why_not)
        elif before and not why_not:
            logger.info("attached to the store at %s again", socket)

    def failed(self, store: Store, error: BaseException) -> None:
        """An operation on a store failed. If that says that the store is gone, it is dropped and looked for again."""
        if not isinstance(error, StoreClosedError):
            return
        with self._lock:
            if self._store is store:
                self._lost(f"{type(error).__name__}: {error}")

    def _lost(self, why_not: str) -> None:
        self._drop()
        self.why_not = why_not
        self._log(self._socket, why_not)
        self._try_at_s = self._clock() + self._again_s

    def _drop(self) -> None:
        store = self._take()
        if store is not None:
            # Closing waits for an owner that is stopped, and an engine's step must not.
            threading.Thread(target=store.close, name="kvstore-worker-detach", daemon=True).start()

    def _take(self) -> Store | None:
        """The store that is to be closed, if this has attached to it."""
        store, self._store = self._store, None
        return store if self._is_attached else None

    def close(self) -> None:
        """Detach, unless the store is the owner's own."""
        with self._lock:
            self._is_closed = True
            store, attaching = self._take(), self._attaching
        if store is not None:
            store.close()
        if attaching is not None:
            attaching.join(self._deadline_s)
