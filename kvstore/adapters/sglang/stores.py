"""The store under a backend: opened here or attached to, and looked for again when its owner has gone."""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import AttachError, ConfigError, KVStoreError, OwnerGoneError, SpecError, SsdDirectoryError
from kvstore.foreign import ForeignNamespace, ForeignStore
from kvstore.limits import ATTACH_DEADLINE_S
from kvstore.placement.ssd import SsdOptions, SsdPlace
from kvstore.store import attach_store, open_store

if TYPE_CHECKING:
    from kvstore.adapters.sglang.config import BackendConfig
    from kvstore.adapters.sglang.position import Position
    from kvstore.store import Store

LOG = logging.getLogger("kvstore.sglang")
_POLL_S = 0.05
"""How soon an owner that was not there yet is asked again."""


class BackendStore:
    """The objects of one backend. Any thread.

    Args:
        config: where the store is.
        position: which rank this is.
        namespace: of the objects. Its chunk size is taken from the store if another process has opened that.

    Raises:
        ConfigError: no rank would find what another has written.
        AttachError: no owner answers. SpecError: the store is not one of this model's objects.
        Whatever `kvstore.open` raises.
    """

    def __init__(self, config: BackendConfig, position: Position, namespace: ForeignNamespace) -> None:
        self._config = config
        self._namespace = namespace
        self._lock = threading.Lock()
        self._next_look_s = 0.0
        self._looking: threading.Thread | None = None
        self._is_closed = False
        is_first = position.is_first
        self._socket = config.socket or ("" if is_first else config.own_socket)
        if self._socket:
            self._foreign = self._attach(config.start_deadline_s)
        else:
            if position.is_replicated and position.tp_size > 1 and not config.own_socket:
                raise ConfigError(
                    f"one of {position.tp_size} tensor-parallel ranks writes what all of them hold, so they need one "
                    "store: set own_socket to a path, at which the first rank serves the others, or socket to that of "
                    "`kvstore serve`"
                )
            self._foreign = self._open(position, is_shared=bool(config.own_socket))

    @property
    def namespace(self) -> ForeignNamespace:
        """Of the objects, with the store's chunk size."""
        return self._namespace

    def current(self) -> ForeignStore | None:
        """The objects, or None as long as the store's owner is gone."""
        foreign = self._foreign
        if not foreign.store.is_closed:
            return foreign
        self._look_again()
        return None

    def extend(self, groups: tuple[tuple[str, int], ...]) -> None:
        """Further groups of objects, in the same store."""
        with self._lock:
            self._namespace = replace(self._namespace, groups=groups)
            self._foreign = self._view(self._foreign.store)

    @property
    def is_cleared_elsewhere(self) -> bool:
        """Whether the first rank of this server owns the store, which is asked to clear it when this one is."""
        return bool(self._socket) and not self._config.socket

    def close(self) -> None:
        """Close the store, or part from it. Idempotent.

        What is still on its way to a disk gets as long as a call to arrive.
        """
        with self._lock:
            self._is_closed = True
            looking = self._looking
        if looking is not None:
            looking.join(ATTACH_DEADLINE_S)
        store = self._foreign.store
        if self._config.ssd and not self._socket and not store.is_closed:
            try:
                store.flush(self._config.call_deadline_s)
            except KVStoreError as error:
                LOG.warning("some pages will not be found on disk after a restart: %s", error)
        self._foreign.close()
        store.close()

    # Inside

    def _view(self, store: Store) -> ForeignStore:
        return ForeignStore(store, self._namespace, verify=self._config.verify)

    def _open(self, position: Position, *, is_shared: bool) -> ForeignStore:
        config = self._config
        ssd = None
        if config.ssd:
            places = [SsdPlace.parse(each) for each in config.ssd]
            if not is_shared:  # a directory has one owner
                places = [replace(each, path=f"{each.path}/{position.folder}") for each in places]
                for each in places:
                    _make_directory(each.path)
            ssd = SsdOptions(places, write_bytes_per_day=config.ssd_write_bytes_per_day)
        store = open_store(self._namespace.spec, dram=config.dram, ssd=ssd, socket=config.own_socket or None)
        return self._view(store)

    def _attach(self, deadline_s: float) -> ForeignStore:
        """Attach as soon as there is an owner."""
        deadline = Deadline.after(deadline_s)
        while True:
            try:
                store = attach_store(self._socket)
            except (AttachError, OwnerGoneError):
                if deadline.has_passed:
                    raise
                time.sleep(min(_POLL_S, deadline.remaining_s()))
                continue
            try:
                self._namespace = replace(self._namespace, chunk_bytes=chunk_bytes_of(store, self._namespace))
                return self._view(store)
            except BaseException:
                store.close()
                raise

    def _look_again(self) -> None:
        """Have a thread look for the owner, unless one does, or has done lately."""
        with self._lock:
            if self._is_closed or not self._socket or self._looking is not None:
                return
            if time.monotonic() < self._next_look_s:
                return
            self._looking = threading.Thread(target=self._look, name="kvstore-sglang-attach", daemon=True)
            self._looking.start()

    def _look(self) -> None:
        try:
            found = self._attach(0.0)
        except KVStoreError as error:
            LOG.warning("the store at %s is not there: %s; looking again in %g s", self._socket, error,
                        self._config.attach_again_s)  # fmt: skip
            found = None
        with self._lock:
            gone = None
            if found is not None:
                gone, self._foreign = (found, self._foreign) if self._is_closed else (self._foreign, found)
            self._next_look_s = time.monotonic() + self._config.attach_again_s
            self._looking = None
        if gone is not None:
            gone.close()
            gone.store.close()


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SsdDirectoryError(f"{path} cannot be made: {error}") from error


def chunk_bytes_of(store: Store, namespace: ForeignNamespace) -> int:
    """The chunk size of a store of a namespace's model.

    Raises:
        SpecError: it holds something else.
    """
    spec = store.spec
    tensors = spec.groups[0].tensors
    chunk_bytes = tensors[0].inner[-1] if len(spec.groups) == 1 and len(tensors) == 1 and tensors[0].inner else 0
    expected = namespace.spec
    if chunk_bytes and replace(namespace, chunk_bytes=chunk_bytes).spec == spec:
        return int(chunk_bytes)
    raise SpecError(
        f"the store that this backend was told of holds {spec.model!r} with weights {spec.weights!r}, not "
        f"{expected.model!r} with weights {expected.weights!r}; start it with the spec that "
        "`python -m kvstore.adapters.sglang` prints, or set another socket"
    )
